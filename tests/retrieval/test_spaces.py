"""Searching where experts encode documents too: every index in its own space, fused by chances or by rank."""

from itertools import pairwise

import numpy as np
import pytest
from conftest import QUERIES, assert_ranked, place_by_router, write_jsonl

import moeret
from moeret import Retriever

TOLERANCE = 2e-5


@pytest.mark.parametrize("fusion", [None, "calibrated", "rrf"])
@pytest.mark.parametrize("route", ["auto", "all", "fruit"])
def test_experts_with_their_own_documents_are_searched_and_fused(both, fusion, route):
    assert both.fusion == "calibrated"
    found = both.rank(QUERIES, 24, route=route, fusion=fusion, experts=2 if route == "auto" else None)
    for hits, indexes in zip(both.hits(found), found.indexes, strict=True):
        assert len(hits) == 12 * len(indexes)
        assert_ranked(hits)
        assert all(0 < hit.score <= 1 for hit in hits)


def test_where_scores_cannot_be_compared_the_bases_own_index_is_always_searched(
    tmp_path, monkeypatch, both, two_domains
):
    place_by_router(monkeypatch, 1.1)
    write_jsonl(tmp_path / "loose.jsonl", [{"_id": "loose", "title": "", "text": "the rhine"}])
    moeret.build_index(both.model.published.root, tmp_path / "index", two_domains, [tmp_path / "loose.jsonl"])
    loaded = Retriever.load(tmp_path / "index")
    found = loaded.rank(QUERIES, 30, experts=1)
    for route, indexes, hits in zip(found.routes, found.indexes, loaded.hits(found), strict=True):
        assert set(indexes) == {"base", *(route.experts or ("fruit", "metal"))}
        assert "loose" in [hit.id for hit in hits]
    loaded.close()


def test_experts_with_their_own_documents_encoded_them_themselves(both):
    for start, name in ((0, "fruit"), (12, "metal")):
        texts = [document.contents for _, document in both.held()[start : start + 12]]
        own = both.model.encode_document(texts, expert=name, normalize_embeddings=True)
        np.testing.assert_allclose(both.vectors()[start : start + 12], own, atol=1e-5)


@pytest.mark.parametrize("name", ["fruit", "metal"])
def test_an_experts_own_space_is_searched_with_its_own_query_vector(both, name):
    start = 0 if name == "fruit" else 12
    vectors = both.model.encode_query(QUERIES, expert=name, normalize_embeddings=True)
    for vector, hits in zip(vectors, both.search_batch(QUERIES, 12, route=name, fusion="rrf"), strict=True):
        scores = dict(zip((f"d{n}" for n in range(12)), both.vectors()[start : start + 12] @ vector, strict=True))
        ranked = [scores[hit.id] for hit in hits]
        assert all(before >= after - TOLERANCE for before, after in pairwise(ranked))


def test_calibrated_scores_are_the_experts_probability_times_the_chance_of_relevance(both):
    calibration = {entry["name"]: entry["calibration"] for entry in both.model.published.meta["experts"]}
    vectors = {name: both.model.encode_query(QUERIES, expert=name, normalize_embeddings=True) for name in both.sizes}
    found = both.rank(QUERIES, 24, experts=2)
    for position, (hits, indexes) in enumerate(zip(both.hits(found), found.indexes, strict=True)):
        route = found.routes[position]
        weights = route.experts or route.probabilities
        for hit in hits:
            row = int(hit.id[1:]) + 12 * (hit.expert == "metal")
            slope, intercept = calibration[hit.expert]
            cosine = both.vectors()[row] @ vectors[hit.expert][position]
            chance = 1 / (1 + np.exp(-(slope * cosine + intercept)))
            assert hit.score == pytest.approx(weights[hit.expert] * chance, abs=1e-4)
        assert {hit.expert for hit in hits} == set(indexes)


def test_document_spaces_that_cannot_be_compared_are_not(both):
    with pytest.raises(moeret.ConfigError, match="the base cannot search this index"):
        both.search("apple", route="base")
    with pytest.raises(moeret.ConfigError, match="use calibrated or rrf"):
        both.search("apple", fusion="score")
