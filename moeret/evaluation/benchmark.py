"""The pooled benchmark: one index holds all domains, queries say nothing of theirs, and every domain is reported."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from moeret import metrics
from moeret.config import RouteMode, require
from moeret.data.beir import Judged, read_domain
from moeret.errors import DataError
from moeret.evaluation.baselines import base_system, bm25_system
from moeret.metrics import NDCG, RECALL
from moeret.progress import progress_bar
from moeret.retrieval.search import Retriever, Searched
from moeret.types import Document, Hit

_DEPTH = 100
_QUERIES_AT_ONCE = 512


@dataclass(frozen=True, slots=True)
class TestSet:
    """One domain's judged queries, and its documents by id."""

    __test__ = False  # not a class of tests
    name: str
    judged: Judged
    documents: dict[str, Document]


@dataclass(frozen=True, slots=True)
class Result:
    """What one system scored: domain -> measure -> query id -> value, and the runs that gave it."""

    values: dict[str, dict[str, dict[str, float]]]
    runs: dict[str, dict[str, dict[str, float]]]

    def table(self) -> dict[str, dict[str, float]]:
        """Domain -> measure -> mean over its queries, and the number of queries."""
        return {
            name: {**{measure: metrics.mean(own) for measure, own in values.items()}, "queries": len(values[NDCG])}
            for name, values in self.values.items()
        }

    def mean(self) -> dict[str, float]:
        """Measure -> mean over domains."""
        table = self.table()
        return {measure: float(np.mean([row[measure] for row in table.values()])) for measure in (NDCG, RECALL)}


def read_test_sets(retriever: Retriever, domains: dict[str, Path], split: str) -> list[TestSet]:
    """Reads one split of each domain.

    Raises:
      DataError: a folder is malformed, or the index lacks a relevant document (every document of it is looked for).
    """
    require(bool(domains), "there is no domain to evaluate; give at least one NAME=BEIR_DIR")
    held = set(retriever.documents(range(sum(retriever.sizes.values()))).values())
    sets = []
    for name, path in domains.items():
        domain = read_domain(name, path, (split,))
        documents = {document.id: document for document in domain.corpus}
        missing = [document.id for document in domain.corpus if document not in held]
        if missing:
            raise DataError(
                f"the index lacks {len(missing)} of the {len(documents)} documents of {path / 'corpus.jsonl'} "
                f"(first: {missing[0]!r}); build it with this domain"
            )
        sets.append(TestSet(name, domain.splits[split], documents))
    return sets


def score(
    test: TestSet, hits: Sequence[Sequence[Hit]]
) -> tuple[dict[str, dict[str, float]], dict[str, dict[str, float]]]:
    """(measure -> query -> value, run) of hits for each query of a test set, in its order.

    Measured is the order of the hits, equal scores included, so that a run written to a file scores the same.
    """
    run = {
        query: _run_of(test, query, text, own)
        for (query, text), own in zip(test.judged.queries.items(), hits, strict=True)
    }
    ranked = {query: {id: -float(rank) for rank, id in enumerate(own)} for query, own in run.items()}
    return metrics.per_query(test.judged.qrels, ranked), run


def _run_of(test: TestSet, query: str, text: str, hits: Sequence[Hit]) -> dict[str, float]:
    """Document -> score of the first _DEPTH hits; another domain's document is named expert/id.

    A query that is itself a document does not retrieve itself: BEIR's rule drops every hit with the query's id; here the
    text must be the same too, because ids like "7" meet by accident.
    """
    run: dict[str, float] = {}
    for hit in hits:
        document = test.documents.get(hit.id)
        if document is None or (document.title, document.text) != (hit.title, hit.text):
            run[_foreign(test, hit)] = hit.score
        elif hit.id != query or _words(text) not in (_words(document.text), _words(document.contents)):
            run[hit.id] = hit.score
    return dict(list(run.items())[:_DEPTH])


def _foreign(test: TestSet, hit: Hit) -> str:
    """A name for another domain's document that none of the domain's own documents has."""
    name = f"{hit.expert}/{hit.id}"
    while name in test.documents:
        name = f"/{name}"
    return name


def _words(text: str) -> list[str]:
    return text.casefold().split()


def evaluate(
    retriever: Retriever,
    domains: dict[str, Path],
    *,
    split: str = "test",
    route: RouteMode = "auto",
    baselines: bool = False,
    run_file: Path | None = None,
    show_progress_bar: bool = False,
) -> dict[str, Any]:
    """Scores a retriever on the pooled benchmark, and returns the report as one JSON object.

    It has `domains` (nDCG@10, R@100 and the number of queries of each), `mean` over domains, `router` (share of queries
    whose most probable expert is their domain's, and share abstained) and `cost` (indexes and share of the documents that a
    query touched). With `baselines` also `systems`: BM25 over the pool, the base in one HNSW over the pool, routed, and
    the known-domain oracle, and `regret`, what routing loses to that oracle. `run_file` receives a TREC run.

    Raises:
      ConfigError: an unknown route, or one that the index cannot serve.
      DataError: a domain that cannot be evaluated.
    """
    require(route in ("auto", "oracle", "base", "all"), f"route must be auto, oracle, base or all, got {route!r}")
    require(
        run_file is None or run_file.parent.is_dir(),
        f"cannot write the run {run_file}: there is no directory {run_file and run_file.parent}",
    )
    sets = read_test_sets(retriever, domains, split)
    # The oracle needs the whole domain in its own expert's index, not where a router placed some of it.
    no_expert = [test.name for test in sets if retriever.sizes.get(test.name, 0) < len(test.documents)]
    require(
        route != "oracle" or not no_expert,
        f"the oracle needs an expert for each domain; {', '.join(no_expert)} has none",
    )
    wanted: list[str] = list(dict.fromkeys([route, *(["auto", "oracle"] if baselines and not no_expert else [])]))
    queries = sum(len(test.judged.queries) for test in sets)
    with progress_bar(
        "Evaluating", queries * (len(wanted) + 2 * baselines), shown=show_progress_bar, unit="queries"
    ) as bar:
        results, searched = {}, {}
        for mode in wanted:
            searched[mode] = {test.name: _search(retriever, test, mode, bar) for test in sets}
            results[mode] = _result(sets, {name: own.hits for name, own in searched[mode].items()})
        if baselines:
            for name, make in (("bm25", bm25_system), ("base_one_index", base_system)):
                system = make(retriever)
                results[name] = _result(sets, {test.name: _hits(system, test, bar) for test in sets})
    report = {
        "split": split,
        "route": route,
        "domains": results[route].table(),
        "mean": results[route].mean(),
        "router": _router_report(retriever, sets, searched.get("auto") or searched[route]),
        "cost": _cost(retriever, searched[route]),
    }
    if baselines:
        names = {"bm25": "BM25, one pool", "base_one_index": "base, one HNSW", route: f"route {route}"}
        names |= {"auto": "routed", "oracle": "known-domain oracle"} if "oracle" in results else {"auto": "routed"}
        order = [name for name in ("bm25", "base_one_index", "base", "all", "auto", "oracle") if name in results]
        report["systems"] = {
            name: {"label": names[name], "domains": results[name].table(), "mean": results[name].mean()}
            for name in order
        }
    if "auto" in results and "oracle" in results:
        routed, oracle = results["auto"].table(), results["oracle"].table()
        report["regret"] = {name: oracle[name][NDCG] - routed[name][NDCG] for name in oracle}
    if run_file:
        metrics.write_run(run_file, _one_run(sets, results[route].runs))
    return report


def score_run(run_file: Path, domains: dict[str, Path], *, split: str = "test") -> dict[str, Any]:
    """Scores a TREC run, of any system, on one split of each domain: `domains` and `mean` as in `evaluate`.

    Ids are as `evaluate` writes them: plain for one domain, with the domain's name and a slash in front for several.

    Raises:
      DataError: a run or a domain that cannot be read.
    """
    require(bool(domains), "there is no domain to evaluate; give at least one NAME=BEIR_DIR")
    run = metrics.read_run(run_file)
    runs, values = {}, {}
    for name, path in domains.items():
        qrels = read_domain(name, path, (split,)).splits[split].qrels
        prefix = f"{name}/" if len(domains) > 1 else ""
        runs[name] = {
            query: {id.removeprefix(prefix): score for id, score in hits.items()}
            for query in qrels
            if (hits := run.get(prefix + query))
        }
        values[name] = metrics.per_query(qrels, runs[name])
    result = Result(values, runs)
    return {"split": split, "domains": result.table(), "mean": result.mean()}


def _search(retriever: Retriever, test: TestSet, mode: str, advance) -> Searched:
    route = test.name if mode == "oracle" else mode
    texts = [*test.judged.queries.values()]
    parts = []
    for start in range(0, len(texts), _QUERIES_AT_ONCE):
        chunk = texts[start : start + _QUERIES_AT_ONCE]
        parts.append(retriever.search_detailed(chunk, _DEPTH + 1, route=route))
        advance(len(chunk))
    return Searched(
        *([item for part in parts for item in getattr(part, field)] for field in ("hits", "indexes", "routes"))
    )


def _hits(system, test: TestSet, advance) -> list[list[Hit]]:
    texts = [*test.judged.queries.values()]
    hits: list[list[Hit]] = []
    for start in range(0, len(texts), _QUERIES_AT_ONCE):
        chunk = texts[start : start + _QUERIES_AT_ONCE]
        hits += system(chunk, _DEPTH + 1)
        advance(len(chunk))
    return hits


def _result(sets: Sequence[TestSet], hits: dict[str, list[list[Hit]]]) -> Result:
    scored = {test.name: score(test, hits[test.name]) for test in sets}
    return Result({name: own[0] for name, own in scored.items()}, {name: own[1] for name, own in scored.items()})


def _router_report(retriever: Retriever, sets: Sequence[TestSet], searched: dict[str, Searched]) -> dict[str, Any]:
    """Accuracy over the queries whose domain has an expert, every domain weighing the same; abstained over all."""
    right, abstained = [], []
    for test in sets:
        routes = searched[test.name].routes or retriever.route([*test.judged.queries.values()])
        abstained.append(np.mean([route.abstained for route in routes]))
        if test.name in retriever.model.experts:
            best = [max(route.probabilities, key=route.probabilities.get) for route in routes]
            right.append(np.mean([name == test.name for name in best]))
    return {"accuracy": float(np.mean(right)) if right else None, "abstained": float(np.mean(abstained))}


def _cost(retriever: Retriever, searched: dict[str, Searched]) -> dict[str, float]:
    """Indexes, and share of all documents, within reach of a query; mean over domains."""
    total = sum(retriever.sizes.values())
    per_domain = [
        (
            np.mean([len(own) for own in found.indexes]),
            np.mean([sum(retriever.sizes[name] for name in own) / total for own in found.indexes]),
        )
        for found in searched.values()
    ]
    indexes, share = np.mean(per_domain, axis=0)
    return {
        "indexes": float(indexes),
        "indexes_total": len(retriever.sizes),
        "documents": float(share) * total,
        "documents_share": float(share),
    }


def _one_run(sets: Sequence[TestSet], runs: dict[str, dict[str, dict[str, float]]]) -> dict[str, dict[str, float]]:
    """All domains' runs as one; with several domains every id gets its domain in front, since ids may meet."""
    if len(sets) == 1:
        return runs[sets[0].name]
    return {
        f"{test.name}/{query}": {
            f"{test.name}/{id}" if id in test.documents else id: score for id, score in hits.items()
        }
        for test in sets
        for query, hits in runs[test.name].items()
    }
