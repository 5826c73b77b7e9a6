"""What differs between training the query tower alone and both towers: how experts are judged on dev."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Float, Int

from moeret.models.embed import Embedder
from moeret.models.experts import Bank, Shared, with_base
from moeret.training.calibration import fit_logistic
from moeret.training.prepare import Prepared
from moeret.training.routing import DevSet, dev_ndcg

CANDIDATES = 10
"""Both towers: dev searches among the judged documents and this many of the base's best for each dev query."""


LEAST_QUERIES = 10
"""Seen or unseen dev queries that there must be for their mean to say anything."""

Values = list[Float[np.ndarray, "Q"]]
"""Each domain's dev queries' nDCG@10; empty for an expert that was not asked for."""


def by_group(values: Values, seen: Sequence[Bool[np.ndarray, "Q"]]) -> Float[np.ndarray, "E 3"]:
    """Each domain's mean over all dev queries, the seen ones and the unseen ones.

    NaN for a group of too few, 0 for a domain without values.
    """

    def row(own: np.ndarray, mask: np.ndarray) -> list[float]:
        groups = (own[chosen] if chosen.sum() >= LEAST_QUERIES else np.array([np.nan]) for chosen in (mask, ~mask))
        return [own.mean(), *(group.mean() for group in groups)]

    rows = [row(own, mask) if len(own) else [0.0] * 3 for own, mask in zip(values, seen, strict=True)]
    return np.array(rows, np.float32)


class QueryTower:
    """Documents stay where the base put them: dev is exact search over the pool of all domains."""

    document_ids = None

    def __init__(self, data: Prepared, embedder: Embedder):
        self._data, self._embedder = data, embedder
        self._hidden = [[*embedder.hidden(own.texts)] for own in data.dev]
        self.seen = [own.seen for own in data.dev]

    def base(self) -> Values:
        """What the base scores on each domain's dev queries."""
        return [dev_ndcg(own, own.vectors, self._data.pool) for own in self._data.dev]

    def values(self, bank: Bank, active: Bool[np.ndarray, "E"], shared: Shared | None = None) -> Values:
        """What each active expert scores on its domain's dev queries."""
        embedder = self._embedder.with_bank(with_base(bank), shared)
        return [
            self._score(embedder.alone(number + 1), number) if on else np.empty(0) for number, on in enumerate(active)
        ]

    def values_of_one(self, bank: Bank) -> Values:
        """What the only expert of a bank scores on every domain's dev queries."""
        embedder = self._embedder.with_bank(with_base(bank)).alone(1)
        return [self._score(embedder, number) for number in range(len(self._data.dev))]

    def _score(self, embedder: Embedder, number: int) -> Float[np.ndarray, "Q"]:
        own = self._data.dev[number]
        return dev_ndcg(own, embedder.base_of(self._hidden[number], len(own.texts)), self._data.pool)

    def calibration(self, bank: Bank) -> list[None]:
        """One document space needs none, neither for the base nor for its experts."""
        return [None] * (1 + len(self._data.dev))


def mean_over_domains(table: Float[np.ndarray, "E 3"]) -> Float[np.ndarray, "1 3"]:
    """Every domain weighs the same; NaN for a group that no domain has enough of."""
    has = ~np.isnan(table)
    counts = has.sum(axis=0)
    return np.where(counts > 0, np.where(has, table, 0).sum(axis=0) / np.maximum(counts, 1), np.nan)[None]


class BothTowers:
    """An expert encodes its documents too: dev is exact search among its domain's candidates, encoded anew at each look."""

    def __init__(self, data: Prepared, embedder: Embedder):
        self._embedder = embedder
        base = embedder.base_encoder
        texts = [base.prompts["document"] + document.contents for domain in data.domains for document in domain.corpus]
        self.document_ids = base.tokenizer(texts)
        self._dev = []
        for own in data.dev:
            candidates = _candidates(own, data.pool)
            first = int(own.documents[0])
            ids = [own.ids[row - first] for row in candidates]
            small = DevSet(own.judged, own.texts, own.readings, np.arange(len(ids)), ids, own.seen)
            self._dev.append((small, [texts[row] for row in candidates]))

        self.seen = [own.seen for own, _ in self._dev]

    def base(self) -> Values:
        """What the base scores on each domain's dev queries among their candidates."""
        return [dev_ndcg(own, own.vectors, self._embedder.base(texts)) for own, texts in self._dev]

    def values(self, bank: Bank, active: Bool[np.ndarray, "E"], shared: Shared | None = None) -> Values:
        """What each active expert scores on its domain's dev queries among their candidates."""
        assert shared is None  # there is one document space only where documents stay the base's
        return [
            dev_ndcg(own, *self._encoded(bank, number)) if on else np.empty(0)
            for number, ((own, _), on) in enumerate(zip(self._dev, active, strict=True))
        ]

    def calibration(self, bank: Bank) -> list[tuple[float, float]]:
        """(slope, intercept) of the base, then of each expert: scores against relevance, for dev queries' best candidates."""
        own = [self._shown(number, *self._encoded(bank, number)) for number in range(len(self._dev))]
        base = [
            self._shown(number, dev.vectors, self._embedder.base(texts))
            for number, (dev, texts) in enumerate(self._dev)
        ]
        return [fit_logistic(*map(np.concatenate, zip(*base, strict=True))), *(fit_logistic(*shown) for shown in own)]

    def _shown(
        self, number: int, queries: Float[np.ndarray, "Q D"], documents: Float[np.ndarray, "C D"]
    ) -> tuple[Float[np.ndarray, "K"], Bool[np.ndarray, "K"]]:
        """(score, relevant) of each dev query's relevant documents and of its best candidates."""
        own, scores = self._dev[number][0], queries @ documents.T
        relevant = np.array([[judged.get(id, 0) > 0 for id in own.ids] for judged in own.judged.qrels.values()])
        depth = min(CANDIDATES, scores.shape[1])
        shown = relevant | (scores >= np.partition(scores, -depth, axis=1)[:, [-depth]])
        return scores[shown], relevant[shown]

    def _encoded(self, bank: Bank, number: int) -> tuple[Float[np.ndarray, "Q D"], Float[np.ndarray, "C D"]]:
        """An expert's dev queries and their candidates."""
        own, texts = self._dev[number]
        embedder = self._embedder.with_bank(with_base(bank)).alone(1 + number)
        return embedder.base(own.texts), embedder.base(texts)


def _candidates(dev: DevSet, pool: Float[np.ndarray, "N D"]) -> Int[np.ndarray, "C"]:
    """Rows of the pool: every judged document of the dev queries, and the base's best of the domain for each."""
    first, own = int(dev.documents[0]), pool[dev.documents]
    place = {id: row for row, id in enumerate(dev.ids)}
    rows = {place[id] for documents in dev.judged.qrels.values() for id in documents}
    depth = min(CANDIDATES, len(own))
    for vector in dev.vectors:
        rows.update(np.argpartition(-(own @ vector), depth - 1)[:depth].tolist())
    return first + np.array(sorted(rows))
