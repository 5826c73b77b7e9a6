"""Texts to vectors: length-bucketed, compiled inference through the base and its experts."""

import copy
import dataclasses
import hashlib
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from moeret import artifact
from moeret.data.buckets import length_batches, pad, power_of_four, standard_edges
from moeret.errors import ArtifactError
from moeret.models.encoder import EncoderConfig, cast_kernels, matrix_shapes, token_moments, with_params
from moeret.models.experts import Bank, Mixture, Shared, fold, gather, take, trunk_layers
from moeret.models.pretrained import Base
from moeret.models.router import Choice, Reads, Router
from moeret.processes import is_mine, wait_for_all
from moeret.progress import Advance

_CHUNK = 2048
"""Texts tokenised, embedded and cached at a time."""
_MANY = 64
"""Texts of one expert that need no regrouping."""
_TOKENS_HELD = 2**16
"""Padded tokens whose hidden states wait for their experts at most."""
_FOLDED_BYTES = 2**30
"""What the matrices of experts may take that are kept with their deltas added."""


@jax.jit(static_argnames=("encoder", "layers"))
def _trunk(
    encoder: EncoderConfig, layers: int, params, ids: Int[Array, "B L"], lengths: Int[Array, "B"]
) -> tuple[Float[Array, "B L D"], Float[Array, "B 2*D"]]:
    x = with_params(encoder, params).trunk(ids, lengths, layers)
    return x, token_moments(x, lengths)


@jax.jit(static_argnames=("encoder", "layers"))
def _branch(
    encoder: EncoderConfig,
    layers: int,
    params,
    bank: Bank,
    shared: Bank | None,
    x: Float[Array, "B L D"],
    lengths: Int[Array, "B"],
    mixture: Mixture,
) -> Float[Array, "B D"]:
    return with_params(encoder, params).branch(x, lengths, layers, gather(bank, shared, mixture))


@jax.jit(static_argnames=("encoder", "layers"))
def _plain_branch(
    encoder: EncoderConfig, layers: int, params, x: Float[Array, "B L D"], lengths: Int[Array, "B"]
) -> Float[Array, "B D"]:
    return with_params(encoder, params).branch(x, lengths, layers, {})


class Hidden(NamedTuple):
    """A batch of texts after the trunk: which ones, their tokens' hidden states, these' moments, and how many each has."""

    rows: Int[np.ndarray, "B"]
    x: Float[Array, "S L D"]  # S >= B
    moments: Float[Array, "S 2*D"]
    lengths: Int[Array, "S"]


class Embedder:
    """Embeds texts with the base and any mix of the bank's experts (expert 0, the base, in front)."""

    def __init__(self, base: Base, bank: Bank, shared: Shared | None = None):
        self.base_encoder = base
        self._params, self._precision = base.params, jnp.dtype(jnp.float32)
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

    def alone(self, expert: int) -> "Embedder":
        """One expert, merged with its part of the shared delta, as a base of its own.

        Its delta is added to the matrices once, and what runs are the base's own programs.
        """
        params = fold(self.base_encoder.params, take(self.bank, expert))
        if self._shared is not None:
            params = fold(params, self._shared, float(self._strengths[expert]))
        encoder = dataclasses.replace(self.base_encoder, params=params)
        nothing = jax.tree.map(lambda leaf: leaf[:1], self.bank)
        return Embedder(encoder, nothing).in_precision(self._precision)

    def _set(self, bank: Bank, shared: Shared | None) -> None:
        self.bank, self.trunk_layers = jax.device_put(bank), trunk_layers(bank, self.base_encoder.config)
        self._shared = None if shared is None else jax.device_put(shared.delta)
        self._strengths = None if shared is None else shared.strengths
        self._kept: dict[int, Embedder] = {}

    def _folded(self, expert: int) -> "Embedder":
        """`alone`, kept for the next time where there is room."""
        found = self._kept.get(expert)
        if found is None:
            shapes = matrix_shapes(self.base_encoder.config)
            size = 4 * sum(math.prod(shapes[name]) for matrices in self.bank.values() for name in matrices)
            while self._kept and (len(self._kept) + 1) * size > _FOLDED_BYTES:
                self._kept.pop(next(iter(self._kept)), None)
            found = self._kept[expert] = self.alone(expert)
        return found

    def base(
        self, texts: Sequence[str], *, normalize: bool = True, advance: Advance | None = None
    ) -> Float[np.ndarray, "N D"]:
        """Base embeddings; `advance` is called with the number of texts done."""
        return self.base_of(self.hidden(texts), len(texts), normalize=normalize, advance=advance)

    def hidden(self, texts: Sequence[str]) -> Iterator[Hidden]:
        """What the trunk makes of texts, batch by batch: the same for the base and every expert."""
        encoder = self.base_encoder
        for start in range(0, len(texts), _CHUNK):
            ids = encoder.tokenizer(texts[start : start + _CHUNK])
            counts = np.array([len(own) for own in ids])
            edges = standard_edges(encoder.tokenizer.max_length, int(counts.sum()))
            for batch in length_batches(counts, edges):
                padded, lengths = jax.device_put(pad(ids, batch))
                x, moments = _trunk(encoder.config, self.trunk_layers, self._params, padded, lengths)
                yield Hidden(start + batch.rows, x, moments, lengths)

    def base_of(
        self, hidden: Iterable[Hidden], count: int, *, normalize: bool = True, advance: Advance | None = None
    ) -> Float[np.ndarray, "N D"]:
        """Base embeddings of `count` texts from what the trunk made of them."""
        out = np.empty((count, self.width), np.float32)
        for rows, x, _, lengths in hidden:
            out[rows] = self._run_base(x, lengths)[: len(rows)]
            if advance:
                advance(len(rows))
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
        for held in _together(self.hidden(texts)):
            rows = np.concatenate([own.rows for own in held])
            out[rows] = self._branches(held, experts[rows], weights[rows])
            if advance:
                advance(len(rows))
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
        normalize: bool = True,
        advance: Advance | None = None,
    ) -> tuple[Choice, Float[np.ndarray, "N D"]]:
        """(what the router chose, embeddings by the merged experts); the trunk is read once for both."""
        merged = np.empty((len(texts), self.width), np.float32)
        order, choices = [np.empty(0, np.int64)], [router.choose(np.empty((0, len(router.weights)), np.float32))]
        for held in _together(self.hidden(texts)):
            rows = np.concatenate([own.rows for own in held])
            readings = [self._reading(router.reads, *own[1:])[: len(own.rows)] for own in held]
            choice = router.choose(np.concatenate(readings))
            merged[rows] = self._branches(held, choice.experts, choice.weights)
            order.append(rows)
            choices.append(choice)
            if advance:
                advance(len(rows))
        back = np.argsort(np.concatenate(order))
        choice = Choice(*(np.concatenate(field)[back] for field in zip(*choices, strict=True)))
        return choice, _unit_rows(merged) if normalize else merged

    def _reading(self, reads: Reads, x: Array, moments: Array, lengths: Array) -> np.ndarray:
        return np.asarray(moments) if reads == "trunk" else _unit_rows(self._run_base(x, lengths))

    def _run_base(self, x: Array, lengths: Array) -> np.ndarray:
        return np.asarray(_plain_branch(self.base_encoder.config, self.trunk_layers, self._params, x, lengths))

    def _branches(
        self, held: Sequence[Hidden], experts: Int[np.ndarray, "B S"], weights: Float[np.ndarray, "B S"]
    ) -> Float[np.ndarray, "B D"]:
        """Embeddings of batches of texts, one after another, by their weighted experts.

        A text of one expert needs no more products than the base's do if it is read with others of that expert; the rest are
        mixed in one program.
        """
        by = _only_experts(experts, weights)
        if len(held) == 1 and len(by) == 1:
            (_, x, _, lengths), [expert] = held[0], by
            return self._run(expert, x, lengths, experts, weights)
        counts = np.concatenate([np.asarray(own.lengths)[: len(own.rows)] for own in held])
        states = [own for batch in held for own in np.asarray(batch.x)[: len(batch.rows)]]
        edges = sorted({own.x.shape[1] for own in held})
        out = np.empty((len(counts), self.width), np.float32)
        for expert, rows in by.items():
            for batch in length_batches(counts[rows], edges):
                own = rows[batch.rows]
                x = np.zeros((batch.size, batch.edge, self.width), np.float32)
                for place, row in enumerate(own):
                    x[place, : counts[row]] = states[row][: counts[row]]
                lengths = np.pad(counts[own], (0, batch.size - len(own)), constant_values=1)
                out[own] = self._run(expert, x, lengths, experts[own], weights[own])
        return out

    def _run(
        self, expert: int, x: Array, lengths: Array, experts: Int[np.ndarray, "B S"], weights: Float[np.ndarray, "B S"]
    ) -> Float[np.ndarray, "B D"]:
        """Embeddings by one expert, or by each row's own mix."""
        if expert == _MIXED:
            return self._run_branch(x, lengths, experts, weights)[: len(experts)]
        encoder = self._folded(expert) if expert else self
        return encoder._run_base(x, lengths)[: len(experts)]

    def _run_branch(self, x: Array, lengths: Array, experts: np.ndarray, weights: np.ndarray) -> np.ndarray:
        used = np.unique(experts[weights != 0])
        width = max(4, power_of_four(len(used)))
        own, shared = np.zeros((x.shape[0], width), np.float32), np.zeros(x.shape[0], np.float32)
        rows, slots = np.nonzero(weights)
        np.add.at(own, (rows, np.searchsorted(used, experts[rows, slots])), weights[rows, slots])
        if self._strengths is not None:
            shared = own[:, : len(used)] @ self._strengths[used]
        mixture = jax.device_put(Mixture(np.pad(used, (0, width - len(used))).astype(np.int32), own, shared))
        return np.asarray(
            _branch(
                self.base_encoder.config, self.trunk_layers, self._params, self.bank, self._shared, x, lengths, mixture
            )
        )


_MIXED = -1


def _only_experts(
    experts: Int[np.ndarray, "B S"], weights: Float[np.ndarray, "B S"]
) -> dict[int, Int[np.ndarray, "_"]]:
    """The rows that use just one expert, wholly, by that expert (0 also for none), and the others as _MIXED."""
    first = np.argmax(weights, axis=1)
    best = np.take_along_axis(weights, first[:, None], axis=1)[:, 0]
    one = (weights != 0).sum(axis=1) == 1
    only = np.take_along_axis(experts, first[:, None], axis=1)[:, 0]
    only = np.where(one & (best == 1), only, np.where(weights.any(axis=1), _MIXED, 0))
    return {expert: np.flatnonzero(only == expert) for expert in np.unique(only).tolist()}


def _together(batches: Iterable[Hidden]) -> Iterator[list[Hidden]]:
    """Batches in groups whose hidden states may be held at once."""
    held: list[Hidden] = []
    for batch in batches:
        held.append(batch)
        if sum(own.x.shape[0] * own.x.shape[1] for own in held) >= _TOKENS_HELD:
            yield held
            held = []
    if held:
        yield held


def _unit_rows(vectors: np.ndarray) -> np.ndarray:
    return vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)


def cached_vectors(
    embed: Callable[[Sequence[str]], np.ndarray],
    texts: Sequence[str],
    width: int,
    folders: Sequence[Path],
    key: str,
    advance: Advance,
) -> Float[np.ndarray, "N D"]:
    """`embed(texts)` in chunks kept on disk, so that a killed job loses one chunk and a second job none.

    A chunk is found in any of `folders` by a hash of `key` (which names the encoder) and its texts, checked by its own
    digest, and written to the first of them. Where several processes want the same texts, each embeds some of the chunks.
    `advance` is called for chunks that are found; `embed` reports its own.

    Raises:
      ArtifactError: another process wrote a chunk to where this one does not see it.
    """
    folders[0].mkdir(parents=True, exist_ok=True)
    out = np.empty((len(texts), width), np.float32)
    elsewhere = []
    for number, start in enumerate(range(0, len(texts), _CHUNK)):
        chunk = texts[start : start + _CHUNK]
        name = f"{artifact.fingerprint([key, list(chunk)])}.vectors"
        vectors = next(
            (v for folder in folders if (v := _read_chunk(folder / name, len(chunk), width)) is not None), None
        )
        if vectors is None and not is_mine(number):
            elsewhere.append((name, start, len(chunk)))
            continue
        if vectors is None:
            vectors = np.ascontiguousarray(embed(chunk), np.float32)
            raw = vectors.tobytes()
            artifact.write_atomically(folders[0] / name, hashlib.sha256(raw).digest() + raw)
        else:
            advance(len(chunk))
        out[start : start + len(chunk)] = vectors
    wait_for_all("vectors")
    for name, start, count in elsewhere:
        vectors = _read_chunk(folders[0] / name, count, width)
        if vectors is None:
            raise ArtifactError(
                f"another process made {folders[0] / name}, but it is not there; give all the same folder"
            )
        out[start : start + count] = vectors
        advance(count)
    return out


def _read_chunk(path: Path, rows: int, width: int) -> Float[np.ndarray, "N D"] | None:
    """A kept chunk, or None where there is none that is whole."""
    if not path.is_file():
        return None
    raw = path.read_bytes()
    if len(raw) != 32 + 4 * rows * width or hashlib.sha256(raw[32:]).digest() != raw[:32]:
        return None
    return np.frombuffer(raw, np.float32, offset=32).reshape(rows, width)
