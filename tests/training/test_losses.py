"""The contrastive losses against a plain reference."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from moeret.training.losses import GUARD, STEEPNESS, Pool, decoupled_softmax, pooled_decoupled_softmax


def reference(scores: np.ndarray, positives: np.ndarray) -> np.ndarray:
    """Each positive against all negatives, one at a time, in float64."""
    out = np.zeros(len(scores))
    for row, (own, positive) in enumerate(zip(scores.astype(np.float64), positives, strict=True)):
        negatives = np.exp(own[~positive]).sum()
        losses = [-np.log(np.exp(s) / (np.exp(s) + negatives)) for s in own[positive]]
        out[row] = np.mean(losses) if losses else 0.0
    return out


@settings(max_examples=40, deadline=None)
@given(
    hnp.arrays(np.float32, (3, 5), elements=st.floats(-8, 8, width=32)),
    hnp.arrays(np.bool_, (3, 5)),
)
def test_every_positive_competes_with_all_negatives_and_no_other_positive(scores, positives):
    loss = decoupled_softmax(jnp.asarray(scores), jnp.asarray(positives))
    np.testing.assert_allclose(loss, reference(scores, positives), rtol=2e-5, atol=2e-5)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 4))
def test_the_pooled_form_equals_the_mask_form_in_value_and_gradient(seed, width):
    random = np.random.default_rng(seed)
    queries = jnp.asarray(random.normal(size=(4, 6)), jnp.float32)
    documents = jnp.asarray(random.normal(size=(9, 6)), jnp.float32)
    chosen = [random.choice(9, size=random.integers(0, width + 1), replace=False) for _ in range(4)]
    positives = np.full((4, width), -1, np.int32)
    mask = np.zeros((4, 9), bool)
    for row, own in enumerate(chosen):
        positives[row, : len(own)] = own
        mask[row, own] = True

    (fast, fast_gradient), (plain, gradient) = (
        _pooled(queries, documents, positives, 0.5),
        _masked(queries, documents, mask),
    )
    np.testing.assert_allclose(fast, plain, rtol=1e-5)
    np.testing.assert_allclose(fast_gradient, gradient, rtol=1e-4, atol=1e-5)


def test_documents_nearer_than_the_best_positive_hardly_count():
    query, other = np.array([1.0, 0.0]), np.array([0.0, 1.0])

    def loss(*cosines: float) -> float:
        """Of a query with positives at cosines 0.6 and 0.8 and negatives at these."""
        at = [c * query + np.sqrt(1 - c * c) * other for c in (0.6, 0.8, *cosines)]
        documents = jnp.asarray(at, jnp.float32)
        value, gradient = _pooled(jnp.asarray(query, jnp.float32)[None], documents, np.array([[0, 1]], np.int32), 0.02)
        assert np.isfinite(gradient).all()
        return float(value)

    assert loss(0.99) < loss(0.9) < loss(0.8) < loss(0.76), "the nearer, the likelier an unjudged positive"
    assert loss(0.7) > loss(0.65), "below the guard, the nearer, the worse"
    half = np.mean([np.log1p(0.5 * np.exp((0.76 - own) / 0.02)) for own in (0.6, 0.8)])
    np.testing.assert_allclose(loss(0.76), half, rtol=1e-4)


def test_a_query_without_positives_teaches_nothing():
    random = np.random.default_rng(0)
    queries, documents = (jnp.asarray(random.normal(size=(n, 4)), jnp.float32) for n in (2, 5))
    value, gradient = _pooled(queries, documents, np.full((2, 1), -1, np.int32), 0.02)
    assert value == 0 and np.all(gradient == 0)


@partial(jax.jit, static_argnames="temperature")
@jax.value_and_grad
def _pooled(queries, documents, positives, temperature):
    return pooled_decoupled_softmax(queries, Pool(documents, documents.T), positives, temperature).sum()


@jax.jit
@jax.value_and_grad
def _masked(queries, documents, mask):
    scores = queries @ documents.T / 0.5
    best = jnp.where(mask, scores, -jnp.inf).max(axis=1, keepdims=True)
    counts = jax.nn.sigmoid(STEEPNESS * (GUARD * jnp.where(mask.any(axis=1, keepdims=True), best, 0) - scores))
    counts = jax.lax.stop_gradient(jnp.where(mask, 1, counts))
    return decoupled_softmax(scores + jnp.log(counts), mask).sum()


def test_a_single_positive_is_plain_cross_entropy():
    scores = jnp.asarray([[2.0, 0.0, -1.0]])
    loss = decoupled_softmax(scores, jnp.asarray([[True, False, False]]))
    np.testing.assert_allclose(loss, -jax.nn.log_softmax(scores)[:, 0], rtol=1e-6)
