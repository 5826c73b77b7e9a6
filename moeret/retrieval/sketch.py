"""Sketches: what an index holds, in a few vectors, so that a query need not search it to know whether it could.

A sketch is the centroids of a spherical k-means over an index's vectors, as the coarse level of an inverted file (Sivic and
Zisserman, ICCV 2003) has. What an index *promises* a query is the best cosine to its sketch.
"""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float

FINENESS, MOST = 8, 4096
"""A sketch of N vectors has FINENESS times the square root of N, at most MOST: as many cells as an inverted file would have."""
_EACH, _ROUNDS = 32, 6
"""Vectors of a sample for each centroid, and rounds of k-means over it."""
_AT_ONCE = 8192


def make_sketch(vectors: Float[np.ndarray, "N D"]) -> Float[np.ndarray, "C D"]:
    """Unit vectors that stand for these, which are not empty; the same for the same vectors."""
    count = min(int(FINENESS * len(vectors) ** 0.5), MOST, len(vectors))
    sample = vectors[:: -(-len(vectors) // (_EACH * count))]
    centroids = sample[np.random.default_rng(0).permutation(len(sample))[:count]]
    if count == len(vectors):
        return centroids
    for _ in range(_ROUNDS):
        parts = [sample[start : start + _AT_ONCE] for start in range(0, len(sample), _AT_ONCE)]
        nearest = np.concatenate([(part @ centroids.T).argmax(axis=1) for part in parts])
        sums = np.zeros_like(centroids)
        np.add.at(sums, nearest, sample)
        lengths = np.linalg.norm(sums, axis=1, keepdims=True)
        centroids = np.where(lengths > 1e-6, sums / np.maximum(lengths, 1e-6), centroids)  # an empty one stays
    return centroids


def spread(sketches: Sequence[Float[np.ndarray, "_ D"]]) -> float:
    """The standard deviation of the cosine between two vectors of these sketches: what a difference is measured by.

    Bases differ in how much of the sphere they use; cosines of .1 and .8 may be as unlike as .75 and .85 of another.
    """
    every = np.concatenate(sketches)
    every = every[:: -(-len(every) // 1024)]
    return float((every @ every.T)[np.triu_indices(len(every), 1)].std()) if len(every) > 1 else 0.0


def promises(queries: Float[np.ndarray, "Q D"], sketch: Float[np.ndarray, "C D"]) -> Float[np.ndarray, "Q"]:
    """What an index promises each query: the best dot product with its sketch."""
    return (queries @ sketch.T).max(axis=1)
