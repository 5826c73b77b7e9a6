"""Ten domains and three foreign corpora in one index: routed search against every single-model alternative.

Command:  python -m experiments.pooled_domains --data DATA [--out runs/pooled_domains] [--seeds 3] [--small | --quick]
          DATA holds the BEIR folders named below. Needs `pip install .[experiments]` (matplotlib). --small takes excerpts of
          them and writes a section of its own; other experiments can take what it leaves: `--data OUT/small/data --pooled
          OUT/small`. --quick takes smaller excerpts of three domains, short trainings and one seed, and prints its report only.
Time:     about two hours a seed with one rival on 2 cores with bfloat16 products. Cut off, the same command goes on. What
          a seed of the whole scored is kept in experiments/pooled_results; delete it to run that seed again.
Expected: these are the aims; BENCHMARKS.md says which hold. Over the ten domains routed gains at least 12 points of nDCG@10 on the
          base and 1 on one multi-task delta of the same size and number of steps, loses at most 0.7 to the known-domain
          oracle, and loses at most 0.3 on any domain and 0.5 on foreign corpora to the base. Writes its section into
          BENCHMARKS.md, and, whole, the README's table and the picture.
"""

import dataclasses
import gzip
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import tyro

import moeret
from experiments.blended_rival import blended_system
from experiments.folders import excerpt, named_apart
from experiments.multi_task import train_multi_task
from experiments.pilots import pilot_system
from experiments.pooled_report import draw, report, summary
from moeret import artifact
from moeret.config import TrainConfig, to_json
from moeret.data.beir import Domain, read_domain, sample, seen_queries, write_domain
from moeret.evaluation.baselines import System, bm25_system, exact_system, fused_system
from moeret.evaluation.benchmark import cost, router_report, search_route, search_system
from moeret.evaluation.testsets import TestSet, read_test_sets, score
from moeret.metrics import NDCG, RECALL
from moeret.models.model import VECTORS, WORK
from moeret.progress import progress_bar
from moeret.retrieval.search import Rankings
from moeret.training.prepare import read_domains
from moeret.types import SHARED_EXPERT
from scripts.benchmarks import COMMIT, FILE, fast_precision, write_block, write_section

TRAINED = (
    "scifact", "nfcorpus", "medquad", "obliqa", "fin10k", "attack-cti", "esco-jobs", "nl2bash", "conala", "checkthat20",
)  # fmt: skip
FOREIGN = ("cranfield", "cisi", "cacm")
QUICK, QUICK_FOREIGN = ("attack-cti", "esco-jobs", "nl2bash"), ("cacm",)
"""Short queries, of which few teach much."""
EXCERPTS = {
    "quick": ({"train": 300, "dev": 30, "test": 20}, 50),
    "small": ({"train": 800, "dev": 150, "test": 200}, 400),
}
"""Queries of each split at most, and documents beside those that are relevant to them."""
RIVALS = ((None, 6e-4), (64, 2e-3), (None, 1e-3))
"""(rank, learning rate) that the multi-task rival may choose from, on dev; None is as large as all of ours together. The
other seeds take the first's choice. The larger the rank, the further a delta moves at the same rate: rank 224 diverges at 2e-3."""
MINIMA, LIMITS = (0.3, 0.03), (-1.0, -0.5, 0.5)
"""Least probabilities of an expert to be used, and other limits of strangeness than dev's, for the curve against cost."""
RESULTS = Path(__file__).parent / "pooled_results"
"""Where a whole seed's scores are kept, in the repository: the report is made of these."""
VOTES = 100
"""Training queries a domain that vote for RouterRetriever's pilots."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Arguments:
    """The pooled benchmark, whole."""

    data: Path
    """Folder of the BEIR folders."""
    out: Path = Path("runs/pooled_domains")
    """Where models, indexes and scores go."""
    seeds: int = 3
    """How many trainings of everything."""
    precision: moeret.config.Precision = field(default_factory=fast_precision)
    """Of all trainings' products."""
    queries: int | None = None
    """Test queries a domain at most (a fixed pseudo-random choice); all unless given."""
    rivals: int = len(RIVALS)
    """How many multi-task rivals are tried; each takes about as long as our whole training."""
    small: bool = False
    """Excerpts of the domains; for comparisons in less time."""
    quick: bool = False
    """Smaller excerpts of three domains, short trainings, one seed; to see that it works."""


def main() -> None:
    """Runs the experiment; what is finished is not repeated."""
    arguments = tyro.cli(Arguments)
    names, foreign = (QUICK, QUICK_FOREIGN) if arguments.quick else (TRAINED, FOREIGN)
    ours = TrainConfig(precision=arguments.precision)
    if arguments.quick:
        shape = dataclasses.replace(ours.expert, shared_rank=64)
        ours = dataclasses.replace(
            ours, steps=8, shared_steps=16, batch_size=16, evaluate_every=8, shared_learning_rate=2e-3, expert=shape
        )
    scale = "quick" if arguments.quick else "small" if arguments.small else None
    out = arguments.out / scale if scale else arguments.out
    trained = {name: arguments.data / name for name in names}
    if scale:
        read = [read_domain(name, path, ("train", "test"), ("dev",)) for name, path in trained.items()]
        trained = {own.name: write_domain(excerpt(own, out / "data" / own.name, *EXCERPTS[scale])) for own in read}
    strangers = {}
    for name in foreign:
        domain = read_domain(name, arguments.data / name, ("test",))
        if scale:
            domain = excerpt(domain, domain.path, *EXCERPTS[scale])
        strangers[name] = write_domain(named_apart(domain, out / "foreign" / name))
    scores, tried = [], (RIVALS[1:2] if arguments.quick else RIVALS)[: arguments.rivals]
    for seed in range(1 if arguments.quick else arguments.seeds):
        place, own = out / f"seed-{seed}", dataclasses.replace(ours, seed=seed)
        asked = asked_of(own, arguments.queries, tried, trained | strangers)
        if not scale and (earlier := kept_scores(seed, asked)):
            found, tried = earlier
        else:
            share_vectors(out / "seed-0", place)
            found, tried = run_seed(place, trained, strangers, own, tried, queries=arguments.queries, first=seed == 0)
            if not scale:
                keep_scores(seed, asked, found, tried)
        scores.append(found)
    body = report(scores, names, foreign, dataclasses.asdict(ours))
    print(body)
    if arguments.quick:
        print("\nThis was an excerpt. The bounds are those of the whole benchmark.")
    elif arguments.small:
        write_section("pooled-domains-small", "The same on excerpts, with the bounds of the whole", body)
    else:
        write_section("pooled-domains", "Ten domains and three foreign corpora in one index", body)
        write_block(FILE.with_name("README.md"), "results", summary(scores, names))
        draw(FILE.parent / "docs" / "pooled-domains.svg", scores, names)


def asked_of(
    config: TrainConfig, queries: int | None, tried: Sequence[tuple[int | None, float]], folders: dict[str, Path]
) -> dict[str, Any]:
    """What a seed's scores depend on, but for the code."""
    corpora = {name: artifact.sha256_of(folder / "corpus.jsonl") for name, folder in folders.items()}
    return {**to_json(config), "queries": queries, "rivals": [list(rival) for rival in tried], "corpora": corpora}


def kept_scores(seed: int, asked: dict[str, Any]) -> tuple[dict[str, Any], Sequence[tuple[int | None, float]]] | None:
    """What a seed of the whole benchmark scored, and its best rival, if that was kept for the same settings."""
    file = RESULTS / f"seed-{seed}.json.gz"
    kept = json.loads(gzip.decompress(file.read_bytes())) if file.is_file() else {}
    if kept.get("asked") != asked:
        return None
    return kept["scores"], [tuple(rival) for rival in kept["rivals"]]


def keep_scores(
    seed: int, asked: dict[str, Any], scores: dict[str, Any], rivals: Sequence[tuple[int | None, float]]
) -> None:
    """Keeps every query's scores beside this file: a seed takes hours, and another machine may run the next one."""
    RESULTS.mkdir(exist_ok=True)
    raw = json.dumps({"asked": asked, "scores": scores, "rivals": [list(rival) for rival in rivals]}).encode()
    artifact.write_atomically(RESULTS / f"seed-{seed}.json.gz", gzip.compress(raw, mtime=0))


def share_vectors(first: Path, place: Path) -> None:
    """Lets a seed read and keep its base vectors, which are the same for all, where the first one keeps them."""
    kept, vectors = (seed / "model" / WORK / VECTORS for seed in (first, place))
    kept.mkdir(parents=True, exist_ok=True)
    if not vectors.exists():
        vectors.parent.mkdir(parents=True, exist_ok=True)
        vectors.symlink_to(kept.resolve())


def run_seed(
    place: Path,
    trained: dict[str, Path],
    foreign: dict[str, Path],
    ours: TrainConfig,
    tried: Sequence[tuple[int | None, float]],
    *,
    queries: int | None,
    first: bool,
) -> tuple[dict[str, Any], Sequence[tuple[int | None, float]]]:
    """Trains, indexes and scores everything of one seed; returns its scores and the best of the rivals tried."""
    seconds = {}

    def timed(name: str, make: Callable[[], Any]) -> Any:
        started = time.monotonic()
        made = make()
        seconds[name] = round(time.monotonic() - started)
        return made

    first_commit = place / "commit"
    if not first_commit.is_file():
        place.mkdir(parents=True, exist_ok=True)
        artifact.write_atomically(first_commit, COMMIT.encode())
    model = timed("train", lambda: moeret.train(trained, place / "model", config=ours, show_progress_bar=True))
    rivals = timed("train multi-task", lambda: train_multi_task(trained, place / "model", ours, tried)) if tried else []
    corpora = [path / "corpus.jsonl" for path in foreign.values()]
    index = place / "index"
    timed("index", lambda: moeret.build_index(place / "model", index, trained, corpora, show_progress_bar=True))
    retriever = moeret.Retriever.load(index)

    suffix = "" if queries is None else f"-{queries}-queries"

    def kept(file: Path, of: list[Any], make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        old = json.loads(file.read_text()) if file.is_file() else {}
        if old.get("of") == of:
            return old
        scored = {"of": of, "commit": COMMIT, **timed("evaluate", make), "seconds": seconds}
        artifact.write_atomically(file, json.dumps(scored).encode())
        return scored

    made_of = [retriever.index.fingerprint, list(MINIMA), list(LIMITS), VOTES]
    scores = kept(
        place / f"scores{suffix}.json",
        made_of,
        lambda: evaluate(retriever, trained, foreign, queries, first=first),
    )
    scores |= {"experts": model.meta["experts"], "trained_at": first_commit.read_text(), "votes": VOTES}
    if not rivals:
        return scores, []
    best = max(rivals, key=lambda rival: rival.dev)
    own = kept(
        place / f"scores-{best.name}{suffix}.json",
        [*made_of, best.made_of],
        lambda: evaluate_rival(retriever, best.encode, trained, foreign, queries, ours.dev_queries),
    )
    scores["systems"] |= own["systems"]
    looks = {rival.name: rival.dev for rival in rivals}
    scores["multi-task"] = {"taken": best.name, "dev": looks, "steps": best.steps, "blend": own["blend"]}
    return scores, [tried[rivals.index(best)]]


def evaluate_rival(
    retriever: moeret.Retriever,
    encode: Callable[[Sequence[str]], np.ndarray],
    trained: dict[str, Path],
    foreign: dict[str, Path],
    most: int | None,
    most_dev: int,
) -> dict[str, Any]:
    """Scores one delta for all domains, compared exactly with the whole pool: by its cosine alone, and with one blend."""
    tests = _tests(retriever, {**trained, **foreign}, most)
    domains = read_domains(trained)
    dev = dev_sets(retriever, domains, most_dev)
    blended, blend = blended_system(retriever, domains, dev, encode)
    systems = {}
    for label, system in (("multi-task", exact_system(retriever, encode)), ("multi-task, blended", blended)):
        ranked = {test.name: search_system(system, test, lambda count: None) for test in tests}
        systems[label] = {"values": _values(score(tests, ranked).values)}
    return {"systems": systems, "blend": blend._asdict()}


def _tests(retriever: moeret.Retriever, domains: dict[str, Path], most: int | None) -> list[TestSet]:
    tests = read_test_sets(retriever, domains, "test")
    return [dataclasses.replace(test, judged=sample(test.judged, most)) for test in tests] if most else tests


def dev_sets(retriever: moeret.Retriever, domains: Sequence[Domain], most: int) -> list[TestSet]:
    """Dev queries of each domain, by which everything was chosen, at most so many."""
    held = retriever.held()
    return [
        TestSet.of(own.name, sample(own.splits["dev"], most), {each.id: each for each in own.corpus}, held)
        for own in domains
    ]


def _encoder(model: moeret.Model, expert: str | None) -> Callable:
    return lambda texts: model.encode_query(texts, expert=expert, normalize_embeddings=True)


def _values(found: dict[str, dict[str, dict[str, float]]]) -> dict[str, dict[str, list[float]]]:
    """Domain -> measure -> each query's value, rounded for the file."""
    return {
        name: {measure: [round(value, 4) for value in own[measure].values()] for measure in (NDCG, RECALL)}
        for name, own in found.items()
    }


def evaluate(
    retriever: moeret.Retriever, trained: dict[str, Path], foreign: dict[str, Path], most: int | None, *, first: bool
) -> dict[str, Any]:
    """Scores every system on the test queries of all domains; what no seed changes, and the curve, for the first only."""
    model = retriever.model
    tests = _tests(retriever, {**trained, **foreign}, most)
    home = [test for test in tests if test.name in trained]
    train_splits = {domain.name: domain.splits["train"] for domain in read_domains(trained)}
    queries = sum(len(test.judged.queries) for test in tests)
    systems: dict[str, Any] = {}
    with progress_bar("Evaluating", queries, shown=True, unit="queries") as bar:

        def run(label: str, ranked: dict[str, list], sets: list[TestSet] = tests, **more: Any) -> None:
            systems[label] = {"values": _values(score(sets, ranked).values), **more}

        def route(label: str, mode: str, sets: list[TestSet] = tests) -> dict[str, Rankings]:
            found = {
                test.name: search_route(retriever, test, test.name if mode == "oracle" else mode, bar) for test in sets
            }
            run(
                label, {name: own.ranked for name, own in found.items()}, sets, cost=cost(retriever, _only(found, home))
            )
            return found

        def system(label: str, search: System, sets: list[TestSet] = tests) -> None:
            run(label, {test.name: search_system(search, test, bar) for test in sets}, sets)

        found = route("routed", "auto")
        routing = router_report(retriever, home, _only(found, home))
        abstained = {name: float(np.mean([own.abstained for own in part.routes])) for name, part in found.items()}
        route("known-domain oracle", "oracle", home)
        system("shared delta alone", exact_system(retriever, _encoder(model, SHARED_EXPERT)))
        retriever.blends, blends = {}, retriever.blends
        route("routed, cosine alone", "auto", home)
        route("oracle, cosine alone", "oracle", home)
        retriever.blends = blends
        if first:
            route("routed, all indexes", "all", home)
            bm25, base = bm25_system(retriever), exact_system(retriever, _encoder(model, None))
            system("BM25", bm25)
            system("base", base)
            system("base + BM25", fused_system(retriever, (base, bm25)))
            votes = [dataclasses.replace(test, judged=sample(train_splits[test.name], VOTES)) for test in home]
            system("RouterRetriever's pilots", pilot_system(retriever, votes), home)
            chosen = model.query_router
            for minimum in MINIMA:
                model.query_router = dataclasses.replace(chosen, minimum=minimum, slots=4)
                route(f"minimum {minimum:g}", "auto", home)
            model.query_router = dataclasses.replace(chosen, slots=1)
            route("one expert", "auto", home)
            model.query_router, usual = chosen, retriever.strange_limit
            for other in LIMITS:
                retriever.strange_limit = usual + other
                route(f"limit {other:+g}", "auto", home)
            retriever.strange_limit = usual
            each = [systems[label]["values"] for label in ("base", "known-domain oracle")]
            for expert in model.experts:
                system(expert, exact_system(retriever, _encoder(model, expert)), home)
                each.append(systems.pop(expert)["values"])
            systems["best-expert-per-query oracle"] = {
                "values": {test.name: _best_of([own[test.name] for own in each]) for test in home}
            }
    return {
        "systems": systems,
        "router": routing,
        "abstained": abstained,
        "seen": {test.name: seen_queries(test.judged, train_splits[test.name]).tolist() for test in home},
        "documents": retriever.index.meta["documents"]["count"],
    }


def _only(found: dict[str, Rankings], sets: list[TestSet]) -> dict[str, Rankings]:
    return {test.name: found[test.name] for test in sets}


def _best_of(systems: Sequence[dict[str, list[float]]]) -> dict[str, list[float]]:
    """Both measures of each query by the system with its best nDCG@10."""
    best = np.argmax([own[NDCG] for own in systems], axis=0)
    return {
        measure: np.array([own[measure] for own in systems])[best, np.arange(len(best))].tolist()
        for measure in (NDCG, RECALL)
    }


if __name__ == "__main__":
    main()
