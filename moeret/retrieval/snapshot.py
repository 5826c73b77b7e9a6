"""Snapshots: what an index holds at one moment, written once and loaded whole.

An index is a list of segments for each expert, and of the rows of each that are deleted since (*tombstones*). Rows that live are
numbered through, expert by expert and segment by segment; nothing outside knows of others.
"""

import threading
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int, UInt64
from safetensors.numpy import load_file, save_file

from moeret import artifact
from moeret.artifact import Artifact, Draft
from moeret.config import IndexConfig
from moeret.data.lexical import Lexical, Statistics
from moeret.errors import ArtifactError
from moeret.models.model import KIND as MODEL
from moeret.models.model import Model, read_memory
from moeret.retrieval.evidence import Evidence
from moeret.retrieval.expert_index import ExpertIndex, Part
from moeret.retrieval.filters import Where
from moeret.retrieval.hnsw import Allowed, build_vector_index, read_vector_index, write_vector_index
from moeret.retrieval.segment import KIND as SEGMENT
from moeret.retrieval.segment import Segment, open_segment
from moeret.types import BASE_EXPERT, Document

KIND = "index"
_FILTERS_KEPT = 16


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


Held = Mapping[str, Sequence[LiveSegment]]
"""Expert -> the segments of its index."""


def model_of(published: Artifact) -> Model:
    """The model that a verified index holds.

    Raises:
      ArtifactError: it is not the one that the index was built with.
    """
    inner = artifact.inside(published, published.meta["model"]["folder"], MODEL)
    if inner.fingerprint != published.meta["model"]["fingerprint"]:
        raise ArtifactError(f"{inner.root} is not the model that {published.root} was built with; build the index anew")
    return Model.from_artifact(inner)


def publish_snapshot(
    draft: Draft, model: Model, held: Held, config: IndexConfig, about: dict[str, Any], *, forget: bool = False
) -> Artifact:
    """Publishes the next snapshot of an index, of which the draft has the segments' folders; `about` joins the manifest.

    `forget` drops the snapshots before it.
    """
    kept = {
        name: [own for own in held[name] if own.live.any()] for name in (BASE_EXPERT, *model.experts) if name in held
    }
    kept = {name: own for name, own in kept.items() if own}
    every = [own.segment.identities[own.live] for segments in kept.values() for own in segments]
    memories = (about.get("memories") or {}) | {
        name: _write_memory(draft, model, name, config)
        for name in kept
        if name != BASE_EXPERT and model.tower == "query" and name not in (about.get("memories") or {})
    }
    sketches = {name: _sketch(own) for name, own in kept.items()}
    has_limit = model.tower == "query" and BASE_EXPERT in kept
    meta = {
        **about,
        "memories": memories,
        "documents": {"count": len(np.unique(np.concatenate(every))) if every else 0},
        "strange_limit": Evidence(model.experts, sketches).limit(model) if has_limit else None,
        "experts": {name: _entry(draft, own) for name, own in kept.items()},
    }
    return draft.publish(meta, keep=config.snapshots, forget=forget)


def _write_memory(draft: Draft, model: Model, name: str, config: IndexConfig) -> dict[str, Any] | None:
    """The train queries that an expert remembers, to be searched as documents are."""
    memory = read_memory(model.published, name)
    if memory is None or not len(memory.queries):
        return None
    return write_vector_index(draft, f"memories/{name}", build_vector_index(memory.queries.astype(np.float32), config))


def _sketch(segments: Sequence[LiveSegment]) -> Float[np.ndarray, "C D"]:
    return np.concatenate([own.segment.sketch for own in segments])


def _entry(draft: Draft, segments: Sequence[LiveSegment]) -> dict[str, Any]:
    return {
        "documents": int(sum(own.live.sum() for own in segments)),
        "segments": [
            {
                "folder": own.folder,
                "documents": len(own.segment),
                "deleted": int((~own.live).sum()),
                "tombstones": None if own.live.all() else _write_tombstones(draft, own),
                **{key: value for key, value in own.segment.published.meta["vectors"].items() if key == "recall@10"},
            }
            for own in segments
        ],
    }


def _write_tombstones(draft: Draft, own: LiveSegment) -> str:
    rows = {"rows": np.flatnonzero(~own.live)}
    return draft.add(f"tombstones/{own.folder.rpartition('/')[2]}.safetensors", lambda path: save_file(rows, path))


def read_segments(published: Artifact, known: Mapping[str, LiveSegment] | None = None) -> dict[str, list[LiveSegment]]:
    """The segments of an index whose files are verified; those that are `known` by their folders are not opened again.

    Raises:
      ArtifactError: something in it is not what the manifest describes.
    """
    config, known, held = IndexConfig(**published.meta["config"]), known or {}, {}
    for name, entry in published.meta["experts"].items():
        held[name] = []
        for own in entry["segments"]:
            folder = own["folder"]
            before = known.get(folder)
            segment = before.segment if before else open_segment(artifact.inside(published, folder, SEGMENT), config)
            live = np.ones(len(segment), bool)
            if own["tombstones"]:
                live[load_file(published.path(own["tombstones"]))["rows"]] = False
            same = before is not None and np.array_equal(before.live, live)
            held[name].append(before if same else LiveSegment(folder, segment, live))
    return held


class Snapshot:
    """An index as it was published once. Nothing of it changes, so any number of threads may read it.

    `sizes` are the documents of each expert's index; `sketches` what stands for them.
    """

    def __init__(self, published: Artifact, experts: Sequence[str], previous: "Snapshot | None" = None):
        """Loads a verified index of a model's experts; what it shares with a `previous` snapshot is not loaded again."""
        self.published = published
        config = IndexConfig(**published.meta["config"])
        known = {own.folder: own for own in previous.segments} if previous else {}
        held = read_segments(published, known)
        self.segments = [own for segments in held.values() for own in segments]
        self.sizes: dict[str, int] = {name: entry["documents"] for name, entry in published.meta["experts"].items()}
        self.names = list(self.sizes)
        self.sketches = {name: _sketch(own) for name, own in held.items()}
        self.evidence = Evidence(experts, self.sketches)
        self._starts = np.cumsum([0, *self.sizes.values()])[:-1]
        counts = [int(own.live.sum()) for own in self.segments]
        self._firsts = np.cumsum([0, *counts])[:-1]
        self.count = sum(counts)
        self._shares = {
            own: (previous._shares.get(own) if previous else None) or _statistics(own) for own in self.segments
        }
        words = Statistics.total(own for own in self._shares.values() if own)
        self._parts = [_part(own, int(first), words) for own, first in zip(self.segments, self._firsts, strict=True)]
        places = np.cumsum([0, *map(len, held.values())])
        self._places = {name: slice(*own) for name, own in zip(held, pairwise(places), strict=True)}
        self.indexes = {
            name: ExpertIndex(tuple(self._parts[self._places[name]]), self._memory(name, config)) for name in held
        }
        self._filters: dict[str, list[Allowed]] = {}
        self._lock = threading.Lock()

    def _memory(self, name: str, config: IndexConfig):
        entry = self.published.meta["memories"].get(name)
        return read_vector_index(self.published, entry, config) if entry else None

    def close(self) -> None:
        """Gives the files back."""
        for own in self.segments:
            own.segment.store.close()

    def holders(self, rows: Int[np.ndarray, "_"]) -> list[str]:
        """Whose index has each row."""
        return [self.names[number] for number in np.searchsorted(self._starts, rows, side="right") - 1]

    def _by_segment(self, rows: Int[np.ndarray, "_"]) -> Iterable[tuple[LiveSegment, np.ndarray, np.ndarray]]:
        """(segment, which of the rows are in it, their rows there)."""
        places = np.searchsorted(self._firsts, rows, side="right") - 1
        for place in np.unique(places):
            mine = np.flatnonzero(places == place)
            yield self.segments[place], mine, self._parts[place].rows_of(rows[mine])

    def identities(self, rows: Int[np.ndarray, "_"]) -> UInt64[np.ndarray, "_"]:
        """What tells each row's document: one that lies in two indexes has two rows."""
        out = np.empty(len(rows), np.uint64)
        for own, mine, local in self._by_segment(rows):
            out[mine] = own.segment.identities[local]
        return out

    def loose(self, rows: Int[np.ndarray, "_"]) -> Bool[np.ndarray, "_"]:
        """Which rows are of documents without a domain."""
        out = np.empty(len(rows), bool)
        for own, mine, local in self._by_segment(rows):
            out[mine] = own.segment.loose[local]
        return out

    def fetch(self, rows: Int[np.ndarray, "_"]) -> dict[int, Document]:
        """The documents of some rows."""
        found: dict[int, Document] = {}
        distinct = np.unique(rows)
        for own, mine, local in self._by_segment(distinct):
            documents = own.segment.store.fetch(local)
            found |= {int(row): documents[int(at)] for row, at in zip(distinct[mine], local, strict=True)}
        return found

    def held(self) -> list[tuple[str, Document]]:
        """Every row's expert and document."""
        rows = np.arange(self.count)
        documents = self.fetch(rows)
        return [(expert, documents[row]) for row, expert in enumerate(self.holders(rows))]

    def distinct(self) -> Int[np.ndarray, "_"]:
        """The first row of every document: one that lies in two indexes has two."""
        return np.sort(np.unique(self.identities(np.arange(self.count)), return_index=True)[1])

    def vectors(self) -> Float[np.ndarray, "N D"]:
        """Every document's vector, by row."""
        return np.concatenate([own.segment.vectors.vectors_of(np.flatnonzero(own.live)) for own in self.segments])

    def allowed(self, where: Where | None) -> dict[str, list[Allowed | None]]:
        """For each expert's index and each part of it the rows that a filter allows; None: all that live."""
        if where is None:
            return {name: [None] * (own.stop - own.start) for name, own in self._places.items()}
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
        return {name: masks[own] for name, own in self._places.items()}


def _statistics(own: LiveSegment) -> Statistics | None:
    return None if own.segment.counts is None else Statistics.of([(own.segment.counts, own.live)])


def _part(own: LiveSegment, first: int, words: Statistics) -> Part:
    segment = own.segment
    lexical = None if segment.counts is None else Lexical(segment.counts, words)
    live = None if own.live.all() else segment.vectors.allow(own.live)
    return Part(first, segment.vectors, lexical, segment.answers, live)
