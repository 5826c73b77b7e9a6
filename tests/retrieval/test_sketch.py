"""Sketches: unit vectors that tell which index has documents near a query."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from moeret.retrieval.sketch import FINENESS, make_sketch, promises, spread


def unit_rows(seed: int, count: int, width: int = 16) -> np.ndarray:
    rows = np.random.default_rng(seed).normal(size=(count, width)).astype(np.float32)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


@given(seed=st.integers(0, 1000), count=st.integers(1, FINENESS**2))
def test_a_sketch_of_few_vectors_is_these_vectors(seed, count):
    vectors, queries = unit_rows(seed, count), unit_rows(seed + 1, 5)
    promised = promises(queries, make_sketch(vectors))
    np.testing.assert_allclose(promised, (queries @ vectors.T).max(axis=1), atol=1e-5)


@given(seed=st.integers(0, 1000), count=st.integers(1, 300))
def test_a_sketch_has_few_unit_vectors_and_is_the_same_again(seed, count):
    vectors = np.concatenate([unit_rows(seed, count), unit_rows(seed, count)[: count // 2]])  # with some twice
    sketch = make_sketch(vectors)
    assert sketch.shape == (min(int(FINENESS * len(vectors) ** 0.5), len(vectors)), 16)
    assert sketch.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(sketch, axis=1), 1, atol=1e-5)
    np.testing.assert_array_equal(sketch, make_sketch(vectors.copy()))


def test_a_base_that_uses_less_of_the_sphere_has_a_smaller_spread():
    wide = [unit_rows(seed, 40) for seed in (0, 1)]
    narrow = [rows + 3.0 for rows in wide]
    narrow = [rows / np.linalg.norm(rows, axis=1, keepdims=True) for rows in narrow]
    assert spread([make_sketch(rows) for rows in narrow]) < 0.1 * spread([make_sketch(rows) for rows in wide])
    assert spread([unit_rows(0, 1)]) == 0


def test_the_index_with_documents_near_a_query_promises_most():
    """Four indexes of 500 documents around 20 topics each; a query near any of their topics tells whose it is."""
    topics = unit_rows(0, 80).reshape(4, 20, 16)
    noise = np.random.default_rng(1)

    def around(points: np.ndarray, times: int) -> np.ndarray:
        rows = np.repeat(points, times, axis=0)
        rows = rows + 0.1 * noise.normal(size=rows.shape).astype(np.float32)
        return rows / np.linalg.norm(rows, axis=1, keepdims=True)

    sketches = [make_sketch(around(own, 25)) for own in topics]
    for number, own in enumerate(topics):
        promised = [promises(around(own, 3), sketch) for sketch in sketches]
        assert (np.argmax(promised, axis=0) == number).mean() > 0.9
