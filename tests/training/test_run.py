"""Training runs: cut off, resumed, repeated; experts added and removed."""

import dataclasses
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

import moeret
from moeret import artifact
from moeret.training import checkpoint, loop
from moeret.training.run import _yields


@pytest.fixture(scope="module")
def short(train_config):
    """A run with several checkpoints of both its phases, 16 steps of the shared delta and 12 of the experts."""
    return dataclasses.replace(train_config, steps=12, shared_steps=8, evaluate_every=4)


@pytest.fixture(scope="module")
def undisturbed(two_domains, base_folder, short, tmp_path_factory):
    """The model that a run makes when nothing happens to it."""
    return moeret.train(two_domains, tmp_path_factory.mktemp("undisturbed") / "m", base=str(base_folder), config=short)


def digests(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.rglob("*.safetensors")}


@pytest.mark.parametrize("cut_at", [1, 11, 23])
def test_a_run_that_was_cut_off_ends_with_the_same_bytes(
    two_domains, base_folder, short, undisturbed, tmp_path, monkeypatch, cut_at
):
    def explode(*arguments, calls=[0]):  # noqa: B006 (counts calls)
        calls[0] += 1
        if calls[0] == cut_at:
            raise RuntimeError("power cut")
        return update(*arguments)

    update = loop.update
    monkeypatch.setattr(loop, "update", explode)
    with pytest.raises(RuntimeError, match="power cut"):
        moeret.train(two_domains, tmp_path / "m", base=str(base_folder), config=short)
    monkeypatch.setattr(loop, "update", update)
    again = moeret.train(two_domains, tmp_path / "m", base=str(base_folder), config=short)
    assert again.fingerprint == undisturbed.fingerprint
    steps = [json.loads(line)["step"] for line in (tmp_path / "m/training/metrics.jsonl").read_text().splitlines()]
    assert steps == sorted(steps)


def test_nothing_that_training_chooses_has_seen_the_test_split(two_domains, base_folder, short, undisturbed, tmp_path):
    """Judgments of test as garbage, and its queries' texts changed: every expert, strength and router stays."""
    folders = {name: shutil.copytree(path, tmp_path / name) for name, path in two_domains.items()}
    for folder in folders.values():
        judged = (folder / "qrels/test.tsv").read_text().splitlines()[1:]
        of_test = {line.split("\t")[0] for line in judged}
        rows = [json.loads(line) for line in (folder / "queries.jsonl").read_text().splitlines()]
        assert of_test
        for row in rows:
            row["text"] = "nothing at all" if row["_id"] in of_test else row["text"]
        (folder / "queries.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        (folder / "qrels/test.tsv").write_text("not\teven\tqrels\nof any kind\n")
    again = moeret.train(folders, tmp_path / "m", base=str(base_folder), config=short)
    for key in ("router", "shared", "tower", "expert"):
        assert again.meta[key] == undisturbed.meta[key]
    for own, other in zip(again.meta["experts"], undisturbed.meta["experts"], strict=True):
        assert {**own, "request": None} == {**other, "request": None}  # files are named by their digests


def test_a_base_in_parts_trains_the_same_experts(two_domains, base_folder, short, undisturbed, tmp_path):
    alone = dataclasses.replace(short, expert=dataclasses.replace(short.expert, shared_rank=0))
    moeret.train(two_domains, tmp_path / "m", base=str(base_folder), config=alone, model_devices=2)

    def losses(folder: Path) -> list[float]:
        lines = [json.loads(line) for line in (folder / "training/metrics.jsonl").read_text().splitlines()]
        return [value for line in lines if "loss" in line for value in line["loss"].values()]

    own = losses(tmp_path / "m")
    assert len(own) == 24
    np.testing.assert_allclose(own, losses(undisturbed.root), rtol=1e-4)


def test_an_interrupt_loses_only_the_steps_since_the_last_checkpoint(
    two_domains, base_folder, short, tmp_path, monkeypatch
):
    def interrupt(*arguments, calls=[0]):  # noqa: B006 (counts calls)
        calls[0] += 1
        if calls[0] == 7:
            raise KeyboardInterrupt
        return update(*arguments)

    update = loop.update
    monkeypatch.setattr(loop, "update", interrupt)
    short = dataclasses.replace(short, expert=dataclasses.replace(short.expert, shared_rank=0))
    with pytest.raises(KeyboardInterrupt):
        moeret.train(two_domains, tmp_path / "m", base=str(base_folder), config=short)
    monkeypatch.setattr(loop, "update", update)
    assert sorted(int(path.name) for path in (tmp_path / "m/training/checkpoints").iterdir())[-1] == 4
    again = moeret.train(two_domains, tmp_path / "m", base=str(base_folder), config=short)
    whole = moeret.train(two_domains, tmp_path / "whole", base=str(base_folder), config=short)
    assert again.fingerprint == whole.fingerprint


def test_a_killed_process_goes_on(two_domains, base_folder, train_config, tmp_path):
    """Killed with SIGKILL once the second checkpoint is there; the rerun must not start over."""
    command = [sys.executable, "-m", "moeret.cli", "train", "--out", str(tmp_path / "m"), "--base", str(base_folder)]
    command += ["--domain", *(f"{name}={path}" for name, path in two_domains.items())]
    command += [
        "--steps",
        "60",
        "--shared-steps",
        "4",
        "--epochs",
        "1000",
        "--batch-size",
        "16",
        "--evaluate-every",
        "5",
        "--patience",
        "100",
        "--expert.layers",
        "2",
    ]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    folder = tmp_path / "m/training/checkpoints"
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and not (folder / "10").is_dir():
        assert process.poll() is None, "training ended before it could be killed"
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert not artifact.exists(tmp_path / "m")
    with pytest.raises(moeret.ArtifactError, match="holds no finished model"):
        moeret.Model.load(tmp_path / "m")
    process = subprocess.run([*command, "--json"], capture_output=True, text=True, check=False)
    assert process.returncode == 0, process.stderr
    first = json.loads(process.stdout)
    log = [json.loads(line) for line in (tmp_path / "m/training/metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in log if "loss" in line] == list(range(1, 61))
    assert [entry["name"] for entry in first["experts"]] == [*two_domains]


def test_a_finished_run_is_returned_and_other_arguments_are_refused(two_domains, base_folder, short, undisturbed):
    root = undisturbed.root
    before = {path: path.stat().st_mtime_ns for path in root.rglob("*") if path.is_file() and path.name != ".lock"}
    assert moeret.train(two_domains, root, base=str(base_folder), config=short).fingerprint == undisturbed.fingerprint
    with pytest.raises(moeret.ConfigError, match=r"finished model made with other arguments \(steps 12 -> 13\)"):
        moeret.train(two_domains, root, base=str(base_folder), config=dataclasses.replace(short, steps=13))
    assert before == {path: path.stat().st_mtime_ns for path in before}


def test_the_order_in_which_domains_are_given_does_not_matter(
    two_domains, base_folder, short, undisturbed, tmp_path, monkeypatch
):
    def explode(*arguments):
        raise RuntimeError("power cut")

    reordered = dict(reversed(two_domains.items()))
    assert moeret.train(reordered, undisturbed.root, base=str(base_folder), config=short) == undisturbed
    with monkeypatch.context() as patched:  # what is trained already is the other domain's if places are mixed up
        patched.setattr("moeret.training.run.choose_query_router", explode)
        with pytest.raises(RuntimeError, match="power cut"):
            moeret.train(two_domains, tmp_path / "m", base=str(base_folder), config=short)
    again = moeret.train(reordered, tmp_path / "m", base=str(base_folder), config=short)
    assert again.fingerprint == undisturbed.fingerprint


def test_paths_may_be_strings(two_domains, base_folder, short, undisturbed):
    given = {name: str(path) for name, path in two_domains.items()}
    assert moeret.train(given, str(undisturbed.root), base=str(base_folder), config=short) == undisturbed


@pytest.mark.parametrize("name", ["base", "all", "auto", "../outside", ""])
def test_names_that_mean_something_else_are_refused(two_domains, base_folder, short, tmp_path, name):
    with pytest.raises(moeret.DataError, match="cannot name a domain"):
        moeret.train({name: two_domains["fruit"]}, tmp_path / "m", base=str(base_folder), config=short)
    assert not (tmp_path / "m").exists()


def test_an_expert_s_looks_at_dev_depend_on_nobody_beside_it(two_domains, base_folder, short, tmp_path):
    """The smaller domain ends at a step of its own, and the other is not looked at there."""
    small = shutil.copytree(two_domains["metal"], tmp_path / "metal")
    lines = (small / "qrels/train.tsv").read_text().splitlines()
    (small / "qrels/train.tsv").write_text("\n".join(lines[:7]) + "\n")
    config = dataclasses.replace(short, epochs=8, batch_size=16)
    looked = {}
    for name, given in {"together": {**two_domains, "metal": small}, "alone": {"metal": small}}.items():
        moeret.train(given, tmp_path / name, base=str(base_folder), config=config)
        rows = map(json.loads, (tmp_path / name / "training/metrics.jsonl").read_text().splitlines())
        looked[name] = [(row["step"], [*row["dev"]]) for row in rows if "dev" in row]
    assert looked["alone"] == [(0, ["metal"]), (3, ["metal"])]
    beside = [(0, ["fruit", "metal"]), (3, ["metal"]), (4, ["fruit"]), (8, ["fruit"]), (12, ["fruit"])]
    assert looked["together"] == beside


def test_an_unfinished_run_refuses_other_arguments(two_domains, base_folder, short, tmp_path, monkeypatch):
    def explode(*arguments):
        raise RuntimeError("power cut")

    monkeypatch.setattr(loop, "update", explode)
    with pytest.raises(RuntimeError, match="power cut"):
        moeret.train(two_domains, tmp_path / "m", base=str(base_folder), config=short)
    with pytest.raises(moeret.ConfigError, match=r"unfinished run with other arguments \(seed 0 -> 1\)"):
        moeret.train(two_domains, tmp_path / "m", base=str(base_folder), config=dataclasses.replace(short, seed=1))


def test_a_damaged_checkpoint_is_named(two_domains, base_folder, short, tmp_path, monkeypatch):
    def explode(self, step, tree):
        save(self, step, tree)
        raise RuntimeError("power cut")

    short = dataclasses.replace(short, expert=dataclasses.replace(short.expert, shared_rank=0))
    save = checkpoint.Checkpoints.save
    monkeypatch.setattr(checkpoint.Checkpoints, "save", explode)
    with pytest.raises(RuntimeError, match="power cut"):
        moeret.train(two_domains, tmp_path / "m", base=str(base_folder), config=short)
    monkeypatch.setattr(checkpoint.Checkpoints, "save", save)
    data = [
        path
        for path in (tmp_path / "m/training/checkpoints/4").rglob("*")
        if path.is_file() and path.stat().st_size > 500
    ]
    for path in data:
        path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(moeret.CheckpointError, match="checkpoint 4"):
        moeret.train(two_domains, tmp_path / "m", base=str(base_folder), config=short)


def test_an_expert_can_be_added_from_a_corpus_alone(model_folder, domains, short, tmp_path):
    shutil.copytree(model_folder, tmp_path / "m")
    (tmp_path / "river").mkdir()
    shutil.copy(domains["river"] / "corpus.jsonl", tmp_path / "river")
    with pytest.raises(moeret.DataError, match="needs judged queries"):
        moeret.add_expert(tmp_path / "m", "river", tmp_path / "river", config=short)
    added = moeret.add_expert(tmp_path / "m", "river", tmp_path / "river", config=short, label_free=True)
    entry = added.meta["experts"][-1]
    assert (entry["name"], entry["documents"]) == ("river", 12) and 0 < entry["train_queries"] < 12
    assert entry["dev_ndcg"]["all"] >= entry["base_dev_ndcg"]["all"]
    assert entry["blend"] == added.meta["base"]["blend"] and entry["memory"] is None
    assert entry["strength"] in (0, 0.25) and entry["shared_strength"] == 0, "made-up queries do not choose them"
    moeret.build_index(tmp_path / "m", tmp_path / "index", {"river": tmp_path / "river"})
    with pytest.raises(moeret.ConfigError, match="made from other data or settings"):
        moeret.add_expert(tmp_path / "m", "river", domains["river"], config=short)


def test_added_experts_yield_to_judged_queries_before_them():
    def entry(name, added, files=("corpus.jsonl", "queries.jsonl")):
        return {"name": name, "added": added, "request": {f"domain {name}": dict.fromkeys(files, "")}}

    entries = [entry("a", False), entry("b", True, ["corpus.jsonl"]), entry("c", True), entry("d", True)]
    assert _yields(entries) == {1: [0], 2: [0], 3: [0, 2]}


def test_adding_and_removing_an_expert_leaves_the_others_alone(model_folder, domains, short, tmp_path):
    shutil.copytree(model_folder, tmp_path / "m")
    before, old = digests(tmp_path / "m"), moeret.Model.load(tmp_path / "m")
    texts = ["find the metal nick3", "apple"]
    vectors = {name: old.encode_query(texts, expert=name) for name in old.experts}

    added = moeret.add_expert(tmp_path / "m", "river", domains["river"], config=short)
    assert [(entry["name"], entry["added"]) for entry in added.meta["experts"]] == [
        ("fruit", False),
        ("metal", False),
        ("river", True),
    ]
    new = moeret.Model.load(tmp_path / "m")
    for name, own in vectors.items():
        np.testing.assert_array_equal(new.encode_query(texts, expert=name), own)
    assert {
        name: digest for name, digest in digests(tmp_path / "m").items() if name in before and "router" not in name
    } == {name: digest for name, digest in before.items() if "router" not in name}
    assert new.route(["which river is nick2"])[0].probabilities["river"] > 0.3
    assert moeret.add_expert(tmp_path / "m", "river", domains["river"], config=short).fingerprint == added.fingerprint

    moeret.remove_expert(tmp_path / "m", "river")
    back = moeret.Model.load(tmp_path / "m")
    assert back.experts == old.experts
    assert {k: v for k, v in digests(tmp_path / "m").items() if "router" not in k} == {
        k: v for k, v in before.items() if "router" not in k
    }
    with pytest.raises(moeret.ConfigError, match="there is no expert 'river'"):
        moeret.remove_expert(tmp_path / "m", "river")


def test_no_expert_is_worse_than_the_base_on_dev(undisturbed):
    for entry in undisturbed.meta["experts"]:
        before, after = entry["base_dev_ndcg"], entry["dev_ndcg"]
        assert all(after[group] is None or after[group] >= before[group] for group in ("all", "seen", "unseen"))


def test_training_never_opens_the_test_split(two_domains, base_folder, short, tmp_path):
    for name, path in two_domains.items():
        shutil.copytree(path, tmp_path / name)
        (tmp_path / name / "qrels/test.tsv").write_text("unreadable\n")
    blind = {name: tmp_path / name for name in two_domains}
    moeret.train(blind, tmp_path / "m", base=str(base_folder), config=short)
