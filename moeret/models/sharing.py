"""A model folder to the Hugging Face hub, and back: the same files under the same names, and a model card beside them."""

import json
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory

from moeret import artifact, hub
from moeret.artifact import MANIFEST, Artifact
from moeret.config import DEFAULT_BASE, require
from moeret.errors import ArtifactError
from moeret.lock import new_folder, require_new, writing
from moeret.models.card import MADE, model_card
from moeret.models.model import KIND
from moeret.models.pretrained import is_default_base

CARD = "README.md"
_EVERYBODYS = {CARD, ".gitattributes", "LICENSE"}
"""What a repository may hold before a model is in it."""


def push_model(
    model: str | Path,
    repo_id: str,
    *,
    private: bool = False,
    license: str | None = None,  # noqa: A002 (what the hub calls it)
    data_licenses: Mapping[str, str] | None = None,
    data_sources: Mapping[str, str] | None = None,
    show_progress_bar: bool = False,
) -> str:
    """Uploads a published model in one commit, with a model card made anew, and returns the commit's address.

    The repository is made if it is not there. It gets the manifest, what that lists, made.json and the card: no checkpoints, no
    local paths in the card. Files of the model that was there before and that this one lacks are deleted; other people's stay.
    `license` is the model's, `data_licenses` and `data_sources` say by an expert's name what its data's are: unknown unless
    given.

    Raises:
      ArtifactError: there is no whole model, or the repository holds something else. BusyError: it is being written.
      ConfigError: a licence or source of an expert that the model lacks.
      HubError: the hub does not answer or does not take it; no file changed there.
    """
    model, licenses, sources = Path(model), dict(data_licenses or {}), dict(data_sources or {})
    artifact.read(model, KIND)  # nothing is locked or made where there is no model
    with writing(model), hub.progress(show_progress_bar):
        published = artifact.read(model, KIND)
        names = [entry["name"] for entry in published.meta["experts"]]
        for name in (*licenses, *sources):
            require(name in names, f"there is no expert {name!r} in {model}; it has {', '.join(names)}")
        parent, there = hub.open_repository(repo_id, private=private)
        before = _model_there(repo_id, parent, there)
        files: dict[str, Path | bytes] = {name: model / name for name in (*published.files, MANIFEST)}
        if (model / MADE).is_file():
            files[MADE] = model / MADE
        card = model_card(
            published, repo_id, _base_on_hub(published), license=license, licenses=licenses, sources=sources
        )
        files[CARD] = card.encode()
        stale = sorted(before - files.keys())
        return hub.commit_files(repo_id, parent, files, stale, f"A moeret model of {', '.join(names)}")


def pull_model(
    repo_id: str, out: str | Path, *, revision: str | None = None, show_progress_bar: bool = False
) -> Artifact:
    """Downloads a model into a new folder, and returns it; it is there whole and verified, or not at all.

    What was interrupted goes on when this is called again: until the end the files lie beside `out`, in `out`.unfinished.

    Raises:
      ConfigError: `out` is there already.
      ArtifactError: the repository holds no whole model that this version of moeret reads. BusyError: it is being pulled.
      HubError: there is no such repository or revision, or the hub does not answer.
    """
    out = Path(out)
    require_new(out)
    commit = hub.commit_of(repo_id, revision)
    with new_folder(out, resume=True) as unfinished, hub.progress(show_progress_bar):
        try:
            if not hub.fetch_file(repo_id, commit, MANIFEST, unfinished):
                raise ArtifactError(f"no {MANIFEST} there")
            names = [*artifact.look(unfinished, KIND).files]
            for name in names:
                if name in (CARD, MADE):  # the next push would overwrite it
                    raise ArtifactError(f"{MANIFEST} lists {name}, which is no part of a model")
                hub.fetch_file(repo_id, commit, name, unfinished)
            names += [MANIFEST, *(own for own in (MADE, CARD) if hub.fetch_file(repo_id, commit, own, unfinished))]
            artifact.read(unfinished, KIND)
        except ArtifactError as error:  # of no use, also to another attempt
            shutil.rmtree(unfinished, ignore_errors=True)
            raise ArtifactError(f"{repo_id} is no whole moeret model ({error}); nothing is at {out}") from None
        shutil.rmtree(unfinished / ".cache", ignore_errors=True)  # the hub client's notes
        for path in [own for own in unfinished.rglob("*") if own.is_file()]:
            if path.relative_to(unfinished).as_posix() not in (*names, ".lock"):
                path.unlink()  # of an earlier commit, whose pull was interrupted
    return artifact.look(out, KIND)


def _model_there(repo_id: str, commit: str, there: set[str]) -> set[str]:
    """The files of the model that a repository holds, of any version of moeret; raises ArtifactError if it holds something else."""
    strange = min(there - _EVERYBODYS, default=None)
    if strange is None:
        return set()
    with TemporaryDirectory() as folder:
        if MANIFEST in there and hub.fetch_file(repo_id, commit, MANIFEST, Path(folder)):
            try:
                raw = json.loads((Path(folder) / MANIFEST).read_bytes())
                if raw["kind"] == KIND and raw["format"].startswith("moeret-"):
                    return {MADE, *raw["files"]} & there
            except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
                strange = MANIFEST
    raise ArtifactError(f"{repo_id} holds something else than a moeret model ({strange}); name a new repository")


def _base_on_hub(published: Artifact) -> str | None:
    """The hub's name of a model's base; None for a folder, whose name is nobody else's business."""
    name = published.meta["base"]["name"]
    if is_default_base(published.files):
        return DEFAULT_BASE
    return name if re.fullmatch(r"[\w.-]+/[\w.-]+", name) and not name.startswith(".") and hub.exists(name) else None
