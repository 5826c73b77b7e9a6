"""What a killed job finds again: shards that are encoded, segments that are linked.

A job's folder lies in the index that it builds or changes, and begins with what was asked for: only the same request goes on
there. When the next snapshot is published it is deleted.
"""

import contextlib
import json
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool

from moeret import artifact
from moeret.artifact import Artifact, Draft
from moeret.config import IndexConfig, differences, require
from moeret.data.sources import Shard
from moeret.errors import ArtifactError
from moeret.models.model import Model
from moeret.progress import Advance, progress_bar
from moeret.retrieval import shards
from moeret.retrieval.engine import Engine
from moeret.retrieval.segment import KIND as SEGMENT
from moeret.retrieval.segment import LiveSegment, Segment, joined, open_segment, write_segment
from moeret.retrieval.shards import ShardTask, segment_in
from moeret.retrieval.snapshot import KIND

Kept = tuple[Segment, Bool[np.ndarray, "N"]]
"""A segment, and which of its documents are to be kept."""
FOLDER = "building"
"""Subfolder of an index that keeps a job's work until it is published."""
MODEL = "model-"
"""How the subfolder with an index's model begins."""
_REQUEST = "request.json"


class Job:
    """The folder of a job that builds or changes the index at `out`, whose lock the caller holds."""

    def __init__(
        self,
        out: Path,
        request: Mapping[str, Any],
        config: IndexConfig,
        engine: Engine,
        *,
        restart: bool = False,
        shown: bool = False,
    ):
        """Goes on with the job of the same request, if there is one.

        Raises:
          ConfigError: another job was cut off there and has saved something, and `restart` is not set.
        """
        self._folder, self._config, self._engine, self._shown = out / FOLDER, config, engine, shown
        file = self._folder / _REQUEST
        before = _request(file)
        if before != request:
            saved = any(self._folder.glob(f"shards/*/{artifact.MANIFEST}"))
            require(
                before is None or restart or not saved,
                f"{out} has an unfinished job for other things ({differences(before or {}, dict(request))}); give the same "
                f"arguments again to finish it, or delete {self._folder} to drop it",
            )
            _remove_job(out)
        self._folder.mkdir(parents=True, exist_ok=True)
        artifact.write_atomically(file, json.dumps(request).encode())

    def encode(
        self,
        plan: Sequence[Shard],
        model: Model,
        folder: Path,
        kept: Path | None = None,
        places: Mapping[int, np.ndarray] | None = None,
    ) -> list[Artifact]:
        """All shards of a plan, each encoded with the model (which lies at `folder`) unless it is already.

        `kept` is where training has kept vectors; `places` are the places of the documents that are wanted of each shard.
        """
        task = ShardTask(self._folder / "shards", folder, self._config, kept, places)
        finished = {shard.number: shards.done(task.folder(shard)) for shard in plan}
        missing = [shard for shard in plan if finished[shard.number] is None]
        total = sum(shard.documents for shard in plan)
        start = total - sum(shard.documents for shard in missing)
        with progress_bar("Embedding", total, shown=self._shown, unit="documents", start=start) as advance:
            if missing:
                self._engine.encode(task, missing, model, advance)
        encoded = [finished[shard.number] or shards.done(task.folder(shard)) for shard in plan]
        if gone := [shard.number for shard, own in zip(plan, encoded, strict=True) if own is None]:
            raise ArtifactError(f"{task.folder(plan[gone[0]])} is not there though it was published; run the job again")
        return encoded

    def link(
        self, experts: Mapping[str, Sequence["Group"]], part: str = "", engine: Engine | None = None
    ) -> dict[str, list[Artifact]]:
        """Joins each group of segments of each expert into one with a graph, unless it is already; groups side by side.

        What is linked is found again under `part` of the job. Another `engine` than the job's may be asked to.
        """
        work = [
            (group.documents, partial(self._joined, f"{part}{name}-{number:06d}", name, group))
            for name, groups in experts.items()
            for number, group in enumerate(groups)
        ]
        total = sum(count for count, _ in work)
        with progress_bar("Linking", total, shown=self._shown, unit="documents") as advance:
            made = iter((engine or self._engine).link(work, advance))
        return {name: [next(made) for _ in groups] for name, groups in experts.items()}

    def _joined(self, place: str, expert: str, group: "Group", advance: Advance) -> Artifact:
        folder = self._folder / "segments" / place
        if artifact.exists(folder):
            with contextlib.suppress(ArtifactError):
                linked = artifact.read(folder, SEGMENT)
                advance(group.documents)
                return linked
        shutil.rmtree(folder, ignore_errors=True)
        parts = [part() for part in group.parts]
        stores = [segment.store for segment, _ in parts]
        try:
            content = joined(parts)
            del parts  # their vectors: a graph takes as much again
            return write_segment(folder, content, self._config, about={"expert": expert}, advance=advance)
        finally:
            for store in stores:
                store.close()

    def groups(self, encoded: Sequence[Artifact]) -> dict[str, list["Group"]]:
        """Each expert's segments of these shards, in groups that become a segment each."""
        parts: dict[str, list[tuple[int, Callable[[], Kept]]]] = {}
        for shard in encoded:
            for name, count in shard.meta["experts"].items():
                parts.setdefault(name, []).append((count, partial(self._open, shard, name)))
        return {name: in_groups(own, self._config.segment_documents) for name, own in parts.items()}

    def _open(self, shard: Artifact, expert: str) -> Kept:
        segment = open_segment(segment_in(shard, expert), self._config)
        return segment, np.ones(len(segment), bool)


class Group(NamedTuple):
    """Segments of one expert that become one: how many documents are kept of them, and how to open each."""

    documents: int
    parts: list[Callable[[], Kept]]


def in_groups(parts: Sequence[tuple[int, Callable[[], Kept]]], most: int) -> list[Group]:
    """Neighbours together, as long as they have no more than `most` documents."""
    groups: list[Group] = []
    for count, part in parts:
        if groups and groups[-1].documents + count <= most:
            before = groups.pop()
            groups.append(Group(before.documents + count, [*before.parts, part]))
        else:
            groups.append(Group(count, [part]))
    return groups


def remove_leftovers(out: Path) -> None:
    """Deletes what jobs left in an index: segments and models that no snapshot has, and their folder; nothing of others'."""
    used = {name for own in artifact.snapshots(out, KIND) for name in own.files}
    for folder in (*out.glob(f"{MODEL}*"), *(out / "segments").glob("*")):
        name = folder.relative_to(out).as_posix()
        if re.search("-[0-9a-f]{12}$", name) and f"{name}/{artifact.MANIFEST}" not in used:
            shutil.rmtree(folder, ignore_errors=True)
    _remove_job(out)  # last: it tells the next writer that there is something to remove


def remove_published(out: Path, published: Artifact) -> None:
    """Deletes what a job left that was killed just after it had published an index's present snapshot."""
    request = _request(out / FOLDER / _REQUEST) or {}
    built, changed = request == published.meta["request"], request.get("update of") or request.get("compact")
    if built or (changed and changed != [published.snapshot, published.fingerprint]):
        artifact.prune(out, 0 if built else IndexConfig(**published.meta["config"]).snapshots)
        remove_leftovers(out)


def _remove_job(out: Path) -> None:
    """Deletes what a job keeps in an index, but nothing that others may have put there."""
    for part in ("shards", "segments"):
        shutil.rmtree(out / FOLDER / part, ignore_errors=True)
    (out / FOLDER / _REQUEST).unlink(missing_ok=True)
    with contextlib.suppress(OSError):
        (out / FOLDER).rmdir()


def include_segment(draft: Draft, segment: Artifact, config: IndexConfig) -> LiveSegment:
    """Puts a linked segment into an index, under a name that tells its contents, with all its rows alive."""
    folder = f"segments/{segment.meta['expert']}-{segment.fingerprint[:12]}"
    draft.include(segment, folder)
    own = open_segment(segment, config)
    return LiveSegment(folder, own, np.ones(len(own), bool))


def _request(file: Path) -> dict[str, Any] | None:
    try:
        request = json.loads(file.read_text())
    except (OSError, ValueError, RecursionError):
        return None
    return request if isinstance(request, dict) else None
