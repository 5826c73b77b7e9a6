"""Artifacts: whatever happens to a directory, a reader gets a whole version of it or an error that names the culprit."""

import errno
import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moeret import artifact
from moeret.artifact import MANIFEST, Artifact, Draft, FileEntry
from moeret.errors import ArtifactError, BusyError
from moeret.lock import writing

KIND = "thing"
OLD = {"top.bin": b"the old top", "deep/er/one.bin": b"the old depth", "deep/er/two.txt": b"a text", "plain": b"p"}
NEW = {"top.bin": b"the new top", "deep/er/one.bin": b"the new depth", "other/three.bin": b"three"}


def publish(root: Path, contents: dict[str, bytes], meta: dict | None = None, kind: str = KIND) -> Artifact:
    draft = Draft(root, kind)
    root.mkdir(parents=True, exist_ok=True)
    for name, data in contents.items():
        draft.add(name, lambda path, data=data: path.write_bytes(data))
    return draft.publish(meta or {})


def everything(root: Path) -> dict[str, bytes]:
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def contents(published: Artifact) -> list[bytes]:
    return sorted(published.path(name).read_bytes() for name in published.files)


def leftovers(root: Path) -> set[str]:
    return everything(root).keys() - artifact.read(root, KIND).files.keys() - {MANIFEST}


def forge(root: Path, change: Callable[[dict], object]) -> None:
    """Alters the manifest and makes its fingerprint right again, as only somebody who knows the format could."""
    raw = json.loads((root / MANIFEST).read_text())
    change(raw)
    files = {name: entry["sha256"] for name, entry in raw["files"].items()}
    raw["fingerprint"] = artifact.fingerprint([raw["kind"], raw["meta"], files])
    (root / MANIFEST).write_text(json.dumps(raw))


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A published version of OLD."""
    publish(tmp_path / "root", OLD, {"version": "old"})
    return tmp_path / "root"


def test_what_is_published_is_what_is_read(tmp_path):
    published = publish(tmp_path, OLD, {"numbers": [1, 2.5, None], "name": "ü\u2028"})
    assert artifact.read(tmp_path, KIND) == published
    assert contents(published) == sorted(OLD.values())
    assert published.meta == {"numbers": [1, 2.5, None], "name": "ü\u2028"}
    assert leftovers(tmp_path) == set()


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=6,
)


@settings(deadline=None, max_examples=30)
@given(meta=st.dictionaries(st.text(max_size=3), json_values, max_size=3))
def test_any_json_survives_as_meta(tmp_path_factory, meta):
    root = tmp_path_factory.mktemp("meta")
    published = publish(root, {}, meta)
    assert artifact.read(root, KIND) == published
    assert published.meta == meta


def test_the_fingerprint_depends_on_contents_meta_and_kind_and_on_nothing_else(tmp_path):
    first = publish(tmp_path / "first", OLD, {"a": 1, "b": 2}).fingerprint
    assert publish(tmp_path / "second", dict(reversed(OLD.items())), {"b": 2, "a": 1}).fingerprint == first
    others = [
        publish(tmp_path / "meta", OLD, {"a": 1, "b": 3}),
        publish(tmp_path / "kind", OLD, {"a": 1, "b": 2}, kind="other"),
        publish(tmp_path / "contents", {**OLD, "top.bin": b"the old tap"}, {"a": 1, "b": 2}),
        publish(tmp_path / "fewer", {"top.bin": OLD["top.bin"]}, {"a": 1, "b": 2}),
    ]
    assert len({first, *(other.fingerprint for other in others)}) == 5


def test_an_added_file_gets_a_name_that_tells_its_contents_apart(tmp_path):
    draft = Draft(tmp_path, KIND)
    names = {draft.add("x.tar.gz", lambda path, data=data: path.write_bytes(data)) for data in (b"a", b"b", b"a")}
    assert len(names) == 2
    assert all(Path(name).suffix == ".gz" for name in names)


def test_a_file_that_no_manifest_lists_has_no_path(root):
    with pytest.raises(ArtifactError, match=r"lists no file 'nothing\.bin'"):
        artifact.read(root, KIND).path("nothing.bin")


DAMAGES = {
    "truncated": lambda path: path.write_bytes(path.read_bytes()[:-1]),
    "emptied": lambda path: path.write_bytes(b""),
    "longer": lambda path: path.write_bytes(path.read_bytes() + b"\0"),
    "first bit flipped": lambda path: path.write_bytes(bytes([path.read_bytes()[0] ^ 1]) + path.read_bytes()[1:]),
    "last bit flipped": lambda path: path.write_bytes(path.read_bytes()[:-1] + bytes([path.read_bytes()[-1] ^ 128])),
    "deleted": lambda path: path.unlink(),
    "a directory": lambda path: (path.unlink(), path.mkdir()),
    "a dangling link": lambda path: (path.unlink(), path.symlink_to("nowhere")),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_every_damaged_file_is_named(root, damage):
    for name, path in [(name, root / name) for name in artifact.read(root, KIND).files]:
        before = path.read_bytes()
        DAMAGES[damage](path)
        with pytest.raises(ArtifactError) as error:
            artifact.read(root, KIND)
        assert str(path) in str(error.value), name
        path.rmdir() if path.is_dir() else path.unlink(missing_ok=True)
        path.write_bytes(before)
        artifact.read(root, KIND)


def test_two_files_that_changed_places_are_noticed(root):
    one, two = (root / name for name in artifact.read(root, KIND).files if name.startswith("deep"))
    swapped = one.read_bytes(), two.read_bytes()
    two.write_bytes(swapped[0])
    one.write_bytes(swapped[1])
    with pytest.raises(ArtifactError, match=f"{one}|{two}"):
        artifact.read(root, KIND)


def test_swapped_files_of_one_size_are_noticed(tmp_path):
    published = publish(tmp_path, {"a": b"1234", "b": b"5678"})
    one, two = (tmp_path / name for name in published.files)
    one.write_bytes(b"5678")
    two.write_bytes(b"1234")
    with pytest.raises(ArtifactError, match="SHA-256"):
        artifact.read(tmp_path, KIND)


def test_no_bit_of_a_manifest_can_flip_unnoticed(tmp_path):
    publish(tmp_path, {"a": b"1234"}, {"key": ["text", 1, 2.5, True]})
    manifest = (tmp_path / MANIFEST).read_bytes()
    for position in range(len(manifest)):
        bit = 1 << position % 8
        (tmp_path / MANIFEST).write_bytes(
            manifest[:position] + bytes([manifest[position] ^ bit]) + manifest[position + 1 :]
        )
        with pytest.raises(ArtifactError):
            artifact.read(tmp_path, KIND)


def test_no_part_of_a_manifest_is_taken_for_the_whole(tmp_path):
    publish(tmp_path, {"a": b"1234"}, {"key": "value"})
    manifest = (tmp_path / MANIFEST).read_bytes().rstrip()
    for length in range(len(manifest)):
        (tmp_path / MANIFEST).write_bytes(manifest[:length])
        with pytest.raises(ArtifactError, match=MANIFEST):
            artifact.read(tmp_path, KIND)


@pytest.mark.parametrize(
    "text",
    [b"", b"null", b"[]", b'"files"', b'{"files": null}', b'{"files": [1]}', b"\xff\xfe", b"{}" * 2, b"[" * 100_000],
    ids=lambda text: text[:16].decode(errors="replace"),
)
def test_a_manifest_that_is_none_is_refused_and_can_be_published_over(root, text):
    (root / MANIFEST).write_bytes(text)
    with pytest.raises(ArtifactError, match=MANIFEST):
        artifact.read(root, KIND)
    publish(root, NEW)
    assert contents(artifact.read(root, KIND)) == sorted(NEW.values())


@pytest.mark.parametrize(
    "change",
    {
        "meta": lambda raw: raw["meta"].update(version="newer"),
        "fingerprint": lambda raw: raw.update(fingerprint="0" * 64),
        "a file less": lambda raw: raw["files"].popitem(),
        "a file more": lambda raw: raw["files"].update(x={"bytes": 1, "sha256": "0" * 64}),
        "another digest": lambda raw: raw["files"].update({next(iter(raw["files"])): {"bytes": 9, "sha256": "0" * 64}}),
        "an entry of another form": lambda raw: raw["files"].update({next(iter(raw["files"])): {"sha256": "0"}}),
        "an entry with extras": lambda raw: next(iter(raw["files"].values())).update(extra=1),
    }.items(),
    ids=lambda change: change[0],
)
def test_an_altered_manifest_is_refused(root, change):
    raw = json.loads((root / MANIFEST).read_text())
    change[1](raw)
    (root / MANIFEST).write_text(json.dumps(raw))
    with pytest.raises(ArtifactError, match=MANIFEST):
        artifact.read(root, KIND)


def test_an_altered_size_is_refused(root):
    forge(root, lambda raw: next(iter(raw["files"].values())).update(bytes=1))
    with pytest.raises(ArtifactError, match="its manifest says 1"):
        artifact.read(root, KIND)


def test_another_kind_and_another_format_are_told_apart_from_damage(root):
    with pytest.raises(ArtifactError, match=r"is a thing.*expected a model"):
        artifact.read(root, "model")
    forge(root, lambda raw: raw.update(format="moeret-99"))
    with pytest.raises(ArtifactError, match=r"moeret-99.*another version of moeret made it, make it anew"):
        artifact.read(root, KIND)


@pytest.mark.parametrize("name", ["../secret", "deep/../../secret", "deep/er/../../../secret", "/{}/secret"])
def test_a_manifest_cannot_reach_outside_its_directory(root, name):
    secret = root.parent / "secret"
    secret.write_bytes(b"secret")
    name = name.format(root.parent)
    entry = {"bytes": 6, "sha256": artifact.sha256_of(secret)}
    forge(root, lambda raw: raw["files"].update({name: entry}))
    with pytest.raises(ArtifactError, match="names no file of its directory"):
        artifact.read(root, KIND)
    publish(root, NEW)
    assert secret.read_bytes() == b"secret"


@pytest.mark.parametrize(
    "name", ["./x", "x/", "deep//x", ".lock", ".cache/x", "deep/.x", "a\nb", "", artifact.MANIFEST]
)
def test_a_name_that_a_reader_or_a_writer_would_take_for_another_file_is_refused_unread(root, name):
    forge(root, lambda raw: raw["files"].update({name: {"bytes": 0, "sha256": "0" * 64}}))
    with pytest.raises(ArtifactError, match="names no file of its directory"):
        artifact.look(root, KIND)


@pytest.mark.parametrize("name", ["", ".", "deep", "a\0b", "\ud800", "x" * 5000])
def test_a_manifest_that_names_no_file_is_refused(root, name):
    forge(root, lambda raw: raw["files"].update({name: {"bytes": 0, "sha256": "0" * 64}}))
    with pytest.raises(ArtifactError):
        artifact.read(root, KIND)


def test_nothing_there_an_empty_directory_and_a_file_are_told_apart(tmp_path):
    with pytest.raises(ArtifactError, match="no such directory"):
        artifact.read(tmp_path / "absent", KIND)
    with pytest.raises(ArtifactError, match="no finished thing"):
        artifact.read(tmp_path, KIND)
    (tmp_path / "file").write_text("text")
    with pytest.raises(ArtifactError, match="no such directory"):
        artifact.read(tmp_path / "file", KIND)
    (tmp_path / MANIFEST).mkdir()
    with pytest.raises(ArtifactError, match="cannot read"):
        artifact.read(tmp_path, KIND)


def test_a_version_exists_from_its_publishing_on(tmp_path):
    draft = Draft(tmp_path, KIND)
    draft.add("a", lambda path: path.write_bytes(b"1"))
    assert not artifact.exists(tmp_path)
    draft.publish({})
    assert artifact.exists(tmp_path)


def test_a_new_version_replaces_all_of_the_old_one(root):
    published = publish(root, NEW, {"version": "new"})
    assert artifact.read(root, KIND) == published
    assert contents(published) == sorted(NEW.values())
    assert leftovers(root) == set()
    assert {path.name for path in root.iterdir() if path.is_dir()} == {"deep", "other"}


def test_folders_that_a_new_version_leaves_empty_go(root):
    publish(root, {"top.bin": b"alone"})
    assert [path for path in root.rglob("*") if path.is_dir()] == []


def test_a_draft_that_is_never_published_changes_nothing_and_is_swept_up_by_the_next(root):
    before = artifact.read(root, KIND)
    dropped = Draft(root, KIND)
    for name, data in NEW.items():
        dropped.add(name, lambda path, data=data: path.write_bytes(data))
    (root / "deep/er/one.bin.unfinished").write_bytes(b"half")
    assert artifact.read(root, KIND) == before
    assert contents(before) == sorted(OLD.values())
    publish(root, {**OLD, "other/four.bin": b"four"})
    assert leftovers(root) == set()


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, ValueError, MemoryError])
def test_a_writer_that_dies_leaves_no_trace(root, error):
    before = everything(root)

    def dies(path: Path) -> None:
        path.write_bytes(b"half")
        raise error

    with pytest.raises(error):
        Draft(root, KIND).add("deep/er/one.bin", dies)
    assert everything(root) == before


def test_a_full_disk_in_a_writer_leaves_the_old_version_and_no_temporary_file(root):
    before = everything(root)

    def fills(path: Path) -> None:
        path.write_bytes(b"half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    draft = Draft(root, KIND)
    with pytest.raises(OSError, match=os.strerror(errno.ENOSPC)):
        draft.add("top.bin", fills)
    assert everything(root) == before
    artifact.read(root, KIND)


def test_whichever_sync_finds_the_disk_full_a_whole_version_is_there(tmp_path, monkeypatch):
    real, source = os.fsync, tmp_path / "source"
    source.write_bytes(b"source")
    inner = publish(tmp_path / "inner", {"in.bin": b"inner"})
    failures = 0
    for failing in range(100):
        root = tmp_path / str(failing)
        publish(root, OLD, {"version": "old"})
        calls = iter(range(1000))

        def full(descriptor: int, calls=calls, failing=failing) -> None:
            if next(calls) == failing:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            real(descriptor)

        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", full)
            try:
                draft = Draft(root, KIND)
                draft.add("deep/er/one.bin", lambda path: path.write_bytes(b"the new depth"))
                draft.copy("copied", source)
                draft.include(inner, "nested")
                draft.publish({"version": "new"})
                failed = False
            except OSError:
                failed = True
        failures += failed
        found = artifact.read(root, KIND)
        assert found.meta["version"] in (("old", "new") if failed else ("new",))
        assert contents(found) == sorted(OLD.values()) or found.meta["version"] == "new"
        assert not [name for name in everything(root) if name.endswith(".unfinished")]
        if not failed:
            break
    assert failures >= 8


def test_a_small_file_is_replaced_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "small.json"
    artifact.write_atomically(path, b"old")
    with monkeypatch.context() as patch, pytest.raises(OSError, match="full"):
        patch.setattr(os, "fsync", lambda descriptor: (_ for _ in ()).throw(OSError("full")))
        artifact.write_atomically(path, b"new")
    assert everything(tmp_path) == {"small.json": b"old"}
    artifact.write_atomically(path, b"new")
    assert everything(tmp_path) == {"small.json": b"new"}


def test_a_kept_file_is_carried_over_untouched(root):
    before = artifact.read(root, KIND)
    name = next(name for name in before.files if name.startswith("top"))
    inode, entry = (root / name).stat(), before.files[name]
    draft = Draft(root, KIND)
    assert draft.keep(before, name) == name
    after = draft.publish({})
    assert after.files == {name: entry}
    assert (root / name).stat().st_ino == inode.st_ino
    assert (root / name).stat().st_mtime_ns == inode.st_mtime_ns
    assert artifact.read(root, KIND) == after


def test_a_copied_file_keeps_its_plain_name_and_a_second_copy_does_not_touch_it(tmp_path):
    source = tmp_path / "source.json"
    source.write_bytes(b"prescribed")
    inodes = set()
    for _ in range(2):
        draft = Draft(tmp_path / "root", KIND)
        assert draft.copy("base/config.json", source) == "base/config.json"
        draft.publish({})
        inodes.add((tmp_path / "root/base/config.json").stat().st_ino)
    assert len(inodes) == 1
    source.unlink()
    assert contents(artifact.read(tmp_path / "root", KIND)) == [b"prescribed"]


@pytest.mark.parametrize("links", [True, False])
def test_an_included_artifact_is_whole_checked_and_readable_by_itself(tmp_path, root, monkeypatch, links):
    inner = artifact.read(root, KIND)
    if not links:
        monkeypatch.setattr(os, "link", lambda *_: (_ for _ in ()).throw(OSError(errno.EXDEV, "another device")))
    for _ in range(2):  # the second time all files are there already
        draft = Draft(tmp_path / "outer", "outer")
        draft.include(inner, "inside/it")
        draft.add("own.bin", lambda path: path.write_bytes(b"own"))
        draft.publish({})
    nested = artifact.read(tmp_path / "outer" / "inside/it", KIND)
    assert replace(nested, root=root) == inner
    assert (root / next(iter(inner.files))).samefile(nested.root / next(iter(inner.files))) == links
    outer = artifact.read(tmp_path / "outer", "outer")
    assert {f"inside/it/{name}": entry for name, entry in inner.files.items()}.items() <= outer.files.items()
    for name in (*inner.files, MANIFEST):
        path = nested.root / name
        before = path.read_bytes()
        path.unlink()
        path.write_bytes(before[:-1])
        with pytest.raises(ArtifactError, match=str(path)):
            artifact.read(tmp_path / "outer", "outer")
        path.write_bytes(before)


def test_an_included_artifact_outlives_its_source_and_goes_without_it(tmp_path, root):
    draft = Draft(tmp_path / "outer", "outer")
    draft.include(artifact.read(root, KIND), "inside")
    draft.publish({})
    publish(root, NEW)
    assert contents(artifact.read(tmp_path / "outer" / "inside", KIND)) == sorted(OLD.values())
    publish(tmp_path / "outer", {"own.bin": b"own"}, kind="outer")
    assert not (tmp_path / "outer" / "inside").exists()
    assert contents(artifact.read(root, KIND)) == sorted(NEW.values())


def test_files_of_the_user_are_never_deleted(root):
    theirs = {
        "notes.txt": b"notes",
        ".hidden": b"hidden",
        "photo-2024.jpg": b"photo",
        "backup-202401011200.zip": b"looks like a digest",
        "f47ac10b-58cc-4372-a567-0e02b2c3d479.json": b"a UUID",
        "deep/readme-cafecafecafe": b"in a folder of ours",
        "deep/er/mine.bin": b"beside ours",
        "elsewhere/x-0123456789ab.bin": b"elsewhere",
    }
    for name, data in theirs.items():
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).write_bytes(data)
    (root / "empty").mkdir()
    for version in (NEW, OLD, {"deep/only.bin": b"only"}, {"top.bin": b"top"}):
        publish(root, version)
        found = everything(root)
        assert {name: found.get(name) for name in theirs} == theirs
        assert leftovers(root) == theirs.keys()
    assert (root / "empty").is_dir()


def test_files_that_somebody_elses_manifest_lists_are_not_deleted(tmp_path):
    (tmp_path / "index.html").write_bytes(b"page")
    (tmp_path / MANIFEST).write_text(json.dumps({"name": "a web app", "files": {"index.html": "/index.html"}}))
    publish(tmp_path, NEW)
    assert (tmp_path / "index.html").read_bytes() == b"page"


def test_two_writers_in_one_process_exclude_each_other_and_readers_are_free(root):
    with writing(root):
        with pytest.raises(BusyError, match=str(root)), writing(root):
            pass
        artifact.read(root, KIND)
    with pytest.raises(ZeroDivisionError), writing(root):
        raise ZeroDivisionError
    with writing(root):
        publish(root, NEW)
    assert leftovers(root) == {".lock"}


WRITER = """
import sys, time
from pathlib import Path
from moeret.artifact import Draft
from moeret.lock import writing
root = Path(sys.argv[1])
def half(path):
    path.write_bytes(b"half")
    print("writing", flush=True)
    time.sleep(60)
with writing(root):
    draft = Draft(root, "thing")
    draft.add("deep/er/one.bin", lambda path: path.write_bytes(b"never published"))
    draft.add("deep/er/two.txt", half)
"""


def test_a_killed_writer_holds_no_lock_harms_no_reader_and_is_swept_up(root):
    before = everything(root)
    with subprocess.Popen([sys.executable, "-c", WRITER, root], stdout=subprocess.PIPE) as writer:
        try:
            assert writer.stdout.readline() == b"writing\n"
            with pytest.raises(BusyError), writing(root):
                pass
        finally:
            writer.kill()
    after = everything(root)
    assert {name: after[name] for name in before} == before
    assert len(after) == len(before) + 3  # the lock, a finished file and half a one
    assert contents(artifact.read(root, KIND)) == sorted(OLD.values())
    with writing(root):
        publish(root, OLD, {"version": "next"})
    assert leftovers(root) == {".lock"}


def test_a_writer_makes_the_directories_on_the_way(tmp_path):
    with writing(tmp_path / "a" / "b"):
        publish(tmp_path / "a" / "b", OLD)
    artifact.read(tmp_path / "a" / "b", KIND)


def test_a_place_that_cannot_be_written_is_an_artifact_error(tmp_path):
    (tmp_path / "file").write_text("text")
    (tmp_path / "folder" / ".lock").mkdir(parents=True)
    for path in (tmp_path / "file", tmp_path / "file" / "under", tmp_path / "folder", tmp_path / ("x" * 300)):
        with pytest.raises(ArtifactError), writing(path):
            pass


def test_a_manifest_says_what_was_published_in_plain_json(root):
    raw = json.loads((root / MANIFEST).read_text())
    published = artifact.read(root, KIND)
    assert raw["files"] == {name: asdict(entry) for name, entry in published.files.items()}
    assert raw["files"].keys() <= everything(root).keys()
    for name, entry in published.files.items():
        assert FileEntry((root / name).stat().st_size, artifact.sha256_of(root / name)) == entry


def test_a_manifest_says_the_same_or_nothing_whichever_bit_flips(tmp_path):
    draft = artifact.Draft(tmp_path, "index")
    draft.add("a/b.bin", lambda path: path.write_bytes(b"x"))
    for number in range(2):
        draft.publish({"number": number, "half": 0.5, "none": None, "text": ["a", "é"]}, keep=1)
    manifest = tmp_path / "manifest.json"
    known, raw = artifact.read(tmp_path, "index"), manifest.read_bytes()
    for place in range(len(raw) * 3):
        altered = bytearray(raw)
        altered[place // 3] ^= (1, 4, 32)[place % 3]
        manifest.write_bytes(altered)
        try:
            assert artifact.read(tmp_path, "index") == known, bytes(altered)
        except ArtifactError as error:
            assert str(tmp_path) in str(error)
    for end in range(len(raw) - 1):  # without the line end alone it is whole
        manifest.write_bytes(raw[:end])
        with pytest.raises(ArtifactError, match=r"manifest\.json is damaged"):
            artifact.read(tmp_path, "index")


def test_snapshots_are_in_the_order_of_their_numbers_however_long(tmp_path):
    for number in (999_999, 1_000_000, 1_000_001):
        artifact.Draft(tmp_path, "index").publish({"number": number}, keep=3)
        path = tmp_path / "manifest.json"
        raw = json.loads(path.read_text())
        raw["snapshot"] = {"number": number, "digest": artifact.fingerprint([number, raw["fingerprint"]])}
        path.write_text(json.dumps(raw))
    numbers = [own.snapshot for own in artifact.snapshots(tmp_path, "index")]
    assert (
        numbers == [own.meta["number"] for own in artifact.snapshots(tmp_path, "index")] == [999_999, 10**6, 10**6 + 1]
    )
