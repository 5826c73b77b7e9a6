"""The training batch plan: step i is a pure function of (data, seed, i), so that position equals step.

Every expert reads its own queries in its own shuffled order, `batch_size` a step, each query once an epoch, whatever the
other experts do: experts trained together see exactly the batches that they would see alone. Inside a window of a few
batches the queries are sorted by length, so that a batch is one array with little padding; the window's batches are read
in random order, so that lengths come mixed.
"""

import hashlib
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from jaxtyping import Int

from moeret.data.buckets import Batch, bucket_edges

TRAINING_BUCKETS, BATCHES_A_SHAPE = 8, 32
"""Shapes of a training step that are compiled at most, and batches that pay for compiling one of them."""
WINDOW = 8
"""Batches that are sorted by length together; fewer where that would be more than an epoch."""


def training_buckets(batches: int) -> int:
    """How many shapes pay in so many batches: two at least, so that one long query does not pad all others to its length."""
    return min(TRAINING_BUCKETS, max(2, batches // BATCHES_A_SHAPE))


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
        batches: int,
        devices: int = 1,
    ) -> "BatchPlan":
        """A plan for each expert's query lengths (in tokens), with edges chosen from all of them, split over devices.

        `batches` are how many all experts will read at most: the more, the more shapes pay.
        """
        # A step reads the same number of every expert's queries, so a small domain's lengths weigh as much as a large one's.
        weights = np.concatenate([np.full(len(own), 1 / len(own)) for own in lengths])
        edges = bucket_edges(np.concatenate(lengths), training_buckets(batches), weights)
        return cls(tuple(names), tuple(lengths), batch_size, seed, edges, devices)

    def batch(self, step: int, expert: int) -> Batch:
        """The expert's queries in this step, as one batch whose rows the devices can share."""
        lengths = self.lengths[expert]
        window = min(WINDOW, max(1, len(lengths) // self.batch_size))
        number, turn = divmod(step, window)
        queries = self._stream(expert, number * window * self.batch_size, window * self.batch_size)
        queries = queries[np.argsort(lengths[queries], kind="stable")]
        place = self._random(expert, f"window {number}").permutation(window)[turn]
        rows = queries[place * self.batch_size : (place + 1) * self.batch_size]
        edge = self.edges[int(np.searchsorted(self.edges, lengths[rows].max()))]
        return Batch(rows, edge, -(-self.batch_size // self.devices) * self.devices)

    def _stream(self, expert: int, start: int, count: int) -> Int[np.ndarray, "count"]:
        """`count` queries from position `start` of the expert's endless shuffled epochs."""
        epochs, offsets = np.divmod(np.arange(start, start + count), len(self.lengths[expert]))
        orders = {
            epoch: self._random(expert, f"epoch {epoch}").permutation(len(self.lengths[expert]))
            for epoch in np.unique(epochs).tolist()
        }
        return np.array(
            [orders[epoch][offset] for epoch, offset in zip(epochs.tolist(), offsets, strict=True)], np.int64
        )

    def _random(self, expert: int, what: str) -> np.random.Generator:
        # The name, not the position, seeds the order: adding an expert must not change the others' batches.
        key = hashlib.sha256(f"{self.seed}/{self.names[expert]}/{what}".encode()).digest()
        return np.random.default_rng(int.from_bytes(key[:8]))


@dataclass(slots=True)
class Tally:
    """What was read of a plan: how often each shape, and whose texts at each length."""

    batches: Counter[tuple[int, int]] = field(default_factory=Counter)  # by (rows, edge)
    texts: dict[int, Counter[str]] = field(default_factory=lambda: defaultdict(Counter))  # by edge
    tokens: int = 0

    def note(self, name: str, batch: Batch, tokens: int) -> None:
        """Counts a batch of a domain, of which so many tokens are no padding."""
        self.batches[batch.size, batch.edge] += 1
        self.texts[batch.edge][name] += len(batch.rows)
        self.tokens += tokens

    def report(self) -> dict[str, Any]:
        """How many shapes, the share of padding among the tokens, and the domains' shares of the texts at each length."""
        padded = sum(rows * edge * count for (rows, edge), count in self.batches.items())
        shares = {
            edge: {name: round(count / own.total(), 4) for name, count in sorted(own.items())}
            for edge, own in sorted(self.texts.items())
        }
        return {
            "shapes": len(self.batches),
            "padding": round(1 - self.tokens / padded, 4) if padded else 0.0,
            "domains": shares,
        }
