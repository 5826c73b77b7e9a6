"""How much of an expert's delta and of the shared one to use, over all domains and seeds, and whether both beside each other pay.

Command:  python -m experiments.strengths --data DATA [--pooled runs/pooled_domains] [--seeds 3] [--out runs/strengths]
          DATA and --pooled as experiments.pooled_domains leaves them, with the folders `training` of its models.
Time:     about 6 minutes a seed on 2 cores; finished seeds are not repeated.
Expected: a part of both deltas is better than all of one or of both. Chosen on one half of the dev queries and scored on the
          other, both are ahead of either for each seed. Writes its section into BENCHMARKS.md.
"""

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tyro

import moeret
from experiments.folders import made_from
from moeret import artifact
from moeret.config import TrainConfig
from moeret.models import experts
from moeret.models.embed import Embedder
from moeret.models.model import VECTORS, WORK, read_shared
from moeret.training.learn import fit_experts
from moeret.training.prepare import prepare, read_domains
from moeret.training.strength import OWN, SHARED, Tried, Values, choose_strengths, try_strengths
from moeret.training.towers import QueryTower
from moeret.types import SHARED_EXPERT
from scripts.benchmarks import fast_precision, markdown_table, write_section

HALVINGS = 20
"""How often dev is halved at random; each half is chosen by once and scored once."""
CHOICES: dict[str, Callable[[float, float], bool]] = {
    "own alone": lambda own, shared: shared == 0,
    "shared alone": lambda own, shared: own == 0,
    "both": lambda own, shared: True,
}
"""Which pairs of strengths may be chosen."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Arguments:
    """Tries all strengths on dev."""

    data: Path
    """Folder of the BEIR folders."""
    pooled: Path = Path("runs/pooled_domains")
    """Where experiments.pooled_domains left its seeds."""
    seeds: int = 3
    """How many of them, the first ones."""
    out: Path = Path("runs/strengths")
    """Where results go."""


def main() -> None:
    """Runs the experiment and writes its section; what is finished is not repeated."""
    arguments = tyro.cli(Arguments)
    found = []
    for seed in range(arguments.seeds):
        source = arguments.pooled / f"seed-{seed}" / "model"
        place = made_from(arguments.out, source)
        file = place / "tried.json"
        if not file.is_file():
            artifact.write_atomically(file, json.dumps(_tried(source, arguments.data, place / "training")).encode())
        found.append(json.loads(file.read_text()))
    body = _body(found)
    print(body)
    write_section("strengths", "How much of each delta", body)


def _tried(source: Path, data: Path, work: Path) -> dict[str, Any]:
    """Each domain's dev nDCG@10, query by query, of the base and at every pair of strengths."""
    model = moeret.Model.load(source)
    config = TrainConfig(seed=model.published.meta["request"]["seed"], precision=fast_precision())
    embedder = Embedder(model.base, experts.base_alone(model.base.config, config.expert))
    domains = read_domains({name: data / name for name in model.experts})
    prepared = prepare(domains, embedder, config, source / WORK / VECTORS, show_progress_bar=True)
    embedder = embedder.in_precision(config.precision)
    shutil.rmtree(work, ignore_errors=True)
    # A finished training's: fitting gives the experts at their best steps and at full strength.
    shutil.copytree(source / WORK, work, ignore=shutil.ignore_patterns(VECTORS, SHARED_EXPERT))
    tower = QueryTower(prepared, embedder)
    bank = fit_experts(prepared, embedder, tower, config, work, show_progress_bar=True).bank
    every = np.ones(len(domains), bool)
    tried = try_strengths(
        bank, read_shared(model.published).delta, lambda bank, shared: tower.values(bank, every, shared)
    )
    shutil.rmtree(work)
    return {
        "domains": [*model.experts],
        "seen": [own.tolist() for own in tower.seen],
        "base": _lists(tower.base()),
        "tried": [{"own": own, "shared": shared, "values": _lists(values)} for (own, shared), values in tried.items()],
    }


def _lists(values: Values) -> list[list[float]]:
    return [own.tolist() for own in values]


def _body(found: Sequence[dict[str, Any]]) -> str:
    means = {
        (entry["own"], entry["shared"]): 100 * np.mean([_mean(own["tried"][place]["values"]) for own in found])
        for place, entry in enumerate(found[0]["tried"])
    }
    means[0.0, 0.0] = 100 * np.mean([_mean(own["base"]) for own in found])
    grid = [[f"{own:g}", *(f"{means[own, shared]:.1f}" for shared in SHARED)] for own in OWN]
    halves = [[_across_halves(own, may) for own in found] for may in CHOICES.values()]
    rows = [
        [name, *(f"{100 * np.mean(own):.2f}" for own in each), f"{100 * np.mean(each):.2f}"]
        for name, each in zip(CHOICES, halves, strict=True)
    ]
    gains = np.mean(halves[-1], axis=0) - np.mean(halves[0], axis=0)
    return "\n\n".join(
        [
            f"Dev nDCG@10 x 100 in the pool of all domains' documents, by cosine, mean over {len(found[0]['domains'])} domains and "
            f"{len(found)} seeds, all domains at the same strengths; rows: of the expert's own delta, columns: of the shared one "
            "(both 0: the base):",
            markdown_table(["own", *(f"shared {shared:g}" for shared in SHARED)], grid),
            "Strengths chosen for each domain, as training chooses them, on one half of its dev queries and scored on the other, "
            f"mean of {2 * HALVINGS} halves:",
            markdown_table(["chosen from", *(f"seed {seed}" for seed in range(len(found))), "mean"], rows),
            "Both minus own alone, by domain: "
            + ", ".join(f"{name} {100 * gain:+.1f}" for name, gain in zip(found[0]["domains"], gains, strict=True)),
        ]
    )


def _mean(values: Sequence[Sequence[float]]) -> float:
    return float(np.mean([np.mean(own) for own in values]))


def _across_halves(found: dict[str, Any], may: Callable[[float, float], bool]) -> np.ndarray:
    """Each domain's dev nDCG@10 on halves of its queries by which nothing was chosen."""
    random, scored = np.random.default_rng(0), []
    base = [np.array(own) for own in found["base"]]
    seen = [np.array(own, bool) for own in found["seen"]]
    tried: Tried = {
        (entry["own"], entry["shared"]): [np.array(own) for own in entry["values"]]
        for entry in found["tried"]
        if may(entry["own"], entry["shared"])
    }
    for _ in range(HALVINGS):
        first = [random.permutation(len(own)) < len(own) // 2 for own in base]
        for half in (first, [~own for own in first]):
            strengths = choose_strengths(
                {pair: _part(values, half) for pair, values in tried.items()}, _part(base, half), _part(seen, half)
            )
            pairs = zip(strengths.own.tolist(), strengths.shared.tolist(), strict=True)
            scored.append(
                [
                    (tried[pair] if any(pair) else base)[number][~half[number]].mean()
                    for number, pair in enumerate(pairs)
                ]
            )
    return np.mean(scored, axis=0)


def _part(values: Sequence[np.ndarray], kept: Sequence[np.ndarray]) -> list[np.ndarray]:
    return [own[rows] for own, rows in zip(values, kept, strict=True)]


if __name__ == "__main__":
    main()
