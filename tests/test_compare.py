"""Intervals cover what they should."""

import math

import numpy as np
import pytest

from nashswarm.compare import interval


def test_equal_values_are_their_own_interval() -> None:
    assert interval([0.25] * 9) == (0.25, 0.25)
    assert interval([3.0]) == (3.0, 3.0)


def test_values_equal_but_for_rounding_have_a_narrow_interval() -> None:
    low, high = interval([0.1, 0.1, 0.1, 0.1 + 0.2 - 0.2])
    assert low == pytest.approx(0.1)
    assert high == pytest.approx(0.1)


def test_mean_lies_inside_and_extremes_outside() -> None:
    sample = np.random.default_rng(0).exponential(size=50)
    low, high = interval(sample.tolist())
    assert sample.min() < low < sample.mean() < high < sample.max()


def test_agrees_with_the_normal_interval_of_many_values() -> None:
    sample = np.random.default_rng(1).normal(5, 2, 2000)
    half = 1.96 * sample.std(ddof=1) / math.sqrt(2000)
    low, high = interval(sample.tolist())
    assert low == pytest.approx(sample.mean() - half, abs=0.15 * half)
    assert high == pytest.approx(sample.mean() + half, abs=0.15 * half)


def test_covers_the_true_mean_95_times_in_100() -> None:
    rng = np.random.default_rng(2)
    covered = 0
    for _ in range(200):
        low, high = interval(rng.exponential(size=40).tolist())
        covered += low <= 1 <= high
    assert 0.88 <= covered / 200 <= 0.99


def test_wider_when_more_sure() -> None:
    sample = np.random.default_rng(3).normal(size=40).tolist()
    (low, high), (lower, higher) = interval(sample, level=0.9), interval(sample, level=0.99)
    assert lower < low < high < higher


def test_shift_scale_and_sign_carry_over() -> None:
    sample = np.random.default_rng(4).exponential(size=30)
    low, high = interval(sample.tolist())
    assert interval((10 + 2 * sample).tolist()) == pytest.approx((10 + 2 * low, 10 + 2 * high))
    assert interval((-sample).tolist()) == pytest.approx((-high, -low), rel=1e-2)


def test_same_seed_same_interval() -> None:
    sample = np.random.default_rng(5).normal(size=20).tolist()
    assert interval(sample, seed=0) == interval(sample, seed=0) != interval(sample, seed=1)
