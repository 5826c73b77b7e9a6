"""The paired randomisation test."""

import numpy as np
import pytest

from moeret.evaluation.significance import paired_randomisation


def values(seed: int, shift: float = 0.0, sizes=(40, 400)) -> dict[str, np.ndarray]:
    """Scores of two domains."""
    random = np.random.default_rng(seed)
    return {f"domain {n}": random.uniform(size=size) + shift for n, size in enumerate(sizes)}


def test_equal_systems_differ_by_chance_alone():
    assert paired_randomisation(values(0), values(0)) == (0.0, 1.0)


def test_a_steady_gain_is_found_and_every_domain_weighs_the_same():
    first, second = values(0), values(0)
    first["domain 0"] = first["domain 0"] + 0.2
    difference, p = paired_randomisation(first, second)
    assert difference == pytest.approx(0.1) and p < 0.001
    assert paired_randomisation(second, first) == (-difference, p)


def test_the_p_value_of_noise_is_as_often_small_as_it_says():
    p = [paired_randomisation(values(n), values(n + 1000), rounds=400, seed=n)[1] for n in range(200)]
    assert 0.02 < np.mean(np.array(p) < 0.1) < 0.19


def test_other_queries_cannot_be_compared():
    with pytest.raises(ValueError, match="same queries"):
        paired_randomisation(values(0), values(0, sizes=(40, 401)))
