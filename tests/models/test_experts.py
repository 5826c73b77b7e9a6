"""The bank: mixing rows in one program gives what each row would get by itself."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moeret.config import MATRICES, ExpertConfig
from moeret.models import experts
from moeret.models.embed import _MANY, Embedder, _mixed_branch
from moeret.models.encoder import with_params
from moeret.models.experts import MOST_USED, Mixture, few_experts
from moeret.models.pretrained import load_base

COUNT = 3
SHAPE = ExpertConfig(rank=4, layers=2)


@pytest.fixture(scope="module")
def base(base_folder):
    return load_base(str(base_folder), base_folder)


@pytest.fixture(scope="module")
def bank(base):
    """Three experts, far from the base and from one another."""
    random = np.random.default_rng(0)
    plain = experts.init_bank(base.config, SHAPE, list(jax.random.split(jax.random.key(0), COUNT)))
    return jax.tree.map(lambda leaf: (0.3 * random.normal(size=leaf.shape)).astype(np.float32), plain)


@pytest.fixture(scope="module")
def batch(base, bank):
    """(hidden states where experts begin, lengths, layers of the trunk) of five rows."""
    random = np.random.default_rng(0)
    ids = jnp.asarray(random.integers(5, base.config.vocabulary, (5, 8)), jnp.int32)
    lengths = jnp.array([8, 3, 5, 1, 7], jnp.int32)
    layers = experts.trunk_layers(bank, base.config)
    return with_params(base.config, base.params).trunk(ids, lengths, layers), lengths, layers


def run(base, bank, batch, chosen, weights) -> np.ndarray:
    """Embeddings of the batch's rows with these experts and weights."""
    x, lengths, layers = batch
    dense = np.zeros((len(chosen), COUNT + 1), np.float32)
    np.add.at(dense, (np.arange(len(chosen))[:, None], np.asarray(chosen)), weights)
    mixture = Mixture(jnp.arange(COUNT + 1), jnp.asarray(dense), jnp.zeros(len(chosen), jnp.float32))
    inside = jnp.arange(x.shape[1])[None] < lengths[:, None]
    texts = jnp.where(inside, jnp.arange(len(chosen))[:, None], -1)  # a row for each
    full = experts.with_base(bank)
    return np.asarray(_mixed_branch(base.config, layers, base.params, full, None, x, texts, mixture))


def test_a_mixed_batch_is_its_rows_encoded_expert_by_expert(base, bank, batch):
    chosen = np.array([2, 0, 3, 1, 2])
    mixed = run(base, bank, batch, chosen[:, None], np.ones((5, 1)))
    for expert in range(COUNT + 1):
        alone = run(base, bank, batch, np.full((5, 1), expert), np.ones((5, 1)))
        np.testing.assert_allclose(mixed[chosen == expert], alone[chosen == expert], atol=1e-6)
        assert np.abs(mixed - alone)[chosen != expert].max(-1).min() > 1e-2


def test_a_merged_row_is_the_base_with_the_weighted_deltas_added_to_its_kernels(base, bank, batch):
    chosen, weights = [[1, 3]] * 5, [[0.7, 0.4]] * 5
    x, lengths, layers = batch
    encoder = with_params(base.config, jax.tree.map(jnp.array, base.params))  # copies, to be changed
    for name, matrices in bank.items():
        layer = encoder.layers[int(name.removeprefix("layer_"))]
        for matrix, factors in matrices.items():
            delta = sum(w * factors["a"][e - 1] @ factors["b"][e - 1] for e, w in ((1, 0.7), (3, 0.4)))
            kernel = getattr(layer, matrix).kernel
            kernel[...] = kernel[...] + jnp.asarray(delta, jnp.float32)
    plain = encoder.branch(x, lengths, layers, {})
    np.testing.assert_allclose(run(base, bank, batch, chosen, weights), plain, atol=2e-6)


def test_the_zero_expert_and_zero_weights_are_the_base(base, bank, batch):
    x, lengths, layers = batch
    plain = with_params(base.config, base.params).branch(x, lengths, layers, {})
    np.testing.assert_allclose(run(base, bank, batch, [[0]] * 5, [[1.0]] * 5), plain, atol=1e-6)
    np.testing.assert_allclose(run(base, bank, batch, [[1, 2]] * 5, [[0.0, 0.0]] * 5), plain, atol=1e-6)


def test_a_new_bank_starts_as_the_base(base, batch):
    fresh = experts.init_bank(base.config, SHAPE, [jax.random.key(5)])
    x, lengths, layers = batch
    plain = with_params(base.config, base.params).branch(x, lengths, layers, {})
    np.testing.assert_allclose(run(base, fresh, batch, [[1]] * 5, [[1.0]] * 5), plain, atol=1e-6)
    assert all(np.any(leaf != 0) for name, leaf in experts.flatten(fresh).items() if name.endswith(".a"))


def test_a_shared_delta_lies_under_each_row_as_strongly_as_its_experts_want(base, bank):
    """Rows of one program: the base, an expert on half of the shared delta, two experts, the shared delta alone."""
    delta = experts.take(bank, 2)
    shared = experts.Shared(delta, np.array([0.0, 0.5, 1.0, 0.25, 0.75], np.float32))
    embedder = Embedder(base, experts.with_base(bank, shared=True), shared)
    texts = ["find the apple", "about a very long iron", "which text is on", "a story of the rhine"]
    chosen, weights = np.array([[0, 0], [1, 0], [1, 2], [4, 0]]), np.array([[0, 0], [1, 0], [0.6, 0.4], [1, 0]])
    found = embedder.mixed(texts, chosen, weights.astype(np.float32))
    wanted = [(0.0, {}), (0.5, {1: 1.0}), (0.6 * 0.5 + 0.4 * 1.0, {1: 0.6, 2: 0.4}), (0.75, {})]
    for text, vector, (under, own) in zip(texts, found, wanted, strict=True):
        params = experts.fold(base.params, experts.take(experts.scaled(bank, np.full(COUNT, under)), 2))
        for expert, weight in own.items():
            params = experts.fold(params, experts.take(experts.scaled(bank, np.full(COUNT, weight)), expert - 1))
        folded = Embedder(dataclasses.replace(base, params=params), experts.with_base(bank))
        np.testing.assert_allclose(vector, folded.base([text])[0], atol=3e-6)
    for row, expert in ((1, 1), (3, 4)):
        np.testing.assert_allclose(embedder.alone(expert).base([texts[row]])[0], found[row], atol=3e-6)
        many = embedder.mixed([texts[row]] * _MANY, np.full((_MANY, 1), expert), np.ones((_MANY, 1), np.float32))
        np.testing.assert_allclose(many, np.tile(found[row], (_MANY, 1)), atol=3e-6)


def test_an_experts_start_does_not_depend_on_the_others(base):
    keys = list(jax.random.split(jax.random.key(0), 3))
    together = experts.init_bank(base.config, SHAPE, keys)
    alone = experts.init_bank(base.config, SHAPE, [keys[1]])
    jax.tree.map(np.testing.assert_array_equal, experts.take(together, 1), experts.take(alone, 0))


def test_one_compiled_program_serves_any_mix_of_as_many_experts(base, bank):
    embedder = Embedder(base, experts.with_base(bank))
    texts = ["find the apple", "about a very long iron", "which text is on", "a story of the rhine"]
    mixes = [[[1, 2]] * 4, [[3, 0]] * 4, [[1, 1], [2, 1], [2, 2], [1, 2]]]
    embedder.mixed(texts, np.array(mixes[0]), np.full((4, 2), 0.5))
    compiled = _mixed_branch._cache_size()
    for chosen in mixes:
        for weights in (np.tile([0.7, 0.3], (4, 1)), np.full((4, 2), 0.3)):
            embedder.mixed(texts[::-1], np.array(chosen), weights)
    assert _mixed_branch._cache_size() == compiled


def test_stack_take_flatten_and_unflatten_lose_nothing(bank):
    singles = [experts.take(bank, expert) for expert in range(COUNT)]
    jax.tree.map(np.testing.assert_array_equal, experts.stack(singles), bank)
    flat = experts.flatten(singles[0])
    assert len(flat) == SHAPE.layers * len(MATRICES) * 2
    again = experts.unflatten(flat)
    assert jax.tree.structure(again) == jax.tree.structure(singles[0])
    jax.tree.map(np.testing.assert_array_equal, again, singles[0])


@pytest.mark.parametrize("layers", [1, 2, 3])
def test_the_trunk_ends_where_the_first_expert_layer_begins(base, layers):
    bank = experts.init_bank(base.config, ExpertConfig(rank=2, layers=layers), [jax.random.key(0)])
    assert experts.trunk_layers(bank, base.config) == base.config.layers - layers
    assert experts.trunk_layers({}, base.config) == base.config.layers


@given(st.integers(1, 30), st.integers(0, 99))
def test_mixed_texts_are_grouped_by_their_experts(count, seed):
    random = np.random.default_rng(seed)
    experts_of = np.stack([random.permutation(40)[:4] for _ in range(count)])
    weights = random.uniform(size=(count, 4)) * (random.uniform(size=(count, 4)) < 0.6)
    groups = [*few_experts(experts_of, weights)]
    assert sorted(row for own in groups for row in own.tolist()) == list(range(count))
    for own in groups:
        assert len({*experts_of[own][weights[own] != 0].tolist()}) <= MOST_USED
    assert [own.tolist() for own in few_experts(np.zeros((0, 2), int), np.zeros((0, 2)))] == []


def test_a_text_may_use_more_experts_than_a_group():
    [group] = few_experts(np.arange(20)[None], np.ones((1, 20)))
    assert group.tolist() == [0]
