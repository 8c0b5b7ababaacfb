"""The bit game against its definition, enumeration and integer programming."""

import functools

import numpy as np
import pytest
import torch
from scipy import optimize, sparse

from nashswarm.games import flock as swarm
from nashswarm.layers import Layer
from nashswarm.methods.bit_allocation.blocks import Blocks
from nashswarm.methods.bit_allocation.game import Solution, by_lot, by_quantiles, solve
from nashswarm.quant.grid import Scheme

WIDTHS = (0, 2, 3, 4, 8)


def world(*shapes: tuple[int, int], group_size: int = 64, seed: int = 0, widths: tuple[int, ...] = WIDTHS) -> Blocks:
    """Layers of these shapes; the blocks' sensitivities span orders of magnitude, damage falls fourfold per bit."""
    rng = np.random.default_rng(seed)
    layers = tuple(
        Layer(f"layer{index}", "mlp", 0.5, (f"layer{index}",), ("Linear",), torch.zeros(shape))
        for index, shape in enumerate(shapes)
    )
    count = sum(-(-rows // 16) * (columns // group_size) for rows, columns in shapes)
    log_sensitivity = rng.normal(size=count) * 2
    noise = rng.uniform(0.8, 1.25, (count, len(widths)))
    damage = np.exp(log_sensitivity)[:, None] * 4.0 ** -np.array(widths) * noise
    return Blocks(layers, Scheme(group_size), widths, damage, log_sensitivity, rng.normal(size=(count, 3)))


def small() -> Blocks:
    """24 players in two layers, the second ragged."""
    return world((32, 512), (10, 512))


def flock(blocks: Blocks) -> sparse.csr_array:
    return swarm.flock(blocks.features, 7, "features", np.random.default_rng(0))


def at_bits(blocks: Blocks, bits: float) -> int:
    """The budget of so many stored bits per weight."""
    return int(bits * sum(layer.parameters for layer in blocks.layers) / 8)


def damage(blocks: Blocks, profile: np.ndarray) -> float:
    return sum(blocks.damage_by_layer(profile).values())


def disagreements(coupling: sparse.csr_array, profile: np.ndarray) -> float:
    """Σ_{i<j} J_ij [b_i ≠ b_j]."""
    pairs = sparse.triu(coupling).tocoo()
    return float((pairs.data * (profile[pairs.row] != profile[pairs.col])).sum())


def total(blocks: Blocks, solution: Solution, coupling: sparse.csr_array, align: float, profile: np.ndarray) -> float:
    """Φ from its definition: damage, the price of all packed bytes, and of the flock's disagreements."""
    size = blocks.packed_bytes(profile) + align * disagreements(coupling, profile)
    return damage(blocks, profile) + solution.price * size


def moved(profile: np.ndarray, player: int, action: int) -> np.ndarray:
    other = profile.copy()
    other[player] = action
    return other


@pytest.mark.parametrize("bits", [1.0, 2.5, 3.0, 5.0])
@pytest.mark.parametrize("align", [0.0, 4.0])
def test_budget_is_met_within_a_thousandth_and_never_overspent(bits: float, align: float) -> None:
    blocks = world((64, 1024), (64, 1024), (64, 1024), (256, 1024))
    budget = at_bits(blocks, bits)
    solution = solve(blocks, budget, flock=flock(blocks), align=align)
    assert 0.999 * budget <= blocks.packed_bytes(solution.profile) <= budget


@pytest.mark.parametrize("seed", range(3))
def test_small_budgets_are_never_overspent(seed: int) -> None:
    blocks = world((32, 512), (10, 512), seed=seed)
    for bits in (0.5, 1.7, 2.9, 4.1, 8.0, 20.0):
        assert blocks.packed_bytes(solve(blocks, at_bits(blocks, bits)).profile) <= at_bits(blocks, bits)


@pytest.mark.parametrize("align", [0.0, 3.0])
def test_a_move_costs_its_player_what_it_adds_to_damage_and_packed_bytes(align: float) -> None:
    blocks, rng = small(), np.random.default_rng(1)
    coupling = flock(blocks)
    solution = solve(blocks, at_bits(blocks, 3), flock=coupling, align=align)
    phi = functools.partial(total, blocks, solution, coupling, align)
    for _ in range(100):
        profile = rng.integers(0, 5, 24)
        player, action = rng.integers(24), rng.integers(5)
        costs = solution.game.costs(profile)[player]
        change = phi(moved(profile, player, action)) - phi(profile)
        assert costs[action] - costs[profile[player]] == pytest.approx(change, rel=1e-9, abs=1e-12)
        potentials = solution.game.potential(moved(profile, player, action)) - solution.game.potential(profile)
        assert potentials == pytest.approx(change, rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("align", [0.0, 3.0])
def test_nobody_gains_by_moving_alone(align: float) -> None:
    """By enumeration of every action of every player, from the definition."""
    blocks = small()
    coupling = flock(blocks)
    solution = solve(blocks, at_bits(blocks, 3), flock=coupling, align=align)
    profile = solution.equilibrium.profile
    phi = functools.partial(total, blocks, solution, coupling, align)
    here = phi(profile)
    gains = [here - phi(moved(profile, player, action)) for player in range(24) for action in range(5)]
    assert max(gains) <= 1e-12 * here
    assert solution.game.regret(profile).max() <= 1e-12 * here


def test_report_certifies_the_regret_of_the_answer() -> None:
    blocks = small()
    solution = solve(blocks, at_bits(blocks, 3))
    metrics, series = solution.report(blocks)
    phi = functools.partial(total, blocks, solution, sparse.csr_array((24, 24)), 0.0)
    here = phi(solution.profile)
    best = [min(phi(moved(solution.profile, player, action)) for action in range(5)) for player in range(24)]
    assert metrics["regret_max"] == pytest.approx(here - min(best), abs=1e-12)
    assert metrics["regret_mean"] == pytest.approx(here - np.mean(best), abs=1e-12)
    assert metrics["players"] == 24
    assert metrics["pruned"] == (np.array(WIDTHS)[solution.profile] == 0).mean()
    assert metrics["sweeps"] == len(series["potential"]) - 1 == len(series["regret"]) - 1
    assert (np.diff(series["potential"]) < 0).all()


def test_players_stand_on_their_lower_convex_hulls() -> None:
    """With tags of 4 bytes at most a player: no choice lies above a chord of its own damages by more than these."""
    blocks = world((64, 4096), group_size=256)
    solution = solve(blocks, at_bits(blocks, 3))
    size = np.array([blocks.scheme.tile_bytes(width) for width in WIDTHS])
    slack = 4 * solution.price
    for own, here in zip(blocks.damage, solution.equilibrium.profile, strict=True):
        for fewer in range(here):
            for more in range(here + 1, 5):
                share = (size[here] - size[fewer]) / (size[more] - size[fewer])
                assert own[here] <= (1 - share) * own[fewer] + share * own[more] + slack


def test_a_width_that_helps_nobody_is_chosen_by_nobody() -> None:
    blocks = world((64, 1024))
    blocks.damage[:, 2] = blocks.damage[:, 1]  # 3 bits, no better than 2
    solution = solve(blocks, at_bits(blocks, 3))
    assert not (solution.profile == 2).any()
    assert set(solution.profile) >= {1, 3}


def test_equal_players_share_one_tag() -> None:
    """Blocks all alike agree, and a run of equal tags costs two bytes."""
    blocks = world((64, 1024))
    blocks.damage[:] = blocks.damage[0]
    solution = solve(blocks, at_bits(blocks, 3.5))
    assert len(set(solution.equilibrium.profile)) == 1
    assert blocks.packed_bytes(solution.equilibrium.profile) == 16 + 2 + 64 * blocks.scheme.tile_bytes(
        WIDTHS[solution.equilibrium.profile[0]]
    )


@pytest.mark.parametrize("bits", [1.5, 2.5, 3.5])
def test_within_one_percent_of_integer_programming_at_the_same_bytes(bits: float) -> None:
    """The integer program pays for tiles only, the game for tags too."""
    blocks = world((128, 1536))
    assert blocks.damage.shape == (192, 5)
    solution = solve(blocks, at_bits(blocks, bits))
    size = np.array([float(blocks.scheme.tile_bytes(width)) for width in WIDTHS])
    one_each = sparse.kron(sparse.eye_array(192), np.ones((1, 5)))
    best = optimize.milp(
        blocks.damage.ravel() / blocks.damage.max(),
        constraints=[
            optimize.LinearConstraint(one_each, 1, 1),
            optimize.LinearConstraint(np.tile(size, 192)[None], 0, size[solution.profile].sum()),
        ],
        integrality=np.ones(960),
        bounds=optimize.Bounds(0, 1),
        options={"mip_rel_gap": 1e-3},
    )
    assert best.success
    least = best.fun * blocks.damage.max()
    assert 0.998 * least <= damage(blocks, solution.profile) <= 1.01 * least


def test_the_answer_depends_on_nothing_else() -> None:
    one, other = (solve(small(), at_bits(small(), 3), flock=flock(small()), align=2.0, shrink=0.5) for _ in range(2))
    assert one.price == other.price
    assert np.array_equal(one.profile, other.profile)


def test_a_higher_price_buys_fewer_bytes() -> None:
    blocks = world((64, 1024))
    solutions = [solve(blocks, at_bits(blocks, bits)) for bits in (1.5, 2.5, 3.5, 4.5)]
    prices = [solution.price for solution in solutions]
    damages = [damage(blocks, solution.profile) for solution in solutions]
    assert prices == sorted(prices, reverse=True)
    assert damages == sorted(damages, reverse=True)


def test_an_impossible_budget_is_refused() -> None:
    with pytest.raises(ValueError, match="no price brings what is spent down to 20"):
        solve(small(), 20)


def test_a_budget_for_everything_takes_the_least_damage() -> None:
    blocks = small()
    solution = solve(blocks, at_bits(blocks, 20))
    assert np.array_equal(solution.profile, blocks.damage.argmin(1))


def test_one_block_is_a_game_too() -> None:
    blocks = world((16, 64))
    budget = 16 + 2 + blocks.scheme.tile_bytes(3)
    assert WIDTHS[solve(blocks, budget).profile[0]] == 3


@pytest.mark.parametrize(("bits", "share"), [(1.0, 0.1), (2.0, 0.5), (4.0, 0.3), (4.0, 0.5)])
def test_at_least_the_wanted_share_is_pruned(bits: float, share: float) -> None:
    """Also where the budget would pay for more."""
    blocks = world((32, 1024))
    budget = at_bits(blocks, bits)
    solution = solve(blocks, budget, pruned=share)
    assert blocks.packed_bytes(solution.profile) <= budget
    assert (solution.profile == 0).mean() >= share


def test_no_more_is_pruned_than_wanted_where_pruning_is_dear() -> None:
    blocks = world((32, 1024))
    budget = at_bits(blocks, 3)
    free, forced = solve(blocks, budget), solve(blocks, budget, pruned=0.3)
    assert (free.profile == 0).mean() < 0.3 <= (forced.profile == 0).mean() <= 0.4
    assert free.subsidy == 0 < forced.subsidy
    assert damage(blocks, free.profile) < damage(blocks, forced.profile)


@pytest.mark.parametrize("seed", range(3))
def test_the_flock_agrees_more_the_more_it_minds(seed: int) -> None:
    blocks = world((64, 1024), (64, 1024), seed=seed)
    coupling, budget = flock(blocks), at_bits(blocks, 3)
    disagreeing = [
        disagreements(coupling, solve(blocks, budget, flock=coupling, align=align).equilibrium.profile)
        for align in (0.0, 20.0, 200.0)
    ]
    assert disagreeing[0] > disagreeing[1] > disagreeing[2]


def test_shrinking_everything_to_one_mean_is_as_good_as_equal_sensitivities() -> None:
    """Two blocks that mind each other alone exchange their sensitivities at full strength."""
    blocks = world((16, 128))
    coupling = sparse.csr_array(np.array([[0.0, 1], [1, 0]]))
    shrunk = solve(blocks, at_bits(blocks, 3), flock=coupling, shrink=1.0)
    exchanged = blocks.damage * np.exp(blocks.log_sensitivity[::-1] - blocks.log_sensitivity)[:, None]
    paid = shrunk.price * np.array([float(blocks.scheme.tile_bytes(width)) for width in WIDTHS])
    assert shrunk.game.own_cost == pytest.approx(exchanged + paid)


def test_a_flock_that_neither_aligns_nor_shrinks_changes_nothing() -> None:
    blocks = small()
    budget = at_bits(blocks, 3)
    assert np.array_equal(solve(blocks, budget, flock=flock(blocks)).profile, solve(blocks, budget).profile)


@pytest.mark.parametrize("bits", [0.3, 2.0, 3.0, 5.5, 8.3])
def test_by_lot_fits_and_one_more_block_would_not(bits: float) -> None:
    blocks = small()
    budget = at_bits(blocks, bits)
    profile = by_lot(blocks, budget, np.random.default_rng(3))
    assert blocks.packed_bytes(profile) <= budget
    low = profile.min()
    assert set(profile) <= {low, low + 1}
    order = np.random.default_rng(3).permutation(24)
    winners = int((profile > low).sum())
    assert (profile[order[:winners]] == low + 1).all()
    next_one = moved(profile, order[winners], low + 1) if low < 4 else profile
    assert low == 4 or blocks.packed_bytes(next_one) > budget


def test_by_lot_with_room_for_all_takes_the_widest() -> None:
    blocks = small()
    assert (by_lot(blocks, at_bits(blocks, 20), np.random.default_rng(0)) == 4).all()


@pytest.mark.parametrize("bits", [2.0, 3.0, 4.0, 6.0])
def test_by_quantiles_is_the_richest_shift_that_fits(bits: float) -> None:
    blocks = world((64, 1024), widths=(2, 4, 8))
    budget = at_bits(blocks, bits) + 100 * (bits == 2.0) * 64
    profile = by_quantiles(blocks, budget, (0.9, 0.7))
    ranks = np.array([(blocks.damage[:, 0] < own).mean() for own in blocks.damage[:, 0]])
    shifts = {
        tuple((ranks >= 0.9 + step / 10_000).astype(int) + (ranks >= 0.7 + step / 10_000))
        for step in range(-10_000, 10_001)
    }
    sizes = {shift: blocks.packed_bytes(np.array(shift)) for shift in shifts}
    assert sizes[tuple(profile)] == max(size for size in sizes.values() if size <= budget)
    assert blocks.packed_bytes(profile) <= budget


def test_by_quantiles_without_a_shift_gives_a_tenth_8_bits_a_fifth_4_and_the_rest_2() -> None:
    blocks = world((160, 640), widths=(2, 4, 8))
    order = np.argsort(np.argsort(blocks.damage[:, 0]))
    plain = (order >= 90).astype(int) + (order >= 70)
    assert np.array_equal(by_quantiles(blocks, blocks.packed_bytes(plain), (0.9, 0.7)), plain)
