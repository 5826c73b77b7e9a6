"""Fitting and choosing routers."""

import numpy as np
import pytest

from moeret.models.router import centroid_router, part
from moeret.training.calibration import fit_logistic
from moeret.training.routing import (
    LOWERED,
    TAKEN,
    calibrate,
    choose_document_router,
    choose_query_router,
    fit_learned,
    quality,
)


def clouds(seed: int, counts=(40, 400), spread=0.6) -> list[np.ndarray]:
    """Unit vectors around two directions, one domain ten times the size of the other."""
    random = np.random.default_rng(seed)
    centres = np.random.default_rng(0).normal(size=(len(counts), 8))
    out = []
    for centre, count in zip(centres, counts, strict=True):
        own = centre / np.linalg.norm(centre) + spread * random.normal(size=(count, 8))
        out.append((own / np.linalg.norm(own, axis=1, keepdims=True)).astype(np.float32))
    return out


def readings(seed: int, spread: float = 0.6) -> list[np.ndarray]:
    """All parts alike."""
    return [np.concatenate([own, own, own], axis=1) for own in clouds(seed, spread=spread)]


def test_the_learned_router_separates_what_can_be_separated_whatever_the_domains_sizes():
    router = fit_learned(clouds(1), "base")
    assert quality(router, clouds(2, spread=0.2))["accuracy"] > 0.98


@pytest.mark.parametrize("fit", [centroid_router, lambda vectors: fit_learned(vectors, "base")])
def test_calibration_never_raises_the_log_loss_on_its_own_data(fit):
    router, dev = fit(clouds(1)), clouds(3)
    assert quality(calibrate(router, dev), dev)["log_loss"] <= quality(router, dev)["log_loss"] + 1e-9


def test_calibration_does_not_change_who_is_best():
    router, dev = fit_learned(clouds(1), "base"), clouds(3)
    for own in dev:
        assert (router.probabilities(own).argmax(1) == calibrate(router, dev).probabilities(own).argmax(1)).all()


def test_the_report_names_the_better_router():
    router, report = choose_query_router(readings(1), readings(2))
    best = max(("centroids", "learned"), key=lambda kind: report[kind]["accuracy"])
    assert report[report["chosen"]]["accuracy"] == report[best]["accuracy"] and router.kind == report["chosen"]


def test_an_added_expert_yields_to_those_before_it():
    train, dev = readings(1, spread=1.2), readings(2, spread=1.2)
    free, _ = choose_query_router(train, dev)
    yielding, _ = choose_query_router(train, dev, yields={1: [0]})
    taken = [
        (router.probabilities(part(dev[0], router.reads)).argmax(axis=1) == 1).mean() for router in (free, yielding)
    ]
    assert taken[0] > 0.02 and taken[1] < taken[0]
    assert taken[1] <= TAKEN or yielding.bias[1] == free.bias[1] - np.float32(LOWERED)
    assert yielding.bias[0] == free.bias[0] and (yielding.weights == free.weights).all()
    alone, _ = choose_query_router(train, dev, yields={1: []})
    np.testing.assert_array_equal(alone.bias, free.bias)


def test_documents_get_one_expert_each():
    router = choose_document_router(clouds(1), clouds(2))
    weights = router.choose(clouds(4)[0]).weights
    assert weights.shape[1] == 1 and set(np.unique(weights)) <= {0.0, 1.0}


def test_a_query_unlike_all_that_was_known_makes_the_router_abstain():
    train, dev = readings(1, spread=0.15), readings(2, spread=0.15)
    router, _ = choose_query_router(train, dev)
    stranger = -np.sum([own.mean(axis=0) for own in train], axis=0, keepdims=True)
    assert router.choose(part(stranger, router.reads)).abstained.all()
    assert np.mean([router.choose(part(own, router.reads)).abstained.mean() for own in dev]) < 0.05


def test_logistic_calibration_recovers_the_curve_that_made_the_data():
    random = np.random.default_rng(0)
    scores = random.uniform(-1, 1, 20_000)
    relevant = random.uniform(size=len(scores)) < 1 / (1 + np.exp(-(4 * scores - 1)))
    slope, intercept = fit_logistic(scores, relevant)
    assert abs(slope - 4) < 0.3 and abs(intercept + 1) < 0.1


def test_logistic_calibration_never_turns_a_ranking_around():
    scores = np.linspace(0, 1, 100)
    slope, intercept = fit_logistic(scores, scores < 0.3)
    chances = 1 / (1 + np.exp(-(slope * scores + intercept)))
    assert (np.diff(chances) > 0).all() and abs(chances.mean() - 0.3) < 0.01
