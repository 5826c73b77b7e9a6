"""On Ray a job makes the same index, whoever is killed meanwhile. Needs the extra `ray`."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from conftest import write_jsonl

import moeret
from moeret.config import IndexConfig
from moeret.retrieval.build import build_index
from moeret.retrieval.job import FOLDER

ray = pytest.importorskip("ray")
psutil = pytest.importorskip("psutil")
pytestmark = pytest.mark.filterwarnings("default")  # Ray's own
MANY = IndexConfig(shard_documents=4, segment_documents=60, exact_below=20)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("ray") / "loose.jsonl"
    write_jsonl(path, [{"_id": f"l{n}", "text": f"the rhine {n} and apple" * (1 + n % 3)} for n in range(120)])
    return path


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, model_folder, two_domains, corpus):
    return build_index(model_folder, tmp_path_factory.mktemp("ray") / "index", two_domains, [corpus], config=MANY)


@pytest.fixture(scope="module", autouse=True)
def one_cluster():
    yield
    ray.shutdown()


def manifest(folder: Path) -> bytes:
    return (folder / "manifest.json").read_bytes()


def test_the_index_is_the_same_byte_for_byte(tmp_path, model_folder, two_domains, corpus, undisturbed):
    published = build_index(model_folder, tmp_path / "i", two_domains, [corpus], config=MANY, engine="ray")
    assert manifest(published.root) == manifest(undisturbed.root)
    rows = [{"_id": f"m{n}", "text": f"the nile {n}"} for n in range(9)]
    write_jsonl(tmp_path / "more.jsonl", rows)
    done = moeret.update_index(tmp_path / "i", corpora=[tmp_path / "more.jsonl"], delete={"": ["l3"]}, engine="ray")
    assert (done.added, done.deleted) == (9, 1)
    for number in range(9):  # until segments are joined
        write_jsonl(tmp_path / "more.jsonl", [{"_id": f"o{number}", "text": f"the volga {number}"}])
        done = moeret.update_index(tmp_path / "i", corpora=[tmp_path / "more.jsonl"], engine="ray")
    assert len(done.published.meta["experts"]["base"]["segments"]) < 9
    assert moeret.verify_index(tmp_path / "i")["problems"] == []


def test_workers_that_are_killed_cost_no_more_than_their_shards(
    tmp_path, model_folder, two_domains, corpus, undisturbed
):
    stop, killed = threading.Event(), []

    def kill() -> None:
        shards = tmp_path / "i" / FOLDER / "shards"
        while not stop.is_set() and len(killed) < 3:
            time.sleep(0.05)
            workers = [
                own for own in psutil.process_iter(["cmdline"]) if "_Actor" in " ".join(own.info["cmdline"] or [])
            ]
            if workers and len(list(shards.glob("*/manifest.json"))) > 4 * len(killed):
                workers[0].send_signal(signal.SIGKILL)
                killed.append(workers[0].pid)
                time.sleep(1)

    killer = threading.Thread(target=kill)
    killer.start()
    try:
        published = build_index(model_folder, tmp_path / "i", two_domains, [corpus], config=MANY, engine="ray")
    finally:
        stop.set()
        killer.join()
    assert killed
    assert manifest(published.root) == manifest(undisturbed.root)


def test_a_driver_that_is_killed_leaves_what_it_had_to_either_engine(
    tmp_path, model_folder, two_domains, corpus, undisturbed
):
    program = (
        "import moeret, sys; from moeret.config import IndexConfig\n"
        f"moeret.build_index({str(model_folder)!r}, {str(tmp_path / 'i')!r}, {dict(two_domains)!r}, [{str(corpus)!r}], "
        f"config={MANY!r}, engine='ray')"
    ).replace("PosixPath(", "str(")
    driver = subprocess.Popen([sys.executable, "-c", program], env=dict(os.environ), start_new_session=True)
    shards = tmp_path / "i" / FOLDER / "shards"
    while driver.poll() is None and len(list(shards.glob("*/manifest.json"))) < 5:
        time.sleep(0.05)
    assert driver.poll() is None
    os.killpg(driver.pid, signal.SIGKILL)
    driver.wait()
    assert len(list(shards.glob("*/manifest.json"))) >= 5
    published = build_index(model_folder, tmp_path / "i", two_domains, [corpus], config=MANY)
    assert manifest(published.root) == manifest(undisturbed.root)
