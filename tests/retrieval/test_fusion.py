"""Fusion: one list out of many, the same whatever order they come in, and no document twice."""

import dataclasses
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moeret.retrieval.fusion import Ranking, fuse

ROWS = 24
FUSIONS = ["score", "rrf", "calibrated"]


@st.composite
def rankings(draw) -> list[Ranking]:
    """Rankings over disjoint rows, with few distinct scores, so that ties are common."""
    owner = draw(st.lists(st.integers(0, 3), min_size=ROWS, max_size=ROWS))
    made = []
    for number in range(draw(st.integers(1, 4))):
        rows = np.array([row for row, own in enumerate(owner) if own == number], np.int64)
        score = st.sampled_from([-0.5, 0.0, 0.25, 0.5, 1.0])
        scores = np.array(draw(st.lists(score, min_size=len(rows), max_size=len(rows))), np.float32)
        order = np.lexsort((rows, -scores))
        made.append(
            Ranking(
                rows[order],
                scores[order],
                rows[order],
                weight=draw(st.sampled_from([0.25, 0.5, 1.0])),
                slope=draw(st.sampled_from([0.5, 1.0, 8.0])),
                intercept=draw(st.sampled_from([-2.0, 0.0, 1.0])),
            )
        )
    return made


@st.composite
def same_documents(draw) -> np.ndarray:
    """For every row the first row that holds the same document."""
    kind = draw(st.lists(st.integers(0, ROWS - 1), min_size=ROWS, max_size=ROWS))
    return np.array([kind.index(own) for own in kind], np.int64)


def fused(lists: list[Ranking], fusion: str, k: int, same: np.ndarray):
    """What `fuse` gives where rows hold the same documents as `same` says."""
    return fuse([dataclasses.replace(own, identities=same[own.rows]) for own in lists], fusion, k)


def reference(lists: list[Ranking], fusion: str, k: int, same: np.ndarray) -> list[tuple[int, float]]:
    scored = []
    for ranking in lists:
        for place, (row, score) in enumerate(zip(ranking.rows.tolist(), ranking.scores.tolist(), strict=True)):
            if fusion == "rrf":
                score = ranking.weight / (60 + place + 1)
            elif fusion == "calibrated":
                score = ranking.weight / (1 + math.exp(-(ranking.slope * score + ranking.intercept)))
            scored.append((row, score))
    best = {}
    for row, score in sorted(scored, key=lambda hit: (-round(hit[1], 9), hit[0])):
        best.setdefault(int(same[row]), (row, score))
    return list(best.values())[:k]


@settings(max_examples=80, deadline=None)
@given(lists=rankings(), fusion=st.sampled_from(FUSIONS), k=st.integers(1, ROWS + 3), same=same_documents())
def test_fusion_agrees_with_its_formula(lists, fusion, k, same):
    rows, scores = fused(lists, fusion, k, same)
    expected = reference(lists, fusion, k, same)
    np.testing.assert_allclose(scores, [score for _, score in expected], rtol=1e-6)
    assert rows.tolist() == [row for row, _ in expected]


@settings(max_examples=60, deadline=None)
@given(lists=rankings(), fusion=st.sampled_from(FUSIONS), k=st.integers(1, ROWS), same=same_documents())
def test_no_document_comes_twice_and_scores_never_rise(lists, fusion, k, same):
    rows, scores = fused(lists, fusion, k, same)
    assert len(set(same[rows].tolist())) == len(rows)
    assert (np.diff(scores) <= 0).all()
    held = {int(same[row]) for ranking in lists for row in ranking.rows}
    assert len(rows) == min(k, len(held))


@settings(max_examples=60, deadline=None)
@given(lists=rankings(), fusion=st.sampled_from(FUSIONS), k=st.integers(1, ROWS), same=same_documents(), data=st.data())
def test_the_order_in_which_indexes_answer_changes_nothing(lists, fusion, k, same, data):
    rows, scores = fused(lists, fusion, k, same)
    other_rows, other_scores = fused(data.draw(st.permutations(lists)), fusion, k, same)
    assert rows.tolist() == other_rows.tolist()
    assert scores.tolist() == other_scores.tolist()


@settings(max_examples=30, deadline=None)
@given(lists=rankings(), fusion=st.sampled_from(FUSIONS), same=same_documents())
def test_fewer_hits_are_the_first_of_more_hits(lists, fusion, same):
    many, _ = fused(lists, fusion, ROWS, same)
    for k in (1, 2, 5):
        assert fused(lists, fusion, k, same)[0].tolist() == many[:k].tolist()


def ranking(rows: list[int], scores: list[float], **rest) -> Ranking:
    own = np.array(rows, np.int64)
    return Ranking(own, np.array(scores, np.float32), own, **rest)


def test_equal_scores_are_ordered_by_row():
    lists = [ranking([5, 1, 3], [0.5, 0.5, 0.5]), ranking([4, 0], [0.5, 0.5])]
    assert fused(lists, "score", 9, np.arange(6))[0].tolist() == [0, 1, 3, 4, 5]


def test_of_rows_with_the_same_document_the_best_is_kept():
    lists = [ranking([0, 1], [0.9, 0.2]), ranking([2, 3], [0.95, 0.1])]
    rows, scores = fused(lists, "score", 9, np.array([0, 1, 0, 1]))
    assert rows.tolist() == [2, 1]
    np.testing.assert_allclose(scores, [0.95, 0.2])


def test_an_index_that_found_nothing_does_no_harm():
    empty = ranking([], [])
    for fusion in FUSIONS:
        assert fused([empty, ranking([1], [0.5])], fusion, 3, np.arange(2))[0].tolist() == [1]
        assert fused([empty], fusion, 3, np.arange(2))[0].tolist() == []


@pytest.mark.parametrize("slope", [30.0, 200.0, 1e4])
def test_a_steep_calibration_neither_warns_nor_ties_what_it_tells_apart(slope):
    lists = [ranking([3, 2, 1, 0], [0.9, 0.8, -0.1, -0.9], slope=slope, intercept=-0.85 * slope)]
    rows, scores = fused(lists, "calibrated", 4, np.arange(4))
    assert np.isfinite(scores).all()
    assert rows.tolist()[:2] == [3, 2]
    steep = [ranking([1, 0], [0.95, 0.9], slope=30.0, intercept=-5.0)]
    assert fused(steep, "calibrated", 2, np.arange(2))[0].tolist() == [1, 0]
