"""Changing, checking and filtering an index from the command line."""

import json
import shutil

import pytest
from conftest import write_jsonl
from test_cli import assert_fails, done, run

QUERY = "find the apple"


@pytest.fixture
def index(tmp_path, index_folder):
    """A copy of the shared index, to be changed."""
    shutil.copytree(index_folder, tmp_path / "index")
    return tmp_path / "index"


def test_an_index_is_updated_compacted_rolled_back_and_verified(tmp_path, index, model_folder):
    rows = [
        {"_id": f"n{year}", "text": f"the rhine in {year}", "metadata": {"year": year}} for year in (2019, 2020, 2021)
    ]
    write_jsonl(tmp_path / "more.jsonl", rows)
    write_jsonl(tmp_path / "gone.jsonl", [{"_id": "d0"}, {"_id": "nobody"}])
    change = ["index", model_folder, "--out", index, "--update", "--corpus", tmp_path / "more.jsonl"]
    change += ["--delete", f"fruit={tmp_path / 'gone.jsonl'}", tmp_path / "gone.jsonl"]
    report = done(*change, "--json").json
    assert [report[key] for key in ("added", "replaced", "deleted", "unchanged", "unknown")] == [3, 0, 1, 0, 3]
    assert report["documents"] == 26 and report["snapshot"] == 2
    again = run(*change)
    assert "0 added, 0 replaced, 0 deleted, 3 unchanged" in again.out
    assert "4 of the documents to delete are not in the index" in again.err
    found = done("search", index, QUERY, "--where", '{"year": {"gte": 2020}}', "--json").json["hits"]
    assert {(hit["id"], hit["domain"], hit["metadata"]["year"]) for hit in found} == {
        ("n2020", "", 2020),
        ("n2021", "", 2021),
    }
    assert "no document fulfils" in done("search", index, QUERY, "--where", '{"year": 1}').out
    mistyped = done("search", index, QUERY, "--where", '{"year": 2020, "yaer": 2020}').out
    assert "nothing found: no document has the field yaer\n" in mistyped
    assert done("compact", index, "--json").json["experts"]["fruit"]["segments"][0]["deleted"] == 0
    assert done("verify", index, "--json").json["problems"] == []
    assert "whole" in done("verify", index).out
    assert done("rollback", index, "--to", 1, "--json").json["documents"] == 24
    assert "snapshot 5" in done("rollback", index).out


def test_what_an_index_would_cost(tmp_path, model_folder, two_domains):
    named = [f"{name}={path}" for name, path in two_domains.items()]
    arguments = ["index", model_folder, "--out", tmp_path / "index", "--domain", *named, "--dry-run"]
    cost = done(*arguments, "--json").json
    assert (cost["documents"], cost["skipped"], cost["shards"], cost["link_seconds"]) == (24, 0, 2, 0)
    assert cost["seconds"] > 0 and 24 * 16 * 4 < cost["bytes"] < 1e6 and cost["tokens"] > 24 * 8
    assert "24 documents (0 skipped)" in done(*arguments).out
    assert not (tmp_path / "index").exists()


def test_documents_that_cannot_be_used_are_named_or_skipped(tmp_path, model_folder):
    (tmp_path / "c.jsonl").write_text('{"_id": 1, "text": "apple"}\n{"_id": 2}\n')
    arguments = ["index", model_folder, "--out", tmp_path / "i", "--corpus", tmp_path / "c.jsonl"]
    assert_fails(run(*arguments), "c.jsonl: line 2: there is no text; it has ")
    skipped = run(*arguments, "--on-error", "skip")
    assert skipped.code == 0 and "1 documents were skipped" in skipped.err
    assert json.loads((tmp_path / "i" / "skipped.jsonl").read_text())["line"] == 2


@pytest.mark.parametrize(
    ("more", "wanted"),
    [
        (["--delete", "x.jsonl"], "--delete needs --update"),
        (["--update"], "nothing to change"),
        (["--update", "--overwrite"], "--update goes with neither"),
        (["--update", "--dry-run"], "--update goes with neither"),
        (["--update", "--ef", "7", "--delete", "x.jsonl"], "x.jsonl is not there"),
        (["--update", "--delete", "fruit=nowhere.jsonl"], "nowhere.jsonl is not there"),
    ],
)
def test_arguments_that_do_not_go_together(tmp_path, monkeypatch, index, model_folder, more, wanted):
    monkeypatch.chdir(tmp_path)
    assert_fails(run("index", model_folder, "--out", index, *more), wanted)


@pytest.mark.parametrize("where", ["en", "[1]", '{"year": null}', '{"year": {"above": 1}}'])
def test_filters_that_make_no_sense(index, where):
    assert_fails(run("search", index, QUERY, "--where", where), "where")


def test_a_damaged_index_fails_its_verification_with_the_file(index):
    file = next(index.rglob("table-*.safetensors"))
    file.write_bytes(file.read_bytes()[:-1])
    assert_fails(run("verify", index), file.name, "damaged")
    assert_fails(run("verify", index.parent), "holds no finished index")
