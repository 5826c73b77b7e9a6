"""Familiarity: how much a text looks like those that a router learned from.

A router's probabilities say which known domain a text is likest, not whether it is of any. The mean cosine to the nearest
known texts does (nearest-neighbour novelty detection, arXiv 2204.06507), on features scaled alike for all domains.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float

NEIGHBOURS = 10
"""Known texts whose cosines are averaged."""
KEPT = 512
"""Texts kept of each domain at most."""


@dataclass(frozen=True, slots=True)
class Familiarity:
    """A sample of known texts (unit rows of scaled features), and the least familiarity that is trusted."""

    center: Float[np.ndarray, "D"]
    spread: Float[np.ndarray, "D"]
    known: Float[np.ndarray, "N D"]
    limit: float

    def of(self, read: Float[np.ndarray, "Q D"]) -> Float[np.ndarray, "Q"]:
        """Each text's familiarity, in [-1, 1], from what the router reads of it."""
        cosines = scaled_rows(read, self.center, self.spread) @ self.known.T
        count = min(NEIGHBOURS, len(self.known))
        return np.partition(cosines, -count, axis=1)[:, -count:].mean(axis=1)

    def holds(self, read: Float[np.ndarray, "Q D"]) -> Bool[np.ndarray, "Q"]:
        """Which texts are familiar enough."""
        return self.of(read) >= self.limit


def fit_familiarity(
    train: Sequence[Float[np.ndarray, "_ D"]], held: Sequence[Float[np.ndarray, "_ D"]], share: float
) -> Familiarity:
    """Keeps a sample of each domain's texts; the limit leaves out at most `share` of those held out, domains weighing the same."""
    center, spread = balanced_moments(train)
    kept = [own[np.random.default_rng(0).permutation(len(own))[:KEPT]] for own in train]
    known = scaled_rows(np.concatenate(kept), center, spread)
    fitted = Familiarity(center, spread, known, -1.0)
    limit = least_but(share, [fitted.of(own) for own in held])
    return Familiarity(center, spread, known, limit)


def least_but(share: float, values: Sequence[Float[np.ndarray, "_"]]) -> float:
    """The least of all domains' values but for at most a `share`, domains weighing the same."""
    every = np.concatenate(values)
    weights = np.concatenate([np.full(len(own), 1 / len(own) / len(values)) for own in values])
    order = np.argsort(every, kind="stable")
    below = np.cumsum(weights[order]) - weights[order]  # the share that is less than each
    return float(every[order[int(np.flatnonzero(below <= share).max())]])


def balanced_moments(
    vectors: Sequence[Float[np.ndarray, "_ D"]],
) -> tuple[Float[np.ndarray, "D"], Float[np.ndarray, "D"]]:
    """(mean, standard deviation) of each feature; every domain weighs the same."""
    center = np.mean([own.mean(axis=0) for own in vectors], axis=0)
    spread = np.sqrt(np.mean([((own - center) ** 2).mean(axis=0) for own in vectors], axis=0)) + 1e-6
    return center.astype(np.float32), spread.astype(np.float32)


def scaled_rows(
    read: Float[np.ndarray, "Q D"], center: Float[np.ndarray, "D"], spread: Float[np.ndarray, "D"]
) -> Float[np.ndarray, "Q D"]:
    """Features scaled to mean 0 and variance 1 over domains, then each row to length 1."""
    rows = (read - center) / spread
    return (rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)).astype(np.float32)
