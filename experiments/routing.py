"""Routers compared, and ways to use the experts that a router names.

Command:  python -m experiments.routing --data DATA [--pooled runs/pooled_domains]
          DATA and --pooled as experiments.pooled_domains leaves them; the first seed's model and index are used.
Time:     about 15 minutes on 2 cores.
Expected: a learned router on the trunk is right more often than one on the base's embedding, which is right more often than
          nearest centroids; merging deltas by probability beats one expert, and beats several experts' lists fused; with the
          index's evidence fewer indexes are searched at the same quality. Writes its section into BENCHMARKS.md.
"""

import dataclasses
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro
from jaxtyping import Float

import moeret
from experiments.pilots import pilots_of, similarities
from experiments.pooled_domains import TRAINED, VOTES
from moeret.data.beir import sample
from moeret.evaluation.benchmark import router_report, search_route
from moeret.evaluation.testsets import DEPTH, Ranked, TestSet, read_test_sets, score
from moeret.metrics import NDCG
from moeret.models import experts
from moeret.models.embed import Embedder
from moeret.models.router import Router, centroid_router
from moeret.retrieval import evidence
from moeret.retrieval.fusion import Fusion, Ranking, fuse
from moeret.training.prepare import read_domains
from moeret.training.routing import calibrate, fit_learned, quality
from scripts.benchmarks import markdown_table, write_section

TRAIN_QUERIES, DEV_QUERIES, TEST_QUERIES = 1000, 300, 500
ABSTAIN = (0.0, 0.5, 0.7, 0.9)
"""Least best probabilities, for the abstention curve."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Arguments:
    """Compares routers and ways to use experts."""

    data: Path
    """Folder of the BEIR folders."""
    pooled: Path = Path("runs/pooled_domains")
    """Where experiments.pooled_domains left its first seed."""


def main() -> None:
    """Runs the experiment and writes its section."""
    arguments = tyro.cli(Arguments)
    retriever = moeret.Retriever.load(arguments.pooled / "seed-0" / "index")
    domains = {name: arguments.data / name for name in retriever.model.experts}
    read = read_domains(domains)
    splits = {
        "train": [sample(domain.splits["train"], TRAIN_QUERIES) for domain in read],
        "dev": [sample(domain.splits["dev"], DEV_QUERIES) for domain in read],
    }
    tests = read_test_sets(retriever, domains, "test")
    dev = [dataclasses.replace(test, judged=own) for test, own in zip(tests, splits["dev"], strict=True)]
    splits["test"] = [sample(test.judged, TEST_QUERIES) for test in tests]
    texts = {name: [[*own.queries.values()] for own in judged] for name, judged in splits.items()}
    votes = [
        dataclasses.replace(test, judged=sample(own, VOTES)) for test, own in zip(tests, splits["train"], strict=True)
    ]
    body = "\n\n".join([_routers(retriever, texts, votes), _uses(retriever, dev)])
    print(body)
    if domains.keys() == set(TRAINED):
        write_section("routing", "Routing", body)


def _routers(retriever: moeret.Retriever, texts: dict[str, list[list[str]]], votes: list[TestSet]) -> str:
    """Routers by what they read: quality on dev and on test, and time."""
    base = retriever.model.base
    rows, curves = [], []

    def add(label: str, router: Router, read: dict[str, list[Float[np.ndarray, "_ D"]]]) -> None:
        router = calibrate(router, read["dev"])
        found = {split: quality(router, read[split]) for split in ("dev", "test")}
        together = np.concatenate(read["test"])
        cells = [f"{found[split][key]:.4f}" for split in found for key in ("accuracy", "calibration_error")]
        rows.append([label, *cells, f"{_microseconds(lambda: router.choose(together)) / len(together):.1f}"])
        curves.append([label, *_abstention(router, read["test"])])

    for depth in range(1, base.config.layers):
        shape = dataclasses.replace(moeret.ExpertConfig(), layers=base.config.layers - depth)
        embedder = Embedder(base, experts.base_alone(base.config, shape))
        read = {split: [embedder.readings(own, reads="trunk") for own in domains] for split, domains in texts.items()}
        add(f"learned, mean and deviation of tokens after {depth} layers", fit_learned(read["train"], "trunk"), read)
        if shape.layers == moeret.ExpertConfig().layers:
            means = {split: [own[:, : base.config.width] for own in domains] for split, domains in read.items()}
            add(f"learned, mean of tokens after {depth} layers", fit_learned(means["train"], "trunk"), means)
    read = {split: [embedder.readings(own, reads="base") for own in domains] for split, domains in texts.items()}
    add("learned, base embedding", fit_learned(read["train"], "base"), read)
    add("nearest centroids, base embedding", centroid_router(read["train"]), read)

    pilots = pilots_of(retriever, votes)
    names, accuracy = [None, *retriever.model.experts], []
    for split in ("dev", "test"):
        right = [
            np.mean([names[n] == name for n in similarities(own, pilots)[0]])
            for name, own in zip(retriever.model.experts, read[split], strict=True)
        ]
        accuracy.append(f"{np.mean(right):.4f}")
    together = np.concatenate(read["test"])
    spent = _microseconds(lambda: similarities(together, pilots)) / len(together)
    rows.append(["RouterRetriever's pilots, base embedding", accuracy[0], "", accuracy[1], "", f"{spent:.1f}"])
    columns = ["router", "dev accuracy", "dev ECE", "test accuracy", "test ECE", "µs a query, after reading"]
    return (
        f"Share of queries whose most probable expert is their domain's, and expected calibration error (15 bins), domains "
        f"weighing the same; fitted on at most {TRAIN_QUERIES} train queries a domain, calibrated on dev; "
        f"pilots by the votes of {VOTES} a domain:\n\n"
        + markdown_table(columns, rows)
        + "\n\nAbstention on test: share answered / share of them that go to the right expert, by the least best probability:\n\n"
        + markdown_table(["router", *(f"{threshold:g}" for threshold in ABSTAIN)], curves)
    )


def _abstention(router: Router, read: Sequence[Float[np.ndarray, "_ D"]]) -> list[str]:
    cells = []
    for threshold in ABSTAIN:
        answered, right = [], []
        for number, own in enumerate(read):
            probabilities = router.probabilities(own)
            kept = probabilities.max(axis=1) >= threshold
            answered.append(kept.mean())
            right.append((probabilities.argmax(axis=1)[kept] == number).mean())
        cells.append(f"{np.mean(answered):.1%} / {np.mean(right):.1%}")
    return cells


def _microseconds(run: Callable[[], object], repeats: int = 7) -> float:
    """The median time of several runs."""
    spent = []
    for _ in range(repeats):
        started = time.perf_counter()
        run()
        spent.append(time.perf_counter() - started)
    return 1e6 * float(np.median(spent))


def _uses(retriever: moeret.Retriever, dev: list[TestSet]) -> str:
    """Ways to use the experts that one router names, on dev."""
    model = retriever.model
    chosen, likelihood = model.query_router, evidence.LIKELIHOOD
    settings = {
        "one expert": (dataclasses.replace(chosen, slots=1), "auto", likelihood),
        "soft merge, experts with p >= 0.3": (dataclasses.replace(chosen, minimum=0.3), "auto", likelihood),
        "soft merge, experts with p >= 0.1": (dataclasses.replace(chosen, minimum=0.1), "auto", likelihood),
        "soft merge, experts with p >= 0.03": (dataclasses.replace(chosen, minimum=0.03), "auto", likelihood),
        "soft merge, every index": (chosen, "all", likelihood),
        "as dev chose, without the index's evidence": (chosen, "auto", 0.0),
        "as dev chose": (chosen, "auto", likelihood),
    }
    rows = []
    sketches, usual = retriever.sketches, retriever.strange_limit
    for label, (router, route, weight) in settings.items():
        # The limit is the default router's, as the index has it; without evidence strangeness is another, and so is its limit.
        model.query_router, evidence.LIKELIHOOD = chosen, weight
        retriever.strange_limit = usual if weight else evidence.Evidence(model.experts, sketches).limit(model)
        model.query_router = router
        found = {test.name: search_route(retriever, test, route, lambda count: None) for test in dev}
        indexes = np.mean([np.mean([len(own) for own in part.indexes]) for part in found.values()])
        right = f"{router_report(retriever, dev, found)['accuracy']:.1%}"
        rows.append(_row(label, dev, {name: own.ranked for name, own in found.items()}, indexes, right))
    model.query_router, retriever.strange_limit = chosen, usual
    two = dataclasses.replace(chosen, familiarity=None, slots=2, minimum=0.03)
    for fusion in ("score", "rrf"):
        ranked, indexes = _each_its_own(retriever, dev, two, fusion)
        rows.append(
            _row(f"each expert with p >= 0.03 its own vector, two at most, fused by {fusion}", dev, ranked, indexes, "")
        )
    found = {test.name: search_route(retriever, test, test.name, lambda count: None) for test in dev}
    rows.append(_row("known-domain oracle", dev, {name: own.ranked for name, own in found.items()}, 1.0, ""))
    return (
        f"Ways to use the experts, {NDCG} x 100 on dev (mean over domains), {sum(retriever.sizes.values()):,} documents in one "
        "index (the base's own, which strange queries search, counts among the indexes; right expert: the most probable one is "
        "the domain's):\n\n" + markdown_table(["use", NDCG, "indexes a query", "right expert"], rows)
    )


def _row(label: str, sets: list[TestSet], ranked: dict[str, list[Ranked]], indexes: float, right: str) -> list[str]:
    return [label, f"{100 * score(sets, ranked).mean()[NDCG]:.2f}", f"{indexes:.2f}", right]


def _each_its_own(
    retriever: moeret.Retriever, sets: list[TestSet], router: Router, fusion: Fusion
) -> tuple[dict[str, list[Ranked]], float]:
    """Every chosen expert searches its own index with its own vector; the lists are fused."""
    model = retriever.model
    out, indexes = {}, []
    for test in sets:
        texts = [*test.judged.queries.values()]
        choice = router.choose(model.embedder.readings(model.with_prompt(texts, "query"), reads=router.reads))
        lists: list[list[Ranking]] = [[] for _ in texts]
        for number, name in enumerate(model.experts, start=1):
            mine = np.argwhere((choice.experts == number) & (choice.weights > 0))
            if len(mine):
                found = retriever.rank([texts[row] for row, _ in mine], DEPTH + 1, route=name).ranked
                for (row, slot), (rows, scores) in zip(mine, found, strict=True):
                    lists[row].append(Ranking(rows, scores, rows, weight=float(choice.weights[row, slot])))
        out[test.name] = [fuse(own, fusion, DEPTH + 1) for own in lists]
        indexes.append(np.mean([len(own) for own in lists]))
    return out, float(np.mean(indexes))


if __name__ == "__main__":
    main()
