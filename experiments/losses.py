"""Losses that experiments.recipe compares with training's own: other negatives, and corrections of their scores.

Each takes what moeret.training.losses.pooled_decoupled_softmax takes, and differs from it in which documents are negatives or how
much they count.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from moeret.training import step
from moeret.training.losses import GUARD, Pool

Loss = Callable[[Float[Array, "B D"], Pool, Int[Array, "B P"], float], Float[Array, "B"]]
HARDEST = 64
_NEVER = -1e6
"""As good as a cosine of minus infinity."""


@contextmanager
def step_with(name: str, other: Callable[..., Any]) -> Iterator[None]:
    """Puts another function in the place of one that the training step calls by this name."""
    usual = getattr(step, name)
    setattr(step, name, other)
    step.add_queries.clear_cache()
    try:
        yield
    finally:
        setattr(step, name, usual)
        step.add_queries.clear_cache()


def training_with(loss: Loss) -> AbstractContextManager[None]:
    """Puts another loss into the training step."""
    return step_with("pooled_decoupled_softmax", loss)


def in_batch(queries: Array, pool: Pool, positives: Array, temperature: float) -> Array:
    """Negatives are the other queries' positives alone."""
    columns = positives.ravel()
    scores = queries @ pool.rows[jnp.maximum(columns, 0)].astype(jnp.float32).T / temperature
    relevant = (columns[None, :, None] == positives[:, None, :]).any(axis=2)
    negatives = jax.nn.logsumexp(jnp.where(relevant | (columns < 0)[None], _NEVER, scores), axis=1)
    return _mean_over_positives(negatives, _own(queries, pool, positives) / temperature, positives)


def unguarded(queries: Array, pool: Pool, positives: Array, temperature: float) -> Array:
    """Negatives are all documents that are not judged relevant."""
    scores, own = _scores(queries, pool, positives)
    return _mean_over_positives(jax.nn.logsumexp(scores / temperature, axis=1), own / temperature, positives)


def guarded_at_once(queries: Array, pool: Pool, positives: Array, temperature: float) -> Array:
    """Documents nearer than the guard are left out and do not fade."""
    scores, own = _guarded(*_scores(queries, pool, positives), positives)
    return _mean_over_positives(jax.nn.logsumexp(scores / temperature, axis=1), own / temperature, positives)


def hardest(queries: Array, pool: Pool, positives: Array, temperature: float) -> Array:
    """Negatives are the HARDEST documents nearest to each query at this step alone, within the guard."""
    scores, own = _guarded(*_scores(queries, pool, positives), positives)
    nearest, _ = jax.lax.top_k(scores, HARDEST)
    return _mean_over_positives(jax.nn.logsumexp(nearest / temperature, axis=1), own / temperature, positives)


def corrected_for_frequency(positives_of: Sequence[Sequence[np.ndarray]], documents: int) -> Loss:
    """Documents that are positives of many train queries count as likelier beforehand (logit adjustment, arXiv 2007.07314)."""
    rows = np.concatenate([own for each in positives_of for own in each])
    prior = jnp.log1p(jnp.asarray(np.bincount(rows, minlength=documents), jnp.float32))

    def loss(queries: Array, pool: Pool, positives: Array, temperature: float) -> Array:
        scores, own = _guarded(*_scores(queries, pool, positives), positives)
        negatives = jax.nn.logsumexp(scores / temperature + prior[None], axis=1)
        return _mean_over_positives(negatives, own / temperature + prior[jnp.maximum(positives, 0)], positives)

    return loss


def _scores(queries: Array, pool: Pool, positives: Array) -> tuple[Array, Array]:
    """Cosines with the pool, _NEVER for a query's positives, and with these, [B, P]."""
    scores = queries @ pool.columns.astype(jnp.float32)
    outside = jnp.where(positives >= 0, positives, scores.shape[1])
    masked = scores.at[jnp.arange(len(queries))[:, None], outside].set(_NEVER, mode="drop")
    return masked, _own(queries, pool, positives)


def _guarded(scores: Array, own: Array, positives: Array) -> tuple[Array, Array]:
    """The same without documents nearer than the guard."""
    best = jnp.where(positives >= 0, own, _NEVER).max(axis=1, keepdims=True)
    return jnp.where(scores < GUARD * best, scores, _NEVER), own


def _own(queries: Array, pool: Pool, positives: Array) -> Array:
    return jnp.einsum("bd,bpd->bp", queries, pool.rows[jnp.maximum(positives, 0)].astype(jnp.float32))


def _mean_over_positives(negatives: Array, own: Array, positives: Array) -> Array:
    """The decoupled softmax from the negatives' log-sum-exp and the positives' scores."""
    present = positives >= 0
    losses = jnp.where(present, jax.nn.softplus(negatives[:, None] - own), 0.0)
    return losses.sum(axis=1) / jnp.maximum(present.sum(axis=1), 1).astype(own.dtype)
