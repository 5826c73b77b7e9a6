"""An indexing job on Ray: on this machine, or on the cluster that RAY_ADDRESS names. The only importer of Ray.

Actors hold the model, one for each GPU or else for each core, and encode shards; tasks link segments. All machines must see the
index, the model and the corpora under the same paths. What is done is on disk: a worker that dies costs its shard, which Ray
gives to another, and a driver that dies what was running.
"""

import json
import os
from collections.abc import Sequence
from typing import Any

import numpy as np

from moeret.artifact import Artifact
from moeret.data.sources import Shard, read_shard
from moeret.errors import ConfigError
from moeret.models.model import Model
from moeret.progress import Advance
from moeret.retrieval.engine import Link, Told
from moeret.retrieval.shards import ShardTask, done

_ONE_CORE = {"env_vars": {"NPROC": "1"}}
"""An actor of one core must not start XLA with a thread for each core of its machine."""


def _import() -> Any:
    try:
        import ray
        import ray.data
    except ImportError as error:
        raise ConfigError(f"the engine ray needs Ray ({error}); run pip install 'moeret[ray]'") from None
    return ray


class _Actor:
    """A process that has the model and encodes whatever shard it is given."""

    def __init__(self, task: ShardTask, shards: dict[int, Shard]):
        self._task, self._shards, self._encoder = task, shards, task.encoder()

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        held = []
        for number in batch["number"].tolist():
            shard = self._shards[number]
            published = done(self._task.folder(shard))  # Ray repeats more than the shard that a dead actor was at
            published = published or self._task.encode(self._encoder, shard, read_shard(shard), _silent)
            held.append(json.dumps(published.meta["experts"]))
        return {**batch, "held": np.array(held)}


class OnRay:
    """Ray, started here unless there is a cluster."""

    def __init__(self) -> None:
        self._ray = ray = _import()
        if not ray.is_initialized():
            # One CPU more than there are, which reading the list of shards takes: it does next to nothing.
            where: dict[str, Any] = {} if os.environ.get("RAY_ADDRESS") else {"num_cpus": 1 + (os.cpu_count() or 1)}
            ray.init(log_to_driver=False, include_dashboard=False, logging_level="ERROR", **where)

    def encode(self, task: ShardTask, shards: Sequence[Shard], model: Model, advance: Advance) -> None:
        """Publishes all of these shards; the actors load the model themselves."""
        ray = self._ray
        have = ray.cluster_resources()
        gpus = int(have.get("GPU", 0))
        room = gpus or max(1, int(have["CPU"]) - 1)
        own = {shard.number: shard for shard in shards}
        context = ray.data.DataContext.get_current()
        context.enable_progress_bars = False
        finished = (
            ray.data.from_items([{"number": number} for number in own], override_num_blocks=len(own))
            .map_batches(
                _Actor,
                batch_size=1,
                fn_constructor_args=(task, own),
                compute=ray.data.ActorPoolStrategy(size=min(room, len(own))),
                num_cpus=1,
                num_gpus=1 if gpus else None,
                runtime_env=None if gpus else _ONE_CORE,
            )
            .iter_batches(batch_size=1, prefetch_batches=0)
        )
        told = Told()
        for batch in finished:
            for number, held in zip(batch["number"].tolist(), batch["held"].tolist(), strict=True):
                advance(own[number].documents, told.note(held=json.loads(held)))

    def link(self, work: Sequence[tuple[int, Link]], advance: Advance) -> list[Artifact]:
        """What each of these makes, one core each, wherever there is one."""
        ray = self._ray
        remote = ray.remote(num_cpus=1, max_retries=-1)(_linked)
        waiting = {remote.remote(link): number for number, (_, link) in enumerate(work)}
        made: dict[int, Artifact] = {}
        while waiting:
            [ready], _ = ray.wait([*waiting])
            number = waiting.pop(ready)
            made[number] = ray.get(ready)
            advance(work[number][0])
        return [made[number] for number in range(len(work))]


def _linked(link: Link) -> Artifact:
    return link(_silent)


def _silent(n: int = 1, note: str | None = None) -> None:
    """Nobody sees a worker's bars."""
