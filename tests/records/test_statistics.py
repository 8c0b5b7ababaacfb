"""Intervals cover what they should, tests reject as often as they may, sizes are equal where they say so."""

import itertools
import math
from collections.abc import Callable
from statistics import NormalDist

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nashswarm.records.statistics import FLIPS, at_bytes, holm, interval, interval_of, ratio, sign_flip


def test_interval_of_equal_values_is_that_value() -> None:
    assert interval([0.25] * 9) == (0.25, 0.25)
    assert interval([3.0]) == (3.0, 3.0)


def test_interval_of_values_equal_but_for_rounding_is_narrow() -> None:
    low, high = interval([0.1, 0.1, 0.1, 0.1 + 0.2 - 0.2])
    assert low == pytest.approx(0.1)
    assert high == pytest.approx(0.1)


def test_interval_of_a_sample_contains_mean_but_no_extremes() -> None:
    sample = np.random.default_rng(0).exponential(size=50)
    low, high = interval(sample.tolist())
    assert sample.min() < low < sample.mean() < high < sample.max()


def test_interval_of_many_values_agrees_with_the_normal_one() -> None:
    sample = np.random.default_rng(1).normal(5, 2, 2000)
    half = 1.96 * sample.std(ddof=1) / math.sqrt(2000)
    low, high = interval(sample.tolist())
    assert low == pytest.approx(sample.mean() - half, abs=0.15 * half)
    assert high == pytest.approx(sample.mean() + half, abs=0.15 * half)


def test_interval_of_many_samples_covers_the_mean_95_times_in_100() -> None:
    rng = np.random.default_rng(2)
    covered = 0
    for _ in range(200):
        low, high = interval(rng.exponential(size=40).tolist())
        covered += low <= 1 <= high
    assert 0.88 <= covered / 200 <= 0.99


def test_interval_at_higher_level_is_wider() -> None:
    sample = np.random.default_rng(3).normal(size=40).tolist()
    (low, high), (lower, higher) = interval(sample, level=0.9), interval(sample, level=0.99)
    assert lower < low < high < higher


def test_interval_of_shifted_scaled_values_is_shifted_and_scaled() -> None:
    sample = np.random.default_rng(4).exponential(size=30)
    low, high = interval(sample.tolist())
    assert interval((10 + 2 * sample).tolist()) == pytest.approx((10 + 2 * low, 10 + 2 * high))
    assert interval((-sample).tolist()) == pytest.approx((-high, -low), rel=1e-2)


def test_interval_of_same_seed_is_equal() -> None:
    sample = np.random.default_rng(5).normal(size=20).tolist()
    assert interval(sample, seed=0) == interval(sample, seed=0) != interval(sample, seed=1)


def by_hand(statistic: Callable[[np.ndarray], float], count: int, draws: np.ndarray) -> tuple[float, float]:
    """BCa as Efron and Tibshirani (1993, equations 14.9 to 14.15) write it, on these resamples."""
    normal, numbers = NormalDist(), np.arange(count)
    point = statistic(numbers)
    resampled = np.array([statistic(draw) for draw in draws])
    bias = normal.inv_cdf(((resampled < point).mean() + (resampled <= point).mean()) / 2)
    without = np.array([statistic(np.delete(numbers, number)) for number in numbers])
    deviation = without.mean() - without
    skew = (deviation**3).sum() / (6 * (deviation**2).sum() ** 1.5)
    ends = []
    for share in (0.025, 0.975):
        z = bias + normal.inv_cdf(share)
        ends.append(float(np.quantile(resampled, normal.cdf(bias + z / (1 - skew * z)))))
    return ends[0], ends[1]


@pytest.mark.parametrize("seed", range(3))
def test_interval_of_a_ratio_equals_bca_by_hand(seed: int) -> None:
    rng = np.random.default_rng(seed)
    numerators, denominators = rng.exponential(size=15), 1 + rng.exponential(size=15)

    def statistic(drawn: np.ndarray) -> float:
        return float(numerators[drawn].mean() / denominators[drawn].mean())

    draws = rng.integers(15, size=(20000, 15))
    ends = interval_of(statistic, 15, seed)
    low, high = by_hand(statistic, 15, draws)
    assert ends == pytest.approx((low, high), abs=0.06 * (high - low))
    assert ratio(numerators.tolist(), denominators.tolist(), seed) == (statistic(np.arange(15)), *ends)


def test_interval_of_a_mean_equals_that_of_its_values() -> None:
    sample = np.random.default_rng(6).exponential(size=40)
    ends = interval_of(lambda drawn: float(sample[drawn].mean()), 40)
    assert ends == pytest.approx(interval(sample.tolist()), rel=0.03)


def test_interval_of_a_constant_statistic_is_that_value() -> None:
    assert interval_of(lambda drawn: 7.0, 12) == (7.0, 7.0)
    assert interval_of(lambda drawn: float(len(drawn) > 0), 1) == (1.0, 1.0)
    assert ratio([1.0, 3.0], [2.0, 6.0]) == (0.5, 0.5, 0.5)


def test_interval_of_undefined_bca_is_that_of_percentiles() -> None:
    """No resample draws as many different windows as there are."""
    rng = np.random.default_rng(9)
    counts = [len(set(rng.integers(40, size=40).tolist())) for _ in range(4000)]
    ends = interval_of(lambda drawn: float(len(set(drawn.tolist()))), 40)
    assert ends == pytest.approx(np.quantile(counts, [0.025, 0.975]).tolist(), abs=1)


def test_ratio_of_paired_windows_has_a_narrow_interval() -> None:
    """What both share cancels: the interval is far narrower than that of either."""
    rng = np.random.default_rng(7)
    text = rng.exponential(size=60)
    doubled, text_again = 2 * text + 0.01 * rng.standard_normal(60), text
    point, low, high = ratio(doubled.tolist(), text_again.tolist())
    assert low < point < high and high - low < 0.02 < np.ptp(interval(doubled.tolist()))
    with pytest.raises(ValueError, match="60 windows cannot be paired with 59"):
        ratio(doubled.tolist(), text_again[1:].tolist())


@pytest.mark.parametrize("seed", range(4))
def test_sign_flip_of_few_windows_counts_all_flips(seed: int) -> None:
    differences = np.random.default_rng(seed).normal(0.5, 1, 9).round(1)
    means = [(differences * flips).mean() for flips in itertools.product((1, -1), repeat=9)]
    larger, smaller = (np.mean([sign * (m - differences.mean()) > -1e-9 for m in means]) for sign in (1, -1))
    assert sign_flip(differences.tolist()) == pytest.approx(min(1, 2 * min(larger, smaller)))


def test_sign_flip_without_difference_is_one() -> None:
    assert sign_flip([0.0] * 50) == 1
    assert sign_flip([0.1] * 50) == pytest.approx(2 / (FLIPS + 1))
    assert sign_flip([0.1] * 50) == sign_flip([-0.1] * 50)
    with pytest.raises(ValueError, match="no differences"):
        sign_flip([])


def test_sign_flip_of_noise_rejects_one_in_twenty() -> None:
    rng = np.random.default_rng(8)
    rejected = [sign_flip(rng.standard_normal(10).tolist()) <= 0.05 for _ in range(300)]
    assert 0.01 <= np.mean(rejected) <= 0.09


def test_holm_of_four_tests_equals_hand_calculation() -> None:
    """Four tests: the least p-value counts fourfold, the next threefold, none less than one before it."""
    assert holm([0.02, 0.5, 0.005, 0.021]) == pytest.approx([0.06, 0.5, 0.02, 0.06])
    assert holm([0.6, 0.9]) == [1, 1] and holm([0.04]) == [0.04] and holm([]) == []


@given(st.lists(st.floats(0, 1), min_size=1, max_size=8), st.floats(0.001, 0.2))
def test_holm_is_the_step_down_procedure(p_values: list[float], alpha: float) -> None:
    rejected: set[int] = set()
    for step, number in enumerate(sorted(range(len(p_values)), key=lambda number: p_values[number])):
        if p_values[number] * (len(p_values) - step) > alpha:
            break
        rejected.add(number)
    assert {number for number, p in enumerate(holm(p_values)) if p <= alpha} == rejected


def test_at_bytes_between_sizes_lies_on_the_line_of_logs() -> None:
    sizes, values = [4e6, 1e6, 2e6], np.array([[0.01, 0.02], [0.64, 0.5], [0.08, 0.1]])
    for size, row in zip(sizes, values, strict=True):
        assert at_bytes(sizes, values, size) == pytest.approx(row)
    between = at_bytes(sizes, values, math.sqrt(2) * 1e6)
    assert between == pytest.approx(np.sqrt(values[1] * values[2]))
    law = np.array([[3 * size**-1.5] for size in sizes])
    assert at_bytes(sizes, law, 3.3e6) == pytest.approx([3 * 3.3e6**-1.5])


def test_at_bytes_beyond_measured_sizes_raises() -> None:
    values = np.ones((2, 3))
    for size in (0.9, 2.1):
        with pytest.raises(ValueError, match="lie outside the measured sizes: 1, 2"):
            at_bytes([1, 2], values, size)
    with pytest.raises(ValueError, match="outside the measured sizes: 1"):
        at_bytes([1], values[:1], 1)
    with pytest.raises(ValueError, match="has no log"):
        at_bytes([1, 2], np.zeros((2, 3)), 1.5)
    with pytest.raises(ValueError, match="the same bytes: average them first"):
        at_bytes([1, 1], values, 1)
