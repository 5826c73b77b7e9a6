"""What an expert learns best with: where it starts, negatives, label-free pairs, merging, dropout, ranks, layers, rates.

Command:  python -m experiments.recipe --data DATA [--pooled runs/pooled_domains] [--out runs/recipe]
          DATA and --pooled as experiments.pooled_domains leaves them; the first seed's shared delta is used.
Time:     about 5 minutes a line on 2 cores; finished lines are not repeated.
Expected: the line `as it is` or one within the noise of it has the best dev nDCG@10; no line reads test. Writes its section
          into BENCHMARKS.md.
"""

import dataclasses
import json
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import tyro

import moeret
from experiments.folders import made_from
from experiments.losses import (
    HARDEST,
    corrected_for_frequency,
    guarded_at_once,
    hardest,
    in_batch,
    step_with,
    training_with,
    unguarded,
)
from experiments.pooled_domains import TRAINED
from moeret import artifact
from moeret.config import TrainConfig, to_json
from moeret.data.beir import sample
from moeret.data.pairs import label_free_pairs
from moeret.models import experts
from moeret.models.embed import Embedder
from moeret.models.model import VECTORS, WORK, read_shared
from moeret.training import step
from moeret.training.batches import TrainingSet
from moeret.training.learn import fit_experts
from moeret.training.prepare import Prepared, prepare, read_domains
from moeret.training.strength import choose_strengths, try_strengths
from moeret.training.towers import QueryTower, by_group
from scripts.benchmarks import fast_precision, markdown_table, write_section

DOMAINS = ("obliqa", "esco-jobs", "nl2bash", "conala")
"""Few queries and many, seen documents and unseen ones."""
SEEDS = 3
Start = Literal["base", "base, alone", "shared"]
"""Experts start from the base and are merged with the shared delta, or not; or they start on top of the shared delta, at its
own best strength, and come to nothing but that where they do not gain on it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Trial:
    """A change of the recipe."""

    name: str
    config: dict[str, Any] = dataclasses.field(default_factory=dict)
    expert: dict[str, Any] = dataclasses.field(default_factory=dict)
    start: Start = "base"
    during: Callable[[Prepared], AbstractContextManager[None]] = lambda data: nullcontext()
    label_free: bool = False
    merge: Literal["alike", "by distance"] | None = None
    """Experts of SEEDS trainings as it is, merged: all weigh the same, or each matrix by how far it moved."""


def dropout(rate: float) -> AbstractContextManager[None]:
    """Training drops inputs of the deltas (LoRA's dropout, but with one choice for all rows of a batch)."""
    usual = step._branch

    def branch(static: step.Static, params, expert: experts.Bank, lengths: jax.Array, hidden: jax.Array) -> jax.Array:
        of_batch = jax.lax.bitcast_convert_type(hidden.sum(), jnp.int32)
        keys = iter(jax.random.split(jax.random.fold_in(jax.random.key(0), of_batch), 64))

        def dropped(factors: experts.Factors) -> experts.Factors:
            kept = jax.random.bernoulli(next(keys), 1 - rate, (len(factors["a"]), 1))
            return {"a": jnp.where(kept, factors["a"] / (1 - rate), 0.0), "b": factors["b"]}

        own = {layer: {name: dropped(own) for name, own in matrices.items()} for layer, matrices in expert.items()}
        return usual(static, params, own, lengths, hidden)

    return step_with("_branch", branch)


TRIALS = (
    Trial(name="as it is"),
    Trial(name="no expert, the shared delta alone", config={"steps": 0}),
    Trial(name="no shared delta", start="base, alone"),
    Trial(name="experts on top of the shared delta", start="shared"),
    Trial(
        name="experts on top of the shared delta, learning rate 5e-4", start="shared", config={"learning_rate": 5e-4}
    ),
    Trial(
        name="feed-forward blocks at full rank (mixture-of-experts layers), learning rate 5e-4",
        expert={"rank": 384, "matrices": ("mlp_in", "mlp_out")},
        config={"learning_rate": 5e-4},
        start="base, alone",
    ),
    Trial(
        name="such blocks, merged with the shared delta",
        expert={"rank": 384, "matrices": ("mlp_in", "mlp_out")},
        config={"learning_rate": 5e-4},
    ),
    Trial(name="no guard against unjudged positives", during=lambda data: training_with(unguarded)),
    Trial(name=f"experts of {SEEDS} seeds averaged", merge="alike"),
    Trial(name=f"experts of {SEEDS} seeds merged by how far each matrix moved", merge="by distance"),
    Trial(name="a tenth of the deltas' inputs dropped", during=lambda data: dropout(0.1)),
    Trial(name="as many label-free pairs added, their documents left whole", label_free=True),
    Trial(name="negatives out of the batch", during=lambda data: training_with(in_batch)),
    Trial(name=f"the {HARDEST} hardest negatives", during=lambda data: training_with(hardest)),
    Trial(name="the guard leaves out, nothing fades", during=lambda data: training_with(guarded_at_once)),
    Trial(
        name="corrected for how often a document is a positive",
        during=lambda data: training_with(
            corrected_for_frequency([own.positives for own in data.sets], len(data.pool))
        ),
    ),
    Trial(name="all six layers, no shared delta", expert={"layers": 6}, start="base, alone"),
    Trial(name="rank 64", expert={"rank": 64}),
    Trial(name="learning rate 1e-3", config={"learning_rate": 1e-3}),
    Trial(name="temperature 0.05", config={"temperature": 0.05}),
    Trial(name="learning rate 4e-3", config={"learning_rate": 4e-3}),
    Trial(name="rank 4", expert={"rank": 4}),
    Trial(name="64 queries a step", config={"batch_size": 64}),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Arguments:
    """Trains experts in several ways."""

    data: Path
    """Folder of the BEIR folders."""
    pooled: Path = Path("runs/pooled_domains")
    """Where experiments.pooled_domains left its first seed."""
    out: Path = Path("runs/recipe")
    """Where results and checkpoints go."""
    trials: int = len(TRIALS)
    """How many of the lines, the first ones."""


def main() -> None:
    """Runs the trials and writes the section; finished ones are not repeated."""
    arguments = tyro.cli(Arguments)
    source = arguments.pooled / "seed-0" / "model"
    model = moeret.Model.load(source)
    config = TrainConfig(precision=fast_precision())
    embedder = Embedder(model.base, experts.base_alone(model.base.config, config.expert))
    read = read_domains({name: arguments.data / name for name in TRAINED})
    data = prepare(read, embedder, config, source / WORK / VECTORS, show_progress_bar=True)
    shared = read_shared(model.published).delta
    out, strength = made_from(arguments.out, source, to_json(config)), model.published.meta["shared"]["strength"]
    found = {
        trial.name: _run(trial, data, embedder, shared, strength, config, out) for trial in TRIALS[: arguments.trials]
    }
    body = _body(found, config)
    print(body)
    write_section("recipe", "What an expert learns best with", body)


def _run(
    trial: Trial,
    data: Prepared,
    embedder: Embedder,
    shared: experts.Bank,
    strength: float,
    config: TrainConfig,
    out: Path,
) -> dict[str, Any]:
    """Dev nDCG@10 of each domain by group, chosen steps and strengths; `strength` is the shared delta's best one alone."""
    file = out / f"{_slug(trial)}.json"
    if file.is_file():
        return json.loads(file.read_text())
    config = dataclasses.replace(config, **trial.config, expert=dataclasses.replace(config.expert, **trial.expert))
    four = _only(data)
    if trial.label_free:
        four = dataclasses.replace(four, sets=_with_label_free_pairs(four, embedder))
    base = embedder.base_encoder
    if trial.start == "shared":
        base = dataclasses.replace(base, params=experts.fold(base.params, shared, strength))
    own = Embedder(base, experts.base_alone(base.config, config.expert)).in_precision(config.precision)
    tower, fitted = QueryTower(four, own), []
    every, nothing = (
        np.ones(len(DOMAINS), bool),
        experts.init_bank(base.config, config.expert, [jax.random.key(0)] * len(DOMAINS)),
    )
    start = tower.values(nothing, every) if trial.start == "shared" else tower.base()
    for seed in range(SEEDS if trial.merge else 1):
        work = out / _slug(TRIALS[0] if trial.merge else trial) / f"seed-{seed}"
        work.mkdir(parents=True, exist_ok=True)
        with trial.during(four):
            fitted.append(
                fit_experts(four, own, tower, dataclasses.replace(config, seed=seed), work, show_progress_bar=True)
            )
    bank = _merged([run.bank for run in fitted], trial.merge == "by distance")
    common = shared if trial.start == "base" else None
    tried = try_strengths(bank, common, lambda bank, merged: tower.values(bank, every, merged))
    strengths = choose_strengths(tried, start, tower.seen)
    result = {
        "base": by_group(tower.base(), tower.seen).tolist(),
        "dev": by_group(strengths.values, tower.seen).tolist(),
        "steps": fitted[0].steps.tolist(),
        "own": strengths.own.tolist(),
        "shared": strengths.shared.tolist(),
    }
    artifact.write_atomically(file, json.dumps(result).encode())
    return result


def _slug(trial: Trial) -> str:
    return trial.name.replace(" ", "-")


def _merged(banks: Sequence[experts.Bank], by_distance: bool) -> experts.Bank:
    """Experts of several trainings as experts of as many times their rank.

    Uniform model soups (arXiv 2203.05482), or each matrix's delta weighs by its norm, after CoDiEmb (arXiv 2508.11442).
    """

    def merge(layer: str, matrix: str) -> experts.Factors:
        own = [bank[layer][matrix] for bank in banks]
        shares = np.full((len(own), len(DOMAINS)), 1 / len(own), np.float32)
        if by_distance:
            norms = np.stack([np.linalg.norm(factors["a"] @ factors["b"], axis=(1, 2)) for factors in own])
            shares = norms / np.maximum(norms.sum(axis=0), 1e-12)
        weighed = [factors["b"] * share[:, None, None] for factors, share in zip(own, shares, strict=True)]
        return {"a": np.concatenate([factors["a"] for factors in own], axis=2), "b": np.concatenate(weighed, axis=1)}

    return {layer: {matrix: merge(layer, matrix) for matrix in matrices} for layer, matrices in banks[0].items()}


def _only(data: Prepared) -> Prepared:
    """The data of the four domains; their rows come first in the pool, the others' documents behind them."""
    numbers = [next(n for n, own in enumerate(data.domains) if own.name == name) for name in DOMAINS]
    sets, dev, blocks, start = [], [], [], 0
    for number in numbers:
        rows = data.sets[number].documents
        shift = start - int(rows[0])
        positives = [own + shift for own in data.sets[number].positives]
        sets.append(dataclasses.replace(data.sets[number], documents=rows + shift, positives=positives))
        dev.append(dataclasses.replace(data.dev[number], documents=rows + shift))
        blocks.append(data.pool[rows])
        start += len(rows)
    blocks += [data.pool[own.documents] for n, own in enumerate(data.sets) if n not in numbers]
    return Prepared(
        [data.domains[n] for n in numbers], sets, dev, [data.profiles[n] for n in numbers], np.concatenate(blocks)
    )


def _with_label_free_pairs(data: Prepared, embedder: Embedder) -> list[TrainingSet]:
    """The training sets, each with queries made of its documents behind the judged ones, as many where there are so many."""
    base, sets = embedder.base_encoder, []
    for domain, own in zip(data.domains, data.sets, strict=True):
        pairs = sample(label_free_pairs(domain.corpus)[0], len(own.queries))
        place = {document.id: row for document, row in zip(domain.corpus, own.documents.tolist(), strict=True)}
        ids = base.tokenizer([base.prompts["query"] + text for text in pairs.queries.values()])
        positives = [np.array([place[id] for id in documents]) for documents in pairs.qrels.values()]
        sets.append(dataclasses.replace(own, queries=[*own.queries, *ids], positives=[*own.positives, *positives]))
    return sets


def _body(found: dict[str, dict[str, Any]], config: TrainConfig) -> str:
    rows = []
    base = np.array(next(iter(found.values()))["base"])
    rows.append(["the base", *_means(base), *(f"{100 * value:.1f}" for value in base[:, 0]), "", ""])
    for name, own in found.items():
        dev = np.array(own["dev"])
        steps = " ".join(map(str, own["steps"]))
        strengths = " ".join(f"{a:g}/{b:g}" for a, b in zip(own["own"], own["shared"], strict=True))
        rows.append([name, *_means(dev), *(f"{100 * value:.1f}" for value in dev[:, 0]), steps, strengths])
    columns = ["recipe", "mean", "seen", "unseen", *DOMAINS, "steps", "strengths own/shared"]
    return (
        f"Dev nDCG@10 x 100 in the pool of all ten domains' documents, experts of {', '.join(DOMAINS)} at their best steps and "
        f"strengths. As it is: rank {config.expert.rank}, learning rate {config.learning_rate:g}, temperature "
        f"{config.temperature:g}, {config.batch_size} queries a step, at most {config.steps} steps and {config.epochs:g} epochs, "
        "merged with the first seed's shared delta. One seed, and dev chose steps and strengths: differences below a point say "
        "little.\n\n" + markdown_table(columns, rows)
    )


def _means(table: np.ndarray) -> list[str]:
    return [f"{100 * np.nanmean(table[:, group]):.1f}" for group in range(3)]


if __name__ == "__main__":
    main()
