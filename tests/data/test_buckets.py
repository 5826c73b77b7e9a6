"""Buckets: edges pad as little as any could, and batches cover every text once in few shapes."""

from itertools import combinations, pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moeret.data.buckets import MANY_TOKENS, Batch, bucket_edges, full_size, length_batches, packs, pad, standard_edges

lengths_of_texts = st.lists(st.integers(1, 12), min_size=1, max_size=20).map(np.array)


def padded_tokens(lengths: np.ndarray, edges: tuple[int, ...], weights: np.ndarray) -> float:
    return float(sum(w * min(e for e in edges if e >= n) for n, w in zip(lengths, weights, strict=True)))


def fewest_padded_tokens(lengths: np.ndarray, buckets: int, weights: np.ndarray) -> float:
    """The best of all choices of edges."""
    *rest, last = sorted({*lengths.tolist()})
    choices = [(*some, last) for count in range(min(buckets, len(rest) + 1)) for some in combinations(rest, count)]
    return min(padded_tokens(lengths, edges, weights) for edges in choices)


@settings(deadline=None)
@given(lengths=lengths_of_texts, buckets=st.integers(1, 5))
def test_no_edges_pad_less(lengths, buckets):
    edges = bucket_edges(lengths, buckets)
    ones = np.ones(len(lengths))
    assert padded_tokens(lengths, edges, ones) == fewest_padded_tokens(lengths, buckets, ones)


@settings(deadline=None)
@given(lengths=lengths_of_texts, buckets=st.integers(1, 5), data=st.data())
def test_no_edges_pad_less_where_texts_weigh_differently(lengths, buckets, data):
    weight = st.floats(0, 10) | st.sampled_from([0.0, 1.0, 1000.0])
    weights = np.array(data.draw(st.lists(weight, min_size=len(lengths), max_size=len(lengths))))
    edges = bucket_edges(lengths, buckets, weights)
    assert padded_tokens(lengths, edges, weights) == pytest.approx(fewest_padded_tokens(lengths, buckets, weights))


@settings(deadline=None)
@given(lengths=lengths_of_texts, buckets=st.integers(1, 20))
def test_edges_are_few_rising_and_fit_every_text(lengths, buckets):
    edges = bucket_edges(lengths, buckets)
    assert 1 <= len(edges) <= buckets
    assert list(edges) == sorted({*edges})
    assert edges[-1] == lengths.max()
    assert {*edges} <= {*lengths.tolist()}
    assert all(type(edge) is int for edge in edges)


def test_enough_buckets_pad_nothing():
    lengths = np.array([5, 3, 9, 3, 5])
    assert bucket_edges(lengths, 3) == bucket_edges(lengths, 100) == (3, 5, 9)


@given(most=st.integers(1, 2000))
def test_standard_edges_rise_gently_up_to_the_longest(most):
    few, many = standard_edges(most, MANY_TOKENS - 1), standard_edges(most, MANY_TOKENS)
    for edges, step in ((few, 1.5), (many, 1.25)):
        assert list(edges) == sorted({*edges})
        assert edges[-1] == most
        assert all(after <= step * before for before, after in pairwise(edges) if after <= 512)
    assert {*few} <= {*many}  # so that few texts need no programs of their own where many have been embedded


@given(edge=st.integers(1, 1000), tokens=st.integers(1, 2000))
def test_a_full_batch_is_the_largest_power_of_two_in_the_budget(edge, tokens):
    size = full_size(edge, tokens)
    assert size.bit_count() == 1
    assert size == 1 or size * edge <= tokens
    assert 2 * size * edge > tokens


@settings(deadline=None)
@given(
    lengths=st.lists(st.integers(1, 40), max_size=60).map(lambda own: np.array(own, np.int64)),
    edges=st.sets(st.integers(1, 39), max_size=5).map(lambda own: (*sorted(own), 40)),
    tokens=st.integers(1, 200),
)
def test_batches_cover_every_text_once_and_fit_their_shapes(lengths, edges, tokens):
    batches = list(length_batches(lengths, edges, tokens))
    rows = [row for batch in batches for row in batch.rows.tolist()]
    assert sorted(rows) == list(range(len(lengths)))
    needed = np.array(edges)[np.searchsorted(edges, lengths)]  # the smallest edge that fits
    for batch in batches:
        assert batch.edge in edges
        assert (lengths[batch.rows] <= batch.edge).all()
        assert batch.edge <= 2 * needed[batch.rows].min()
        assert batch.edge == needed[batch.rows].max() or batch.size == full_size(batch.edge, tokens)
        assert 1 <= len(batch.rows) <= batch.size <= full_size(batch.edge, tokens)
        assert batch.size.bit_count() == 1
        assert batch.size < 4 * len(batch.rows)
        assert batch.size in {1, 4, 16, 64, 256, full_size(batch.edge, tokens)}
    short = [batch for batch in batches if len(batch.rows) < full_size(batch.edge, tokens)]
    for before, after in pairwise(short):  # whatever could have waited for longer texts has
        assert after.edge > 2 * needed[before.rows].min()


@settings(deadline=None)
@given(ids=st.lists(st.lists(st.integers(1, 99), min_size=1, max_size=9), min_size=1, max_size=12), data=st.data())
def test_padded_texts_can_be_told_from_their_padding(ids, data):
    ids = [np.array(own, np.int32) for own in ids]
    rows = np.array(data.draw(st.lists(st.integers(0, len(ids) - 1), unique=True, min_size=1)))
    edge = max(len(ids[row]) for row in rows) + data.draw(st.integers(0, 3))
    size = len(rows) + data.draw(st.integers(0, 3))
    padded, lengths = pad(ids, Batch(rows, edge, size))
    assert padded.shape == (size, edge)
    assert padded.dtype == lengths.dtype == np.int32
    for position, row in enumerate(rows):
        assert padded[position, : lengths[position]].tolist() == ids[row].tolist()
        assert not padded[position, lengths[position] :].any()
    assert (lengths[len(rows) :] == 1).all()  # no row is empty, so that a mean over it is a number
    assert not padded[len(rows) :].any()


@settings(deadline=None)
@given(lengths=st.lists(st.integers(1, 300), min_size=1, max_size=60).map(np.array), seed=st.integers(0, 9))
def test_packs_hold_every_text_once_and_whole(lengths, seed):
    random = np.random.default_rng(seed)
    texts = [random.integers(1, 100, length) for length in lengths]
    found = []
    for pack in packs(lengths):
        order, tokens, places, positions = pack.arrays(texts)
        assert len(order) <= pack.most and tokens.shape == places.shape == (len(pack.rows), pack.length)
        assert pack.length * len(pack.rows) <= max(512, pack.length)
        for place, text in enumerate(order):
            np.testing.assert_array_equal(tokens[places == place], texts[text])
            np.testing.assert_array_equal(positions[places == place], np.arange(lengths[text]))
        assert (tokens[places < 0] == 0).all()
        found += order.tolist()
    assert sorted(found) == list(range(len(lengths)))


def test_packs_take_the_fewest_rows_and_pad_less_than_buckets_do():
    lengths = np.random.default_rng(0).integers(8, 40, 60)
    rows = [row for pack in packs(lengths) for row in pack.rows]
    assert len(rows) == -(-lengths.sum() // 128)
    bucketed = sum(batch.size * batch.edge for batch in length_batches(lengths, standard_edges(512, 0)))
    assert 128 * len(rows) < bucketed
