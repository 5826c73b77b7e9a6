"""A retriever behind the interfaces of BEIR and mteb, called as these harnesses call it."""

import numpy as np
import pytest
from conftest import write_jsonl

import moeret
from moeret import metrics
from moeret.data.beir import read_domain
from moeret.evaluation.adapters import HarnessSearch


@pytest.fixture(scope="module")
def retriever(index_folder):
    loaded = moeret.Retriever.load(index_folder)
    yield loaded
    loaded.close()


@pytest.mark.parametrize("harness", ["BEIR", "mteb"])
@pytest.mark.parametrize("name", ["fruit", "metal"])
def test_a_harness_scores_what_the_pooled_benchmark_scores(retriever, two_domains, harness, name):
    domain = read_domain(name, two_domains[name], ("test",))
    judged, search = domain.splits["test"], HarnessSearch(retriever)
    if harness == "BEIR":
        corpus = {own.id: {"title": own.title, "text": own.text} for own in domain.corpus}
        run = search.search(corpus, judged.queries, 100, "cos_sim")
    else:
        search.index([{"id": own.id, "title": own.title, "text": own.text} for own in domain.corpus], num_proc=None)
        rows = [{"id": id, "text": text} for id, text in judged.queries.items()]
        run = search.search(
            queries=rows, top_k=100, task_metadata=None, hf_split="test", top_ranked=None, num_proc=None
        )
    report = moeret.evaluate(retriever, {name: two_domains[name]})["domains"][name]
    values = metrics.per_query(judged.qrels, run)
    for measure in (metrics.NDCG, metrics.RECALL):
        assert metrics.mean(values[measure]) == pytest.approx(report[measure])


def test_no_more_hits_than_asked_for(retriever, two_domains):
    domain = read_domain("fruit", two_domains["fruit"], ("test",))
    corpus = {own.id: {"title": own.title, "text": own.text} for own in domain.corpus}
    run = HarnessSearch(retriever).search(corpus, domain.splits["test"].queries, 3, "cos_sim")
    assert {len(hits) for hits in run.values()} == {3}


def test_a_corpus_that_the_index_lacks_is_refused(retriever):
    with pytest.raises(moeret.DataError, match=r"lacks 1 of the 1 documents of this corpus \(first: 'x'\)"):
        HarnessSearch(retriever).search({"x": {"text": "a stranger"}}, {"q": "apple"}, 10, "cos_sim")


def test_equal_scores_keep_their_order_in_harnesses_that_would_order_them_by_id(tmp_path, model_folder):
    corpus = {id: {"title": "", "text": "one text twice"} for id in ("b", "a", "c")}
    write_jsonl(tmp_path / "c.jsonl", [{"_id": id, **row} for id, row in corpus.items()])
    moeret.build_index(model_folder, tmp_path / "index", {}, [tmp_path / "c.jsonl"])
    loaded = moeret.Retriever.load(tmp_path / "index")
    found = HarnessSearch(loaded).search(corpus, {"q": "find the apple"}, 10, "dot")["q"]
    loaded.close()
    assert [*found] == ["b", "a", "c"]
    assert (np.diff(np.array([*found.values()], np.float32)) < 0).all()
