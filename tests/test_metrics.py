"""Measures agree with their definitions, and TREC runs say the same after a trip through a file."""

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from moeret import metrics
from moeret.errors import DataError
from moeret.metrics import NDCG, RECALL, mean, per_query, read_run, write_run


def ndcg_at_10(relevances: dict[str, int], scores: dict[str, float]) -> float:
    """nDCG@10 with linear gains, by the book."""
    discounts = 1 / np.log2(np.arange(2, 12))
    ranked = sorted(scores, key=lambda document: -scores[document])[:10]
    gains = np.array([relevances.get(document, 0) for document in ranked])
    best = np.sort([*relevances.values()])[::-1][:10]
    ideal = float(best @ discounts[: len(best)])
    return float(gains @ discounts[: len(gains)]) / ideal if ideal else 0.0


documents = [f"d{number}" for number in range(30)]
judgments = st.dictionaries(st.sampled_from(documents), st.integers(0, 3), min_size=1, max_size=20)
rankings = st.lists(st.sampled_from(documents), unique=True, max_size=30)


def scored(ranking: list[str]) -> dict[str, float]:
    return {document: 1.0 - rank / 64 for rank, document in enumerate(ranking)}


@settings(deadline=None)
@given(st.lists(st.tuples(judgments, rankings), min_size=1, max_size=4))
def test_ndcg_and_recall_agree_with_their_definitions(pairs):
    qrels = {f"q{number}": judged for number, (judged, _) in enumerate(pairs)}
    run = {f"q{number}": scored(ranking) for number, (_, ranking) in enumerate(pairs)}
    found = per_query(qrels, run)
    assert found.keys() == {NDCG, RECALL}
    for query, judged in qrels.items():
        assert found[NDCG][query] == pytest.approx(ndcg_at_10(judged, run[query]), abs=1e-6)
        relevant = {document for document, relevance in judged.items() if relevance > 0}
        recall = len(relevant & run[query].keys()) / len(relevant) if relevant else 0.0
        assert found[RECALL][query] == pytest.approx(recall, abs=1e-6)


@settings(deadline=None, max_examples=30)
@given(judgments)
def test_a_perfect_run_scores_one(judged):
    judged = {**judged, "d0": 2}
    run = {"q": {document: float(relevance) for document, relevance in judged.items()}}
    assert per_query({"q": judged}, run)[NDCG]["q"] == pytest.approx(1.0)


def test_a_judged_query_that_the_run_lacks_scores_zero():
    qrels = {"found": {"d": 1}, "lost": {"d": 1}, "empty": {"d": 1}}
    for run in ({"found": {"d": 1.0}, "empty": {}}, {"found": {"d": 1.0}, "empty": {}, "unjudged": {"d": 1.0}}):
        values = per_query(qrels, run)
        assert values[NDCG] == {"found": 1.0, "lost": 0.0, "empty": 0.0}
        assert mean(values[RECALL]) == pytest.approx(1 / 3)


def test_an_empty_run_scores_zero():
    assert per_query({"q": {"d": 1}}, {}) == {NDCG: {"q": 0.0}, RECALL: {"q": 0.0}}


def test_only_the_order_of_scores_counts():
    judged = {"a": 2, "b": 1, "c": 0}
    runs = [{"q": {"c": 3.0, "a": 2.0, "b": 1.0}}, {"q": {"b": -9.0, "a": 1e-3, "c": 5e2}}]
    assert per_query({"q": judged}, runs[0]) == per_query({"q": judged}, runs[1])


ids = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=6)
scores = st.floats(-1e6, 1e6, width=32)
runs = st.dictionaries(ids, st.dictionaries(ids, scores, min_size=1, max_size=6), max_size=4)
HARD_IDS = [
    "a b",
    "%",
    "%20",
    "100% sûr",
    "日本 語",
    "\t",
    "\n",
    "x\u2028y",
    "\x85",
    "\xa0",
    "\0",
    "#",
    "🙂",
    "e\u0301",
]


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file to write runs to."""
    return tmp_path_factory.mktemp("runs") / "run.trec"


def best_first(hits: dict[str, float]) -> dict[str, float]:
    return dict(sorted(hits.items(), key=lambda hit: -hit[1]))


@settings(deadline=None)
@given(run=runs)
@example(run={id: {other: 0.5 for other in HARD_IDS} for id in HARD_IDS})
def test_a_run_survives_a_trip_through_a_file(file, run):
    run = {query: best_first(hits) for query, hits in run.items()}
    write_run(file, run)
    read = read_run(file)
    assert [*read] == [*run]
    for query, hits in run.items():
        assert [*read[query]] == [*hits]  # the same documents in the same order
        assert [*read[query].values()] == pytest.approx([*hits.values()], rel=1e-5, abs=1e-5)


@settings(deadline=None)
@given(values=st.lists(scores | st.sampled_from([0.0, -0.0, 0.5, 1.0]), min_size=1, max_size=12))
@example(values=[0.5] * 12)
@example(values=[0.0] * 12)
@example(values=[0.3, 0.3, 0.29999998, 0.29999998, 0.29999995])
def test_written_scores_strictly_fall_from_rank_one(file, values):
    write_run(file, {"q": {f"d{n}": value for n, value in enumerate(sorted(values, reverse=True))}}, tag="mine")
    rows = [line.split(" ") for line in file.read_text().splitlines()]
    assert [row[:2] + row[5:] for row in rows] == [["q", "Q0", "mine"]] * len(values)
    assert [int(row[3]) for row in rows] == [*range(1, len(values) + 1)]
    written = np.array([float(row[4]) for row in rows])
    assert (np.diff(written) < 0).all()
    assert (np.diff(written.astype(np.float32)) < 0).all()  # for tools that read single precision


@settings(deadline=None, max_examples=50)
@given(values=st.lists(st.floats(-1, 1), min_size=1, max_size=12))
@example(values=[1.0, 1.0 - 1e-16, 1.0 - 2e-16])
def test_written_scores_strictly_fall_for_double_precision_too(file, values):
    write_run(file, {"q": {f"d{n}": value for n, value in enumerate(sorted(values, reverse=True))}})
    written = [float(line.split()[4]) for line in file.read_text().splitlines()]
    assert all(before > after for before, after in pairwise(written))


def test_distinct_scores_are_written_exactly(file):
    values = np.sort(np.random.default_rng(0).normal(size=50).astype(np.float32))[::-1]
    write_run(file, {"q": {f"d{n}": float(value) for n, value in enumerate(values)}})
    assert [np.float32(score) for score in read_run(file)["q"].values()] == [*values]


def test_a_run_is_judged_alike_from_memory_and_from_a_file(file):
    random = np.random.default_rng(1)
    run = {
        f"q {query}": best_first({f"d %{n}": float(score) for n, score in enumerate(random.normal(size=20))})
        for query in range(5)
    }
    qrels = {query: {f"d %{n}": int(random.integers(3)) for n in range(0, 20, 3)} for query in run}
    write_run(file, run)
    assert per_query(qrels, read_run(file)) == per_query(qrels, run)


def test_only_what_a_run_cannot_hold_is_encoded(file):
    """Other tools match ids to qrels letter by letter."""
    write_run(file, {"é-1": {"d/ü:7": 1.0, "two words": 0.5, "100%": 0.25}})
    assert [line.split()[:3:2] for line in file.read_text().splitlines()] == [
        ["é-1", "d/ü:7"],
        ["é-1", "two%20words"],
        ["é-1", "100%25"],
    ]


def test_somebody_elses_run_is_read_best_first_whatever_its_order(file):
    file.write_text("q Q0 b 2 0.5 x\n\nq\tQ0\ta\t1\t0.75\tx\nq Q0 c 3 -1e-3 x\n")
    assert [*read_run(file)["q"].items()] == [("a", 0.75), ("b", 0.5), ("c", -1e-3)]


@pytest.mark.parametrize("line", ["q Q0 d 1 0.5", "q Q0 d 1 0.5 tag more", "q Q0 d 1 high tag", "word"])
def test_a_line_that_is_no_hit_is_named(file, line):
    file.write_text(f"q Q0 a 1 0.5 x\n\n{line}\n")
    with pytest.raises(DataError, match=r"run\.trec line 3: expected `query Q0 document rank score tag`"):
        read_run(file)


def test_a_run_that_cannot_be_read_is_a_data_error(tmp_path):
    with pytest.raises(DataError, match="absent"):
        read_run(tmp_path / "absent")
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DataError, match="binary"):
        read_run(tmp_path / "binary")


def test_only_this_module_knows_the_names_of_measures():
    assert metrics.NDCG == "nDCG@10"
    assert metrics.RECALL == "R@100"
