"""The pooled benchmark: one index holds all domains, queries say nothing of theirs, and every domain is reported."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from moeret import metrics
from moeret.config import RouteMode, require
from moeret.data.beir import read_domain
from moeret.evaluation.baselines import System, base_system, bm25_system
from moeret.evaluation.testsets import DEPTH, Ranked, Result, TestSet, one_run, read_test_sets, score
from moeret.metrics import NDCG
from moeret.progress import Advance, progress_bar
from moeret.retrieval.search import Rankings, Retriever

_QUERIES_AT_ONCE = 512


def evaluate(
    retriever: Retriever,
    domains: Mapping[str, str | Path],
    *,
    split: str = "test",
    route: RouteMode = "auto",
    baselines: bool = False,
    run_file: str | Path | None = None,
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
    if run_file is not None:
        run_file = Path(run_file)
        require(run_file.parent.is_dir(), f"cannot write the run {run_file}: there is no directory {run_file.parent}")
        require(not run_file.is_dir(), f"cannot write the run {run_file}: it is a directory; name a file in it")
    sets = read_test_sets(retriever, domains, split)
    # The oracle needs the whole domain in its own expert's index, not where a router placed some of it.
    no_expert = [test.name for test in sets if not _in_own_index(retriever, test)]
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
            searched[mode] = {
                test.name: search_route(retriever, test, test.name if mode == "oracle" else mode, bar) for test in sets
            }
            results[mode] = score(sets, {name: own.ranked for name, own in searched[mode].items()})
        if baselines:
            for name, make in (("bm25", bm25_system), ("base_one_index", base_system)):
                system = make(retriever)
                results[name] = score(sets, {test.name: search_system(system, test, bar) for test in sets})
    report = {
        "split": split,
        "route": route,
        "domains": results[route].table(),
        "mean": results[route].mean(),
        "router": router_report(retriever, sets, searched.get("auto") or searched[route]),
        "cost": cost(retriever, searched[route]),
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
        metrics.write_run(run_file, one_run(sets, results[route].runs))
    return report


def _in_own_index(retriever: Retriever, test: TestSet) -> bool:
    """Whether every document of the domain is in the index of the domain's own expert."""
    names = [*retriever.sizes]
    if test.name not in names:
        return False
    start = sum(retriever.sizes[name] for name in names[: names.index(test.name)])
    return test.documents.keys() <= {*test.names[start : start + retriever.sizes[test.name]]}


def score_run(run_file: str | Path, domains: Mapping[str, str | Path], *, split: str = "test") -> dict[str, Any]:
    """Scores a TREC run, of any system, on one split of each domain: `domains` and `mean` as in `evaluate`.

    Ids are as `evaluate` writes them: plain for one domain, with the domain's name and a slash in front for several.

    Raises:
      DataError: a run or a domain that cannot be read.
    """
    require(bool(domains), "there is no domain to evaluate; give at least one NAME=BEIR_DIR")
    run = metrics.read_run(Path(run_file))
    runs, values = {}, {}
    for name, path in domains.items():
        qrels = read_domain(name, Path(path), (split,)).splits[split].qrels
        prefix = f"{name}/" if len(domains) > 1 else ""
        runs[name] = {
            query: {id.removeprefix(prefix): score for id, score in hits.items()}
            for query in qrels
            if (hits := run.get(prefix + query))
        }
        values[name] = metrics.per_query(qrels, runs[name])
    result = Result(values, runs)
    return {"split": split, "domains": result.table(), "mean": result.mean()}


def search_route(retriever: Retriever, test: TestSet, route: str, advance: Advance) -> Rankings:
    """Searches a test set's queries by one route of the retriever."""
    texts = [*test.judged.queries.values()]
    parts = []
    for start in range(0, len(texts), _QUERIES_AT_ONCE):
        parts.append(retriever.rank(texts[start : start + _QUERIES_AT_ONCE], DEPTH + 1, route=route))
        advance(len(parts[-1].ranked))
    ranked, indexes, routes = (
        [one for part in parts for one in getattr(part, field)] for field in ("ranked", "indexes", "routes")
    )
    return Rankings(parts[0].snapshot, ranked, indexes, routes)


def search_system(system: System, test: TestSet, advance: Advance) -> list[Ranked]:
    """Searches a test set's queries by any system."""
    texts = [*test.judged.queries.values()]
    ranked: list[Ranked] = []
    for start in range(0, len(texts), _QUERIES_AT_ONCE):
        chunk = texts[start : start + _QUERIES_AT_ONCE]
        ranked += system(chunk, DEPTH + 1)
        advance(len(chunk))
    return ranked


def router_report(retriever: Retriever, sets: Sequence[TestSet], searched: dict[str, Rankings]) -> dict[str, Any]:
    """Accuracy over the queries whose domain has an expert, every domain weighing the same; abstained over all."""
    right, abstained = [], []
    for test in sets:
        routes = searched[test.name].routes or retriever.route([*test.judged.queries.values()])
        abstained.append(np.mean([route.abstained for route in routes]))
        if test.name in retriever.model.experts:
            best = [max(route.probabilities, key=route.probabilities.get) for route in routes]
            right.append(np.mean([name == test.name for name in best]))
    return {"accuracy": float(np.mean(right)) if right else None, "abstained": float(np.mean(abstained))}


def cost(retriever: Retriever, searched: dict[str, Rankings]) -> dict[str, float]:
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
