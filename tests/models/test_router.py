"""The router's rules, for any scores."""

from dataclasses import replace

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from moeret.models.familiarity import Familiarity
from moeret.models.router import ALONE, Router, centroid_router, softmax

WIDTH = 4
quick = settings(max_examples=60, deadline=None)


def numbers(*shape: int, limit: float = 30.0) -> st.SearchStrategy[np.ndarray]:
    """Float32 arrays of moderate numbers."""
    return hnp.arrays(np.float32, shape, elements=st.floats(-limit, limit, width=32))


@st.composite
def routers(draw: st.DrawFn) -> Router:
    """Any router over one to five experts."""
    experts = draw(st.integers(1, 5))
    return Router(
        kind="learned",
        reads="trunk",
        weights=draw(numbers(WIDTH, experts)),
        bias=draw(numbers(experts)),
        slots=draw(st.integers(1, 6)),
        minimum=draw(st.floats(0, 1)),
    )


@quick
@given(routers(), numbers(3, WIDTH))
def test_probabilities_sum_to_one(router, vectors):
    probabilities = router.probabilities(vectors)
    assert probabilities.shape == (3, router.weights.shape[1])
    assert (probabilities >= 0).all()
    np.testing.assert_allclose(probabilities.sum(1), 1, rtol=1e-5)


@quick
@given(routers(), numbers(3, WIDTH))
def test_a_choice_keeps_to_the_rules(router, vectors):
    probabilities, experts, weights, abstained = router.choose(vectors)
    np.testing.assert_array_equal(probabilities, router.probabilities(vectors))
    assert experts.shape == weights.shape == (3, min(router.slots, probabilities.shape[1]))
    assert weights.dtype == np.float32
    np.testing.assert_allclose(weights.sum(1), np.where(abstained, 0, 1), rtol=1e-5)
    assert not abstained.any()
    for row in range(3):
        assert len(set(experts[row])) == len(experts[row])
        assert set(experts[row]) <= set(range(1, probabilities.shape[1] + 1))
        own = probabilities[row, experts[row] - 1]
        assert own[0] == probabilities[row].max() and (np.diff(own) <= 0).all()
        if not abstained[row]:
            assert weights[row, 0] > 0
            np.testing.assert_array_equal(weights[row, 1:] > 0, (own[1:] >= router.minimum) & (own[1:] > 0))


@quick
@given(routers(), numbers(3, WIDTH))
def test_an_expert_with_nearly_all_the_weight_embeds_alone(router, vectors):
    choice = router.choose(vectors)
    for weights, merged in zip(choice.weights, choice.merged, strict=True):
        alone = weights.max() >= ALONE
        np.testing.assert_array_equal(merged, weights == weights.max() if alone else weights)


@quick
@given(routers(), numbers(3, WIDTH), st.floats(-1.5, 1.5))
def test_a_router_abstains_where_familiarity_is_below_its_limit(router, vectors, limit):
    known = np.eye(WIDTH, dtype=np.float32)
    familiarity = Familiarity(np.zeros(WIDTH, np.float32), np.ones(WIDTH, np.float32), known, limit)
    _, _, weights, abstained = replace(router, familiarity=familiarity).choose(vectors)
    np.testing.assert_array_equal(abstained, familiarity.of(vectors) < limit)
    assert not weights[abstained].any() and weights[~abstained].any(1).all()


@quick
@given(routers(), numbers(3, WIDTH), st.floats(0.125, 8))
def test_scaling_keeps_the_order_of_experts(router, vectors, scale):
    scores = vectors @ router.weights + router.bias
    scaled = router.scaled(scale)
    np.testing.assert_allclose(vectors @ scaled.weights + scaled.bias, scale * scores, rtol=1e-3, atol=1e-2)
    assert (scaled.slots, scaled.minimum) == (router.slots, router.minimum)


@quick
@given(numbers(5), st.floats(-30, 30, width=32))
def test_softmax_ignores_a_common_shift(scores, shift):
    np.testing.assert_allclose(softmax(scores[None] + np.float32(shift)), softmax(scores[None]), atol=1e-5)


@quick
@given(st.integers(0, 2**32 - 1), st.integers(2, 6))
def test_the_centroid_router_picks_the_nearest_centroid(seed, count):
    random = np.random.default_rng(seed)

    def unit_rows(rows: int) -> np.ndarray:
        vectors = random.normal(size=(rows, WIDTH)).astype(np.float32)
        return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)

    domains, queries = [unit_rows(3 + n) for n in range(count)], unit_rows(20)
    means = np.stack([own.astype(np.float64).mean(0) for own in domains])
    cosines = queries @ (means / np.linalg.norm(means, axis=1, keepdims=True)).T
    router = centroid_router(domains)
    chosen = router.choose(queries).experts[:, 0] - 1
    best = np.take_along_axis(cosines, chosen[:, None], axis=1)[:, 0]
    np.testing.assert_allclose(best, cosines.max(1), atol=1e-5)
