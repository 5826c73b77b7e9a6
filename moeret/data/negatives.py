"""Mined hard negatives: documents that the base ranks high for a query and nobody judged relevant."""

import numpy as np
from jaxtyping import Float, Int

_QUERIES_AT_ONCE = 256


def mine_hard_negatives(
    queries: Float[np.ndarray, "Q D"],
    documents: Float[np.ndarray, "N D"],
    positives: list[Int[np.ndarray, "P"]],
    count: int,
    margin: float = 0.95,
) -> Int[np.ndarray, "Q count"]:
    """The `count` best-scoring documents of each query that are not its positives, best first.

    A document that scores above `margin` times the query's worst positive is left out as a likely unjudged positive
    (the positive-aware filter of NV-Retriever, arXiv 2407.15831), unless too few would remain. Vectors are unit length.
    """
    mined = np.empty((len(queries), count), np.int64)
    for start in range(0, len(queries), _QUERIES_AT_ONCE):
        scores = queries[start : start + _QUERIES_AT_ONCE] @ documents.T
        for row, own in enumerate(positives[start : start + _QUERIES_AT_ONCE]):
            limit = margin * scores[row, own].min()
            scores[row, own] = -np.inf
            # Suspects rank behind every other document rather than out of reach: a tiny corpus must still give `count`.
            ranked = np.where(scores[row] > limit, scores[row] - 4.0, scores[row])
            mined[start + row] = np.argsort(-ranked, kind="stable")[:count]
    return mined
