"""From an expert's scores to chances of relevance, so that lists of different document spaces can be fused."""

import numpy as np
from jaxtyping import Bool, Float

_STEPS, _RIDGE = 50, 1e-3
_LEAST_SLOPE = 1e-2
"""A higher score never means a lower chance."""


def fit_logistic(scores: Float[np.ndarray, "K"], relevant: Bool[np.ndarray, "K"]) -> tuple[float, float]:
    """(slope, intercept) of the logistic curve through relevance against score (Platt scaling), by Newton's method.

    A little ridge on the slope keeps it finite where scores separate relevance perfectly.
    """
    features = np.stack([scores, np.ones_like(scores)], axis=1).astype(np.float64)
    wanted, ridge = relevant.astype(np.float64), np.diag([_RIDGE, 0.0])
    fitted = np.zeros(2)
    for _ in range(_STEPS):
        chance = 1 / (1 + np.exp(-features @ fitted))
        gradient = features.T @ (chance - wanted) / len(wanted) + ridge @ fitted
        hessian = (features * (chance * (1 - chance))[:, None]).T @ features / len(wanted) + ridge + 1e-9 * np.eye(2)
        step = np.linalg.solve(hessian, gradient)
        fitted -= step
        if np.abs(step).max() < 1e-8:
            break
    if fitted[0] < _LEAST_SLOPE:  # scores that say nothing, or the opposite: keep their order, and the mean chance
        share = wanted.mean()
        return _LEAST_SLOPE, float(np.log(max(share, 1e-9) / max(1 - share, 1e-9)) - _LEAST_SLOPE * scores.mean())
    return float(fitted[0]), float(fitted[1])
