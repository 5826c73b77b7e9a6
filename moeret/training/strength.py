"""How much of a delta to use.

A fully trained expert has memorised some, and a part of its delta serves unseen documents better (weight-space
interpolation, WiSE-FT, arXiv 2109.01903). How large a part is chosen on dev, out of a small grid.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float

from moeret.models.experts import Bank, Shared, scaled

OWN = (0.0, 0.5, 0.75, 1.0)
"""Strengths tried for an expert's own delta."""
UNDER = (0.5, 0.75, 1.0)
"""Strengths tried for the shared delta under it. Without either an expert is the base."""

Score = Callable[[Bank, Shared | None], Float[np.ndarray, "E 3"]]
"""Dev nDCG@10 of each expert over all, seen and unseen queries."""


class Strengths(NamedTuple):
    """What each expert was found to want, and its dev nDCG@10 with that."""

    own: Float[np.ndarray, "E"]
    shared: Float[np.ndarray, "E"]
    dev: Float[np.ndarray, "E 3"]


def choose_strengths(bank: Bank, shared: Bank | None, score: Score, base: Float[np.ndarray, "E 3"]) -> Strengths:
    """The strengths with the best dev nDCG@10 of which neither seen nor unseen queries suffer against the base."""
    experts = len(base)
    best = Strengths(np.zeros(experts, np.float32), np.zeros(experts, np.float32), base.copy())
    for under in (0.0,) if shared is None else UNDER:
        for own in OWN:
            if not own and not under:
                continue  # the base
            beneath = None if shared is None else Shared(shared, np.full(experts + 1, under, np.float32))
            found = score(scaled(bank, np.full(experts, own)), beneath)
            better = harmless(found, base) & (found[:, 0] > best.dev[:, 0])
            best = Strengths(
                np.where(better, np.float32(own), best.own),
                np.where(better, np.float32(under), best.shared),
                np.where(better[:, None], found, best.dev),
            )
    return best


def harmless(scores: Float[np.ndarray, "E 3"], base: Float[np.ndarray, "E 3"]) -> Bool[np.ndarray, "E"]:
    """Which experts are at least as good as the base on seen and on unseen dev queries, where there are enough of them."""
    return ~(scores[:, 1:] < base[:, 1:]).any(axis=1)
