"""What is familiar, and how much of the known may be called strange."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from moeret.models.familiarity import KEPT, NEIGHBOURS, fit_familiarity


def domains(seed: int, counts: list[int], width: int = 6) -> list[np.ndarray]:
    """Clouds around a few directions."""
    random = np.random.default_rng(seed)
    centres = np.random.default_rng(7).normal(size=(len(counts), width)) * 3
    return [
        (centre + random.normal(size=(count, width))).astype(np.float32)
        for centre, count in zip(centres, counts, strict=True)
    ]


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6), st.lists(st.integers(2, 60), min_size=1, max_size=4), st.floats(0, 0.5))
def test_at_most_the_given_share_is_strange_whatever_the_domains_sizes(seed, counts, share):
    train, held = domains(seed, counts), domains(seed + 1, counts)
    fitted = fit_familiarity(train, held, share)
    strange = np.mean([(~fitted.holds(own)).mean() for own in held])
    assert strange <= share + 1e-6


def test_familiarity_is_the_mean_cosine_to_the_nearest_known():
    fitted = fit_familiarity(domains(0, [40, 30]), domains(1, [10, 10]), 0.1)
    queries = domains(2, [3, 2])[0]
    rows = (queries - fitted.center) / fitted.spread
    cosines = np.sort(rows @ fitted.known.T / np.linalg.norm(rows, axis=1, keepdims=True), axis=1)
    np.testing.assert_allclose(fitted.of(queries), cosines[:, -NEIGHBOURS:].mean(axis=1), atol=1e-5)


def test_what_points_elsewhere_is_less_familiar_and_no_scale_of_a_feature_matters():
    train, held = domains(0, [60, 60, 60]), domains(1, [30, 30, 30])
    fitted = fit_familiarity(train, held, 0.05)
    strangers = np.random.default_rng(3).normal(size=(50, 6)).astype(np.float32) * 3
    assert fitted.of(strangers).mean() < min(fitted.of(own).mean() for own in held)
    scale = np.array([1, 10, 0.1, 5, 1, 100], np.float32)
    again = fit_familiarity([own * scale for own in train], [own * scale for own in held], 0.05)
    np.testing.assert_allclose(again.of(strangers * scale), fitted.of(strangers), atol=1e-4)


def test_a_large_domain_keeps_a_sample():
    fitted = fit_familiarity(domains(0, [KEPT + 100, 20]), domains(1, [5, 5]), 0.0)
    assert len(fitted.known) == KEPT + 20
