"""The batch plan: position equals step, every query once an epoch, and nobody's batches depend on anybody else."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moeret.data.buckets import full_size
from moeret.data.plan import TRAINING_BUCKETS, BatchPlan

NAMES = ("law", "medicine", "code", "finance")
lengths_of_queries = st.lists(st.integers(2, 60), min_size=1, max_size=30).map(np.array)
experts = st.dictionaries(st.sampled_from(NAMES), lengths_of_queries, min_size=1, max_size=4)
batch_sizes = st.integers(1, 40)
seeds = st.integers(0, 5)


def make(own: dict[str, np.ndarray], batch_size: int, seed: int = 0, devices: int = 1) -> BatchPlan:
    return BatchPlan.make(list(own), list(own.values()), batch_size, seed, devices)


@settings(deadline=None)
@given(own=experts, batch_size=batch_sizes, seed=seeds)
def test_every_query_is_read_exactly_once_an_epoch(own, batch_size, seed):
    plan, epochs = make(own, batch_size, seed), 3
    for expert, lengths in enumerate(own.values()):
        count = len(lengths)
        steps = -(-epochs * count // batch_size)
        read = np.concatenate([plan.queries(expert, step) for step in range(steps)])
        assert len(read) == steps * batch_size
        for epoch in range(epochs):
            assert sorted(read[epoch * count : (epoch + 1) * count]) == list(range(count))


@settings(deadline=None)
@given(own=experts, batch_size=batch_sizes, seed=seeds, steps=st.lists(st.integers(0, 10_000), min_size=1, max_size=4))
def test_a_step_is_a_function_of_its_number_alone(own, batch_size, seed, steps):
    plan = make(own, batch_size, seed)
    before = {step: plan.queries(0, step).tolist() for step in steps}
    for step in reversed(steps):
        assert plan.queries(0, step).tolist() == before[step]
        assert make(own, batch_size, seed).queries(0, step).tolist() == before[step]
        micro = [(batch.queries.tolist(), batch.edge, batch.size) for batch in plan.step(step, 0)]
        again = make(own, batch_size, seed).step(step, 0)
        assert [(batch.queries.tolist(), batch.edge, batch.size) for batch in again] == micro


@settings(deadline=None)
@given(own=experts, batch_size=batch_sizes, seed=seeds, step=st.integers(0, 50), data=st.data())
def test_an_experts_queries_do_not_depend_on_the_other_experts(own, batch_size, seed, step, data):
    order = data.draw(st.permutations(list(own)))
    together, shuffled = make(own, batch_size, seed), make({name: own[name] for name in order}, batch_size, seed)
    for expert, (name, lengths) in enumerate(own.items()):
        alone = make({name: lengths}, batch_size, seed).queries(0, step)
        assert together.queries(expert, step).tolist() == alone.tolist()
        assert shuffled.queries(order.index(name), step).tolist() == alone.tolist()


def test_seeds_epochs_and_names_shuffle_differently():
    lengths = np.full(50, 7)
    orders = [make({"law": lengths}, 50, seed).queries(0, step) for seed in (0, 1) for step in (0, 1)]
    orders.append(make({"code": lengths}, 50, 0).queries(0, 0))
    orders.append(np.arange(50))
    assert len({tuple(order.tolist()) for order in orders}) == len(orders)


@settings(deadline=None)
@given(own=experts, batch_size=batch_sizes, step=st.integers(0, 20), devices=st.integers(1, 6))
def test_micro_batches_cover_exactly_the_queries_of_their_step_and_fit_their_shapes(own, batch_size, step, devices):
    plan = make(own, batch_size, devices=devices)
    assert len(plan.edges) <= TRAINING_BUCKETS
    for expert, lengths in enumerate(own.values()):
        batches = list(plan.step(step, expert))
        read = np.concatenate([batch.queries for batch in batches])
        assert sorted(read) == sorted(plan.queries(expert, step))
        for batch in batches:
            assert batch.expert == expert
            assert batch.edge in plan.edges
            assert batch.size == full_size(batch.edge) * devices
            assert 1 <= len(batch.queries) <= batch.size
            assert lengths[batch.queries].max() <= batch.edge
        assert all(len(batch.queries) == batch.size for batch in batches[:-1])  # only the last may be short
        assert [batch.edge for batch in batches] == sorted(batch.edge for batch in batches)


def test_a_query_moves_to_a_longer_bucket_only_to_fill_a_batch():
    for short, rest in ((320, [(8, 64, 64), (8, 64, 48)]), (256, [(8, 64, 48)])):
        plan = make({"law": np.array([4] * short + [8] * 48)}, short + 48)
        shapes = [(batch.edge, batch.size, len(batch.queries)) for batch in plan.step(0, 0)]
        assert plan.edges == (4, 8)
        assert shapes == [(4, 128, 128), (4, 128, 128), *rest]


@settings(deadline=None)
@given(own=experts, which=st.integers(0, 3))
def test_edges_fit_a_small_domain_as_well_as_a_large_one(own, which):
    grown = {
        name: np.tile(lengths, 5) if number == which else lengths for number, (name, lengths) in enumerate(own.items())
    }

    def padded(edges: tuple[int, ...]) -> float:
        """Padded tokens of a query, the mean over domains."""
        return sum(np.mean([min(e for e in edges if e >= n) for n in lengths]) for lengths in own.values())

    assert padded(make(grown, 8).edges) == pytest.approx(padded(make(own, 8).edges))
