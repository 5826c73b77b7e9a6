"""One shard of the indexing job: documents in, segments without graphs out, published on their own.

A shard's folder holds a segment for every expert that got some of its documents; with its manifest it is done. Which shards are
done is all that a job has to remember, and any process that has the model can encode any of them.
"""

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Float

from moeret import artifact
from moeret.artifact import Artifact, Draft
from moeret.config import IndexConfig
from moeret.data.lexical import Counts
from moeret.data.sources import Shard
from moeret.errors import ArtifactError
from moeret.models.model import Model, read_memory
from moeret.models.vector_cache import kept_vectors
from moeret.progress import Advance
from moeret.retrieval.segment import KIND as SEGMENT
from moeret.retrieval.segment import Answers, Content, identities, write_segment
from moeret.types import BASE_EXPERT, Document

KIND = "shard"


class ShardEncoder:
    """Encodes shards with one model; vectors that training has kept in `kept` are taken from there."""

    def __init__(self, model: Model, config: IndexConfig, kept: Path | None = None):
        self._model, self._config, self._kept = model, config, kept
        self._memories = {
            name: read_memory(model.published, name) if model.tower == "query" else None for name in model.experts
        }

    def publish(self, shard: Shard, documents: Sequence[Document], folder: Path, advance: Advance) -> Artifact:
        """Publishes a shard of which these are the documents at `folder`."""
        placed = self._place(shard, documents, advance)
        shutil.rmtree(folder, ignore_errors=True)  # what a killed job left
        draft = Draft(folder, KIND)
        for name, (rows, vectors) in placed.items():
            own = [documents[row] for row in rows]
            draft.include(self._segment(name, own, vectors, not shard.source.domain, folder / name), name)
        return draft.publish({"experts": {name: len(rows) for name, (rows, _) in placed.items()}})

    def _segment(
        self, name: str, documents: list[Document], vectors: np.ndarray, loose: bool, folder: Path
    ) -> Artifact:
        contents, memory = [own.contents for own in documents], self._memories.get(name)
        content = Content(
            documents,
            np.full(len(documents), loose),
            identities(documents),
            vectors,
            Counts.of(contents) if self._model.tower == "query" else None,
            Answers(*memory.answers(contents)) if memory else None,
        )
        return write_segment(folder, content, self._config, linked=False)

    def _place(
        self, shard: Shard, documents: Sequence[Document], advance: Advance
    ) -> dict[str, tuple[np.ndarray, Float[np.ndarray, "_ D"]]]:
        """Embeds a shard's documents: for each expert the rows of those that it gets, and their vectors.

        Documents without a domain that are familiar go to the expert that the router gives them to. With one document space
        the base's own index has them all: a query of their domain finds them in one place, and those among them that an
        expert's queries ask for are found there too.
        """
        every = np.arange(len(documents))
        if not documents:
            return {}
        if name := shard.source.domain:
            return {name: (every, self._vectors(documents, name, advance))}
        model = self._model
        base = self._vectors(documents, BASE_EXPERT, advance)
        choice = model.document_router.choose(base)
        alone = every if model.tower == "query" else np.flatnonzero(choice.abstained)
        homes = {BASE_EXPERT: alone} | {
            name: np.flatnonzero((choice.experts[:, 0] == number) & ~choice.abstained)
            for number, name in enumerate(model.experts, start=1)
        }
        placed = {}
        for name, rows in homes.items():
            if len(rows):
                as_base = model.tower == "query" or name == BASE_EXPERT
                own = [documents[row] for row in rows]
                placed[name] = rows, base[rows] if as_base else self._vectors(own, name, lambda count, padding: None)
        return placed

    def _vectors(self, documents: Sequence[Document], expert: str, advance: Advance) -> Float[np.ndarray, "N D"]:
        """Unit vectors of documents in the expert's index."""
        model = self._model
        texts = model.with_prompt([document.contents for document in documents], "document")
        number = 0 if model.tower == "query" else model.number(expert)
        if self._kept and number == 0 and self._config.precision == "float32":
            vectors = kept_vectors(texts, model.embedder.width, self._kept, model.base.fingerprint)
            if vectors is not None:
                advance(len(texts))
                return vectors
        embedder = model.embedder.alone(number) if number else model.embedder
        return embedder.base(texts, advance=advance)


@dataclass(frozen=True, slots=True)
class ShardTask:
    """All that a process, here or elsewhere, needs to encode a job's shards: folders, and where there are any, `places`.

    These are, by shard, the places of the documents that are wanted of it.
    """

    root: Path
    model: Path
    config: IndexConfig
    kept: Path | None = None
    places: Mapping[int, np.ndarray] | None = None

    def encoder(self, model: Model | None = None) -> ShardEncoder:
        """What encodes, with this model or the one of the folder."""
        model = model or Model.load(self.model).in_precision(self.config.precision)
        return ShardEncoder(model, self.config, self.kept)

    def folder(self, shard: Shard) -> Path:
        """Where a shard is published."""
        return self.root / f"{shard.number:06d}"

    def encode(self, encoder: ShardEncoder, shard: Shard, documents: list[Document], advance: Advance) -> Artifact:
        """Encodes and publishes a shard of which these are the documents.

        Raises:
          DataError: a vector is not finite.
          OSError: the disk is full, or the folder cannot be written.
        """
        wanted = documents if self.places is None else [documents[place] for place in self.places[shard.number]]
        advance(len(documents) - len(wanted))
        return encoder.publish(shard, wanted, self.folder(shard), advance)


def done(folder: Path) -> Artifact | None:
    """A shard that was published; None where it has to be encoded, because it never was or is damaged."""
    try:
        return artifact.read(folder, KIND) if artifact.exists(folder) else None
    except ArtifactError:
        return None


def segment_in(shard: Artifact, expert: str) -> Artifact:
    """An expert's segment of a shard."""
    return artifact.inside(shard, expert, SEGMENT)
