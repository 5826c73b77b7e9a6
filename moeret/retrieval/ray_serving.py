"""Searching an index on Ray Serve, with each expert's index in processes of its own. Needs the extra `ray`.

Routers hold the model: they embed queries, choose experts, ask the replicas of these alone, and merge what they find, as a
Retriever does, of which a router has one. An expert's replicas hold its index and no model. All machines must see the index
under the same path. What an update publishes is searched without a dropped query: a question names the snapshot that it is of,
and a replica opens that if it has not yet.
"""

import asyncio
import contextlib
import json
import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from moeret import artifact
from moeret.artifact import Artifact
from moeret.config import Precision, require
from moeret.errors import ArtifactError, ConfigError
from moeret.models.model import KIND as MODEL
from moeret.retrieval import filters
from moeret.retrieval.batching import Batcher
from moeret.retrieval.holder import LocalHolder
from moeret.retrieval.search import Retriever
from moeret.retrieval.snapshot import KIND, Snapshot, files_of, open_holder, read_words
from moeret.types import BASE_EXPERT, Hit

_LOG = logging.getLogger("ray.serve")
_KEPT = 2
"""Snapshots that a replica has open: the present one, and the one that searches began on before it."""
_ATTEMPTS = 5
"""Of a question whose replica dies; Serve starts another. Nothing is changed by asking, so asking again is safe."""
_AT_ONCE = 32
"""Questions that a router has out at once."""
_MOST_WAITING = 256
"""Queries that a router takes at once; others wait where they are asked."""

_Version = tuple[int, str]
"""Number and fingerprint of a snapshot."""


def _import() -> Any:
    try:
        from ray import serve
    except ImportError as error:
        raise ConfigError(f"serving on Ray needs Ray Serve ({error}); run pip install 'moeret[ray]'") from None
    return serve


def serve_index(
    index: str | Path,
    *,
    routers: int = 1,
    replicas: int | Mapping[str, int] = 1,
    router_cpus: float = 1.0,
    replica_cpus: float = 0.1,
    reload_seconds: float = 10.0,
    precision: Precision | None = None,
    name: str = "moeret",
) -> Any:
    """Serves an index on the Ray cluster of this process, or on one that is started here; returns a DeploymentHandle to ask it.

    `handle.search.remote(query, k).result()` and `handle.search_batch.remote(queries, k).result()` take what Retriever.search
    and search_batch take and give the same hits. `serve.delete(name)` ends it.

    Args:
      index: path of the index, the same on every machine.
      routers: how many processes hold the model.
      replicas: how many processes hold each expert's index, or so many of each that is named (others one).
      router_cpus: what a router declares to Ray. All processes together must fit the cluster, or Serve waits for more; what a
        process uses is not limited by it.
      replica_cpus: what a replica declares.
      reload_seconds: how often routers look for a new snapshot; 0: only when `handle.reload` is called.
      precision: of the products that embed queries, as for Retriever.load.
      name: of the application.

    Raises:
      ArtifactError: there is no index.
      ConfigError: Ray Serve is not installed, `replicas` names an expert that there is not, or a number makes no sense.
    """
    serve = _import()
    published = artifact.look(Path(index), KIND)
    model = artifact.inside(published, published.meta["model"]["folder"], MODEL)
    names = [BASE_EXPERT, *(entry["name"] for entry in model.meta["experts"])]
    wanted = dict.fromkeys(names, replicas) if isinstance(replicas, int) else dict.fromkeys(names, 1) | dict(replicas)
    if strangers := wanted.keys() - {*names}:
        raise ConfigError(f"replicas: {index} has no expert {min(strangers)!r}; it has {', '.join(names)}")
    require(
        routers >= 1 and min(wanted.values()) >= 1, "there must be at least one router and one replica of each expert"
    )
    require(reload_seconds >= 0, f"reload_seconds must not be negative, got {reload_seconds}")
    root = str(Path(index).resolve())
    experts = {
        own: serve.deployment(
            Replica,
            name=f"expert-{own}",
            num_replicas=count,
            max_ongoing_requests=_AT_ONCE,
            ray_actor_options={"num_cpus": replica_cpus},
        ).bind(root, own)
        for own, count in wanted.items()
    }
    router = serve.deployment(
        Router,
        name="router",
        num_replicas=routers,
        max_ongoing_requests=_MOST_WAITING,
        ray_actor_options={"num_cpus": router_cpus},
    ).bind(root, experts, reload_seconds, precision)
    return serve.run(router, name=name, route_prefix=None)


class Replica:
    """A process that holds one expert's index, as the last snapshots that it was asked about have it."""

    def __init__(self, index: str, expert: str):
        self._root, self._expert = Path(index), expert
        self._open: dict[_Version, tuple[Artifact, LocalHolder]] = {}
        self._opening = threading.Lock()

    async def ask(self, version: _Version, method: str, *arguments: Any) -> Any:
        """What a method of the expert's LocalHolder returns. Raises ArtifactError if that snapshot is kept no longer."""
        return await asyncio.to_thread(self._ask, version, method, arguments)

    def _ask(self, version: _Version, method: str, arguments: Sequence[Any]) -> Any:
        with self._opening:
            if version not in self._open:
                self._open[version] = self._opened(version)
                while len(self._open) > _KEPT:
                    self._open.pop(next(iter(self._open)))  # its files are given back with its last search
            _, holder = self._open[version]
        return getattr(holder, method)(*arguments)

    def _opened(self, version: _Version) -> tuple[Artifact, LocalHolder]:
        kept = [
            own for own in artifact.snapshots(self._root, KIND) if (own.snapshot, own.fingerprint) == tuple(version)
        ]
        if not kept:
            raise ArtifactError(f"{self._root} does not keep snapshot {version[0]} any more")
        [published] = kept
        before = [own.files for own, _ in self._open.values()]
        new = [
            name
            for name in files_of(published, self._expert)
            if not any(files.get(name) == published.files.get(name) for files in before)
        ]
        artifact.check(published, new)
        known = {own.folder: own for _, holder in self._open.values() for own in holder.segments}
        return published, open_holder(published, self._expert, read_words(published), known)


class RemoteHolder:
    """Asks an expert's replicas."""

    def __init__(self, handle: Any, version: _Version):
        self._handle, self._version = handle, version

    def _ask(self, method: str, *arguments: Any) -> Any:
        from ray.exceptions import RayActorError

        for _ in range(1, _ATTEMPTS):
            with contextlib.suppress(RayActorError):
                return self._handle.ask.remote(self._version, method, *arguments).result()
        return self._handle.ask.remote(self._version, method, *arguments).result()

    def search(self, *arguments: Any) -> Any:
        """As LocalHolder.search."""
        return self._ask("search", *arguments)

    def fetch(self, *arguments: Any) -> Any:
        """As LocalHolder.fetch."""
        return self._ask("fetch", *arguments)

    def identities(self) -> Any:
        """As LocalHolder.identities."""
        return self._ask("identities")

    def vectors(self) -> Any:
        """As LocalHolder.vectors."""
        return self._ask("vectors")

    def close(self) -> None:
        """Nothing is open here."""


class OnServe:
    """Every expert's index in its replicas: here are the model and the sketches alone."""

    def __init__(self, handles: Mapping[str, Any]):
        self._handles, self._threads = handles, ThreadPoolExecutor(_AT_ONCE)

    def read(self, root: Path, known: Artifact | None = None) -> Artifact:
        """The index, with its model and sketches verified."""
        published = artifact.look(root, KIND)
        prefix, files = f"{published.meta['model']['folder']}/", known.files if known else {}
        mine = [name for name in published.files if name.startswith(prefix) or name == published.meta["sketches"]]
        artifact.check(published, [name for name in mine if files.get(name) != published.files[name]])
        return published

    def open(self, published: Artifact, experts: Sequence[str], previous: Snapshot | None = None) -> Snapshot:
        """A snapshot whose experts are asked side by side."""
        version = published.snapshot, published.fingerprint
        held = {name: RemoteHolder(self._handles[name], version) for name in published.meta["experts"]}
        return Snapshot(published, experts, held, self._side_by_side)

    def _side_by_side(self, calls: Sequence[Callable[[], Any]]) -> list[Any]:
        return [call() for call in calls] if len(calls) < 2 else [*self._threads.map(lambda call: call(), calls)]


class Router:
    """A process that holds the model."""

    def __init__(self, index: str, experts: Mapping[str, Any], reload_seconds: float, precision: Precision | None):
        self._retriever = Retriever.of(OnServe(experts), index, precision=precision)
        self._together: Batcher[str, list[Hit]] = Batcher(self._search_together, most_waiting=_MOST_WAITING)
        if reload_seconds:
            threading.Thread(target=self._watch, args=(reload_seconds,), daemon=True).start()

    async def search(self, query: str, k: int = 10, **options: Any) -> list[Hit]:
        """As Retriever.search; queries that arrive together, with the same options, are searched together."""
        where = options.pop("where", None)
        if where is not None:
            filters.check(where)
            where = filters.to_json(where)
        return await self._together.submit((k, where, *sorted(options.items())), query)

    async def search_batch(self, queries: Sequence[str], k: int = 10, **options: Any) -> list[list[Hit]]:
        """As Retriever.search_batch."""
        return await asyncio.to_thread(self._search, queries, k, options)

    async def reload(self) -> bool:
        """As Retriever.reload, of the router that happens to be asked."""
        return await asyncio.to_thread(self._retriever.reload)

    def _search_together(self, asked: tuple[Any, ...], queries: list[str]) -> list[list[Hit]]:
        k, where, *options = asked
        return self._search(queries, k, {**dict(options), "where": None if where is None else json.loads(where)})

    def _search(self, queries: Sequence[str], k: int, options: Mapping[str, Any]) -> list[list[Hit]]:
        try:
            return self._retriever.search_batch(queries, k, **options)
        except ArtifactError:  # the snapshot is gone: more were published than are kept since this router looked
            if not self._retriever.reload():
                raise
            return self._retriever.search_batch(queries, k, **options)

    def _watch(self, seconds: float) -> None:
        while True:
            time.sleep(seconds)
            try:
                self._retriever.reload()
            except Exception:
                _LOG.exception("the index cannot be reloaded, the snapshot before is searched")
