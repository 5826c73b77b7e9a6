"""The command line: exit codes, one line per error, JSON that parses, and the whole chain from training to a score."""

import contextlib
import hashlib
import io
import json
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import write_domain, write_jsonl
from safetensors import SafetensorError

import moeret
from moeret import cli, metrics

FAST = ("--steps", "6", "--shared-steps", "3", "--batch-size", "16", "--evaluate-every", "3")
FAST += ("--expert.rank", "8", "--expert.layers", "2")
QUERY = "find the metal nick10"


@dataclass(frozen=True)
class Ran:
    """What a command left: its exit code and what it printed."""

    code: int
    out: str
    err: str

    @property
    def json(self):
        return json.loads(self.out)


def run(*arguments: object) -> Ran:
    out, err = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        patch.setattr(sys, "argv", ["moeret", *map(str, arguments)])
        patch.setenv("COLUMNS", "100")
        code = 0
        try:
            cli.main()
        except SystemExit as stopped:
            code = stopped.code
    return Ran(code or 0, out.getvalue(), err.getvalue())


def done(*arguments: object) -> Ran:
    ran = run(*arguments)
    assert ran.code == 0, ran
    if "--json" in arguments or "--help" in arguments:
        assert ran.err == ""
    return ran


def assert_fails(ran: Ran, *wanted: str) -> None:
    """Exit code 1, nothing on standard output, one line on standard error that has all of `wanted`."""
    assert ran.code == 1, ran
    assert ran.out == ""
    assert ran.err.startswith("moeret: error: ")
    assert ran.err.count("\n") == 1
    assert ran.err.endswith("\n")
    for part in wanted:
        assert part in ran.err


def assert_wrong_usage(ran: Ran, *wanted: str) -> None:
    assert ran.code == 2, ran
    for part in wanted:
        assert part in " ".join((ran.out + ran.err).split())


def pairs(domains: dict[str, Path]) -> list[str]:
    return [part for name, path in domains.items() for part in ("--domain", f"{name}={path}")]


def hashes(folder: Path) -> dict[str, str]:
    """Digest by file of everything that belongs to single experts."""
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for part in ("base", "experts", "profiles")
        for path in (folder / part).rglob("*")
        if path.is_file()
    }


@pytest.fixture(scope="module")
def chain(tmp_path_factory, base_folder, domains, two_domains) -> SimpleNamespace:
    """Every command once, in the order in which one would use them, and what each said."""
    root = tmp_path_factory.mktemp("chain")
    model, index = root / "model", root / "index"
    say = SimpleNamespace(model=model, index=index, run_file=root / "run.trec")
    say.train = done("train", *pairs(two_domains), "--out", model, "--base", base_folder, *FAST, "--json")
    say.listed = done("experts", "list", model, "--json")
    say.files_before = hashes(model)
    texts = ["find the metal nick10", "about apple and iron"]
    say.vectors_before = moeret.Model.load(model).encode_query(texts, expert="fruit")
    say.added = done("experts", "add", model, "--domain", f"river={domains['river']}", *FAST, "--json")
    say.files_after = hashes(model)
    say.vectors_after = moeret.Model.load(model).encode_query(texts, expert="fruit")
    write_jsonl(root / "loose.jsonl", [{"_id": "loose", "title": "", "text": "a story of gold"}])
    say.indexing = ["index", model, *pairs(domains), "--corpus", root / "loose.jsonl", "--out", index]
    say.indexed = done(*say.indexing, "--json")
    say.searched = done("search", index, QUERY, "-k", 5, "--json")
    say.routed = done("route", index, QUERY, "--json")
    say.evaluated = done("evaluate", index, *pairs(domains), "--run", say.run_file, "--baselines", "--json")
    return say


@pytest.fixture
def model_copy(tmp_path, chain) -> Path:
    shutil.copytree(chain.model, tmp_path / "model")
    return tmp_path / "model"


HELP = {
    (): ("train", "experts", "index", "search", "route", "evaluate", "quickstart"),
    ("quickstart",): ("--out",),
    ("train",): ("--domain", "--out", "--base", "--steps", "--tower", "--expert.rank", "--json"),
    ("experts",): ("list", "add", "remove"),
    ("experts", "list"): ("--json",),
    ("experts", "add"): ("--domain", "--steps", "--json"),
    ("experts", "remove"): ("--json",),
    ("index",): ("--out", "--domain", "--corpus", "--overwrite", "--ef", "--exact-below", "--json"),
    ("search",): ("-k", "--experts", "--json"),
    ("route",): ("--json",),
    ("evaluate",): ("--domain", "--split", "--route", "--baselines", "--run", "--json"),
}


@pytest.mark.parametrize("command", HELP, ids=" ".join)
def test_help_names_the_flags(command):
    ran = done(*command, "--help")
    for flag in HELP[command]:
        assert flag in ran.out
    assert "None of" not in ran.out


def test_version():
    assert done("--version").out.startswith("moeret 0.")


def test_trained_experts_are_listed(chain):
    assert chain.train.json == chain.listed.json
    listed = chain.listed.json
    assert [expert["name"] for expert in listed["experts"]] == ["fruit", "metal"]
    assert {expert["documents"] for expert in listed["experts"]} == {12}
    assert listed["tower"] == "query"
    assert listed["router"]["query"]["kind"] in ("centroids", "learned")


def test_adding_an_expert_changes_no_byte_of_the_others(chain):
    assert [expert["name"] for expert in chain.added.json["experts"]] == ["fruit", "metal", "river"]
    assert chain.added.json["experts"][:2] == chain.listed.json["experts"]
    assert chain.files_before.items() < chain.files_after.items()
    assert {name.split("/")[1].split("-")[0] for name in chain.files_after.keys() - chain.files_before.keys()} == {
        "river"
    }
    np.testing.assert_allclose(chain.vectors_after, chain.vectors_before, atol=1e-6)


def test_adding_the_same_expert_again_changes_nothing(chain, model_copy, domains):
    before = (model_copy / "manifest.json").read_bytes()
    again = done("experts", "add", model_copy, "--domain", f"river={domains['river']}", *FAST, "--json")
    assert again.json == chain.added.json
    assert (model_copy / "manifest.json").read_bytes() == before


def test_removing_an_expert_changes_no_byte_of_the_others(chain, model_copy):
    ran = done("experts", "remove", model_copy, "metal", "--json")
    assert [expert["name"] for expert in ran.json["experts"]] == ["fruit", "river"]
    assert hashes(model_copy) == {name: digest for name, digest in chain.files_after.items() if "/metal-" not in name}
    assert ran.json == done("experts", "list", model_copy, "--json").json


def test_the_last_expert_cannot_be_removed(model_copy):
    done("experts", "remove", model_copy, "metal")
    done("experts", "remove", model_copy, "river")
    assert_fails(run("experts", "remove", model_copy, "fruit"), "fruit is the only expert", "at least one")


def test_the_index_counts_its_documents(chain):
    meta = chain.indexed.json
    assert meta["documents"] == 37
    assert sum(expert["documents"] for expert in meta["experts"].values()) == 37
    assert done(*chain.indexing, "--json").json == meta


def test_search_prints_hits_as_json(chain):
    found = chain.searched.json
    assert found["query"] == QUERY
    assert [hit["rank"] for hit in found["hits"]] == [1, 2, 3, 4, 5]
    assert all(
        hit.keys() == {"rank", "id", "score", "expert", "domain", "title", "text", "metadata"} for hit in found["hits"]
    )
    assert found["abstained"] == (not found["experts"])


def test_the_library_finds_what_the_command_finds(chain):
    hits = moeret.Retriever.load(chain.index).search(QUERY, 5)
    assert [(hit.expert, hit.id) for hit in hits] == [(hit["expert"], hit["id"]) for hit in chain.searched.json["hits"]]


def test_search_takes_a_number_of_experts_or_all(chain):
    one = done("search", chain.index, QUERY, "--experts", 1, "--json").json
    assert len(one["experts"]) <= 1
    everywhere = done("search", chain.index, QUERY, "--experts", "all", "-k", 99, "--json").json
    assert len(everywhere["hits"]) == 37
    assert len(done("search", chain.index, QUERY, "--k", 2, "--json").json["hits"]) == 2


def test_search_takes_a_route(chain):
    found = done("search", chain.index, QUERY, "--route", "base", "--json").json
    best = moeret.Retriever.load(chain.index).search(QUERY, route="base")
    assert [hit["id"] for hit in found["hits"]] == [hit.id for hit in best] and found["experts"] is None
    assert done("search", chain.index, QUERY, "--route", "metal").out.startswith("\n1. ")
    assert_fails(run("search", chain.index, QUERY, "--route", "law"), "no route 'law'")
    assert_fails(
        run("search", chain.index, QUERY, "--route", "metal", "--experts", 1), "does not go with --route metal"
    )


def test_training_does_not_write_among_other_things(tmp_path, two_domains, base_folder):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "mine.txt").touch()
    ran = run("train", *pairs(two_domains), "--out", tmp_path / "data", "--base", base_folder, *FAST)
    assert_fails(ran, "holds other things (mine.txt); name a new directory")
    assert [path.name for path in (tmp_path / "data").iterdir()] == ["mine.txt"]


def test_a_query_needs_no_quotes(chain):
    quoted = done("search", chain.index, QUERY, "-k", 3, "--json").json
    assert done("search", chain.index, *QUERY.split(), "-k", 3, "--json").json == quoted
    assert done("route", chain.index, *QUERY.split()).out == done("route", chain.index, QUERY).out


def test_without_hybrid_the_cosine_alone_counts(chain):
    scores = {}
    for option in ("--hybrid", "--no-hybrid"):
        found = done("search", chain.index, QUERY, "--experts", "all", "-k", 99, option, "--json").json["hits"]
        scores[option] = {(hit["expert"], hit["id"]): hit["score"] for hit in found}
    alone = moeret.Retriever.load(chain.index, hybrid=False).search(QUERY, 99, route="all")
    assert {(hit.expert, hit.id): hit.score for hit in alone} == scores["--no-hybrid"] != scores["--hybrid"]


def test_any_text_can_be_searched_and_comes_out_as_it_went_in(chain):
    for query in ("🦊 apple", "שלום", "a\tb\nc", "x" * 10_000):
        assert done("search", chain.index, query, "--json").json["query"] == query


def test_route_prints_probabilities_as_json(chain):
    route = chain.routed.json
    assert route.keys() == {"query", "probabilities", "experts", "abstained"}
    assert route["probabilities"].keys() == {"fruit", "metal", "river"}
    assert sum(route["probabilities"].values()) == pytest.approx(1, abs=1e-5)
    assert route["experts"] == chain.searched.json["experts"]


def test_evaluate_prints_its_report_as_json_and_writes_a_run(chain):
    report = chain.evaluated.json
    assert report["domains"].keys() == {"fruit", "metal", "river"}
    assert report["mean"].keys() == {"nDCG@10", "R@100"}
    assert report["router"].keys() == {"accuracy", "abstained"}
    assert len(metrics.read_run(chain.run_file)) == 18


def test_evaluate_scores_another_split_and_route(chain, domains):
    report = done("evaluate", chain.index, *pairs(domains), "--split", "dev", "--route", "oracle", "--json").json
    assert (report["split"], report["route"]) == ("dev", "oracle")
    assert report["cost"]["indexes"] <= 2


def test_every_command_speaks_to_people_too(chain, domains, two_domains):
    assert "fruit" in done("experts", "list", chain.model).out
    assert "exact" in done(*chain.indexing).out
    searched = done("search", chain.index, QUERY, "-k", 2).out
    assert searched.startswith("experts: ")
    assert "\n1. " in searched
    assert "\n2. " in searched
    assert "%" in done("route", chain.index, QUERY).out
    assert "nDCG@10" in done("evaluate", chain.index, *pairs(domains)).out


def test_results_cannot_drive_the_terminal(tmp_path, chain):
    rows = [{"_id": "a\x1b[2Jb", "title": "\x1b]0;owned\x07", "text": "[bold]text[/bold] \x9b1m \u202e gold"}]
    write_jsonl(tmp_path / "loose.jsonl", rows)
    done("index", chain.model, "--corpus", tmp_path / "loose.jsonl", "--out", tmp_path / "index")
    out = done("search", tmp_path / "index", "gold").out
    assert not {"\x1b", "\x07", "\x9b", "\u202e"} & set(out)
    assert "[bold]text[/bold]" in out


def test_an_index_goes_on_with_the_model_it_was_built_with(tmp_path, chain, model_copy):
    shutil.copytree(chain.index, tmp_path / "index")
    done("experts", "remove", model_copy, "river")
    assert done("search", tmp_path / "index", QUERY, "-k", 5, "--json").json == chain.searched.json


@pytest.mark.parametrize(
    ("arguments", "wanted"),
    [
        (("-k", "0"), ["k must be a whole number of at least 1, got 0"]),
        (("-k", "-3"), ["k must be a whole number of at least 1, got -3"]),
        (("--experts", "0"), ["experts must be a whole number of at least 1, got 0"]),
        (("--experts", "banana"), ["--experts must be a whole number or all, got 'banana'"]),
        (("--experts", "1.5"), ["got '1.5'"]),
        (("--experts", "-1"), ["got '-1'"]),
    ],
    ids=" ".join,
)
def test_search_arguments_that_make_no_sense(chain, arguments, wanted):
    assert_fails(run("search", chain.index, QUERY, *arguments), *wanted)


@pytest.mark.parametrize("query", ["", "  ", "\n"])
def test_an_empty_query(chain, query):
    for command in ("search", "route"):
        assert_fails(run(command, chain.index, query), "query 1 of 1 is empty")


@pytest.mark.parametrize("command", [("search", "x", "q"), ("route", "x", "q"), ("experts", "list", "x")])
def test_a_directory_that_is_not_there(tmp_path, monkeypatch, command):
    monkeypatch.chdir(tmp_path)
    assert_fails(run(*command), "there is no such directory")


def test_models_and_indexes_are_not_taken_for_each_other(tmp_path, chain, two_domains):
    assert_fails(run("search", chain.model, QUERY), "is a model", "expected a")
    assert_fails(run("experts", "list", chain.index), "is a", "expected a model")
    assert_fails(run("index", chain.index, *pairs(two_domains), "--out", tmp_path / "x"), "expected a model")
    assert_fails(run("index", chain.model, *pairs(two_domains), "--out", chain.model, "--overwrite"), "expected a")
    assert moeret.Model.load(chain.model).experts == ("fruit", "metal", "river")


DOMAIN_ERRORS = [
    ("fruit", ["--domain fruit: expected NAME=BEIR_DIR, for example law=data/law"]),
    ("=x", ["'' cannot name a domain"]),
    ("fruit=", ["expected NAME=BEIR_DIR"]),
    ("fruit=nowhere", ["there is no directory nowhere"]),
    ("base=nowhere", ["'base' cannot name a domain"]),
    ("../x=nowhere", ["'../x' cannot name a domain"]),
]


@pytest.mark.parametrize(("domain", "wanted"), DOMAIN_ERRORS, ids=[domain for domain, _ in DOMAIN_ERRORS])
def test_domains_that_cannot_be_read(tmp_path, monkeypatch, chain, domain, wanted):
    monkeypatch.chdir(tmp_path)
    for command in (
        ("train", "--out", "x"),
        ("experts", "add", chain.model),
        ("index", chain.model, "--out", "x"),
        ("evaluate", chain.index),
    ):
        assert_fails(run(*command, "--domain", domain), *wanted)
    assert list(tmp_path.iterdir()) == []


def test_a_domain_that_is_missing_or_given_twice(tmp_path, chain, domains):
    twice = ["--domain", f"fruit={domains['fruit']}"] * 2
    for command in (
        ("train", "--out", tmp_path / "x"),
        ("experts", "add", chain.model),
        ("index", chain.model, "--out", tmp_path / "x"),
        ("evaluate", chain.index),
    ):
        assert_fails(run(*command, *twice), "--domain fruit is given twice")
        assert_fails(run(*command), "NAME=BEIR_DIR")
        assert_fails(run(*command, "--domain"), "NAME=BEIR_DIR")


def test_a_malformed_corpus_is_reported_with_its_line(tmp_path, chain):
    folder = write_domain(tmp_path / "fruit", "fruit")
    with (folder / "corpus.jsonl").open("a") as file:
        file.write("{broken\n")
    assert_fails(
        run("index", chain.model, "--domain", f"fruit={folder}", "--out", tmp_path / "x"),
        "corpus.jsonl: line 13: not JSON",
    )


@pytest.mark.parametrize(
    ("command", "wanted"),
    [
        (("train", "--out", "x", "--batch-size", "0"), "batch_size must be at least 1, got 0"),
        (("train", "--out", "x", "--expert.rank", "0"), "rank must be at least 1, got 0"),
        (("train", "--out", "x", "--learning-rate", "-1"), "learning_rate must be above 0"),
        (("experts", "add", "x", "--temperature", "0"), "temperature must be above 0"),
        (("index", "x", "--out", "x", "--M", "1"), "M must be in [2, 256], got 1"),
        (("index", "x", "--out", "x", "--ef-construction", "1"), "ef_construction must be in [M, 1000000], got 1"),
    ],
)
def test_settings_that_make_no_sense_are_named_without_a_traceback(command, wanted):
    ran = run(*command)
    assert ran.code in (1, 2)
    assert wanted in " ".join((ran.out + ran.err).replace("│", "").split())


def test_names_that_are_mistyped(tmp_path, chain, model_copy, domains):
    assert_fails(run("experts", "remove", model_copy, "frut"), "no expert 'frut'", "fruit, metal, river")
    ran = run("index", chain.model, "--domain", f"frut={domains['fruit']}", "--out", tmp_path / "x")
    assert_fails(ran, "no expert frut (it has fruit, metal, river)", "moeret experts add")
    ran = run("evaluate", chain.index, "--domain", f"fruit={domains['fruit']}", "--split", "tset")
    assert_fails(ran, "tset.tsv is not there")


def test_a_base_that_is_not_there(tmp_path, domains):
    (tmp_path / "empty").mkdir()
    ran = run("train", "--domain", f"fruit={domains['fruit']}", "--out", tmp_path / "x", "--base", tmp_path / "empty")
    assert_fails(ran, str(tmp_path / "empty"))


def test_things_that_exist_are_not_replaced_unasked(tmp_path, chain, domains, model_copy, base_folder):
    ran = run("index", chain.model, "--domain", f"fruit={domains['fruit']}", "--out", chain.index)
    assert_fails(ran, "made from other things", "--overwrite")
    ran = run("train", *pairs(domains), "--out", model_copy, "--base", base_folder, *FAST)
    assert_fails(ran, "finished model made with other arguments")
    changed = [*FAST, "--seed", "7"]
    assert_fails(run("experts", "add", model_copy, "--domain", f"river={domains['river']}", *changed), "already has")


@pytest.mark.parametrize(
    ("command", "wanted"),
    [
        ((), ["Missing subcommand"]),
        (("serach",), ["serach", "search"]),
        (("search",), ["PATH"]),
        (("search", "x"), ["What to look for"]),
        (("search", "x", "q", "-k", "two"), ["-k"]),
        (("search", "x", "q", "--kk", "2"), ["--kk"]),
        (("index", "x", "--otu", "y"), ["--out", "--otu"]),
        (("evaluate", "x", "--route", "orcale"), ["--route", "oracle"]),
        (("train", "--out", "x", "--tower", "eiffel"), ["--tower", "query"]),
        (("experts", "remove", "x"), ["name"]),
        (("experts", "lst", "x"), ["list"]),
        (("index", "x", "--out", "y", "--ef", "many"), ["--ef"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_wrong_usage_exits_with_2_and_names_the_argument(command, wanted):
    assert_wrong_usage(run(*command), *wanted)


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (
            OSError(28, "No space left on device", "/x"),
            1,
            "error: No space left on device: /x; what was published is whole",
        ),
        (SafetensorError("No space left on device"), 1, "error: No space left on device; what was published is whole"),
        (KeyboardInterrupt(), 130, "interrupted\n"),
        (moeret.ConfigError("no"), 1, "error: no"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_goes_wrong_becomes_one_line_and_a_code(monkeypatch, chain, error, code, line):
    def fail(*rest, **more):
        raise error

    monkeypatch.setattr("moeret.retrieval.search.Retriever.load", fail)
    ran = run("search", chain.index, QUERY)
    assert (ran.code, ran.out) == (code, "")
    assert ran.err.startswith(f"moeret: {line}")
    assert ran.err.count("\n") == 1


def test_a_run_that_cannot_be_written_is_refused_before_any_search(tmp_path, monkeypatch, chain, domains):
    monkeypatch.setattr("moeret.retrieval.search.Retriever.rank", lambda *rest, **more: pytest.fail("searched"))
    ran = run("evaluate", chain.index, *pairs(domains), "--run", tmp_path / "nowhere" / "run.trec", "--json")
    assert_fails(ran, "nowhere/run.trec", "there is no directory")
