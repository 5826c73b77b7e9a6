"""An index for those who search with something else: vectors, ids and metadata as files, and where a query goes."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np

from moeret import artifact
from moeret.config import IndexConfig, require
from moeret.data.records import write_parquet
from moeret.lock import new_folder
from moeret.models.model import KIND as MODEL_KIND
from moeret.retrieval.hnsw import build_vector_index, save_graph
from moeret.retrieval.segment import LiveSegment
from moeret.retrieval.snapshot import KIND, all_segments
from moeret.types import BASE_EXPERT

Format = Literal["parquet", "hnswlib"]
_ROUTING = "routing.json"
_AT_ONCE = 1000


def export_index(index: str | Path, out: str | Path, to: Format = "parquet") -> dict[str, Any]:
    """Writes what an index holds into a new folder, and returns what its routing.json says.

    parquet: a file for each expert with the columns id, domain, title, text, metadata (JSON) and vector. hnswlib: for each expert
    a graph that hnswlib.Index(space="ip", dim=dimension) loads, and a JSONL file whose line n has the documents of label n: those
    with equal vectors share one. routing.json names the files, and the model, whose `route` and `encode_query(expert="auto")` say
    which experts a query asks and with which vector. Words and memories, which only a Retriever searches, are left behind.

    Raises:
      ArtifactError: the index is damaged.
      ConfigError: `out` is there already, or there is no such format. BusyError: it is being made.
      DataError: Parquet is asked for and pyarrow is not installed.
    """
    require(to in ("parquet", "hnswlib"), f"to must be parquet or hnswlib, got {to!r}")
    root, out = Path(index), Path(out)
    published = artifact.read(root, KIND)
    model = artifact.inside(published, published.meta["model"]["folder"], MODEL_KIND)
    held = all_segments(published)
    entries, width = [], 0
    with new_folder(out) as folder:
        for name, segments in held.items():
            width = segments[0].segment.published.meta["vectors"]["width"]
            write = _write_parquet if to == "parquet" else _write_hnswlib
            documents = published.meta["experts"][name]["documents"]
            files = write(folder, name, segments, IndexConfig(**published.meta["config"]))
            entries.append({"name": name, "documents": documents, **files})
        table = {
            "format": to,
            "dimension": width,
            "metric": "inner product of vectors of length 1",
            "tower": model.meta["tower"],
            "model": {"fingerprint": model.fingerprint, "experts": [entry["name"] for entry in model.meta["experts"]]},
            "index": {"fingerprint": published.fingerprint, "snapshot": published.snapshot},
            "base": BASE_EXPERT,
            "experts": entries,
        }
        (folder / _ROUTING).write_text(json.dumps(table, indent=1) + "\n")
    return table


def _write_parquet(out: Path, name: str, segments: list[LiveSegment], config: IndexConfig) -> dict[str, str]:
    write_parquet(out / f"{name}.parquet", _rows(name, segments))
    return {"file": f"{name}.parquet"}


def _rows(name: str, segments: list[LiveSegment]) -> Iterator[dict[str, list[Any] | np.ndarray]]:
    """Columns of some documents at a time."""
    for own in segments:
        rows, vectors = np.flatnonzero(own.live), own.segment.read_vectors()
        for start in range(0, len(rows), _AT_ONCE):
            part = rows[start : start + _AT_ONCE]
            documents = [*own.segment.store.fetch(part).values()]
            yield {
                "id": [document.id for document in documents],
                "domain": ["" if loose else name for loose in own.segment.loose[part]],
                "title": [document.title for document in documents],
                "text": [document.text for document in documents],
                "metadata": [document.metadata or "{}" for document in documents],
                "vector": vectors.vectors_of(part),
            }


def _write_hnswlib(out: Path, name: str, segments: list[LiveSegment], config: IndexConfig) -> dict[str, str]:
    vectors = np.concatenate([own.segment.read_vectors().vectors_of(np.flatnonzero(own.live)) for own in segments])
    index = build_vector_index(vectors, IndexConfig(M=config.M, ef_construction=config.ef_construction, exact_below=0))
    save_graph(index, out / f"{name}.hnsw")
    about = [
        {"id": id, "domain": domain, "metadata": json.loads(metadata)}
        for part in _rows(name, segments)
        for id, domain, metadata in zip(part["id"], part["domain"], part["metadata"], strict=True)
    ]
    with (out / f"{name}.jsonl").open("w", encoding="utf-8") as file:
        for start, end in zip(index.offsets[:-1], index.offsets[1:], strict=True):
            file.write(
                json.dumps({"documents": [about[row] for row in index.rows[start:end]]}, ensure_ascii=False) + "\n"
            )
    return {"file": f"{name}.hnsw", "labels": f"{name}.jsonl"}
