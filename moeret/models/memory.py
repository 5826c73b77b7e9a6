"""What counts beside the cosine of two vectors: the words of a query, and what the domain's train queries were answered with.

The score of a document is  cosine + lexical * BM25 + memory * (how much nearer than others a train query was that it answered).
A *memory* keeps train queries as their expert embeds them: weights learn what they have in common, the memory keeps which
document each was answered with (cf. nearest-neighbour language models, arXiv 1911.00172). Domains differ in what they want of
both, from nothing to much, so every expert has a *blend* of its own, chosen on dev.
"""

import hashlib
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Float16, Int, UInt8

CANDIDATES = 100
"""Documents by vector and by words each, at least, that get their whole score; those that a memory names join them."""
NEIGHBOURS = 31
"""Nearest train queries that a query is compared with; the last of them says what is near for it."""


class Blend(NamedTuple):
    """How much the words and the memory count beside the cosine; both 0: nothing."""

    lexical: float = 0.0
    memory: float = 0.0

    def scores(
        self, cosine: Float[np.ndarray, "*N"], bm25: Float[np.ndarray, "*N"], recalled: Float[np.ndarray, "*N"]
    ) -> Float[np.ndarray, "*N"]:
        """Documents' scores by what speaks for each."""
        return cosine + np.float32(self.lexical) * bm25 + np.float32(self.memory) * recalled


class Memory(NamedTuple):
    """Train queries and the documents they were answered with: those of query t are documents[offsets[t]:offsets[t + 1]].

    Documents go by the digest of what is embedded of them, so that one is remembered wherever it is indexed, and forgotten
    once its text is another.
    """

    queries: Float16[np.ndarray, "T D"]
    offsets: Int[np.ndarray, "T+1"]
    documents: UInt8[np.ndarray, "A 16"]

    @classmethod
    def of(cls, queries: Float[np.ndarray, "T D"], answers: Sequence[Sequence[str]]) -> "Memory":
        """A memory of embedded queries and the contents of each one's documents."""
        held = b"".join(digest(contents) for own in answers for contents in own)
        offsets = np.cumsum([0, *map(len, answers)])
        return cls(queries.astype(np.float16), offsets, np.frombuffer(held, np.uint8).reshape(-1, 16))

    def answers(self, contents: Sequence[str]) -> tuple[Int[np.ndarray, "T+1"], Int[np.ndarray, "_"]]:
        """(offsets, places) of each query's documents among these, every copy of one: none for a query whose are not there."""
        places: dict[bytes, list[int]] = {}
        for place, own in enumerate(contents):
            places.setdefault(digest(own), []).append(place)
        found = [
            sorted({place for own in self.documents[start:end] for place in places.get(own.tobytes(), ())})
            for start, end in zip(self.offsets[:-1], self.offsets[1:], strict=True)
        ]
        return np.cumsum([0, *map(len, found)]), np.array([place for own in found for place in own], np.int64)


def digest(contents: str) -> bytes:
    """What a memory knows a document by."""
    return hashlib.sha256(contents.encode()).digest()[:16]


def remembered(
    found: Int[np.ndarray, "K"],
    scores: Float[np.ndarray, "K"],
    offsets: Int[np.ndarray, "T+1"],
    rows: Int[np.ndarray, "A"],
) -> tuple[Int[np.ndarray, "N"], Float[np.ndarray, "N"]]:
    """(rows, values) of the documents that answered the nearest train queries.

    `found` are these, best first, and `scores` their cosines. A document's value is by how much the nearest query that it
    answered is nearer than the farthest of them all: measured so, bases with wide and with narrow cosines are alike.
    """
    answers = [rows[offsets[query] : offsets[query + 1]] for query in found]
    own = np.concatenate(answers) if answers else rows[:0]
    values = np.repeat(scores - scores.min(initial=np.inf), [len(answer) for answer in answers])
    distinct, first = np.unique(own, return_index=True)  # the first is the nearest query's
    return distinct, values[first].astype(np.float32)
