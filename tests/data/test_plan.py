"""The batch plan: position equals step, every query once an epoch, and nobody's batches depend on anybody else."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moeret.data.buckets import Batch
from moeret.data.plan import BATCHES_A_SHAPE, TRAINING_BUCKETS, WINDOW, BatchPlan, Tally

NAMES = ("law", "medicine", "code", "finance")
lengths_of_queries = st.lists(st.integers(2, 60), min_size=1, max_size=30).map(np.array)
experts = st.dictionaries(st.sampled_from(NAMES), lengths_of_queries, min_size=1, max_size=4)
batch_sizes = st.integers(1, 40)
seeds = st.integers(0, 5)


def make(own: dict[str, np.ndarray], batch_size: int, seed: int = 0, devices: int = 1, steps: int = 1000) -> BatchPlan:
    return BatchPlan.make(list(own), list(own.values()), batch_size, seed, steps, devices)


def read(plan: BatchPlan, expert: int, steps: int) -> np.ndarray:
    return np.concatenate([plan.batch(step, expert).rows for step in range(steps)])


@settings(deadline=None)
@given(own=experts, batch_size=batch_sizes, seed=seeds)
def test_every_query_is_read_equally_often_by_the_end_of_a_window(own, batch_size, seed):
    plan = make(own, batch_size, seed)
    for expert, lengths in enumerate(own.values()):
        count, window = len(lengths), min(WINDOW, max(1, len(lengths) // batch_size))
        for windows in (1, 3):
            queries = read(plan, expert, windows * window)
            assert len(queries) == windows * window * batch_size
            times = np.bincount(queries, minlength=count)
            assert times.max() - times.min() <= 1  # so each exactly once in the steps that make an epoch


@settings(deadline=None)
@given(own=experts, batch_size=batch_sizes, seed=seeds, steps=st.lists(st.integers(0, 10_000), min_size=1, max_size=4))
def test_a_step_is_a_function_of_its_number_alone(own, batch_size, seed, steps):
    plan = make(own, batch_size, seed)
    before = {step: plan.batch(step, 0).rows.tolist() for step in steps}
    for step in reversed(steps):
        assert plan.batch(step, 0).rows.tolist() == before[step]
        assert make(own, batch_size, seed).batch(step, 0).rows.tolist() == before[step]


@settings(deadline=None)
@given(own=experts, batch_size=batch_sizes, seed=seeds, step=st.integers(0, 50), data=st.data())
def test_an_experts_queries_do_not_depend_on_the_other_experts(own, batch_size, seed, step, data):
    order = data.draw(st.permutations(list(own)))
    together, shuffled = make(own, batch_size, seed), make({name: own[name] for name in order}, batch_size, seed)
    for expert, (name, lengths) in enumerate(own.items()):
        alone = make({name: lengths}, batch_size, seed).batch(step, 0).rows
        assert together.batch(step, expert).rows.tolist() == alone.tolist()
        assert shuffled.batch(step, order.index(name)).rows.tolist() == alone.tolist()


def test_seeds_epochs_and_names_shuffle_differently():
    lengths = np.full(50, 7)
    orders = [make({"law": lengths}, 50, seed).batch(step, 0).rows for seed in (0, 1) for step in (0, 1)]
    orders.append(make({"code": lengths}, 50, 0).batch(0, 0).rows)
    orders.append(np.arange(50))
    assert len({tuple(order.tolist()) for order in orders}) == len(orders)


@settings(deadline=None)
@given(own=experts, batch_size=batch_sizes, step=st.integers(0, 20), devices=st.integers(1, 6))
def test_a_batch_fits_its_shape_and_the_devices_share_it_equally(own, batch_size, step, devices):
    plan = make(own, batch_size, devices=devices)
    assert len(plan.edges) <= TRAINING_BUCKETS
    for expert, lengths in enumerate(own.values()):
        batch = plan.batch(step, expert)
        assert len(batch.rows) == batch_size <= batch.size < batch_size + devices
        assert batch.size % devices == 0
        assert batch.edge == min(edge for edge in plan.edges if edge >= lengths[batch.rows].max())


@settings(deadline=None)
@given(own=experts, batch_size=batch_sizes, steps=st.integers(0, 1000), step=st.integers(0, 20))
def test_few_steps_compile_few_shapes_and_read_the_same_queries(own, batch_size, steps, step):
    plan, long = make(own, batch_size, steps=steps), make(own, batch_size)
    assert len(plan.edges) <= max(2, steps // BATCHES_A_SHAPE)
    assert plan.batch(step, 0).rows.tolist() == long.batch(step, 0).rows.tolist()


def test_sorting_inside_a_window_leaves_little_padding_and_mixes_lengths_over_steps():
    lengths = np.random.default_rng(0).integers(4, 64, size=2048)
    plan = make({"law": lengths}, 64)
    batches = [plan.batch(step, 0) for step in range(2048 // 64)]
    padded = sum(batch.edge * batch.size for batch in batches)
    assert 1 - lengths.sum() / padded < 0.2  # in shuffled order it is nearly half
    edges = [batch.edge for batch in batches]
    assert edges[:WINDOW] != sorted(edges[:WINDOW])


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


def test_the_report_tells_padding_shapes_and_whose_texts_have_which_length():
    tally = Tally()
    assert tally.report() == {"shapes": 0, "padding": 0.0, "domains": {}}
    tally.note("law", Batch(np.arange(3), 16, 4), 40)
    tally.note("code", Batch(np.arange(1), 16, 4), 10)
    tally.note("code", Batch(np.arange(2), 8, 2), 16)
    assert tally.report() == {
        "shapes": 2,
        "padding": round(1 - 66 / 144, 4),
        "domains": {8: {"code": 1.0}, 16: {"code": 0.25, "law": 0.75}},
    }
