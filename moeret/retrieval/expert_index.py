"""One expert's index: its documents' vectors, their words, and what its train queries were answered with.

What a query finds by each of them are candidates; all of these get their whole score, so a document that one finds is not
lost because another ranks it low.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float, Int
from safetensors.numpy import load_file, save_file

from moeret.artifact import Artifact, Draft
from moeret.config import IndexConfig
from moeret.data.lexical import Lexical
from moeret.models.memory import NEIGHBOURS, Blend, Memory, digest, remembered
from moeret.retrieval.hnsw import Segment, build_segment, read_segment, write_segment
from moeret.types import Document

CANDIDATES = 100
"""By vectors and by words each, at least, before they are ranked by what all say."""

Found = tuple[Int[np.ndarray, "K"], Float[np.ndarray, "K"]]
"""Rows and scores, best first."""


@dataclass(frozen=True, slots=True)
class Recall:
    """A memory whose documents are rows of the index; the train queries are found as documents are."""

    queries: Segment
    offsets: Int[np.ndarray, "T+1"]
    rows: Int[np.ndarray, "A"]


@dataclass(frozen=True, slots=True)
class ExpertIndex:
    """Documents of one expert, whose rows count from `first`. Words and recall are None where vectors alone count."""

    first: int
    segment: Segment
    lexical: Lexical | None = None
    recall: Recall | None = None

    def search(
        self,
        vectors: Float[np.ndarray, "Q D"],
        words: Sequence[Sequence[str]],
        blends: Sequence[Blend],
        k: int,
    ) -> list[Found]:
        """Each query's `k` best documents by cosine and blend; fewer only if there are fewer."""
        blends = [Blend(own.lexical if self.lexical else 0.0, own.memory if self.recall else 0.0) for own in blends]
        blended = [row for row, own in enumerate(blends) if any(own)]
        if not blended:
            return self.segment.search(vectors, k)
        by_vector = self.segment.search(vectors, max(k, CANDIDATES))
        found = [(rows[:k], scores[:k]) for rows, scores in by_vector]
        asked = [row for row in blended if blends[row].memory]
        near = dict(zip(asked, self.recall.queries.search(vectors[asked], NEIGHBOURS), strict=True)) if asked else {}
        for row in blended:
            words_of, queries = words[row] if blends[row].lexical else (), near.get(row)
            found[row] = self._blend(vectors[row], by_vector[row][0], words_of, queries, blends[row], k)
        return found

    def _blend(
        self,
        vector: Float[np.ndarray, "D"],
        near: Int[np.ndarray, "C"],
        words: Sequence[str],
        queries: Found | None,
        blend: Blend,
        k: int,
    ) -> Found:
        """One query's best documents: of those near its vector, those with its words, those that answered its like."""
        rows, bm25 = [near], None
        if words:
            bm25 = self.lexical.scores(words)
            most = max(k, CANDIDATES)
            best = np.argpartition(-bm25, most)[:most] if most < len(bm25) else np.arange(len(bm25))
            rows.append(self.first + best[bm25[best] > 0])
        if queries is not None:
            answers, values = remembered(*queries, self.recall.offsets, self.recall.rows)
            rows.append(answers)
        every = np.unique(np.concatenate(rows))
        scores = self.segment.vectors_of(every) @ vector
        if words:
            scores = scores + np.float32(blend.lexical) * bm25[every - self.first]
        if queries is not None:
            scores[np.searchsorted(every, answers)] += np.float32(blend.memory) * values
        order = np.lexsort((every, -scores))[:k]
        return every[order], scores[order]


def build_recall(memory: Memory, documents: Sequence[Document], first: int, config: IndexConfig) -> Recall | None:
    """What a memory says of these documents; None if nothing."""
    held: dict[bytes, list[int]] = {}
    for row, document in enumerate(documents, first):
        held.setdefault(digest(document.contents), []).append(row)
    answers = [
        sorted({row for own in memory.documents[start:end] for row in held.get(bytes(own), ())})
        for start, end in zip(memory.offsets[:-1], memory.offsets[1:], strict=True)
    ]
    kept = [query for query, rows in enumerate(answers) if rows]
    if not kept:
        return None
    queries = build_segment(memory.queries[kept].astype(np.float32), np.arange(len(kept)), config)
    offsets = np.cumsum([0, *(len(answers[query]) for query in kept)])
    return Recall(queries, offsets, np.concatenate([answers[query] for query in kept]).astype(np.int64))


def write_index(draft: Draft, name: str, index: ExpertIndex) -> dict[str, Any]:
    """Adds an index's files to a draft, and returns its entry for the manifest."""
    entry: dict[str, Any] = {"segment": write_segment(draft, f"segments/{name}", index.segment)}
    if index.lexical:
        tensors = index.lexical.tensors
        entry["lexical"] = draft.add(f"lexical/{name}.safetensors", lambda path: save_file(tensors, path))
    if index.recall:
        answers = {"offsets": index.recall.offsets, "rows": index.recall.rows}
        entry["recall"] = {
            "queries": write_segment(draft, f"recall/{name}", index.recall.queries),
            "answers": draft.add(f"recall/{name}-answers.safetensors", lambda path: save_file(answers, path)),
        }
    return entry


def read_index(artifact: Artifact, entry: dict[str, Any], first: int, config: IndexConfig) -> ExpertIndex:
    """Loads an index whose files the artifact has verified.

    Raises:
      ArtifactError: a graph is not the one that its entry describes.
    """
    lexical = Lexical(load_file(artifact.path(entry["lexical"]))) if "lexical" in entry else None
    recall = None
    if own := entry.get("recall"):
        recall = Recall(read_segment(artifact, own["queries"], config), **load_file(artifact.path(own["answers"])))
    return ExpertIndex(first, read_segment(artifact, entry["segment"], config), lexical, recall)
