"""Metrics of how evenly experts are used, from the number of assignments of each."""

import numpy as np
from jaxtyping import Float


def max_violation(loads: Float[np.ndarray, " experts"]) -> float:
    """Return MaxVio (Wang et al. 2024, eq. 4): the relative excess of the largest load over the mean.

    >>> max_violation(np.array([1.0, 1.0, 4.0]))
    1.0
    """
    return float(loads.max() / loads.mean() - 1)


def gini(loads: Float[np.ndarray, " experts"]) -> float:
    """Return the Gini coefficient: 0 at even load, 1 − 1/N if one of N experts takes all.

    It is half the mean absolute difference of two loads, divided by their mean.

    >>> gini(np.array([0.0, 0.0, 0.0, 8.0]))
    0.75
    """
    ordered = np.sort(loads)
    places = 2 * np.arange(1, len(ordered) + 1) - len(ordered) - 1
    return float((places * ordered).sum() / (len(ordered) * ordered.sum()))


def variation(loads: Float[np.ndarray, " experts"]) -> float:
    """Return the coefficient of variation: the standard deviation over the mean.

    >>> variation(np.array([1.0, 3.0]))
    0.5
    """
    return float(loads.std() / loads.mean())


def summarise(layers: Float[np.ndarray, "layers experts"]) -> dict[str, float]:
    """Return the metrics of the record: means over layers, ``max_violation_worst`` of the worst layer, and
    ``dead_experts``, the number of experts in all layers that no token used."""
    rows = list(layers)
    return {
        "max_violation": float(np.mean([max_violation(row) for row in rows])),
        "max_violation_worst": max(max_violation(row) for row in rows),
        "load_gini": float(np.mean([gini(row) for row in rows])),
        "load_cv": float(np.mean([variation(row) for row in rows])),
        "dead_experts": float((layers == 0).sum()),
    }
