"""How much of a delta is used, and what may not be."""

import jax.numpy as jnp
import numpy as np

from moeret.training.strength import OWN, SHARED, choose_strength, choose_strengths, harmless, try_strengths

BANK = {"layer_00": {"query": {"a": jnp.ones((2, 3, 1)), "b": jnp.ones((2, 1, 3))}}}
DELTA = {"layer_00": {"query": {"a": jnp.ones((3, 1)), "b": jnp.ones((1, 3))}}}
SEEN = [np.arange(40) < 20] * 2


def strength_of(bank, shared, number: int) -> tuple[float, float]:
    own = float(bank["layer_00"]["query"]["b"][number, 0, 0])
    return own, 0.0 if shared is None else float(shared.strengths[number + 1])


def scores(seen_gain: float, unseen_gain: float, noise: float = 0.0) -> np.ndarray:
    random = np.random.default_rng(0)
    return np.where(SEEN[0], 0.5 + seen_gain, 0.5 + unseen_gain) + noise * random.normal(size=40)


def test_each_expert_gets_the_strengths_that_serve_it_best():
    wanted = [(0.75, 0.5), (0.5, 1.0)]

    def score(bank, shared):
        found = [strength_of(bank, shared, number) for number in range(2)]
        far = [(a - x) ** 2 + (b - y) ** 2 for (a, b), (x, y) in zip(found, wanted, strict=True)]
        return [scores(*[0.3 * (distance == 0) - 0.1 * distance] * 2) for distance in far]

    chosen = choose_strengths(try_strengths(BANK, DELTA, score), [scores(0, 0)] * 2, SEEN)
    assert [*zip(chosen.own.tolist(), chosen.shared.tolist(), strict=True)] == wanted
    assert all(np.allclose(values, scores(0.3, 0.3)) for values in chosen.values)


def test_an_expert_that_hardly_cares_does_as_the_others_do():
    """A domain whose own best is no more than noise takes what serves the other, which gains much by it."""

    def score(bank, shared):
        (own, under), (other, _) = (strength_of(bank, shared, number) for number in range(2))
        noise = 0.001 if (own, under) == (0.25, 0.0) else 0.0
        return [scores(0.1 + noise, 0.1 + noise), scores(*[0.3 - 0.3 * abs(other - 0.75)] * 2)]

    chosen = choose_strengths(try_strengths(BANK, None, score), [scores(0, 0)] * 2, SEEN)
    assert chosen.own.tolist() == [0.75, 0.75]


def test_what_harms_unseen_queries_is_not_chosen_however_much_seen_ones_gain():
    def score(bank, shared):
        own, under = strength_of(bank, shared, 0)
        return [scores(own + under, 0.01 if own + under <= 1 else -0.1, noise=0.001)] * 2

    chosen = choose_strengths(try_strengths(BANK, DELTA, score), [scores(0, 0)] * 2, SEEN)
    assert (chosen.own + chosen.shared == 1).all()


def test_where_every_strength_harms_the_base_stays():
    chosen = choose_strengths(try_strengths(BANK, DELTA, lambda *_: [scores(0.5, -0.2)] * 2), [scores(0, 0)] * 2, SEEN)
    assert not chosen.own.any() and not chosen.shared.any()
    np.testing.assert_array_equal(chosen.values[0], scores(0, 0))


def test_a_loss_within_its_own_noise_is_no_harm():
    noisy = scores(0.3, -0.02, noise=0.3)
    assert harmless(noisy, scores(0, 0), SEEN[0])
    assert not harmless(scores(0.3, -0.02, noise=0.01), scores(0, 0), SEEN[0])
    assert harmless(scores(0, 0), scores(0, 0), np.ones(40, bool))  # no unseen query at all


def test_one_delta_for_all_domains_gets_the_strength_with_the_best_mean():
    one = {"layer_00": {"query": {"a": jnp.ones((1, 3, 1)), "b": jnp.ones((1, 1, 3))}}}

    def score(bank):
        own = strength_of(bank, None, 0)[0]
        return [np.full(5, 1 - own), np.full(50, 0.5 + 1.2 * own - (own > 0.6))]

    assert choose_strength(one, score)[0] == 0.5
    assert {0.0, 1.0} < {*OWN} and 1.0 in SHARED
