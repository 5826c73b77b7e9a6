"""Settings: nonsense is refused by name, and a config compares equal to itself after a trip through JSON."""

import dataclasses
import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moeret.config import MATRICES, ExpertConfig, IndexConfig, TrainConfig, differences, require, to_json
from moeret.errors import ConfigError, MoeretError

NONSENSE = [
    *((ExpertConfig, "rank", value) for value in (0, -1)),
    *((ExpertConfig, "layers", value) for value in (0, -3)),
    *((ExpertConfig, "matrices", value) for value in ((), ("query", "query"), ("nothing",), ("query", ""))),
    *((TrainConfig, "tower", value) for value in ("document", "", "QUERY")),
    *(
        (TrainConfig, name, value)
        for name in ("shared_steps", "batch_size", "mini_batch_size", "evaluate_every", "patience", "dev_queries")
        for value in (0, -1)
    ),
    *((TrainConfig, "hard_negatives", value) for value in (-1,)),
    *(
        (TrainConfig, name, value)
        for name in ("learning_rate", "shared_learning_rate")
        for value in (0.0, -1e-3, math.nan)
    ),
    *((TrainConfig, "temperature", value) for value in (0.0, -0.02, math.nan)),
    *((TrainConfig, "warmup", value) for value in (-0.1, 1.0, 2.0, math.nan)),
    *((TrainConfig, "weight_decay", value) for value in (-0.1, math.nan)),
    *((TrainConfig, "seed", value) for value in (-1, 2**31)),
    *((IndexConfig, "M", value) for value in (0, 1, 257)),
    *((IndexConfig, "ef_construction", value) for value in (0, 15)),
    *((IndexConfig, "ef", value) for value in (0, -1)),
    *((IndexConfig, "exact_below", value) for value in (-1,)),
]
SENSE = [
    *((ExpertConfig, "matrices", (name,)) for name in MATRICES),
    *((TrainConfig, "tower", value) for value in ("query", "both")),
    *((TrainConfig, name, 1) for name in ("steps", "batch_size", "evaluate_every", "patience", "dev_queries")),
    *((TrainConfig, name, 0) for name in ("hard_negatives", "warmup", "weight_decay", "seed")),
    (TrainConfig, "seed", 2**31 - 1),
    (IndexConfig, "M", 2),
    (IndexConfig, "exact_below", 0),
]


@pytest.mark.parametrize(("config", "name", "value"), NONSENSE)
def test_a_value_without_sense_is_refused_by_name(config, name, value):
    with pytest.raises(ConfigError, match=rf"\b{name}\b"):
        config(**{name: value})


@pytest.mark.parametrize(("batch", "mini"), [(300, 256), (512, 255)])
def test_a_batch_that_its_parts_do_not_divide_is_refused(batch, mini):
    with pytest.raises(ConfigError, match=f"batch_size {batch} is no multiple of mini_batch_size {mini}"):
        TrainConfig(batch_size=batch, mini_batch_size=mini)
    TrainConfig(batch_size=200, mini_batch_size=256)


@pytest.mark.parametrize(("config", "name", "value"), SENSE)
def test_values_at_the_edge_of_sense_are_taken(config, name, value):
    assert getattr(config(**{name: value}), name) == value


@pytest.mark.parametrize("config", [ExpertConfig, TrainConfig, IndexConfig])
def test_a_config_is_checked_again_when_it_is_replaced_and_cannot_change(config):
    made = config()
    name = dataclasses.fields(made)[-1].name
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(made, name, None)
    assert dataclasses.replace(made) == made
    assert hash(made) == hash(config())


def test_a_config_error_is_one_of_ours_and_a_value_error():
    require(True, "fine")
    with pytest.raises(ConfigError, match=r"^not fine$") as error:
        require(False, "not fine")
    assert isinstance(error.value, MoeretError)
    assert isinstance(error.value, ValueError)


@pytest.mark.parametrize("config", [ExpertConfig(rank=3), TrainConfig(), IndexConfig(M=5)])
def test_a_config_equals_itself_after_a_trip_through_json(config):
    written = to_json(config)
    read = json.loads(json.dumps(written))
    assert read == written
    assert differences(read, written) == ""


def test_a_config_in_json_can_be_made_into_the_config_again():
    config = TrainConfig(steps=7, expert=ExpertConfig(rank=3, matrices=("query", "mlp_in")))
    raw = to_json(config)
    expert = {key: tuple(value) if isinstance(value, list) else value for key, value in raw.pop("expert").items()}
    assert TrainConfig(**raw, expert=ExpertConfig(**expert)) == config


values = st.integers() | st.text("xyz", max_size=3) | st.lists(st.integers(), max_size=2)
objects = st.dictionaries(st.sampled_from("abcde"), values)


@given(old=objects, new=objects)
def test_differences_names_exactly_the_keys_that_differ(old, new):
    found = differences(old, new)
    assert (found == "") == (old == new)
    for key in old.keys() | new.keys():
        named = any(line.startswith(f"{key} ") for line in found.split(", "))
        assert named == (old.get(key) != new.get(key))


def test_differences_reads_as_a_sentence():
    assert differences({"steps": 300, "seed": 0, "same": 1}, {"steps": 200, "seed": 1, "same": 1}) == (
        "seed 0 -> 1, steps 300 -> 200"
    )
    digests = {"domain law": {"corpus.jsonl": "a" * 64, "queries.jsonl": "b" * 64}, "model": "c" * 64}
    other = {
        "domain law": {"corpus.jsonl": "d" * 64, "queries.jsonl": "b" * 64},
        "model": "e" * 64,
        "domain tax": {"x": "f"},
    }
    assert differences(digests, other) == "domain law (corpus.jsonl), domain tax added, model changed"
