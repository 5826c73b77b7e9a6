"""A training step on one device and on several, of one expert and of many."""

import dataclasses

import jax
import numpy as np
import pytest

from moeret.data.buckets import Batch
from moeret.models import experts
from moeret.models.embed import Embedder
from moeret.models.mesh import make_mesh, replicate
from moeret.models.pretrained import load_base
from moeret.training import batches as training_batches
from moeret.training import step
from moeret.training.batches import Batches
from moeret.training.prepare import prepare, read_domains
from moeret.training.step import TrainState, add_batch, learning_rates, make_optimizer, update, zero_totals
from moeret.training.towers import BothTowers


@pytest.fixture(scope="module")
def train_config(train_config):
    """So few steps that few shapes pay."""
    return dataclasses.replace(train_config, steps=64)


@pytest.fixture(scope="module")
def prepared(base_folder, domains, train_config, tmp_path_factory):
    """Embedder and data of all three domains, for either tower."""
    base = load_base(str(base_folder), base_folder)
    embedder = Embedder(base, experts.base_alone(base.config, train_config.expert))
    config = dataclasses.replace(train_config, tower="both")
    cache = tmp_path_factory.mktemp("vectors")
    return embedder, prepare(read_domains(domains), embedder, config, cache, show_progress_bar=False)


def run_steps(prepared, config, names, devices, steps=3, model_devices=1):
    """(losses of the last step, bank) after a few steps of the named experts on so many devices."""
    embedder, data = prepared
    sets = [own for own in data.sets if own.name in names]
    keys = [jax.random.key(ord(own.name[0])) for own in sets]
    base = embedder.base_encoder
    bank = experts.init_bank(base.config, config.expert, keys)
    mesh = make_mesh(jax.devices()[:devices], model_devices)
    ids = BothTowers(data, embedder).document_ids if config.tower == "both" else None
    layers = experts.trunk_layers(bank, base.config)
    batches = Batches(base.config, layers, base.params, data.pool, ids, sets, config, mesh)
    optimizer = make_optimizer(config)
    state = replicate(mesh, TrainState(bank, optimizer.init(bank)))
    active = np.ones(len(sets), bool)
    for number in range(steps):
        totals = zero_totals(state.bank)
        for expert, batch in batches.step(number, active):
            totals = add_batch(batches.static, batches.frozen, state.bank, totals, expert, batch)
        rates = learning_rates(config, batches.limits, number)
        state = update(mesh, optimizer, state, totals.gradients, jax.numpy.asarray(rates))
    return np.asarray(totals.losses), jax.device_get(state.bank)


@pytest.mark.parametrize(("tower", "model_devices"), [("query", 1), ("both", 1), ("query", 4), ("both", 2)])
def test_a_sharded_step_equals_the_one_device_step(prepared, train_config, tower, model_devices):
    config = dataclasses.replace(train_config, tower=tower, hard_negatives=2)
    one, one_bank = run_steps(prepared, config, ("fruit", "metal"), devices=1)
    four, four_bank = run_steps(prepared, config, ("fruit", "metal"), devices=4, model_devices=model_devices)
    np.testing.assert_allclose(four, one, rtol=1e-5)
    # Adam divides by the gradient's own size, so rounding near zero gradients may grow to a share of the step.
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-3), four_bank, one_bank)


def totals_of(prepared, config, devices=1):
    """Totals of a first step of one moved expert, and what they are made from."""
    embedder, data = prepared
    base = embedder.base_encoder
    bank = experts.init_bank(base.config, config.expert, [jax.random.key(0)])
    bank = jax.tree.map(lambda leaf: leaf + 0.05 * jax.random.normal(jax.random.key(9), leaf.shape), bank)
    ids = BothTowers(data, embedder).document_ids if config.tower == "both" else None
    layers = experts.trunk_layers(bank, base.config)
    mesh = make_mesh(jax.devices()[:devices])
    batches = Batches(base.config, layers, base.params, data.pool, ids, data.sets[:1], config, mesh)
    ((expert, batch),) = batches.step(0, np.ones(1, bool))
    bank = replicate(mesh, bank)
    arguments = (batches.static, batches.frozen, bank, zero_totals(bank), expert, batch)
    return jax.device_get(add_batch(*arguments)), (*arguments[:3], zero_totals(bank), *arguments[4:])


def assert_same_totals(one, other):
    np.testing.assert_allclose(one.losses, other.losses, rtol=1e-5)
    longest = max(np.abs(leaf).max() for leaf in jax.tree.leaves(other.gradients))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5 * longest), one.gradients, other.gradients)


@pytest.mark.parametrize("devices", [1, 4])
def test_queries_in_parts_have_the_gradient_of_the_whole_in_less_memory(prepared, train_config, devices):
    config = dataclasses.replace(train_config, batch_size=256)
    whole, whole_arguments = totals_of(prepared, config, devices)
    parts, parts_arguments = totals_of(prepared, dataclasses.replace(config, mini_batch_size=8), devices)
    assert_same_totals(parts, whole)
    much, little = (
        step.add_queries.lower(*arguments).compile().memory_analysis().temp_size_in_bytes
        for arguments in (whole_arguments, parts_arguments)
    )
    assert little < much / 4


@pytest.mark.parametrize("devices", [1, 4])
def test_pairs_encoded_twice_have_the_gradient_of_the_whole_and_keep_nothing(
    prepared, train_config, devices, monkeypatch
):
    pull_back, kept = step._pull_back, []

    def watched(*arguments):
        kept.append(sum(leaf.nbytes for leaf in jax.tree.leaves(arguments[6])))
        return pull_back(*arguments)

    monkeypatch.setattr(step, "_pull_back", watched)
    monkeypatch.setattr(training_batches, "TOKENS_PER_CHUNK", 256)
    config = dataclasses.replace(train_config, tower="both", batch_size=64, hard_negatives=2)
    whole, _ = totals_of(prepared, config, devices)
    assert len(kept) > 3 and min(kept) > 0
    kept.clear()
    twice, _ = totals_of(prepared, dataclasses.replace(config, mini_batch_size=8), devices)
    assert len(kept) > 3 and max(kept) == 0
    assert_same_totals(twice, whole)


@pytest.mark.parametrize("devices", [1, 4])
def test_pairs_of_alike_lengths_have_the_gradient_of_one_padded_batch(prepared, train_config, devices, monkeypatch):
    config = dataclasses.replace(train_config, tower="both", batch_size=16, hard_negatives=2)
    chunks, _ = totals_of(prepared, config, devices)

    def everything(counts, edges, *_):
        return [Batch(np.arange(len(counts)), edges[-1], len(counts))]

    monkeypatch.setattr(training_batches, "length_batches", everything)
    one, _ = totals_of(prepared, config, devices)
    assert_same_totals(chunks, one)


@pytest.mark.parametrize("tower", ["query", "both"])
def test_as_many_programs_are_compiled_as_shapes_are_read(prepared, train_config, tower):
    embedder, data = prepared
    config = dataclasses.replace(train_config, tower=tower, batch_size=4)
    base = embedder.base_encoder
    bank = experts.init_bank(base.config, config.expert, [jax.random.key(n) for n in range(3)])
    ids = BothTowers(data, embedder).document_ids if tower == "both" else None
    mesh = make_mesh(jax.devices()[:1])
    layers = experts.trunk_layers(bank, base.config)
    batches = Batches(base.config, layers, base.params, data.pool, ids, data.sets, config, mesh)
    program = step.add_queries if tower == "query" else step._pull_back
    program.clear_cache()
    bank = replicate(mesh, bank)
    totals = zero_totals(bank)
    for number in range(8):
        for expert, batch in batches.step(number, np.ones(3, bool)):
            totals = add_batch(batches.static, batches.frozen, bank, totals, expert, batch)
    report = batches.tally.report()
    assert program._cache_size() == report["shapes"] > 1
    assert 0 <= report["padding"] < 0.6
    assert {name for shares in report["domains"].values() for name in shares} == {own.name for own in data.sets}


@pytest.mark.parametrize("tower", ["query", "both"])
def test_an_expert_trains_beside_others_as_it_does_alone(prepared, train_config, tower):
    config = dataclasses.replace(train_config, tower=tower)
    alone_loss, alone = run_steps(prepared, config, ("metal",), devices=1)
    loss, together = run_steps(prepared, config, ("fruit", "metal", "river"), devices=1)
    np.testing.assert_allclose(loss[1], alone_loss[0], rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a[1], b[0], atol=2e-3), together, alone)


def test_a_stopped_expert_keeps_its_weights(prepared, train_config):
    embedder, _ = prepared
    base = embedder.base_encoder
    bank = experts.init_bank(base.config, train_config.expert, [jax.random.key(0), jax.random.key(1)])
    optimizer = make_optimizer(train_config)
    gradients = jax.tree.map(jax.numpy.ones_like, bank)
    state = TrainState(jax.tree.map(jax.numpy.copy, bank), optimizer.init(bank))
    rates = jax.numpy.asarray([0.01, 0.0])
    state = update(make_mesh(jax.devices()[:1]), optimizer, state, jax.tree.map(jax.numpy.copy, gradients), rates)
    moved = jax.tree.map(
        lambda new, old: (bool((new[0] != old[0]).all()), bool((new[1] == old[1]).all())), state.bank, bank
    )
    assert all(pair == (True, True) for pair in jax.tree.leaves(moved, is_leaf=lambda leaf: isinstance(leaf, tuple)))


def test_every_rate_rises_then_falls_to_zero_at_the_experts_own_limit(train_config):
    limits = np.array([1, 7, 40, 100])
    rates = np.stack([learning_rates(train_config, limits, step) for step in range(101)])
    assert (rates >= 0).all() and rates.max() <= train_config.learning_rate * (1 + 1e-6)
    for own, limit in zip(rates.T, limits, strict=True):
        assert own[0] > 0 and not own[limit:].any()
        peak = own.argmax()
        assert (np.diff(own[: peak + 1]) >= 0).all() and (np.diff(own[peak : limit + 1]) <= 0).all()


@pytest.mark.parametrize("tower", ["query", "both"])
def test_bfloat16_products_give_the_gradient_of_float32_but_for_rounding(prepared, train_config, tower):
    found = {}
    for precision in ("float32", "bfloat16"):
        config = dataclasses.replace(train_config, tower=tower, precision=precision)
        embedder, data = prepared
        base = embedder.base_encoder
        bank = experts.init_bank(base.config, config.expert, [jax.random.key(n) for n in range(3)])
        bank = jax.tree.map(lambda leaf: leaf + 0.05 * jax.random.normal(jax.random.key(9), leaf.shape), bank)
        ids = BothTowers(data, embedder).document_ids if tower == "both" else None
        layers = experts.trunk_layers(bank, base.config)
        batches = Batches(
            base.config, layers, base.params, data.pool, ids, data.sets, config, make_mesh(jax.devices()[:1])
        )
        totals = zero_totals(bank)
        for expert, batch in batches.step(0, np.ones(3, bool)):
            totals = add_batch(batches.static, batches.frozen, bank, totals, expert, batch)
        assert all(leaf.dtype == np.float32 for leaf in jax.tree.leaves(totals))
        found[precision] = np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(totals.gradients)])
    exact, rounded = found["float32"], found["bfloat16"]
    assert np.abs(exact - rounded).max() > 0  # the precision is really another
    assert exact @ rounded / np.linalg.norm(exact) / np.linalg.norm(rounded) > 0.999
    assert abs(np.linalg.norm(rounded) / np.linalg.norm(exact) - 1) < 0.02


@pytest.mark.parametrize("size", [1e-3, 1e3])
def test_a_long_gradient_counts_as_a_short_one_of_its_direction(prepared, train_config, size):
    embedder, _ = prepared
    base = embedder.base_encoder
    bank = experts.init_bank(base.config, train_config.expert, [jax.random.key(0)])
    optimizer = make_optimizer(train_config)
    gradients = jax.tree.map(lambda leaf: jax.random.normal(jax.random.key(1), leaf.shape), bank)
    norm = float(jax.numpy.sqrt(sum((leaf**2).sum() for leaf in jax.tree.leaves(gradients))))
    state = TrainState(jax.tree.map(jax.numpy.copy, bank), optimizer.init(bank))
    state = update(
        make_mesh(jax.devices()[:1]),
        optimizer,
        state,
        jax.tree.map(lambda leaf: leaf * size, gradients),
        jax.numpy.asarray([0.01]),
    )
    first = jax.tree.leaves(state.opt_state)
    moments = [leaf for leaf in first if getattr(leaf, "ndim", 0) == 3][: len(jax.tree.leaves(bank))]
    length = float(jax.numpy.sqrt(sum((leaf**2).sum() for leaf in moments)))
    np.testing.assert_allclose(length, 0.1 * min(size * norm, 1.0), rtol=1e-4)  # Adam's first moment, after one step


@pytest.mark.parametrize("tower", ["query", "both"])
def test_devices_that_do_not_divide_a_batch_share_it_all_the_same(prepared, train_config, tower):
    config = dataclasses.replace(train_config, tower=tower, batch_size=6)
    assert_same_totals(totals_of(prepared, config, 4)[0], totals_of(prepared, config, 1)[0])
