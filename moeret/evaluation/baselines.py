"""What routed search must beat: BM25, one embedding for the whole pool, and both fused."""

from collections.abc import Callable, Sequence

import numpy as np
from jaxtyping import Float, Int

from moeret.config import IndexConfig
from moeret.data.lexical import Lexical, best, stems
from moeret.retrieval.fusion import Ranking, fuse
from moeret.retrieval.hnsw import build_vector_index, exact_search
from moeret.retrieval.search import Retriever

System = Callable[[Sequence[str], int], list[tuple[np.ndarray, np.ndarray]]]
"""(query texts, k) -> each query's (rows, scores), best first."""


def contents_of(retriever: Retriever, rows: Int[np.ndarray, "N"]) -> list[str]:
    """Titles and texts of documents by row."""
    held = retriever.held()
    return [held[row][1].contents for row in rows]


def bm25_system(retriever: Retriever) -> System:
    """BM25 over titles and texts of every document."""
    rows = retriever.distinct()
    lexical = Lexical.of(contents_of(retriever, rows))

    def search(texts: Sequence[str], k: int) -> list[tuple[np.ndarray, np.ndarray]]:
        found = []
        for query in stems(texts):
            scores = lexical.scores(query)
            places = best(scores, k)
            places = places[np.lexsort((places, -scores[places]))]
            found.append((rows[places], scores[places]))
        return found

    return search


def base_system(retriever: Retriever) -> System:
    """The base with all documents of all domains in one HNSW, as one would do without experts."""
    model = retriever.model
    rows = retriever.distinct()
    if model.tower == "query":
        vectors = retriever.vectors()[rows]
    else:
        vectors = model.embedder.base(model.with_prompt(contents_of(retriever, rows), "document"))
    config = IndexConfig(**retriever.index.meta["config"])
    index = build_vector_index(vectors, config)

    def search(texts: Sequence[str], k: int) -> list[tuple[np.ndarray, np.ndarray]]:
        found = index.search(model.embedder.base(model.with_prompt(texts, "query")), k)
        return [(rows[places], scores) for places, scores in found]

    return search


def exact_system(retriever: Retriever, encode: Callable[[Sequence[str]], Float[np.ndarray, "Q D"]]) -> System:
    """One vector for each query, compared with every document of the pool."""
    rows = retriever.distinct()
    vectors = retriever.vectors()[rows]

    def search(texts: Sequence[str], k: int) -> list[tuple[np.ndarray, np.ndarray]]:
        places, scores = exact_search(encode(texts), vectors, min(k, len(vectors)))
        return list(zip(rows[places], scores, strict=True))

    return search


def fused_system(retriever: Retriever, systems: Sequence[System]) -> System:
    """Reciprocal Rank Fusion of several systems' lists."""

    def search(texts: Sequence[str], k: int) -> list[tuple[np.ndarray, np.ndarray]]:
        lists = zip(*(system(texts, k) for system in systems), strict=True)
        return [fuse([Ranking(rows, scores, rows) for rows, scores in own], "rrf", k) for own in lists]

    return search
