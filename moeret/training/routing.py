"""Fitting routers, and deciding on dev which one to use and how cautious it is.

Candidates are the nearest centroids and a learned linear router, each calibrated on dev. What is compared is dev nDCG@10 of
routed search in the chosen experts' indexes, over all domains' documents. Where documents live in their experts' own spaces
that would mean encoding them all again, so there dev accuracy decides.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool, Float, Int

from moeret import metrics
from moeret.data.beir import Judged
from moeret.models.embed import Embedder
from moeret.models.familiarity import balanced_moments, fit_familiarity
from moeret.models.router import Choice, Reads, Router, centroid_router, part

MINIMA, INDIFFERENT = (0.3, 0.1, 0.03, 0.01), 0.001
"""Least probabilities tried for an expert to be used. The first, which searches fewest, whose dev nDCG@10 is within so little
of the best is taken."""
UNFAMILIAR_QUERIES, UNFAMILIAR_DOCUMENTS = 0.02, 0.1
"""Share of dev, or of held-out documents, that may count as of no known domain. Retrieval corrects both: by what the indexes
promise a query, and by searching other indexes for a document."""
TAKEN, LOWERED = 0.01, 3.0
"""Share of another expert's dev queries that the router may give to one that was added later, and how much at most is taken off
its log-odds for that."""
_STEPS, _L2 = 200, 1e-5
_UNSEARCHED = -2.0  # below any cosine


@dataclass(frozen=True, slots=True)
class DevSet:
    """One domain's dev queries, for routed search over the pool of all documents."""

    judged: Judged
    texts: list[str]
    readings: Float[np.ndarray, "Q 3*D"]
    documents: Int[np.ndarray, "N"]  # the domain's rows of the pool
    ids: list[str]  # their document ids
    seen: Bool[np.ndarray, "Q"]  # whether a relevant document of the query was a training positive

    @property
    def vectors(self) -> Float[np.ndarray, "Q D"]:
        """Unit base vectors of the queries."""
        return part(self.readings, "base")


def fit_learned(vectors: Sequence[Float[np.ndarray, "_ D"]], reads: Reads) -> Router:
    """Multinomial logistic regression; every expert weighs the same, however many queries it has.

    L-BFGS on the whole set (optax) with a small L2 penalty, on features scaled to mean 0 and variance 1 / D.
    """
    center, spread = balanced_moments(vectors)
    spread = spread * np.float32(np.sqrt(len(center)))
    features = jnp.asarray((np.concatenate(vectors) - center) / spread)
    labels = jnp.asarray(np.repeat(np.arange(len(vectors)), [len(own) for own in vectors]))
    balance = jnp.asarray(
        np.concatenate([np.full(len(own), 1 / len(own) / len(vectors), np.float32) for own in vectors])
    )

    def loss(params: dict[str, Array]) -> Float[Array, ""]:
        scores = features @ params["weights"] + params["bias"][None]
        losses = optax.losses.softmax_cross_entropy_with_integer_labels(scores, labels)
        return (losses * balance).sum() + _L2 * (params["weights"] ** 2).sum()

    solver = optax.lbfgs()
    value_and_grad = optax.value_and_grad_from_state(loss)

    def step(carry, _):
        params, state = carry
        value, gradient = value_and_grad(params, state=state)
        updates, state = solver.update(gradient, state, params, value=value, grad=gradient, value_fn=loss)
        return (optax.apply_updates(params, updates), state), None

    params = {
        "weights": jnp.zeros((features.shape[1], len(vectors)), jnp.float32),
        "bias": jnp.zeros(len(vectors), jnp.float32),
    }
    with jax.numpy_dtype_promotion("standard"):  # optax's line search mixes integers and floats
        (params, _), _ = jax.jit(lambda p: jax.lax.scan(step, (p, solver.init(p)), length=_STEPS))(params)
    weights = np.asarray(params["weights"]) / spread[:, None]
    return Router("learned", reads, weights, np.asarray(params["bias"]) - center @ weights)


def calibrate(router: Router, dev: Sequence[Float[np.ndarray, "_ D"]]) -> Router:
    """Scales the router's scores so that its dev log-loss, every expert weighing the same, is smallest."""
    scales = np.geomspace(0.1, 10.0, 81)
    return router.scaled(float(min(scales, key=lambda scale: quality(router.scaled(scale), dev)["log_loss"])))


def quality(router: Router, dev: Sequence[Float[np.ndarray, "_ D"]]) -> dict[str, float]:
    """Accuracy, log-loss and expected calibration error (15 bins) on dev, every expert weighing the same."""
    rows = [router.probabilities(own) for own in dev]
    labels = np.repeat(np.arange(len(dev)), [len(own) for own in dev])
    share = np.concatenate([np.full(len(own), 1 / len(own) / len(dev)) for own in dev])
    table = np.concatenate(rows)
    best, right = table.max(axis=1), table.argmax(axis=1) == labels
    bins = np.minimum((best * 15).astype(int), 14)
    gaps = [abs(((right - best) * share)[bins == b].sum()) for b in range(15)]
    own = np.maximum(table[np.arange(len(labels)), labels], 1e-12)
    return {
        "accuracy": float((right * share).sum()),
        "log_loss": float(-(np.log(own) * share).sum()),
        "calibration_error": float(sum(gaps)),
    }


def choose_query_router(
    train: Sequence[Float[np.ndarray, "_ 3*D"]],
    dev: Sequence[Float[np.ndarray, "_ 3*D"]],
    search: "DevSearch | None" = None,
    yields: Mapping[int, Sequence[int]] | None = None,
) -> tuple[Router, dict[str, Any]]:
    """The better of both routers on dev, and a report of how each did.

    With `search` the nDCG@10 of routed search decides, and sets the router's rules; without it, accuracy does. `yields` says
    which experts (counted from 0) came later, and to whom they yield.
    """
    report: dict[str, Any] = {"decided_by": "dev nDCG@10 of routed search" if search else "dev accuracy"}
    candidates: list[tuple[float, Router]] = []
    for reads in ("base", "trunk"):
        own, held = [part(readings, reads) for readings in train], [part(readings, reads) for readings in dev]
        router = calibrate(centroid_router(own) if reads == "base" else fit_learned(own, reads), held)
        report[router.kind] = quality(router, held)
        if search:
            score, router = search.tune(router)
            report[router.kind]["nDCG@10"] = score
        else:
            score = report[router.kind]["accuracy"]
        candidates.append((score, router))
    best = max(candidates, key=lambda candidate: candidate[0])[1]
    report["chosen"] = best.kind
    if yields:
        held = [part(readings, best.reads) for readings in dev]
        best = _yielding(best, held, yields)
        report[best.kind] |= quality(best, held)
    return _with_familiarity(best, *([part(own, best.reads) for own in readings] for readings in (train, dev))), report


def _yielding(router: Router, dev: Sequence[Float[np.ndarray, "_ D"]], yields: Mapping[int, Sequence[int]]) -> Router:
    """The router with experts scored lower, until each takes at most TAKEN of the dev queries of any that it yields to.

    By LOWERED at most: where that is not enough, the domains are too much alike, and the report's accuracy says so.
    """
    bias = router.bias.copy()
    for number, others in yields.items():
        for lowered in np.arange(0, LOWERED + 0.5, 0.5, np.float32):
            bias[number] = router.bias[number] - lowered
            chosen = [replace(router, bias=bias).probabilities(dev[other]).argmax(axis=1) for other in others]
            if max((float((own == number).mean()) for own in chosen), default=0) <= TAKEN:
                break
    return replace(router, bias=bias)


def _with_familiarity(
    router: Router,
    train: Sequence[Float[np.ndarray, "_ D"]],
    held: Sequence[Float[np.ndarray, "_ D"]],
    share: float = UNFAMILIAR_QUERIES,
) -> Router:
    return replace(router, familiarity=fit_familiarity(train, held, share))


def choose_document_router(
    train: Sequence[Float[np.ndarray, "_ D"]], dev: Sequence[Float[np.ndarray, "_ D"]]
) -> Router:
    """The router that places documents: one expert each, the kind that is right more often on held-out documents."""
    routers = [calibrate(fitted, dev) for fitted in (centroid_router(train), fit_learned(train, "base"))]
    best = max(routers, key=lambda router: quality(router, dev)["accuracy"])
    return replace(_with_familiarity(best, train, dev, UNFAMILIAR_DOCUMENTS), slots=1)


@dataclass(frozen=True, slots=True)
class DevSearch:
    """Routed search of dev queries over all domains' documents, exactly; for models whose documents the base embeds."""

    dev: Sequence[DevSet]
    embedder: Embedder
    pool: Float[np.ndarray, "N D"]

    def tune(self, router: Router) -> tuple[float, Router]:
        """The dev nDCG@10, domains weighing the same, and the router with the highest least probability that is about best."""
        candidates = [replace(router, minimum=minimum) for minimum in MINIMA]
        scores = np.mean([self._routed(candidates, own) for own in self.dev], axis=0)
        best = int(np.flatnonzero(scores >= scores.max() - INDIFFERENT)[0])
        return float(scores[best]), candidates[best]

    def _routed(self, routers: Sequence[Router], own: DevSet) -> list[float]:
        """The mean nDCG@10 of a domain's dev queries with each router.

        The routers name the same experts in the same order; a query is embedded anew only where its weights differ.
        """
        found, vectors, weights = [], np.empty_like(own.vectors), np.float32(np.nan)
        for router in routers:
            choice = router.choose(part(own.readings, router.reads))
            new = np.flatnonzero((choice.merged != weights).any(axis=1))
            texts = [own.texts[row] for row in new]
            vectors[new], weights = self.embedder.mixed(texts, choice.experts[new], choice.merged[new]), choice.merged
            found.append(float(self._ndcg(own, vectors, choice).mean()))
        return found

    def _ndcg(self, own: DevSet, vectors: Float[np.ndarray, "Q D"], choice: Choice) -> Float[np.ndarray, "Q"]:
        """nDCG@10 of each dev query of a domain in the indexes of its chosen experts."""
        owner = np.zeros(len(self.pool), np.int32)
        for expert, other in enumerate(self.dev, start=1):
            owner[other.documents] = expert
        used = np.zeros((len(own.texts), len(self.dev) + 1), bool)
        np.put_along_axis(used, choice.experts, choice.weights > 0, axis=1)
        return dev_ndcg(own, vectors, self.pool, owner, used)


def dev_ndcg(
    dev: DevSet,
    vectors: Float[np.ndarray, "Q D"],
    pool: Float[np.ndarray, "N D"],
    owner: Int[np.ndarray, "N"] | None = None,
    used: np.ndarray | None = None,
    at_once: int = 256,
) -> Float[np.ndarray, "Q"]:
    """nDCG@10 of exact search for each dev query; with `owner` and `used` only in the indexes of the used experts."""
    found = []
    for start in range(0, len(vectors), at_once):
        scores = vectors[start : start + at_once] @ pool.T
        if owner is not None:
            scores[~used[start : start + at_once][:, owner]] = _UNSEARCHED
        top = np.argpartition(-scores, min(10, scores.shape[1] - 1), axis=1)[:, :10]
        found.append((top, np.take_along_axis(scores, top, axis=1)))
    top, scores = (np.concatenate(part) for part in zip(*found, strict=True))
    return ndcg_of(dev, top - int(dev.documents[0]), scores)


def ndcg_of(dev: DevSet, top: Int[np.ndarray, "Q K"], scores: Float[np.ndarray, "Q K"]) -> Float[np.ndarray, "Q"]:
    """nDCG@10 of each dev query from its best documents, counted from the first of its domain, and their scores."""
    run = {
        query: {
            dev.ids[hit] if 0 <= hit < len(dev.ids) else f"\t{hit}": score
            for hit, score in zip(hits, own, strict=True)
            if score > _UNSEARCHED
        }
        for query, hits, own in zip(dev.judged.queries, top.tolist(), scores.tolist(), strict=True)
    }
    return np.array([*metrics.per_query(dev.judged.qrels, run, (metrics.NDCG,))[metrics.NDCG].values()])
