"""One training step as pure functions: gradients add up over the experts' batches, then one update.

Each expert's gradient is clipped to a norm that it practically always exceeds: a domain with many positives a query has
gradients ten times as long as another's, and one delta that all domains train in turn would follow it, and diverge.

A batch is of one expert, and its rows weigh 1 / batch_size, so the gradient of an expert, and with an elementwise
optimizer its whole path, is the same whether it trains alone or beside others on the same pool of documents.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int

from moeret.config import TrainConfig
from moeret.models.encoder import EncoderConfig, unit, with_params
from moeret.models.experts import Bank
from moeret.models.mesh import keep_whole
from moeret.training.losses import Pool, decoupled_softmax, pooled_decoupled_softmax

MAX_NORM = 1.0
"""Of an expert's gradient, over all its matrices."""


class Static(NamedTuple):
    """What a step's programs are compiled for, beside shapes."""

    encoder: EncoderConfig
    layers: int  # of the trunk
    temperature: float
    mini_batch_size: int
    mesh: Mesh


class TextBatch(NamedTuple):
    """Padded token ids and their lengths."""

    ids: Int[Array, "B L"]
    lengths: Int[Array, "B"]


class QueryBatch(NamedTuple):
    """Rows for query-tower training; filler rows have weight 0."""

    queries: TextBatch
    weights: Float[Array, "B"]
    positives: Int[Array, "B P"]  # rows of the document pool, -1 where there is none


class Chunk(NamedTuple):
    """Texts of alike lengths, and which of their batch's vectors they are; spare texts are none of them."""

    texts: TextBatch
    places: Int[Array, "S"]


class PairBatch(NamedTuple):
    """Rows for training both towers. Of its vectors the first B are the queries', then come M documents'."""

    chunks: tuple[Chunk, ...]
    weights: Float[Array, "B"]
    positives: Bool[Array, "B M"]  # which documents are relevant to which query


class Frozen(NamedTuple):
    """What a step reads and never changes."""

    params: Any  # the encoder's, matrices in the precision of the products
    pool: Pool | None  # unit base vectors of every document; None when both towers train


class TrainState(NamedTuple):
    """What a step changes."""

    bank: Bank  # experts 1..E, without the base
    opt_state: optax.OptState


class Totals(NamedTuple):
    """What the batches of one step add up to."""

    gradients: Bank
    losses: Float[Array, "E"]


def make_optimizer(config: TrainConfig) -> optax.GradientTransformation:
    """AdamW before its rate; elementwise, so experts never mix."""
    return optax.chain(optax.scale_by_adam(), optax.add_decayed_weights(config.weight_decay))


def learning_rates(config: TrainConfig, limits: Int[np.ndarray, "E"], step: int) -> Float[np.ndarray, "E"]:
    """Each expert's rate in a step (counted from 0): a linear warm-up, then a cosine that ends in zero at its limit."""
    warm = np.maximum(1, np.round(config.warmup * limits))
    falling = 0.5 + 0.5 * np.cos(np.pi * (step - warm) / np.maximum(1, limits - warm))
    share = np.where(step < warm, (step + 1) / warm, falling)
    return (config.learning_rate * np.where(step < limits, share, 0)).astype(np.float32)


def zero_totals(bank: Bank) -> Totals:
    """Nothing added up yet, on the bank's devices."""
    return _zeros(jax.tree.leaves(bank)[0].sharding)(bank)


@functools.cache
def _zeros(sharding: jax.sharding.Sharding) -> Callable[[Bank], Totals]:
    def zeros(bank: Bank) -> Totals:
        experts = jax.tree.leaves(bank)[0].shape[0]
        return Totals(jax.tree.map(jnp.zeros_like, bank), jnp.zeros(experts, jnp.float32))

    return jax.jit(zeros, out_shardings=sharding)


def _trunk(static: Static, params: Any, texts: TextBatch) -> Float[Array, "B L D"]:
    """What no expert changes, and no gradient flows into."""
    return jax.lax.stop_gradient(with_params(static.encoder, params).trunk(texts.ids, texts.lengths, static.layers))


def _branch(
    static: Static, params: Any, expert: Bank, lengths: Int[Array, "B"], hidden: Float[Array, "B L D"]
) -> Float[Array, "B D"]:
    """Unit embeddings by one expert."""
    return unit(with_params(static.encoder, params).branch(hidden, lengths, static.layers, expert))


def in_parts(function: Callable[[Any], Array], rows: Any, size: int) -> Array:
    """`function` of a tree's rows, at most `size` at a time, in the memory of one part.

    Each part is worked on once more for its gradient (GradCache, arXiv 2101.06983), which is the whole's. Rows of one device
    stay there: of so many parts, each takes every so-manieth row.
    """
    count = len(jax.tree.leaves(rows)[0])
    if count <= size:
        return function(rows)
    parts = next(number for number in range(-(-count // size), count + 1) if count % number == 0)
    split = jax.tree.map(lambda leaf: leaf.reshape(count // parts, parts, *leaf.shape[1:]).swapaxes(0, 1), rows)
    done = jax.lax.map(jax.checkpoint(function, prevent_cse=False), split)
    return done.swapaxes(0, 1).reshape(count, *done.shape[2:])


def add_batch(
    static: Static,
    frozen: Frozen,
    bank: Bank,
    totals: Totals,
    expert: Int[Array, ""],
    batch: QueryBatch | PairBatch,
) -> Totals:
    """Adds a batch's gradients and loss, all of one expert, to the totals, whose arrays it takes."""
    if isinstance(batch, QueryBatch):
        return add_queries(static, frozen, bank, totals, expert, batch)
    kept, pulls = len(batch.weights) <= static.mini_batch_size, []
    shape = (sum(batch.positives.shape), static.encoder.width)
    vectors = jnp.zeros(shape, jnp.float32, device=batch.weights.sharding)
    for chunk in batch.chunks:
        vectors, pull = _encode(static, kept, frozen.params, bank, expert, chunk, vectors)
        pulls.append(pull)
    value, gradients = _pair_loss(static, vectors, batch.weights, batch.positives)
    for chunk, pull in zip(batch.chunks, pulls, strict=True):
        totals = _pull_back(static, frozen.params, bank, totals, expert, chunk, pull, gradients)
    return totals._replace(losses=totals.losses.at[expert].add(value))


@jax.jit(static_argnames=("static",), donate_argnames=("totals",))
def add_queries(
    static: Static, frozen: Frozen, bank: Bank, totals: Totals, expert: Int[Array, ""], batch: QueryBatch
) -> Totals:
    """The same where documents are constant: one program."""

    def loss(own: Bank) -> Float[Array, ""]:
        def embed(texts: TextBatch) -> Float[Array, "B D"]:
            return _branch(static, frozen.params, own, texts.lengths, _trunk(static, frozen.params, texts))

        def of_rows(part: tuple[Array, Array]) -> Float[Array, "B"]:
            return pooled_decoupled_softmax(part[0], frozen.pool, part[1], static.temperature)

        queries = in_parts(embed, batch.queries, static.mini_batch_size)
        return (in_parts(of_rows, (queries, batch.positives), static.mini_batch_size) * batch.weights).sum()

    value, gradients = jax.value_and_grad(loss)(_take(bank, expert))
    total = Totals(_add(totals.gradients, expert, gradients), totals.losses.at[expert].add(value))
    return keep_whole(static.mesh, total)


@jax.jit(static_argnames=("static", "kept"), donate_argnames=("vectors",))
def _encode(
    static: Static,
    kept: bool,
    params: Any,
    bank: Bank,
    expert: Int[Array, ""],
    chunk: Chunk,
    vectors: Float[Array, "B+M D"],
) -> tuple[Float[Array, "B+M D"], Any]:
    """Puts a chunk's vectors in their places; if `kept`, also what pulls their gradient back."""
    embed = _embed_chunk(static, params, chunk)
    out, pull = jax.vjp(embed, _take(bank, expert)) if kept else (embed(_take(bank, expert)), None)
    return vectors.at[chunk.places].set(out, mode="drop"), pull


@jax.jit(static_argnames=("static",), donate_argnames=("totals",))
def _pull_back(
    static: Static,
    params: Any,
    bank: Bank,
    totals: Totals,
    expert: Int[Array, ""],
    chunk: Chunk,
    pull: Any,
    gradients: Float[Array, "B+M D"],
) -> Totals:
    """Adds the expert's gradient by a chunk's vectors; without `pull` the chunk is encoded again (GradCache)."""
    if pull is None:
        pull = jax.vjp(_embed_chunk(static, params, chunk), _take(bank, expert))[1]
    (own,) = pull(gradients.at[chunk.places].get(mode="fill", fill_value=0.0))
    return keep_whole(static.mesh, totals._replace(gradients=_add(totals.gradients, expert, own)))


@jax.jit(static_argnames=("static",))
def _pair_loss(
    static: Static, vectors: Float[Array, "B+M D"], weights: Float[Array, "B"], positives: Bool[Array, "B M"]
) -> tuple[Float[Array, ""], Float[Array, "B+M D"]]:
    """The loss and its gradient by every vector."""

    def loss(vectors: Array) -> Array:
        queries, documents = vectors[: len(weights)], vectors[len(weights) :]

        def of_rows(part: tuple[Array, Array]) -> Float[Array, "B"]:
            return decoupled_softmax(part[0] @ documents.T / static.temperature, part[1])

        return (in_parts(of_rows, (queries, positives), static.mini_batch_size) * weights).sum()

    return jax.value_and_grad(loss)(vectors)


def _embed_chunk(static: Static, params: Any, chunk: Chunk) -> Callable[[Bank], Float[Array, "S D"]]:
    hidden = _trunk(static, params, chunk.texts)
    return lambda own: _branch(static, params, own, chunk.texts.lengths, hidden)


def _take(bank: Bank, expert: Int[Array, ""]) -> Bank:
    return jax.tree.map(lambda leaf: leaf[expert], bank)


def _add(totals: Bank, expert: Int[Array, ""], gradients: Bank) -> Bank:
    return jax.tree.map(lambda total, own: total.at[expert].add(own), totals, gradients)


@jax.jit(static_argnames=("mesh", "optimizer"), donate_argnames=("state",))
def update(
    mesh: Mesh,
    optimizer: optax.GradientTransformation,
    state: TrainState,
    gradients: Bank,
    rates: Float[Array, "E"],
) -> TrainState:
    """One optimizer step of clipped gradients, each expert at its own rate; 0 leaves its weights as they are."""
    norms = jnp.sqrt(sum((leaf**2).sum(axis=(1, 2)) for leaf in jax.tree.leaves(gradients)))
    clip = (MAX_NORM / jnp.maximum(norms, MAX_NORM))[:, None, None]
    clipped = jax.tree.map(lambda leaf: leaf * clip, gradients)
    with jax.numpy_dtype_promotion("standard"):  # optax's bias correction raises a float to an integer count
        updates, opt_state = optimizer.update(clipped, state.opt_state, state.bank)
    updates = jax.tree.map(lambda leaf: -rates[:, None, None] * leaf, updates)
    return keep_whole(mesh, TrainState(optax.apply_updates(state.bank, updates), opt_state))
