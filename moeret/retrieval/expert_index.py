"""One expert's index: its documents' vectors, their words, and what its train queries were answered with.

What a query finds by each of them are candidates; all of these get their whole score, so a document that one finds is not
lost because another ranks it low.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float, Int
from safetensors.numpy import load_file, save_file

from moeret.artifact import Artifact, Draft
from moeret.config import IndexConfig
from moeret.data.lexical import Lexical, best
from moeret.models.memory import CANDIDATES, NEIGHBOURS, Blend, Memory, remembered
from moeret.retrieval.hnsw import Segment, build_segment, read_segment, write_segment
from moeret.types import Document

Found = tuple[Int[np.ndarray, "K"], Float[np.ndarray, "K"]]
"""Rows and scores, best first."""


@dataclass(frozen=True, slots=True)
class IndexedMemory:
    """A memory whose documents are rows of the index; its train queries are found as documents are."""

    queries: Segment
    offsets: Int[np.ndarray, "T+1"]
    rows: Int[np.ndarray, "A"]


@dataclass(frozen=True, slots=True)
class ExpertIndex:
    """Documents of one expert, whose rows count from `first`. `lexical` and `memory` are None where there is none."""

    first: int
    segment: Segment
    lexical: Lexical | None = None
    memory: IndexedMemory | None = None

    def search(
        self,
        vectors: Float[np.ndarray, "Q D"],
        words: Sequence[Sequence[str]],
        blends: Sequence[Blend],
        k: int,
    ) -> list[Found]:
        """Each query's `k` best documents by cosine and blend; fewer only if there are fewer."""
        blends = [Blend(own.lexical if self.lexical else 0.0, own.memory if self.memory else 0.0) for own in blends]
        rows = np.arange(len(vectors))
        blended = np.array([any(own) for own in blends], bool)
        asked = np.array([own.memory > 0 for own in blends], bool)
        found = dict(self._search(self.segment, vectors, rows[~blended], k))
        near = dict(self._search(self.segment, vectors, rows[blended], max(k, CANDIDATES)))
        queries = dict(self._search(self.memory.queries, vectors, rows[asked], NEIGHBOURS)) if asked.any() else {}
        for row, (close, _) in near.items():
            found[row] = self._blend(vectors[row], close, words[row], queries.get(row), blends[row], k)
        return [found[row] for row in range(len(vectors))]

    @staticmethod
    def _search(
        segment: Segment, vectors: np.ndarray, rows: Int[np.ndarray, "_"], k: int
    ) -> Iterator[tuple[int, Found]]:
        """(row, what it finds) for some of the queries: none changes how another is searched."""
        return zip(rows.tolist(), segment.search(vectors[rows], k) if len(rows) else (), strict=True)

    def _blend(
        self,
        vector: Float[np.ndarray, "D"],
        near: Int[np.ndarray, "K"],
        words: Sequence[str],
        queries: Found | None,
        blend: Blend,
        k: int,
    ) -> Found:
        """One query's best documents: of those near its vector, those with its words, those that answered its like."""
        candidates = [near]
        if blend.lexical:
            bm25 = self.lexical.scores(words)
            candidates.append(self.first + best(bm25, max(k, CANDIDATES)))
        if queries is not None:
            answers, values = remembered(*queries, self.memory.offsets, self.memory.rows)
            candidates.append(answers)
        rows = np.unique(np.concatenate(candidates))
        counted, recalled = np.zeros((2, len(rows)), np.float32)
        if blend.lexical:
            counted = bm25[rows - self.first]
        if queries is not None:
            recalled[np.searchsorted(rows, answers)] = values
        scores = blend.scores(self.segment.vectors_of(rows) @ vector, counted, recalled)
        order = np.lexsort((rows, -scores))[:k]
        return rows[order], scores[order]


def build_memory(
    memory: Memory, documents: Sequence[Document], first: int, config: IndexConfig
) -> IndexedMemory | None:
    """What a memory says of these documents; None if nothing.

    Queries whose documents are not here stay: what is near for a query is told by all of them.
    """
    offsets, places = memory.answers([document.contents for document in documents])
    if not len(places):
        return None
    queries = build_segment(memory.queries.astype(np.float32), np.arange(len(memory.queries)), config)
    return IndexedMemory(queries, offsets, first + places)


def write_index(draft: Draft, name: str, index: ExpertIndex) -> dict[str, Any]:
    """Adds an index's files to a draft, and returns its entry for the manifest."""
    entry: dict[str, Any] = {"segment": write_segment(draft, f"segments/{name}", index.segment)}
    if index.lexical:
        tensors = index.lexical.tensors
        entry["lexical"] = draft.add(f"lexical/{name}.safetensors", lambda path: save_file(tensors, path))
    if index.memory:
        answers = {"offsets": index.memory.offsets, "rows": index.memory.rows}
        entry["memory"] = {
            "queries": write_segment(draft, f"memories/{name}", index.memory.queries),
            "answers": draft.add(f"memories/{name}-answers.safetensors", lambda path: save_file(answers, path)),
        }
    return entry


def read_index(artifact: Artifact, entry: dict[str, Any], first: int, config: IndexConfig) -> ExpertIndex:
    """Loads an index whose files the artifact has verified.

    Raises:
      ArtifactError: a graph is not the one that its entry describes.
    """
    lexical = Lexical(load_file(artifact.path(entry["lexical"]))) if "lexical" in entry else None
    memory = None
    if own := entry.get("memory"):
        memory = IndexedMemory(
            read_segment(artifact, own["queries"], config), **load_file(artifact.path(own["answers"]))
        )
    return ExpertIndex(first, read_segment(artifact, entry["segment"], config), lexical, memory)
