"""What routed search must beat: BM25, one embedding for the whole pool, and both fused."""

import logging
from collections.abc import Callable, Sequence

import bm25s
import numpy as np
import Stemmer
from jaxtyping import Float

from moeret.config import IndexConfig
from moeret.retrieval.fusion import Ranking, fuse
from moeret.retrieval.hnsw import build_segment, exact_search
from moeret.retrieval.search import Retriever

System = Callable[[Sequence[str], int], list[tuple[np.ndarray, np.ndarray]]]
"""(query texts, k) -> each query's (rows, scores), best first."""


def bm25_system(retriever: Retriever) -> System:
    """BM25 (k1 1.2, b 0.75, English stop words, Snowball stems) over titles and texts of every document."""
    documents = [document for _, document in retriever.held()]
    stemmer = Stemmer.Stemmer("english")
    logging.getLogger("bm25s").setLevel(logging.WARNING)  # it sets itself to DEBUG when imported

    def tokens(texts: list[str]):
        return bm25s.tokenize(texts, stopwords="en", stemmer=stemmer, show_progress=False)

    index = bm25s.BM25(k1=1.2, b=0.75)
    index.index(tokens([document.contents for document in documents]), show_progress=False)

    def search(texts: Sequence[str], k: int) -> list[tuple[np.ndarray, np.ndarray]]:
        rows, scores = index.retrieve(tokens(list(texts)), k=min(k, len(documents)), show_progress=False)
        return [(own[s > 0], s[s > 0]) for own, s in zip(rows, scores, strict=True)]

    return search


def base_system(retriever: Retriever) -> System:
    """The base with all documents of all domains in one HNSW, as one would do without experts."""
    model = retriever.model
    if model.tower == "query":
        vectors = retriever.vectors()
    else:
        texts = [document.contents for _, document in retriever.held()]
        vectors = model.embedder.base(model.with_prompt(texts, "document"))
    config = IndexConfig(**retriever.index.meta["config"])
    segment = build_segment(vectors, np.arange(len(vectors)), config)

    def search(texts: Sequence[str], k: int) -> list[tuple[np.ndarray, np.ndarray]]:
        return segment.search(model.embedder.base(model.with_prompt(texts, "query")), k)

    return search


def exact_system(retriever: Retriever, encode: Callable[[Sequence[str]], Float[np.ndarray, "Q D"]]) -> System:
    """One vector for each query, compared with every document of the pool."""
    vectors = retriever.vectors()

    def search(texts: Sequence[str], k: int) -> list[tuple[np.ndarray, np.ndarray]]:
        return list(zip(*exact_search(encode(texts), vectors, min(k, len(vectors))), strict=True))

    return search


def fused_system(retriever: Retriever, systems: Sequence[System]) -> System:
    """Reciprocal Rank Fusion of several systems' lists."""
    rows = np.arange(sum(retriever.sizes.values()))

    def search(texts: Sequence[str], k: int) -> list[tuple[np.ndarray, np.ndarray]]:
        lists = zip(*(system(texts, k) for system in systems), strict=True)
        return [fuse([Ranking(*ranked) for ranked in own], "rrf", k, rows) for own in lists]

    return search
