"""Strangeness: higher the more the base's own index promises and the less the router knows; its limit is dev's."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moeret.models.model import Model, read_profile
from moeret.models.router import half
from moeret.retrieval.sketch import make_sketch
from moeret.retrieval.strangeness import DOUBT, Strangeness


def unit_rows(seed: int, count: int, width: int) -> np.ndarray:
    rows = np.random.default_rng(seed).normal(size=(count, width)).astype(np.float32)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


@pytest.fixture(scope="module")
def trained(model_folder):
    return Model.load(model_folder)


@pytest.fixture(scope="module")
def sketches(trained):
    width = trained.embedder.width
    return {name: make_sketch(unit_rows(seed, 40, width)) for seed, name in enumerate(("base", *trained.experts))}


def sure_of(expert: int, chance: float) -> np.ndarray:
    row = np.full(2, 1 - chance, np.float32)
    row[expert] = chance
    return row


@given(seed=st.integers(0, 99), chance=st.floats(0.55, 0.9), surer=st.floats(0.01, 0.09))
def test_it_tells_what_the_base_s_index_promises_from_the_expert_s_and_grows_with_doubt(
    trained, sketches, seed, chance, surer
):
    query = unit_rows(seed, 1, trained.embedder.width)
    swapped = {**sketches, "base": sketches["fruit"], "fruit": sketches["base"]}
    own, other = (
        [Strangeness(trained, each).of(query, sure_of(0, p)[None])[0] for p in (chance, chance + surer)]
        for each in (sketches, swapped)
    )
    assert own[0] > own[1] and other[0] > other[1]
    doubt = (own[0] + other[0]) / 2  # what is left where both promise the same
    np.testing.assert_allclose(doubt, DOUBT * np.log((1 - chance) / chance), rtol=1e-3, atol=1e-4)
    promised = [(query @ sketches[name].T).max() for name in ("base", "fruit")]
    assert (own[0] > doubt) == (promised[0] > promised[1])


def test_it_is_infinite_for_an_expert_that_has_no_index(trained, sketches):
    judge = Strangeness(trained, {name: sketches[name] for name in ("base", "metal")})
    query = unit_rows(0, 2, trained.embedder.width)
    found = judge.of(query, np.stack([sure_of(0, 0.9), sure_of(1, 0.9)]))
    assert found[0] == np.inf and np.isfinite(found[1])


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5])
def test_at_most_a_share_of_the_dev_queries_exceeds_the_limit(trained, sketches, share):
    judge, router = Strangeness(trained, sketches), trained.query_router
    limit, above = judge.limit(trained, share), []
    for entry in trained.published.meta["experts"]:
        profile = read_profile(trained.published, entry["profile"])
        probabilities = router.probabilities(half(profile.dev_queries, router.reads))
        above.append(judge.of(profile.dev_vectors, probabilities) > limit)
    assert np.mean([own.mean() for own in above]) <= share + 1e-6
    rest = [own.mean() + 1 / len(own) for own in above]  # one more query of a domain would be too many
    assert np.mean(rest) > share
