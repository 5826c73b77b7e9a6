"""Evidence: what an index's documents say about where a query belongs, beside the router, which knows queries only.

An index near whose documents a query lies is likelier its own. So what the experts' indexes promise joins the router's
probabilities, as a likelihood joins a prior. And a query is *strange*, likely of no expert's domain, where the base's own index,
which has the documents without a domain, promises more than the likeliest expert's and the probabilities are unsure. How strange
queries of known domains are differs from index to index; their dev queries show it.
"""

from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Float

from moeret.models.familiarity import least_but
from moeret.models.model import Model, read_profile
from moeret.models.router import part, softmax
from moeret.retrieval.sketch import promises, spread
from moeret.types import BASE_EXPERT

LIKELIHOOD = 2.0
"""What a spread of the sketches more of promise adds to an expert's log-probability."""
DOUBT = 0.1
"""What a unit of log-odds against the likeliest expert adds to strangeness, in spreads of the sketches."""
STRANGE_QUERIES = 0.15
"""Share of the known domains' dev queries that may count as strange and search the base's own index too. The larger, the
fewer queries of other domains miss their documents (experiments.leave_one_out)."""


class Evidence:
    """Of one index's sketches (index's name -> centroids), for the experts of its model."""

    def __init__(self, experts: Sequence[str], sketches: Mapping[str, Float[np.ndarray, "C D"]]):
        self._base = sketches.get(BASE_EXPERT)
        self._experts = [sketches.get(name) for name in experts]
        self._spread = max(spread([*sketches.values()]) if sketches else 0.0, 1e-6)

    def _promised(self, vectors: Float[np.ndarray, "Q D"]) -> Float[np.ndarray, "Q E"]:
        """What each expert's index promises, in spreads; minus infinity where it has none."""
        nothing = np.full(len(vectors), -np.inf, np.float32)
        every = [nothing if own is None else promises(vectors, own) / self._spread for own in self._experts]
        return np.stack(every, axis=1)

    def weigh(
        self, vectors: Float[np.ndarray, "Q D"], probabilities: Float[np.ndarray, "Q E"]
    ) -> tuple[Float[np.ndarray, "Q E"], Float[np.ndarray, "Q"]]:
        """(probabilities with the evidence, strangeness) of queries, from their vectors and the router's probabilities.

        An expert without an index is left out; where none has one, the probabilities are as they were and strangeness is
        infinite. It is minus infinity where the base has no index.
        """
        promised = self._promised(vectors)
        if not np.isfinite(promised).any():
            return probabilities, np.full(len(vectors), np.inf, np.float32)
        revised = softmax(np.log(np.maximum(probabilities, 1e-9)) + LIKELIHOOD * promised)
        if self._base is None:
            return revised, np.full(len(vectors), -np.inf, np.float32)
        likeliest, sure = revised.argmax(axis=1), np.clip(revised.max(axis=1), 1e-6, 1 - 1e-6)
        own = promised[np.arange(len(vectors)), likeliest]
        return revised, promises(vectors, self._base) / self._spread - own + DOUBT * np.log((1 - sure) / sure)

    def limit(self, model: Model, share: float = STRANGE_QUERIES) -> float:
        """The strangeness that at most a `share` of the dev queries of the domains that have an index exceed.

        Domains weigh the same.
        """
        values = []
        for entry, sketch in zip(model.published.meta["experts"], self._experts, strict=True):
            if sketch is not None:
                profile = read_profile(model.published, entry["profile"])
                probabilities = model.query_router.probabilities(part(profile.dev_queries, model.query_router.reads))
                values.append(-self.weigh(profile.dev_vectors, probabilities)[1])
        return -least_but(share, values) if values else 0.0
