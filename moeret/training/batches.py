"""What a training step reads: a domain's queries and positives made ready, and the plan's rows as device arrays."""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int

from moeret.config import TrainConfig
from moeret.data.buckets import Batch, bucket_edges, length_batches, pad
from moeret.data.negatives import mine_hard_negatives
from moeret.data.plan import BatchPlan, Tally, training_buckets
from moeret.models.encoder import EncoderConfig, cast_kernels
from moeret.models.mesh import replicate, row_devices, shard_base, shard_rows
from moeret.training.losses import Pool
from moeret.training.step import Chunk, Frozen, PairBatch, QueryBatch, Static, TextBatch
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


class Batches:
    """The batches of every step, on the devices of a mesh.

    `static` and `frozen` are what all steps share, `limits` each expert's last step, `tally` counts what was read. For a
    `shared` delta all domains train one expert, a domain a step, in rounds that shuffle their order.
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
        self.names = (SHARED,) if shared else tuple(own.name for own in sets)
        self.mesh, self.static = mesh, Static(encoder, layers, config.temperature, config.mini_batch_size, mesh)
        dtype = jnp.dtype(config.precision)
        columns = None if document_ids else Pool(pool.astype(dtype), np.ascontiguousarray(pool.T).astype(dtype))
        self.frozen = Frozen(shard_base(mesh, cast_kernels(params, dtype)), replicate(mesh, columns))
        self.limits = np.array([config.steps]) if shared else _limits(sets, config)
        self._sets, self._config, self._document_ids, self._shared = sets, config, document_ids, shared
        self.tally = Tally()
        lengths = [np.array([len(ids) for ids in own.queries]) for own in sets]
        names = [own.name for own in sets]
        self._plan = BatchPlan.make(
            names, lengths, config.batch_size, config.seed, int(self.limits.sum()), row_devices(mesh)
        )
        if document_ids is None:
            most = max(len(positives) for own in sets for positives in own.positives)
            self._positives = [_padded(own.positives, most) for own in sets]
        else:
            self._edges = _pair_edges(sets, document_ids, 1 + config.hard_negatives, self.limits.max())
            self._mined = [self._mine(pool, own) for own in sets]

    def step(self, step: int, active: Bool[np.ndarray, "E"]) -> Iterator[tuple[Int[Array, ""], QueryBatch | PairBatch]]:
        """The step's (expert, batch) pairs of the active experts; a pure function of its arguments."""
        make = self._query_batch if self._document_ids is None else self._pair_batch
        for expert in np.flatnonzero(active).tolist():
            batch = make(*self._turn(step)) if self._shared else make(step, expert)
            yield replicate(self.mesh, jnp.int32(expert)), batch

    def _turn(self, step: int) -> tuple[int, int]:
        """(round, domain) of a step of the shared delta."""
        number, turn = divmod(step, len(self._sets))
        order = np.random.default_rng((self._config.seed, number)).permutation(len(self._sets))
        return number, int(order[turn])

    def _query_batch(self, step: int, expert: int) -> QueryBatch:
        batch = self._plan.batch(step, expert)
        spare = batch.size - len(batch.rows)
        rows = QueryBatch(
            queries=self._text_batch(self._sets[expert].name, self._sets[expert].queries, batch),
            weights=np.pad(np.full(len(batch.rows), 1 / self._config.batch_size, np.float32), (0, spare)),
            positives=np.pad(self._positives[expert][batch.rows], ((0, spare), (0, 0)), constant_values=-1),
        )
        return shard_rows(self.mesh, rows)

    def _pair_batch(self, step: int, expert: int) -> PairBatch:
        own, queries = self._sets[expert], self._plan.batch(step, expert).rows
        random = np.random.default_rng(
            int.from_bytes(hashlib.sha256(f"{self._config.seed}/{own.name}/{step}/pairs".encode()).digest()[:8])
        )
        chosen = np.array([random.choice(own.positives[q]) for q in queries])
        mined = self._mined[expert]
        picks = random.integers(mined.shape[1], size=(len(queries), self._config.hard_negatives))
        columns = np.concatenate([chosen, np.take_along_axis(mined[queries], picks, axis=1).ravel()])
        ids = [*(own.queries[q] for q in queries), *(self._document_ids[row] for row in columns)]
        counts = np.array([len(each) for each in ids])
        chunks = length_batches(counts, self._edges, TOKENS_PER_CHUNK, row_devices(self.mesh))
        of_rows = {
            "weights": np.full(len(queries), 1 / self._config.batch_size, np.float32),
            "positives": np.stack([np.isin(columns, own.positives[q]) for q in queries]),
        }
        return PairBatch(tuple(self._chunk(own.name, ids, chunk) for chunk in chunks), **replicate(self.mesh, of_rows))

    def _chunk(self, name: str, ids: Ids, batch: Batch) -> Chunk:
        places = np.pad(batch.rows, (0, batch.size - len(batch.rows)), constant_values=len(ids)).astype(np.int32)
        return Chunk(shard_rows(self.mesh, self._text_batch(name, ids, batch)), replicate(self.mesh, places))

    def _text_batch(self, name: str, ids: Ids, batch: Batch) -> TextBatch:
        self.tally.note(name, batch, sum(len(ids[row]) for row in batch.rows))
        return TextBatch(*pad(ids, batch))

    def _mine(self, pool: Float[np.ndarray, "N D"], own: TrainingSet) -> Int[np.ndarray, "Q 16"]:
        """Hard negatives of each train query, out of its own domain, as pool rows."""
        first, count = own.documents[0], len(own.documents)
        positives = [rows - first for rows in own.positives]
        depth = max(1, min(_MINED, count - max(len(rows) for rows in positives)))
        return first + mine_hard_negatives(own.query_vectors, pool[first : first + count], positives, depth)


TOKENS_PER_CHUNK = 1024
"""Padded tokens that a device encodes at a time with both towers."""
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


def _pair_edges(sets: Sequence[TrainingSet], document_ids: Ids, documents: int, steps: int) -> tuple[int, ...]:
    """Edges for queries, each with so many documents; a domain counts as much as another.

    As many as an expert alone would have: a batch's texts are too few for more lengths, and would leave more chunks part empty.
    """
    lengths, weights = [], []
    for own in sets:
        counts = [len(ids) for ids in own.queries], [len(document_ids[row]) for row in own.documents]
        for each, share in zip(counts, (1, documents), strict=True):
            lengths.append(np.array(each))
            weights.append(np.full(len(each), share / len(each)))
    return bucket_edges(np.concatenate(lengths), training_buckets(steps), np.concatenate(weights))
