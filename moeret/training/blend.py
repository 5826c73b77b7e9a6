"""How much words and memory count beside the cosine: chosen on dev, for each expert, the shared delta and the base.

A query is judged in its own domain's index, as it is searched where the router is right.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

from moeret.data.beir import Domain
from moeret.data.lexical import Counts, Lexical, Statistics, best, stems
from moeret.models.memory import CANDIDATES, NEIGHBOURS, Blend, Memory, remembered
from moeret.training.prepare import Prepared
from moeret.training.routing import DevSet, ndcg_of
from moeret.training.strength import harmless

LEXICAL = (0.0, 0.0025, 0.005, 0.01, 0.02, 0.04)
"""Weights tried for BM25, which reaches 10 to 30 for the best document of a query."""
MEMORY = (0.0, 0.1, 0.2, 0.4, 0.8, 1.6, 3.2)
"""Weights tried for the memory, whose values are differences of cosines."""
MOST_QUERIES = 65_536
"""Train queries of a domain that a memory keeps at most."""
_PADDING = -4.0  # below any score, and below what counts as found

Vectors = Float[np.ndarray, "Q D"]


class Blended(NamedTuple):
    """What one expert was found to want, and its dev nDCG@10 in its own index without and with that."""

    blend: Blend
    memory: Memory | None
    cosine_dev: float
    dev: float


@dataclass(frozen=True, slots=True)
class _Candidates:
    """Of each dev query its candidates' rows, counted from its domain's first, and what speaks for each; padded."""

    rows: Int[np.ndarray, "Q K"]
    cosine: Float[np.ndarray, "Q K"]
    bm25: Float[np.ndarray, "Q K"]
    recalled: Float[np.ndarray, "Q K"]

    def ndcg(self, own: DevSet, blend: Blend) -> Float[np.ndarray, "Q"]:
        """Each dev query's nDCG@10 with a blend."""
        scores = blend.scores(self.cosine, self.bm25, self.recalled)
        top = np.argsort(-scores, axis=1, kind="stable")[:, :10]
        return ndcg_of(own, np.take_along_axis(self.rows, top, axis=1), np.take_along_axis(scores, top, axis=1))


class DevBlends:
    """Chooses blends by the dev queries of prepared domains, whose words it has counted."""

    def __init__(self, data: Prepared):
        self._data = data
        counts = [Counts.of([document.contents for document in domain.corpus]) for domain in data.domains]
        together = Statistics.of((own, np.ones(len(own.lengths), bool)) for own in counts)
        self._lexical = [Lexical(own, together) for own in counts]
        self._words = [stems([*own.judged.queries.values()]) for own in data.dev]

    def of_expert(self, number: int, queries: Vectors, encode: Callable[[Sequence[str]], Vectors]) -> Blended:
        """The blend with the best dev nDCG@10 of a domain's expert, of which neither seen nor unseen queries suffer.

        `queries` are its dev queries' unit vectors by the expert, which `encode` embeds its train queries with.
        """
        own, memory = self._data.dev[number], remember([self._data.domains[number]], encode)
        candidates = self._candidates(number, queries, memory)
        before = highest = candidates.ndcg(own, Blend())
        blend = Blend()
        for tried in (Blend(lexical, remember) for lexical in LEXICAL for remember in MEMORY):
            values = candidates.ndcg(own, tried)
            if values.mean() > highest.mean() and harmless(values, before, own.seen):
                highest, blend = values, tried
        return Blended(blend, memory if blend.memory else None, float(before.mean()), float(highest.mean()))

    def of_one(self, queries: Sequence[Vectors]) -> Blend:
        """How much words count for a model that serves all domains (and remembers none): the best mean over them."""
        candidates = [self._candidates(number, vectors) for number, vectors in enumerate(queries)]

        def mean(blend: Blend) -> float:
            return float(
                np.mean([each.ndcg(own, blend).mean() for own, each in zip(self._data.dev, candidates, strict=True)])
            )

        return max(map(Blend, LEXICAL), key=mean)

    def _candidates(self, number: int, queries: Vectors, memory: Memory | None = None) -> _Candidates:
        """What each of a domain's dev queries finds in its own index by vector, by words, and in a memory."""
        documents = self._data.pool[self._data.dev[number].documents]
        if memory is not None:
            offsets, rows = memory.answers([document.contents for document in self._data.domains[number].corpus])
            known = memory.queries.astype(np.float32)
        found = []
        for vector, words in zip(queries, self._words[number], strict=True):
            cosine, bm25 = documents @ vector, self._lexical[number].scores(words)
            recalled = np.zeros_like(cosine)
            if memory is not None:
                near = known @ vector
                nearest = np.argsort(-near, kind="stable")[:NEIGHBOURS]
                answers, values = remembered(nearest, near[nearest], offsets, rows)
                recalled[answers] = values
            close = np.argpartition(-cosine, min(CANDIDATES, len(cosine)) - 1)[:CANDIDATES]
            own = np.unique(np.concatenate([close, best(bm25, CANDIDATES), np.flatnonzero(recalled)]))
            found.append((own, cosine[own], bm25[own], recalled[own]))
        width = max(len(own) for own, *_ in found)
        return _Candidates(
            *(
                np.stack([np.pad(own, (0, width - len(own)), constant_values=filler) for own in column])
                for column, filler in zip(zip(*found, strict=True), (-1, _PADDING, 0.0, 0.0), strict=True)
            )
        )


def remember(domains: Sequence[Domain], encode: Callable[[Sequence[str]], Vectors]) -> Memory:
    """The train queries of domains, or as many of each as a memory keeps, and what they were answered with."""
    texts, answers = [], []
    for domain in domains:
        split, contents = domain.splits["train"], {document.id: document.contents for document in domain.corpus}
        queries = [*split.queries]
        for row in np.sort(np.random.default_rng(0).permutation(len(queries))[:MOST_QUERIES]):
            texts.append(split.queries[queries[row]])
            answers.append([contents[id] for id, score in split.qrels[queries[row]].items() if score > 0])
    return Memory.of(encode(texts), answers)
