"""The router: what the base makes of a query in, a probability per expert out, and which experts to use.

A query's *reading* is [3D]: mean and standard deviation of its tokens after the trunk, then the unit base embedding. Both
kinds of router are linear in a part of it, so they share all code but the fitting. `centroids` scores an expert by the cosine
to the mean of its training queries (the training-free router of RouterRetriever, arXiv 2409.02685, with one pilot an expert);
`learned` is multinomial logistic regression, on the trunk for queries, so that they need no pass through the base's own branch.
A scale, calibrated on dev, makes either's scores probabilities (temperature scaling, arXiv 1706.04599).
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

from moeret.models.familiarity import Familiarity

CENTROID_SCALE = 20.0
"""Sharpness of centroid probabilities before any calibration."""
ALONE = 0.9
"""An expert of so much weight embeds a query alone; the others' indexes are searched all the same. To merge deltas costs
several times as much."""

Reads = Literal["trunk", "base"]
"""The part of a reading that a router is linear in."""


def part(readings: Float[np.ndarray, "Q 3*D"], reads: Reads) -> Float[np.ndarray, "Q _"]:
    """The trunk's or the base's part of readings."""
    trunk = readings.shape[1] * 2 // 3
    return readings[:, :trunk] if reads == "trunk" else readings[:, trunk:]


class Choice(NamedTuple):
    """What a router makes of queries: experts counted from 1, best first, and their weights, 0 where one is not used.

    All of a query's weights are 0 where the router abstains.
    """

    probabilities: Float[np.ndarray, "Q E"]
    experts: Int[np.ndarray, "Q S"]
    weights: Float[np.ndarray, "Q S"]
    abstained: Bool[np.ndarray, "Q"]

    @property
    def merged(self) -> Float[np.ndarray, "Q S"]:
        """How much of each expert's delta is in a query's vector: of one that has nearly all the weight, all."""
        alone = self.weights >= ALONE
        return np.where(alone.any(axis=1, keepdims=True), alone, self.weights).astype(np.float32)


@dataclass(frozen=True, slots=True)
class Router:
    """Linear scores over experts 1..E, and the rules that turn probabilities into a choice.

    A query keeps at most `slots` experts with a probability of at least `minimum` (the best one always), their weights
    scaled to sum to 1. The router abstains to the base for a query that is not familiar.
    """

    kind: str
    reads: Reads
    weights: Float[np.ndarray, "D E"]
    bias: Float[np.ndarray, "E"]
    slots: int = 4
    minimum: float = 0.1
    familiarity: Familiarity | None = None

    def probabilities(self, vectors: Float[np.ndarray, "Q D"]) -> Float[np.ndarray, "Q E"]:
        """A probability per expert from what the router reads; each row sums to 1."""
        return softmax(vectors @ self.weights + self.bias)

    def choose(self, read: Float[np.ndarray, "Q D"]) -> Choice:
        """Which experts each query uses, from what the router reads of it."""
        choice = self.pick(self.probabilities(read))
        if self.familiarity is None:
            return choice
        familiar = self.familiarity.holds(read)
        return choice._replace(weights=choice.weights * familiar[:, None], abstained=~familiar)

    def pick(self, probabilities: Float[np.ndarray, "Q E"]) -> Choice:
        """Which experts queries with these probabilities use, however unfamiliar they are."""
        slots = min(self.slots, probabilities.shape[1])
        experts = np.argsort(-probabilities, axis=1, kind="stable")[:, :slots]
        best = np.take_along_axis(probabilities, experts, axis=1)
        kept = best >= self.minimum
        kept[:, 0] = True
        weights = np.where(kept, best, 0.0)
        weights /= weights.sum(axis=1, keepdims=True)
        return Choice(probabilities, experts + 1, weights.astype(np.float32), np.zeros(len(weights), bool))

    def scaled(self, scale: float) -> "Router":
        """The same router with sharper (above 1) or softer probabilities."""
        return replace(self, weights=self.weights * np.float32(scale), bias=self.bias * np.float32(scale))


def centroid_router(vectors: Sequence[Float[np.ndarray, "_ D"]]) -> Router:
    """A router from each expert's unit base embeddings; nothing is trained."""
    means = np.stack([own.mean(axis=0) for own in vectors])
    means /= np.maximum(np.linalg.norm(means, axis=1, keepdims=True), 1e-12)
    weights = (CENTROID_SCALE * means.T).astype(np.float32)
    return Router("centroids", "base", weights, np.zeros(len(vectors), np.float32))


def softmax(scores: Float[np.ndarray, "Q E"]) -> Float[np.ndarray, "Q E"]:
    """Softmax along the last axis."""
    powers = np.exp(scores - scores.max(axis=-1, keepdims=True))
    return powers / powers.sum(axis=-1, keepdims=True)
