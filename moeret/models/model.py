"""A model: one base, a bank of experts, a router. In memory, and as a directory on disk.

Every expert has its own files: its deltas under `experts/`; under `profiles/` a sample of its domain's base vectors, from which
routers are refitted and new experts get negatives without the old domains' data at hand; and, where it uses one, its memory
under `memories/`.
"""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import numpy as np
from jaxtyping import Float, Int
from safetensors.numpy import load_file

from moeret import artifact
from moeret.config import Precision, require
from moeret.errors import ArtifactError, ConfigError
from moeret.models import experts
from moeret.models.embed import Embedder
from moeret.models.familiarity import Familiarity
from moeret.models.memory import Blend, Memory
from moeret.models.pretrained import Base, find_base, load_base
from moeret.models.router import Choice, Router
from moeret.progress import progress_bar
from moeret.types import BASE_EXPERT, SHARED_EXPERT, Route

KIND = "model"
WORK = "training"
"""Subfolder of a model directory where training keeps checkpoints, metrics and cached vectors."""

VECTORS = "vectors"
"""Subfolder of a work folder with cached vectors, which indexing reads where training left them."""

Expert = str | Mapping[str, float] | Sequence[str] | None
"""One expert's name, several names with weights, a name for each text, or None for the base."""


@dataclass(frozen=True, slots=True)
class Profile:
    """A sample of a domain: readings of its queries and unit base vectors of its documents.

    `dev_vectors` are its dev queries as its expert embeds them; as the base does where experts embed their documents too.
    """

    train_queries: Float[np.ndarray, "Q 3*D"]
    dev_queries: Float[np.ndarray, "Q2 3*D"]
    documents: Float[np.ndarray, "N D"]
    dev_vectors: Float[np.ndarray, "Q2 D"]


class Model:
    """Embeds and routes texts. `experts` are the names of experts 1..E; a bare base has none."""

    def __init__(
        self,
        base: Base,
        *,
        tower: str = "query",
        names: Sequence[str] = (),
        bank: experts.Bank | None = None,
        shared: experts.Shared | None = None,
        query_router: Router | None = None,
        document_router: Router | None = None,
        blends: Mapping[str, Blend] | None = None,
        published: artifact.Artifact | None = None,
    ):
        self.tower, self.experts = tower, tuple(names)
        self.query_router, self.document_router, self.published = query_router, document_router, published
        self.has_shared, self.blends = shared is not None, dict(blends or {})
        self.embedder = Embedder(base, experts.with_base(bank or {}, shared=self.has_shared), shared)
        self.base = self.embedder.base_encoder

    @classmethod
    def load(cls, model: str | Path) -> "Model":
        """Loads a trained model's directory, or a bare base by folder or hub id.

        Raises:
          ArtifactError: the directory is a damaged or unfinished model.
          BaseEncoderError: it names no base that can be loaded.
        """
        folder = Path(model)
        unfinished = (folder / WORK).is_dir() and not (folder / "config.json").is_file()
        if artifact.exists(folder) or unfinished:
            return artifact.load(folder, KIND, cls.from_artifact)
        if folder.is_dir() and not (folder / "config.json").is_file():
            raise ArtifactError(
                f"{folder} is neither a moeret model (no manifest.json) nor a base encoder (no config.json)"
            )
        return cls(load_base(str(model), find_base(str(model))))

    @classmethod
    def from_artifact(cls, published: artifact.Artifact) -> "Model":
        """Loads a trained model whose files are verified.

        Raises:
          ArtifactError: its base is not the one that its experts were trained on.
        """
        meta = published.meta
        base = load_base(meta["base"]["name"], published.root / "base")
        if base.fingerprint != meta["base"]["fingerprint"]:
            raise ArtifactError(f"{published.root}/base is not the base that the experts were trained on")
        names = [entry["name"] for entry in meta["experts"]]
        bank = experts.stack([read_expert(published, entry["file"]) for entry in meta["experts"]]) if names else None
        shared = read_shared(published) if meta["shared"] else None
        routers = read_routers(published) if names else {}
        return cls(
            base,
            tower=meta["tower"],
            names=names,
            bank=bank,
            shared=shared,
            query_router=routers.get("query"),
            document_router=routers.get("document"),
            blends=_read_blends(meta),
            published=published,
        )

    def in_precision(self, precision: Precision) -> "Model":
        """The same model with its products in float32 or bfloat16, summed in float32 either way.

        bfloat16 is faster where the processor or an accelerator multiplies it, and slower elsewhere.

        Raises:
          ConfigError: it is neither.
        """
        require(precision in get_args(Precision), f"precision must be float32 or bfloat16, got {precision!r}")
        other = copy.copy(self)
        other.embedder = self.embedder.in_precision(precision)
        return other

    def encode_query(
        self,
        inputs: Sequence[str],
        *,
        expert: Expert = None,
        prompt: str | None = None,
        show_progress_bar: bool = False,
        normalize_embeddings: bool = False,
    ) -> Float[np.ndarray, "N D"]:
        """Embeds queries: float32 [N, D].

        `expert` is None (the base), a name, `auto` (the router decides), a mapping of names to weights (their deltas
        merged), or a sequence with a name for each text. `prompt` replaces the base's own query prompt. Vectors are of
        unit length where the base's are, or if `normalize_embeddings` is set.

        Raises:
          ConfigError: an unknown expert, or inputs that are not a list of strings.
        """
        check_texts(inputs)
        texts = self.with_prompt(inputs, "query", prompt)
        normalize = normalize_embeddings or self.base.config.normalize
        if not (isinstance(expert, str) and expert == "auto"):
            return self._encode(texts, *self.mixture(expert, len(texts)), normalize, show_progress_bar)
        with progress_bar("Encoding", len(texts), shown=show_progress_bar, unit="texts") as advance:
            return self.embedder.routed(texts, self._router(), normalize=normalize, advance=advance)[1]

    def encode_document(
        self,
        inputs: Sequence[str],
        *,
        expert: Expert = None,
        prompt: str | None = None,
        show_progress_bar: bool = False,
        normalize_embeddings: bool = False,
    ) -> Float[np.ndarray, "N D"]:
        """Embeds documents: float32 [N, D]; as encode_query, but `auto` is not offered.

        With a query-tower model every expert's documents are in the base's space, so `expert` changes nothing.
        """
        check_texts(inputs)
        texts = self.with_prompt(inputs, "document", prompt)
        numbers, weights = self.mixture(expert, len(texts))
        if self.tower == "query":
            weights = np.zeros_like(weights)
        normalize = normalize_embeddings or self.base.config.normalize
        return self._encode(texts, numbers, weights, normalize, show_progress_bar)

    def _encode(
        self, texts: list[str], numbers: np.ndarray, weights: np.ndarray, normalize: bool, show_progress_bar: bool
    ) -> Float[np.ndarray, "N D"]:
        with progress_bar("Encoding", len(texts), shown=show_progress_bar, unit="texts") as advance:
            if not weights.any():
                return self.embedder.base(texts, normalize=normalize, advance=advance)
            return self.embedder.mixed(texts, numbers, weights, normalize=normalize, advance=advance)

    def route(self, queries: Sequence[str]) -> list[Route]:
        """Which experts each query would use, and how probable each is.

        Raises:
          ConfigError: the model has no experts, or queries are not a list of strings.
        """
        check_texts(queries)
        router = self._router()
        read = self.embedder.readings(self.with_prompt(queries, "query"), reads=router.reads)
        return self.routes(router.choose(read))

    def routes(self, choice: Choice) -> list[Route]:
        """What a router of this model chose, by the experts' names."""
        return [
            Route(
                probabilities=dict(zip(self.experts, map(float, row), strict=True)),
                experts={self.experts[e - 1]: float(w) for e, w in zip(own, share, strict=True) if w > 0},
                abstained=bool(gone),
            )
            for row, own, share, gone in zip(*choice, strict=True)
        ]

    def _router(self) -> Router:
        if self.query_router is None:
            raise ConfigError("this model has no experts and so no router; train some, or use expert=None")
        return self.query_router

    def with_prompt(self, texts: Sequence[str], side: str, prompt: str | None = None) -> list[str]:
        """The texts with the base's prompt for `side` (query or document) in front."""
        prompt = self.base.prompts[side] if prompt is None else prompt
        return [prompt + text for text in texts] if prompt else list(texts)

    def mixture(self, expert: Expert, count: int) -> tuple[Int[np.ndarray, "N S"], Float[np.ndarray, "N S"]]:
        """`expert` as numbers and weights for `count` texts; the base is expert 0 with weight 0.

        Raises:
          ConfigError: an unknown name, or a sequence of the wrong length.
        """
        if isinstance(expert, Mapping):
            numbers = np.array([[self.number(name) for name in expert]] * count, np.int32).reshape(count, len(expert))
            return numbers, np.array([list(expert.values())] * count, np.float32).reshape(count, len(expert))
        names = [expert] * count if expert is None or isinstance(expert, str) else list(expert)
        if len(names) != count:
            raise ConfigError(
                f"expert names {len(names)} experts for {count} texts; give one name, or one for each text"
            )
        numbers = np.array([self.number(name) for name in names], np.int32).reshape(count, 1)
        return numbers, (numbers > 0).astype(np.float32)

    def number(self, expert: str | None) -> int:
        """The expert's place in the bank: 0 for the base, behind all experts for the shared delta alone."""
        if expert is None or expert == BASE_EXPERT:
            return 0
        if expert == SHARED_EXPERT and self.has_shared:
            return len(self.experts) + 1
        if expert not in self.experts:
            known = ", ".join((BASE_EXPERT, *self.experts, *([SHARED_EXPERT] if self.has_shared else [])))
            raise ConfigError(f"there is no expert {expert!r}; this model has {known}")
        return self.experts.index(expert) + 1


def check_texts(texts: Sequence[str], what: str = "inputs") -> None:
    """Raises ConfigError unless `texts` is a sequence of strings that can be encoded."""
    if isinstance(texts, str) or not isinstance(texts, Sequence):
        raise ConfigError(f"{what} must be a list of strings, got {type(texts).__name__}; for one text pass [text]")
    for position, text in enumerate(texts):
        if not isinstance(text, str):
            raise ConfigError(f"{what}[{position}] must be a string, got {type(text).__name__}")
        try:
            text.encode()
        except UnicodeEncodeError:
            raise ConfigError(
                f"{what}[{position}] is not valid Unicode text: it has half of a surrogate pair"
            ) from None


def read_expert(published: artifact.Artifact, name: str) -> experts.Bank:
    """One expert's deltas, without a leading axis."""
    return experts.unflatten(load_file(published.path(name)))


def read_shared(published: artifact.Artifact) -> experts.Shared:
    """The shared delta, and how strongly each of the model's experts wants it."""
    own = published.meta["shared"]
    strengths = [0.0, *(entry["shared_strength"] for entry in published.meta["experts"]), own["strength"]]
    return experts.Shared(read_expert(published, own["file"]), np.array(strengths, np.float32))


def _read_blends(meta: Mapping[str, Any]) -> dict[str, Blend]:
    """What counts beside the cosine: for the base, each expert, and the shared delta where there is one."""
    named = {BASE_EXPERT: meta["base"], **{entry["name"]: entry for entry in meta["experts"]}}
    if meta["shared"]:
        named[SHARED_EXPERT] = meta["shared"]
    return {name: Blend(**entry["blend"]) for name, entry in named.items()}


def read_memory(published: artifact.Artifact, expert: str) -> Memory | None:
    """An expert's memory; None where it has none."""
    [file] = [entry["memory"] for entry in published.meta["experts"] if entry["name"] == expert]
    return Memory(**load_file(published.path(file))) if file else None


def read_profile(published: artifact.Artifact, name: str) -> Profile:
    """One domain's profile."""
    return Profile(**load_file(published.path(name)))


def read_routers(published: artifact.Artifact) -> dict[str, Router]:
    """The routers for queries and documents."""
    meta = published.meta["router"]
    tensors = load_file(published.path(meta["file"]))
    return {side: _router(tensors, side, dict(meta[side])) for side in ("query", "document")}


def _router(tensors: dict[str, np.ndarray], side: str, rules: dict[str, Any]) -> Router:
    limit = rules.pop("familiarity")
    familiarity = Familiarity(*(tensors[f"{side}.familiarity.{name}"] for name in ("center", "spread", "known")), limit)
    return Router(weights=tensors[f"{side}.weights"], bias=tensors[f"{side}.bias"], familiarity=familiarity, **rules)
