"""Searching: arguments are checked first, hits are what the vectors say, and a damaged index is refused by file."""

import dataclasses
import json
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from conftest import QUERIES, assert_ranked, write_jsonl
from hypothesis import given, settings
from hypothesis import strategies as st

import moeret
from moeret import Retriever, artifact
from moeret.config import IndexConfig
from moeret.models.memory import Blend
from moeret.models.model import Model
from moeret.retrieval import evidence

TOLERANCE = 2e-5


@pytest.fixture(scope="module")
def retriever(index_folder):
    loaded = Retriever.load(index_folder)
    yield loaded
    loaded.close()


@pytest.fixture(scope="module")
def graphs(tmp_path_factory, model_folder, two_domains):
    """The same documents behind HNSW graphs."""
    out = tmp_path_factory.mktemp("graphs") / "index"
    moeret.build_index(model_folder, out, two_domains, config=IndexConfig(exact_below=0))
    loaded = Retriever.load(out)
    yield loaded
    loaded.close()


def assert_same_hits(one, other):
    """The same documents in the same order, but for scores that differ by no more than rounding."""
    np.testing.assert_allclose([hit.score for hit in one], [hit.score for hit in other], atol=TOLERANCE)
    for mine, yours in zip(one, other, strict=True):
        if mine.id != yours.id:
            assert abs(mine.score - yours.score) <= TOLERANCE
            assert sum(abs(hit.score - mine.score) <= TOLERANCE for hit in one) > 1


@pytest.mark.parametrize("k", [0, -1, 1.0, 2.5, True, "3", None, np.float32(2)])
def test_k_must_be_a_whole_number_of_at_least_one(retriever, k):
    with pytest.raises(moeret.ConfigError, match="k must be a whole number of at least 1, got"):
        retriever.search("apple", k)


@pytest.mark.parametrize("experts", [0, -1, 1.5, True, "all"])
def test_experts_must_be_a_whole_number_of_at_least_one(retriever, experts):
    with pytest.raises(moeret.ConfigError, match="experts must be a whole number of at least 1, got"):
        retriever.search("apple", experts=experts)


def test_numpy_counts_are_whole_numbers_too(retriever):
    assert len(retriever.search("apple", np.int64(3), experts=np.int32(1))) == 3


@pytest.mark.parametrize("empty", ["", " ", "\t\n", "\u3000"])
def test_an_empty_query_is_refused_by_its_position(retriever, empty):
    with pytest.raises(moeret.ConfigError, match="query 2 of 3 is empty"):
        retriever.search_batch(["apple", empty, "pear"])
    with pytest.raises(moeret.ConfigError, match="query 1 of 1 is empty"):
        retriever.search(empty)
    with pytest.raises(moeret.ConfigError, match="query 1 of 1 is empty"):
        retriever.route([empty])


@pytest.mark.parametrize("queries", ["apple", 7, {"apple"}, iter(["apple"])])
def test_queries_must_be_a_list(retriever, queries):
    with pytest.raises(moeret.ConfigError, match=r"queries must be a list of strings, got .*pass \[text\]"):
        retriever.search_batch(queries)


@pytest.mark.parametrize("query", [None, 3, b"apple", ["apple"]])
def test_a_query_must_be_a_string(retriever, query):
    with pytest.raises(moeret.ConfigError, match=r"queries\[1\] must be a string"):
        retriever.search_batch(["apple", query])


def test_half_a_surrogate_pair_is_refused(retriever):
    with pytest.raises(moeret.ConfigError, match="not valid Unicode"):
        retriever.search("apple \ud83e")


def test_no_queries_give_no_hits(retriever):
    assert retriever.search_batch([]) == []
    assert retriever.route([]) == []


@pytest.mark.parametrize(
    "query",
    ["🦊🦊", "apple\0pear", "\0", "שלום עולם \u202e", "e\u0301", "' OR 1=1 --", "x" * 1_000_000, "find " * 200_000],
)
def test_any_text_is_a_query(retriever, query):
    hits = retriever.search(query, k=24, route="all")
    assert len(hits) == 24
    assert_ranked(hits)
    assert np.isfinite([hit.score for hit in hits]).all()


@pytest.mark.parametrize("route", ["auto", "all", "base", "fruit"])
def test_k_above_the_corpus_returns_all_that_is_searched(retriever, graphs, route):
    for loaded in (retriever, graphs):
        found = loaded.rank(["find the fruit nick3"], 10**9, route=route)
        [hits], [indexes] = loaded.hits(found), found.indexes
        assert len(hits) == sum(loaded.sizes[name] for name in indexes)
        assert_ranked(hits)


@pytest.mark.parametrize("k", [1, 3, 24])
@pytest.mark.parametrize("route", ["auto", "all", "base", "metal"])
def test_hits_are_ranked_and_never_come_twice(retriever, k, route):
    for hits in retriever.search_batch(QUERIES, k, route=route):
        assert 0 < len(hits) <= k
        assert_ranked(hits)


def test_a_hit_carries_its_document(retriever, two_domains):
    for hit in retriever.search("find the metal nick10", k=24, route="all"):
        lines = (two_domains[hit.expert] / "corpus.jsonl").read_text().splitlines()
        document = next(row for row in map(json.loads, lines) if row["_id"] == hit.id)
        assert (hit.title, hit.text) == (document["title"], document["text"])


@pytest.mark.parametrize("route", ["auto", "all", "base", "fruit"])
def test_search_equals_search_batch(retriever, route):
    batch = retriever.search_batch(QUERIES, 8, route=route)
    for query, hits in zip(QUERIES, batch, strict=True):
        assert_same_hits(retriever.search(query, 8, route=route), hits)


def test_order_and_size_of_a_batch_change_no_hits(retriever):
    queries = [*QUERIES, "🦊", "find " * 40] * 3
    one = {query: retriever.search(query, 8) for query in queries}
    for order in (queries, queries[::-1], sorted(queries)):
        for query, hits in zip(order, retriever.search_batch(order, 8), strict=True):
            assert_same_hits(hits, one[query])


def test_graphs_find_what_exact_search_finds(retriever, graphs):
    for route in ("auto", "all", "base", "metal"):
        for exact, hits in zip(
            retriever.search_batch(QUERIES, 12, route=route), graphs.search_batch(QUERIES, 12, route=route), strict=True
        ):
            assert_same_hits(hits, exact)


def expected_hits(retriever, query_vector, names, k):
    """(score, expert, id) of the best k documents of these indexes by brute force over their vectors."""
    found = [
        (float(vector @ query_vector), name, document.id)
        for vector, (name, document) in zip(retriever.vectors(), retriever.held(), strict=True)
        if name in names
    ]
    return sorted(found, key=lambda hit: -hit[0])[:k]


@pytest.mark.parametrize(("route", "expert"), [("base", None), ("fruit", "fruit"), ("metal", "metal"), ("all", "auto")])
def test_a_route_searches_its_indexes_with_its_experts_vector(index_folder, route, expert):
    retriever = Retriever.load(index_folder, hybrid=False)
    retriever.model.query_router = dataclasses.replace(retriever.model.query_router, familiarity=None)
    names = [route] if route in ("fruit", "metal") else ["fruit", "metal"]
    vectors = retriever.model.encode_query(QUERIES, expert=expert, normalize_embeddings=True)
    found = retriever.rank(QUERIES, 6, route=route)
    for vector, hits, indexes in zip(vectors, retriever.hits(found), found.indexes, strict=True):
        assert list(indexes) == names
        best = expected_hits(retriever, vector, names, 6)
        np.testing.assert_allclose([hit.score for hit in hits], [score for score, _, _ in best], atol=TOLERANCE)


WISHES = {"base": Blend(0.03), "shared": Blend(0.5), "fruit": Blend(0.1, 0.7), "metal": Blend(0.2, 0.0)}


@pytest.mark.parametrize(
    ("route", "shares"),
    [("base", {"base": 1.0}), ("shared", {"shared": 1.0}), ("fruit", {"fruit": 1.0}), ("all", None), ("auto", None)],
)
def test_words_count_as_much_as_the_merged_experts_want_and_memory_as_its_own_does(index_folder, route, shares):
    retriever = Retriever.load(index_folder)
    retriever.model.query_router = dataclasses.replace(retriever.model.query_router, minimum=0.0)
    cosine = by_document(retriever, route, {})
    for query, route_taken in zip(QUERIES, routes_of(retriever, route), strict=True):
        used = shares or route_taken.experts or {"base": 1.0}
        alone = by_document(retriever, route, {name: Blend(1.0) for name in WISHES})[query]
        recalled = by_document(retriever, route, {name: Blend(0.0, 1.0) for name in WISHES})[query]
        got = by_document(retriever, route, WISHES)[query]
        weight = sum(WISHES[name].lexical * share for name, share in used.items())
        for (name, id), score in cosine[query].items():
            memory = WISHES[name].memory * (recalled[name, id] - score)
            expected = score + weight * (alone[name, id] - score) + memory
            np.testing.assert_allclose(got[name, id], expected, atol=1e-4)
    retriever.close()


def by_document(retriever, route, blends):
    """Query -> (expert, id) -> score of everything that is searched with these blends."""
    retriever.blends = blends
    return {
        query: {(hit.expert, hit.id): hit.score for hit in hits}
        for query, hits in zip(QUERIES, retriever.search_batch(QUERIES, 24, route=route), strict=True)
    }


def routes_of(retriever, route):
    """What the router chose; nothing for a route that asks no router."""
    return retriever.rank(QUERIES, 1, route=route).routes or [None] * len(QUERIES)


def test_auto_searches_the_indexes_of_the_chosen_experts(index_folder):
    retriever = Retriever.load(index_folder)
    found = retriever.rank(QUERIES, 24)
    assert found.routes == retriever.route(QUERIES)
    for route, hits, indexes in zip(found.routes, retriever.hits(found), found.indexes, strict=True):
        assert route.abstained == (not route.experts)
        assert route.experts.keys() == set(indexes) == {hit.expert for hit in hits}
        np.testing.assert_allclose(sum(route.experts.values()), 1, atol=1e-5)
        np.testing.assert_allclose(sum(route.probabilities.values()), 1, atol=1e-5)
    retriever.close()


def test_the_vector_that_searches_is_of_the_weights_that_the_route_names(index_folder, monkeypatch):
    """Also where the index's evidence changes what the router chose, and the query is embedded again."""
    monkeypatch.setattr(evidence, "LIKELIHOOD", 50.0)
    retriever = Retriever.load(index_folder)
    retriever.blends = {}
    found, alone = retriever.rank(QUERIES, 6), retriever.model.route(QUERIES)
    assert any(route.experts != before.experts for route, before in zip(found.routes, alone, strict=True))
    for query, route, hits in zip(QUERIES, found.routes, retriever.hits(found), strict=True):
        [vector] = retriever.model.encode_query([query], expert=route.experts, normalize_embeddings=True)
        best = expected_hits(retriever, vector, route.experts.keys(), 6)
        np.testing.assert_allclose([hit.score for hit in hits], [score for score, _, _ in best], atol=TOLERANCE)
    retriever.close()


def test_an_unknown_route_is_refused_with_the_known_ones(retriever):
    with pytest.raises(
        moeret.ConfigError, match="no route 'river'; choose one of auto, all, base, shared, fruit, metal"
    ):
        retriever.search("apple", route="river")


def test_experts_limits_how_many_a_query_uses(index_folder):
    loaded = Retriever.load(index_folder)
    router = dataclasses.replace(loaded.model.query_router, minimum=0.0, familiarity=None)
    loaded.model.query_router = router
    for experts in (1, 2, 99):
        found = loaded.rank(QUERIES, 5, experts=experts)
        assert {len(route.experts) for route in found.routes} == {min(experts, 2)}
        assert {len(indexes) for indexes in found.indexes} == {min(experts, 2)}
    loaded.close()


def test_a_query_whose_expert_has_no_index_here_searches_what_is_here(tmp_path, model_folder, domains):
    moeret.build_index(model_folder, tmp_path / "index", {"fruit": domains["fruit"]})
    loaded = Retriever.load(tmp_path / "index")
    query = "find the metal nick3 iron steel"
    assert max(loaded.model.route([query])[0].probabilities.items(), key=lambda item: item[1])[0] == "metal"
    assert loaded.route([query])[0].experts == {"fruit": 1.0}
    assert len(loaded.search(query, 12)) == 12
    with pytest.raises(moeret.ConfigError, match="no documents of expert metal; it has fruit"):
        loaded.search(query, route="metal")
    loaded.close()


def test_one_document_of_two_domains_is_one_hit(tmp_path, model_folder):
    rows = [{"_id": f"d{n}", "title": "", "text": text} for n, text in enumerate(["apple pear", "iron zinc"])]
    for name in ("fruit", "metal"):
        own = [{"_id": "own", "title": "", "text": f"{name} story"}]
        write_jsonl(tmp_path / name / "corpus.jsonl", [*rows, *own])
    folders = {name: tmp_path / name for name in ("fruit", "metal")}
    moeret.build_index(model_folder, tmp_path / "index", folders)
    loaded = Retriever.load(tmp_path / "index")
    hits = loaded.search("apple", 24, route="all")
    assert sorted(hit.id for hit in hits) == ["d0", "d1", "own", "own"]
    assert {hit.expert for hit in hits if hit.id == "own"} == {"fruit", "metal"}
    loaded.close()


def test_another_model_is_refused(index_folder, base_folder, both):
    for foreign in (Model.load(base_folder), both.model):
        with pytest.raises(moeret.ArtifactError, match="was built with another model"):
            Retriever.load(index_folder, model=foreign)


def test_its_own_model_may_be_shared(index_folder, model_folder, retriever):
    for model in (own := Model.load(model_folder), own.in_precision("bfloat16")):
        loaded = Retriever.load(index_folder, model=model)
        assert loaded.model is model  # in its own precision, and what it keeps is shared
        if model is own:
            assert_same_hits(loaded.search("apple"), retriever.search("apple"))
        loaded.close()


def test_no_file_is_checked_twice_to_load_an_index(index_folder, monkeypatch):
    checked, digest = [], artifact.sha256_of
    monkeypatch.setattr(artifact, "sha256_of", lambda path: checked.append(path) or digest(path))
    Retriever.load(index_folder).close()
    own = [path for path in checked if "base" not in path.parts]  # the base is also known by its fingerprint
    assert own and len(own) == len(set(own)) and max(map(checked.count, checked)) == 2


def test_every_file_of_an_index_that_is_damaged_is_refused_by_name(tmp_path, index_folder):
    root = tmp_path / "index"
    shutil.copytree(index_folder, root)
    names = [*artifact.read(root, "index").files, "manifest.json"]
    assert len(names) > 10
    for name in names:
        path = root / name
        raw = path.read_bytes()
        flipped = bytearray(raw)
        flipped[len(raw) // 2] ^= 1
        for damage in (None, raw[: len(raw) // 2], b"", bytes(flipped)):
            path.unlink() if damage is None else path.write_bytes(damage)
            with pytest.raises(moeret.ArtifactError) as raised:
                Retriever.load(root)
            assert path.name in str(raised.value)
            assert "\n" not in str(raised.value)
        path.write_bytes(raw)
    Retriever.load(root).close()


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_any_flipped_bit_of_a_manifest_is_refused_or_harmless(tmp_path_factory, index_folder, data):
    root: Path = tmp_path_factory.getbasetemp() / "flipped"
    if not root.exists():
        shutil.copytree(index_folder, root)
    raw = bytearray((index_folder / "manifest.json").read_bytes())
    for place in data.draw(st.lists(st.integers(0, len(raw) - 1), min_size=1, max_size=2)):
        raw[place] ^= 1 << data.draw(st.integers(0, 7))
    (root / "manifest.json").write_bytes(raw)
    try:
        found = artifact.read(root, "index")
    except moeret.ArtifactError:
        return
    assert (found.meta, found.files) == (lambda true: (true.meta, true.files))(artifact.read(index_folder, "index"))


def test_a_half_written_index_says_what_to_do(tmp_path, index_folder):
    root = tmp_path / "index"
    shutil.copytree(index_folder, root)
    (root / "manifest.json").unlink()
    with pytest.raises(moeret.ArtifactError, match=r"holds no finished index \(no manifest\.json\); run the command"):
        Retriever.load(root)


def test_what_is_no_index_says_so(tmp_path, model_folder):
    with pytest.raises(moeret.ArtifactError, match=r"no index at .*nowhere: there is no such directory"):
        Retriever.load(tmp_path / "nowhere")
    with pytest.raises(moeret.ArtifactError, match=r"is a model; expected an index$"):
        Retriever.load(model_folder)


def test_eight_threads_find_what_one_finds(graphs):
    batches = [[query, f"{query} {number}"] for number in range(8) for query in QUERIES]
    serial = [graphs.search_batch(batch, 10) for batch in batches]
    with ThreadPoolExecutor(8) as threads:
        parallel = list(threads.map(lambda batch: graphs.search_batch(batch, 10), batches))
    assert parallel == serial


def test_an_unknown_fusion_is_refused(retriever):
    with pytest.raises(moeret.ConfigError, match="no fusion 'sum'; choose one of score, rrf, calibrated"):
        retriever.search("apple", fusion="sum")


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="the system does not list open files")
def test_after_a_with_no_file_of_the_index_is_open(index_folder):
    def opened():
        files = (Path(entry).readlink() for entry in list(Path("/proc/self/fd").iterdir()) if entry.is_symlink())
        return [file for file in files if file.is_relative_to(index_folder)]

    before = opened()
    with Retriever.load(index_folder) as retriever:
        assert retriever.search("gold") and len(opened()) > len(before)
    assert opened() == before
