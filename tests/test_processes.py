"""Two processes train one model; one of them is killed."""

import json
import shutil
import socket
import subprocess
import sys
import time
from contextlib import ExitStack

import numpy as np
import pytest

from moeret import processes
from moeret.errors import ConfigError

TRAIN = """
import sys
import jax
where, devices, base, out, *folders = sys.argv[1:]
jax.config.update("jax_num_cpu_devices", int(devices))
from moeret import processes
if where:
    processes.join(where)
import moeret
from pathlib import Path
domains = {Path(folder).name: folder for folder in folders}
expert = moeret.ExpertConfig(shared_rank=0)
config = moeret.TrainConfig(steps=16, epochs=100, batch_size=8, evaluate_every=4, patience=100, expert=expert)
print(moeret.train(domains, out, base=base, config=config).fingerprint)
"""


@pytest.fixture
def start(base_folder, two_domains):
    """Starts processes of a run, all of which die with the test."""
    with ExitStack() as alive:

        def run(out, count, devices):
            with socket.create_server(("127.0.0.1", 0)) as free:
                port = free.getsockname()[1]
            places = [f"127.0.0.1:{port},{rank}/{count}" if count > 1 else "" for rank in range(count)]
            started = []
            for where in places:
                command = [sys.executable, "-c", TRAIN, where, str(devices), base_folder, out, *two_domains.values()]
                process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
                alive.enter_context(process)
                alive.callback(process.kill)
                started.append(process)
            return started

        yield run


def fingerprints(started):
    """What the processes print once all have ended well."""
    ends = [process.communicate(timeout=240) for process in started]
    assert [process.returncode for process in started] == [0] * len(started), ends
    return {out.split()[-1] for out, _ in ends}


def losses(out):
    """Every step's losses, by expert."""
    lines = map(json.loads, (out / "training" / "metrics.jsonl").read_text().splitlines())
    return {line["step"]: line["loss"] for line in lines if "loss" in line}


def test_a_killed_process_costs_nothing_but_time(tmp_path, start):
    whole = fingerprints(start(tmp_path / "whole", 2, 1))
    assert len(whole) == 1

    cut = start(tmp_path / "cut", 2, 1)
    checkpoints = tmp_path / "cut" / "training" / "checkpoints"
    deadline = time.monotonic() + 240
    while not (checkpoints / "8").is_dir() and time.monotonic() < deadline:
        assert cut[1].poll() is None
        time.sleep(0.02)
    cut[1].kill()
    time.sleep(0.5)
    cut[0].kill()  # it waits for the other until JAX gives up on that
    for process in cut:
        process.wait()
    assert not (tmp_path / "cut" / "manifest.json").exists()
    shutil.copytree(tmp_path / "cut", tmp_path / "alone")

    assert fingerprints(start(tmp_path / "cut", 2, 1)) == whole  # of every file: bit for bit
    # One process of as many devices goes on from there too, by other collectives.
    fingerprints(start(tmp_path / "alone", 1, 2))
    undisturbed, alone = losses(tmp_path / "whole"), losses(tmp_path / "alone")
    assert undisturbed.keys() == alone.keys()
    for step, by_expert in undisturbed.items():
        np.testing.assert_allclose([*alone[step].values()], [*by_expert.values()], rtol=1e-5, err_msg=str(step))


@pytest.mark.parametrize("where", ["", "host", "host:1", "host:1,0", "host:1,2/2", "host:x,0/2"])
def test_a_place_that_says_nothing_is_refused(where):
    with pytest.raises(ConfigError, match="HOST:PORT,PROCESS/PROCESSES"):
        processes.join(where)


def test_one_process_does_everything_itself():
    assert processes.is_first() and all(processes.is_mine(number) for number in range(5))
    table, mine = np.arange(6.0).reshape(3, 2), np.array([True, False, True])
    np.testing.assert_array_equal(processes.from_owners(table, mine), table)
    processes.wait_for_all("nothing")
