"""New directories are there whole or not at all, whatever happens to those who make them."""

import os
from pathlib import Path

import pytest

import moeret
from moeret.lock import new_folder, require_own


def fill(out, text="whole", **options):
    with new_folder(out, **options) as folder:
        (folder / "a" / "b").mkdir(parents=True, exist_ok=True)
        (folder / "a" / "b" / "file").write_text(text)


def names(folder):
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))


def test_what_was_filled_is_there_and_nothing_else(tmp_path):
    fill(tmp_path / "x" / "out")
    assert names(tmp_path) == ["x", "x/out", "x/out/a", "x/out/a/b", "x/out/a/b/file"]


def test_everything_is_on_disk_before_it_has_its_name(tmp_path, monkeypatch):
    done, fsync, rename = [], os.fsync, os.rename
    monkeypatch.setattr(
        "os.fsync", lambda file: (done.append(str(Path(f"/proc/self/fd/{file}").readlink())), fsync(file))
    )
    monkeypatch.setattr("os.rename", lambda *own: (done.append("rename"), rename(*own)))
    fill(tmp_path / "out")
    before, after = done[: done.index("rename")], done[done.index("rename") + 1 :]
    assert {f"{tmp_path}/out.unfinished/{own}" for own in ("a", "a/b", "a/b/file")} <= {*before}
    assert str(tmp_path) in after


def test_a_failure_leaves_nothing_or_what_is_to_be_resumed(tmp_path):
    for resume in (False, True):
        with pytest.raises(KeyboardInterrupt), new_folder(tmp_path / "out", resume=resume) as folder:
            (folder / "half").write_text("")
            raise KeyboardInterrupt
        assert names(tmp_path) == (["out.unfinished", "out.unfinished/.lock", "out.unfinished/half"] if resume else [])
    fill(tmp_path / "out", resume=True)
    assert (tmp_path / "out" / "half").exists()


def test_what_a_killed_process_left_is_not_taken_for_ours(tmp_path):
    (tmp_path / "out.unfinished" / "sub").mkdir(parents=True)
    (tmp_path / "out.unfinished" / "sub" / "old").write_text("")
    (tmp_path / "out.unfinished" / "link").symlink_to(tmp_path)
    fill(tmp_path / "out")
    assert names(tmp_path / "out") == ["a", "a/b", "a/b/file"]


def test_what_is_there_stays(tmp_path):
    fill(tmp_path / "out", "mine")
    with pytest.raises(moeret.ConfigError, match="is there already"):
        fill(tmp_path / "out", "another")
    with pytest.raises(moeret.ConfigError, match="is there already"), new_folder(tmp_path / "later") as folder:
        fill(folder / "unused")
        (tmp_path / "later").mkdir()
    assert (tmp_path / "out" / "a" / "b" / "file").read_text() == "mine" and names(tmp_path / "later") == []


def test_a_folder_of_other_things_is_not_written_into(tmp_path):
    require_own(tmp_path / "new", "manifest.json")
    for name in (".lock", "manifest.json", "data"):
        (tmp_path / "out" / name).mkdir(parents=True)
        require_own(tmp_path / "out", "manifest.json", "training")
    (tmp_path / "out" / "manifest.json").rmdir()
    with pytest.raises(moeret.ConfigError, match=r"holds other things \(data\); name a new directory"):
        require_own(tmp_path / "out", "manifest.json", "training")


def test_one_makes_it_at_a_time(tmp_path):
    with new_folder(tmp_path / "out") as folder:
        (folder / "first").write_text("")
        with pytest.raises(moeret.BusyError, match="another process"):
            fill(tmp_path / "out")
    assert names(tmp_path / "out") == ["first"]
