"""Label-free pairs: queries made from a domain's own documents, where nobody has judged any.

A document with a title is asked for by its title; one without by a random span of its text (the independent cropping of
Contriever, arXiv 2112.09118). On the other side stands what is left of the document (the inverse cloze task, arXiv 1906.00300):
with the query still in it there would be nothing to learn but to compare words, which BM25 can.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import replace

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


def label_free_pairs(corpus: Sequence[Document]) -> tuple[Judged, list[Document]]:
    """One query for each of at most PAIRS documents, always the same ones, and the corpus without them.

    A query's id is its document's.

    Raises:
      DataError: fewer than two documents have a title and a text, or a text of LEAST_WORDS words.
    """
    made = {document.id: pair for document in corpus if (pair := _pair(document))}
    kept = sample_ids(made, PAIRS)
    if len(kept) < 2:
        raise DataError(
            f"{len(kept)} of {len(corpus)} documents have a title and a text, or a text of {LEAST_WORDS} words: too few to "
            "learn from without judged queries"
        )
    judged = Judged({id: made[id][0] for id in kept}, {id: {id: 1} for id in kept})
    return judged, [made[document.id][1] if document.id in judged.queries else document for document in corpus]


def _pair(document: Document) -> tuple[str, Document] | None:
    """What asks for a document, and the rest of it; None if it has too few words."""
    if document.title.strip() and document.text.strip():
        return document.title, replace(document, title="")
    words = document.text.split()
    if len(words) < LEAST_WORDS:
        return None
    random = np.random.default_rng(int.from_bytes(hashlib.sha256(document.id.encode()).digest()[:8]))
    length = int(random.integers(SPAN[0], min(SPAN[1], len(words) // 2) + 1))
    start = int(random.integers(0, len(words) - length + 1))
    rest = [*words[:start], *words[start + length :]]
    return " ".join(words[start : start + length]), replace(document, text=" ".join(rest))
