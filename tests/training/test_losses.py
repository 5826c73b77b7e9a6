"""The contrastive losses against a plain reference."""

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from moeret.training.losses import GUARD, Pool, decoupled_softmax, pooled_decoupled_softmax


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

    (fast, fast_gradient), (plain, gradient) = _pooled(queries, documents, positives), _masked(queries, documents, mask)
    np.testing.assert_allclose(fast, plain, rtol=1e-5)
    np.testing.assert_allclose(fast_gradient, gradient, rtol=1e-4, atol=1e-5)


def test_documents_as_near_as_the_best_positive_are_no_negatives():
    query, other = np.array([1.0, 0.0]), np.array([0.0, 1.0])
    at = [c * query + np.sqrt(1 - c * c) * other for c in (0.6, 0.8, 0.9, 0.77, 0.75)]  # rows 0 and 1 are relevant
    documents, positives = jnp.asarray(at, jnp.float32), np.array([[0, 1]], np.int32)
    value, gradient = _pooled(jnp.asarray(query, jnp.float32)[None], documents, positives)
    expected = np.mean([np.log1p(np.exp((0.75 - own) / 0.5)) for own in (0.6, 0.8)])  # 0.77 > 0.95 * 0.8 > 0.75
    np.testing.assert_allclose(value, expected, rtol=1e-5)

    only, gradient = _pooled(jnp.asarray(query, jnp.float32)[None], documents, np.array([[0, -1]], np.int32))
    assert only == 0, "every other document is nearer"
    assert np.all(gradient == 0), "and nothing is learnt from the query"


@jax.jit
@jax.value_and_grad
def _pooled(queries, documents, positives):
    return pooled_decoupled_softmax(queries, Pool(documents, documents.T), positives, 0.5).sum()


@jax.jit
@jax.value_and_grad
def _masked(queries, documents, mask):
    scores = queries @ documents.T / 0.5
    best = jnp.where(mask, scores, -jnp.inf).max(axis=1, keepdims=True)
    return decoupled_softmax(jnp.where(mask | (scores < GUARD * best), scores, -1e9), mask).sum()


def test_a_single_positive_is_plain_cross_entropy():
    scores = jnp.asarray([[2.0, 0.0, -1.0]])
    loss = decoupled_softmax(scores, jnp.asarray([[True, False, False]]))
    np.testing.assert_allclose(loss, -jax.nn.log_softmax(scores)[:, 0], rtol=1e-6)
