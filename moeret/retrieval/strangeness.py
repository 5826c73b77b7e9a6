"""Strangeness: what speaks for a query's being of none of the experts' domains.

Two things do: the base's own index, where the documents without a domain are, promises more than the index of the query's
likeliest expert, and the router is unsure. How much of both queries of known domains have differs from index to index; their
dev queries show it.
"""

from collections.abc import Mapping

import numpy as np
from jaxtyping import Float

from moeret.models.familiarity import least_but
from moeret.models.model import Model, read_profile
from moeret.models.router import half
from moeret.retrieval.sketch import promises, spread
from moeret.types import BASE_EXPERT

STRANGE_QUERIES = 0.15
"""Share of the known domains' dev queries that may count as strange and search the base's own index too. The larger, the
fewer queries of other domains miss their documents (experiments.leave_one_out)."""
DOUBT = 0.1
"""What a unit of the router's log-odds against its likeliest expert weighs, in spreads of the sketches."""


class Strangeness:
    """Judges queries for one index, by its sketches (index's name -> centroids), which have one of the base's own."""

    def __init__(self, model: Model, sketches: Mapping[str, Float[np.ndarray, "C D"]]):
        self._base = sketches[BASE_EXPERT]
        self._experts = [sketches.get(name) for name in model.experts]
        self._spread = max(spread([*sketches.values()]), 1e-6)

    def of(self, vectors: Float[np.ndarray, "Q D"], probabilities: Float[np.ndarray, "Q E"]) -> Float[np.ndarray, "Q"]:
        """Each query's strangeness, from the vector that its experts give it and the router's probabilities of them.

        Infinite where the likeliest expert has no index.
        """
        likeliest, sure = probabilities.argmax(axis=1), np.clip(probabilities.max(axis=1), 1e-6, 1 - 1e-6)
        promised = np.full(len(vectors), -np.inf, np.float32)
        for number in np.unique(likeliest):
            if (sketch := self._experts[number]) is not None:
                promised[likeliest == number] = promises(vectors[likeliest == number], sketch)
        return (promises(vectors, self._base) - promised) / self._spread + DOUBT * np.log((1 - sure) / sure)

    def limit(self, model: Model, share: float = STRANGE_QUERIES) -> float:
        """What at most a `share` of the dev queries of the domains that have an index exceed, domains weighing the same."""
        values = []
        for entry, sketch in zip(model.published.meta["experts"], self._experts, strict=True):
            if sketch is not None:
                profile = read_profile(model.published, entry["profile"])
                probabilities = model.query_router.probabilities(half(profile.dev_queries, model.query_router.reads))
                values.append(-self.of(profile.dev_vectors, probabilities))
        return -least_but(share, values) if values else 0.0
