"""Where the work of an indexing job runs: in this process, or wherever Ray has room. Both run the same functions."""

import threading
from collections.abc import Callable, Iterator, Sequence
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
    reading, ended = threading.Lock(), threading.Event()

    def move_on(count: int = 1) -> None:
        if ended.is_set():
            raise _Ended
        advance(count)

    def work() -> None:
        while not ended.is_set():
            with reading:
                own = next(given, None)
            if own is None:
                return
            task.encode(encoder, *own, move_on)

    with ThreadPoolExecutor(together) as threads:
        try:
            for worker in as_completed([threads.submit(work) for _ in range(together)]):
                worker.result()
        finally:
            ended.set()


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
