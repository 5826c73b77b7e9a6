"""Label-free pairs: queries made from a domain's own documents, where nobody has judged any.

A document with a title is asked for by its title; one without by a random span of its text (the independent cropping of
Contriever, arXiv 2112.09118, with the whole document on the other side, as in the inverse cloze task, arXiv 1906.00300).
"""

import hashlib
from collections.abc import Sequence

import numpy as np

from moeret.data.beir import Judged, sample_ids
from moeret.errors import DataError
from moeret.types import Document

PAIRS = 20_000
"""Documents that become pairs at most."""
LEAST_WORDS = 8
"""Of a text that a span is taken from."""
SPAN = (4, 16)
"""Least and most words of a span."""


def label_free_pairs(corpus: Sequence[Document]) -> Judged:
    """One query for each of at most PAIRS documents, always the same ones; a query's id is its document's.

    Raises:
      DataError: fewer than two documents have a title and a text, or a text of LEAST_WORDS words.
    """
    queries = {document.id: query for document in corpus if (query := _query(document))}
    kept = sample_ids(queries, PAIRS)
    if len(kept) < 2:
        raise DataError(
            f"{len(kept)} of {len(corpus)} documents have a title and a text, or a text of {LEAST_WORDS} words: too few to "
            "learn from without judged queries"
        )
    return Judged({id: queries[id] for id in kept}, {id: {id: 1} for id in kept})


def _query(document: Document) -> str:
    """What asks for a document; empty if it has too few words."""
    if document.title.strip() and document.text.strip():
        return document.title
    words = document.text.split()
    if len(words) < LEAST_WORDS:
        return ""
    random = np.random.default_rng(int.from_bytes(hashlib.sha256(document.id.encode()).digest()[:8]))
    length = int(random.integers(SPAN[0], min(SPAN[1], len(words) // 2) + 1))
    start = int(random.integers(0, len(words) - length + 1))
    return " ".join(words[start : start + length])
