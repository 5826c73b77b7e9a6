"""How long the shared delta trains."""

import dataclasses
import json

from hypothesis import given
from hypothesis import strategies as st

import moeret
from moeret.config import TrainConfig
from moeret.training.learn import outline, shared_limit
from moeret.training.prepare import read_domains

CONFIG = TrainConfig(shared_steps=500, epochs=3.0, batch_size=32)


@given(st.lists(st.integers(1, 30_000), min_size=1, max_size=20))
def test_small_domains_shorten_the_shared_deltas_schedule(train_queries):
    """Never more than the steps asked for, nor than the passes: a schedule that patience cuts off ends at its highest rate."""
    limit = shared_limit(CONFIG, train_queries)
    assert 1 <= limit <= 500 * len(train_queries)
    assert (limit - 1) * 32 < 3 * sum(train_queries)
    if 3 * sum(train_queries) >= 500 * 32 * len(train_queries):
        assert limit == 500 * len(train_queries)


def test_more_queries_never_train_less():
    """One more query of any domain adds at most a step."""
    for first in range(1, 400):
        assert 0 <= shared_limit(CONFIG, [first + 1, 50]) - shared_limit(CONFIG, [first, 50]) <= 1


def test_a_run_ends_with_its_schedule(two_domains, base_folder, train_config, tmp_path):
    """Many steps asked for, one pass allowed: the shared delta takes just the steps of that pass."""
    config = dataclasses.replace(train_config, steps=0, shared_steps=1000, epochs=1.0, patience=1000)
    model = moeret.train(two_domains, tmp_path / "m", base=str(base_folder), config=config)
    limit = shared_limit(config, [own["train_queries"] for own in model.meta["experts"]])
    log = (tmp_path / "m/training/shared/metrics.jsonl").read_text().splitlines()
    assert [own["step"] for own in map(json.loads, log) if "loss" in own] == list(range(1, limit + 1))
    assert limit < 2000


def test_the_outline_tells_what_is_done_and_nothing_else(two_domains):
    domains = read_domains(two_domains)
    text = outline(domains, TrainConfig())
    assert (
        text.startswith("2 domains, ")
        and "embed 24 documents" in text
        and "2 experts (at most 400 steps, 3 epochs)" in text
    )
    assert "shared delta" in text and "shared delta" not in outline(domains, TrainConfig(tower="both"))
    assert "domains" not in outline(domains[:1], TrainConfig())
