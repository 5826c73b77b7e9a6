"""Whatever is damaged, full, busy or cut off: an index opens as it was or as it should be, or says which file is broken."""

import contextlib
import errno
import os
import resource
import shutil
import time
from collections import Counter
from pathlib import Path

import hnswlib
import numpy as np
import pytest
from conftest import TOPICS, write_jsonl
from safetensors import SafetensorError

import moeret
from moeret import artifact
from moeret.config import IndexConfig
from moeret.errors import ArtifactError, BusyError, DataError
from moeret.lock import writing
from moeret.models.memory import Memory
from moeret.models.model import Model
from moeret.retrieval import hnsw, job, segment, shards, snapshot
from moeret.retrieval.build import build_index
from moeret.retrieval.update import compact_index, rollback_index, update_index
from moeret.retrieval.verify import verify_index

SMALL = IndexConfig(shard_documents=4, segment_documents=9, exact_below=4, snapshots=2)


@pytest.fixture(autouse=True)
def no_waiting_for_the_disk(monkeypatch):
    """What is written through is not what is looked at here, but when."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


@pytest.fixture(scope="module")
def make(tmp_path_factory, model_folder, two_domains):
    """A function that makes another that builds an index of some domains and of some documents without one."""

    def builder(names, texts, **options):
        file = tmp_path_factory.mktemp("texts") / "loose.jsonl"
        write_jsonl(file, rows(texts))
        domains = {name: two_domains[name] for name in names}
        return lambda index: build_index(model_folder, index, domains, [file], config=SMALL, **options)

    return builder


@pytest.fixture(scope="module")
def history(tmp_path_factory, make, model_folder):
    """An index of two experts, the base and a memory that has been changed twice, and what builds it as it was at first."""
    root, model, random = tmp_path_factory.mktemp("history"), Model.load(model_folder), np.random.default_rng(0)
    answers = [[f"{word} a very long story of the fruit {word} {word}"] for word in TOPICS["fruit"][:2]]
    queries = random.normal(size=(2, model.embedder.width)).astype(np.float32)
    memory = Memory.of(queries / np.linalg.norm(queries, axis=1, keepdims=True), answers)
    build = make(("fruit", "metal"), {f"l{n}": f"on the {word}" for n, word in enumerate(TOPICS["river"])})
    with pytest.MonkeyPatch.context() as patched:
        for module in (shards, snapshot):
            patched.setattr(module, "read_memory", lambda model, expert: memory if expert == "fruit" else None)
        build(root / "index")
        write_jsonl(root / "more.jsonl", rows({"l0": "another", "new": "a new plum"}))
        update_index(root / "index", corpora=[root / "more.jsonl"], delete={"fruit": ["d2"], "metal": ["d5", "d6"]})
        update_index(root / "index", delete={"fruit": ["d4"]})
    names = {(Path(name).parts[0], Path(name).suffix) for name in artifact.read(root / "index", "index").files}
    assert {("segments", ".hnsw"), ("tombstones", ".safetensors"), ("memories", ".safetensors")} <= names
    return root / "index", build


@pytest.fixture
def index(tmp_path, history) -> Path:
    """A copy of the index with a history, to be damaged."""
    return shutil.copytree(history[0], tmp_path / "index")


@pytest.fixture(scope="module")
def little(tmp_path_factory, make):
    """A smaller index with two snapshots, and what changes it, by name."""
    root = tmp_path_factory.mktemp("little")
    make(["fruit"], {f"l{n}": f"on the {word}" for n, word in enumerate(TOPICS["river"][:5])})(root / "index")
    update_index(root / "index", delete={"fruit": ["d2"]})
    writers = {"build": make(["fruit"], {"l1": "x"}, overwrite=True), "update": change(root), "compact": compact_index}
    return root / "index", writers | {"rollback": lambda index: rollback_index(index, to=1)}


def rows(texts, **more):
    return [{"_id": id, "text": text, **more} for id, text in texts.items()]


def on_disk(root: Path) -> dict[str, tuple]:
    """Every path's time, and contents unless it is a folder."""
    paths = (path for path in root.rglob("*") if path.name != ".lock")
    return {str(own.relative_to(root)): (own.stat().st_mtime_ns, own.is_file() and own.read_bytes()) for own in paths}


def files_of(root: Path) -> dict[str, bytes]:
    return {name: contents for name, (_, contents) in on_disk(root).items() if contents is not False}


def held(index: Path) -> Counter:
    retriever = moeret.Retriever.load(index)
    out = Counter(retriever.held())
    retriever.close()
    return out


def change(root: Path):
    """An update of every kind: two new documents, one other, two gone; and its folder of input."""
    write_jsonl(root / "change" / "corpus.jsonl", rows({"d0": "another apple", "n1": "a kiwi", "n2": "a fig"}))
    return lambda index: update_index(index, {"fruit": root / "change"}, delete={"fruit": ["d1", "d2"], "": ["l3"]})


def other_of(name: str, root: Path, files) -> Path:
    """The same kind of file of another segment or expert, or just another one, with other bytes."""
    alike = sorted(files, key=lambda own: Path(own).name.split("-")[0] != Path(name).name.split("-")[0])
    return next(root / own for own in alike if (root / own).read_bytes() != (root / name).read_bytes())


def damages(path: Path, other: Path):
    raw, middle = path.read_bytes(), path.stat().st_size // 2
    yield "cut", lambda: path.write_bytes(raw[:-2])
    yield "emptied", lambda: path.write_bytes(b"")
    yield "flipped", lambda: path.write_bytes(raw[:middle] + bytes([raw[middle] ^ 1]) + raw[middle + 1 :])
    yield "swapped", lambda: path.write_bytes(other.read_bytes())
    yield "gone", path.unlink
    yield "folder", lambda: (path.unlink(), path.mkdir())
    yield "unreadable", lambda: None


def deny(patched, *denied: Path):
    """Nobody may open the files: as chmod 000, which root does not heed."""
    usual = Path.open

    def opened(self, *rest, **more):
        if self in denied:
            raise PermissionError(errno.EACCES, "Permission denied", str(self))
        return usual(self, *rest, **more)

    patched.setattr(Path, "open", opened)


def test_any_damage_to_any_file_is_refused_by_name_and_nothing_is_changed(tmp_path, monkeypatch, history, index):
    files, update = [*artifact.read(index, "index").files, "manifest.json"], change(tmp_path)
    usual, loaded, earlier = hnswlib.Index.load_index, [], artifact.snapshots(index, "index")[-2]
    monkeypatch.setattr(hnswlib.Index, "load_index", lambda *rest, **more: loaded.append(rest) or usual(*rest, **more))
    for number, name in enumerate(files):
        path = index / name
        raw, last = path.read_bytes(), name == "manifest.json"
        for turn, (kind, damage) in enumerate(damages(path, other_of(name, index, files))):
            damage()
            before = on_disk(index)
            calls = [moeret.Retriever.load, verify_index]
            if last or (number + turn) % 5 == 0:
                calls += [update, compact_index, history[1]]
                calls += [rollback_index] if last or name in earlier.files else []  # a way out of what is damaged since
            if last and kind == "gone":
                calls.remove(history[1])  # that is how an index looks before it is finished
            with monkeypatch.context() as patched:
                if kind == "unreadable":
                    deny(patched, path)
                for call in calls:
                    with pytest.raises(ArtifactError) as refused:
                        call(index)
                    assert str(path) in str(refused.value) or (last and str(index) in str(refused.value)), kind
            assert on_disk(index) == before
            if path.is_dir():
                path.rmdir()
            path.write_bytes(raw)
    assert not loaded
    assert held(index) == held(history[0]) and verify_index(index)["problems"] == [] and loaded


def test_a_segment_in_another_s_place_is_refused(index):
    folders = sorted((index / "segments").iterdir())
    for one, other in zip(folders, folders[1:] + folders[:1], strict=True):
        aside = one.rename(index / "aside")
        shutil.copytree(other, one)
        for call in (moeret.Retriever.load, verify_index, compact_index):
            with pytest.raises(ArtifactError, match=one.name):
                call(index)
        shutil.rmtree(one)
        aside.rename(one)


@pytest.mark.parametrize("kind", ["cut", "emptied", "flipped", "swapped", "folder"])
def test_a_damaged_snapshot_stops_writers_before_they_begin_and_no_reader(tmp_path, index, kind):
    path, before = sorted((index / "snapshots").iterdir())[0], held(index)
    dict(damages(path, next(index.glob("segments/*/manifest.json"))))[kind]()
    found, report = on_disk(index), verify_index(index)
    for call in (change(tmp_path), compact_index, rollback_index):
        with pytest.raises(ArtifactError, match=rf"snapshot .*{path.name} cannot be used; restore it, or delete it"):
            call(index)
    assert on_disk(index) == found and held(index) == before and not report["problems"]
    path.rmdir() if path.is_dir() else path.unlink()
    assert rollback_index(index).snapshot == 4
    change(tmp_path)(index)


def test_numbers_say_which_snapshot_is_the_present_one_not_clocks(tmp_path, monkeypatch, index):
    for turn, path in enumerate(sorted(index.rglob("*"))):
        os.utime(path, (10**9 * (turn % 3 + 1),) * 2)
    monkeypatch.setattr(time, "time", lambda: 1.0)
    monkeypatch.setattr(time, "time_ns", lambda: 10**9)
    before = held(index)
    assert artifact.read(index, "index").snapshot == 3
    assert change(tmp_path)(index).published.snapshot == 4
    assert rollback_index(index).snapshot == 5 and held(index) == before


def test_a_writer_that_is_not_alone_or_may_not_write_changes_nothing(tmp_path, monkeypatch, history, index):
    before, new = on_disk(index), tmp_path / "new"
    calls = [(own, index) for own in (change(tmp_path), compact_index, rollback_index, history[1])]
    with writing(index):
        for call, where in calls:
            with pytest.raises(BusyError, match="another process is writing"):
                call(where)
    deny(monkeypatch, index / ".lock", new / ".lock")
    for call, where in [*calls, (history[1], new)]:
        with pytest.raises(ArtifactError, match=r"cannot write to .*Permission denied; choose a directory"):
            call(where)
    assert on_disk(index) == before


def failing(patched, places, left, error):
    """The `left`th call, from 0, of any of these functions and all after it fail; what is returned says how many there were."""
    calls = Counter()

    def guarded(usual):
        def called(*rest, **more):
            calls["all"] += 1
            if calls["all"] > left:
                raise error
            return usual(*rest, **more)

        return called

    for module, name in places:
        patched.setattr(module, name, guarded(getattr(module, name)))
    return calls


FULL = [("sync", artifact, 0), ("sync", artifact, 1), ("sync", artifact, 9), ("save_file", segment, 0)]
FULL += [("save_file", segment, 1), ("save_file", snapshot, 0), ("write_documents", segment, 1), ("_save", hnsw, 0)]


@pytest.mark.parametrize("name", ["build", "update", "compact", "rollback"])
def test_a_full_disk_leaves_the_snapshot_before_and_the_next_attempt_succeeds(tmp_path, monkeypatch, little, name):
    index, run, failed = little[0], little[1][name], 0
    before, limits = held(index), resource.getrlimit(resource.RLIMIT_FSIZE)
    undisturbed = shutil.copytree(index, tmp_path / "undisturbed")
    run(undisturbed)
    for number, full in enumerate([*FULL, 0, 700, 2000, 5000, 9000]):  # at a call, or beyond so many bytes of a file
        own = shutil.copytree(index, tmp_path / f"{number}")
        with monkeypatch.context() as patched:
            if isinstance(full, int):
                resource.setrlimit(resource.RLIMIT_FSIZE, (full, limits[1]))
            else:
                failing(patched, [(full[1], full[0])], full[2], OSError(errno.ENOSPC, "No space left on device"))
            try:
                run(own)
            except (OSError, SafetensorError):
                failed += 1
            else:
                continue  # there was room enough
            finally:
                resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert artifact.read(own, "index").snapshot == 2 and (number % 4 or held(own) == before)
        assert not list(own.rglob("*.unfinished"))
        run(own)
        assert files_of(own) == files_of(undisturbed)
    assert failed >= 3


@pytest.mark.parametrize("name", ["build", "update", "compact", "rollback"])
def test_a_writer_killed_anywhere_leaves_one_snapshot_or_the_other_and_is_made_good(
    tmp_path, monkeypatch, little, name
):
    """At each file that is written through to disk and each folder that is deleted; of a build, at the last of them."""
    index, run = little[0], little[1][name]
    before, undisturbed = artifact.read(index, "index"), shutil.copytree(index, tmp_path / "undisturbed")

    def killed(own, left):
        with monkeypatch.context() as patched, contextlib.suppress(KeyboardInterrupt):
            calls = failing(patched, [(artifact, "sync"), (os, "rmdir")], left, KeyboardInterrupt)
            run(own)
        return calls["all"]

    calls = killed(undisturbed, 1000)
    after, expected = artifact.read(undisturbed, "index"), files_of(undisturbed)
    documents, seen = {before.fingerprint: held(index), after.fingerprint: held(undisturbed)}, Counter()
    for number in range(calls - 25 if name == "build" else 0, calls):
        own = shutil.copytree(index, tmp_path / "own")
        killed(own, number)
        published, numbers = artifact.read(own, "index"), [one.snapshot for one in artifact.snapshots(own, "index")]
        assert numbers == sorted({*numbers}) and numbers[-1] == published.snapshot
        if number % 8 == 0 or published.fingerprint not in seen:
            assert held(own) == documents[published.fingerprint]
        seen[published.fingerprint] += 1
        if (
            published.snapshot == after.snapshot and number % 3 == 0
        ):  # nothing is left to be finished, so another change may come
            update_index(shutil.copytree(own, tmp_path / "other"), delete={"fruit": ["d7"], "": ["l1"]})
            assert not (tmp_path / "other" / job.FOLDER).exists()
            shutil.rmtree(tmp_path / "other")
        if not (name == "rollback" and published.snapshot == after.snapshot):  # again, it would go back from there
            run(own)
            assert files_of(own) == expected
        shutil.rmtree(own)
    assert seen.keys() == documents.keys()


AWKWARD = ["../../x", "a/b\\c", "line\nend\r\n\u2028", "o'brien\"--;", "🦊é\u0301שלום\u202e", "x" * 10_000, "\0", " "]


def test_awkward_documents_come_and_go_just_as_they_are(tmp_path, model_folder):
    texts = ["", "x", "....", "\0\n", "a " * 500, "🦊", "' OR 1=1 --", "\u2028"]
    metadata = {"": 1, "a.b": {"": {"": 2}}, "\0": "\0", "'": [None, True, 1.5], "é" * 300: "x", "big": 10**400}
    given = rows(dict(zip(AWKWARD, texts, strict=True)), metadata=metadata, title="")
    given.append({"_id": "long", "text": "x" * 10_000_000})
    write_jsonl(tmp_path / "first.jsonl", given[:4])
    write_jsonl(tmp_path / "all.jsonl", given)
    index = tmp_path / "index"
    build_index(model_folder, index, {}, [tmp_path / "first.jsonl"], config=SMALL)
    assert update_index(index, corpora=[tmp_path / "all.jsonl"]).added == 5
    retriever = moeret.Retriever.load(index)
    hits = retriever.search("find the apple", 50, route="all")
    assert {own.id: (own.text, own.metadata) for own in hits} == {
        own["_id"]: (own["text"], own.get("metadata", {})) for own in given
    }
    for field, value in (("a.b..", 2), ("\0", "\0"), ("'", True), ("big", 10**400)):
        assert len(retriever.search("find the apple", 50, route="all", where={field: value})) == len(AWKWARD)
    retriever.close()
    changed = [own | {"text": f"{own['text'][:9]} anew"} for own in given[:5]]
    write_jsonl(tmp_path / "changed.jsonl", changed)
    done = update_index(index, corpora=[tmp_path / "changed.jsonl"], delete={"": [*AWKWARD[5:], "long", "x"]})
    assert (done.replaced, done.deleted, done.unknown) == (5, 4, 1)
    compact_index(index)
    assert {document.id: document.text for _, document in held(index)} == {own["_id"]: own["text"] for own in changed}
    assert not (tmp_path / "x").exists() and verify_index(index)["problems"] == []


@pytest.mark.parametrize("bad", [b'"_id":"\xff","text":"x"', b'"_id":"a","text":"\xff"', b'"_id":"a","text":"x","\xff'])
def test_invalid_text_is_refused_by_line(tmp_path, model_folder, bad):
    (tmp_path / "bad.jsonl").write_bytes(b'{"_id":"good","text":"x"}\n{' + bad + b"}\n")
    with pytest.raises(DataError, match=r"bad\.jsonl: line 2: "):
        build_index(model_folder, tmp_path / "index", {}, [tmp_path / "bad.jsonl"])
    assert not (tmp_path / "index").exists()
