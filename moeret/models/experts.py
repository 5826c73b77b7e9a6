"""The expert bank: low-rank experts stacked along one axis, mixed text by text inside one program.

A bank maps layer -> matrix -> {"a": [E, D_in, R], "b": [E, R, D_out]}. For a text with experts e_s and weights w_s, a
matrix W acts as W + sum_s w_s a[e_s] b[e_s] (LoRA, arXiv 2106.09685, without its constant scale). The factors of the
experts that a batch uses stand side by side as the columns of one product, of which each token takes its text's: nothing
is copied for a text, and the cost depends on the experts in use, not on all there are. Expert 0 is all zeros, the base. Every
expert may be merged with one shared delta, learned from all domains (cf. Twin-Merging, NeurIPS 2024).
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from moeret.config import ExpertConfig
from moeret.models.encoder import Deltas, EncoderConfig, matrix_shapes

Factors = dict[str, Array]
Bank = dict[str, dict[str, Factors]]


MIXED = -1
"""Instead of an expert's number: several, or a part of one."""
MOST_USED = 8
"""Experts that texts which are mixed together use at most: every token is multiplied with the columns of all of them."""


class Mixture(NamedTuple):
    """Which experts a batch uses, and how strongly each of its texts mixes them, and the shared delta."""

    experts: Int[Array, "U"]
    weights: Float[Array, "T U"]
    shared: Float[Array, "T"]


class Shared(NamedTuple):
    """One delta learned from all domains, and how much of it each of the bank's experts is merged with."""

    delta: Bank  # {"a": [D_in, R], "b": [R, D_out]}
    strengths: Float[np.ndarray, "E"]  # 0 for expert 0, the base


def layer_name(layer: int) -> str:
    """The bank's key of a layer."""
    return f"layer_{layer:02d}"


def init_bank(encoder: EncoderConfig, config: ExpertConfig, keys: Sequence[Array]) -> Bank:
    """One new expert per key: `a` random (so that gradients flow), `b` zero (so that it starts as the base)."""
    start = encoder.layers - config.layers
    shapes = matrix_shapes(encoder)
    bank: Bank = {}
    for layer in range(start, encoder.layers):
        factors = bank.setdefault(layer_name(layer), {})
        for number, matrix in enumerate(config.matrices):
            d_in, d_out = shapes[matrix]
            draws = [
                jax.random.normal(jax.random.fold_in(jax.random.fold_in(key, layer), number), (d_in, config.rank))
                for key in keys
            ]
            factors[matrix] = {
                "a": jnp.stack(draws) / jnp.sqrt(jnp.float32(d_in)),
                "b": jnp.zeros((len(keys), config.rank, d_out), jnp.float32),
            }
    return bank


def base_alone(encoder: EncoderConfig, config: ExpertConfig) -> Bank:
    """A bank of expert 0 only, with the trunk that `config` leaves."""
    return jax.tree.map(jnp.zeros_like, init_bank(encoder, config, [jax.random.key(0)]))


def with_base(bank: Bank, *, shared: bool = False) -> Bank:
    """The bank with expert 0, the base, in front, and behind it one for the `shared` delta alone: neither adds its own."""

    def surround(leaf: Array) -> Array:
        zeros = jnp.zeros_like(leaf[:1])
        return jnp.concatenate([zeros, leaf, zeros] if shared else [zeros, leaf])

    return jax.tree.map(surround, bank)


def stack(experts: Sequence[Bank]) -> Bank:
    """A bank [E, ...] out of single experts without a leading axis."""
    return jax.tree.map(lambda *leaves: np.stack(leaves), *experts)


def take(bank: Bank, expert: int) -> Bank:
    """One expert of a bank, without the leading axis, as numpy arrays."""
    return jax.tree.map(lambda leaf: np.asarray(leaf[expert]), bank)


def gather(bank: Bank, shared: Bank | None, mixture: Mixture, texts: Int[Array, "B L"]) -> Deltas:
    """The used experts' factors side by side, the shared delta's behind them, and how much of each column a token takes.

    {"a": [D_in, C], "b": [C, D_out], "weights": [B, L, C]} with C = U * R, and the shared rank if there is one. `texts` says
    whose mix each token has.
    """
    weights, strengths = mixture.weights[texts], mixture.shared[texts]

    def gather_matrix(layer: str, matrix: str) -> dict[str, Array]:
        factors = bank[layer][matrix]
        a, b = factors["a"][mixture.experts], factors["b"][mixture.experts]
        used, d_in, rank = a.shape
        a, b = jnp.moveaxis(a, 1, 0).reshape(d_in, used * rank), b.reshape(used * rank, b.shape[-1])
        columns = jnp.repeat(weights, rank, axis=-1)
        if shared is not None:
            common = shared[layer][matrix]
            a, b = jnp.concatenate([a, common["a"]], axis=1), jnp.concatenate([b, common["b"]])
            of_shared = jnp.broadcast_to(strengths[..., None], (*strengths.shape, len(common["b"])))
            columns = jnp.concatenate([columns, of_shared], axis=-1)
        return {"a": a, "b": b, "weights": columns}

    return {layer: {matrix: gather_matrix(layer, matrix) for matrix in matrices} for layer, matrices in bank.items()}


def joined(one: Bank, other: Bank, strength: float) -> Bank:
    """The sum of two deltas (no leading axis), the second times its strength, as one delta of both ranks."""
    return {
        layer: {
            matrix: {
                "a": np.concatenate([factors["a"], other[layer][matrix]["a"]], axis=1),
                "b": np.concatenate([factors["b"], strength * np.asarray(other[layer][matrix]["b"])]),
            }
            for matrix, factors in matrices.items()
        }
        for layer, matrices in one.items()
    }


def fold(params: nnx.State, delta: Bank, strength: float = 1.0) -> nnx.State:
    """An encoder's parameters with a delta (no leading axis), times its strength, added to the matrices themselves."""
    folded = nnx.to_pure_dict(params)
    for layer, matrices in delta.items():
        for matrix, factors in matrices.items():
            own = folded["layers"][int(layer.removeprefix("layer_"))][matrix]
            own["kernel"] = own["kernel"] + np.asarray(factors["a"]) @ (strength * np.asarray(factors["b"]))
    out = jax.tree.map(lambda leaf: leaf, params)
    nnx.replace_by_pure_dict(out, folded)
    return out


def scaled(bank: Bank, strengths: Float[np.ndarray, "E"]) -> Bank:
    """Every expert's delta times its strength."""
    return {
        layer: {
            matrix: {"a": factors["a"], "b": factors["b"] * jnp.asarray(strengths, jnp.float32)[:, None, None]}
            for matrix, factors in matrices.items()
        }
        for layer, matrices in bank.items()
    }


def trunk_layers(bank: Bank, encoder: EncoderConfig) -> int:
    """How many lower layers no expert of the bank changes: they are read once, whatever the route."""
    return next((layer for layer in range(encoder.layers) if layer_name(layer) in bank), encoder.layers)


def flatten(expert: Bank) -> dict[str, np.ndarray]:
    """One expert as flat tensors named layer.matrix.factor, as its file has them."""
    return {
        f"{layer}.{matrix}.{factor}": np.asarray(array)
        for layer, matrices in expert.items()
        for matrix, factors in matrices.items()
        for factor, array in factors.items()
    }


def unflatten(tensors: dict[str, np.ndarray]) -> Bank:
    """The inverse of `flatten`."""
    expert: Bank = {}
    for name, array in tensors.items():
        layer, matrix, factor = name.split(".")
        expert.setdefault(layer, {}).setdefault(matrix, {})[factor] = array
    return expert


def few_experts(experts: Int[np.ndarray, "B S"], weights: Float[np.ndarray, "B S"]) -> Iterator[Int[np.ndarray, "_"]]:
    """Texts in groups that use MOST_USED experts at most together, but for a text that alone uses more."""
    used = [frozenset(own[weight != 0].tolist()) for own, weight in zip(experts, weights, strict=True)]
    group: list[int] = []
    together: frozenset[int] = frozenset()
    for row in sorted(range(len(used)), key=lambda row: sorted(used[row])):
        if group and len(together | used[row]) > MOST_USED:
            yield np.array(group)
            group, together = [], frozenset()
        group.append(row)
        together |= used[row]
    if group:
        yield np.array(group)


def only_experts(experts: Int[np.ndarray, "B S"], weights: Float[np.ndarray, "B S"]) -> dict[int, Int[np.ndarray, "_"]]:
    """The rows that use just one expert, wholly, by that expert (0 also for none), and the others as MIXED."""
    first = np.argmax(weights, axis=1)
    best = np.take_along_axis(weights, first[:, None], axis=1)[:, 0]
    one = (weights != 0).sum(axis=1) == 1
    only = np.take_along_axis(experts, first[:, None], axis=1)[:, 0]
    only = np.where(one & (best == 1), only, np.where(weights.any(axis=1), MIXED, 0))
    return {expert: np.flatnonzero(only == expert) for expert in np.unique(only).tolist()}
