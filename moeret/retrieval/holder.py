"""Who holds an expert's index and answers for it: this process, or another one (moeret.retrieval.ray_serving).

An index's rows are its documents that live, numbered from 0 on, segment by segment.
"""

import threading
from collections.abc import Iterator, Sequence
from typing import NamedTuple, Protocol

import numpy as np
from jaxtyping import Float, Int, UInt64

from moeret.data.lexical import Lexical, Statistics
from moeret.models.memory import Blend
from moeret.retrieval.expert_index import ExpertIndex, Part
from moeret.retrieval.filters import Where
from moeret.retrieval.hnsw import Allowed, VectorIndex
from moeret.retrieval.segment import LiveSegment
from moeret.types import Document

_FILTERS_KEPT = 16


class Found(NamedTuple):
    """What one query found in one index: rows and scores, best first, and what tells each row's document."""

    rows: Int[np.ndarray, "K"]
    scores: Float[np.ndarray, "K"]
    identities: UInt64[np.ndarray, "K"]


class Holder(Protocol):
    """One expert's index as it was published once. Any number of threads may ask at once."""

    def search(
        self,
        vectors: Float[np.ndarray, "Q D"],
        words: Sequence[Sequence[str]],
        blends: Sequence[Blend],
        k: int,
        where: Where | None,
    ) -> list[Found]:
        """Each query's `k` best documents that fulfil the filter; fewer only if there are fewer."""

    def fetch(self, rows: Int[np.ndarray, "K"]) -> list[tuple[Document, bool]]:
        """The documents of rows that are distinct and ascend, and whether each is without a domain."""

    def identities(self) -> UInt64[np.ndarray, "N"]:
        """What tells each row's document: one that lies in two indexes has two rows."""

    def vectors(self) -> Float[np.ndarray, "N D"]:
        """Every row's vector."""

    def close(self) -> None:
        """Gives the files back."""


class LocalHolder:
    """Holds segments that are open in this process, with the words of all documents that are searched together."""

    def __init__(self, segments: Sequence[LiveSegment], words: Statistics | None, memory: VectorIndex | None):
        self.segments = tuple(segments)
        counts = [int(own.live.sum()) for own in self.segments]
        self._firsts = np.cumsum([0, *counts])[:-1]
        self._parts = tuple(_part(own, int(at), words) for own, at in zip(self.segments, self._firsts, strict=True))
        self._index = ExpertIndex(self._parts, memory)
        self._filters: dict[str, list[Allowed]] = {}
        self._lock = threading.Lock()

    def search(
        self,
        vectors: Float[np.ndarray, "Q D"],
        words: Sequence[Sequence[str]],
        blends: Sequence[Blend],
        k: int,
        where: Where | None,
    ) -> list[Found]:
        """Each query's `k` best documents that fulfil the filter; fewer only if there are fewer."""
        found = self._index.search(vectors, words, blends, k, None if where is None else self._allowed(where))
        every = np.concatenate([rows for rows, _ in found])
        same = np.empty(len(every), np.uint64)
        for own, mine, local in self._by_segment(every):
            same[mine] = own.segment.identities[local]
        ends = np.cumsum([len(rows) for rows, _ in found])
        return [Found(*own, same[end - len(own[0]) : end]) for own, end in zip(found, ends, strict=True)]

    def fetch(self, rows: Int[np.ndarray, "K"]) -> list[tuple[Document, bool]]:
        """The documents of rows that are distinct and ascend, and whether each is without a domain."""
        found: list[tuple[Document, bool]] = []
        for own, _, local in self._by_segment(rows):
            documents = own.segment.store.fetch(local)
            found += [(documents[row], bool(own.segment.loose[row])) for row in local.tolist()]
        return found

    def identities(self) -> UInt64[np.ndarray, "N"]:
        """What tells each row's document: one that lies in two indexes has two rows."""
        return np.concatenate([own.segment.identities[own.live] for own in self.segments])

    def vectors(self) -> Float[np.ndarray, "N D"]:
        """Every row's vector."""
        return np.concatenate([own.segment.vectors.vectors_of(np.flatnonzero(own.live)) for own in self.segments])

    def close(self) -> None:
        """Gives the files back."""
        for own in self.segments:
            own.segment.store.close()

    def _by_segment(self, rows: Int[np.ndarray, "_"]) -> Iterator[tuple[LiveSegment, np.ndarray, np.ndarray]]:
        """(segment, which of the rows are in it, their rows there), in the segments' order."""
        places = np.searchsorted(self._firsts, rows, side="right") - 1
        for place in np.unique(places):
            mine = np.flatnonzero(places == place)
            yield self.segments[place], mine, self._parts[place].rows_of(rows[mine])

    def _allowed(self, where: Where) -> list[Allowed]:
        """For each part the rows that a filter allows; kept for the next time, because finding them reads the database."""
        key = repr(sorted((field, repr(condition)) for field, condition in where.items()))
        with self._lock:
            masks = self._filters.pop(key, None)
        if masks is None:
            masks = [
                own.segment.vectors.allow(own.live & own.segment.store.matching(where, len(own.segment)))
                for own in self.segments
            ]
        with self._lock:
            self._filters[key] = masks  # the youngest last
            while len(self._filters) > _FILTERS_KEPT:
                self._filters.pop(next(iter(self._filters)))
        return masks


def _part(own: LiveSegment, first: int, words: Statistics | None) -> Part:
    segment = own.segment
    lexical = None if segment.counts is None or words is None else Lexical(segment.counts, words)
    live = None if own.live.all() else segment.vectors.allow(own.live)
    return Part(first, segment.vectors, lexical, segment.answers, live)
