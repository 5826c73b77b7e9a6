"""The indexing job: corpora and a model in, a published index out."""

import contextlib
import json
import os
import re
import shutil
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float
from safetensors.numpy import save_file

from moeret import artifact
from moeret.artifact import Artifact, Draft
from moeret.config import IndexConfig, Precision, differences, require, to_json
from moeret.data.beir import read_corpus
from moeret.data.lexical import Lexical
from moeret.errors import ArtifactError, ConfigError, DataError
from moeret.models.model import KIND as MODEL_KIND
from moeret.models.model import VECTORS, WORK, Model, read_memory
from moeret.models.vector_cache import cached_vectors
from moeret.progress import Advance, progress_bar
from moeret.retrieval.documents import write_documents
from moeret.retrieval.evidence import Evidence
from moeret.retrieval.expert_index import ExpertIndex, build_memory, write_index
from moeret.retrieval.hnsw import build_segment
from moeret.retrieval.sketch import make_sketch
from moeret.types import BASE_EXPERT, Document

KIND = "index"
_WORK = "building"
"""Subfolder of an index directory that keeps vectors until it is published."""
_MODEL = "model-"
"""How the subfolder with the index's model begins."""


def build_index(
    model: str | Path,
    out: str | Path,
    domains: Mapping[str, str | Path],
    corpora: Sequence[str | Path] = (),
    *,
    config: IndexConfig | None = None,
    overwrite: bool = False,
    show_progress_bar: bool = False,
) -> Artifact:
    """Indexes every domain's documents for its expert, and the documents of `corpora` (JSONL) for the base.

    Documents of `corpora` that look like an expert's go to its index too; where experts embed their own documents, to that only.
    A job that was cut off keeps its vectors and goes on when this is called again with the same arguments; a finished
    index is returned as it is.

    Raises:
      DataError: a corpus that cannot be used, or two documents of one id in one expert's index.
      ConfigError: a domain without an expert; or `out` is an index made from other things and `overwrite` is not set.
      ArtifactError, BusyError: the model is damaged, `out` is one, or another process is building there.
    """
    config, model, out = config or IndexConfig(), Path(model), Path(out)
    domains, corpora = {name: Path(path) for name, path in domains.items()}, [*map(Path, corpora)]
    require(bool(domains or corpora), "there is nothing to index; give --domain NAME=BEIR_DIR or --corpus FILE.jsonl")
    published = artifact.read(model, MODEL_KIND)
    names = [entry["name"] for entry in published.meta["experts"]]
    if unknown := [name for name in domains if name not in names]:
        raise ConfigError(
            f"{model} has no expert {unknown[0]} (it has {', '.join(names)}); add it with `moeret experts add`, "
            "or give its documents as --corpus and let the router place them"
        )
    read = {name: read_corpus(path / "corpus.jsonl") for name, path in domains.items()}
    loose = [(path, document) for path in corpora for document in read_corpus(path)]
    _check_ids(BASE_EXPERT, [], loose)
    request = {
        **to_json(config),
        "model": published.fingerprint,
        **{f"domain {name}": artifact.sha256_of(path / "corpus.jsonl") for name, path in domains.items()},
        "corpora": [artifact.sha256_of(path) for path in corpora],
    }
    with artifact.writing(out):
        if artifact.exists(out) and (finished := _finished(out, request, overwrite)):
            _remove_leftovers(out, finished)
            return finished
        draft = Draft(out, KIND)
        # The index's own model from here on: the other may get or lose an expert while documents are embedded.
        prefix = f"{_MODEL}{published.fingerprint[:12]}"
        loaded = _include(draft, published, prefix).in_precision(config.precision)
        total = sum(map(len, read.values())) + len(loose)
        with progress_bar("Embedding", total, shown=show_progress_bar, unit="documents") as advance:
            folders = [out / _WORK / VECTORS, model / WORK / VECTORS]
            vectors = _Vectors(loaded, config.precision, folders, advance)
            placed = {name: (documents, vectors.of(documents, name)) for name, documents in read.items()}
            placed = _place(loaded, placed, loose, vectors)
        meta = {
            "model": {"folder": prefix, "fingerprint": published.fingerprint},
            **_write(draft, loaded, placed, config, show_progress_bar),
            "config": to_json(config),
            "request": request,
        }
        finished = draft.publish(meta)
        _remove_leftovers(out, finished)
        return finished


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


Placed = dict[str, tuple[list[Document], Float[np.ndarray, "N D"]]]
"""Expert -> its documents and their vectors."""


class _Vectors:
    """Document vectors, kept in chunks in the first folder until the index is published; training's are used where they fit."""

    def __init__(self, model: Model, precision: Precision, folders: Sequence[Path], advance: Advance):
        self._model, self._precision, self._advance = model, precision, advance
        self._folders = [folders[0], *(folder for folder in folders[1:] if os.access(folder, os.R_OK))]

    def of(self, documents: list[Document], expert: str) -> Float[np.ndarray, "N D"]:
        """Unit vectors of documents in the expert's index."""
        model = self._model
        texts = model.with_prompt([document.contents for document in documents], "document")
        number = 0 if model.tower == "query" else model.number(expert)
        embedder = model.embedder.alone(number) if number else model.embedder

        def embed(chunk: Sequence[str]) -> np.ndarray:
            return embedder.base(chunk, advance=self._advance)

        key = model.base.fingerprint if number == 0 else f"{model.published.fingerprint}/{expert}"
        key += "" if self._precision == "float32" else f" in {self._precision}"
        return cached_vectors(embed, texts, model.embedder.width, self._folders, key, self._advance)


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
    require(
        overwrite,
        f"{out} is an index made from other things ({differences(finished.meta['request'], request)}); "
        "choose another directory, or replace it with --overwrite",
    )
    return None


def _kind(out: Path) -> str | None:
    """What the manifest at `out` says it is; None if it cannot be read."""
    try:
        return json.loads((out / artifact.MANIFEST).read_text())["kind"]
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _remove_leftovers(out: Path, finished: Artifact) -> None:
    """Deletes what killed jobs kept: vectors, and models of other versions; nothing that someone else may have put there."""
    shutil.rmtree(out / _WORK / VECTORS, ignore_errors=True)
    with contextlib.suppress(OSError):
        (out / _WORK).rmdir()
    for folder in out.glob(f"{_MODEL}*"):
        if re.fullmatch(f"{_MODEL}[0-9a-f]{{12}}", folder.name) and folder.name != finished.meta["model"]["folder"]:
            shutil.rmtree(folder, ignore_errors=True)


def _place(model: Model, placed: Placed, loose: list[tuple[Path, Document]], vectors: _Vectors) -> Placed:
    """Adds the documents without a domain: the familiar ones to the experts that the router gives them to, others to the base.

    With one document space the base's own index has them all: a query of their domain finds them in one place, and those
    among them that an expert's queries ask for are found there too.
    """
    base = vectors.of([document for _, document in loose], BASE_EXPERT)
    choice, names = model.document_router.choose(base), (BASE_EXPERT, *model.experts)
    everything = model.tower == "query"
    homes: dict[str, np.ndarray] = {
        name: np.flatnonzero((choice.experts[:, 0] == number) & ~choice.abstained) for number, name in enumerate(names)
    }
    homes[BASE_EXPERT] = np.arange(len(loose)) if everything else np.flatnonzero(choice.abstained)
    for name, rows in homes.items():
        if len(rows):
            before, known = placed.get(name, ([], None))
            added = [loose[row][1] for row in rows]
            _check_ids(name, before, [loose[row] for row in rows])
            own = base[rows] if everything or name == BASE_EXPERT else vectors.of(added, name)
            placed[name] = ([*before, *added], own if known is None else np.concatenate([known, own]))
    return {name: placed[name] for name in names if name in placed}


def _check_ids(expert: str, before: list[Document], added: list[tuple[Path, Document]]) -> None:
    """Raises DataError where an index would have two documents of one id; the same document twice is one in a result."""
    sources = {document.id: ("its domain", document) for document in before}
    for path, document in added:
        source, first = sources.setdefault(document.id, (str(path), document))
        if first != document:
            raise DataError(
                f"{path}: document {document.id!r} goes to expert {expert}, whose index has that id already "
                f"(from {source}) for another document; ids must be unique, rename one"
            )


def _build(
    model: Model,
    name: str,
    documents: list[Document],
    vectors: Float[np.ndarray, "N D"],
    lexical: Lexical | None,
    first: int,
    config: IndexConfig,
    advance: Advance,
) -> ExpertIndex:
    """One expert's index, its documents' rows counted from `first`; `lexical` are the words of all indexes' documents."""
    end = first + len(documents)
    segment = build_segment(vectors, np.arange(first, end), config, advance)
    known = None if name == BASE_EXPERT or lexical is None else read_memory(model.published, name)
    memory = known and build_memory(known, documents, first, config)
    return ExpertIndex(first, segment, lexical and lexical.part(first, end), memory)


def _write(
    draft: Draft,
    model: Model,
    placed: Placed,
    config: IndexConfig,
    show_progress_bar: bool,
) -> dict[str, Any]:
    documents = [document for own, _ in placed.values() for document in own]
    starts = np.cumsum([0, *(len(own) for own, _ in placed.values())])
    # A word weighs alike in every index: how rare it is, is counted over all of them.
    lexical = Lexical.of([document.contents for document in documents]) if model.tower == "query" else None
    with (
        progress_bar("Linking", len(documents), shown=show_progress_bar, unit="documents") as advance,
        ThreadPoolExecutor(os.cpu_count()) as threads,
    ):
        # One thread a graph, so that each is the same in every build; the graphs side by side.
        jobs = {
            name: threads.submit(_build, model, name, own, vectors, lexical, int(start), config, advance)
            for (name, (own, vectors)), start in zip(placed.items(), starts, strict=False)
        }
        indexes = {name: write_index(draft, name, job.result()) for name, job in jobs.items()}
    same, sketches = _same_documents(documents), {name: make_sketch(vectors) for name, (_, vectors) in placed.items()}
    return {
        "documents": {
            "count": len(np.unique(same)),
            "file": draft.add("documents.sqlite", lambda path: write_documents(path, documents)),
            "same": draft.add("same.safetensors", lambda path: save_file({"same": same}, path)),
        },
        "sketches": draft.add("sketches.safetensors", lambda path: save_file(sketches, path)),
        "strange_limit": Evidence(model.experts, sketches).limit(model)
        if model.tower == "query" and BASE_EXPERT in sketches
        else None,
        "experts": {name: {"documents": len(placed[name][0]), **entry} for name, entry in indexes.items()},
    }


def _same_documents(documents: list[Document]) -> np.ndarray:
    """For each row the first row with the same id, title and text: a document of two domains is one in a result."""
    first: dict[Document, int] = {}
    return np.array([first.setdefault(document, row) for row, document in enumerate(documents)], np.int64)
