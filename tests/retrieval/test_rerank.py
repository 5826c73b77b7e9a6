"""Another model may order the best hits anew."""

import numpy as np
import pytest
from conftest import QUERIES

import moeret


@pytest.fixture(scope="module")
def retriever(index_folder):
    return moeret.Retriever.load(index_folder)


def by_length(pairs):
    return [-float(len(contents)) for _, contents in pairs]


def test_hits_are_ordered_by_the_other_models_scores(retriever):
    plain = retriever.search_batch(QUERIES, 50, route="all")
    found = retriever.search_batch(QUERIES, 5, route="all", rerank=by_length)
    for hits, before in zip(found, plain, strict=True):
        expected = sorted(before, key=lambda hit: len(f"{hit.title} {hit.text}"))[:5]
        assert [(hit.expert, hit.id) for hit in hits] == [(hit.expert, hit.id) for hit in expected]
        assert [hit.rank for hit in hits] == [1, 2, 3, 4, 5]
        assert [hit.score for hit in hits] == [-len(f"{hit.title} {hit.text}") for hit in hits]
    one = retriever.search(QUERIES[0], 5, route="all", rerank=by_length)
    assert [hit.id for hit in one] == [hit.id for hit in found[0]]


def test_pairs_are_queries_with_contents_and_equal_scores_keep_the_order(retriever):
    asked = []
    found = retriever.search_batch(QUERIES[:2], 3, rerank=lambda pairs: asked.extend(pairs) or np.zeros(len(pairs)))
    plain = retriever.search_batch(QUERIES[:2], 3)
    assert [[hit.id for hit in hits] for hits in found] == [[hit.id for hit in hits] for hits in plain]
    assert {query for query, _ in asked} == {*QUERIES[:2]}
    assert f"{plain[0][0].title} {plain[0][0].text}" in {contents for _, contents in asked}


def test_nothing_found_is_not_scored(retriever):
    assert retriever.search("gold", where={"year": 1}, rerank=lambda pairs: pytest.fail("asked")) == []
    assert retriever.search_batch([], rerank=by_length) == []


@pytest.mark.parametrize(("scores", "told"), [
    (lambda pairs: [1.0], "a number for each"), (lambda pairs: [np.nan] * len(pairs), "not finite"),
])  # fmt: skip
def test_scores_that_make_no_sense_are_refused(retriever, scores, told):
    with pytest.raises(moeret.ConfigError, match=told):
        retriever.search("gold", rerank=scores)
