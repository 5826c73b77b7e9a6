"""One ranked list out of the lists of several indexes."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import Float, Int, Shaped

Fusion = Literal["score", "rrf", "calibrated"]
RRF_K = 60


@dataclass(frozen=True, slots=True)
class Ranking:
    """What one index found for one query, best first, and how its expert's scores turn into a chance of relevance.

    Rows of equal `identities` hold one document. `weight` is the expert's probability for the query; `slope` and `intercept` its
    logistic calibration.
    """

    rows: Int[np.ndarray, "K"]
    scores: Float[np.ndarray, "K"]
    identities: Shaped[np.ndarray, "K"]
    weight: float = 1.0
    slope: float = 1.0
    intercept: float = 0.0


def fuse(rankings: Sequence[Ranking], fusion: Fusion, k: int) -> tuple[Int[np.ndarray, "K"], Float[np.ndarray, "K"]]:
    """The k best (rows, scores) of all rankings, best first; equal scores by row; of rows that hold one document, the best.

    score: as they are, for rankings by one query vector in one document space. rrf: the sum of weight / (60 + rank)
    (Reciprocal Rank Fusion, SIGIR 2009). calibrated: weight times the logistic of slope * score + intercept, the
    probability that the expert is the right one and the document relevant.
    """
    rows = np.concatenate([ranking.rows for ranking in rankings])
    scores = np.concatenate([_scores(ranking, fusion) for ranking in rankings])
    order = np.lexsort((rows, -scores))
    identities = np.concatenate([ranking.identities for ranking in rankings])
    _, first = np.unique(identities[order], return_index=True)
    order = order[np.sort(first)][:k]
    return rows[order], scores[order]


def _scores(ranking: Ranking, fusion: Fusion) -> Float[np.ndarray, "K"]:
    if fusion == "score":
        return ranking.scores
    if fusion == "rrf":
        return ranking.weight / (RRF_K + 1 + np.arange(len(ranking.rows)))
    # In float64 and without an exponential that overflows: a steep slope must neither warn nor tie far-apart scores.
    logits = ranking.slope * ranking.scores.astype(np.float64) + ranking.intercept
    return ranking.weight * np.exp(-np.logaddexp(0.0, -logits))
