"""Segments: immutable vectors, searched by an HNSW graph or, when few, exactly. The only importer of hnswlib.

They are of one expert's documents, or of its memory's queries; `rows` below are then the queries' numbers.

What hnswlib leaves open is closed here: `ef` is set after every load; k is clamped to what is there; a graph that cannot
reach k vectors is searched exactly instead of throwing; vectors that occur twice are stored once, because duplicates
disconnect the graph; NaN is refused; a graph is built by one thread, so that a build can be repeated byte for byte; and a
file's header is checked against the manifest before hnswlib, which trusts it, reads it. Segments never change, so
searches may run in any number of threads.
"""

import errno
import struct
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import hnswlib
import numpy as np
from jaxtyping import Float, Int
from safetensors.numpy import load_file, save_file

from moeret.artifact import Artifact, Draft
from moeret.config import IndexConfig
from moeret.errors import ArtifactError, DataError

_HEADER = struct.Struct("<6QiI3QdQ")
_ADDED_AT_ONCE = 1000
_RECALL_SAMPLE = 100


@dataclass(frozen=True, slots=True)
class Segment:
    """Distinct vectors, and which documents (rows) have each: those of vector g are rows[offsets[g]:offsets[g + 1]]."""

    offsets: Int[np.ndarray, "V+1"]
    rows: Int[np.ndarray, "N"]
    vectors: Float[np.ndarray, "V D"]
    graph: hnswlib.Index | None
    _vector_of: Int[np.ndarray, "_"] = field(init=False)  # the number of each row's vector, counted from the least row

    def __post_init__(self):
        numbers = np.zeros(self.rows.max() - self.rows.min() + 1, np.int64)
        numbers[self.rows - self.rows.min()] = np.repeat(np.arange(len(self.offsets) - 1), np.diff(self.offsets))
        object.__setattr__(self, "_vector_of", numbers)

    def search(self, queries: Float[np.ndarray, "Q D"], k: int) -> list[tuple[np.ndarray, np.ndarray]]:
        """Each query's (rows, scores) of its min(k, N) best documents, best first; equal scores by row."""
        k_vectors = min(k, len(self.offsets) - 1)
        if self.graph is None:
            found, scores = exact_search(queries, self.vectors, k_vectors)
        else:
            found, scores = self._search_graph(queries, k_vectors)
        results = []
        for own, score in zip(found, scores, strict=True):
            counts = self.offsets[own + 1] - self.offsets[own]
            rows = np.concatenate([self.rows[self.offsets[g] : self.offsets[g + 1]] for g in own])
            repeated = np.repeat(score, counts)
            order = np.lexsort((rows, -repeated))[:k]
            results.append((rows[order], repeated[order]))
        return results

    def _search_graph(self, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        try:
            found, distances = self.graph.knn_query(queries, k=k)
        except RuntimeError:  # "Cannot return the results": the graph reaches fewer than k vectors from here
            return exact_search(queries, self.vectors, k)
        return found.astype(np.int64), 1.0 - distances

    def vectors_of(self, rows: Int[np.ndarray, "K"]) -> Float[np.ndarray, "K D"]:
        """The vectors of documents that it has."""
        return self.vectors[self._vector_of[rows - self.rows.min()]]


def exact_search(
    queries: Float[np.ndarray, "Q D"], vectors: Float[np.ndarray, "V D"], k: int, at_once: int = 256
) -> tuple[Int[np.ndarray, "Q k"], Float[np.ndarray, "Q k"]]:
    """The k vectors with the largest dot products, best first, and these products; equal ones in their order."""
    found, best = [], []
    for start in range(0, len(queries), at_once):
        scores = queries[start : start + at_once] @ vectors.T
        top = np.argpartition(-scores, k - 1, axis=1)[:, :k]
        own = np.take_along_axis(scores, top, axis=1)
        tied = (scores >= own.min(axis=1, keepdims=True)).sum(axis=1) > k  # the k-th score comes again beyond k
        top[tied] = np.argsort(-scores[tied], axis=1, kind="stable")[:, :k]
        own = np.take_along_axis(scores, top, axis=1)
        order = np.lexsort((top, -own), axis=1)
        found.append(np.take_along_axis(top, order, axis=1))
        best.append(np.take_along_axis(own, order, axis=1))
    return np.concatenate(found), np.concatenate(best)


def build_segment(
    vectors: Float[np.ndarray, "N D"],
    rows: Int[np.ndarray, "N"],
    config: IndexConfig,
    advance: Callable[[int], None] = lambda count: None,
) -> Segment:
    """A segment of these documents' vectors; `advance` is called with the number of documents done.

    Raises:
      DataError: a vector is not finite.
    """
    if not np.isfinite(vectors).all():
        raise DataError("a document's vector has values that are not finite numbers; the model that made it is broken")
    distinct, offsets, grouped = _group_equal(vectors, rows)
    advance(len(rows) - len(distinct))
    if len(distinct) < config.exact_below:
        advance(len(distinct))
        return Segment(offsets, grouped, distinct, None)
    return Segment(offsets, grouped, distinct, _build(distinct, config, advance))


def write_segment(draft: Draft, name: str, segment: Segment) -> dict[str, Any]:
    """Adds a segment's files to a draft, under this name, and returns its entry for the manifest."""
    distinct = segment.vectors
    tensors = {"offsets": segment.offsets, "rows": segment.rows}
    entry: dict[str, Any] = {"vectors": len(distinct), "documents": len(segment.rows), "width": distinct.shape[1]}
    if segment.graph is None:
        tensors["vectors"] = distinct
    else:
        entry["recall@10"] = _recall(segment.graph, distinct)
        entry["graph"] = draft.add(f"{name}.hnsw", lambda path: _save(segment.graph, path))
    entry["table"] = draft.add(f"{name}.safetensors", lambda path: save_file(tensors, path))
    return entry


def read_segment(artifact: Artifact, entry: dict[str, Any], config: IndexConfig) -> Segment:
    """Loads a segment whose files the artifact has verified.

    Raises:
      ArtifactError: the graph is not the one that its entry describes.
    """
    tensors = load_file(artifact.path(entry["table"]))
    if "graph" not in entry:
        return Segment(tensors["offsets"], tensors["rows"], tensors["vectors"], None)
    graph, vectors = _load(artifact.path(entry["graph"]), entry, config)
    return Segment(tensors["offsets"], tensors["rows"], vectors, graph)


def _group_equal(vectors: np.ndarray, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(distinct vectors in order of first appearance, offsets, rows grouped by vector)."""
    raw = np.ascontiguousarray(vectors, np.float32)
    keys = raw.view(np.dtype((np.void, raw.shape[1] * 4))).ravel()
    _, first, inverse = np.unique(keys, return_index=True, return_inverse=True)
    appearance = np.argsort(np.argsort(first))  # unique's own order -> order of first appearance
    groups = appearance[inverse]
    order = np.argsort(groups, kind="stable")
    offsets = np.concatenate([[0], np.cumsum(np.bincount(groups))])
    return raw[np.sort(first)], offsets.astype(np.int64), rows[order].astype(np.int64)


def _build(vectors: np.ndarray, config: IndexConfig, advance: Callable[[int], None]) -> hnswlib.Index:
    graph = hnswlib.Index(space="ip", dim=vectors.shape[1])
    graph.init_index(len(vectors), M=config.M, ef_construction=config.ef_construction, random_seed=config.seed)
    graph.set_ef(config.ef)
    for start in range(0, len(vectors), _ADDED_AT_ONCE):
        chunk = vectors[start : start + _ADDED_AT_ONCE]
        graph.add_items(chunk, np.arange(start, start + len(chunk)), num_threads=1)
        advance(len(chunk))
    return graph


def _recall(graph: hnswlib.Index, vectors: np.ndarray) -> float:
    """Share of the true ten nearest that the graph finds, over a sample of its own vectors."""
    sample = vectors[:: max(1, len(vectors) // _RECALL_SAMPLE)][:_RECALL_SAMPLE]
    k = min(10, len(vectors))
    true, _ = exact_search(sample, vectors, k)
    try:
        found, _ = graph.knn_query(sample, k=k)
    except RuntimeError:  # fewer than k within reach: such searches are done exactly
        return 1.0
    return float(np.mean([len(set(a) & set(b)) / k for a, b in zip(true.tolist(), found.tolist(), strict=True)]))


def _save(graph: hnswlib.Index, path: Path) -> None:
    graph.save_index(str(path))
    written, whole = path.stat().st_size, graph.index_file_size()
    if written != whole:  # hnswlib does not notice a full disk
        raise OSError(errno.ENOSPC, f"only {written} of {whole} bytes could be written", str(path))


def _load(path: Path, entry: dict[str, Any], config: IndexConfig) -> tuple[hnswlib.Index, Float[np.ndarray, "V D"]]:
    """The graph, and its vectors as they lie in its file: hnswlib itself gives them out as Python lists."""
    with path.open("rb") as file:
        raw = file.read(_HEADER.size)
    links = 2 * config.M * 4 + 4
    per_element = links + 4 * entry["width"] + 8
    count = entry["vectors"]
    fits = len(raw) == _HEADER.size
    if fits:
        level0, most, present, size, label, data, level, entered, m, m0, links_m, _, _ = _HEADER.unpack(raw)
        fits = (
            (level0, present, size, label, data) == (0, count, per_element, per_element - 8, links)
            and (m, m0, links_m) == (config.M, 2 * config.M, config.M)
            and most >= present > entered
            and level >= 0
            and path.stat().st_size >= _HEADER.size + count * per_element
        )
    if not fits:
        raise ArtifactError(f"{path} is not the HNSW graph that its manifest describes; build the index anew")
    graph = hnswlib.Index(space="ip", dim=entry["width"])
    try:
        graph.load_index(str(path), max_elements=count)
    except RuntimeError as error:
        raise ArtifactError(f"{path} cannot be loaded: {error}; build the index anew") from None
    graph.set_ef(config.ef)
    raw, strides = np.memmap(path, np.uint8, "r"), (per_element,)
    labels = np.ndarray((count,), "<u8", raw, _HEADER.size + per_element - 8, strides)
    if not np.array_equal(labels, np.arange(count)):  # vectors are told by their places
        raise ArtifactError(f"{path} has its vectors in another order than its manifest; build the index anew")
    vectors = np.ndarray((count, entry["width"]), "<f4", raw, _HEADER.size + links, (*strides, 4))
    return graph, vectors
