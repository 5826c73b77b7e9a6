"""Sketches: what an index holds, in a few vectors, so that a query need not search it to know whether it could.

A sketch is the centroids of a spherical k-means over an index's vectors, as the coarse level of an inverted file (Sivic and
Zisserman, ICCV 2003) has. What an index *promises* a query is the best cosine to its sketch.
"""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float

CENTROIDS = 32
"""Vectors of a sketch at most."""
_SAMPLE, _ROUNDS = 20_000, 6


def make_sketch(vectors: Float[np.ndarray, "N D"]) -> Float[np.ndarray, "C D"]:
    """At most CENTROIDS unit vectors that stand for these, which are not empty; the same for the same vectors."""
    sample = vectors[:: -(-len(vectors) // _SAMPLE)]
    centroids = sample[np.random.default_rng(0).permutation(len(sample))[:CENTROIDS]]
    for _ in range(_ROUNDS):
        nearest = (sample @ centroids.T).argmax(axis=1)
        sums = np.zeros_like(centroids)
        np.add.at(sums, nearest, sample)
        lengths = np.linalg.norm(sums, axis=1, keepdims=True)
        centroids = np.where(lengths > 1e-6, sums / np.maximum(lengths, 1e-6), centroids)  # an empty one stays
    return centroids


def spread(sketches: Sequence[np.ndarray]) -> float:
    """The standard deviation of the cosine between two vectors of these sketches: what a difference is measured by.

    Bases differ in how much of the sphere they use; cosines of .1 and .8 may be as unlike as .75 and .85 of another.
    """
    every = np.concatenate(sketches)
    return float((every @ every.T)[np.triu_indices(len(every), 1)].std()) if len(every) > 1 else 0.0


def promises(queries: Float[np.ndarray, "Q D"], sketches: Sequence[np.ndarray]) -> Float[np.ndarray, "Q I"]:
    """What each index promises each query: the best dot product with its sketch."""
    return np.stack([(queries @ sketch.T).max(axis=1) for sketch in sketches], axis=1)
