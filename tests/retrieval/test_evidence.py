"""Evidence: promises join the router's probabilities; strange is what the base's own index promises most; dev sets the limit."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moeret.models.model import Model, read_profile
from moeret.models.router import part
from moeret.retrieval.evidence import DOUBT, Evidence
from moeret.retrieval.sketch import make_sketch

EXPERTS = ["fruit", "metal", "river"]


def unit_rows(seed: int, count: int, width: int = 16) -> np.ndarray:
    rows = np.random.default_rng(seed).normal(size=(count, width)).astype(np.float32)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


SKETCHES = {name: make_sketch(unit_rows(seed, 40)) for seed, name in enumerate(["base", *EXPERTS])}
probabilities = st.lists(st.floats(0.01, 1), min_size=3, max_size=3).map(
    lambda own: np.array([own], np.float32) / sum(own)
)


@given(seed=st.integers(0, 99), before=probabilities)
def test_evidence_moves_probability_to_the_index_that_promises_more(seed, before):
    query = unit_rows(seed, 1)
    after, _ = Evidence(EXPERTS, SKETCHES).weigh(query, before)
    np.testing.assert_allclose(after.sum(), 1, atol=1e-5)
    promised = np.array([(query @ SKETCHES[name].T).max() for name in EXPERTS])
    gained = np.log(after[0]) - np.log(before[0])
    np.testing.assert_array_equal(np.argsort(gained), np.argsort(promised))


@given(seed=st.integers(0, 99), before=probabilities)
def test_indexes_that_promise_the_same_are_no_evidence(seed, before):
    after, strangeness = Evidence(EXPERTS, {name: SKETCHES["base"] for name in SKETCHES}).weigh(
        unit_rows(seed, 1), before
    )
    np.testing.assert_allclose(after, before, atol=1e-5)
    sure = before.max()
    np.testing.assert_allclose(strangeness[0], DOUBT * np.log((1 - sure) / sure), atol=1e-4)


@given(seed=st.integers(0, 99), before=probabilities)
def test_strangeness_is_doubt_and_what_the_base_s_own_index_promises_beyond_the_likeliest_expert_s(seed, before):
    query = unit_rows(seed, 1)
    after, strangeness = Evidence(EXPERTS, SKETCHES).weigh(query, before)
    doubt = DOUBT * np.log((1 - after.max()) / after.max())
    promised = [(query @ SKETCHES[name].T).max() for name in ("base", EXPERTS[after.argmax()])]
    assert (strangeness[0] > doubt) == (promised[0] > promised[1])


def test_an_expert_without_an_index_is_left_out():
    sketches = {name: SKETCHES[name] for name in ("base", "metal")}
    query, before = unit_rows(0, 2), np.array([[0.9, 0.05, 0.05]] * 2, np.float32)
    after, strangeness = Evidence(EXPERTS, sketches).weigh(query, before)
    np.testing.assert_allclose(after, [[0, 1, 0]] * 2, atol=1e-6)
    assert np.isfinite(strangeness).all()


def test_what_has_no_index_is_strange_and_without_the_base_s_nothing_is():
    query, before = unit_rows(0, 2), np.array([[0.9, 0.05, 0.05]] * 2, np.float32)
    after, strangeness = Evidence(EXPERTS, {"base": SKETCHES["base"]}).weigh(query, before)
    np.testing.assert_array_equal(after, before)
    assert (strangeness == np.inf).all()
    _, strangeness = Evidence(EXPERTS, {name: SKETCHES[name] for name in EXPERTS}).weigh(query, before)
    assert (strangeness == -np.inf).all()


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5])
def test_at_most_a_share_of_the_dev_queries_exceeds_the_limit(model_folder, share):
    model = Model.load(model_folder)
    width = model.embedder.width
    names = ("base", *model.experts)
    judge = Evidence(model.experts, {name: make_sketch(unit_rows(seed, 40, width)) for seed, name in enumerate(names)})
    limit, above = judge.limit(model, share), []
    for entry in model.published.meta["experts"]:
        profile = read_profile(model.published, entry["profile"])
        before = model.query_router.probabilities(part(profile.dev_queries, model.query_router.reads))
        above.append(judge.weigh(profile.dev_vectors, before)[1] > limit)
    assert np.mean([own.mean() for own in above]) <= share + 1e-6
    rest = [own.mean() + 1 / len(own) for own in above]  # one more query of a domain would be too many
    assert np.mean(rest) > share
