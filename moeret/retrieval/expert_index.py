"""One expert's index: its documents' vectors, their words, and what its train queries were answered with.

What a query finds by each of them are candidates; all of these get their whole score, so a document that one finds is not
lost because another ranks it low. The documents lie in parts, which are searched one by one.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from jaxtyping import Bool, Float, Int

from moeret.data.lexical import Lexical, best
from moeret.models.memory import CANDIDATES, NEIGHBOURS, Blend, remembered
from moeret.retrieval.hnsw import Allowed, VectorIndex
from moeret.retrieval.segment import Answers

Found = tuple[Int[np.ndarray, "K"], Float[np.ndarray, "K"]]
"""Rows and scores, best first."""


@dataclass(frozen=True, slots=True)
class Part:
    """Documents that are found together: a segment's, those that are `live` (all if None), numbered from `first` on.

    `lexical` and `answers` are None where there are none.
    """

    first: int
    vectors: VectorIndex
    lexical: Lexical | None = None
    answers: Answers | None = None
    live: Allowed | None = None
    _rows: Int[np.ndarray, "_"] | None = field(init=False)  # those that live, if not all do

    def __post_init__(self):
        object.__setattr__(self, "_rows", None if self.live is None else np.flatnonzero(self.live.rows))

    def numbered(self, rows: Int[np.ndarray, "K"]) -> Int[np.ndarray, "K"]:
        """The numbers of some of the live rows."""
        return self.first + (rows if self._rows is None else np.searchsorted(self._rows, rows))

    def rows_of(self, numbers: Int[np.ndarray, "K"]) -> Int[np.ndarray, "K"]:
        """The rows that have these numbers."""
        return numbers - self.first if self._rows is None else self._rows[numbers - self.first]

    def search(
        self,
        vectors: Float[np.ndarray, "Q D"],
        words: Sequence[Sequence[str]],
        queries: dict[int, Found],
        blends: Sequence[Blend],
        k: int,
        allowed: Allowed | None,
    ) -> list[Found]:
        """Each query's `k` best live documents, by their numbers; `queries` are the train queries near to some."""
        allowed = allowed or self.live
        blended = np.array([any(own) for own in blends], bool)
        found: list[Found] = [None] * len(vectors)
        # No query is searched otherwise because of its neighbours in a batch.
        for rows, count in ((np.flatnonzero(~blended), k), (np.flatnonzero(blended), max(k, CANDIDATES))):
            if len(rows):
                for row, own in zip(rows, self.vectors.search(vectors[rows], count, allowed), strict=True):
                    found[row] = own
        for row in np.flatnonzero(blended):
            near, asked = found[row][0], queries.get(row)
            found[row] = self._blend(vectors[row], near, words[row], asked, blends[row], k, allowed and allowed.rows)
        return [(self.numbered(rows), scores) for rows, scores in found]

    def _blend(
        self,
        vector: Float[np.ndarray, "D"],
        near: Int[np.ndarray, "K"],
        words: Sequence[str],
        queries: Found | None,
        blend: Blend,
        k: int,
        allowed: Bool[np.ndarray, "N"] | None,
    ) -> Found:
        """One query's best documents: of those near its vector, those with its words, those that answered its like."""
        candidates = [near]
        if lexical := self.lexical if blend.lexical else None:
            bm25 = lexical.scores(words)
            candidates.append(best(bm25 if allowed is None else np.where(allowed, bm25, 0), max(k, CANDIDATES)))
        if asked := queries is not None and self.answers is not None:
            answers, values = remembered(*queries, *self.answers)
            if allowed is not None:
                answers, values = answers[allowed[answers]], values[allowed[answers]]
            candidates.append(answers)
        rows = np.unique(np.concatenate(candidates))
        counted, recalled = np.zeros((2, len(rows)), np.float32)
        if lexical:
            counted = bm25[rows]
        if asked:
            recalled[np.searchsorted(rows, answers)] = values
        scores = blend.scores(self.vectors.vectors_of(rows) @ vector, counted, recalled)
        order = np.lexsort((rows, -scores))[:k]
        return rows[order], scores[order]


@dataclass(frozen=True, slots=True)
class ExpertIndex:
    """All documents of one expert; `memory` are the train queries that their answers are of, None if nothing is known of any."""

    parts: tuple[Part, ...]
    memory: VectorIndex | None = None

    def search(
        self,
        vectors: Float[np.ndarray, "Q D"],
        words: Sequence[Sequence[str]],
        blends: Sequence[Blend],
        k: int,
        allowed: Sequence[Allowed | None] | None = None,
    ) -> list[Found]:
        """Each query's `k` best documents by cosine and blend; fewer only if there are fewer (`allowed`, for each part)."""
        has_words = any(part.lexical for part in self.parts)
        has_memory = self.memory is not None and any(part.answers for part in self.parts)
        blends = [Blend(own.lexical if has_words else 0.0, own.memory if has_memory else 0.0) for own in blends]
        asked = np.flatnonzero([own.memory > 0 for own in blends])
        near = (
            dict(zip(asked.tolist(), self.memory.search(vectors[asked], NEIGHBOURS), strict=True)) if len(asked) else {}
        )
        found = [
            part.search(vectors, words, near, blends, k, own)
            for part, own in zip(self.parts, allowed or [None] * len(self.parts), strict=True)
        ]
        return found[0] if len(found) == 1 else [_best_of(own, k) for own in zip(*found, strict=True)]


def _best_of(found: Sequence[Found], k: int) -> Found:
    rows, scores = (np.concatenate(own) for own in zip(*found, strict=True))
    order = np.lexsort((rows, -scores))[:k]
    return rows[order], scores[order]
