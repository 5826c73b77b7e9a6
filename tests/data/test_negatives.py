"""Hard negatives: high-ranking documents, never a positive, and likely unjudged positives only if nothing else is left."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moeret.data import negatives
from moeret.data.negatives import mine_hard_negatives


def unit(random: np.random.Generator, *shape: int) -> np.ndarray:
    vectors = random.normal(size=shape)
    return (vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)).astype(np.float32)


def task(seed: int, queries: int = 6, documents: int = 15) -> tuple[np.ndarray, np.ndarray, list[np.ndarray]]:
    random = np.random.default_rng(seed)
    positives = [random.choice(documents, random.integers(1, 4), replace=False) for _ in range(queries)]
    return unit(random, queries, 8), unit(random, documents, 8), positives


@settings(deadline=None)
@given(seed=st.integers(0, 10_000), count=st.integers(1, 12), margin=st.sampled_from([0.5, 0.95, 1.0]))
def test_negatives_are_distinct_documents_and_never_positives(seed, count, margin):
    queries, documents, positives = task(seed)
    mined = mine_hard_negatives(queries, documents, positives, count, margin)
    assert mined.shape == (len(queries), count)
    for row, own in zip(mined, positives, strict=True):
        assert len({*row.tolist()}) == count
        assert not {*row.tolist()} & {*own.tolist()}
        assert ((row >= 0) & (row < len(documents))).all()


@settings(deadline=None)
@given(seed=st.integers(0, 10_000), count=st.integers(1, 12))
def test_the_hardest_unsuspected_documents_come_first_and_suspects_last(seed, count):
    queries, documents, positives = task(seed)
    mined = mine_hard_negatives(queries, documents, positives, count)
    for query, row, own in zip(queries, mined, positives, strict=True):
        scores = documents @ query
        limit = 0.95 * scores[own].min()
        negative = np.setdiff1d(np.arange(len(documents)), own)
        fair = negative[scores[negative] <= limit]
        suspects = np.setdiff1d(negative, fair)
        expected = [*fair[np.argsort(-scores[fair])], *suspects[np.argsort(-scores[suspects])]][:count]
        assert scores[row] == pytest.approx(scores[expected], abs=1e-5)


def test_a_near_copy_of_the_positive_is_left_out_while_others_are_there():
    query = np.array([[1, 0]], np.float32)
    angles = np.array([0.5, 0.49, 0.9, 1.2, 2.0])
    documents = np.stack([np.cos(angles), np.sin(angles)], 1).astype(np.float32)
    positives = [np.array([0])]
    assert mine_hard_negatives(query, documents, positives, 3).tolist() == [[2, 3, 4]]
    assert mine_hard_negatives(query, documents, positives, 4).tolist() == [[2, 3, 4, 1]]
    assert mine_hard_negatives(query, documents, positives, 3, margin=1.1).tolist() == [[1, 2, 3]]


def test_the_worst_of_several_positives_sets_the_limit():
    query = np.array([[1, 0]], np.float32)
    angles = np.array([0.1, 1.0, 0.5, 1.3])
    documents = np.stack([np.cos(angles), np.sin(angles)], 1).astype(np.float32)
    assert mine_hard_negatives(query, documents, [np.array([0, 1])], 2).tolist() == [[3, 2]]


def test_queries_are_mined_alike_however_many_at_once_and_inputs_stay_as_they_are(monkeypatch):
    queries, documents, positives = task(3, queries=20)
    copies = queries.copy(), documents.copy(), [own.copy() for own in positives]
    together = mine_hard_negatives(queries, documents, positives, 5)
    monkeypatch.setattr(negatives, "_QUERIES_AT_ONCE", 3)
    assert mine_hard_negatives(queries, documents, positives, 5).tolist() == together.tolist()
    assert (queries == copies[0]).all()
    assert (documents == copies[1]).all()
    assert all((own == copy).all() for own, copy in zip(positives, copies[2], strict=True))
