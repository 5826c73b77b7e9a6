"""How much of a delta to use.

A fully trained expert has memorised some, and a part of its delta serves unseen documents better (weight-space
interpolation, WiSE-FT, arXiv 2109.01903). How large a part, of an expert's own delta and of the shared one, is chosen on dev,
out of a small grid.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import Bool, Float

from moeret.models.experts import Bank, Shared, scaled

OWN = (0.0, 0.25, 0.5, 0.75, 1.0)
"""Strengths tried for an expert's own delta."""
LABEL_FREE = (0.25,)
"""The same where dev's queries were made up: they ask for more than real ones are served by (experiments.label_free)."""
SHARED = (0.0, 0.5, 0.75, 1.0)
"""Strengths tried for the shared delta that it is merged with. Without either an expert is the base."""

Values = Sequence[Float[np.ndarray, "Q"]]
"""nDCG@10 of each domain's dev queries."""


Tried = dict[tuple[float, float], Values]
"""What all experts score if each uses so much of its own delta and of the shared one: (own, shared) -> values."""


class Strengths(NamedTuple):
    """What each expert was found to want, and what it scores on dev with that."""

    own: Float[np.ndarray, "E"]
    shared: Float[np.ndarray, "E"]
    values: Values


def try_strengths(
    bank: Bank,
    shared: Bank | None,
    score: Callable[[Bank, Shared | None], Values],
    own_strengths: Sequence[float] = OWN,
) -> Tried:
    """Dev scores at every pair of strengths of the grid but the base's, the same pair for all experts."""
    experts = len(jax.tree.leaves(bank)[0])
    trained = any(np.any(factors["b"]) for matrices in bank.values() for factors in matrices.values())
    tried: Tried = {}
    for common in SHARED[:1] if shared is None else SHARED:
        for own in own_strengths if trained else OWN[:1]:
            if own or common:  # neither: the base
                merged = None if shared is None else Shared(shared, np.full(experts + 1, common, np.float32))
                tried[own, common] = score(scaled(bank, np.full(experts, own)), merged)
    return tried


def choose_strengths(tried: Tried, base: Values, seen: Sequence[Bool[np.ndarray, "Q"]]) -> Strengths:
    """The strengths with the best dev nDCG@10 of which neither seen nor unseen queries suffer against the base.

    What is best for a domain is read off its few hundred queries with noise, and most domains want about the same. So a
    domain's own mean and the mean of all domains count alike: shrinkage to the common mean (James and Stein, 1961), by a
    fixed half.
    """
    experts = len(base)
    common_mean = {pair: np.mean([own.mean() for own in values]) for pair, values in tried.items()}
    best = Strengths(np.zeros(experts, np.float32), np.zeros(experts, np.float32), list(base))
    for number in range(experts):
        good = [
            pair
            for pair, values in tried.items()
            if values[number].mean() > base[number].mean() and harmless(values[number], base[number], seen[number])
        ]
        if good:
            pair = max(good, key=lambda pair: tried[pair][number].mean() + common_mean[pair])
            best.own[number], best.shared[number] = pair
            best.values[number] = tried[pair][number]
    return best


def choose_strength(bank: Bank, score: Callable[[Bank], Values]) -> tuple[float, Values]:
    """The strength at which the only expert of a bank has the best mean over domains, and what it scores there."""
    tried = [(strength, score(scaled(bank, np.full(1, strength)))) for strength in OWN]
    return max(tried, key=lambda pair: float(np.mean([own.mean() for own in pair[1]])))


def harmless(values: Float[np.ndarray, "Q"], base: Float[np.ndarray, "Q"], seen: Bool[np.ndarray, "Q"]) -> bool:
    """Whether neither seen nor unseen queries lose more on the mean than the standard error of their difference.

    An exact zero would be left to chance: of 27 queries' nDCG@10 the mean difference is known to 4 points or so.
    """
    for group in (values[seen] - base[seen], values[~seen] - base[~seen]):
        if len(group) > 1 and group.mean() < -group.std(ddof=1) / np.sqrt(len(group)):
            return False
    return True
