"""Statistics over windows: how sure a difference is."""

from collections.abc import Sequence

import numpy as np
from scipy import stats


def interval(values: Sequence[float], seed: int = 0, level: float = 0.95) -> tuple[float, float]:
    """Bootstrap confidence interval (BCa) of the mean of per-window values; of equal values, that value twice.

    Raises ValueError if there are none.

    >>> interval([2.0, 2.0, 2.0])
    (2.0, 2.0)
    """
    sample = np.asarray(values, float)
    if not len(sample):
        raise ValueError("no values: an interval needs at least one window")
    if np.ptp(sample) <= 1e-12 * np.abs(sample).max():
        return float(sample.mean()), float(sample.mean())
    rng = np.random.default_rng(seed)
    found = stats.bootstrap(
        (sample,), np.mean, n_resamples=2000, confidence_level=level, method="BCa", rng=rng, batch=200
    )
    return float(found.confidence_interval.low), float(found.confidence_interval.high)
