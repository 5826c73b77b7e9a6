"""What a training step reads: a domain's queries and positives made ready, and the plan's rows as device arrays."""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int

from moeret.config import TrainConfig, require
from moeret.data.buckets import Batch, bucket_edges, pad
from moeret.data.negatives import mine_hard_negatives
from moeret.data.plan import BatchPlan, training_buckets
from moeret.models.encoder import EncoderConfig, cast_kernels
from moeret.training.losses import Pool
from moeret.training.mesh import replicate, shard_rows
from moeret.training.step import Frozen, PairBatch, QueryBatch, TextBatch
from moeret.types import SHARED_EXPERT as SHARED

Ids = list[Int[np.ndarray, "L"]]


@dataclass(frozen=True, slots=True)
class TrainingSet:
    """One domain ready for training: train queries as token ids, positives as rows of the document pool."""

    name: str
    queries: Ids
    query_vectors: Float[np.ndarray, "Q D"]  # unit base vectors; with a query tower of a sample only, mining needs all
    positives: list[Int[np.ndarray, "P"]]
    documents: Int[np.ndarray, "N"]  # the domain's rows of the pool


def check_split(config: TrainConfig, devices: int) -> None:
    """Raises ConfigError where devices cannot share the rows of a batch alike; filler rows make that good for queries alone."""
    require(
        config.tower == "query" or config.batch_size % devices == 0,
        f"batch_size {config.batch_size} cannot be split over {devices} devices; choose a multiple",
    )


class Batches:
    """The batches of every step, on the devices of a mesh.

    `static` and `frozen` are what all steps share, `limits` each expert's last step. For a `shared` delta all domains train
    one expert, a domain a step, in rounds that shuffle their order.
    """

    def __init__(
        self,
        encoder: EncoderConfig,
        layers: int,
        params,
        pool: Float[np.ndarray, "N D"],
        document_ids: Ids | None,
        sets: Sequence[TrainingSet],
        config: TrainConfig,
        mesh: Mesh,
        *,
        shared: bool = False,
    ):
        check_split(config, mesh.size)
        self.names = (SHARED,) if shared else tuple(own.name for own in sets)
        self.mesh, self.static = mesh, (encoder, layers, config.temperature, config.mini_batch_size)
        dtype = jnp.dtype(config.precision)
        columns = None if document_ids else Pool(pool.astype(dtype), np.ascontiguousarray(pool.T).astype(dtype))
        self.frozen = replicate(mesh, Frozen(cast_kernels(params, dtype), columns))
        self.limits = np.array([config.steps]) if shared else _limits(sets, config)
        self._sets, self._config, self._document_ids, self._shared = sets, config, document_ids, shared
        lengths = [np.array([len(ids) for ids in own.queries]) for own in sets]
        names = [own.name for own in sets]
        self._plan = BatchPlan.make(names, lengths, config.batch_size, config.seed, int(self.limits.max()), mesh.size)
        if document_ids is None:
            most = max(len(positives) for own in sets for positives in own.positives)
            self._positives = [_padded(own.positives, most) for own in sets]
        else:
            self._document_edges = bucket_edges(
                np.array([len(ids) for ids in document_ids]), training_buckets(self.limits.max())
            )
            self._mined = [self._mine(pool, own) for own in sets]

    def step(self, step: int, active: Bool[np.ndarray, "E"]) -> Iterator[tuple[Int[Array, ""], QueryBatch | PairBatch]]:
        """The step's (expert, batch) pairs of the active experts; a pure function of its arguments."""
        make = self._query_batch if self._document_ids is None else self._pair_batch
        for expert in np.flatnonzero(active).tolist():
            batch = make(*self._turn(step)) if self._shared else make(step, expert)
            yield replicate(self.mesh, jnp.int32(expert)), shard_rows(self.mesh, batch)

    def _turn(self, step: int) -> tuple[int, int]:
        """(round, domain) of a step of the shared delta."""
        number, turn = divmod(step, len(self._sets))
        order = np.random.default_rng((self._config.seed, number)).permutation(len(self._sets))
        return number, int(order[turn])

    def _query_batch(self, step: int, expert: int) -> QueryBatch:
        batch = self._plan.batch(step, expert)
        spare = batch.size - len(batch.rows)
        return QueryBatch(
            queries=TextBatch(*pad(self._sets[expert].queries, batch)),
            weights=np.pad(np.full(len(batch.rows), 1 / self._config.batch_size, np.float32), (0, spare)),
            positives=np.pad(self._positives[expert][batch.rows], ((0, spare), (0, 0)), constant_values=-1),
        )

    def _pair_batch(self, step: int, expert: int) -> PairBatch:
        own, batch = self._sets[expert], self._plan.batch(step, expert)
        queries = batch.rows
        random = np.random.default_rng(
            int.from_bytes(hashlib.sha256(f"{self._config.seed}/{own.name}/{step}/pairs".encode()).digest()[:8])
        )
        chosen = np.array([random.choice(own.positives[q]) for q in queries])
        mined = self._mined[expert]
        picks = random.integers(mined.shape[1], size=(len(queries), self._config.hard_negatives))
        columns = np.concatenate([chosen, np.take_along_axis(mined[queries], picks, axis=1).ravel()])
        return PairBatch(
            queries=TextBatch(*pad(own.queries, batch)),
            documents=_text_batch([self._document_ids[row] for row in columns], self._document_edges),
            weights=np.full(len(queries), 1 / self._config.batch_size, np.float32),
            positives=np.stack([np.isin(columns, own.positives[q]) for q in queries]),
        )

    def _mine(self, pool: Float[np.ndarray, "N D"], own: TrainingSet) -> Int[np.ndarray, "Q 16"]:
        """Hard negatives of each train query, out of its own domain, as pool rows."""
        first, count = own.documents[0], len(own.documents)
        positives = [rows - first for rows in own.positives]
        depth = max(1, min(_MINED, count - max(len(rows) for rows in positives)))
        return first + mine_hard_negatives(own.query_vectors, pool[first : first + count], positives, depth)


_MINED = 16
"""Depth of the mined list that hard negatives are drawn from."""


def _limits(sets: Sequence[TrainingSet], config: TrainConfig) -> Int[np.ndarray, "E"]:
    """How many steps each expert trains at most."""
    passes = [int(np.ceil(config.epochs * len(own.queries) / config.batch_size)) for own in sets]
    return np.minimum(config.steps, passes)


def _padded(positives: list[np.ndarray], width: int) -> Int[np.ndarray, "Q P"]:
    out = np.full((len(positives), width), -1, np.int32)
    for row, own in enumerate(positives):
        out[row, : len(own)] = own
    return out


def _text_batch(ids: Ids, edges: Sequence[int]) -> TextBatch:
    edge = edges[int(np.searchsorted(edges, max(len(own) for own in ids)))]
    return TextBatch(*pad(ids, Batch(np.arange(len(ids)), edge, len(ids))))
