"""The transformer: padding, gradients, and its faster formulas against the plain ones."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from moeret.config import MATRICES, ExpertConfig
from moeret.data.buckets import Pack, packs
from moeret.models import experts
from moeret.models.encoder import (
    Encoder,
    EncoderConfig,
    _attention,
    _attention_bias,
    _frozen_product,
    _low_rank,
    _merged,
    _merging_pays,
    gelu,
    unit,
)
from moeret.models.experts import Mixture

CONFIG = EncoderConfig(
    vocabulary=50, width=16, layers=2, heads=2, mlp_width=24, positions=64, token_types=2, layer_norm_eps=1e-12,
    activation="gelu", pooling="mean", normalize=False,
)  # fmt: skip
LENGTHS = (12, 1, 7)


def test_gelu_and_its_gradient_are_those_of_the_error_function():
    x = np.concatenate([np.linspace(-8, 8, 20_001), [-1e4, -40, -0.0, 0.0, 40, 1e4]]).astype(np.float32)
    chance = np.array([0.5 * (1 + math.erf(own / math.sqrt(2))) for own in x.astype(float)])
    slope = chance + x * np.exp(-(x.astype(float) ** 2) / 2) / math.sqrt(2 * math.pi)
    assert (np.abs(jax.jit(gelu)(x) - x * chance) <= 1e-6 + 2e-7 * np.abs(x)).all()
    np.testing.assert_allclose(jax.vmap(jax.grad(gelu))(x), slope, atol=1e-6)


def make_encoder(config: EncoderConfig) -> Encoder:
    """An encoder whose random weights are large enough for every part to matter."""
    graph, params = nnx.split(Encoder(config, rngs=nnx.Rngs(0)), nnx.Param)
    return nnx.merge(graph, jax.tree.map(lambda leaf: leaf * 2.0 + 0.1, params))


def random_bank(count: int) -> experts.Bank:
    """Experts that change every matrix of both layers."""
    random = np.random.default_rng(1)
    keys = list(jax.random.split(jax.random.key(0), count))
    bank = experts.init_bank(CONFIG, ExpertConfig(rank=3, layers=2), keys)
    return jax.tree.map(lambda leaf: jnp.asarray(0.2 * random.normal(size=leaf.shape), jnp.float32), bank)


def encode(encoder: Encoder, texts: list[np.ndarray], edge: int, rows: int) -> np.ndarray:
    """Embeddings of token ids in a batch of this shape, every spare place filled with tokens that must not matter."""
    ids = np.random.default_rng(edge * rows).integers(0, CONFIG.vocabulary, (rows, edge)).astype(np.int32)
    lengths = np.full(rows, edge, np.int32)
    for row, text in enumerate(texts):
        ids[row, : len(text)], lengths[row] = text, len(text)
    graph, params = nnx.split(encoder)
    return np.asarray(_encode(graph, params, jnp.asarray(ids), jnp.asarray(lengths)))[: len(texts)]


@jax.jit(static_argnames="graph")
def _encode(graph, params, ids, lengths):
    encoder = nnx.merge(graph, params)
    return encoder.branch(encoder.trunk(ids, lengths, 0), lengths, 0, {})


@pytest.mark.parametrize("pooling", ["mean", "cls"])
def test_padding_never_changes_an_embedding(pooling):
    encoder = make_encoder(dataclasses.replace(CONFIG, layers=1, pooling=pooling))
    random = np.random.default_rng(0)
    texts = [random.integers(0, CONFIG.vocabulary, length).astype(np.int32) for length in LENGTHS]
    alone = np.concatenate([encode(encoder, [text], len(text), 1) for text in texts])
    assert np.abs(alone[:, None] - alone[None]).max(-1)[~np.eye(len(texts), dtype=bool)].min() > 1e-2
    for edge, rows in ((12, 3), (64, 8)):
        np.testing.assert_allclose(encode(encoder, texts, edge, rows), alone, atol=1e-5)


def test_where_trunk_and_branch_meet_does_not_matter():
    encoder = make_encoder(CONFIG)
    ids, lengths = jnp.arange(12, dtype=jnp.int32).reshape(2, 6), jnp.array([6, 4], jnp.int32)
    whole = encoder.branch(encoder.trunk(ids, lengths, 0), lengths, 0, {})
    for split in (1, 2):
        halves = encoder.branch(encoder.trunk(ids, lengths, split), lengths, split, {})
        np.testing.assert_allclose(halves, whole, atol=1e-6)


@pytest.mark.parametrize("pooling", ["mean", "cls"])
def test_packed_texts_get_the_vectors_that_they_have_alone(pooling):
    encoder = make_encoder(dataclasses.replace(CONFIG, pooling=pooling))
    random = np.random.default_rng(0)
    texts = [random.integers(0, CONFIG.vocabulary, length).astype(np.int32) for length in (9, 4, 1, 12, 2, 6, 7)]
    out = np.empty((len(texts), CONFIG.width), np.float32)
    for pack in packs(np.array([len(text) for text in texts]), 32):
        pack = Pack([row for own in pack.rows for row in (own[::2], own[1::2])], pack.length)  # a second row, and room
        order, ids, places, positions = pack.arrays(texts)
        ids[places < 0] = 7  # which must not matter
        states = encoder.packed_trunk(jnp.asarray(ids), jnp.asarray(places), jnp.asarray(positions), 1)
        found = encoder.packed_branch(states, jnp.asarray(places), pack.most, 1, {})
        out[order] = np.asarray(unit(found))[: len(order)]
    for text, own in zip(texts, out, strict=True):
        ids, lengths = jnp.asarray(text)[None], jnp.array([len(text)])
        alone = unit(encoder.branch(encoder.trunk(ids, lengths, 1), lengths, 1, {}))[0]
        np.testing.assert_allclose(own, alone, atol=2e-6)


@pytest.mark.parametrize("shared", [True, False])
def test_gradient_reaches_every_matrix_of_an_expert(shared):
    encoder, bank = make_encoder(CONFIG), random_bank(2)
    ids, lengths = jnp.arange(24, dtype=jnp.int32).reshape(4, 6), jnp.array([6, 4, 5, 6], jnp.int32)
    x = encoder.trunk(ids, lengths, 0)
    direction = jnp.asarray(np.random.default_rng(2).normal(size=(4, CONFIG.width)), jnp.float32)
    mixture = Mixture(jnp.arange(2), jnp.full((4, 2), 0.5, jnp.float32), jnp.zeros(4, jnp.float32))
    texts = jnp.broadcast_to(jnp.arange(4)[:, None], ids.shape)

    def loss(tree: experts.Bank) -> jax.Array:
        deltas = jax.tree.map(lambda leaf: leaf[0], tree) if shared else experts.gather(tree, None, mixture, texts)
        return (encoder.branch(x, lengths, 0, deltas) * direction).sum()

    gradient = experts.flatten(jax.jit(jax.grad(loss))(bank))
    assert len(gradient) == CONFIG.layers * len(MATRICES) * 2
    for name, leaf in gradient.items():
        for expert in [0] if shared else [0, 1]:
            assert np.linalg.norm(leaf[expert]) > 1e-4, (name, expert)


@pytest.mark.parametrize("shape", [(1, 1, 4, 1, 3), (3, 5, 8, 2, 6), (2, 7, 6, 6, 6)])
def test_a_products_own_gradient_is_that_of_the_plain_formula(shape):
    rows, length, d_in, rank, d_out = shape
    random = np.random.default_rng(0)
    x, a, b, g = (
        jnp.asarray(random.normal(size=size), jnp.float32)
        for size in ((rows, length, d_in), (d_in, rank), (rank, d_out), (rows, length, d_out))
    )
    kernel = jnp.asarray(random.normal(size=(d_in, d_out)), jnp.float32)
    plain_value, plain_pull = jax.vjp(lambda x, a, b: x @ kernel + (x @ a) @ b, x, a, b)
    products = (
        lambda x, a, b: _frozen_product(x, kernel) + _low_rank(jnp.float32, x, a, b),
        lambda x, a, b: _merged(x, kernel, a, b),
    )
    for product in products:
        value, pull = jax.vjp(product, x, a, b)
        np.testing.assert_allclose(value, plain_value, rtol=1e-5, atol=1e-5)
        for own, plain in zip(pull(g), plain_pull(g), strict=True):
            np.testing.assert_allclose(own, plain, rtol=1e-4, atol=1e-5)


def test_a_delta_is_merged_with_its_matrix_where_that_is_cheaper():
    """Many tokens and a large rank: adding the matrices once; a small rank: two thin products."""
    x = jnp.ones((32, 24, 384), jnp.float32)
    for rank, d_out, merged in ((16, 384, False), (16, 1536, False), (224, 384, True), (224, 1536, True)):
        assert _merging_pays(x, jnp.ones((384, rank)), jnp.ones((rank, d_out))) == merged
    assert not _merging_pays(x[:1], jnp.ones((384, 224)), jnp.ones((224, 1536)))  # a handful of tokens


def textbook_attention(q: np.ndarray, k: np.ndarray, v: np.ndarray, lengths: np.ndarray, heads: int) -> np.ndarray:
    """softmax(q k / sqrt(d)) v over each row's own tokens, row by row and head by head, in float64."""
    out = np.zeros(q.shape)
    size = q.shape[-1] // heads
    for row, length in enumerate(lengths):
        for head in range(heads):
            part = slice(head * size, (head + 1) * size)
            own_q, own_k, own_v = (x[row, :, part].astype(np.float64) for x in (q, k, v))
            logits = own_q @ own_k[:length].T / np.sqrt(size)
            powers = np.exp(logits - logits.max(-1, keepdims=True))
            out[row, :, part] = powers / powers.sum(-1, keepdims=True) @ own_v[:length]
    return out


@pytest.mark.parametrize("scale", [1.0, 20.0])
@pytest.mark.parametrize(("heads", "width"), [(1, 4), (2, 16), (6, 12)])
def test_attention_is_the_textbooks(heads, width, scale):
    random = np.random.default_rng(0)
    q, k, v = (random.normal(size=(4, 9, width)).astype(np.float32) for _ in range(3))
    lengths = np.array([9, 1, 4, 8], np.int32)
    bias = _attention_bias(jnp.asarray(lengths), 9)
    own = _attention(jnp.asarray(q * np.float32(scale)), jnp.asarray(k), jnp.asarray(v), bias, heads)
    np.testing.assert_allclose(own, textbook_attention(q * scale, k, v, lengths, heads), atol=3e-5)


def test_unit_vectors_have_length_one_and_zero_stays_zero():
    vectors = unit(jnp.array([[3.0, 4.0], [0.0, 0.0], [1e-6, 0.0]], jnp.float32))
    np.testing.assert_allclose(vectors, [[0.6, 0.8], [0.0, 0.0], [1.0, 0.0]], rtol=1e-6)
