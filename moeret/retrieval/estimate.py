"""What an indexing job would cost, told from a sample that goes the whole way."""

import dataclasses
import tempfile
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from moeret import artifact
from moeret.artifact import Artifact
from moeret.config import IndexConfig, OnError, require
from moeret.data.sources import Plan, Shard, Source, read_shards, scan
from moeret.models.model import KIND as MODEL_KIND
from moeret.models.model import Model
from moeret.retrieval.build import sources_of
from moeret.retrieval.engine import encode_documents, shards_at_once
from moeret.retrieval.hnsw import build_vector_index
from moeret.retrieval.segment import open_segment
from moeret.retrieval.shards import KIND as SHARD
from moeret.retrieval.shards import ShardTask, segment_in
from moeret.threads import at_once
from moeret.types import Document

_SHARDS, _DOCUMENTS = 8, 256
"""Shards that the sample is taken from, evenly, and documents of each."""
_FEW, _MANY = 2**12, 2**16
"""Vectors of the two graphs that are linked: their difference says what a larger one takes. The second outgrows the processor's
caches, as large ones do."""


def estimate_index(
    model: str | Path,
    domains: Mapping[str, str | Path],
    corpora: Sequence[str | Path] = (),
    *,
    config: IndexConfig | None = None,
    on_error: OnError = "stop",
) -> dict[str, Any]:
    """What build_index would take with these arguments, as JSON; nothing is left on disk.

    `documents`, `skipped` and `shards` are counted; `tokens`, `encode_seconds`, `link_seconds`, `seconds` and `bytes` are
    told from a sample on this machine, of which the first documents do not count because programs are compiled then.

    Raises:
      DataError, ConfigError, ArtifactError: as build_index does.
    """
    config, model = config or IndexConfig(), Path(model)
    published = artifact.read(model, MODEL_KIND)
    sources = sources_of(domains, corpora, [entry["name"] for entry in published.meta["experts"]], model)
    require(bool(sources), "there is nothing to index; give --domain NAME=BEIR_DIR or --corpus FILE.jsonl")
    plan = scan(sources, config.shard_documents, on_error)
    loaded = Model.load(model).in_precision(config.precision)
    sample = _sample(plan)
    with tempfile.TemporaryDirectory() as scratch:
        return {
            "documents": plan.documents,
            "skipped": len(plan.skipped),
            "shards": len(plan.shards),
            **_told(loaded, plan, sample, config, Path(scratch)),
        }


def _sample(plan: Plan) -> list[tuple[Shard, list[Document]]]:
    """Documents from all over the plan; those of one source together, as a job has them."""
    chosen = [plan.shards[place] for place in np.unique(np.linspace(0, len(plan.shards) - 1, _SHARDS).astype(int))]
    out: dict[Source, tuple[Shard, list[Document]]] = {}
    for shard, documents in read_shards(chosen):
        places = np.unique(np.linspace(0, len(documents) - 1, _DOCUMENTS).astype(int))
        out.setdefault(shard.source, (shard, []))[1].extend(documents[place] for place in places)
    return [*out.values()]


def _in_parts(sample: list[tuple[Shard, list[Document]]], most: int) -> list[tuple[Shard, list[Document]]]:
    """The same documents as shards of at most so many."""
    parts = [
        (shard, documents[start : start + most])
        for shard, documents in sample
        for start in range(0, len(documents), most)
    ]
    return [(dataclasses.replace(shard, number=number), own) for number, (shard, own) in enumerate(parts)]


def _told(
    model: Model, plan: Plan, sample: list[tuple[Shard, list[Document]]], config: IndexConfig, scratch: Path
) -> dict[str, Any]:
    count, together = sum(len(documents) for _, documents in sample), shards_at_once(model)
    parts = _in_parts(sample, -(-count // together))

    def encode(name: str) -> tuple[float, list[Artifact]]:
        task = ShardTask(scratch / name, model.published.root, config)
        started = time.perf_counter()
        encode_documents(task, task.encoder(model), iter(parts), together, lambda count, note: None)
        return time.perf_counter() - started, [artifact.read(task.folder(shard), SHARD) for shard, _ in parts]

    encode("first")
    seconds, shards = encode("second")
    segments = [segment_in(shard, name) for shard in shards for name in shard.meta["experts"]]
    rows = sum(own.meta["documents"] for own in segments)
    stored = sum(entry.bytes for own in segments for name, entry in own.files.items() if not name.startswith("vectors"))
    vectors = np.concatenate([open_segment(own, config).vectors.vectors for own in segments])
    texts = [own.contents for _, documents in sample for own in documents]
    tokens = sum(map(len, model.base.tokenizer(model.with_prompt(texts, "document"))))
    share, linked = plan.documents / count, plan.documents * rows / count
    links = 2 * config.M * 4 + 16  # of a vector, on the ground: its neighbours and their number, and its own
    link_seconds = linked * _link_seconds(vectors, linked, config)
    return {
        "tokens": int(tokens * share),
        "encode_seconds": seconds * share,
        "link_seconds": link_seconds,
        "seconds": seconds * share + link_seconds,
        "bytes": int(share * stored + linked * (4 * vectors.shape[1] + links)),
    }


def _link_seconds(vectors: Float[np.ndarray, "N D"], count: float, config: IndexConfig) -> float:
    """Seconds that a vector takes to be linked with all cores, in segments of so many."""
    size = min(count, config.segment_documents)
    if size < config.exact_below:
        return 0.0
    threads = int(min(at_once(), -(-count // config.segment_documents)))
    largest = int(min(max(size, 2 * _FEW), _MANY))
    few, many = (_seconds_each(vectors, own, threads, config) for own in (_FEW, largest))
    return max(few + (many - few) * np.log(size / _FEW) / np.log(largest / _FEW), few / 4) / threads


def _seconds_each(vectors: Float[np.ndarray, "N D"], count: int, threads: int, config: IndexConfig) -> float:
    """Seconds of one vector in a graph of so many like these, while other threads do the same.

    Each is the middle of two of them, moved a little: many copies of a few would be linked faster than as many documents are.
    """
    random = np.random.default_rng(0)
    own = sum(vectors[random.integers(0, len(vectors), count)] for _ in range(2))
    own = own + random.normal(size=(count, vectors.shape[1])) * (0.3 / vectors.shape[1] ** 0.5)
    own = (own / np.linalg.norm(own, axis=1, keepdims=True)).astype(np.float32)
    linked = dataclasses.replace(config, exact_below=0)
    started = time.perf_counter()
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(build_vector_index, [own] * threads, [linked] * threads))
    return (time.perf_counter() - started) / count
