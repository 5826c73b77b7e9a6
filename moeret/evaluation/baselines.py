"""What routed search must beat: BM25 over the pool, and the base alone in one HNSW over the pool."""

import logging
from collections.abc import Callable, Sequence

import bm25s
import numpy as np
import Stemmer

from moeret.config import IndexConfig
from moeret.retrieval.hnsw import build_segment
from moeret.retrieval.search import Retriever
from moeret.types import Hit

System = Callable[[Sequence[str], int], list[list[Hit]]]
"""(query texts, k) -> hits."""


def bm25_system(retriever: Retriever) -> System:
    """BM25 (k1 1.2, b 0.75, English stop words, Snowball stems) over titles and texts of every document."""
    documents = retriever.documents(range(sum(retriever.sizes.values())))
    stemmer = Stemmer.Stemmer("english")
    logging.getLogger("bm25s").setLevel(logging.WARNING)  # it sets itself to DEBUG when imported

    def tokens(texts: list[str]):
        return bm25s.tokenize(texts, stopwords="en", stemmer=stemmer, show_progress=False)

    index = bm25s.BM25(k1=1.2, b=0.75)
    index.index(tokens([documents[row].contents for row in sorted(documents)]), show_progress=False)

    def search(texts: Sequence[str], k: int) -> list[list[Hit]]:
        rows, scores = index.retrieve(tokens(list(texts)), k=min(k, len(documents)), show_progress=False)
        return retriever.hits([(own[s > 0], s[s > 0]) for own, s in zip(rows, scores, strict=True)])

    return search


def base_system(retriever: Retriever) -> System:
    """The base with all documents of all domains in one HNSW, as one would do without experts."""
    model = retriever.model
    if model.tower == "query":
        vectors = retriever.vectors()
    else:
        documents = retriever.documents(range(sum(retriever.sizes.values())))
        texts = [documents[row].contents for row in sorted(documents)]
        vectors = model.embedder.base(model.with_prompt(texts, "document"))
    config = IndexConfig(**retriever.index.meta["config"])
    segment = build_segment(vectors, np.arange(len(vectors)), config)

    def search(texts: Sequence[str], k: int) -> list[list[Hit]]:
        return retriever.hits(segment.search(model.embedder.base(model.with_prompt(texts, "query")), k))

    return search
