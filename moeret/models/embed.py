"""Texts to vectors: compiled inference through the base and its experts.

Many texts of the base or of one expert are bucketed by length; few texts, each by its own experts, are packed.
"""

import copy
import dataclasses
import math
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int

from moeret.data.buckets import TOKENS_PER_BATCH, length_batches, packs, pad, standard_edges
from moeret.models.encoder import EncoderConfig, cast_kernels, matrix_shapes, token_moments, with_params
from moeret.models.experts import (
    MIXED,
    Bank,
    Mixture,
    Shared,
    few_experts,
    fold,
    gather,
    joined,
    only_experts,
    take,
    trunk_layers,
)
from moeret.models.mesh import local_mesh, replicate, row_devices, shard_base, shard_rows
from moeret.models.pretrained import Base
from moeret.models.router import Choice, Reads, Router
from moeret.progress import Advance
from moeret.threads import side_by_side

_CHUNK = 2048
"""Texts tokenised at a time."""
_MANY = 64
"""Texts of one expert that need no regrouping."""
_TOKENS_HELD = 2**16
"""Tokens whose hidden states wait for their experts at most, or one text's."""
_TOKENS_ON_ACCELERATOR = 2**15
"""Padded tokens in a batch where there is no processor's cache to keep to."""
_LEAST_USED = 4
"""A program for mixed texts takes so many experts at least, so that few are compiled."""
_SAME_WEIGHT = 0.02
"""A smaller change of every expert's weight is none."""
_FOLDED_BYTES = 2**30
"""What the matrices of experts may take that are kept with their deltas added."""


@jax.jit(static_argnames=("encoder", "layers"))
def _trunk(
    encoder: EncoderConfig, layers: int, params, ids: Int[Array, "B L"], lengths: Int[Array, "B"]
) -> tuple[Float[Array, "B L D"], Float[Array, "B 2*D"]]:
    x = with_params(encoder, params).trunk(ids, lengths, layers)
    return x, token_moments(x, lengths)


@jax.jit(static_argnames=("encoder", "layers"))
def _plain_branch(
    encoder: EncoderConfig, layers: int, params, x: Float[Array, "B L D"], lengths: Int[Array, "B"]
) -> Float[Array, "B D"]:
    return with_params(encoder, params).branch(x, lengths, layers, {})


Revise = Callable[[slice, Choice, Float[np.ndarray, "B D"]], Choice]
"""What is chosen for some of the texts, given their places, once their embeddings by a first choice are known."""


@jax.jit(static_argnames=("encoder", "layers"))
def _packed_trunk(
    encoder: EncoderConfig,
    layers: int,
    params,
    ids: Int[Array, "B L"],
    texts: Int[Array, "B L"],
    positions: Int[Array, "B L"],
) -> Float[Array, "B L D"]:
    return with_params(encoder, params).packed_trunk(ids, texts, positions, layers)


@jax.jit(static_argnames=("encoder", "layers", "count"))
def _packed_branch(
    encoder: EncoderConfig, layers: int, count: int, params, x: Float[Array, "B L D"], texts: Int[Array, "B L"]
) -> Float[Array, "count D"]:
    return with_params(encoder, params).packed_branch(x, texts, count, layers, {})


@jax.jit(static_argnames=("encoder", "layers"))
def _mixed_branch(
    encoder: EncoderConfig,
    layers: int,
    params,
    bank: Bank,
    shared: Bank | None,
    x: Float[Array, "B L D"],
    texts: Int[Array, "B L"],
    mixture: Mixture,
) -> Float[Array, "T D"]:
    deltas = gather(bank, shared, mixture, texts)
    return with_params(encoder, params).packed_branch(x, texts, len(mixture.weights), layers, deltas)


class Hidden(NamedTuple):
    """A batch of texts after the trunk: which ones, their tokens' hidden states, these' moments, and how many each has."""

    rows: Int[np.ndarray, "B"]
    x: Float[Array, "S L D"]  # S >= B
    moments: Float[Array, "S 2*D"]
    lengths: Int[Array, "S"]


class Embedder:
    """Embeds texts with the base and any mix of the bank's experts (expert 0, the base, in front), on a mesh of this process."""

    def __init__(self, base: Base, bank: Bank, shared: Shared | None = None, mesh: Mesh | None = None):
        self.mesh = mesh or local_mesh()
        self.base_encoder = dataclasses.replace(base, params=shard_base(self.mesh, base.params))
        self._params, self._precision = self.base_encoder.params, jnp.dtype(jnp.float32)
        self.width = base.config.width
        self._set(bank, shared)

    def with_bank(self, bank: Bank, shared: Shared | None = None) -> "Embedder":
        """The same base with another bank of experts, and another shared delta."""
        other = copy.copy(self)
        other._set(bank, shared)
        return other

    def in_precision(self, precision: jnp.dtype | str) -> "Embedder":
        """The same, with its products in float32 or bfloat16."""
        other = copy.copy(self)
        other._precision = jnp.dtype(precision)
        other._params = cast_kernels(self.base_encoder.params, other._precision)
        other._kept = {}
        return other

    def delta(self, expert: int) -> Bank:
        """All that an expert adds to the base, as one delta: its own, and its part of the shared one."""
        own = take(self.bank, expert)
        return own if self._shared is None else joined(own, self._shared, float(self._strengths[expert]))

    def alone(self, expert: int) -> "Embedder":
        """One expert, merged with its part of the shared delta, as a base of its own.

        Its delta is added to the matrices once, and what runs are the base's own programs.
        """
        exact = self.base_encoder.params
        params = fold(exact, self.delta(expert))
        other = self.with_bank(jax.tree.map(lambda leaf: leaf[:1], self.bank))
        other.base_encoder = dataclasses.replace(self.base_encoder, params=params)
        # What no delta changes stays one array for all experts.
        changed = jax.tree.map(
            lambda new, old, used: used if new is old else new.astype(used.dtype), params, exact, self._params
        )
        other._params = changed
        return other

    def _set(self, bank: Bank, shared: Shared | None) -> None:
        self.bank, self.trunk_layers = replicate(self.mesh, bank), trunk_layers(bank, self.base_encoder.config)
        self._shared = None if shared is None else replicate(self.mesh, shared.delta)
        self._strengths = None if shared is None else shared.strengths
        self._kept: dict[int, Embedder] = {}
        self._keeping = threading.Lock()

    def _folded(self, expert: int) -> "Embedder":
        """`alone`, kept for the next time where there is room."""
        with self._keeping:
            found = self._kept.get(expert)
            if found is None:
                shapes = matrix_shapes(self.base_encoder.config)
                bytes_each = 4 if self._precision == jnp.float32 else 4 + self._precision.itemsize
                size = bytes_each * sum(math.prod(shapes[name]) for matrices in self.bank.values() for name in matrices)
                while self._kept and (len(self._kept) + 1) * size > _FOLDED_BYTES:
                    del self._kept[next(iter(self._kept))]
                found = self._kept[expert] = self.alone(expert)
            return found

    def base(
        self, texts: Sequence[str], *, normalize: bool = True, advance: Advance | None = None
    ) -> Float[np.ndarray, "N D"]:
        """Base embeddings; `advance` is called with the number of texts done, and which share of the tokens was padding."""
        return self.base_of(self.hidden(texts), len(texts), normalize=normalize, advance=advance)

    def hidden(self, texts: Sequence[str]) -> Iterator[Hidden]:
        """What the trunk makes of texts, batch by batch: the same for the base and every expert."""
        encoder = self.base_encoder
        for start in range(0, len(texts), _CHUNK):
            ids = encoder.tokenizer(texts[start : start + _CHUNK])
            counts = np.array([len(own) for own in ids])
            edges = standard_edges(encoder.tokenizer.max_length, int(counts.mean() * len(texts)))
            for batch in length_batches(counts, edges, _tokens_per_batch(), row_devices(self.mesh)):
                padded, lengths = shard_rows(self.mesh, pad(ids, batch))
                x, moments = _trunk(encoder.config, self.trunk_layers, self._params, padded, lengths)
                yield Hidden(start + batch.rows, x, moments, lengths)

    def base_of(
        self, hidden: Iterable[Hidden], count: int, *, normalize: bool = True, advance: Advance | None = None
    ) -> Float[np.ndarray, "N D"]:
        """Base embeddings of `count` texts from what the trunk made of them."""
        out = np.empty((count, self.width), np.float32)
        tokens = padded = 0
        for rows, x, _, lengths in hidden:
            out[rows] = self._run_base(x, lengths)[: len(rows)]
            tokens, padded = tokens + int(np.asarray(lengths).sum()), padded + x.shape[0] * x.shape[1]
            if advance:
                advance(len(rows), f"{1 - tokens / padded:.0%} padding")
        return _unit_rows(out) if normalize else out

    def mixed(
        self,
        texts: Sequence[str],
        experts: Int[np.ndarray, "N S"],
        weights: Float[np.ndarray, "N S"],
        *,
        normalize: bool = True,
        advance: Advance | None = None,
    ) -> Float[np.ndarray, "N D"]:
        """Embeddings of each text by its own weighted experts."""
        if len(texts) >= _MANY and weights.shape[1] == 1 and (weights == 1).all() and (experts == experts[0]).all():
            return self._folded(int(experts[0, 0])).base(texts, normalize=normalize, advance=advance)
        out = np.empty((len(texts), self.width), np.float32)
        for rows, states in self.states(texts):
            out[rows] = self._branches(states, experts[rows], weights[rows])
            if advance:
                advance(len(states))
        return _unit_rows(out) if normalize else out

    def readings(
        self, texts: Sequence[str], *, reads: Reads | None = None, advance: Advance | None = None
    ) -> Float[np.ndarray, "N _"]:
        """What routers read of each text: moments of the trunk's tokens and the unit base embedding, or one of them."""
        widths = {"trunk": 2 * self.width, "base": self.width}
        parts = {kind: np.empty((len(texts), widths[kind]), np.float32) for kind in widths if reads in (None, kind)}
        for rows, x, moments, lengths in self.hidden(texts):
            for kind, own in parts.items():
                own[rows] = self._reading(kind, x, moments, lengths)[: len(rows)]
            if advance:
                advance(len(rows))
        return np.concatenate([*parts.values()], axis=1)

    def routed(
        self,
        texts: Sequence[str],
        router: Router,
        *,
        revise: Revise | None = None,
        normalize: bool = True,
        advance: Advance | None = None,
    ) -> tuple[Choice, Float[np.ndarray, "N D"]]:
        """(what the router chose, embeddings by the merged experts); the trunk is read once for both.

        `revise` may choose anew with the unit embeddings in hand; texts of which it changes the choice are embedded by that.
        """
        vectors = np.empty((len(texts), self.width), np.float32)
        choices = [router.choose(np.empty((0, len(router.weights)), np.float32))]
        for rows, states in self.states(texts):
            read = _moments(states) if router.reads == "trunk" else _unit_rows(self._run_packed(states))
            choice = router.choose(read)
            own = self._branches(states, choice.experts, choice.merged)
            if revise:
                first, choice = choice, revise(rows, choice, _unit_rows(own))
                new = np.flatnonzero(_differ(first, choice))
                own[new] = self._branches([states[row] for row in new], choice.experts[new], choice.merged[new])
            vectors[rows] = own
            choices.append(choice)
            if advance:
                advance(len(states))
        choice = Choice(*map(np.concatenate, zip(*choices, strict=True)))
        return choice, _unit_rows(vectors) if normalize else vectors

    def _reading(self, reads: Reads, x: Array, moments: Array, lengths: Array) -> np.ndarray:
        return np.asarray(moments) if reads == "trunk" else _unit_rows(self._run_base(x, lengths))

    def _run_base(self, x: Array, lengths: Array) -> np.ndarray:
        return np.asarray(_plain_branch(self.base_encoder.config, self.trunk_layers, self._params, x, lengths))

    def states(self, texts: Sequence[str]) -> Iterator[tuple[slice, list[Float[np.ndarray, "L D"]]]]:
        """What the trunk makes of texts, token by token, of as many at a time as may be held."""
        encoder = self.base_encoder
        for start in range(0, len(texts), _CHUNK):
            ids = encoder.tokenizer(texts[start : start + _CHUNK])
            for own in _held(np.array([len(each) for each in ids])):
                yield slice(start + own.start, start + own.stop), self._trunk_of(ids[own])

    def _trunk_of(self, ids: Sequence[Int[np.ndarray, "L"]]) -> list[Float[np.ndarray, "L D"]]:
        out: list[np.ndarray] = [np.empty(0)] * len(ids)

        def run(order: np.ndarray, tokens: np.ndarray, texts: np.ndarray, positions: np.ndarray) -> None:
            arrays = replicate(self.mesh, (tokens, texts, positions))
            states = np.asarray(_packed_trunk(self.base_encoder.config, self.trunk_layers, self._params, *arrays))
            for number, row in enumerate(order):
                out[row] = states[texts == number]

        every = packs(np.array([len(own) for own in ids]), _tokens_per_batch())
        self._all([partial(run, *pack.arrays(ids)) for pack in every])
        return out

    def _branches(
        self,
        states: Sequence[Float[np.ndarray, "L D"]],
        experts: Int[np.ndarray, "B S"],
        weights: Float[np.ndarray, "B S"],
    ) -> Float[np.ndarray, "B D"]:
        """Embeddings of texts by their weighted experts, from what the trunk made of them.

        A text of one expert needs no more products than the base's do if it is read with others of that expert; the rest are
        mixed in one program.
        """
        runs: list[tuple[np.ndarray, Callable[[], np.ndarray]]] = []
        for expert, rows in only_experts(experts, weights).items():
            if expert == MIXED:
                for group in few_experts(experts[rows], weights[rows]):
                    some = rows[group]
                    own = [states[row] for row in some]
                    runs.append((some, partial(self._run_mixed, own, experts[some], weights[some])))
            else:
                alone = self._folded(expert) if expert else self
                runs.append((rows, partial(alone._run_packed, [states[row] for row in rows])))
        out = np.empty((len(states), self.width), np.float32)
        for (rows, _), vectors in zip(runs, self._all([run for _, run in runs]), strict=True):
            out[rows] = vectors
        return out

    def _all(self, runs: Sequence[Callable[[], np.ndarray]]) -> list[np.ndarray]:
        """What each gives; one after another where several devices work on each together."""
        return [run() for run in runs] if self.mesh.size > 1 else side_by_side(runs)

    def _run_packed(self, states: Sequence[Float[np.ndarray, "L D"]]) -> Float[np.ndarray, "B D"]:
        """Base embeddings."""

        def run(_: Int[np.ndarray, "T"], most: int, x: Array, texts: Array) -> Array:
            return _packed_branch(self.base_encoder.config, self.trunk_layers, most, self._params, x, texts)

        return self._by_packs(states, run)

    def _run_mixed(
        self,
        states: Sequence[Float[np.ndarray, "L D"]],
        experts: Int[np.ndarray, "B S"],
        weights: Float[np.ndarray, "B S"],
    ) -> Float[np.ndarray, "B D"]:
        """Embeddings by each text's own mix."""

        def run(order: Int[np.ndarray, "T"], most: int, x: Array, texts: Array) -> Array:
            mixture = replicate(self.mesh, self._mixture(experts[order], weights[order], most))
            config, layers = self.base_encoder.config, self.trunk_layers
            return _mixed_branch(config, layers, self._params, self.bank, self._shared, x, texts, mixture)

        return self._by_packs(states, run)

    def _by_packs(
        self, states: Sequence[Float[np.ndarray, "L D"]], run: Callable[..., Float[Array, "_ D"]]
    ) -> Float[np.ndarray, "B D"]:
        """What `run` makes of texts, given their order in a pack, how many it may hold, its tokens and whose they are."""
        out = np.empty((len(states), self.width), np.float32)
        for pack in packs(np.array([len(own) for own in states]), _tokens_per_batch()):
            order, tokens, texts, _ = pack.arrays(states)
            vectors = run(order, pack.most, *replicate(self.mesh, (tokens, texts)))
            out[order] = np.asarray(vectors)[: len(order)]
        return out

    def _mixture(self, experts: Int[np.ndarray, "B S"], weights: Float[np.ndarray, "B S"], count: int) -> Mixture:
        """The mixes of texts, and of none up to `count`."""
        used = np.unique(experts[weights != 0])
        width = max(_LEAST_USED, 1 << (len(used) - 1).bit_length())
        own, shared = np.zeros((count, width), np.float32), np.zeros(count, np.float32)
        rows, slots = np.nonzero(weights)
        np.add.at(own, (rows, np.searchsorted(used, experts[rows, slots])), weights[rows, slots])
        if self._strengths is not None:
            shared = own[:, : len(used)] @ self._strengths[used]
        return Mixture(np.pad(used, (0, width - len(used))).astype(np.int32), own, shared)


def _tokens_per_batch() -> int:
    """Padded tokens that a device encodes at a time."""
    return TOKENS_PER_BATCH if jax.default_backend() == "cpu" else _TOKENS_ON_ACCELERATOR


def _differ(one: Choice, other: Choice) -> Bool[np.ndarray, "B"]:
    """Which texts two choices embed differently."""
    weights = np.zeros((2, len(one.experts), 1 + one.probabilities.shape[1]), np.float32)
    for own, choice in zip(weights, (one, other), strict=True):
        np.put_along_axis(own, choice.experts, choice.merged, axis=1)
    return np.abs(weights[0] - weights[1]).max(axis=1) >= _SAME_WEIGHT


def _held(lengths: Int[np.ndarray, "N"]) -> Iterator[slice]:
    """Neighbours in groups of at most _TOKENS_HELD tokens, or of one text."""
    start, tokens = 0, 0
    for row, length in enumerate(lengths.tolist()):
        if row > start and tokens + length > _TOKENS_HELD:
            yield slice(start, row)
            start, tokens = row, 0
        tokens += length
    yield slice(start, len(lengths))


def _moments(states: Sequence[Float[np.ndarray, "L D"]]) -> Float[np.ndarray, "B 2*D"]:
    """As `token_moments`, text by text."""
    return np.stack([np.concatenate([own.mean(axis=0), own.std(axis=0)]) for own in states])


def _unit_rows(vectors: np.ndarray) -> np.ndarray:
    return vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
