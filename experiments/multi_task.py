"""The strongest single model: one delta for all domains, as large as all of ours, trained for as many steps as all of ours."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from moeret import artifact
from moeret.config import TrainConfig, to_json
from moeret.models import experts
from moeret.models.embed import Embedder
from moeret.models.model import VECTORS, WORK, Model
from moeret.training.learn import learn_shared, shared_limit
from moeret.training.prepare import prepare, read_domains


class MultiTask(NamedTuple):
    """A trained delta at its own best strength."""

    name: str
    made_of: str  # a hash of its settings and of our model, whose data and base it shares
    steps: int  # a domain
    dev: float  # nDCG@10
    encode: Callable[[Sequence[str]], np.ndarray]  # queries to unit vectors


def equal_budget(ours: TrainConfig, train_queries: Sequence[int], rank: int | None, rate: float) -> TrainConfig:
    """As many steps as our shared delta and all our experts, as many parameters as they all unless a rank is given."""
    steps = shared_limit(ours, train_queries) + sum(
        min(ours.steps, math.ceil(ours.epochs * own / ours.batch_size)) for own in train_queries
    )
    size = ours.expert.shared_rank + len(train_queries) * ours.expert.rank
    each = math.ceil(steps / len(train_queries))
    return dataclasses.replace(
        ours,
        shared_steps=each,
        evaluate_every=math.ceil(
            ours.evaluate_every * each / ours.shared_steps
        ),  # as many looks at dev as our shared delta
        epochs=math.ceil(steps * ours.batch_size / sum(train_queries)),
        shared_learning_rate=rate,
        expert=dataclasses.replace(ours.expert, shared_rank=rank or size),
    )


def train_multi_task(
    trained: dict[str, Path], ours: Path, config: TrainConfig, tried: Sequence[tuple[int | None, float]]
) -> list[MultiTask]:
    """Trains a delta for each (rank, learning rate) beside our model, whose vectors of the texts it takes; goes on if cut off."""
    model, read = Model.load(ours), read_domains(trained)
    base = model.base
    embedder = Embedder(base, experts.base_alone(base.config, config.expert))
    data = prepare(read, embedder, config, ours / WORK / VECTORS, show_progress_bar=True)
    made = []
    for rank, rate in tried:
        own = equal_budget(config, [len(each.queries) for each in data.sets], rank, rate)
        name = f"multi-task-{own.expert.shared_rank}-{rate:g}"
        made_of = artifact.fingerprint([to_json(own), model.published.fingerprint])
        work = ours.with_name(f"{name}-{made_of[:8]}")
        learned = learn_shared(data, embedder.in_precision(own.precision), own, work, show_progress_bar=True)
        bank = experts.scaled(experts.stack([learned.delta]), np.full(1, learned.strength))
        alone = Embedder(base, experts.with_base(bank)).alone(1)
        made.append(
            MultiTask(
                name,
                made_of,
                own.shared_steps,
                learned.dev,
                lambda texts, alone=alone: alone.base(model.with_prompt(texts, "query")),
            )
        )
    return made
