"""Segments: some of one expert's documents with all that finds them, in a folder that never changes.

A segment has its documents' texts, their vectors, how often which word stands where, and which train queries each answered. The
indexing job writes every shard as segments without a graph; joining these is what links graphs, and compacts later.
"""

import functools
import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int, UInt64
from safetensors.numpy import load_file, save_file

from moeret.artifact import Artifact, Draft
from moeret.config import IndexConfig
from moeret.data.lexical import Counts
from moeret.retrieval.documents import DocumentStore, write_documents
from moeret.retrieval.hnsw import VectorIndex, build_vector_index, read_vector_index, write_vector_index
from moeret.retrieval.sketch import make_sketch
from moeret.types import Document

KIND = "segment"
_FETCHED_AT_ONCE = 1000


class Answers(NamedTuple):
    """Which of a segment's documents answered the train queries of its expert's memory.

    Those of query t are rows[offsets[t]:offsets[t + 1]], which ascend.
    """

    offsets: Int[np.ndarray, "T+1"]
    rows: Int[np.ndarray, "A"]

    @classmethod
    def joined(cls, parts: Sequence["Answers"], kept: Sequence[Bool[np.ndarray, "_"]]) -> "Answers":
        """Those of the documents that are kept of several segments, one behind another."""
        starts = np.cumsum([0, *(own.sum() for own in kept)])
        queries, rows = [], []
        for part, own, start in zip(parts, kept, starts, strict=False):
            mine = own[part.rows]
            queries.append(np.repeat(np.arange(len(part.offsets) - 1), np.diff(part.offsets))[mine])
            rows.append((np.cumsum(own) - 1)[part.rows[mine]] + start)
        every, held = np.concatenate(queries), np.concatenate(rows)
        counts = np.bincount(every, minlength=len(parts[0].offsets) - 1)
        return cls(np.concatenate([[0], np.cumsum(counts)]), held[np.lexsort((held, every))])


@dataclass(frozen=True, slots=True)
class Content:
    """What a segment is made of, which is used up when it is written: the texts are read once, in order.

    `loose` are the documents without a domain.
    """

    documents: Iterable[Document]
    loose: Bool[np.ndarray, "N"]
    identities: UInt64[np.ndarray, "N"]
    vectors: Float[np.ndarray, "N D"]
    counts: Counts | None
    answers: Answers | None


@dataclass(frozen=True, eq=False)
class Segment:
    """A segment on disk. `sketch` is empty where no graph has been linked yet."""

    published: Artifact
    config: IndexConfig
    store: DocumentStore
    loose: Bool[np.ndarray, "N"]
    identities: UInt64[np.ndarray, "N"]
    sketch: Float[np.ndarray, "C D"]
    counts: Counts | None
    answers: Answers | None

    def __len__(self) -> int:
        return len(self.loose)

    @functools.cached_property
    def vectors(self) -> VectorIndex:
        """Its vectors and their graph: most of its memory, so they are loaded when first asked for.

        Raises:
          ArtifactError: the graph is not the one that the manifest describes.
        """
        return read_vector_index(self.published, self.published.meta["vectors"], self.config)

    def read_vectors(self) -> VectorIndex:
        """Its vectors, read now and not kept, without the graph that only a search needs."""
        return read_vector_index(self.published, self.published.meta["vectors"], self.config, searched=False)

    def documents(self, kept: Bool[np.ndarray, "N"]) -> Iterator[Document]:
        """Its documents that are kept, in order, a few in memory at a time."""
        return _documents(self.store, kept)


def _documents(store: DocumentStore, kept: Bool[np.ndarray, "N"]) -> Iterator[Document]:
    rows = np.flatnonzero(kept)
    for start in range(0, len(rows), _FETCHED_AT_ONCE):
        yield from store.fetch(rows[start : start + _FETCHED_AT_ONCE]).values()


@dataclass(frozen=True, slots=True, eq=False)
class LiveSegment:
    """A segment in an index: its folder there, and which of its rows are not deleted."""

    folder: str
    segment: Segment
    live: Bool[np.ndarray, "N"]

    def without(self, rows: Iterable[int]) -> "LiveSegment":
        """The same with more rows deleted."""
        live = self.live.copy()
        live[list(rows)] = False
        return LiveSegment(self.folder, self.segment, live)


def identity(document: Document) -> int:
    """64 bits by which documents with equal id, title, text and metadata are told to be one."""
    own = json.dumps([document.id, document.title, document.text, document.metadata], ensure_ascii=False)
    return int.from_bytes(hashlib.blake2b(own.encode(), digest_size=8).digest(), "little")


def identities(documents: Sequence[Document]) -> UInt64[np.ndarray, "N"]:
    """The identity of each."""
    return np.fromiter(map(identity, documents), np.uint64, len(documents))


def write_segment(
    folder: Path,
    content: Content,
    config: IndexConfig,
    *,
    linked: bool = True,
    about: dict[str, Any] | None = None,
    advance: Callable[[int], None] = lambda count: None,
) -> Artifact:
    """Writes a segment; the same content gives the same bytes. `about` joins what its manifest says.

    Raises:
      DataError: a vector is not finite.
      OSError: the disk is full, or the folder cannot be written.
    """
    if not linked:
        config = IndexConfig(exact_below=len(content.vectors) + 1)
    sketch = make_sketch(content.vectors) if linked else content.vectors[:0]
    index = build_vector_index(content.vectors, config, advance, overwrite=True)
    tensors = {"loose": content.loose, "identities": content.identities, "sketch": np.ascontiguousarray(sketch)}
    if content.answers:
        tensors |= {"answers.offsets": content.answers.offsets, "answers.rows": content.answers.rows}
    draft = Draft(folder, KIND)
    meta = {
        **(about or {}),
        "documents": len(content.loose),
        "store": draft.add("documents.sqlite", lambda path: write_documents(path, content.documents)),
        "vectors": write_vector_index(draft, "vectors", index),
        "table": draft.add("table.safetensors", lambda path: save_file(tensors, path)),
    }
    if content.counts:
        words = content.counts.tensors
        meta["words"] = draft.add("words.safetensors", lambda path: save_file(words, path))
    return draft.publish(meta)


def open_segment(published: Artifact, config: IndexConfig) -> Segment:
    """Opens a segment whose files are verified."""
    meta, tensors = published.meta, load_file(published.path(published.meta["table"]))
    answers = Answers(tensors["answers.offsets"], tensors["answers.rows"]) if "answers.rows" in tensors else None
    return Segment(
        published,
        config,
        DocumentStore(published.path(meta["store"])),
        tensors["loose"],
        tensors["identities"],
        tensors["sketch"],
        Counts.from_tensors(load_file(published.path(meta["words"]))) if "words" in meta else None,
        answers,
    )


def joined(parts: Sequence[tuple[Segment, Bool[np.ndarray, "_"]]]) -> Content:
    """What is kept of several segments of one expert, as the content of one; of them it holds only the open stores."""
    segments, kept = [part for part, _ in parts], [own for _, own in parts]
    stores = [(part.store, own) for part, own in parts]
    counts = [part.counts for part in segments if part.counts]
    answers = [part.answers for part in segments if part.answers]
    return Content(
        (document for store, own in stores for document in _documents(store, own)),
        np.concatenate([part.loose[own] for part, own in parts]),
        np.concatenate([part.identities[own] for part, own in parts]),
        _vectors_of(parts),
        Counts.joined(counts, kept) if counts else None,
        Answers.joined(answers, kept) if answers else None,
    )


def _vectors_of(parts: Sequence[tuple[Segment, Bool[np.ndarray, "_"]]]) -> Float[np.ndarray, "N D"]:
    """The vectors of what is kept of several segments, of which one at a time is read, without its graph."""
    width = parts[0][0].published.meta["vectors"]["width"]
    out, start = np.empty((sum(int(own.sum()) for _, own in parts), width), np.float32), 0
    for part, own in parts:
        rows = np.flatnonzero(own)
        out[start : start + len(rows)] = part.read_vectors().vectors_of(rows)
        start += len(rows)
    return out
