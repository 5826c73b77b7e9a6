"""From prepared data to trained deltas: the shared one, every domain's expert, how much to use of both, and what beside.

Experts start from the base, not from the shared delta, and are merged with it in weight space as independent learners
(model soups, arXiv 2203.05482); experiments.recipe compares.
"""

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Float, Int

from moeret import artifact
from moeret.config import TrainConfig
from moeret.data.beir import Domain
from moeret.models import experts
from moeret.models.embed import Embedder
from moeret.models.mesh import make_mesh, model_devices
from moeret.progress import announce, progress_bar
from moeret.training.batches import Batches
from moeret.training.blend import Blended, DevBlends
from moeret.training.loop import Fitted, fit
from moeret.training.prepare import Prepared
from moeret.training.strength import OWN, Strengths, choose_strength, choose_strengths, try_strengths
from moeret.training.towers import BothTowers, QueryTower, by_group, mean_over_domains
from moeret.types import SHARED_EXPERT


class LearnedShared(NamedTuple):
    """The shared delta at its best step, without a leading axis, how strong it is best used alone, and dev's vectors by it."""

    delta: experts.Bank
    step: int
    strength: float
    base_dev: float
    dev: float
    dev_vectors: Sequence[Float[np.ndarray, "Q D"]]


def learn_shared(
    data: Prepared,
    embedder: Embedder,
    config: TrainConfig,
    work: Path,
    *,
    show_progress_bar: bool,
) -> LearnedShared:
    """Trains one delta on all domains in turn, looking at dev as often as the whole of its steps allows."""
    base = embedder.base_encoder
    steps = shared_limit(config, [len(own.queries) for own in data.sets])
    own = dataclasses.replace(
        config,
        steps=steps,
        learning_rate=config.shared_learning_rate,
        evaluate_every=math.ceil(steps * min(1, config.evaluate_every / config.shared_steps)),
    )
    shape = dataclasses.replace(config.expert, rank=config.expert.shared_rank)
    bank = experts.init_bank(base.config, shape, [_key(config.seed, SHARED_EXPERT)])
    tower, layers = QueryTower(data, embedder), experts.trunk_layers(bank, base.config)
    mesh = _training_mesh(embedder)
    batches = Batches(base.config, layers, base.params, data.pool, None, data.sets, own, mesh, shared=True)
    work.mkdir(parents=True, exist_ok=True)

    def look(bank: experts.Bank, _: np.ndarray) -> np.ndarray:
        return mean_over_domains(by_group(tower.values_of_one(bank), tower.seen))

    fitted = fit(bank, batches, look, own, work, what="the shared delta", show_progress_bar=show_progress_bar)
    strength, values = choose_strength(fitted.bank, tower.values_of_one)
    before, after = (float(np.mean([own.mean() for own in scored])) for scored in (tower.base(), values))
    alone = embedder.with_bank(experts.with_base(experts.scaled(fitted.bank, np.full(1, strength)))).alone(1)
    vectors = [alone.base(own.texts) for own in data.dev]
    return LearnedShared(experts.take(fitted.bank, 0), int(fitted.steps[0]), strength, before, after, vectors)


def shared_limit(config: TrainConfig, train_queries: Sequence[int]) -> int:
    """Steps of the shared delta at most: `shared_steps` for each domain, and `epochs` passes over as many queries as they have."""
    passes = math.ceil(config.epochs * sum(train_queries) / config.batch_size)
    return min(config.shared_steps * len(train_queries), passes)


def outline(domains: Sequence[Domain], config: TrainConfig) -> str:
    """What training on these domains is going to do, in words."""
    documents, queries = (
        sum(len(own.corpus) for own in domains),
        [len(own.splits["train"].queries) for own in domains],
    )
    experts = f"{len(domains)} experts" if len(domains) > 1 else "the expert"
    shared = config.expert.shared_rank and config.tower == "query"
    steps = [
        f"embed {documents:,} documents and the queries",
        *([f"train a shared delta (at most {shared_limit(config, queries):,} steps)"] if shared else []),
        f"train {experts} (at most {config.steps:,} steps, {config.epochs:g} epochs)",
        "choose how much of each counts, and the router",
    ]
    of = f"{len(domains)} domains, " if len(domains) > 1 else ""
    return f"{of}{sum(queries):,} train queries: {', '.join(steps)}"


def fit_experts(
    data: Prepared,
    embedder: Embedder,
    tower: QueryTower | BothTowers,
    config: TrainConfig,
    work: Path,
    *,
    show_progress_bar: bool,
) -> Fitted:
    """Trains the domains' experts, all from the base, each to its best step on dev."""
    base = embedder.base_encoder
    # A key made from the name, so that an expert starts alike whoever trains beside it.
    bank = experts.init_bank(base.config, config.expert, [_key(config.seed, own.name) for own in data.sets])
    layers = experts.trunk_layers(bank, base.config)
    mesh = _training_mesh(embedder)
    batches = Batches(base.config, layers, base.params, data.pool, tower.document_ids, data.sets, config, mesh)

    def look(bank: experts.Bank, active: np.ndarray) -> np.ndarray:
        return by_group(tower.values(bank, active), tower.seen)

    names = [own.name for own in data.sets]
    what = names[0] if len(names) == 1 else f"{len(names)} experts"
    return fit(bank, batches, look, config, work, what=what, show_progress_bar=show_progress_bar)


class Learned(NamedTuple):
    """Experts at their best steps and strengths.

    With one document space their dev queries' vectors and what counts beside the cosines, else how the base's and their scores
    tell relevance.
    """

    bank: experts.Bank
    shared: experts.Shared | None
    steps: Int[np.ndarray, "E"]
    strengths: Strengths
    base_dev: Float[np.ndarray, "E 3"]
    dev: Float[np.ndarray, "E 3"]
    dev_vectors: Sequence[Float[np.ndarray, "Q D"]] | None
    blended: Sequence[Blended] | None
    calibration: Sequence[tuple[float, float] | None]


def learn(
    data: Prepared,
    embedder: Embedder,
    shared: experts.Bank | None,
    blends: DevBlends | None,
    config: TrainConfig,
    work: Path,
    *,
    given: experts.Bank | None = None,
    own_strengths: Sequence[float] = OWN,
    show_progress_bar: bool,
) -> Learned:
    """Trains the domains' experts, merges them with the shared delta where there is one, and chooses how much of each to use.

    A bank of experts that is `given` is taken instead of being trained. They may be of people who knew the base alone: using
    nothing of the shared delta is always among what is tried.
    """
    tower = (QueryTower if config.tower == "query" else BothTowers)(data, embedder)
    if given is None:
        fitted = fit_experts(data, embedder, tower, config, work, show_progress_bar=show_progress_bar)
    else:
        fitted = Fitted(given, np.zeros(len(data.sets), np.int32))
    every = np.ones(len(data.sets), bool)
    before = tower.base()
    announce("Choosing how much of each delta counts, on dev", shown=show_progress_bar)
    tried = try_strengths(fitted.bank, shared, lambda bank, merged: tower.values(bank, every, merged), own_strengths)
    strengths = choose_strengths(tried, before, tower.seen)
    bank = jax.device_get(experts.scaled(fitted.bank, strengths.own))
    merged = shared and experts.Shared(shared, np.concatenate([[0], strengths.shared]).astype(np.float32))
    dev = [by_group(values, tower.seen) for values in (before, strengths.values)]
    vectors, blended = None, None
    if config.tower == "query":
        full = embedder.with_bank(experts.with_base(bank), merged)
        vectors = [full.alone(number).base(own.texts) for number, own in enumerate(data.dev, start=1)]
        blended = blends and _blended(data, full, vectors, blends, show_progress_bar)
    return Learned(bank, merged, fitted.steps, strengths, *dev, vectors, blended, tower.calibration(bank))


def _blended(
    data: Prepared,
    embedder: Embedder,
    vectors: Sequence[Float[np.ndarray, "Q D"]],
    blends: DevBlends,
    show_progress_bar: bool,
) -> list[Blended]:
    """What each expert wants beside the cosine; embeds all train queries once more, by their experts."""
    prompt = embedder.base_encoder.prompts["query"]
    total = sum(len(own.queries) for own in data.sets)
    with progress_bar("Remembering", total, shown=show_progress_bar, unit="queries") as advance:

        def of(number: int) -> Blended:
            expert = embedder.alone(1 + number)

            def encode(queries: Sequence[str]) -> Float[np.ndarray, "Q D"]:
                return expert.base([prompt + own for own in queries], advance=advance)

            return blends.of_expert(number, vectors[number], encode)

        return [of(number) for number in range(len(data.sets))]


def _training_mesh(embedder: Embedder) -> Mesh:
    """All processes' devices, the base split as the embedder splits it."""
    return make_mesh(model_devices=model_devices(embedder.mesh))


def _key(seed: int, name: str) -> jax.Array:
    return jax.random.fold_in(jax.random.key(seed), int(artifact.fingerprint(name)[:7], 16))
