"""Statistics over windows of text: intervals of a mean or a ratio, tests of a difference, and values at equal bytes.

Intervals are BCa bootstraps (Efron, Better Bootstrap Confidence Intervals, 1987).  Tests flip signs (Fisher, The Design
of Experiments, 1935).  Several tests share one error rate (Holm, A Simple Sequentially Rejective Multiple Test
Procedure, 1979).  Sizes are made equal on the line of log KL over log bytes.
"""

import math
import warnings
from collections.abc import Callable, Sequence

import numpy as np
from jaxtyping import Float, Int
from scipy import stats

RESAMPLES = 2000
FLIPS = 19999  # the least two-sided p-value is 2 / (FLIPS + 1)


def interval(values: Sequence[float], seed: int = 0, level: float = 0.95) -> tuple[float, float]:
    """Return the bootstrap confidence interval (BCa) of the mean of per-window values.

    The interval of equal values is that value twice.  Raises ValueError if there are no values.

    >>> interval([2.0, 2.0, 2.0])
    (2.0, 2.0)
    """
    sample = np.asarray(values, float)
    if not len(sample):
        raise ValueError("no values: an interval needs at least one window")
    if np.ptp(sample) <= 1e-12 * np.abs(sample).max():
        return float(sample.mean()), float(sample.mean())
    rng = np.random.default_rng(seed)
    bootstrap = stats.bootstrap(
        (sample,), np.mean, n_resamples=RESAMPLES, confidence_level=level, method="BCa", rng=rng, batch=200
    )
    return float(bootstrap.confidence_interval.low), float(bootstrap.confidence_interval.high)


def median_interval(values: Sequence[float]) -> tuple[float, float]:
    """Return the two order statistics between which the median lies in 95 % of cases.

    >>> median_interval(range(101))
    (40, 60)
    """
    half = 0.98 * math.sqrt(len(values))
    first, last = math.floor(len(values) / 2 - half), math.floor(len(values) / 2 + half)
    ordered = sorted(values)
    return ordered[max(0, first)], ordered[min(len(ordered) - 1, last)]


def interval_of(
    statistic: Callable[[Int[np.ndarray, " drawn"]], float], windows: int, seed: int = 0, level: float = 0.95
) -> tuple[float, float]:
    """Return the bootstrap confidence interval (BCa) of ``statistic``, a function of the indices of drawn windows.

    A statistic that does not depend on the windows is its own interval.  If all resamples lie on one side of the
    estimate, or leaving out a window changes it equally for all windows, the corrections of BCa are not finite and the
    interval is that of the percentiles.
    """
    numbers = np.arange(windows)
    point = float(statistic(numbers))
    without = [statistic(np.delete(numbers, number)) for number in numbers] if windows > 1 else [point]
    if np.ptp([point, *without]) <= 1e-12 * abs(point):
        return point, point
    with warnings.catch_warnings(), np.errstate(invalid="ignore"):
        warnings.simplefilter("ignore", stats.DegenerateDataWarning)
        bootstrap = stats.bootstrap(
            (numbers,),
            statistic,
            n_resamples=RESAMPLES,
            confidence_level=level,
            method="BCa",
            rng=np.random.default_rng(seed),
            vectorized=False,
        )
    ends = bootstrap.confidence_interval
    if np.isnan(ends).any():
        ends = np.quantile(bootstrap.bootstrap_distribution, [(1 - level) / 2, (1 + level) / 2])
    return float(ends[0]), float(ends[1])


def ratio(values: Sequence[float], reference: Sequence[float], seed: int = 0) -> tuple[float, float, float]:
    """Return the mean of ``values`` over that of ``reference`` on the same windows, with its 95 % interval.

    Raises ValueError if the numbers of windows differ.

    >>> ratio([1.0, 2.0, 3.0], [2.0, 4.0, 6.0])
    (0.5, 0.5, 0.5)
    """
    if len(values) != len(reference):
        raise ValueError(f"{len(values)} windows cannot be paired with {len(reference)}")
    above, below = np.asarray(values, float), np.asarray(reference, float)

    def of(drawn: Int[np.ndarray, " drawn"]) -> float:
        return float(above[drawn].mean() / below[drawn].mean())

    return of(np.arange(len(above))), *interval_of(of, len(above), seed)


def sign_flip(differences: Sequence[float], seed: int = 0) -> float:
    """Return the two-sided p-value of paired differences under the hypothesis that two runs do not differ.

    It is twice the share of sign flips with a mean at least as far on the same side.  Few windows get all flips, many
    get ``FLIPS`` random ones.  Raises ValueError if there are no differences.

    >>> sign_flip([1.0, 1.0, 1.0])  # of 8 flips one is as large
    0.25
    """
    if not len(differences):
        raise ValueError("no differences: a test needs at least one window")
    test = stats.permutation_test(
        (np.asarray(differences, float),),
        np.mean,
        permutation_type="samples",
        n_resamples=FLIPS,
        batch=1000,
        rng=np.random.default_rng(seed),
    )
    return float(test.pvalue)


def holm(p_values: Sequence[float]) -> list[float]:
    """Return p-values adjusted for their number: at most α where Holm's procedure rejects at α.

    >>> holm([0.01, 0.04, 0.03])
    [0.03, 0.06, 0.06]
    """
    order = np.argsort(p_values, kind="stable")
    scaled = np.asarray(p_values, float)[order] * np.arange(len(order), 0, -1)
    adjusted = np.empty(len(order))
    adjusted[order] = np.minimum(np.maximum.accumulate(scaled), 1)
    return adjusted.tolist()


def correlations(predicted: Sequence[float], measured: Sequence[float]) -> tuple[float, float]:
    """Return Pearson's and Spearman's correlation, of the values and of their ranks; neither side may be constant.

    >>> tuple(round(value, 3) for value in correlations([1, 2, 3], [1, 10, 0]))
    (-0.091, -0.5)
    """
    pearson, spearman = stats.pearsonr(predicted, measured), stats.spearmanr(predicted, measured)
    return float(pearson.statistic), float(spearman.statistic)


def at_bytes(
    sizes: Sequence[float], values: Float[np.ndarray, "sizes windows"], size: float
) -> Float[np.ndarray, " windows"]:
    """Return per-window ``values`` (positive, for example KL) at ``size`` bytes, linear in logs over log ``sizes``.

    Raises ValueError for fewer than two sizes, for equal sizes, for a ``size`` outside of them, and for a value that is
    not positive.

    >>> at_bytes([1.0, 4.0], np.array([[8.0], [2.0]]), 2.0).round(6).tolist()
    [4.0]
    """
    order = np.argsort(sizes)
    known = np.asarray(sizes, float)[order]
    if len(known) < 2 or not known[0] <= size <= known[-1]:
        raise ValueError(f"{size:,.0f} bytes lie outside the measured sizes: {', '.join(f'{s:,.0f}' for s in known)}")
    if (np.diff(known) == 0).any():
        raise ValueError("two runs have the same bytes: average them first")
    after = min(int(np.searchsorted(known, size, side="right")), len(known) - 1)
    share = np.log(size / known[after - 1]) / np.log(known[after] / known[after - 1])
    low, high = values[order[after - 1]], values[order[after]]
    if min(low.min(), high.min()) <= 0:
        raise ValueError("a value that is not positive has no log: equal bytes are for KL")
    return np.exp((1 - share) * np.log(low) + share * np.log(high))
