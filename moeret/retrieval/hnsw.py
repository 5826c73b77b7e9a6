"""Vector indexes: immutable vectors, searched by an HNSW graph or, when few, exactly. The only importer of hnswlib.

They are of a segment's documents, or of a memory's queries; `rows` below are the places of either.

What hnswlib leaves open is closed here: `ef` is set after every load; k is clamped to what is there; a graph that cannot
reach k vectors is searched exactly instead of throwing; vectors that occur twice are stored once, because duplicates
disconnect the graph; NaN is refused; a graph is built by one thread, so that a build can be repeated byte for byte; and a
file's header is checked against the manifest before hnswlib, which trusts it, reads it. Where only some rows are allowed,
the graph is asked for more, and if that is not enough, or few are allowed, these are searched exactly: hnswlib's own filter
is a callback for every vector. Vector indexes never change, so searches may run in any number of threads.
"""

import errno
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import hnswlib
import numpy as np
from jaxtyping import Bool, Float, Int
from safetensors.numpy import load_file, save_file

from moeret.artifact import Artifact, Draft
from moeret.config import IndexConfig
from moeret.errors import ArtifactError, DataError

_HEADER = struct.Struct("<6QiI3QdQ")
_ADDED_AT_ONCE = 1000
_RECALL_SAMPLE = 100
_OVERSAMPLED = 1.5
"""How many more vectors a graph is asked for than should be enough, where only some are allowed."""
_EXACT_PER_ASKED = 16
"""Vectors that are compared exactly in about the time in which a graph finds one."""
_PIVOTS, _PER_PIVOT = 1024, 64
"""Vectors by which the others are put in order before they are linked: at most so many, and one for so many others."""
_COLUMNS = 64
"""Of vectors that are put in order in place, at a time."""


class Allowed(NamedTuple):
    """The rows that a search may find, whether each vector has such a row, and the numbers of those that have."""

    rows: Bool[np.ndarray, "N"]
    passing: Bool[np.ndarray, "V"]
    vectors: Int[np.ndarray, "_"]


@dataclass(frozen=True, slots=True)
class VectorIndex:
    """Distinct vectors, and which documents (rows) have each: those of vector g are rows[offsets[g]:offsets[g + 1]]."""

    offsets: Int[np.ndarray, "V+1"]
    rows: Int[np.ndarray, "N"]
    vectors: Float[np.ndarray, "V D"]
    graph: hnswlib.Index | None
    _vector_of: Int[np.ndarray, "N"] = field(init=False)  # the number of each row's vector

    def __post_init__(self):
        numbers = np.empty(len(self.rows), np.int64)
        numbers[self.rows] = np.repeat(np.arange(len(self.offsets) - 1), np.diff(self.offsets))
        object.__setattr__(self, "_vector_of", numbers)

    def allow(self, rows: Bool[np.ndarray, "N"]) -> "Allowed":
        """What a search that may find these rows alone has to know: worked out once, for any number of searches."""
        passing = np.add.reduceat(rows[self.rows].astype(np.int64), self.offsets[:-1]) > 0
        return Allowed(rows, passing, np.flatnonzero(passing))

    def search(
        self, queries: Float[np.ndarray, "Q D"], k: int, allowed: "Allowed | None" = None
    ) -> list[tuple[np.ndarray, np.ndarray]]:
        """Each query's (rows, scores) of its best documents, best first; equal scores by row: k, or all that are `allowed`."""
        if allowed is None:
            found, scores = self._nearest(queries, min(k, len(self.offsets) - 1))
            return [self._best(own, score, k) for own, score in zip(found, scores, strict=True)]
        if not len(allowed.vectors) or not len(queries):
            return [(self.rows[:0], np.empty(0, np.float32)) for _ in queries]
        return self._search_allowed(queries, k, allowed)

    def _search_allowed(
        self, queries: Float[np.ndarray, "Q D"], k: int, allowed: "Allowed"
    ) -> list[tuple[np.ndarray, np.ndarray]]:
        mine, every = allowed.vectors, len(self.offsets) - 1
        k_vectors = min(k, len(mine))
        asked = min(every, int(_OVERSAMPLED * k_vectors * every / len(mine)))
        results: dict[int, tuple[np.ndarray, np.ndarray]] = {}
        if self.graph is not None and len(mine) > _EXACT_PER_ASKED * asked:
            found, scores = self._nearest(queries, asked)
            for query, (own, score) in enumerate(zip(found, scores, strict=True)):
                kept = allowed.passing[own]
                if kept.sum() >= k_vectors:
                    results[query] = self._best(own[kept][:k_vectors], score[kept][:k_vectors], k, allowed.rows)
        rest = [query for query in range(len(queries)) if query not in results]
        if rest:
            found, scores = exact_search(queries[rest], self.vectors[mine], k_vectors)
            for query, own, score in zip(rest, found, scores, strict=True):
                results[query] = self._best(mine[own], score, k, allowed.rows)
        return [results[query] for query in range(len(queries))]

    def _best(
        self, found: np.ndarray, scores: np.ndarray, k: int, allowed: np.ndarray | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """The best k documents that have these vectors."""
        rows = np.concatenate([self.rows[self.offsets[g] : self.offsets[g + 1]] for g in found])
        repeated = np.repeat(scores, self.offsets[found + 1] - self.offsets[found])
        if allowed is not None:
            repeated, rows = repeated[allowed[rows]], rows[allowed[rows]]
        order = np.lexsort((rows, -repeated))[:k]
        return rows[order], repeated[order]

    def _nearest(self, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        return exact_search(queries, self.vectors, k) if self.graph is None else self._search_graph(queries, k)

    def _search_graph(self, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        try:
            found, distances = self.graph.knn_query(queries, k=k)
        except RuntimeError:  # "Cannot return the results": the graph reaches fewer than k vectors from here
            return exact_search(queries, self.vectors, k)
        return found.astype(np.int64), 1.0 - distances

    def vectors_of(self, rows: Int[np.ndarray, "K"]) -> Float[np.ndarray, "K D"]:
        """The vectors of documents that it has."""
        return self.vectors[self._vector_of[rows]]


def exact_search(
    queries: Float[np.ndarray, "Q D"], vectors: Float[np.ndarray, "V D"], k: int, most_scores: int = 2**23
) -> tuple[Int[np.ndarray, "Q k"], Float[np.ndarray, "Q k"]]:
    """The k vectors with the largest dot products, best first, and these products; equal ones in their order.

    At most `most_scores` of them, or one query's, are in memory at a time.
    """
    found, best, at_once = [], [], max(1, most_scores // max(1, len(vectors)))
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


def build_vector_index(
    vectors: Float[np.ndarray, "N D"],
    config: IndexConfig,
    advance: Callable[[int], None] = lambda count: None,
    *,
    overwrite: bool = False,
) -> VectorIndex:
    """An index of these documents' vectors, whose rows are their places; `advance` is called with the number of documents done.

    With `overwrite` it may keep its own vectors, which lie in another order, in the array that it is given.

    Raises:
      DataError: a vector is not finite.
    """
    if not np.isfinite(vectors).all():
        raise DataError("a document's vector has values that are not finite numbers; the model that made it is broken")
    distinct, offsets, grouped = _group_equal(vectors)
    advance(len(vectors) - len(distinct))
    if len(distinct) < config.exact_below:
        advance(len(distinct))
        return VectorIndex(offsets, grouped, distinct, None)
    order = _by_nearness(distinct, config.seed)
    if overwrite or not np.may_share_memory(distinct, vectors):
        for columns in range(0, distinct.shape[1], _COLUMNS):  # in place: there may be no room for two
            distinct[:, columns : columns + _COLUMNS] = distinct[order, columns : columns + _COLUMNS]
    else:
        distinct = distinct[order]
    starts, lengths = offsets[:-1][order], np.diff(offsets)[order]
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    grouped = grouped[np.repeat(starts - offsets[:-1], lengths) + np.arange(len(grouped))]
    return VectorIndex(offsets, grouped, distinct, _build(distinct, config, advance))


def _by_nearness(vectors: Float[np.ndarray, "V D"], seed: int) -> Int[np.ndarray, "V"]:
    """An order in which vectors that are near each other are neighbours: by the nearest of a few of them, the pivots.

    Linked in this order, a vector's candidates are those that the processor's caches have just had. What a graph finds depends
    on the order too (Elliott and Clark, "The Impacts of Data, Ordering, and Intrinsic Dimensionality on Recall in Hierarchical
    Navigable Small Worlds", 2024); by this one it finds about as much.
    """
    count = min(_PIVOTS, -(-len(vectors) // _PER_PIVOT))
    pivots = vectors[np.random.default_rng(seed).choice(len(vectors), count, replace=False)]
    nearest = [(vectors[part] @ pivots.T).argmax(axis=1) for part in _parts(len(vectors))]
    return np.argsort(np.concatenate([np.empty(0, np.int64), *nearest]), kind="stable")


def write_vector_index(draft: Draft, name: str, segment: VectorIndex) -> dict[str, Any]:
    """Adds a vector index's files to a draft, under this name, and returns its entry for the manifest."""
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


def read_vector_index(
    artifact: Artifact, entry: dict[str, Any], config: IndexConfig, *, searched: bool = True
) -> VectorIndex:
    """Loads a vector index whose files the artifact has verified; without its graph where it is not to be `searched`.

    Raises:
      ArtifactError: the graph is not the one that its entry describes.
    """
    tensors = load_file(artifact.path(entry["table"]))
    if "graph" not in entry:
        return VectorIndex(tensors["offsets"], tensors["rows"], tensors["vectors"], None)
    path = artifact.path(entry["graph"])
    vectors = _vectors_in(path, entry, config)
    return VectorIndex(tensors["offsets"], tensors["rows"], vectors, _load(path, entry, config) if searched else None)


def _group_equal(vectors: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(distinct vectors in order of first appearance, offsets, rows grouped by vector)."""
    raw = np.ascontiguousarray(vectors, np.float32)
    # Equal vectors begin alike, and different ones hardly ever do: sorting whole ones would copy them all.
    beginnings = raw.view(np.uint64)[:, 0] if raw.shape[1] % 2 == 0 else _whole(raw)
    _, first, inverse = np.unique(beginnings, return_index=True, return_inverse=True)
    if any((raw[part] != raw[first[inverse[part]]]).any() for part in _parts(len(raw))):
        _, first, inverse = np.unique(_whole(raw), return_index=True, return_inverse=True)
    appearance = np.argsort(np.argsort(first))  # unique's own order -> order of first appearance
    groups = appearance[inverse]
    order = np.argsort(groups, kind="stable")
    offsets = np.concatenate([[0], np.cumsum(np.bincount(groups))])
    distinct = raw if len(first) == len(raw) else raw[np.sort(first)]
    return distinct, offsets.astype(np.int64), order.astype(np.int64)


def _whole(raw: np.ndarray) -> np.ndarray:
    return raw.view(np.dtype((np.void, raw.shape[1] * 4))).ravel()


def _parts(count: int) -> Iterator[slice]:
    return (slice(start, start + _ADDED_AT_ONCE) for start in range(0, count, _ADDED_AT_ONCE))


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


def save_graph(index: VectorIndex, path: Path) -> None:
    """Writes an index's graph as hnswlib has it, whose labels are the numbers of the vectors. Raises OSError on a full disk."""
    _save(index.graph, path)


def _vectors_in(path: Path, entry: dict[str, Any], config: IndexConfig) -> Float[np.ndarray, "V D"]:
    """A graph's vectors as they lie in its file: hnswlib itself gives them out as Python lists."""
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
    raw, strides = np.memmap(path, np.uint8, "r"), (per_element,)
    labels = np.ndarray((count,), "<u8", raw, _HEADER.size + per_element - 8, strides)
    if not np.array_equal(labels, np.arange(count)):  # vectors are told by their places
        raise ArtifactError(f"{path} has its vectors in another order than its manifest; build the index anew")
    return np.ndarray((count, entry["width"]), "<f4", raw, _HEADER.size + links, (*strides, 4))


def _load(path: Path, entry: dict[str, Any], config: IndexConfig) -> hnswlib.Index:
    """A graph that `_vectors_in` has looked at."""
    graph = hnswlib.Index(space="ip", dim=entry["width"])
    try:
        graph.load_index(str(path), max_elements=entry["vectors"])
    except RuntimeError as error:
        raise ArtifactError(f"{path} cannot be loaded: {error}; build the index anew") from None
    graph.set_ef(config.ef)
    return graph
