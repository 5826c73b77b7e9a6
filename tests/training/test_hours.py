"""How long a model took stands beside it, and changes nothing of what it is."""

import json
import shutil

import pytest

import moeret
from moeret import artifact
from moeret.models.card import read_made
from moeret.training.hours import counted


def count(model, request, seconds, monkeypatch, error=None):
    """One run of so many seconds; `error` ends it."""
    clock = iter((100.0, 100.0 + seconds))
    monkeypatch.setattr("moeret.training.hours.time.monotonic", lambda: next(clock))
    with counted(model, "train") as start:
        start(request)
        if error:
            raise error
    return read_made(model)["train"]


def test_a_run_that_was_cut_off_adds_up_and_another_starts_anew(tmp_path, monkeypatch):
    with pytest.raises(KeyboardInterrupt):
        count(tmp_path, {"steps": 1}, 1800, monkeypatch, KeyboardInterrupt())
    made = count(tmp_path, {"steps": 1}, 3600, monkeypatch)
    assert count(tmp_path, {"steps": 1}, 3600, monkeypatch)["hours"] == 1, (
        "the same again, removed or deleted meanwhile"
    )
    assert made["hours"] == 1.5 and made["versions"].keys() == {"python", "moeret", "jax", "flax"}
    assert count(tmp_path, {"steps": 2}, 3600, monkeypatch)["hours"] == 1
    (tmp_path / "made.json").write_text("{")
    assert count(tmp_path, {"steps": 2}, 3600, monkeypatch)["hours"] == 1


def test_a_finished_run_that_is_only_returned_takes_no_time(tmp_path):
    with counted(tmp_path, "train"):
        pass
    assert [*tmp_path.iterdir()] == []


def test_training_and_adding_are_noted_and_no_part_of_the_model(model_folder, domains, tmp_path):
    shutil.copytree(model_folder, tmp_path / "m")
    assert [*read_made(tmp_path / "m")] == ["train"]
    before = artifact.read(tmp_path / "m", "model").fingerprint
    (tmp_path / "m" / "made.json").unlink()
    assert artifact.read(tmp_path / "m", "model").fingerprint == before
    moeret.add_expert(tmp_path / "m", "river", domains["river"], label_free=True)
    assert [*read_made(tmp_path / "m")] == ["add river"]
    assert "hours" not in json.dumps(artifact.read(tmp_path / "m", "model").meta)
