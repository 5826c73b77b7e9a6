"""What a memory says of documents."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from moeret.models.memory import Memory, digest, remembered


@given(
    st.lists(st.lists(st.integers(0, 5), min_size=1, max_size=4, unique=True), min_size=1, max_size=6),
    st.randoms(use_true_random=False),
)
def test_a_document_is_worth_what_its_nearest_query_is_nearer_than_the_farthest(answers, random):
    scores = np.sort(np.array([random.uniform(-1, 1) for _ in answers], np.float32))[::-1]
    order = np.array(random.sample(range(len(answers)), len(answers)))  # found[i] is train query order[i]
    offsets, rows = np.cumsum([0, *map(len, answers)]), np.concatenate(answers)
    got = dict(zip(*(own.tolist() for own in remembered(order, scores, offsets, rows)), strict=True))
    expected = {}
    for query, score in zip(order, scores - scores.min(), strict=True):
        for row in answers[query]:
            expected[row] = max(expected.get(row, 0.0), float(score))
    assert got.keys() == expected.keys()
    np.testing.assert_allclose([got[row] for row in expected], [*expected.values()], atol=1e-6)


def test_no_queries_remember_nothing():
    rows, values = remembered(np.empty(0, int), np.empty(0, np.float32), np.zeros(1, int), np.empty(0, int))
    assert len(rows) == len(values) == 0


@given(
    st.lists(st.lists(st.sampled_from("abcd"), max_size=3), min_size=1, max_size=5), st.lists(st.sampled_from("abxy"))
)
def test_answers_are_every_copy_of_what_a_query_was_answered_with(answers, contents):
    memory = Memory.of(np.zeros((len(answers), 2), np.float32), answers)
    offsets, places = memory.answers(contents)
    assert len(offsets) == len(answers) + 1 and offsets[-1] == len(places)
    for query, own in enumerate(answers):
        found = places[offsets[query] : offsets[query + 1]].tolist()
        assert found == [place for place, text in enumerate(contents) if text in own]


def test_a_document_is_known_by_all_that_is_embedded_of_it():
    assert digest("a b") == digest("a b") != digest("a  b")
    assert len(digest("")) == 16
