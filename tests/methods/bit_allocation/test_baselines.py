"""Allocations without the game: within the budget, monotone in sensitivity, close to the bit game's damage."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nashswarm.layers import Layer
from nashswarm.methods.bit_allocation.baselines import (
    allocate_by_evolution,
    allocate_by_quantiles,
    allocate_dual_ascent,
    allocate_equal_loss,
    allocate_randomly,
)
from nashswarm.methods.bit_allocation.blocks import Blocks
from nashswarm.methods.bit_allocation.game import solve
from nashswarm.quant.grid import Scheme
from tests.methods.bit_allocation.worlds import WIDTHS, budget_at, moved, random_blocks, total_damage, two_layers

HIGH_RATE = 4.0 ** -np.array(WIDTHS)
SEEN = np.array((1.0, 0.022, 0.0041, 0.00093, 3.4e-6))  # of the embedded model's blocks, on average

Allocate = Callable[[Blocks, int], np.ndarray]
few = settings(max_examples=25, deadline=None)
formulas = pytest.mark.parametrize("allocate", [allocate_equal_loss, allocate_dual_ascent])


def world(sensitivity: np.ndarray, curve: np.ndarray = HIGH_RATE, layers: int = 1) -> Blocks:
    """Return one block per sensitivity, in layers of equal size; the damage falls along ``curve``."""
    shape = (16, 64 * len(sensitivity) // layers)
    named = tuple(Layer(f"l{index}", "mlp", 0.5, (), (), torch.zeros(shape)) for index in range(layers))
    damage = sensitivity[:, None] * curve
    return Blocks(named, Scheme(), WIDTHS, damage, np.log(sensitivity), np.zeros((len(damage), 1)))


def spread(seed: int, count: int) -> np.ndarray:
    return np.exp(2 * np.random.default_rng(seed).normal(size=count))


@formulas
@few
@given(seed=st.integers(0, 999), bits=st.floats(0.3, 10), layers=st.sampled_from([1, 2, 4]))
def test_formulas_spend_the_budget_and_never_exceed_it(allocate: Allocate, seed: int, bits: float, layers: int) -> None:
    blocks = world(spread(seed, 64), SEEN, layers)
    budget = budget_at(blocks, bits)
    size = blocks.packed_bytes(allocate(blocks, budget))
    widest = blocks.packed_bytes(np.full(64, 4))
    assert min(budget, widest) - 2 * blocks.scheme.tile_bytes(4) <= size <= budget


@formulas
@pytest.mark.parametrize("bits", [0.5, 2.6, 3.0, 7.0])
def test_formulas_equal_sensitivities_give_equal_widths(allocate: Allocate, bits: float) -> None:
    blocks = world(np.full(40, 0.3), layers=2)
    profile = allocate(blocks, budget_at(blocks, bits))
    fitting = [rank for rank in range(5) if blocks.packed_bytes(np.full(40, rank)) <= budget_at(blocks, bits)]
    assert set(profile) == {fitting[-1]}


@formulas
@few
@given(seed=st.integers(0, 999), bits=st.floats(0.3, 9))
def test_formulas_more_sensitive_blocks_never_get_fewer_bits(allocate: Allocate, seed: int, bits: float) -> None:
    sensitivity = spread(seed, 50)
    blocks = world(sensitivity)
    profile = allocate(blocks, budget_at(blocks, bits))
    assert (np.diff(profile[np.argsort(sensitivity)]) >= 0).all()


@few
@given(seed=st.integers(0, 999), bits=st.floats(0.5, 8))
def test_equal_loss_is_the_closed_form_at_the_largest_offset_that_fits(seed: int, bits: float) -> None:
    """Just past each offset at which a target is half way to the next width, every block takes the nearest."""
    sensitivity = spread(seed, 12)
    blocks = world(sensitivity, SEEN)
    target = np.log2(sensitivity / np.exp(np.log(sensitivity).mean())) / 2
    means = np.sort(np.subtract.outer((1, 2.5, 3.5, 6), target).ravel()) + 1e-9
    away = np.abs(target + np.append(-99, means)[:, None] - np.array(WIDTHS)[:, None, None])
    ladder = away.argmin(0).tolist()
    profile = allocate_equal_loss(blocks, budget_at(blocks, bits)).tolist()
    richer = ladder[ladder.index(profile) + 1 :]
    assert blocks.packed_bytes(np.array(profile)) <= budget_at(blocks, bits)
    assert not richer or blocks.packed_bytes(np.array(richer[0])) > budget_at(blocks, bits)


@pytest.mark.parametrize("curve, excess", [(HIGH_RATE, 1.15), (SEEN, 1.1)])
@pytest.mark.parametrize("bits", [1.0, 2.5, 3.0, 3.5, 5.0])
def test_dual_ascent_damage_is_close_to_the_bit_games(curve: np.ndarray, excess: float, bits: float) -> None:
    blocks = world(spread(0, 512), curve, layers=4)
    budget = budget_at(blocks, bits)
    played = total_damage(blocks, solve(blocks, budget).profile)
    ascended = total_damage(blocks, allocate_dual_ascent(blocks, budget))
    assert 0.99 * played <= ascended <= excess * played


@formulas
def test_formulas_impossible_budget_raises(allocate: Allocate) -> None:
    with pytest.raises(ValueError, match="the smallest widths take 18 bytes"):
        allocate(world(spread(0, 8)), 10)


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 999), bits=st.floats(0.5, 9), rounds=st.integers(0, 3), offspring=st.integers(1, 3))
def test_evolution_keeps_budget_and_best_profile(seed: int, bits: float, rounds: int, offspring: int) -> None:
    blocks = world(spread(seed, 60), SEEN, layers=5)
    budget = budget_at(blocks, bits)
    measured: list[np.ndarray] = []

    def measure(profile: np.ndarray) -> float:
        measured.append(profile)
        return total_damage(blocks, profile)

    profile, repeated = (
        allocate_by_evolution(blocks, budget, measure, np.random.default_rng(seed), rounds, offspring) for _ in range(2)
    )
    assert np.array_equal(profile, repeated) and len(measured) == 2 * offspring * (rounds + 1)
    lottery = np.random.default_rng(seed)
    assert all(np.array_equal(start, allocate_randomly(blocks, budget, lottery)) for start in measured[:offspring])
    assert total_damage(blocks, profile) == min(total_damage(blocks, tried) for tried in measured)
    sizes = [blocks.packed_bytes(tried) for tried in measured]
    assert min(budget, blocks.packed_bytes(np.full(60, 4))) - 2 * blocks.scheme.tile_bytes(4) <= min(sizes)
    assert max(sizes) <= budget


def test_evolution_one_sensitive_layer_gets_the_widest_tiles() -> None:
    blocks = world(np.repeat((1e-3, 1e-3, 1.0, 1e-3, 1e-3), 16), SEEN, layers=5)
    budget = budget_at(blocks, 3.0)
    drawn, evolved = (
        allocate_by_evolution(
            blocks, budget, lambda profile: total_damage(blocks, profile), np.random.default_rng(0), rounds, 4
        )
        for rounds in (0, 15)
    )
    assert total_damage(blocks, evolved) < 0.5 * total_damage(blocks, drawn)
    assert evolved[32:48].min() > evolved[:32].max()


@pytest.mark.parametrize("bits", [0.3, 2.0, 3.0, 5.5, 8.3])
def test_random_allocation_fits_and_one_more_block_would_not(bits: float) -> None:
    blocks = two_layers()
    budget = budget_at(blocks, bits)
    profile = allocate_randomly(blocks, budget, np.random.default_rng(3))
    assert blocks.packed_bytes(profile) <= budget
    low = profile.min()
    assert set(profile) <= {low, low + 1}
    order = np.random.default_rng(3).permutation(24)
    winners = int((profile > low).sum())
    assert (profile[order[:winners]] == low + 1).all()
    next_one = moved(profile, order[winners], low + 1) if low < 4 else profile
    assert low == 4 or blocks.packed_bytes(next_one) > budget


def test_random_allocation_ample_budget_takes_the_widest() -> None:
    blocks = two_layers()
    assert (allocate_randomly(blocks, budget_at(blocks, 20), np.random.default_rng(0)) == 4).all()


@pytest.mark.parametrize("bits", [2.0, 3.0, 4.0, 6.0])
def test_quantiles_take_the_richest_shift_that_fits(bits: float) -> None:
    blocks = random_blocks((64, 1024), widths=(2, 4, 8))
    budget = budget_at(blocks, bits) + 100 * (bits == 2.0) * 64
    profile = allocate_by_quantiles(blocks, budget, (0.9, 0.7))
    ranks = np.array([(blocks.damage[:, 0] < importance).mean() for importance in blocks.damage[:, 0]])
    shifts = {
        tuple((ranks >= 0.9 + step / 10_000).astype(int) + (ranks >= 0.7 + step / 10_000))
        for step in range(-10_000, 10_001)
    }
    sizes = {shift: blocks.packed_bytes(np.array(shift)) for shift in shifts}
    assert sizes[tuple(profile)] == max(size for size in sizes.values() if size <= budget)
    assert blocks.packed_bytes(profile) <= budget


def test_quantiles_without_shift_give_a_tenth_8_bits_a_fifth_4_and_the_rest_2() -> None:
    blocks = random_blocks((160, 640), widths=(2, 4, 8))
    order = np.argsort(np.argsort(blocks.damage[:, 0]))
    plain = (order >= 90).astype(int) + (order >= 70)
    assert np.array_equal(allocate_by_quantiles(blocks, blocks.packed_bytes(plain), (0.9, 0.7)), plain)
