"""Where the work of an indexing job runs: in this process, or wherever Ray has room. Both run the same functions."""

import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import Protocol, get_args

from moeret.artifact import Artifact
from moeret.config import EngineName, require
from moeret.data.sources import Shard, read_shards
from moeret.models.model import Model
from moeret.progress import Advance
from moeret.retrieval.shards import ShardEncoder, ShardTask
from moeret.threads import at_once
from moeret.types import Document

_NAMED = 3
"""Experts whose documents a bar counts."""

Link = Callable[[Advance], Artifact]
"""Links one segment; called with a bar to move on by documents."""


class Engine(Protocol):
    """Runs what a job has to do; what it has done is on disk, so that nothing but time is lost with it."""

    def encode(self, task: ShardTask, shards: Sequence[Shard], model: Model, advance: Advance) -> None:
        """Publishes all of these shards; `model` is the task's, loaded already."""

    def link(self, work: Sequence[tuple[int, Link]], advance: Advance) -> list[Artifact]:
        """What each of these makes, which has so many documents, in order."""


class Local:
    """Here: shards side by side, and segments."""

    def encode(self, task: ShardTask, shards: Sequence[Shard], model: Model, advance: Advance) -> None:
        """Publishes all of these shards."""
        encode_documents(task, task.encoder(model), read_shards(shards), shards_at_once(model), advance)

    def link(self, work: Sequence[tuple[int, Link]], advance: Advance) -> list[Artifact]:
        """What each of these makes; one thread a graph, so that each is the same in every build."""
        with ThreadPoolExecutor(at_once()) as threads:
            return list(threads.map(lambda own: own[1](advance), work))


def shards_at_once(model: Model) -> int:
    """Shards that this process encodes side by side: one where several devices work on each batch together."""
    return at_once() if model.embedder.mesh.size == 1 else 1


def encode_documents(
    task: ShardTask,
    encoder: ShardEncoder,
    given: Iterator[tuple[Shard, list[Document]]],
    together: int,
    advance: Advance,
) -> None:
    """Publishes shards that have these documents, so many together.

    While one waits for its texts to be tokenised or its files to be written, others are embedded. What goes wrong with one, or
    an interrupt, ends the others at their next batch.
    """
    reading, ended, told = threading.Lock(), threading.Event(), Told()

    def move_on(count: int = 1, padding: str | None = None) -> None:
        if ended.is_set():
            raise _Ended
        advance(count, told.note(padding))

    def work() -> None:
        while not ended.is_set():
            with reading:
                own = next(given, None)
            if own is None:
                return
            published = task.encode(encoder, *own, move_on)
            advance(0, told.note(held=published.meta["experts"]))

    with ThreadPoolExecutor(together) as threads:
        try:
            for worker in as_completed([threads.submit(work) for _ in range(together)]):
                worker.result()
        finally:
            ended.set()


class Told:
    """What a bar tells of encoding beside how far it is: the padding, and the experts that got most documents."""

    def __init__(self) -> None:
        self._padding, self._counts, self._telling = "", Counter[str](), threading.Lock()

    def note(self, padding: str | None = None, held: Mapping[str, int] | None = None) -> str:
        """All of it, with another padding or with documents that experts got besides."""
        with self._telling:
            self._padding = padding or self._padding
            self._counts.update(held or {})
            named = [f"{name} {count:,}" for name, count in self._counts.most_common(_NAMED)]
            rest = len(self._counts) - len(named)
            parts = [self._padding, *named, f"{rest} more experts" if rest else ""]
        return ", ".join(part for part in parts if part)


class _Ended(Exception):
    """The shard's others failed, or were interrupted."""


def engine_of(name: EngineName) -> Engine:
    """The engine of this name.

    Raises:
      ConfigError: there is none, or Ray is not installed.
    """
    require(name in get_args(EngineName), f"the engine is {' or '.join(get_args(EngineName))}, not {name!r}")
    if name == "ray":
        from moeret.retrieval.ray_engine import OnRay

        return OnRay()
    return Local()
