"""Which indexes a query searches, how much each weighs, and with which vector."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
from jaxtyping import Bool, Float, Int

from moeret.models.memory import Blend
from moeret.models.model import Model
from moeret.models.router import Choice, Router
from moeret.retrieval.filters import Where
from moeret.retrieval.snapshot import Snapshot
from moeret.types import BASE_EXPERT, SHARED_EXPERT, Route

LEAST_WEIGHT = 1e-6
"""Of an index that must be searched although the router's probability for it vanishes."""


@dataclass(frozen=True, slots=True)
class Plan:
    """Each query's weight of each index (0: not searched), and the vectors that given queries search an index with.

    `shares` are the weights of each query's experts, or of the base or the shared delta: so much of each one's blend counts.
    Only documents that fulfil `where` may be found.
    """

    snapshot: Snapshot
    where: Where | None
    weights: Float[np.ndarray, "Q I"]
    vectors: Callable[[str, np.ndarray], Float[np.ndarray, "_ D"]]
    shares: list[dict[str, float]]
    routes: list[Route]

    def of(self, rows: Int[np.ndarray, "_"]) -> "Plan":
        """The plan of some of the queries."""
        shares = [self.shares[row] for row in rows]
        return dataclasses.replace(
            self,
            weights=self.weights[rows],
            vectors=lambda name, own: self.vectors(name, rows[own]),
            shares=shares,
            routes=[],
        )

    def blend(self, row: int, name: str, blends: Mapping[str, Blend]) -> Blend:
        """What counts beside the cosine for a query in an index: its words everywhere alike, the memory of its expert there."""
        shares = self.shares[row]
        wanted = {expert: blends.get(expert, Blend()) for expert in (*shares, name)}
        return Blend(
            sum(wanted[expert].lexical * share for expert, share in shares.items()),
            wanted[name].memory * shares.get(name, 0.0),
        )


def make_plan(
    model: Model,
    snapshot: Snapshot,
    texts: list[str],
    route: str,
    *,
    experts: int | None = None,
    strange_limit: float | None = None,
    where: Where | None = None,
) -> Plan:
    """Decides for every query which indexes it searches, how much each weighs, and with which vector."""
    count, names = len(texts), snapshot.names
    everywhere, plan = np.ones((count, len(names)), np.float32), partial(Plan, snapshot, where)
    if route not in ("auto", "all"):
        here = [route in (BASE_EXPERT, SHARED_EXPERT, name) for name in names]
        vectors = model.embedder.mixed(texts, *model.mixture(route, count))
        return plan(everywhere * np.array(here, np.float32), one_vector(vectors), [{route: 1.0}] * count, [])
    router = dataclasses.replace(model.query_router, slots=experts) if experts else model.query_router
    if model.tower == "query":
        choice, merged, strangeness = _routed(model, snapshot, texts, router)
    else:
        choice, merged = model.embedder.routed(texts, router)
    routes = model.routes(choice)
    shares = [own.experts or {BASE_EXPERT: 1.0} for own in routes]
    chosen = np.array([[own.experts.get(name, 0.0) for name in names] for own in routes], np.float32)
    if model.tower == "query":
        strange = strangeness > (np.inf if strange_limit is None else strange_limit)
        weights = everywhere if route == "all" else _reached(names, chosen, strange)
        return plan(weights, one_vector(merged), shares, routes)
    even = 1 / (1 + len(model.experts))
    by_chance = np.array([[own.probabilities.get(name, even) for name in names] for own in routes], np.float32)
    weights = everywhere if route == "all" else _in_own_spaces(names, chosen, by_chance)

    def own_vectors(name: str, rows: np.ndarray) -> Float[np.ndarray, "Q D"]:
        return model.embedder.mixed([texts[row] for row in rows], *model.mixture(name, len(rows)))

    return plan(weights, own_vectors, shares, routes)


def _routed(
    model: Model, snapshot: Snapshot, texts: Sequence[str], router: Router
) -> tuple[Choice, Float[np.ndarray, "Q D"], Float[np.ndarray, "Q"]]:
    """What the router chooses with the index's evidence, the vectors, and how strange queries are.

    A query is embedded as the router alone has it, and again where the evidence changes that much.
    """
    router = dataclasses.replace(router, familiarity=None)
    strangeness = np.empty(len(texts), np.float32)

    def revise(rows: slice, first: Choice, vectors: np.ndarray) -> Choice:
        probabilities, strangeness[rows] = snapshot.evidence.weigh(vectors, first.probabilities)
        return router.pick(probabilities)

    choice, vectors = model.embedder.routed(texts, router, revise=revise)
    return choice, vectors, strangeness


def _reached(
    names: list[str], chosen: Float[np.ndarray, "Q I"], strange: Bool[np.ndarray, "Q"]
) -> Float[np.ndarray, "Q I"]:
    """The weights of the chosen indexes, and of the base's own for strange queries; of all where none is chosen."""
    weights = np.where(chosen.any(axis=1, keepdims=True), chosen, 1.0).astype(np.float32)
    if BASE_EXPERT in names:
        mean = weights.sum(axis=1) / (weights > 0).sum(axis=1)
        base = names.index(BASE_EXPERT)
        weights[:, base] = np.where(strange, mean, weights[:, base])
    return weights


def _in_own_spaces(
    names: list[str], chosen: Float[np.ndarray, "Q I"], by_chance: Float[np.ndarray, "Q I"]
) -> Float[np.ndarray, "Q I"]:
    """The weights where no promise can be compared: of the chosen indexes and the base's own, or of all by probability."""
    is_base = np.array([name == BASE_EXPERT for name in names])
    mean = chosen.sum(axis=1, keepdims=True) / np.maximum((chosen > 0).sum(axis=1, keepdims=True), 1)
    return np.where(
        chosen.any(axis=1, keepdims=True), np.where(is_base, mean, chosen), np.maximum(by_chance, LEAST_WEIGHT)
    )


def one_vector(vectors: Float[np.ndarray, "Q D"]) -> Callable[[str, np.ndarray], Float[np.ndarray, "_ D"]]:
    """Each query searches every index with the same vector."""
    return lambda name, rows: vectors[rows]
