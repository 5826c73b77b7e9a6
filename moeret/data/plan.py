"""The training batch plan: step i is a pure function of (data, seed, i), so that position equals step.

Every expert reads its own queries in its own shuffled order, `batch_size` a step, each query once an epoch, whatever the
other experts do: experts trained together see exactly the batches that they would see alone.
"""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Int

from moeret.data.buckets import bucket_edges, full_size

TRAINING_BUCKETS = 6
"""Compiled shapes of a training step at most."""


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """Rows of one expert in one step, with one shape: [size, edge] once padded; size >= len(queries)."""

    expert: int
    queries: Int[np.ndarray, "B"]
    edge: int
    size: int


@dataclass(frozen=True, slots=True)
class BatchPlan:
    """Which queries of which expert train in which step."""

    names: tuple[str, ...]
    lengths: tuple[Int[np.ndarray, "Q"], ...]
    batch_size: int
    seed: int
    edges: tuple[int, ...]
    devices: int

    @classmethod
    def make(
        cls,
        names: Sequence[str],
        lengths: Sequence[Int[np.ndarray, "Q"]],
        batch_size: int,
        seed: int,
        devices: int = 1,
    ) -> "BatchPlan":
        """A plan for each expert's query lengths (in tokens), with edges chosen from all of them, split over devices."""
        # A step reads the same number of every expert's queries, so a small domain's lengths weigh as much as a large one's.
        weights = np.concatenate([np.full(len(own), 1 / len(own)) for own in lengths])
        edges = bucket_edges(np.concatenate(lengths), TRAINING_BUCKETS, weights)
        return cls(tuple(names), tuple(lengths), batch_size, seed, edges, devices)

    def queries(self, expert: int, step: int) -> Int[np.ndarray, "B"]:
        """The expert's queries in this step: the next `batch_size` of its endless shuffled epochs."""
        count = len(self.lengths[expert])
        positions = np.arange(step * self.batch_size, (step + 1) * self.batch_size)
        epochs, offsets = np.divmod(positions, count)
        orders = {epoch: self._order(expert, int(epoch), count) for epoch in np.unique(epochs)}
        return np.array([orders[epoch][offset] for epoch, offset in zip(epochs, offsets, strict=True)], np.int64)

    def _order(self, expert: int, epoch: int, count: int) -> np.ndarray:
        # The name, not the position, seeds the order: adding an expert must not change the others' batches.
        key = hashlib.sha256(f"{self.seed}/{self.names[expert]}/{epoch}".encode()).digest()
        return np.random.default_rng(int.from_bytes(key[:8])).permutation(count)

    def step(self, step: int, expert: int) -> Iterator[MicroBatch]:
        """The expert's rows of this step, in micro-batches of one shape per bucket.

        Rows that do not fill a bucket's batch move up to the next longer one, so only the last may be short.
        """
        queries = self.queries(expert, step)
        which = np.searchsorted(self.edges, self.lengths[expert][queries])
        last, waiting = which.max(), np.zeros(0, np.int64)
        for bucket in range(last + 1):
            waiting = np.concatenate([waiting, queries[which == bucket]])
            size = full_size(self.edges[bucket]) * self.devices
            end = len(waiting) if bucket == last else len(waiting) // size * size
            for start in range(0, end, size):
                yield MicroBatch(expert, waiting[start : min(start + size, end)], self.edges[bucket], size)
            waiting = waiting[end:]
