"""Where the work of an indexing job runs: in this process, or wherever Ray has room. Both run the same functions."""

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol, get_args

from moeret.artifact import Artifact
from moeret.config import EngineName, require
from moeret.data.sources import Shard, read_shards
from moeret.models.model import Model
from moeret.progress import Advance
from moeret.retrieval.shards import ShardTask

MOST_LINKED_AT_ONCE = 8
"""Segments that one machine links side by side at most: each is in memory, twice."""

Link = Callable[[Advance], Artifact]
"""Links one segment; called with a bar to move on by documents."""


class Engine(Protocol):
    """Runs what a job has to do; what it has done is on disk, so that nothing but time is lost with it."""

    def encode(self, task: ShardTask, shards: Sequence[Shard], model: Model, advance: Advance) -> None:
        """Publishes all of these shards; `model` is the task's, loaded already."""

    def link(self, work: Sequence[tuple[int, Link]], advance: Advance) -> list[Artifact]:
        """What each of these makes, which has so many documents, in order."""


class Local:
    """Here: shards one by one with all cores (or devices), each written while the next is embedded; segments side by side."""

    def encode(self, task: ShardTask, shards: Sequence[Shard], model: Model, advance: Advance) -> None:
        """Publishes all of these shards."""
        encoder = task.encoder(model)
        with ThreadPoolExecutor(1) as writer:
            written = writer.submit(lambda: None)
            for shard, documents in read_shards(shards):
                publish = task.encode(encoder, shard, documents, advance)
                written.result()
                written = writer.submit(publish)
            written.result()

    def link(self, work: Sequence[tuple[int, Link]], advance: Advance) -> list[Artifact]:
        """What each of these makes; one thread a graph, so that each is the same in every build."""
        with ThreadPoolExecutor(min(os.cpu_count() or 1, MOST_LINKED_AT_ONCE)) as threads:
            return list(threads.map(lambda own: own[1](advance), work))


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
