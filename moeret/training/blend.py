"""How much words and memory count beside the cosine: chosen on dev, for each expert, the shared delta and the base.

A query is judged in its own domain's index, as it is searched where the router is right.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from moeret.data.lexical import Lexical, stems
from moeret.models.memory import NEIGHBOURS, Blend, Memory, digest, remembered
from moeret.training.prepare import Prepared
from moeret.training.routing import DevSet, own_ndcg
from moeret.training.strength import harmless

LEXICAL = (0.0, 0.0025, 0.005, 0.01, 0.02, 0.04)
"""Weights tried for BM25, which reaches 10 to 30 for the best document of a query."""
MEMORY = (0.0, 0.1, 0.2, 0.4, 0.8, 1.6, 3.2)
"""Weights tried for the memory, whose values are differences of cosines."""
MOST_QUERIES = 65_536
"""Train queries that a memory keeps at most."""

Vectors = Float[np.ndarray, "Q D"]


class Blended(NamedTuple):
    """What one expert was found to want, and its dev nDCG@10 in its own index without and with that."""

    blend: Blend
    memory: Memory | None
    cosine_dev: float
    dev: float


class DevBlends:
    """Dev queries, and what the words of their domains' documents say of them."""

    def __init__(self, data: Prepared):
        self._data = data
        self._lexical = [
            _lexical(own, [document.contents for document in domain.corpus])
            for own, domain in zip(data.dev, data.domains, strict=True)
        ]

    def of_expert(self, number: int, queries: Vectors, encode: Callable[[Sequence[str]], Vectors]) -> Blended:
        """The blend with the best dev nDCG@10 of a domain's expert, of which neither seen nor unseen queries suffer.

        `queries` are its dev queries' unit vectors by the expert, which `encode` embeds its train queries with.
        """
        own, lexical = self._data.dev[number], self._lexical[number]
        memory = _memory(self._data, number, encode)
        cosine, recalled = queries @ self._data.pool[own.documents].T, self._recall(number, queries, memory)
        best = before = own_ndcg(own, cosine)
        blend = Blend()
        for tried in (Blend(words, remember) for words in LEXICAL for remember in MEMORY):
            values = own_ndcg(own, cosine + np.float32(tried.lexical) * lexical + np.float32(tried.memory) * recalled)
            if values.mean() > best.mean() and harmless(values, before, own.seen):
                best, blend = values, tried
        return Blended(blend, memory if blend.memory else None, float(before.mean()), float(best.mean()))

    def of_one(self, queries: Sequence[Vectors]) -> Blend:
        """How much words count for a model that serves all domains (and remembers none): the best mean over them."""

        def mean(weight: float) -> float:
            return float(
                np.mean(
                    [
                        own_ndcg(own, vectors @ self._data.pool[own.documents].T + np.float32(weight) * lexical).mean()
                        for own, vectors, lexical in zip(self._data.dev, queries, self._lexical, strict=True)
                    ]
                )
            )

        return Blend(max(LEXICAL, key=mean))

    def _recall(self, number: int, queries: Vectors, memory: Memory) -> Float[np.ndarray, "Q N"]:
        """What a domain's memory says of each of its documents for each dev query."""
        place = {digest(document.contents): row for row, document in enumerate(self._data.domains[number].corpus)}
        rows = np.array([place[bytes(own)] for own in memory.documents])
        scores = queries @ memory.queries.astype(np.float32).T
        nearest = np.argsort(-scores, axis=1, kind="stable")[:, :NEIGHBOURS]
        out = np.zeros((len(queries), len(self._data.dev[number].documents)), np.float32)
        for query, found in enumerate(nearest):
            answers, values = remembered(found, scores[query, found], memory.offsets, rows)
            out[query, answers] = values
        return out


def _lexical(own: DevSet, contents: Sequence[str]) -> Float[np.ndarray, "Q N"]:
    """BM25 of a domain's documents for its dev queries."""
    words = Lexical.of(contents)
    return np.stack([words.scores(query) for query in stems([*own.judged.queries.values()])])


def _memory(data: Prepared, number: int, encode: Callable[[Sequence[str]], Vectors]) -> Memory:
    """A domain's train queries, or as many of them as a memory keeps."""
    split, corpus = data.domains[number].splits["train"], data.domains[number].corpus
    queries = [*split.queries.values()]
    kept = np.sort(np.random.default_rng(0).permutation(len(queries))[:MOST_QUERIES])
    first = int(data.dev[number].documents[0])
    answers = [data.sets[number].positives[row] - first for row in kept]
    contents = [digest(corpus[row].contents) for own in answers for row in own]
    return Memory(
        encode([queries[row] for row in kept]).astype(np.float16),
        np.cumsum([0, *map(len, answers)]),
        np.frombuffer(b"".join(contents), np.uint8).reshape(-1, 16),
    )
