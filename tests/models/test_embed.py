"""Embedding many texts: order, batching and routes change nothing."""

import re
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import jax
import numpy as np
import pytest
from conftest import write_base

from moeret.config import ExpertConfig
from moeret.data.buckets import standard_edges
from moeret.models import embed, experts
from moeret.models.embed import Embedder
from moeret.models.familiarity import Familiarity
from moeret.models.pretrained import load_base
from moeret.models.router import Router, part

WORDS = ["apple", "iron", "rhine", "find", "the", "a", "very", "long", "story", "zinc", "plum", "kiwi"]
TEXTS = [
    " ".join(WORDS[n % 5 : n % 5 + length])
    for n, length in enumerate([5, 7, 6, 8, 4, 10, 3, 9, 2, 8, 6, 6, 1, 9, 0, 8])
]
"""Eight texts for each of two buckets, by turns: few shapes to compile."""
close = {"atol": 2e-6, "rtol": 0}


@pytest.fixture(scope="module")
def embedder(base_folder):
    """The tiny base with two random experts behind expert 0."""
    base = load_base(str(base_folder), base_folder)
    random = np.random.default_rng(0)
    keys = list(jax.random.split(jax.random.key(0), 2))
    bank = experts.init_bank(base.config, ExpertConfig(rank=4, layers=1), keys)
    bank = jax.tree.map(lambda leaf: (0.5 * random.normal(size=leaf.shape)).astype(np.float32), bank)
    return Embedder(base, experts.with_base(bank))


@pytest.fixture(scope="module")
def routes():
    """Two experts and weights a text; every fourth text keeps to the base."""
    random = np.random.default_rng(1)
    weights = random.uniform(0.1, 1, (len(TEXTS), 2)).astype(np.float32)
    weights[::4] = 0
    return random.integers(1, 3, (len(TEXTS), 2)), weights


def test_order_and_batching_do_not_change_vectors(embedder, routes, monkeypatch):
    chosen, weights = routes
    base, mixed = embedder.base(TEXTS), embedder.mixed(TEXTS, chosen, weights)
    assert base.shape == mixed.shape == (len(TEXTS), embedder.width) and base.dtype == mixed.dtype == np.float32
    order = np.random.default_rng(2).permutation(len(TEXTS))
    shuffled = [TEXTS[n] for n in order]
    np.testing.assert_allclose(embedder.base(shuffled), base[order], **close)
    np.testing.assert_allclose(embedder.mixed(shuffled, chosen[order], weights[order]), mixed[order], **close)
    monkeypatch.setattr(embed, "_CHUNK", 8)
    monkeypatch.setattr(embed, "_TOKENS_HELD", 30)
    np.testing.assert_allclose(embedder.base(TEXTS), base, **close)
    np.testing.assert_allclose(embedder.mixed(TEXTS, chosen, weights), mixed, **close)
    for n in range(len(TEXTS)):
        alone = embedder.mixed([TEXTS[n]], chosen[n : n + 1], weights[n : n + 1])
        np.testing.assert_allclose(alone[0], mixed[n], **close)


@pytest.mark.parametrize("room", ["all", "none"])
def test_texts_of_one_expert_are_read_together_and_get_its_vectors(embedder, routes, monkeypatch, room):
    if room == "none":
        monkeypatch.setattr(embed, "_TOKENS_HELD", 1)
        monkeypatch.setattr(embed, "_FOLDED_BYTES", 1)
        embedder = embedder.with_bank(embedder.bank)  # which keeps nothing yet
    chosen, weights = (own.copy() for own in routes)
    weights[::3] = [1.0, 0.0]  # every third text uses one expert, among such as mix two or none
    weights[1::6] = [0.0, 1.0]
    found = embedder.mixed(TEXTS, chosen, weights)
    for place, slot in ((range(0, len(TEXTS), 3), 0), (range(1, len(TEXTS), 6), 1)):
        for row in place:
            alone = embedder.alone(int(chosen[row, slot])).base([TEXTS[row]])
            np.testing.assert_allclose(found[row], alone[0], **close)
    assert len(embedder._kept) == (2 if room == "all" else 1)


@pytest.mark.parametrize("reads", ["trunk", "base"])
@pytest.mark.parametrize("normalize", [True, False])
def test_routed_is_readings_and_mixed_in_one_pass(embedder, normalize, reads):
    readings = embedder.readings(TEXTS, reads=reads)
    np.testing.assert_allclose(readings, part(embedder.readings(TEXTS), reads), **close)
    width = readings.shape[1]
    weights = np.random.default_rng(3).normal(size=(width, 2)).astype(np.float32)
    router = Router("learned", reads, weights, np.zeros(2, np.float32), slots=2)
    ones, known = (
        np.ones(width, np.float32),
        readings[:2] / np.linalg.norm(readings[:2], axis=1, keepdims=True),
    )
    familiarity = Familiarity(0 * ones, ones, known, 0.0)
    limit = float(np.sort(familiarity.of(readings))[3:5].mean())  # so that four texts keep to the base
    router = replace(router, familiarity=replace(familiarity, limit=limit))
    wanted = router.choose(readings)
    choice, merged = embedder.routed(TEXTS, router, normalize=normalize)
    for own, other in zip(choice, wanted, strict=True):
        np.testing.assert_allclose(own, other, **close)
    mixed = embedder.mixed(TEXTS, wanted.experts, wanted.merged, normalize=normalize)
    np.testing.assert_allclose(merged, mixed, **close)
    base = embedder.base(TEXTS, normalize=normalize)
    assert choice.abstained.sum() == 4
    np.testing.assert_allclose(merged[choice.abstained], base[choice.abstained], **close)
    assert np.abs(merged - base).max(1)[~choice.abstained].min() > 1e-3


def test_a_revised_choice_gives_the_vectors_of_that_choice(embedder):
    weights = np.random.default_rng(3).normal(size=(2 * embedder.width, 2)).astype(np.float32)
    router = Router("learned", "trunk", weights, np.zeros(2, np.float32), slots=2, minimum=0.0)
    first, vectors = embedder.routed(TEXTS, router)
    seen = np.empty_like(vectors)

    def revise(rows, choice, own):
        seen[rows] = own
        swapped = choice.probabilities.copy()
        swapped[::2] = swapped[::2, ::-1]
        return router.pick(swapped)

    choice, revised = embedder.routed(TEXTS, router, revise=revise)
    np.testing.assert_allclose(seen, vectors, **close)
    np.testing.assert_allclose(revised[1::2], vectors[1::2], **close)
    np.testing.assert_allclose(revised, embedder.mixed(TEXTS, choice.experts, choice.merged), **close)
    assert np.abs(choice.probabilities - first.probabilities)[::2].max() > 0.1


def test_only_a_change_that_matters_is_embedded_again(embedder, monkeypatch):
    weights = np.zeros((2 * embedder.width, 2), np.float32)
    router = Router("learned", "trunk", weights, np.zeros(2, np.float32), slots=2, minimum=0.0)
    usual, embedded = Embedder._branches, []

    def counted(self, states, *mix):
        embedded.append(len(states))
        return usual(self, states, *mix)

    monkeypatch.setattr(Embedder, "_branches", counted)
    for before, after, again in ((0.5, 0.51, 0), (0.5, 0.53, 1), (0.92, 0.97, 0), (0.91, 0.89, 1), (0.89, 0.91, 1)):
        own = replace(router, bias=np.log([before, 1 - before]).astype(np.float32))
        embedded.clear()
        embedder.routed(
            TEXTS[:1], own, revise=lambda rows, choice, vectors, p=after: router.pick(np.array([[p, 1 - p]]))
        )
        assert embedded == [1, again], (before, after)


def test_kept_experts_share_what_no_delta_changes(embedder):
    for own in (embedder, embedder.in_precision("bfloat16")):
        alone = own.alone(1)
        pairs = zip(jax.tree.leaves(own._params), jax.tree.leaves(alone._params), strict=True)
        changed = [one is not other for one, other in pairs]
        assert sum(changed) == 6  # the matrices of one layer


def test_kept_experts_serve_many_threads(embedder, monkeypatch):
    monkeypatch.setattr(embed, "_FOLDED_BYTES", 1)
    embedder = embedder.with_bank(embedder.bank)
    wanted = [embedder.alone(expert).base(TEXTS) for expert in (1, 2)]

    def search(turn: int) -> np.ndarray:
        experts_of = np.full((len(TEXTS), 1), 1 + turn % 2)
        return embedder.mixed(TEXTS, experts_of, np.ones((len(TEXTS), 1), np.float32))

    with ThreadPoolExecutor(8) as pool:
        for turn, found in enumerate(pool.map(search, range(64))):
            np.testing.assert_allclose(found, wanted[turn % 2], **close)
    assert len(embedder._kept) == 1


def test_long_texts_are_packed_beside_short_ones(tmp_path):
    write_base(tmp_path, positions=320)
    base = load_base(str(tmp_path), tmp_path)
    random, keys = np.random.default_rng(0), list(jax.random.split(jax.random.key(0), 2))
    bank = experts.init_bank(base.config, ExpertConfig(rank=4, layers=1), keys)
    bank = jax.tree.map(lambda leaf: (0.5 * random.normal(size=leaf.shape)).astype(np.float32), bank)
    embedder = Embedder(base, experts.with_base(bank))
    texts = [" ".join(random.choice(WORDS, count)) for count in (400, 3, 200, 9, 130, 1)]
    assert max(len(own) for own in base.tokenizer(texts)) == 320
    ones = np.ones((len(texts), 1), np.float32)
    for expert in (0, 1, 2):
        found = embedder.mixed(texts, np.full((len(texts), 1), expert), ones)
        np.testing.assert_allclose(found, embedder.alone(expert).base(texts), **close)
    both = embedder.mixed(texts, np.tile([1, 2], (len(texts), 1)), np.tile([0.5, 0.5], (len(texts), 1)))
    for row, text in enumerate(texts):
        alone = embedder.mixed([text], np.array([[1, 2]]), np.array([[0.5, 0.5]]))
        np.testing.assert_allclose(both[row], alone[0], **close)


def test_no_texts_are_routed_to_nothing(embedder):
    router = Router("learned", "trunk", np.ones((2 * embedder.width, 2), np.float32), np.zeros(2, np.float32))
    choice, merged = embedder.routed([], router)
    assert merged.shape == (0, embedder.width) and [len(own) for own in choice] == [0, 0, 0, 0]


def test_a_reading_is_the_moments_of_the_trunk_s_tokens_and_the_unit_base_vector(embedder):
    readings = embedder.readings(TEXTS)
    for rows, x, _, lengths in embedder.hidden(TEXTS):
        for row, own, length in zip(rows, np.asarray(x), np.asarray(lengths), strict=False):
            moments = np.concatenate([own[:length].mean(axis=0), own[:length].std(axis=0)])
            np.testing.assert_allclose(part(readings, "trunk")[row], moments, **close)
    np.testing.assert_allclose(part(readings, "base"), embedder.base(TEXTS), **close)
    alone = np.concatenate([embedder.readings([text]) for text in TEXTS])  # so padding changes nothing
    np.testing.assert_allclose(readings, alone, **close)


def test_another_bank_on_the_same_base(embedder):
    other = embedder.with_bank({})
    np.testing.assert_allclose(other.base(TEXTS[:1]), embedder.base(TEXTS[:1]), **close)
    assert other.bank == {} and embedder.bank


def test_progress_counts_every_text_once(embedder, routes):
    done, notes = [], []

    def advance(n, note=None):
        done.append(n)
        notes.append(note)

    embedder.base(TEXTS, advance=advance)
    assert sum(done) == len(TEXTS)
    assert re.fullmatch(r"\d+% padding", notes[-1])
    embedder.mixed(TEXTS, *routes, advance=advance)
    assert sum(done) == 2 * len(TEXTS)


def test_shapes_are_chosen_for_all_texts_of_a_call(embedder, monkeypatch):
    told = []

    def edges(most, tokens):
        told.append(tokens)
        return standard_edges(most, tokens)

    monkeypatch.setattr(embed, "standard_edges", edges)
    monkeypatch.setattr(embed, "_CHUNK", 4)
    embedder.base(["a red apple"] * 12)
    assert told == 3 * [12 * len(embedder.base_encoder.tokenizer(["a red apple"])[0])]
