"""Changing a published index: documents come, change and go; segments are joined; an earlier snapshot comes back.

Every change is the next snapshot, published in one rename; readers keep theirs. Deleted rows are only noted, until their segments
are joined with others. Segments of one size are joined once there are too many of them (a log-structured merge tree, O'Neil et
al. 1996), so a document is linked again a few times at most, however often the index is updated.
"""

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from moeret import artifact
from moeret.artifact import Artifact, Draft
from moeret.config import EngineName, IndexConfig, OnError, require
from moeret.data.beir import encodable
from moeret.data.sources import Plan, read_shards, scan
from moeret.errors import ConfigError
from moeret.lock import writing
from moeret.models.model import KIND as MODEL_KIND
from moeret.models.model import Model
from moeret.retrieval.build import sources_of, write_skipped
from moeret.retrieval.engine import Local, engine_of
from moeret.retrieval.job import Job, in_groups, include_segment, remove_leftovers, remove_published
from moeret.retrieval.segment import LiveSegment, identity
from moeret.retrieval.snapshot import KIND, all_segments, model_of, publish_snapshot

_TIER = 8
"""Segments of one size, at most `_TIER` times apart, that an update leaves; more are joined."""


@dataclass(frozen=True, slots=True)
class Changes:
    """What an update did, in documents; `unknown` were to be deleted but are not there. `published` is the index after it."""

    added: int
    replaced: int
    deleted: int
    unchanged: int
    unknown: int
    published: Artifact


def update_index(
    index: str | Path,
    domains: Mapping[str, str | Path] | None = None,
    corpora: Sequence[str | Path] = (),
    delete: Mapping[str, Collection[str]] | None = None,
    *,
    model: str | Path | None = None,
    on_error: OnError = "stop",
    engine: EngineName = "local",
    show_progress_bar: bool = False,
) -> Changes:
    """Adds documents to an index, replaces those of the same id, deletes others, and publishes the next snapshot.

    `domains` and `corpora` are as for build_index, but only with what is new or changed: what they have as the index does is
    left as it is, and what they lack stays. `delete` has ids, by domain; "" are documents without one. A document that is both
    deleted and given is replaced. Cut off, it goes on when called again with the same arguments; called again after that, it
    finds nothing to do. `model`, where given, must be the one that the index was built with.

    Raises:
      DataError, ArtifactError, BusyError: as build_index does.
      ConfigError: there is nothing to change, the model is another, a domain has no expert, or an unfinished job for other things
        lies there.
    """
    out, wanted = Path(index), {name: _ids(name, ids) for name, ids in (delete or {}).items()}
    require(
        bool(domains or corpora or any(wanted.values())),
        "there is nothing to change; give documents that are new or changed, or ids to delete",
    )
    artifact.look(out, KIND)  # nothing is locked or made where there is no index
    with writing(out):
        published, config = _opened(out)
        folder = out / published.meta["model"]["folder"]
        _require_model(published, model)
        experts = [entry["name"] for entry in artifact.inside(published, folder.name, MODEL_KIND).meta["experts"]]
        sources = sources_of(domains or {}, corpora, experts, folder)
        if strangers := wanted.keys() - {*experts, ""}:
            raise ConfigError(f"cannot delete from domain {min(strangers)}: {out} has {', '.join(experts)}")
        plan = scan(sources, config.shard_documents, on_error)
        request = {
            "update of": [published.snapshot, published.fingerprint],
            "delete": artifact.fingerprint({name: sorted(ids) for name, ids in wanted.items()}),
            "on_error": on_error,
            **plan.digests,
        }
        edit = _Edit(all_segments(published))
        edit.delete(wanted)
        edit.read(plan)
        counts = edit.counts
        if not edit.changed and not edit.dead:
            return Changes(**counts, published=published)
        job = Job(out, request, config, engine_of(engine), shown=show_progress_bar)
        write_skipped(out, plan)
        loaded = model_of(published).in_precision(config.precision)
        shards = [shard for shard in plan.shards if shard.number in edit.changed]
        encoded = job.encode(shards, loaded, folder, places=edit.changed)
        draft = Draft(out, KIND)
        held = edit.left()
        for name, segments in job.link(job.groups(encoded)).items():
            held.setdefault(name, []).extend(include_segment(draft, own, config) for own in segments)
        held = _joined_tiers(job, draft, held, config)
        about = _about(published) | {"request": _next_request(published)}
        after = _publish(draft, published, loaded, held, config, about)
        return Changes(**counts, published=after)


def compact_index(index: str | Path, *, show_progress_bar: bool = False) -> Artifact:
    """Joins an index's segments into as few as may be, without deleted documents, and publishes the next snapshot.

    Segments that are large and whole stay as they are; where all are, nothing is published. Earlier snapshots keep their
    segments on disk as long as they are kept.

    Raises:
      ArtifactError, BusyError: the index is damaged, or another process is writing it.
      ConfigError: an unfinished job for other things lies there.
    """
    out = Path(index)
    artifact.look(out, KIND)
    with writing(out):
        published, config = _opened(out)
        kept, groups = {}, {}
        for name, segments in all_segments(published).items():
            kept[name] = [own for own in segments if own.live.all() and 2 * len(own.live) > config.segment_documents]
            rest = [own for own in segments if own not in kept[name]]
            if len(rest) == 1 and rest[0].live.all():
                kept[name] += rest
            elif rest:
                groups[name] = in_groups([_part(own) for own in rest], config.segment_documents)
        if not groups:
            return published
        job = Job(
            out, {"compact": [published.snapshot, published.fingerprint]}, config, Local(), shown=show_progress_bar
        )
        loaded, draft = model_of(published), Draft(out, KIND)
        for name, segments in job.link(groups).items():
            kept[name] += [include_segment(draft, own, config) for own in segments]
        return _publish(draft, published, loaded, kept, config, _about(published))


def rollback_index(index: str | Path, to: int | None = None) -> Artifact:
    """Publishes an earlier snapshot again, the last one before the present unless `to` names another, as the next one.

    Files that only the present one has may be damaged.

    Raises:
      ConfigError: there is no such snapshot.
      ArtifactError, BusyError: that snapshot is damaged, or another process is writing the index.
    """
    out = Path(index)
    artifact.look(out, KIND)
    with writing(out):
        *earlier, _ = artifact.snapshots(out, KIND)
        numbers = [own.snapshot for own in earlier]
        require(bool(numbers), f"{out} keeps no earlier snapshot")
        require(
            to is None or to in numbers, f"{out} has no earlier snapshot {to}; it has {', '.join(map(str, numbers))}"
        )
        [target] = [own for own in earlier if own.snapshot == (numbers[-1] if to is None else to)]
        artifact.check(target)
        draft = Draft(out, KIND)
        for name in target.files:
            draft.keep(target, name)
        after = draft.publish(target.meta, keep=IndexConfig(**target.meta["config"]).snapshots)
        remove_leftovers(out)
        return after


def _ids(domain: str, ids: Collection[str]) -> frozenset[str]:
    own = frozenset(ids)
    fits = not isinstance(ids, str) and all(isinstance(id, str) for id in own)
    require(fits, f"delete: the ids of domain {domain!r} must be a list of strings")
    return frozenset(encodable(id, f"delete: an id of domain {domain!r}") for id in own)


def _opened(out: Path) -> tuple[Artifact, IndexConfig]:
    """An index that is to be changed: whole, with all its snapshots, and without what a killed job left of the last change."""
    published = artifact.read(out, KIND)
    config = IndexConfig(**published.meta["config"])
    artifact.snapshots(out, KIND)
    remove_published(out, published)
    return published, config


class _Edit:
    """What documents that come and ids that go change in the segments of an index."""

    def __init__(self, held: Mapping[str, list[LiveSegment]]):
        self._held = held
        self.dead: dict[str, set[int]] = {}
        """Folder of a segment -> its rows that are deleted by this."""
        self.changed: dict[int, np.ndarray] = {}
        """Number of a shard -> the places of its documents that are new or other than before, if there are any."""
        self.counts = dict.fromkeys(("added", "replaced", "deleted", "unchanged", "unknown"), 0)
        """Documents, by what became of them."""
        self._deleted: set[tuple[str, str]] = set()

    def _found(self, domain: str, ids: Collection[str]) -> dict[str, list[tuple[LiveSegment, int]]]:
        """The live rows of a domain's documents, or of those without one, by id."""
        segments = self._held.get(domain, []) if domain else [own for every in self._held.values() for own in every]
        found: dict[str, list[tuple[LiveSegment, int]]] = {}
        for own in segments:
            for id, rows in own.segment.store.rows_of(ids).items():
                mine = [(own, row) for row in rows if own.live[row] and own.segment.loose[row] != bool(domain)]
                if mine:
                    found.setdefault(id, []).extend(mine)
        return found

    def _kill(self, places: Sequence[tuple[LiveSegment, int]]) -> None:
        for own, row in places:
            self.dead.setdefault(own.folder, set()).add(row)

    def delete(self, ids: Mapping[str, Collection[str]]) -> None:
        """Deletes documents, by domain."""
        for domain, own in ids.items():
            found = self._found(domain, own)
            for id, places in found.items():
                self._kill(places)
                self._deleted.add((domain, id))
            self.counts["deleted"] += len(found)
            self.counts["unknown"] += len(own) - len(found)

    def read(self, plan: Plan) -> None:
        """Looks every document of a plan up."""
        for shard, documents in read_shards(plan.shards):
            domain = shard.source.domain
            found = self._found(domain, [own.id for own in documents])
            changed = []
            for place, document in enumerate(documents):
                before, gone = found.get(document.id, []), (domain, document.id) in self._deleted
                same = identity(document)
                if before and not gone and all(own.segment.identities[row] == same for own, row in before):
                    self.counts["unchanged"] += 1
                    continue
                self._kill(before)
                changed.append(place)
                self.counts["deleted"] -= gone
                self.counts["replaced" if before else "added"] += 1
            if changed:
                self.changed[shard.number] = np.array(changed)

    def left(self) -> dict[str, list[LiveSegment]]:
        """The segments without what is deleted."""
        return {
            name: [own.without(self.dead[own.folder]) if own.folder in self.dead else own for own in segments]
            for name, segments in self._held.items()
        }


def _joined_tiers(
    job: Job, draft: Draft, held: Mapping[str, Sequence[LiveSegment]], config: IndexConfig
) -> dict[str, list[LiveSegment]]:
    """The same documents, with the segments of each size joined where there are too many of them."""
    held, number = {name: [own for own in every if own.live.any()] for name, every in held.items()}, 0
    while crowded := {name: own for name, every in held.items() if (own := _crowded(every, config))}:
        number += 1
        groups = {
            name: in_groups([_part(one) for one in own], config.segment_documents) for name, own in crowded.items()
        }
        # Here, whatever the job's engine: these segments are open.
        for name, [segment] in job.link(groups, part=f"tier{number}-", engine=Local()).items():
            rest = [own for own in held[name] if own not in crowded[name]]
            held[name] = [*rest, include_segment(draft, segment, config)]
    return held


def _crowded(segments: Sequence[LiveSegment], config: IndexConfig) -> list[LiveSegment]:
    tiers: dict[int, list[LiveSegment]] = {}
    for own in segments:
        tiers.setdefault(int(math.log(int(own.live.sum()), _TIER)), []).append(own)
    for _, own in sorted(tiers.items()):
        if len(own) > _TIER and sum(int(one.live.sum()) for one in own) <= config.segment_documents:
            return own
    return []


def _part(own: LiveSegment) -> tuple[int, Any]:
    return int(own.live.sum()), lambda: (own.segment, own.live)


def _publish(
    draft: Draft,
    published: Artifact,
    model: Model,
    held: Mapping[str, Sequence[LiveSegment]],
    config: IndexConfig,
    about: dict[str, Any],
) -> Artifact:
    """The next snapshot: the model, the memories and what is left of the segments stay where they are."""
    for folder in ("memories", published.meta["model"]["folder"]):
        draft.keep_folder(published, folder)
    for own in (own for segments in held.values() for own in segments if own.live.any()):
        draft.keep_folder(published, own.folder)
    after = publish_snapshot(draft, model, held, config, about)
    remove_leftovers(draft.root)
    return after


def _about(published: Artifact) -> dict[str, Any]:
    return {key: published.meta[key] for key in ("model", "config", "request", "memories")}


def _next_request(published: Artifact) -> dict[str, Any]:
    """What the index is made from now: no build of anew gives it."""
    request = published.meta["request"]
    return request | {"updates": request.get("updates", 0) + 1}


def _require_model(published: Artifact, model: str | Path | None) -> None:
    if model is not None:
        given = artifact.read(Path(model), MODEL_KIND).fingerprint
        require(
            given == published.meta["model"]["fingerprint"],
            f"{published.root} was built with another model than {model}; give that, or build the index anew",
        )
