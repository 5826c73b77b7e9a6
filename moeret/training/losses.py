"""Contrastive losses for queries with several positives.

InfoNCE in the form of the decoupled softmax (Dual-Encoders for Extreme Multi-Label Classification, arXiv 2310.10636,
eq. 5): every positive competes with all negatives but not with the query's other positives,

    loss(q) = mean over p in P(q) of  -log( exp(s_p) / (exp(s_p) + sum over n not in P(q) of exp(s_n)) ).
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


def decoupled_softmax(scores: Float[Array, "B M"], positives: Bool[Array, "B M"]) -> Float[Array, "B"]:
    """The loss of each row from its scores (already divided by the temperature) and which columns are positive.

    A row without positives has loss 0.
    """
    negatives = jax.nn.logsumexp(jnp.where(positives, -jnp.inf, scores), axis=1)
    losses = jax.nn.softplus(negatives[:, None] - scores)
    counts = positives.sum(axis=1)
    return jnp.where(positives, losses, 0.0).sum(axis=1) / jnp.maximum(counts, 1).astype(scores.dtype)


def pooled_decoupled_softmax(
    queries: Float[Array, "B D"],
    documents: Float[Array, "N D"],
    positives: Int[Array, "B P"],
    temperature: float,
) -> Float[Array, "B"]:
    """The same loss with every document of a pool as a column; `positives` holds pool rows, -1 where there is none.

    Equal to building the [B, N] mask of positives, but only the P positive columns are worked on twice.
    """
    scores = queries @ documents.T / temperature
    rows = jnp.arange(len(queries))[:, None]
    present = positives >= 0
    outside = jnp.where(present, positives, documents.shape[0])  # out of bounds: dropped by the scatter
    negatives = jax.nn.logsumexp(scores.at[rows, outside].set(-jnp.inf, mode="drop"), axis=1)
    own = scores.at[rows, outside].get(mode="fill", fill_value=0.0)
    losses = jax.nn.softplus(negatives[:, None] - own)
    return jnp.where(present, losses, 0.0).sum(axis=1) / jnp.maximum(present.sum(axis=1), 1).astype(scores.dtype)
