"""Processes that die while a snapshot is published, or just after."""

import shutil
from pathlib import Path

import pytest
from conftest import write_jsonl

from moeret import artifact
from moeret.errors import ConfigError
from moeret.retrieval import build, job, update
from moeret.retrieval.build import build_index
from moeret.retrieval.job import Job
from moeret.retrieval.update import compact_index, rollback_index, update_index


class Died(BaseException):
    """As if the process had been killed."""


@pytest.fixture
def index(tmp_path, index_folder) -> Path:
    """A copy of the shared index, to be changed."""
    shutil.copytree(index_folder, tmp_path / "index")
    return tmp_path / "index"


def domain_of(folder: Path, texts: dict[str, str]) -> Path:
    write_jsonl(folder / "corpus.jsonl", [{"_id": id, "text": text} for id, text in texts.items()])
    return folder


def die(*_):
    raise Died


def test_an_update_that_died_once_it_was_published_hinders_no_other(tmp_path, monkeypatch, index):
    one, other = (domain_of(tmp_path / id, {id: f"another apple {id}"}) for id in "ab")
    with monkeypatch.context() as patch, pytest.raises(Died):
        patch.setattr(update, "remove_leftovers", die)
        update_index(index, {"fruit": one})
    assert artifact.read(index, "index").snapshot == 2
    assert update_index(index, {"fruit": one}).unchanged == 1
    assert not (index / job.FOLDER).exists()
    assert update_index(index, {"fruit": other}).added == 1


def test_another_change_goes_on_after_one_that_died_once_it_was_published(tmp_path, monkeypatch, index):
    one, other = (domain_of(tmp_path / id, {id: f"another apple {id}"}) for id in "ab")
    with monkeypatch.context() as patch, pytest.raises(Died):
        patch.setattr(update, "remove_leftovers", die)
        update_index(index, {"fruit": one})
    assert update_index(index, {"fruit": other}).added == 1
    assert not (index / job.FOLDER).exists()


def test_a_compaction_that_died_once_it_was_published_leaves_nothing_when_run_again(monkeypatch, index):
    update_index(index, delete={"fruit": ["d0"]})
    with monkeypatch.context() as patch, pytest.raises(Died):
        patch.setattr(update, "remove_leftovers", die)
        compact_index(index)
    assert compact_index(index).snapshot == 3
    assert not (index / job.FOLDER).exists()


def test_a_publication_that_died_before_its_rename_leaves_the_present_no_earlier_snapshot(tmp_path, monkeypatch, index):
    update_index(index, delete={"fruit": ["d0"]})
    usual = artifact.write_atomically
    with monkeypatch.context() as patch, pytest.raises(Died):
        patch.setattr(
            artifact,
            "write_atomically",
            lambda path, contents: die() if path.name == artifact.MANIFEST else usual(path, contents),
        )
        rollback_index(index)
    assert [own.snapshot for own in artifact.snapshots(index, "index")] == [1, 2]
    rollback_index(index)
    assert artifact.read(index, "index").meta["documents"]["count"] == 24


def test_an_index_whose_job_died_once_it_was_published_can_be_changed(tmp_path, monkeypatch, model_folder, two_domains):
    with monkeypatch.context() as patch, pytest.raises(Died):
        patch.setattr(build, "remove_leftovers", die)
        build_index(model_folder, tmp_path / "index", two_domains)
    assert update_index(tmp_path / "index", {"fruit": domain_of(tmp_path / "a", {"a": "another apple"})}).added == 1
    assert not (tmp_path / "index" / job.FOLDER).exists()


def test_an_unfinished_job_of_another_kind_stays(tmp_path, monkeypatch, index):
    one, other = (domain_of(tmp_path / id, {id: f"another apple {id}"}) for id in "ab")
    with monkeypatch.context() as patch, pytest.raises(Died):
        patch.setattr(Job, "link", die)
        update_index(index, {"fruit": one})
    with pytest.raises(ConfigError, match="unfinished job"):
        update_index(index, {"fruit": other})
    assert update_index(index, {"fruit": one}).added == 1
