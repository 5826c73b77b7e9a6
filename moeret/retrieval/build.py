"""The indexing job: corpora and a model in, a published index out.

Sources are checked in one pass and cut into shards; each shard is encoded and saved on its own; each expert's shards are joined
into segments with graphs; the first snapshot is published in one rename. A job that is killed goes on at what it had not saved.
"""

import contextlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from moeret import artifact
from moeret.artifact import Artifact, Draft
from moeret.config import EngineName, IndexConfig, OnError, differences, require, to_json
from moeret.data.sources import Plan, Source, scan
from moeret.errors import ArtifactError, ConfigError
from moeret.lock import require_own, writing
from moeret.models.model import KIND as MODEL_KIND
from moeret.models.model import VECTORS, WORK, Model
from moeret.retrieval.engine import engine_of
from moeret.retrieval.job import FOLDER, MODEL, Job, include_segment, remove_leftovers, remove_published
from moeret.retrieval.snapshot import KIND, publish_snapshot

_SKIPPED = "skipped.jsonl"


def build_index(
    model: str | Path,
    out: str | Path,
    domains: Mapping[str, str | Path],
    corpora: Sequence[str | Path] = (),
    *,
    config: IndexConfig | None = None,
    on_error: OnError = "stop",
    engine: EngineName = "local",
    overwrite: bool = False,
    show_progress_bar: bool = False,
) -> Artifact:
    """Indexes every domain's documents for its expert, and the documents of `corpora` for the base.

    Files are JSONL, gzip of it (.gz) or Parquet (.parquet). Documents of `corpora` that look like an expert's go to its index
    too; where experts embed their own documents, to that only. A job that was cut off goes on when this is called again with
    the same arguments; a finished index is returned as it is. With `on_error` skip, documents that cannot be used are left out
    and listed in skipped.jsonl. The `engine` ray gives shards to the processes of a Ray cluster; the index is the same.

    Raises:
      DataError: a file or a document that cannot be used, or an id that comes twice in a domain or among `corpora`.
      ConfigError: a domain without an expert; `out` is an index made from other things and `overwrite` is not set; or an
        unfinished job for other things lies there.
      ArtifactError, BusyError: the model is damaged, `out` is one, or another process is building there.
    """
    config, model, out = config or IndexConfig(), Path(model), Path(out)
    published = artifact.read(model, MODEL_KIND)
    sources = sources_of(domains, corpora, [entry["name"] for entry in published.meta["experts"]], model)
    require(bool(sources), "there is nothing to index; give --domain NAME=BEIR_DIR or --corpus FILE.jsonl")
    plan = scan(sources, config.shard_documents, on_error)
    request = {**to_json(config), "model": published.fingerprint, "on_error": on_error, **plan.digests}
    require_own(out, artifact.MANIFEST, FOLDER)
    with writing(out):
        if artifact.exists(out) and (finished := _finished(out, request, overwrite)):
            remove_published(out, finished)
            remove_leftovers(out)
            return finished
        job = Job(out, request, config, engine_of(engine), restart=overwrite, shown=show_progress_bar)
        write_skipped(out, plan)
        draft = Draft(out, KIND)
        # The index's own model from here on: the other may get or lose an expert while documents are embedded.
        prefix = f"{MODEL}{published.fingerprint[:12]}"
        loaded = _include(draft, published, prefix).in_precision(config.precision)
        encoded = job.encode(plan.shards, loaded, out / prefix, model / WORK / VECTORS)
        linked = job.link(job.groups(encoded))
        held = {name: [include_segment(draft, own, config) for own in segments] for name, segments in linked.items()}
        about = {
            "model": {"folder": prefix, "fingerprint": published.fingerprint},
            "config": to_json(config),
            "request": request,
        }
        finished = publish_snapshot(draft, loaded, held, config, about, forget=True)
        remove_leftovers(out)
        return finished


def sources_of(
    domains: Mapping[str, str | Path], corpora: Sequence[str | Path], experts: Sequence[str], model: Path
) -> list[Source]:
    """The files to read. Raises ConfigError for a domain without an expert."""
    if unknown := [name for name in domains if name not in experts]:
        raise ConfigError(
            f"{model} has no expert {unknown[0]} (it has {', '.join(experts)}); add it with `moeret experts add`, "
            "or give its documents as --corpus and let the router place them"
        )
    return [
        *(Source(Path(path) / "corpus.jsonl", name) for name, path in sorted(domains.items())),
        *(Source(Path(path)) for path in corpora),
    ]


def write_skipped(out: Path, plan: Plan) -> None:
    """Lists the documents that were left out, a line each, or deletes the list of an earlier job."""
    lines = [json.dumps({"file": str(own.path), "line": own.line, "reason": own.reason}) for own in plan.skipped]
    if lines:
        artifact.write_atomically(out / _SKIPPED, "".join(f"{line}\n" for line in lines).encode())
    else:
        (out / _SKIPPED).unlink(missing_ok=True)


def _include(draft: Draft, model: Artifact, prefix: str) -> Model:
    """The index's own copy of a model.

    Raises:
      ArtifactError: another version of the model was published since it was read.
    """
    with contextlib.suppress(FileNotFoundError):
        draft.include(model, prefix)
        included = Model.load(draft.root / prefix)
        if included.published.fingerprint == model.fingerprint:
            return included
    raise ArtifactError(f"{model.root} was changed meanwhile; index it again")


def _finished(out: Path, request: dict[str, Any], overwrite: bool) -> Artifact | None:
    """The index at `out` if it is just what is asked for; None if it may be replaced."""
    try:
        finished = artifact.read(out, KIND)
    except ArtifactError:
        if overwrite and _kind(out) in (KIND, None):  # a damaged index, never a model
            return None
        raise
    if finished.meta["request"] == request:
        return finished
    before = dict(finished.meta["request"])
    updates = before.pop("updates", 0)
    told = [differences(before, request)] if before != request else []
    told += [f"{updates} updates since it was built"] if updates else []
    update = "change it with --update, " if before["model"] == request["model"] else ""  # which another model cannot
    require(
        overwrite,
        f"{out} is an index made from other things ({', '.join(told)}); "
        f"choose another directory, {update}or replace it with --overwrite",
    )
    return None


def _kind(out: Path) -> str | None:
    """What the manifest at `out` says it is; None if it cannot be read."""
    try:
        return json.loads((out / artifact.MANIFEST).read_text())["kind"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
