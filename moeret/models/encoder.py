"""The base: a BERT-family transformer encoder as a flax nnx module.

It runs in two halves so that a query's lower layers are computed once: `trunk` up to the first layer that experts
change, and `branch` from there to the pooled embedding, with deltas, or each text's mix of them, added to the matrices.
"""

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

_ERF_END, _ERF_DEGREE = 5.2, 16
"""Where erf(x / sqrt 2) is 1 in float32, and the least degree that is as exact below as XLA's erf."""


@functools.cache
def _erf_coefficients() -> tuple[np.float32, ...]:
    """Of erf(x / sqrt 2) / x in powers of u = 2 (x / end)^2 - 1, interpolated at Chebyshev's points."""
    u = np.polynomial.chebyshev.chebpts1(4 * _ERF_DEGREE)
    x = _ERF_END * np.sqrt((u + 1) / 2)
    exact = np.array([math.erf(own / math.sqrt(2)) / own for own in x])
    fitted = np.polynomial.chebyshev.chebfit(u, exact, _ERF_DEGREE)
    return tuple(np.polynomial.chebyshev.cheb2poly(fitted).astype(np.float32))


def _normal_cdf(x: Array) -> Array:
    """The chance that a standard normal is below x, by products and sums alone: a CPU does them faster than an erf."""
    z = jnp.clip(x, -_ERF_END, _ERF_END)
    u, value = z * z * np.float32(2 / _ERF_END**2) - 1, np.float32(0)
    for coefficient in reversed(_erf_coefficients()):
        value = value * u + coefficient
    return 0.5 + 0.5 * z * value


@jax.custom_jvp
def gelu(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """X times the chance that a standard normal is below x (arXiv 1606.08415), off by 1e-6 and 2e-7 of x at most."""
    return x * _normal_cdf(x)


@gelu.defjvp
def _gelu_jvp(primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
    ((x,), (dx,)) = primals, tangents
    chance = _normal_cdf(x)
    density = jnp.exp(-0.5 * x * x) * np.float32(1 / math.sqrt(2 * math.pi))
    return x * chance, dx * (chance + x * density)


ACTIVATIONS = {
    "gelu": gelu,
    "gelu_new": lambda x: jax.nn.gelu(x, approximate=True),
    "gelu_pytorch_tanh": lambda x: jax.nn.gelu(x, approximate=True),
    "relu": jax.nn.relu,
}
_MASKED = -1e9

Deltas = Mapping[str, Mapping[str, Mapping[str, Array]]]
"""layer -> matrix -> low-rank factors {"a": [D_in, C], "b": [C, D_out]}; "weights" [B, L, C], if given, say how much of
each column a token takes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EncoderConfig:
    """Shape and pooling of a BERT-family encoder."""

    vocabulary: int
    width: int
    layers: int
    heads: int
    mlp_width: int
    positions: int
    token_types: int
    layer_norm_eps: float
    activation: str
    pooling: Literal["mean", "cls"]
    normalize: bool
    """Whether the model's own pipeline ends in unit vectors."""


def matrix_shapes(config: EncoderConfig) -> dict[str, tuple[int, int]]:
    """(D_in, D_out) of every matrix of a layer that an expert can change."""
    width, mlp = config.width, config.mlp_width
    square = dict.fromkeys(("query", "key", "value", "attention_output"), (width, width))
    return {**square, "mlp_in": (width, mlp), "mlp_out": (mlp, width)}


def cast_kernels(params: nnx.State, dtype: jnp.dtype) -> nnx.State:
    """Parameters with the layers' matrices in another precision; everything else stays float32."""
    return jax.tree.map_with_path(
        lambda path, leaf: leaf.astype(dtype) if any(getattr(key, "key", None) == "kernel" for key in path) else leaf,
        params,
    )


def _project(linear: nnx.Linear, x: Array, delta: Mapping[str, Array] | None) -> Array:
    """The linear map with its delta; products are in the kernel's precision, their sums in float32."""
    kernel, bias = linear.kernel[...], linear.bias[...][None, None]
    if delta is None:
        return _frozen_product(x, kernel) + bias
    a, b = delta["a"], delta["b"]
    if "weights" in delta:
        return _frozen_product(x, kernel) + bias + _dot(_dot(x, a, kernel.dtype) * delta["weights"], b, kernel.dtype)
    if _merging_pays(x, a, b):
        return _merged(x, kernel, a, b) + bias
    return _frozen_product(x, kernel) + bias + _low_rank(kernel.dtype, x, a, b)


def _dot(x: Array, y: Array, dtype: jnp.dtype) -> Array:
    return jnp.matmul(x.astype(dtype), y.astype(dtype), preferred_element_type=jnp.float32)


@jax.custom_vjp
def _frozen_product(x: Float[Array, "B L I"], kernel: Float[Array, "I O"]) -> Float[Array, "B L O"]:
    """X kernel, with the gradient's product in the kernel's precision too; the kernel itself is a constant."""
    return _dot(x, kernel, kernel.dtype)


def _frozen_forward(x: Array, kernel: Array) -> tuple[Array, Array]:
    return _dot(x, kernel, kernel.dtype), kernel


def _frozen_backward(kernel: Array, g: Array) -> tuple[Array, None]:
    return _dot(g, kernel.T, kernel.dtype), None


_frozen_product.defvjp(_frozen_forward, _frozen_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _low_rank(
    dtype: jnp.dtype, x: Float[Array, "B L I"], a: Float[Array, "I R"], b: Float[Array, "R O"]
) -> Float[Array, "B L O"]:
    """X a b, with the gradients' products ordered so that only [tokens, R] arrays are transposed.

    Left to itself XLA on a CPU transposes the [tokens, I] and [tokens, O] ones.
    """
    return _dot(_dot(x, a, dtype), b, dtype)


def _low_rank_forward(dtype, x: Array, a: Array, b: Array) -> tuple[Array, tuple[Array, Array, Array, Array]]:
    h = _dot(x, a, dtype)
    return _dot(h, b, dtype), (x, a, b, h)


def _low_rank_backward(dtype, residuals: tuple[Array, Array, Array, Array], g: Array) -> tuple[Array, Array, Array]:
    x, a, b, h = residuals
    g_h = _dot(g, b.T, dtype)
    tokens = (-1, h.shape[-1])
    da = _dot(g_h.reshape(tokens).T, x.reshape(-1, x.shape[-1]), dtype).T
    db = _dot(h.reshape(tokens).T, g.reshape(-1, g.shape[-1]), dtype)
    return _dot(g_h, a.T, dtype), da, db


_low_rank.defvjp(_low_rank_forward, _low_rank_backward)


@jax.custom_vjp
def _merged(
    x: Float[Array, "B L I"], kernel: Float[Array, "I O"], a: Float[Array, "I R"], b: Float[Array, "R O"]
) -> Float[Array, "B L O"]:
    """X (kernel + a b), with the gradient of the sum pulled back to a and b; the kernel itself is a constant."""
    return _dot(x, _sum(kernel, a, b), kernel.dtype)


def _sum(kernel: Array, a: Array, b: Array) -> Array:
    return (kernel.astype(jnp.float32) + _dot(a, b, kernel.dtype)).astype(kernel.dtype)


def _merged_forward(x: Array, kernel: Array, a: Array, b: Array) -> tuple[Array, tuple[Array, Array, Array, Array]]:
    merged = _sum(kernel, a, b)
    return _dot(x, merged, kernel.dtype), (x, merged, a, b)


def _merged_backward(residuals: tuple[Array, Array, Array, Array], g: Array) -> tuple[Array, None, Array, Array]:
    x, merged, a, b = residuals
    dtype, (d_in, d_out) = merged.dtype, merged.shape
    rows, columns = x.reshape(-1, d_in), g.reshape(-1, d_out)  # the narrower one is transposed
    d = _dot(rows.T, columns, dtype) if d_in <= d_out else _dot(columns.T, rows, dtype).T
    return _dot(g, merged.T, dtype), None, _dot(d, b.T, dtype), _dot(a.T, d, dtype)


_merged.defvjp(_merged_forward, _merged_backward)


def _merging_pays(x: Array, a: Array, b: Array) -> bool:
    """Whether `_merged` multiplies less than `_low_rank`, forward and backward together."""
    tokens, (d_in, rank), d_out = x.size // x.shape[-1], a.shape, b.shape[-1]
    return tokens * d_in * d_out + 3 * d_in * rank * d_out < 3 * tokens * rank * (d_in + d_out)


class Layer(nnx.Module):
    """One post-norm transformer layer (BERT, arXiv 1810.04805)."""

    def __init__(self, config: EncoderConfig, *, rngs: nnx.Rngs):
        for name, (d_in, d_out) in matrix_shapes(config).items():
            setattr(self, name, nnx.Linear(d_in, d_out, rngs=rngs))
        norm = {"epsilon": config.layer_norm_eps, "use_fast_variance": False, "rngs": rngs}
        self.attention_norm = nnx.LayerNorm(config.width, **norm)
        self.mlp_norm = nnx.LayerNorm(config.width, **norm)
        self.heads = config.heads
        self.activation = ACTIVATIONS[config.activation]

    def __call__(
        self, x: Float[Array, "B L D"], bias: Float[Array, "B 1 _ L"], deltas: Mapping[str, Mapping[str, Array]]
    ) -> Float[Array, "B L D"]:
        """One layer; `bias` is added to the attention logits, `deltas` maps matrices to low-rank factors."""

        def project(name: str, inputs: Array) -> Array:
            return _project(getattr(self, name), inputs, deltas.get(name))

        mixed = _attention(*(project(name, x) for name in ("query", "key", "value")), bias, self.heads)
        x = self.attention_norm(x + project("attention_output", mixed))
        return self.mlp_norm(x + project("mlp_out", self.activation(project("mlp_in", x))))


def _attention(
    q: Float[Array, "B L D"],
    k: Float[Array, "B L D"],
    v: Float[Array, "B L D"],
    bias: Float[Array, "B 1 _ L"],
    heads: int,
) -> Float[Array, "B L D"]:
    """Softmax attention, divided by the sum of powers after the product with `v`.

    Heads stand before positions and the division comes last, so that XLA keeps the [B, H, L, L] powers in the layout that
    both products want; on a CPU the textbook order copies them.
    """
    rows, length, width = q.shape
    q, k, v = (x.reshape(rows, length, heads, width // heads).transpose(0, 2, 1, 3) for x in (q, k, v))
    logits = (q / jnp.sqrt(jnp.float32(width // heads))) @ k.transpose(0, 1, 3, 2) + bias
    powers = jnp.exp(logits - jax.lax.stop_gradient(logits.max(axis=-1, keepdims=True)))
    mixed = (powers @ v) / powers.sum(axis=-1, keepdims=True)
    return mixed.transpose(0, 2, 1, 3).reshape(rows, length, width)


class Encoder(nnx.Module):
    """Token ids to embeddings."""

    def __init__(self, config: EncoderConfig, *, rngs: nnx.Rngs):
        self.config = config
        self.words = nnx.Embed(config.vocabulary, config.width, rngs=rngs)
        self.positions = nnx.Embed(config.positions, config.width, rngs=rngs)
        self.token_types = nnx.Embed(config.token_types, config.width, rngs=rngs)
        self.norm = nnx.LayerNorm(config.width, epsilon=config.layer_norm_eps, use_fast_variance=False, rngs=rngs)
        self.layers = nnx.List([Layer(config, rngs=rngs) for _ in range(config.layers)])

    def trunk(self, ids: Int[Array, "B L"], lengths: Int[Array, "B"], layers: int) -> Float[Array, "B L D"]:
        """Hidden states after the first `layers` layers, which no expert touches."""
        x, bias = self._embed(ids, jnp.arange(ids.shape[1])[None]), _attention_bias(lengths, ids.shape[1])
        return self._run(x, bias, 0, layers, {})

    def packed_trunk(
        self, ids: Int[Array, "B L"], texts: Int[Array, "B L"], positions: Int[Array, "B L"], layers: int
    ) -> Float[Array, "B L D"]:
        """The same for texts that stand one behind another in the rows.

        `texts` says which one each token is of, -1 for none, and `positions` where in it: tokens attend to those of their own text.
        """
        return self._run(self._embed(ids, positions), _within_texts(texts), 0, layers, {})

    def branch(
        self, x: Float[Array, "B L D"], lengths: Int[Array, "B"], layers: int, deltas: Deltas
    ) -> Float[Array, "B D"]:
        """Embeddings from hidden states after `layers` layers, with deltas on the upper ones."""
        x = self._run(x, _attention_bias(lengths, x.shape[1]), layers, len(self.layers), deltas)
        pooled = x[:, 0] if self.config.pooling == "cls" else mean_token(x, lengths)
        return unit(pooled) if self.config.normalize else pooled

    def packed_branch(
        self, x: Float[Array, "B L D"], texts: Int[Array, "B L"], count: int, layers: int, deltas: Deltas
    ) -> Float[Array, "count D"]:
        """Embeddings of `count` texts that stand one behind another in the rows, as in `packed_trunk`."""
        x = self._run(x, _within_texts(texts), layers, len(self.layers), deltas)
        first = texts != jnp.pad(texts[:, :-1], ((0, 0), (1, 0)), constant_values=-1)
        counted = first if self.config.pooling == "cls" else jnp.ones_like(first)
        place = jnp.where(counted & (texts >= 0), texts, count).reshape(-1)  # one that is not there is left out
        sums = jax.ops.segment_sum(x.reshape(-1, x.shape[-1]), place, count)
        sizes = jax.ops.segment_sum(jnp.ones_like(place), place, count).astype(x.dtype)
        pooled = sums / jnp.maximum(sizes, 1.0)[:, None]
        return unit(pooled) if self.config.normalize else pooled

    def _embed(self, ids: Int[Array, "B L"], positions: Int[Array, "_ L"]) -> Float[Array, "B L D"]:
        return self.norm(self.words(ids) + (self.positions(positions) + self.token_types(jnp.zeros_like(positions))))

    def _run(
        self, x: Float[Array, "B L D"], bias: Float[Array, "B 1 _ L"], start: int, end: int, deltas: Deltas
    ) -> Float[Array, "B L D"]:
        for number, layer in enumerate(self.layers[start:end], start=start):
            x = layer(x, bias, deltas.get(f"layer_{number:02d}", {}))
        return x


@functools.cache
def skeleton(config: EncoderConfig) -> tuple[nnx.GraphDef, nnx.State]:
    """An encoder's graph and the shapes of its parameters, without arrays."""
    return nnx.split(nnx.eval_shape(lambda: Encoder(config, rngs=nnx.Rngs(0))), nnx.Param)


def with_params(config: EncoderConfig, params: nnx.State) -> Encoder:
    """The encoder with these parameters, inside a jitted function too: a config hashes fast, a graph does not."""
    return nnx.merge(skeleton(config)[0], params)


def _attention_bias(lengths: Int[Array, "B"], length: int) -> Float[Array, "B 1 1 L"]:
    kept = jnp.arange(length)[None] < lengths[:, None]
    return jnp.where(kept, 0.0, _MASKED).astype(jnp.float32)[:, None, None, :]


def _within_texts(texts: Int[Array, "B L"]) -> Float[Array, "B 1 L L"]:
    same = texts[:, None, :, None] == texts[:, None, None, :]
    return jnp.where(same, 0.0, _MASKED).astype(jnp.float32)


def mean_token(x: Float[Array, "B L D"], lengths: Int[Array, "B"]) -> Float[Array, "B D"]:
    """The mean of each row's tokens, padding left out."""
    kept = (jnp.arange(x.shape[1])[None] < lengths[:, None])[..., None].astype(x.dtype)
    return (x * kept).sum(1) / lengths[:, None].astype(x.dtype)


def token_moments(x: Float[Array, "B L D"], lengths: Int[Array, "B"]) -> Float[Array, "B 2*D"]:
    """The mean of each row's tokens, then their standard deviation, padding left out.

    Statistics pooling, as in x-vectors (Snyder et al., ICASSP 2018).
    """
    mean = mean_token(x, lengths)
    return jnp.concatenate([mean, jnp.sqrt(mean_token((x - mean[:, None]) ** 2, lengths))], axis=1)


def unit(vectors: Float[Array, "B D"]) -> Float[Array, "B D"]:
    """Vectors scaled to length 1; a zero vector stays zero."""
    return vectors / jnp.maximum(jnp.linalg.norm(vectors, axis=-1, keepdims=True), 1e-12)
