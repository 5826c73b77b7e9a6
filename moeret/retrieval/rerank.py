"""Another model's say in the order of the best hits."""

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np

from moeret.config import require
from moeret.types import Hit

Rerank = Callable[[Sequence[tuple[str, str]]], Sequence[float]]
"""Scores pairs of a query and a document's contents, the higher the better, as `CrossEncoder.predict` does."""
CANDIDATES = 50
"""Hits of a query that are scored anew, unless more are asked for."""


def reranked(queries: Sequence[str], found: Sequence[Sequence[Hit]], rerank: Rerank, k: int) -> list[list[Hit]]:
    """Each query's best `k` of its hits by the scores of `rerank`, which they have then; equal ones in their order before.

    Raises:
      ConfigError: `rerank` does not give a number for each pair.
    """
    pairs = [
        (query, f"{hit.title} {hit.text}".strip()) for query, hits in zip(queries, found, strict=True) for hit in hits
    ]
    scores = np.asarray(rerank(pairs) if pairs else [], np.float64)
    fits = scores.shape == (len(pairs),)
    require(fits, f"rerank must give a number for each of {len(pairs)} pairs, got shape {scores.shape}")
    require(bool(np.isfinite(scores).all()), "rerank gave numbers that are not finite")
    ends = np.cumsum([len(hits) for hits in found])
    return [_best(hits, scores[end - len(hits) : end], k) for hits, end in zip(found, ends, strict=True)]


def _best(hits: Sequence[Hit], scores: np.ndarray, k: int) -> list[Hit]:
    order = np.argsort(-scores, kind="stable")[:k]
    return [
        dataclasses.replace(hits[place], score=float(scores[place]), rank=rank) for rank, place in enumerate(order, 1)
    ]
