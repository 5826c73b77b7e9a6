"""All settings, as frozen dataclasses: what they mean, their defaults, and which values make no sense.

The command line is made from these classes, so a field's docstring is its help text.
"""

import dataclasses
import json
from dataclasses import dataclass
from typing import Any, Literal, get_args

from moeret.errors import ConfigError

MATRICES = ("query", "key", "value", "attention_output", "mlp_in", "mlp_out")
"""The matrices of a transformer layer that an expert can change."""

Tower = Literal["query", "both"]
Precision = Literal["float32", "bfloat16"]
OnError = Literal["stop", "skip"]
EngineName = Literal["local", "ray"]
RouteMode = Literal["auto", "oracle", "base", "all"]

DEFAULT_BASE = "sentence-transformers/all-MiniLM-L6-v2"
"""The base encoder unless another is named."""


def require(holds: bool, message: str) -> None:
    """Raises ConfigError with `message` unless `holds`."""
    if not holds:
        raise ConfigError(message)


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertConfig:
    """The shape of every expert in a bank."""

    rank: int = 16
    """Rank of an expert's delta to one matrix."""
    layers: int = 3
    """How many of the encoder's upper layers experts change; the layers below are the trunk, read once a query."""
    matrices: tuple[str, ...] = MATRICES
    """Which matrices of a layer experts change."""
    shared_rank: int = 224
    """With --tower query: rank of the shared delta, learned from all domains and merged with each expert; 0 for none."""

    def __post_init__(self) -> None:
        require(self.rank >= 1, f"rank must be at least 1, got {self.rank}")
        require(self.layers >= 1, f"layers must be at least 1, got {self.layers}")
        require(self.shared_rank >= 0, f"shared_rank must not be negative, got {self.shared_rank}")
        require(
            bool(self.matrices)
            and set(self.matrices) <= set(MATRICES)
            and len(set(self.matrices)) == len(self.matrices),
            f"matrices must be distinct names out of {', '.join(MATRICES)}; got {', '.join(self.matrices) or 'none'}",
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainConfig:
    """How experts are trained; all of them in one run."""

    tower: Tower = "query"
    """query: experts change queries, documents stay in the base's space. both: experts encode their documents too."""
    steps: int = 400
    """Optimizer steps of an expert at most; one that stops improving on dev stops earlier. 0: the shared delta alone."""
    epochs: float = 3.0
    """Passes of an expert over its queries, and of the shared delta over as many as all domains have, at most: a small domain
    is soon learned by heart."""
    shared_steps: int = 500
    """Optimizer steps of the shared delta for each domain at most."""
    batch_size: int = 32
    """Queries per step, all of one domain."""
    mini_batch_size: int = 256
    """Texts that are encoded at a time; a larger batch takes the memory of so many, and encodes each twice (GradCache)."""
    learning_rate: float = 2e-3
    """Peak of a cosine schedule with a short linear warm-up (AdamW, gradients clipped)."""
    shared_learning_rate: float = 1e-3
    """The same for the shared delta: one of higher rank moves further at the same rate."""
    warmup: float = 0.1
    """Share of the steps spent warming up."""
    weight_decay: float = 0.0
    """AdamW's decoupled weight decay."""
    precision: Precision = "float32"
    """Of all products in training, up to the queries that a memory keeps, summed in float32 either way; bfloat16 is faster
    where the processor multiplies it."""
    temperature: float = 0.02
    """Divides cosines in the contrastive loss."""
    hard_negatives: int = 1
    """With --tower both: mined hard negatives per query."""
    evaluate_every: int = 50
    """Steps between two looks at dev nDCG@10; also between two checkpoints."""
    patience: int = 4
    """An expert stops after this many looks without a better dev nDCG@10."""
    dev_queries: int = 300
    """Dev queries per domain at most (a fixed pseudo-random choice)."""
    seed: int = 0
    """Decides initial experts, batch order and mined choices."""
    expert: ExpertConfig = ExpertConfig()
    """The experts' shape."""

    def __post_init__(self) -> None:
        require(self.tower in ("query", "both"), f"tower must be query or both, got {self.tower!r}")
        require(self.precision in get_args(Precision), f"precision must be float32 or bfloat16, got {self.precision!r}")
        for name in ("shared_steps", "batch_size", "mini_batch_size", "evaluate_every", "patience", "dev_queries"):
            require(getattr(self, name) >= 1, f"{name} must be at least 1, got {getattr(self, name)}")
        require(
            self.batch_size <= self.mini_batch_size or self.batch_size % self.mini_batch_size == 0,
            f"batch_size {self.batch_size} is no multiple of mini_batch_size {self.mini_batch_size}",
        )
        require(self.epochs > 0, f"epochs must be above 0, got {self.epochs}")
        require(self.steps >= 0, f"steps must not be negative, got {self.steps}")
        require(self.hard_negatives >= 0, f"hard_negatives must not be negative, got {self.hard_negatives}")
        for name in ("learning_rate", "shared_learning_rate"):
            require(getattr(self, name) > 0, f"{name} must be above 0, got {getattr(self, name)}")
        require(self.temperature > 0, f"temperature must be above 0, got {self.temperature}")
        require(0 <= self.warmup < 1, f"warmup must be in [0, 1), got {self.warmup}")
        require(self.weight_decay >= 0, f"weight_decay must not be negative, got {self.weight_decay}")
        require(0 <= self.seed < 2**31, f"seed must be in [0, 2^31), got {self.seed}")


@dataclass(frozen=True, slots=True, kw_only=True)
class IndexConfig:
    """How an expert's documents are indexed (hnswlib's parameter names)."""

    M: int = 16
    """HNSW: links of a vector per layer."""
    ef_construction: int = 128
    """HNSW: candidates looked at when a vector is linked."""
    ef: int = 200
    """HNSW: candidates looked at in a search."""
    exact_below: int = 2000
    """Segments with fewer vectors than this are searched exactly instead of by a graph."""
    seed: int = 0
    """HNSW: seed of the layers' random heights."""
    precision: Precision = "float32"
    """Of the products that embed documents, summed in float32 either way; bfloat16 is faster where the processor multiplies
    it. What training has embedded is in float32."""
    shard_documents: int = 4096
    """Documents that are embedded before they are saved: what a job loses at most when it is killed."""
    segment_documents: int = 2**18
    """Documents of a segment at most. Linking holds one segment a thread in memory; a search looks into every segment."""
    snapshots: int = 3
    """How many earlier snapshots stay when another is published, to go back to."""

    def __post_init__(self) -> None:
        require(self.precision in get_args(Precision), f"precision must be float32 or bfloat16, got {self.precision!r}")
        require(2 <= self.M <= 256, f"M must be in [2, 256], got {self.M}")
        require(
            self.M <= self.ef_construction <= 10**6,
            f"ef_construction must be in [M, 1000000], got {self.ef_construction}",
        )
        require(1 <= self.ef <= 10**6, f"ef must be in [1, 1000000], got {self.ef}")
        require(0 <= self.seed < 2**31, f"seed must be in [0, 2^31), got {self.seed}")
        for name in ("shard_documents", "segment_documents", "snapshots"):
            require(getattr(self, name) >= 1, f"{name} must be at least 1, got {getattr(self, name)}")
        require(self.exact_below >= 0, f"exact_below must not be negative, got {self.exact_below}")


@dataclass(frozen=True, slots=True, kw_only=True)
class ServeConfig:
    """What a service takes, and how long it takes for it. Times are in seconds."""

    batch_tokens: int = 4096
    """Queries (or texts to embed) that arrive together are embedded together, up to about so many tokens."""
    wait: float = 0.002
    """How long a query waits for others to be embedded with, while none is being embedded."""
    most_waiting: int = 256
    """Queries that may wait; more are refused with status 429."""
    deadline: float = 10.0
    """After this a request that has no answer yet is given up, with status 504."""
    reload_every: float = 10.0
    """How often the service looks for a new snapshot of its index; 0: never."""
    most_bytes: int = 2**20
    """Of a request's body; larger ones are refused with status 413."""
    most_characters: int = 20_000
    """Of a query."""
    most_hits: int = 1000
    """Of a search."""
    most_texts: int = 256
    """Of one request for embeddings."""

    def __post_init__(self):
        for name in ("batch_tokens", "most_waiting", "most_bytes", "most_characters", "most_hits", "most_texts"):
            require(getattr(self, name) >= 1, f"{name} must be at least 1, got {getattr(self, name)}")
        require(0 <= self.wait <= 1, f"wait must be in [0, 1] seconds, got {self.wait}")
        require(0 < self.deadline <= 3600, f"deadline must be in (0, 3600] seconds, got {self.deadline}")
        require(0 <= self.reload_every < 1e9, f"reload_every must be in [0, 1e9) seconds, got {self.reload_every}")


def to_json(config: Any) -> dict[str, Any]:
    """A dataclass as it reads back from JSON: tuples become lists, at any depth."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def differences(old: dict[str, Any], new: dict[str, Any]) -> str:
    """Names what differs between two JSON objects: `steps 300 -> 200, domain law (corpus.jsonl)`."""
    return ", ".join(
        _difference(key, old.get(key), new.get(key))
        for key in sorted(old.keys() | new.keys())
        if old.get(key) != new.get(key)
    )


def _difference(key: str, old: Any, new: Any) -> str:
    if isinstance(old, dict) and isinstance(new, dict):
        return (
            f"{key} ({', '.join(name for name in sorted(old.keys() | new.keys()) if old.get(name) != new.get(name))})"
        )
    if any(isinstance(value, str) and len(value) == 64 for value in (old, new)) or isinstance(old or new, (dict, list)):
        return f"{key} {'changed' if old and new else 'added' if new else 'left out'}"
    return f"{key} {old} -> {new}"
