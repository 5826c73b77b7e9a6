"""Snapshots: what an index holds at one moment, written once and loaded whole.

An index is a list of segments for each expert, and of the rows of each that are deleted since (*tombstones*); beside them lie the
sketches and the words of all, so that neither routing nor one expert's index has to read the others' segments.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from jaxtyping import Float, Int
from safetensors.numpy import load_file, save_file

from moeret import artifact
from moeret.artifact import Artifact, Draft
from moeret.config import IndexConfig
from moeret.data.lexical import Statistics
from moeret.errors import ArtifactError
from moeret.models.model import KIND as MODEL
from moeret.models.model import Model, read_memory
from moeret.retrieval.evidence import Evidence
from moeret.retrieval.hnsw import build_vector_index, read_vector_index, write_vector_index
from moeret.retrieval.holder import Holder, LocalHolder
from moeret.retrieval.segment import KIND as SEGMENT
from moeret.retrieval.segment import LiveSegment, open_segment
from moeret.threads import side_by_side
from moeret.types import BASE_EXPERT, Document

KIND = "index"

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
    every = [own for segments in kept.values() for own in segments]
    identities = [own.segment.identities[own.live] for own in every]
    memories = (about.get("memories") or {}) | {
        name: _write_memory(draft, model, name, config)
        for name in kept
        if name != BASE_EXPERT and model.tower == "query" and name not in (about.get("memories") or {})
    }
    sketches, words = sketches_of(kept), words_of(kept)
    has_limit = model.tower == "query" and BASE_EXPERT in kept
    meta = {
        **about,
        "memories": memories,
        "documents": {"count": len(np.unique(np.concatenate(identities))) if identities else 0},
        "strange_limit": Evidence(model.experts, sketches).limit(model) if has_limit else None,
        "sketches": draft.add("sketches.safetensors", lambda path: save_file(sketches, path)),
        "words": draft.add("words.safetensors", lambda path: save_file(words.tensors, path)),
        "experts": {name: _entry(draft, own) for name, own in kept.items()},
    }
    return draft.publish(meta, keep=config.snapshots, forget=forget)


def sketches_of(held: Held) -> dict[str, Float[np.ndarray, "C D"]]:
    """What stands for each expert's documents."""
    return {name: np.concatenate([own.segment.sketch for own in segments]) for name, segments in held.items()}


def words_of(held: Held) -> Statistics:
    """What BM25 must know of all documents."""
    every = [own for segments in held.values() for own in segments]
    return Statistics.of((own.segment.counts, own.live) for own in every if own.segment.counts)


def _write_memory(draft: Draft, model: Model, name: str, config: IndexConfig) -> dict[str, Any] | None:
    """The train queries that an expert remembers, to be searched as documents are."""
    memory = read_memory(model.published, name)
    if memory is None or not len(memory.queries):
        return None
    return write_vector_index(draft, f"memories/{name}", build_vector_index(memory.queries.astype(np.float32), config))


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


def files_of(published: Artifact, expert: str) -> list[str]:
    """The files that hold an expert's index: its segments, its memory, and the words of all documents."""
    entry, memory = published.meta["experts"][expert], published.meta["memories"].get(expert) or {}
    names = [published.meta["words"], *(memory[key] for key in ("table", "graph") if key in memory)]
    for own in entry["segments"]:
        names += [name for name in published.files if name.startswith(f"{own['folder']}/")]
        names += [own["tombstones"]] if own["tombstones"] else []
    return names


def read_segments(
    published: Artifact, expert: str, known: Mapping[str, LiveSegment] | None = None
) -> list[LiveSegment]:
    """The segments of an expert whose files are verified; those that are `known` by their folders are not opened again.

    Raises:
      ArtifactError: something in it is not what the manifest describes.
    """
    config, held = IndexConfig(**published.meta["config"]), []
    for own in published.meta["experts"][expert]["segments"]:
        folder = own["folder"]
        before = known.get(folder) if known else None
        segment = before.segment if before else open_segment(artifact.inside(published, folder, SEGMENT), config)
        live = np.ones(len(segment), bool)
        if own["tombstones"]:
            live[load_file(published.path(own["tombstones"]))["rows"]] = False
        same = before is not None and np.array_equal(before.live, live)
        held.append(before if same else LiveSegment(folder, segment, live))
    return held


def all_segments(published: Artifact) -> dict[str, list[LiveSegment]]:
    """Those of every expert. Raises ArtifactError as read_segments does."""
    return {name: read_segments(published, name) for name in published.meta["experts"]}


def read_sketches(published: Artifact) -> dict[str, Float[np.ndarray, "C D"]]:
    """The sketches that an index, whose file of them is verified, was published with."""
    kept = load_file(published.path(published.meta["sketches"]))
    return {name: kept[name] for name in published.meta["experts"]}


def read_words(published: Artifact) -> Statistics:
    """The words that an index, whose file of them is verified, was published with."""
    return Statistics.from_tensors(load_file(published.path(published.meta["words"])))


def open_holder(
    published: Artifact, expert: str, words: Statistics, known: Mapping[str, LiveSegment] | None = None
) -> LocalHolder:
    """Opens an expert's index, whose files are verified, in this process. Raises ArtifactError as read_segments does."""
    entry = published.meta["memories"].get(expert)
    memory = read_vector_index(published, entry, IndexConfig(**published.meta["config"])) if entry else None
    return LocalHolder(read_segments(published, expert, known), words, memory)


class Snapshot:
    """An index as it was published once. Nothing of it changes, so any number of threads may read it.

    Rows are numbered through, expert by expert. `sizes` are the documents of each expert's index; `sketches` what stands for them;
    `ask` makes calls to several holders, side by side.
    """

    def __init__(
        self,
        published: Artifact,
        experts: Sequence[str],
        holders: Mapping[str, Holder],
        ask: Callable[[Sequence[Callable[[], Any]]], list[Any]] = side_by_side,
    ):
        """The snapshot of a model's experts, of which the sketches' file is verified, with a holder for each index."""
        self.published, self.holders, self.ask = published, holders, ask
        self.sizes: dict[str, int] = {name: entry["documents"] for name, entry in published.meta["experts"].items()}
        self.names = list(self.sizes)
        self.sketches = read_sketches(published)
        self.evidence = Evidence(experts, self.sketches)
        self.count = sum(self.sizes.values())
        self._starts = np.cumsum([0, *self.sizes.values()])[:-1]

    def close(self) -> None:
        """Gives the files back."""
        for own in self.holders.values():
            own.close()

    def start(self, expert: str) -> int:
        """The first row of an expert's index."""
        return int(self._starts[self.names.index(expert)])

    def experts_of(self, rows: Int[np.ndarray, "_"]) -> list[str]:
        """Whose index has each row."""
        return [self.names[number] for number in np.searchsorted(self._starts, rows, side="right") - 1]

    def fetch(self, rows: Int[np.ndarray, "_"]) -> dict[int, tuple[Document, bool]]:
        """The documents of some rows, and whether each is without a domain."""
        distinct = np.unique(rows)
        numbers = np.searchsorted(self._starts, distinct, side="right") - 1
        asked = [(distinct[numbers == number], number) for number in np.unique(numbers)]
        found = self.ask(
            [partial(self.holders[self.names[number]].fetch, own - self._starts[number]) for own, number in asked]
        )
        return {
            int(row): about
            for (own, _), documents in zip(asked, found, strict=True)
            for row, about in zip(own, documents, strict=True)
        }

    def held(self) -> list[tuple[str, Document]]:
        """Every row's expert and document."""
        rows = np.arange(self.count)
        documents = self.fetch(rows)
        return [(expert, documents[row][0]) for row, expert in enumerate(self.experts_of(rows))]

    def distinct(self) -> Int[np.ndarray, "_"]:
        """The first row of every document: one that lies in two indexes has two."""
        every = [own.identities() for own in self.holders.values()]
        return np.sort(np.unique(np.concatenate([np.empty(0, np.uint64), *every]), return_index=True)[1])

    def vectors(self) -> Float[np.ndarray, "N D"]:
        """Every document's vector, by row."""
        return np.concatenate([own.vectors() for own in self.holders.values()])


class Places(Protocol):
    """Where the holders of an index are: says what has to be verified here, and opens snapshots."""

    def read(self, root: Path, known: Artifact | None = None) -> Artifact:
        """The index that is published now, with all verified that this process reads, but for what `known` has too."""

    def open(self, published: Artifact, experts: Sequence[str], previous: Snapshot | None = None) -> Snapshot:
        """A snapshot of what `read` gave; what it shares with the `previous` one is not loaded again."""


class Here:
    """All indexes in this process."""

    def read(self, root: Path, known: Artifact | None = None) -> Artifact:
        """The index, with every file verified."""
        return artifact.read(root, KIND, known)

    def open(self, published: Artifact, experts: Sequence[str], previous: Snapshot | None = None) -> Snapshot:
        """Opens every index."""
        before = previous.holders.values() if previous else ()
        known = {own.folder: own for holder in before for own in holder.segments}
        words = read_words(published)
        held = {name: open_holder(published, name, words, known) for name in published.meta["experts"]}
        return Snapshot(published, experts, held)
