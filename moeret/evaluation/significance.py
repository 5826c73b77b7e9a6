"""Whether a difference between two systems is more than chance."""

from collections.abc import Mapping, Sequence

import numpy as np


def paired_randomisation(
    first: Mapping[str, Sequence[float]], second: Mapping[str, Sequence[float]], rounds: int = 10_000, seed: int = 0
) -> tuple[float, float]:
    """(difference of the means over domains, p-value) of two systems' values on the same queries of each domain.

    The two-sided paired randomisation test (Smucker, Allan, Carterette, CIKM 2007): were the systems alike, every query's
    difference might as well have the other sign. p is the share of random signs with a difference at least as large.

    Raises:
      ValueError: the systems were not scored on the same queries.
    """
    if {name: len(own) for name, own in first.items()} != {name: len(own) for name, own in second.items()}:
        raise ValueError("the two systems must have been scored on the same queries")
    random = np.random.default_rng(seed)
    observed, shuffled = 0.0, np.zeros(rounds)
    for name, own in first.items():
        differences = np.subtract(own, second[name])
        observed += differences.mean() / len(first)
        for start in range(0, rounds, 1000):
            signs = random.integers(0, 2, (min(1000, rounds - start), len(differences)), np.int8)
            shuffled[start : start + len(signs)] += (2.0 * signs - 1) @ differences / len(differences) / len(first)
    extreme = (np.abs(shuffled) >= abs(observed) - 1e-12).sum()
    return float(observed), float((1 + extreme) / (1 + rounds))
