"""Vector indexes: what hnswlib gets wrong stays contained, and an index that is not what it says is refused."""

import resource
import struct
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from moeret import artifact
from moeret.artifact import Artifact, Draft
from moeret.config import IndexConfig
from moeret.errors import ArtifactError, DataError
from moeret.retrieval.hnsw import VectorIndex, build_vector_index, exact_search, read_vector_index, write_vector_index

GRAPH = IndexConfig(exact_below=0)
EXACT = IndexConfig(exact_below=10**9)
WIDTH = 16
HEADER = 96
"""Bytes of a graph file before its first vector."""


def vectors_of(count: int, seed: int = 0, width: int = WIDTH) -> np.ndarray:
    random = np.random.default_rng(seed).normal(size=(count, width)).astype(np.float32)
    return random / np.linalg.norm(random, axis=1, keepdims=True)


def index_of(vectors: np.ndarray, config: IndexConfig = GRAPH) -> VectorIndex:
    return build_vector_index(vectors, config)


def publish(root: Path, vectors: np.ndarray, config: IndexConfig = GRAPH) -> Artifact:
    draft = Draft(root, "index")
    return draft.publish(write_vector_index(draft, "law-0", index_of(vectors, config)))


def load(root: Path, config: IndexConfig = GRAPH) -> VectorIndex:
    published = artifact.read(root, "index")
    return read_vector_index(published, published.meta, config)


def with_graph(published: Artifact, raw: bytes) -> Path:
    """Publishes the same index with other bytes for its graph, under a manifest that is right about them."""
    draft = Draft(published.root, "index")
    draft.keep(published, published.meta["table"])
    graph = draft.add("law-0.hnsw", lambda path: path.write_bytes(raw))
    draft.publish({**published.meta, "graph": graph})
    return published.root


def graph_bytes(published: Artifact) -> bytes:
    return published.path(published.meta["graph"]).read_bytes()


def brute_force(query: np.ndarray, vectors: np.ndarray, k: int) -> list[int]:
    scores = vectors @ query
    return sorted(range(len(vectors)), key=lambda row: (-scores[row], row))[:k]


@pytest.fixture(scope="module")
def thousand() -> VectorIndex:
    return index_of(vectors_of(1000))


@settings(max_examples=4, deadline=None, derandomize=True)
@given(count=st.integers(1000, 3000), seed=st.integers(0, 99), k=st.sampled_from([1, 10, 100]))
def test_a_graph_finds_nearly_all_of_the_true_nearest(count, seed, k):
    vectors, queries = vectors_of(count, seed), vectors_of(40, seed + 1)
    index = index_of(vectors, IndexConfig(exact_below=0, ef_construction=60))
    true, _ = exact_search(queries, vectors, k)
    found = [rows.tolist() for rows, _ in index.search(queries, k)]
    assert np.mean([len(set(a) & set(b)) / k for a, b in zip(true.tolist(), found, strict=True)]) >= 0.95


@pytest.mark.parametrize("most", [1, 250, 10**6])
def test_exact_search_finds_the_same_however_little_memory_it_takes(most):
    vectors, queries = vectors_of(100), vectors_of(7, 1)
    rows, scores = exact_search(queries, vectors, 5, most)
    expected = np.argsort(-(queries @ vectors.T), axis=1)[:, :5]
    np.testing.assert_array_equal(rows, expected)
    np.testing.assert_allclose(scores, np.take_along_axis(queries @ vectors.T, expected, axis=1), rtol=1e-5)


@settings(max_examples=60, deadline=None)
@given(
    vectors=arrays(np.float32, st.tuples(st.integers(1, 30), st.just(3)), elements=st.sampled_from([-1.0, 0.0, 1.0])),
    query=arrays(np.float32, 3, elements=st.sampled_from([-1.0, 0.0, 1.0, 2.0])),
    k=st.integers(1, 35),
)
def test_exact_search_rank_by_score_then_row_also_where_ties_cross_the_last_place(vectors, query, k):
    [(rows, scores)] = index_of(vectors, EXACT).search(query[None], k)
    assert rows.tolist() == brute_force(query, vectors, k)
    np.testing.assert_array_equal(scores, (vectors @ query)[rows])


@pytest.mark.parametrize("config", [GRAPH, EXACT], ids=["graph", "exact"])
def test_fewer_hits_are_the_first_of_more_hits(config):
    index, queries = index_of(vectors_of(300), config), vectors_of(5, seed=1)
    for (few, _), (many, _) in zip(index.search(queries, 7), index.search(queries, 50), strict=True):
        assert few.tolist() == many[:7].tolist()


@pytest.mark.parametrize("count", [1, 2, 17, 500])
@pytest.mark.parametrize("config", [GRAPH, IndexConfig(exact_below=0, M=2, ef_construction=2, ef=1), EXACT])
def test_k_above_the_count_returns_everything(count, config):
    vectors = vectors_of(count)
    for extra in (0, 1, 1000):
        for query, (rows, scores) in zip(
            vectors_of(3, 5), index_of(vectors, config).search(vectors_of(3, 5), count + extra), strict=True
        ):
            assert sorted(rows.tolist()) == list(range(count))
            np.testing.assert_allclose(scores, (vectors @ query)[rows], atol=1e-5)
            assert (np.diff(scores) <= 0).all()


@pytest.mark.parametrize("config", [GRAPH, EXACT], ids=["graph", "exact"])
def test_every_duplicate_is_found_in_row_order(config):
    distinct = vectors_of(20)
    copies = np.random.default_rng(2).permutation(np.repeat(np.arange(20), 60))
    index = index_of(distinct[copies], config)
    for number, (rows, scores) in enumerate(index.search(distinct, 60)):
        assert rows.tolist() == np.flatnonzero(copies == number).tolist()
        assert len(set(scores.tolist())) == 1
    [(rows, scores)] = index.search(distinct[:1], 5000)
    assert sorted(rows.tolist()) == list(range(1200))
    assert rows.tolist() == rows[np.lexsort((rows, -scores))].tolist()


def test_a_graph_of_nothing_can_be_made():
    index = index_of(np.empty((0, WIDTH), np.float32))
    assert index.graph.element_count == len(index.vectors) == len(index.rows) == 0


def test_documents_with_one_vector_only_still_make_a_graph():
    index = index_of(np.repeat(vectors_of(1), 50, axis=0))
    [(rows, _)] = index.search(vectors_of(1), 10)
    assert rows.tolist() == list(range(10))


@pytest.mark.parametrize("config", [GRAPH, EXACT], ids=["graph", "exact"])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_vectors_that_are_not_finite_are_refused(config, value):
    vectors = vectors_of(10)
    vectors[3, 2] = value
    with pytest.raises(DataError, match="not finite"):
        index_of(vectors, config)


def test_progress_counts_every_document_once():
    for config in (GRAPH, EXACT):
        done = []
        build_vector_index(np.repeat(vectors_of(300), 2, axis=0), config, done.append)
        assert sum(done) == 600


@pytest.mark.parametrize("config", [GRAPH, EXACT], ids=["graph", "exact"])
def test_a_loaded_index_searches_as_the_built_one_did(tmp_path, config):
    vectors, queries = np.concatenate([vectors_of(400), vectors_of(50)]), vectors_of(20, seed=3)
    publish(tmp_path, vectors, config)
    loaded, built = load(tmp_path, config), index_of(vectors, config)
    for (rows, scores), (same_rows, same_scores) in zip(
        loaded.search(queries, 30), built.search(queries, 30), strict=True
    ):
        np.testing.assert_array_equal(rows, same_rows)
        np.testing.assert_array_equal(scores, same_scores)
    np.testing.assert_array_equal(loaded.vectors, built.vectors)
    np.testing.assert_array_equal(loaded.vectors_of(np.arange(450)), vectors)


@settings(max_examples=15, deadline=None)
@given(count=st.integers(1, 400), copies=st.integers(1, 3), seed=st.integers(0, 99), overwrite=st.booleans())
def test_a_graph_has_every_documents_vector_though_it_orders_them_by_nearness(count, copies, seed, overwrite):
    vectors = np.random.default_rng(seed).permutation(np.tile(vectors_of(count, seed), (copies, 1)))
    given_away = vectors.copy()
    index = build_vector_index(given_away, GRAPH, overwrite=overwrite)
    np.testing.assert_array_equal(index.vectors_of(np.arange(len(vectors))), vectors)
    assert overwrite or (given_away == vectors).all()


def test_vectors_near_each_other_are_linked_one_after_another():
    ordered, given_order = index_of(vectors_of(3000)).vectors, vectors_of(3000)
    follow = [float(np.mean((own[1:] * own[:-1]).sum(axis=1))) for own in (ordered, given_order)]
    assert follow[0] > 0.2 > 0.1 > follow[1]


def test_ef_is_effective_after_a_load(tmp_path):
    vectors, queries = vectors_of(2000), vectors_of(50, seed=4)
    sparse = {"exact_below": 0, "M": 4, "ef_construction": 10}
    publish(tmp_path, vectors, IndexConfig(**sparse))
    true, _ = exact_search(queries, vectors, 5)
    recall = {}
    for ef in (5, 800):
        index = load(tmp_path, IndexConfig(**sparse, ef=ef))
        assert index.graph.ef == ef
        found = [rows.tolist() for rows, _ in index.search(queries, 5)]
        recall[ef] = np.mean([len(set(a) & set(b)) / 5 for a, b in zip(true.tolist(), found, strict=True)])
    assert recall[5] < 0.8 < 0.95 < recall[800]


def test_two_builds_write_the_same_bytes(tmp_path):
    first, second = (publish(tmp_path / name, vectors_of(1500)) for name in ("one", "two"))
    assert first.fingerprint == second.fingerprint
    assert graph_bytes(first) == graph_bytes(second)


def test_the_manifest_entry_says_how_well_the_graph_finds(tmp_path):
    assert publish(tmp_path, vectors_of(1000)).meta["recall@10"] >= 0.99


@pytest.mark.parametrize(
    "other",
    [
        pytest.param((vectors_of(300, width=8), GRAPH), id="another dimension"),
        pytest.param((vectors_of(299), GRAPH), id="fewer vectors"),
        pytest.param((vectors_of(301), GRAPH), id="more vectors"),
        pytest.param((vectors_of(300), IndexConfig(exact_below=0, M=8)), id="another M"),
    ],
)
def test_another_indexs_graph_is_refused_though_its_digest_is_right(tmp_path, other):
    swapped = graph_bytes(publish(tmp_path / "other", *other))
    root = with_graph(publish(tmp_path / "index", vectors_of(300)), swapped)
    with pytest.raises(ArtifactError, match=r"law-0-.*\.hnsw is not the HNSW graph"):
        load(root)


@pytest.mark.parametrize("keep", [0, 1, HEADER - 1, HEADER, HEADER + 1000, -4, -1])
def test_a_cut_graph_is_refused_though_its_digest_is_right(tmp_path, keep):
    published = publish(tmp_path, vectors_of(300))
    with pytest.raises(ArtifactError, match=r"law-0-.*\.hnsw (is not the HNSW graph|cannot be loaded)"):
        load(with_graph(published, graph_bytes(published)[:keep]))


def test_a_graph_with_more_behind_its_end_is_refused(tmp_path):
    published = publish(tmp_path, vectors_of(300))
    with pytest.raises(ArtifactError, match="cannot be loaded"):
        load(with_graph(published, graph_bytes(published) + b"\0" * 8))


def test_a_graph_of_other_labels_is_refused_though_its_digest_is_right(tmp_path):
    published = publish(tmp_path, vectors_of(300))
    raw = bytearray(graph_bytes(published))
    (size,), (label,) = struct.unpack_from("<Q", raw, 24), struct.unpack_from("<Q", raw, 32)
    first, second = HEADER + label, HEADER + size + label
    raw[first : first + 8], raw[second : second + 8] = raw[second : second + 8], raw[first : first + 8]
    with pytest.raises(ArtifactError, match="in another order"):
        load(with_graph(published, bytes(raw)))


@pytest.mark.parametrize(
    ("offset", "code", "value"),
    [
        pytest.param(0, "<Q", 8, id="start of level 0"),
        pytest.param(8, "<Q", 299, id="room for fewer than there are"),
        pytest.param(16, "<Q", 2**62, id="count"),
        pytest.param(24, "<Q", 1, id="bytes of an element"),
        pytest.param(32, "<Q", 0, id="place of the label"),
        pytest.param(40, "<Q", 2**63, id="place of the vector"),
        pytest.param(48, "<i", -1, id="level"),
        pytest.param(52, "<I", 300, id="entry point"),
        pytest.param(56, "<Q", 17, id="links above"),
        pytest.param(64, "<Q", 2**40, id="links on the ground"),
        pytest.param(72, "<Q", 0, id="M"),
    ],
)
def test_a_header_that_lies_is_refused_though_its_digest_is_right(tmp_path, offset, code, value):
    published = publish(tmp_path, vectors_of(300))
    raw = bytearray(graph_bytes(published))
    struct.pack_into(code, raw, offset, value)
    with pytest.raises(ArtifactError, match="is not the HNSW graph"):
        load(with_graph(published, bytes(raw)))


def test_a_full_disk_is_noticed_though_hnswlib_does_not(tmp_path):
    index, draft = index_of(vectors_of(1000)), Draft(tmp_path, "index")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
    try:
        with pytest.raises(OSError, match="bytes could be written"):
            write_vector_index(draft, "law-0", index)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


@settings(max_examples=80, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    share=st.sampled_from([0.0, 0.01, 0.3, 0.9, 1.0]),
    k=st.integers(1, 40),
    config=st.sampled_from([IndexConfig(exact_below=0, ef=10), EXACT]),
)
def test_among_allowed_rows_the_best_are_found_however_few_are_allowed(seed, share, k, config):
    """Copies too: of a vector that several documents have, those that are allowed count."""
    random = np.random.default_rng(seed)
    vectors = np.concatenate([vectors_of(250, seed), vectors_of(50, seed)])
    allowed = random.random(300) < share
    queries = vectors_of(4, seed + 1)
    index = index_of(vectors, config)
    for query, (rows, scores) in zip(queries, index.search(queries, k, index.allow(allowed)), strict=True):
        true = np.sort(vectors[allowed] @ query)[::-1][:k]
        assert len(rows) == min(k, allowed.sum())
        assert allowed[rows].all()
        np.testing.assert_allclose(scores, (vectors @ query)[rows], atol=1e-6)
        if config is EXACT:
            np.testing.assert_allclose(scores, true, atol=1e-6)


@pytest.mark.parametrize("share", [0.02, 0.2, 0.6, 0.99])
def test_a_graph_finds_nearly_all_of_the_nearest_allowed(share):
    vectors, queries = vectors_of(3000), vectors_of(40, 1)
    allowed = np.random.default_rng(2).random(3000) < share
    index = index_of(vectors, IndexConfig(exact_below=0, ef_construction=60))
    true, _ = exact_search(queries, vectors[allowed], 10)
    true = np.flatnonzero(allowed)[true]
    found = [rows.tolist() for rows, _ in index.search(queries, 10, index.allow(allowed))]
    assert np.mean([len(set(a) & set(b)) / 10 for a, b in zip(true.tolist(), found, strict=True)]) >= 0.95


def test_allowed_rows_far_from_the_query_are_found_though_the_graph_returns_others():
    near, far = vectors_of(1), -vectors_of(1)
    vectors = np.concatenate([near + 0.1 * vectors_of(2000, 3), far + 0.1 * vectors_of(400, 4)])
    allowed = np.arange(2400) >= 2000
    index = index_of(vectors / np.linalg.norm(vectors, axis=1, keepdims=True), IndexConfig(exact_below=0, ef=10))
    assert all(len(rows) == 3 and allowed[rows].all() for rows, _ in index.search(near, 3, index.allow(allowed)))


class Unreachable:
    """A graph in which some vectors cannot be reached, as duplicates and deletions make them."""

    def knn_query(self, queries, k):
        raise RuntimeError("Cannot return the results in a contiguous 2D array. Probably ef or M is too small")


def test_a_graph_that_cannot_reach_k_vectors_falls_back_to_exact_search():
    vectors, queries = np.concatenate([vectors_of(200)] * 2), vectors_of(6, seed=9)
    built = index_of(vectors, EXACT)
    broken = VectorIndex(built.offsets, built.rows, built.vectors, Unreachable())
    for (rows, scores), (true, true_scores) in zip(broken.search(queries, 90), built.search(queries, 90), strict=True):
        np.testing.assert_array_equal(rows, true)
        np.testing.assert_array_equal(scores, true_scores)


def test_a_graph_of_real_islands_still_returns_everything():
    islands = np.concatenate([vectors_of(1, seed) + 1e-4 * vectors_of(400, seed + 50) for seed in range(5)])
    index = index_of(islands, IndexConfig(exact_below=0, M=2, ef_construction=2, ef=1))
    with pytest.raises(RuntimeError, match="Cannot return"):
        index.graph.knn_query(islands[:5], k=2000)
    assert all(len(rows) == 2000 for rows, _ in index.search(islands[:5], 2000))


def test_eight_threads_find_what_one_finds(thousand):
    batches = [vectors_of(10, seed) for seed in range(40)]
    serial = [thousand.search(batch, 20) for batch in batches]
    with ThreadPoolExecutor(8) as threads:
        parallel = list(threads.map(lambda batch: thousand.search(batch, 20), batches))
    for one, other in zip(serial, parallel, strict=True):
        for (rows, scores), (same_rows, same_scores) in zip(one, other, strict=True):
            np.testing.assert_array_equal(rows, same_rows)
            np.testing.assert_array_equal(scores, same_scores)
