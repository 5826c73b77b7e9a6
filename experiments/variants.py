"""Candidates of the recipe in the whole system: what a change is worth to routed search, with words and memory beside cosines.

Command:  python -m experiments.variants --data DATA [--pooled runs/pooled_domains] [--seeds 1] [--out runs/variants]
          DATA and --pooled as experiments.pooled_domains leaves them.
Time:     about half an hour a variant and seed on 2 cores, on the excerpts that experiments.pooled_domains makes with --small;
          what is finished is not repeated.
Expected: no variant is ahead of the default by more than noise. Writes its section into BENCHMARKS.md.
"""

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tyro

import moeret
from experiments.pooled_domains import FOREIGN, TRAINED, dev_sets, share_vectors
from moeret import artifact
from moeret.config import TrainConfig
from moeret.data.beir import seen_queries
from moeret.evaluation.benchmark import search_route
from moeret.evaluation.testsets import score
from moeret.metrics import NDCG
from moeret.progress import progress_bar
from moeret.training.prepare import read_domains
from scripts.benchmarks import fast_precision, markdown_table, write_section

AS_IT_IS = "as it is"
VARIANTS: dict[str, dict[str, Any]] = {
    AS_IT_IS: {},
    "no shared delta": {"shared_rank": 0},
    "rank 64": {"rank": 64},
}
"""What is changed of the experts' shape."""
LEAST = 10
"""Queries of a domain that a mean over seen or unseen ones takes at least."""

KEYS = ("routed", "routed, seen", "routed, unseen", "known-domain oracle")


@dataclass(frozen=True, slots=True, kw_only=True)
class Arguments:
    """Trains, indexes and evaluates every variant."""

    data: Path
    """Folder of the BEIR folders."""
    pooled: Path = Path("runs/pooled_domains")
    """Where experiments.pooled_domains left its seeds and the foreign corpora."""
    seeds: int = 1
    """How many seeds of each variant, the first ones."""
    variants: int = len(VARIANTS)
    """How many of the variants, the first ones."""
    out: Path = Path("runs/variants")
    """Where models, indexes and scores go."""


def main() -> None:
    """Runs the experiment and writes its section; what is finished is not repeated."""
    arguments = tyro.cli(Arguments)
    trained = {name: arguments.data / name for name in TRAINED}
    rows = []
    for variant in [*VARIANTS][: arguments.variants]:
        for seed in range(arguments.seeds):
            found = _scores(variant, seed, trained, arguments)
            rows.append([variant, str(seed), *(f"{100 * found[key]:.2f}" for key in KEYS)])
    body = (
        f"{NDCG} x 100 on at most {TrainConfig().dev_queries} dev queries of each of {len(trained)} domains, by which strengths, "
        "blends and routers were chosen, over one index with the foreign corpora; mean of the domains, seen and unseen of those "
        f"with at least {LEAST} such queries:\n\n" + markdown_table(["variant", "seed", *KEYS], rows)
    )
    print(body)
    write_section("variants", "Candidates of the recipe in the whole system", body)


def _scores(variant: str, seed: int, trained: dict[str, Path], arguments: Arguments) -> dict[str, float]:
    """Mean dev nDCG@10 of one variant and seed."""
    first = arguments.pooled / f"seed-{seed}"
    place = arguments.out / variant.replace(" ", "-") / f"seed-{seed}"
    place.mkdir(parents=True, exist_ok=True)
    index = first / "index"
    if variant != AS_IT_IS:
        config = TrainConfig(seed=seed, precision=fast_precision())
        config = dataclasses.replace(config, expert=dataclasses.replace(config.expert, **VARIANTS[variant]))
        share_vectors(arguments.pooled / "seed-0", place)
        moeret.train(trained, place / "model", config=config, show_progress_bar=True)
        corpora, index = [arguments.pooled / "foreign" / name / "corpus.jsonl" for name in FOREIGN], place / "index"
        moeret.build_index(place / "model", index, trained, corpora, show_progress_bar=True)
    retriever = moeret.Retriever.load(index)
    file = place / f"{retriever.index.fingerprint[:12]}.json"
    if not file.is_file():
        artifact.write_atomically(file, json.dumps(_evaluate(retriever, trained)).encode())
    return json.loads(file.read_text())


def _evaluate(retriever: moeret.Retriever, trained: dict[str, Path]) -> dict[str, float]:
    domains = read_domains(trained)
    tests = dev_sets(retriever, domains, TrainConfig().dev_queries)
    seen = [seen_queries(test.judged, own.splits["train"]) for test, own in zip(tests, domains, strict=True)]
    count = sum(len(test.judged.queries) for test in tests)

    def values(oracle: bool) -> list[np.ndarray]:
        with progress_bar("Evaluating", count, shown=True, unit="queries") as bar:
            found = {
                test.name: search_route(retriever, test, test.name if oracle else "auto", bar).ranked for test in tests
            }
        scored = score(tests, found).values
        return [np.array([*scored[test.name][NDCG].values()]) for test in tests]

    routed, known = values(oracle=False), values(oracle=True)

    def mean(groups: list[np.ndarray]) -> float:
        parts = [own[group] for own, group in zip(routed, groups, strict=True)]
        return float(np.mean([part.mean() for part in parts if len(part) >= LEAST]))

    return {
        "routed": float(np.mean([own.mean() for own in routed])),
        "routed, seen": mean(seen),
        "routed, unseen": mean([~own for own in seen]),
        "known-domain oracle": float(np.mean([own.mean() for own in known])),
    }


if __name__ == "__main__":
    main()
