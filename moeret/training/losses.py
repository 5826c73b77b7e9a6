"""Contrastive losses for queries with several positives.

InfoNCE in the form of the decoupled softmax (Dual-Encoders for Extreme Multi-Label Classification, arXiv 2310.10636,
eq. 5): every positive competes with all negatives but not with the query's other positives,

    loss(q) = mean over p in P(q) of  -log( exp(s_p) / (exp(s_p) + sum over n not in P(q) of exp(s_n)) ).

Over a pool of all documents some negatives answer the query too, and nobody has judged them. Those about as near to the query as
its best positive are taken for such, and fade out (NV-Retriever leaves them out when it mines negatives, arXiv 2407.15831; a loss
that drops them at once would jump).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

GUARD, STEEPNESS = 0.95, 2.0
"""A pool's document counts half as a negative of a query where its score is such a share of the best positive's, and less the
higher its score: so much less log-odds for each unit (a cosine divided by the temperature)."""
_NEVER = -1e9
"""As good as a score of minus infinity, and has a gradient."""


def decoupled_softmax(scores: Float[Array, "B M"], positives: Bool[Array, "B M"]) -> Float[Array, "B"]:
    """The loss of each row from its scores (already divided by the temperature) and which columns are positive.

    A row without positives has loss 0.
    """
    negatives = jax.nn.logsumexp(jnp.where(positives, -jnp.inf, scores), axis=1)
    losses = jax.nn.softplus(negatives[:, None] - scores)
    counts = positives.sum(axis=1)
    return jnp.where(positives, losses, 0.0).sum(axis=1) / jnp.maximum(counts, 1).astype(scores.dtype)


class Pool(NamedTuple):
    """Vectors of constant documents, twice: forward and backward products each read the order that is fast for them."""

    rows: Float[Array, "N D"]
    columns: Float[Array, "D N"]


@jax.custom_vjp
def _pool_scores(queries: Float[Array, "B D"], pool: Pool) -> Float[Array, "B N"]:
    return jnp.matmul(queries.astype(pool.columns.dtype), pool.columns, preferred_element_type=jnp.float32)


def _scores_forward(queries: Array, pool: Pool) -> tuple[Array, Pool]:
    return _pool_scores(queries, pool), pool


def _scores_backward(pool: Pool, g: Array) -> tuple[Array, None]:
    return jnp.matmul(g.astype(pool.rows.dtype), pool.rows, preferred_element_type=jnp.float32), None


_pool_scores.defvjp(_scores_forward, _scores_backward)


def pooled_decoupled_softmax(
    queries: Float[Array, "B D"], pool: Pool, positives: Int[Array, "B P"], temperature: float
) -> Float[Array, "B"]:
    """The loss with every document of a pool as a column, less what is taken for unjudged positives.

    `positives` holds pool rows, -1 where there is none; a row without any has loss 0. Only these columns are worked on twice.
    """
    scores = _pool_scores(queries, pool) / temperature
    rows = jnp.arange(len(queries))[:, None]
    present = positives >= 0
    outside = jnp.where(present, positives, scores.shape[1])  # out of bounds: dropped by the scatter
    own = scores.at[rows, outside].get(mode="fill", fill_value=0.0)
    best = jnp.where(present, own, _NEVER).max(axis=1, keepdims=True)
    others = scores.at[rows, outside].set(_NEVER, mode="drop")
    counts = jax.lax.stop_gradient(jax.nn.log_sigmoid(STEEPNESS * (GUARD * best - others)))
    negatives = jax.nn.logsumexp(others + counts, axis=1)
    losses = jax.nn.softplus(negatives[:, None] - own)
    return jnp.where(present, losses, 0.0).sum(axis=1) / jnp.maximum(present.sum(axis=1), 1).astype(scores.dtype)
