"""Length buckets and packs: which shapes there are, and which texts share a batch.

XLA compiles one program per shape, so lengths are rounded up to a few bucket edges, in training and where many texts are
embedded. Few texts are packed.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int

TOKENS_PER_BATCH = 512
"""Padded tokens in a batch: small enough for its temporaries to stay in a CPU's cache."""

_FEW = (8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512)
_MANY = (8, 10, 12, 14, 16, 20, 24, 28, 32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320, 384, 448, 512)
MANY_TOKENS = 2**16
"""What pays for compiling twice as many shapes, which halve the padding; they are compiled once on a machine."""


def standard_edges(max_length: int, tokens: int) -> tuple[int, ...]:
    """Edges for texts of so many tokens in all, of at most `max_length` each: in steps of a fifth or so, of a half if few.

    They are the same for all texts, so that a corpus needs no programs of its own.
    """
    ladder = _MANY if tokens >= MANY_TOKENS else _FEW
    return (*(edge for edge in ladder if edge < max_length), max_length)


def bucket_edges(
    lengths: Int[np.ndarray, "N"], buckets: int, weights: Float[np.ndarray, "N"] | None = None
) -> tuple[int, ...]:
    """At most `buckets` edges that pad these lengths with the fewest tokens (dynamic programming, exact).

    best[j][i] = min over h < i of best[j-1][h] + edge_i * (weight of the texts between edge_h and edge_i); the texts' own
    tokens are the same whatever the edges, so minimal padded tokens is minimal padding. `weights` says how often each
    text will be read; unless given, all are read alike.
    """
    values, which = np.unique(lengths, return_inverse=True)
    below = np.concatenate([[0.0], np.cumsum(np.bincount(which, weights))])
    best = values * below[1:]  # one bucket up to each value
    choices: list[np.ndarray] = []
    for _ in range(min(buckets, len(values)) - 1):
        # cost[h, i]: the best with an edge at value h, and one more bucket from there to value i
        cost = best[:, None] + values[None, :] * (below[None, 1:] - below[1:, None])
        cost = np.where(np.arange(len(values))[:, None] < np.arange(len(values))[None, :], cost, np.inf)
        choice = np.argmin(cost, axis=0)
        better = cost[choice, np.arange(len(values))]
        choices.append(np.where(better < best, choice, -1))
        best = np.minimum(best, better)
    edges, i = [int(values[-1])], len(values) - 1
    for choice in reversed(choices):
        if choice[i] >= 0:
            i = int(choice[i])
            edges.append(int(values[i]))
    return tuple(reversed(edges))


@dataclass(frozen=True, slots=True)
class Batch:
    """Rows of a text list that are encoded together, in a program of shape [size, edge]; size >= len(rows)."""

    rows: Int[np.ndarray, "B"]
    edge: int
    size: int


def full_size(edge: int, tokens: int = TOKENS_PER_BATCH) -> int:
    """Rows of a full batch at this edge: a power of two within the token budget, at least 1."""
    return 1 << max(0, (tokens // edge).bit_length() - 1)


def length_batches(
    lengths: Int[np.ndarray, "N"], edges: Sequence[int], tokens: int = TOKENS_PER_BATCH, devices: int = 1
) -> Iterator[Batch]:
    """Covers every text once with batches of one padded length each; those that are not full round up to a power of four rows.

    Both are for each of the devices that share a batch's rows. What does not fill a batch waits for longer texts, up to twice
    the length that it needs: so nearly all batches are full, and few shapes are compiled for a few texts of many lengths.
    """
    which = np.searchsorted(edges, lengths)
    waiting = np.empty(0, np.int64)
    for bucket in np.unique(which):
        if len(waiting) and edges[bucket] > 2 * edges[which[waiting[0]]]:
            yield _rest(waiting, edges[which[waiting[-1]]], tokens, devices)
            waiting = waiting[:0]
        rows = np.concatenate([waiting, np.flatnonzero(which == bucket)])
        size = full_size(edges[bucket], tokens) * devices
        whole = len(rows) - len(rows) % size
        for start in range(0, whole, size):
            yield Batch(rows[start : start + size], edges[bucket], size)
        waiting = rows[whole:]
    if len(waiting):
        yield _rest(waiting, edges[which[waiting[-1]]], tokens, devices)


def _rest(rows: Int[np.ndarray, "B"], edge: int, tokens: int, devices: int) -> Batch:
    return Batch(rows, edge, min(power_of_four(-(-len(rows) // devices)), full_size(edge, tokens)) * devices)


@dataclass(frozen=True, slots=True)
class Pack:
    """Texts that stand one behind another in rows of one length, of which `rows` are each one's texts."""

    rows: list[list[int]]
    length: int

    @property
    def most(self) -> int:
        """How many texts rows like these can hold."""
        return len(self.rows) * self.length // _TOKENS_PER_TEXT

    def arrays(
        self, tokens: Sequence[Int[np.ndarray, "L"]] | Sequence[Float[np.ndarray, "L D"]]
    ) -> tuple[Int[np.ndarray, "N"], np.ndarray, Int[np.ndarray, "B L"], Int[np.ndarray, "B L"]]:
        """(numbers of the texts, their tokens in the rows, which of these texts each is of, where in it it stands).

        The third counts along the first, and is -1 where there is no token.
        """
        shape = (len(self.rows), self.length)
        out = np.zeros((*shape, *tokens[0].shape[1:]), tokens[0].dtype)
        texts, positions = np.full(shape, -1, np.int32), np.zeros(shape, np.int32)
        order: list[int] = []
        for row, own in enumerate(self.rows):
            start = 0
            for text in own:
                end = start + len(tokens[text])
                out[row, start:end], texts[row, start:end] = tokens[text], len(order)
                positions[row, start:end] = np.arange(end - start)
                order.append(text)
                start = end
        return np.array(order), out, texts, positions


_PACKED = 128
"""Length of a row of packed texts: long enough to waste little, short enough for attention to cost little."""
_TOKENS_PER_TEXT = 4
"""A row holds at most one text for so many tokens."""
_ANY_ROWS = 4
"""More rows are rounded up to a power of two, so that few shapes are compiled."""


def packs(lengths: Int[np.ndarray, "N"], tokens: int = TOKENS_PER_BATCH) -> Iterator[Pack]:
    """Covers every text once with rows that are nearly full (first fit, longest first), a batch's tokens at a time.

    For few texts of many lengths: buckets would pad them much. Tokens of other texts in a row cost attention only.
    """
    length = max(_PACKED, 1 << int(lengths.max() - 1).bit_length())
    least = max(int(lengths.sum()), _TOKENS_PER_TEXT * len(lengths))
    length = min([length, *(edge for edge in _FEW if edge >= least)])
    rows: list[list[int]] = []
    left: list[int] = []
    for text in np.argsort(-lengths, kind="stable").tolist():
        fits = (n for n, own in enumerate(left) if own >= lengths[text] and len(rows[n]) < length // _TOKENS_PER_TEXT)
        row = next(fits, len(rows))
        if row == len(rows):
            rows.append([])
            left.append(length)
        rows[row].append(text)
        left[row] -= int(lengths[text])
    size = max(1, tokens // length)
    for start in range(0, len(rows), size):
        own = rows[start : start + size]
        spare = 0 if len(own) <= _ANY_ROWS else (1 << (len(own) - 1).bit_length()) - len(own)
        yield Pack([*own, *([] for _ in range(spare))], length)


def power_of_four(count: int) -> int:
    """The least power of four that is not below `count`: sizes in such steps need few programs."""
    return 4 ** (((count - 1).bit_length() + 1) // 2)


def pad(ids: Sequence[Int[np.ndarray, "L"]], batch: Batch) -> tuple[Int[np.ndarray, "B L"], Int[np.ndarray, "B"]]:
    """Token ids [size, edge] and lengths [size] of a batch; spare rows are one padding token long."""
    padded = np.zeros((batch.size, batch.edge), np.int32)
    lengths = np.ones(batch.size, np.int32)
    for position, row in enumerate(batch.rows):
        padded[position, : len(ids[row])] = ids[row]
        lengths[position] = len(ids[row])
    return padded, lengths
