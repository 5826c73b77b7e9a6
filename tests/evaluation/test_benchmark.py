"""The pooled benchmark: its report, its traps (own ids, ids that meet), and runs that score the same from a file."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import place_by_router, write_domain, write_jsonl

import moeret
from moeret import Retriever, metrics
from moeret.data.beir import Judged, read_domain
from moeret.evaluation.baselines import base_system, bm25_system, exact_system, fused_system
from moeret.evaluation.benchmark import _in_own_index
from moeret.evaluation.tables import report_tables
from moeret.evaluation.testsets import Result, TestSet, read_test_sets
from moeret.evaluation.testsets import score as score_sets
from moeret.types import Document, Hit

NDCG, RECALL = metrics.NDCG, metrics.RECALL


@pytest.fixture(scope="module")
def retriever(index_folder):
    loaded = Retriever.load(index_folder)
    yield loaded
    loaded.close()


@pytest.fixture(scope="module")
def report(retriever, two_domains):
    return moeret.evaluate(retriever, two_domains, baselines=True)


def index_of(root: Path, model_folder: Path, folders: dict[str, Path]) -> Retriever:
    moeret.build_index(model_folder, root / "index", folders)
    return Retriever.load(root / "index")


def write_folder(folder: Path, corpus: dict[str, str], queries: dict[str, str], qrels: dict[str, str]) -> Path:
    write_jsonl(folder / "corpus.jsonl", [{"_id": id, "title": "", "text": text} for id, text in corpus.items()])
    write_jsonl(folder / "queries.jsonl", [{"_id": id, "text": text} for id, text in queries.items()])
    (folder / "qrels").mkdir()
    lines = ["query-id\tcorpus-id\tscore", *(f"{query}\t{document}\t1" for query, document in qrels.items())]
    (folder / "qrels" / "test.tsv").write_text("\n".join(lines) + "\n")
    return folder


def law(documents: dict[str, str], queries: dict[str, str], qrels: dict[str, dict[str, int]]) -> TestSet:
    return TestSet("law", Judged(queries, qrels), {id: Document(id, text) for id, text in documents.items()}, [])


def score(test: TestSet, hits: list[list[Hit]]) -> tuple[dict, dict]:
    """(values, run) of hits in an index that holds nothing else."""
    held = [(hit.expert, Document(hit.id, hit.text, hit.title)) for own in hits for hit in own]
    rows = iter(range(len(held)))
    ranked = [(np.array([next(rows) for _ in own], int), np.array([hit.score for hit in own])) for own in hits]
    test = TestSet.of(test.name, test.judged, test.documents, held)
    result: Result = score_sets([test], {test.name: ranked})
    return result.values[test.name], result.runs[test.name]


def hits_of(*hits: tuple[str, str, str]) -> list[Hit]:
    """Hits of (expert, id, text), best first, with scores 0.9, 0.8, ..."""
    return [Hit(id, 0.9 - rank / 10, rank + 1, expert, "", text) for rank, (expert, id, text) in enumerate(hits)]


def test_a_document_has_one_name_however_many_rows_it_has():
    own, other = Document("7", "apple pear"), Document("7", "the rhine")
    rows = [("base", other), ("fruit", own), ("metal", other), ("metal", own)]
    test = TestSet.of("fruit", Judged({}, {}), {"7": own}, rows)
    assert test.names == ["base/7", "7", "base/7", "7"]


def test_bm25_ranks_a_document_of_two_indexes_once(tmp_path, monkeypatch, model_folder, two_domains):
    place_by_router(monkeypatch, -1.0)  # every document without a domain lies in an expert's index too
    write_jsonl(tmp_path / "loose.jsonl", [{"_id": f"loose{n}", "text": f"orinoco story {n}"} for n in range(3)])
    moeret.build_index(model_folder, tmp_path / "index", two_domains, [tmp_path / "loose.jsonl"])
    retriever = Retriever.load(tmp_path / "index")
    held = retriever.held()
    assert len(held) == len({document for _, document in held}) + 3
    [(rows, scores)] = bm25_system(retriever)(["orinoco story"], len(held))
    found = [held[row][1] for row in rows]
    assert len(found) == len({*found}) == len(held) - 3
    assert {document.id for document in found[:3]} == {"loose0", "loose1", "loose2"}
    assert (np.diff(scores) <= 0).all()


def test_baselines_find_a_document_of_two_indexes_once(tmp_path, monkeypatch, model_folder, two_domains):
    place_by_router(monkeypatch, -1.0)
    write_jsonl(tmp_path / "loose.jsonl", [{"_id": f"loose{n}", "text": f"the rhine {n}"} for n in range(3)])
    moeret.build_index(model_folder, tmp_path / "index", two_domains, [tmp_path / "loose.jsonl"])
    retriever = Retriever.load(tmp_path / "index")
    held = retriever.held()
    exact = exact_system(retriever, retriever.model.embedder.base)
    for system in (base_system(retriever), exact, fused_system(retriever, [exact, bm25_system(retriever)])):
        [(rows, scores)] = system(["the rhine"], len(held))
        found = [held[row][1] for row in rows]
        assert len(found) == len({*found}) == len(held) - 3
        assert (np.diff(scores) <= 0).all()
    [(rows, scores)] = exact(["the rhine"], 1)  # the vector of a row is its document's
    vectors = retriever.vectors()
    np.testing.assert_allclose(scores[0], (vectors @ retriever.model.embedder.base(["the rhine"])[0]).max(), atol=1e-5)
    np.testing.assert_allclose(vectors[rows[0]] @ retriever.model.embedder.base(["the rhine"])[0], scores[0], atol=1e-5)


def test_the_report_has_the_promised_shape_and_is_json(retriever, two_domains):
    report = json.loads(json.dumps(moeret.evaluate(retriever, two_domains)))
    assert report.keys() == {"split", "route", "domains", "mean", "router", "cost"}
    assert report["domains"].keys() == {"fruit", "metal"}
    for row in report["domains"].values():
        assert row.keys() == {NDCG, RECALL, "queries"}
        assert row["queries"] == 6
        assert 0 <= row[NDCG] <= 1
        assert row[RECALL] <= 1
    for measure in (NDCG, RECALL):
        assert report["mean"][measure] == pytest.approx(np.mean([row[measure] for row in report["domains"].values()]))
    assert report["router"].keys() == {"accuracy", "abstained"}
    assert all(0 <= value <= 1 for value in report["router"].values())
    assert report["cost"].keys() == {"indexes", "indexes_total", "documents", "documents_share"}
    assert report["cost"]["indexes_total"] == 2
    assert 1 <= report["cost"]["indexes"] <= 2


def test_baselines_are_reported_beside_the_route(report):
    assert json.loads(json.dumps(report))["systems"].keys() == {"bm25", "base_one_index", "auto", "oracle"}
    assert report["systems"]["auto"]["domains"] == report["domains"]
    for name, row in report["systems"]["oracle"]["domains"].items():
        assert report["regret"][name] == pytest.approx(row[NDCG] - report["domains"][name][NDCG])


def test_every_report_can_be_shown(retriever, two_domains, report):
    for made in (report, moeret.evaluate(retriever, two_domains, route="base")):
        tables = report_tables(made)
        assert [table.row_count for table in tables[:2]] == [3, 3]


@pytest.mark.parametrize("route", ["auto", "oracle", "base", "all"])
def test_a_route_scores_what_its_hits_score(retriever, two_domains, route):
    report = moeret.evaluate(retriever, two_domains, route=route)
    assert report["route"] == route
    for name, path in two_domains.items():
        judged = read_domain(name, path, ("test",)).splits["test"]
        found = retriever.search_batch([*judged.queries.values()], 101, route=name if route == "oracle" else route)
        run = {
            query: {hit.id if hit.expert == name else f"elsewhere {hit.id}": -hit.rank for hit in hits}
            for query, hits in zip(judged.queries, found, strict=True)
        }
        values = metrics.per_query(judged.qrels, run)
        assert report["domains"][name][NDCG] == pytest.approx(metrics.mean(values[NDCG]))
        assert report["domains"][name][RECALL] == pytest.approx(metrics.mean(values[RECALL]))


def test_the_oracle_touches_one_index_and_the_base_all(retriever, two_domains):
    assert moeret.evaluate(retriever, two_domains, route="oracle")["cost"]["indexes"] == 1
    assert moeret.evaluate(retriever, two_domains, route="base")["cost"] == {
        "indexes": 2,
        "documents": sum(retriever.sizes.values()),
        "documents_share": 1,
        "indexes_total": 2,
    }


def test_router_accuracy_is_the_share_whose_most_probable_expert_is_their_domains(retriever, two_domains):
    report = moeret.evaluate(retriever, two_domains, route="base")
    right = []
    for name, path in two_domains.items():
        queries = read_domain(name, path, ("test",)).splits["test"].queries
        routes = retriever.route([*queries.values()])
        right += [max(route.probabilities, key=route.probabilities.get) == name for route in routes]
    assert report["router"]["accuracy"] == pytest.approx(np.mean(right))


def test_a_query_that_is_its_own_document_does_not_find_itself():
    documents = {"q1": "Apple  Pear", "d": "plum"}
    test = law(documents, {"q1": "apple pear"}, {"q1": {"d": 1}})
    values, run = score(test, [hits_of(("law", "q1", "Apple  Pear"), ("law", "d", "plum"))])
    assert run == {"q1": {"d": pytest.approx(0.8)}}
    assert values[NDCG] == {"q1": 1.0}


def test_a_query_that_is_its_own_documents_title_and_text_does_not_find_itself():
    test = TestSet("law", Judged({"q1": "apple pear"}, {"q1": {"d": 1}}), {"q1": Document("q1", "pear", "apple")}, [])
    _, run = score(test, [[Hit("q1", 0.9, 1, "law", "apple", "pear")]])
    assert run == {"q1": {}}


def test_a_document_that_shares_a_querys_id_by_accident_is_kept():
    test = law({"7": "plum", "8": "fig"}, {"7": "which fruit is blue"}, {"7": {"7": 1}})
    values, run = score(test, [hits_of(("law", "7", "plum"), ("law", "8", "fig"))])
    assert list(run["7"]) == ["7", "8"]
    assert values[NDCG] == {"7": 1.0}


def test_another_domains_document_of_the_same_id_is_another_document():
    test = law({"d0": "apple"}, {"q": "apple"}, {"q": {"d0": 1}})
    values, run = score(test, [hits_of(("jobs", "d0", "baker"), ("law", "d0", "apple"))])
    assert list(run["q"]) == ["jobs/d0", "d0"]
    assert 0 < values[NDCG]["q"] < 1


def test_a_document_named_like_another_domains_is_not_taken_for_it():
    test = law({"jobs/d0": "apple"}, {"q": "apple"}, {"q": {"jobs/d0": 1}})
    for hits in (
        hits_of(("law", "jobs/d0", "apple"), ("jobs", "d0", "baker")),
        hits_of(("jobs", "d0", "baker"), ("law", "jobs/d0", "apple")),
    ):
        values, run = score(test, [hits])
        assert len(run["q"]) == 2
        assert values[NDCG]["q"] == pytest.approx(1 / np.log2(2 + [hit.expert for hit in hits].index("law")))


def test_a_document_found_in_another_experts_index_counts_as_found():
    test = law({"d": "apple"}, {"q": "apple"}, {"q": {"d": 1}})
    values, _ = score(test, [hits_of(("base", "d", "apple"))])
    assert values[NDCG] == {"q": 1.0}


def test_at_most_a_hundred_hits_count_after_the_query_itself_is_dropped():
    documents = {"q": "apple", **{f"d{n}": f"text {n}" for n in range(101)}}
    test = law(documents, {"q": "apple"}, {"q": {"d99": 1, "d100": 1}})
    hits = [Hit(id, -float(rank), rank, "law", "", text) for rank, (id, text) in enumerate(documents.items(), 1)]
    values, run = score(test, [hits])
    assert list(run["q"]) == [f"d{n}" for n in range(100)]
    assert values[RECALL] == {"q": 0.5}


@pytest.mark.parametrize("relevant", ["a", "b", "c"])
def test_equal_scores_count_in_the_order_of_the_hits_as_they_do_from_a_file(tmp_path, relevant):
    test = law(dict.fromkeys("abc", "x"), {"q": "apple"}, {"q": {relevant: 1}})
    values, run = score(test, [[Hit(id, 0.5, rank, "law", "", "x") for rank, id in enumerate("abc", 1)]])
    assert values[NDCG]["q"] == pytest.approx(1 / np.log2(2 + "abc".index(relevant)))
    metrics.write_run(tmp_path / "run.trec", run)
    assert metrics.per_query(test.judged.qrels, metrics.read_run(tmp_path / "run.trec")) == values


def test_one_domains_run_scores_the_same_from_its_file(tmp_path, retriever, two_domains):
    for name, path in two_domains.items():
        report = moeret.evaluate(retriever, {name: path}, run_file=tmp_path / "run.trec")
        judged = read_domain(name, path, ("test",)).splits["test"]
        values = metrics.per_query(judged.qrels, metrics.read_run(tmp_path / "run.trec"))
        assert metrics.mean(values[NDCG]) == pytest.approx(report["domains"][name][NDCG])
        assert metrics.mean(values[RECALL]) == pytest.approx(report["domains"][name][RECALL])


def test_several_domains_in_one_run_do_not_meet_though_their_ids_do(tmp_path, retriever, two_domains):
    report = moeret.evaluate(retriever, two_domains, route="base", run_file=tmp_path / "run.trec")
    run = metrics.read_run(tmp_path / "run.trec")
    assert len(run) == 12
    assert all(len(hits) == 24 for hits in run.values())
    assert_scores_as_reported(report, run, two_domains)


def assert_scores_as_reported(report, run, folders):
    for name, path in folders.items():
        judged = read_domain(name, path, ("test",)).splits["test"]
        qrels = {
            f"{name}/{query}": {f"{name}/{document}": relevance for document, relevance in own.items()}
            for query, own in judged.qrels.items()
        }
        values = metrics.per_query(qrels, run)
        assert metrics.mean(values[NDCG]) == pytest.approx(report["domains"][name][NDCG])
        assert metrics.mean(values[RECALL]) == pytest.approx(report["domains"][name][RECALL])


def test_ids_with_slashes_keep_their_domain_in_a_run_of_several(tmp_path, model_folder):
    folders = {
        "fruit": write_folder(
            tmp_path / "fruit", {"a/b": "apple", "metal/d0": "pear", "x": "plum"}, {"q/1": "apple"}, {"q/1": "a/b"}
        ),
        "metal": write_folder(tmp_path / "metal", {"a/b": "iron", "d0": "zinc"}, {"q/1": "zinc"}, {"q/1": "d0"}),
    }
    loaded = index_of(tmp_path, model_folder, folders)
    report = moeret.evaluate(loaded, folders, route="base", run_file=tmp_path / "run.trec")
    run = metrics.read_run(tmp_path / "run.trec")
    assert run.keys() == {"fruit/q/1", "metal/q/1"}
    assert run["metal/q/1"].keys() == {"metal/a/b", "metal/d0", "fruit/a/b", "fruit/metal/d0", "fruit/x"}
    assert {"fruit/a/b", "fruit/metal/d0", "fruit/x", "metal/a/b"} < run["fruit/q/1"].keys()
    assert len(run["fruit/q/1"]) == 5
    assert_scores_as_reported(report, run, folders)
    loaded.close()


def test_self_retrieval_is_dropped_in_the_whole_benchmark(tmp_path, model_folder, two_domains):
    folder = write_folder(
        tmp_path / "fruit",
        {"one": "apple pear", "two": "plum fig", "three": "kiwi"},
        {"one": "apple pear", "two": "lime and grape"},
        {"one": "two", "two": "two"},
    )
    loaded = index_of(tmp_path, model_folder, {"fruit": folder})
    report = moeret.evaluate(loaded, {"fruit": folder}, baselines=True, run_file=tmp_path / "run.trec")
    run = metrics.read_run(tmp_path / "run.trec")
    assert run["one"].keys() == {"two", "three"}
    assert run["two"].keys() == {"one", "two", "three"}
    assert report["domains"]["fruit"][RECALL] == 1
    loaded.close()


def test_a_domain_that_the_index_lacks_is_refused(retriever, domains, tmp_path):
    with pytest.raises(moeret.DataError, match=r"the index lacks 12 of the 12 documents of .*river.*build it with"):
        moeret.evaluate(retriever, {"river": domains["river"]})
    write_domain(tmp_path, "fruit")
    rows = [json.loads(line) for line in (tmp_path / "corpus.jsonl").read_text().splitlines()]
    rows[4]["text"] += " changed"
    write_jsonl(tmp_path / "corpus.jsonl", rows)
    with pytest.raises(moeret.DataError, match=r"lacks 1 of the 12 documents .*first: 'd4'"):
        moeret.evaluate(retriever, {"fruit": tmp_path})


def test_a_domain_without_an_expert_of_its_own_can_be_evaluated_but_has_no_oracle(
    tmp_path, retriever, model_folder, domains
):
    moeret.build_index(model_folder, tmp_path / "index", {}, [domains["river"] / "corpus.jsonl"])
    loaded = Retriever.load(tmp_path / "index")
    report = moeret.evaluate(loaded, {"river": domains["river"]}, baselines=True)
    assert report["router"]["accuracy"] is None
    assert "oracle" not in report["systems"]
    assert "regret" not in report
    assert report["domains"]["river"]["queries"] == 6
    assert report_tables(report)
    with pytest.raises(moeret.ConfigError, match="river has none"):
        moeret.evaluate(loaded, {"river": domains["river"]}, route="oracle")
    loaded.close()


def test_documents_elsewhere_do_not_count_for_the_oracle_however_many_others_are_in_its_index():
    documents = {id: Document(id, id) for id in ("d1", "d2")}
    index = SimpleNamespace(sizes={"base": 1, "fruit": 3})
    for names, whole in ((["d2", "d1", "base/x", "base/y"], False), (["base/x", "d1", "base/y", "d2"], True)):
        assert _in_own_index(index, TestSet("fruit", Judged({}, {}), documents, names)) == whole
    assert not _in_own_index(index, TestSet("metal", Judged({}, {}), documents, ["d1", "d2", "d1", "d2"]))


def test_only_the_split_that_is_asked_for_is_read(tmp_path, retriever, domains):
    shutil.copytree(domains["fruit"], tmp_path / "fruit")
    for split in ("train", "test"):
        (tmp_path / "fruit" / "qrels" / f"{split}.tsv").write_text("not\teven\tqrels\nof any kind\n")
    [test] = read_test_sets(retriever, {"fruit": tmp_path / "fruit"}, "dev")
    assert len(test.judged.queries) == 6
    assert moeret.evaluate(retriever, {"fruit": tmp_path / "fruit"}, split="dev")["split"] == "dev"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"route": "orcale"}, "route must be auto, oracle, base or all, got 'orcale'"),
        ({"split": "tset"}, r"tset\.tsv is not there; domain fruit needs judged queries in its tset split"),
    ],
)
def test_mistyped_arguments_are_refused(retriever, domains, arguments, message):
    with pytest.raises(moeret.MoeretError, match=message):
        moeret.evaluate(retriever, {"fruit": domains["fruit"]}, **arguments)


def test_no_domain_is_refused(retriever):
    with pytest.raises(moeret.ConfigError, match="no domain to evaluate"):
        moeret.evaluate(retriever, {})


def test_a_written_run_scores_what_the_report_says(index_folder, two_domains, tmp_path):
    retriever = moeret.Retriever.load(index_folder)
    for domains in (two_domains, {"metal": two_domains["metal"]}):
        report = moeret.evaluate(retriever, domains, run_file=tmp_path / "run.trec")
        again = moeret.score_run(tmp_path / "run.trec", domains)
        assert again["mean"] == pytest.approx(report["mean"])
        for name, row in report["domains"].items():
            assert again["domains"][name] == pytest.approx(row)
    (tmp_path / "empty.trec").write_text("")
    assert moeret.score_run(tmp_path / "empty.trec", two_domains)["mean"] == {"nDCG@10": 0.0, "R@100": 0.0}
