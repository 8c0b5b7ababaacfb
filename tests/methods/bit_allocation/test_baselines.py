"""Published allocations: within the budget, monotone in sensitivity, and next to the bit game's own answers."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nashswarm.layers import Layer
from nashswarm.methods.bit_allocation import baselines
from nashswarm.methods.bit_allocation.blocks import Blocks
from nashswarm.methods.bit_allocation.game import by_lot, solve
from nashswarm.quant.grid import Scheme

WIDTHS = (0, 2, 3, 4, 8)
HIGH_RATE = 4.0 ** -np.array(WIDTHS)
SEEN = np.array((1.0, 0.022, 0.0041, 0.00093, 3.4e-6))  # of the embedded model's blocks, on average

Allocate = Callable[[Blocks, int], np.ndarray]
few = settings(max_examples=25, deadline=None)
formulas = pytest.mark.parametrize("allocate", [baselines.equal_loss, baselines.dual_ascent])


def world(sensitivity: np.ndarray, curve: np.ndarray = HIGH_RATE, layers: int = 1) -> Blocks:
    """One block per sensitivity, in layers of equal size; the damage falls along ``curve``."""
    shape = (16, 64 * len(sensitivity) // layers)
    named = tuple(Layer(f"l{index}", "mlp", 0.5, (), (), torch.zeros(shape)) for index in range(layers))
    damage = sensitivity[:, None] * curve
    return Blocks(named, Scheme(), WIDTHS, damage, np.log(sensitivity), np.zeros((len(damage), 1)))


def spread(seed: int, count: int) -> np.ndarray:
    return np.exp(2 * np.random.default_rng(seed).normal(size=count))


def at_bits(blocks: Blocks, bits: float) -> int:
    """The budget of so many stored bits per weight."""
    return int(bits * sum(layer.parameters for layer in blocks.layers) / 8)


def damage(blocks: Blocks, profile: np.ndarray) -> float:
    return sum(blocks.damage_by_layer(profile).values())


@formulas
@few
@given(seed=st.integers(0, 999), bits=st.floats(0.3, 10), layers=st.sampled_from([1, 2, 4]))
def test_the_budget_is_spent_and_never_exceeded(allocate: Allocate, seed: int, bits: float, layers: int) -> None:
    blocks = world(spread(seed, 64), SEEN, layers)
    budget = at_bits(blocks, bits)
    size = blocks.packed_bytes(allocate(blocks, budget))
    widest = blocks.packed_bytes(np.full(64, 4))
    assert min(budget, widest) - 2 * blocks.scheme.tile_bytes(4) <= size <= budget


@formulas
@pytest.mark.parametrize("bits", [0.5, 2.6, 3.0, 7.0])
def test_equal_sensitivities_get_equal_widths(allocate: Allocate, bits: float) -> None:
    blocks = world(np.full(40, 0.3), layers=2)
    profile = allocate(blocks, at_bits(blocks, bits))
    fitting = [rank for rank in range(5) if blocks.packed_bytes(np.full(40, rank)) <= at_bits(blocks, bits)]
    assert set(profile) == {fitting[-1]}


@formulas
@few
@given(seed=st.integers(0, 999), bits=st.floats(0.3, 9))
def test_more_sensitive_blocks_never_get_fewer_bits(allocate: Allocate, seed: int, bits: float) -> None:
    sensitivity = spread(seed, 50)
    blocks = world(sensitivity)
    profile = allocate(blocks, at_bits(blocks, bits))
    assert (np.diff(profile[np.argsort(sensitivity)]) >= 0).all()


@few
@given(seed=st.integers(0, 999), bits=st.floats(0.5, 8))
def test_equal_loss_is_the_closed_form_at_the_greatest_offset_that_fits(seed: int, bits: float) -> None:
    """Just past each offset at which a width is half way to the next, every block takes what is nearest."""
    sensitivity = spread(seed, 12)
    blocks = world(sensitivity, SEEN)
    wished = np.log2(sensitivity / np.exp(np.log(sensitivity).mean())) / 2
    means = np.sort(np.subtract.outer((1, 2.5, 3.5, 6), wished).ravel()) + 1e-9
    away = np.abs(wished + np.append(-99, means)[:, None] - np.array(WIDTHS)[:, None, None])
    ladder = away.argmin(0).tolist()
    found = baselines.equal_loss(blocks, at_bits(blocks, bits)).tolist()
    richer = ladder[ladder.index(found) + 1 :]
    assert blocks.packed_bytes(np.array(found)) <= at_bits(blocks, bits)
    assert not richer or blocks.packed_bytes(np.array(richer[0])) > at_bits(blocks, bits)


@pytest.mark.parametrize("curve, excess", [(HIGH_RATE, 1.15), (SEEN, 1.1)])
@pytest.mark.parametrize("bits", [1.0, 2.5, 3.0, 3.5, 5.0])
def test_dual_ascent_is_close_to_the_bit_game(curve: np.ndarray, excess: float, bits: float) -> None:
    blocks = world(spread(0, 512), curve, layers=4)
    budget = at_bits(blocks, bits)
    played = damage(blocks, solve(blocks, budget).profile)
    ascended = damage(blocks, baselines.dual_ascent(blocks, budget))
    assert 0.99 * played <= ascended <= excess * played


@formulas
def test_an_impossible_budget_is_refused(allocate: Allocate) -> None:
    with pytest.raises(ValueError, match="the smallest widths take 18 bytes"):
        allocate(world(spread(0, 8)), 10)


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 999), bits=st.floats(0.5, 9), rounds=st.integers(0, 3), offspring=st.integers(1, 3))
def test_evolution_keeps_its_budget_its_best_and_its_count(seed: int, bits: float, rounds: int, offspring: int) -> None:
    blocks = world(spread(seed, 60), SEEN, layers=5)
    budget = at_bits(blocks, bits)
    measured: list[np.ndarray] = []

    def measure(profile: np.ndarray) -> float:
        measured.append(profile)
        return damage(blocks, profile)

    one, other = (
        baselines.evolve(blocks, budget, measure, np.random.default_rng(seed), rounds, offspring) for _ in range(2)
    )
    assert np.array_equal(one, other) and len(measured) == 2 * offspring * (rounds + 1)
    lottery = np.random.default_rng(seed)
    assert all(np.array_equal(start, by_lot(blocks, budget, lottery)) for start in measured[:offspring])
    assert damage(blocks, one) == min(damage(blocks, profile) for profile in measured)
    sizes = [blocks.packed_bytes(profile) for profile in measured]
    assert min(budget, blocks.packed_bytes(np.full(60, 4))) - 2 * blocks.scheme.tile_bytes(4) <= min(sizes)
    assert max(sizes) <= budget


def test_evolution_finds_the_layer_that_matters() -> None:
    blocks = world(np.repeat((1e-3, 1e-3, 1.0, 1e-3, 1e-3), 16), SEEN, layers=5)
    budget = at_bits(blocks, 3.0)
    lot, found = (
        baselines.evolve(blocks, budget, lambda profile: damage(blocks, profile), np.random.default_rng(0), rounds, 4)
        for rounds in (0, 15)
    )
    assert damage(blocks, found) < 0.5 * damage(blocks, lot)
    assert found[32:48].min() > found[:32].max()
