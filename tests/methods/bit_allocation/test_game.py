"""The bit game against its definition, enumeration and integer programming."""

import functools

import numpy as np
import pytest
from scipy import optimize, sparse

from nashswarm.games import flock as swarm
from nashswarm.methods.bit_allocation.blocks import Blocks
from nashswarm.methods.bit_allocation.game import Solution, solve
from tests.methods.bit_allocation.worlds import WIDTHS, budget_at, moved, random_blocks, total_damage, two_layers


def flock(blocks: Blocks) -> sparse.csr_array:
    return swarm.flock(blocks.features, 7, "features", np.random.default_rng(0))


def disagreements(coupling: sparse.csr_array, profile: np.ndarray) -> float:
    """Σ_{i<j} J_ij [b_i ≠ b_j]."""
    pairs = sparse.triu(coupling).tocoo()
    return float((pairs.data * (profile[pairs.row] != profile[pairs.col])).sum())


def total(blocks: Blocks, solution: Solution, coupling: sparse.csr_array, align: float, profile: np.ndarray) -> float:
    """Φ from its definition: damage, the price of all packed bytes, and of the flock's disagreements."""
    size = blocks.packed_bytes(profile) + align * disagreements(coupling, profile)
    return total_damage(blocks, profile) + solution.price * size


@pytest.mark.parametrize("bits", [1.0, 2.5, 3.0, 5.0])
@pytest.mark.parametrize("align", [0.0, 4.0])
def test_solve_spends_the_budget_to_a_thousandth_and_never_exceeds_it(bits: float, align: float) -> None:
    blocks = random_blocks((64, 1024), (64, 1024), (64, 1024), (256, 1024))
    budget = budget_at(blocks, bits)
    solution = solve(blocks, budget, flock=flock(blocks), align=align)
    assert 0.999 * budget <= blocks.packed_bytes(solution.profile) <= budget


@pytest.mark.parametrize("seed", range(3))
def test_solve_few_blocks_never_exceed_the_budget(seed: int) -> None:
    blocks = random_blocks((32, 512), (10, 512), seed=seed)
    for bits in (0.5, 1.7, 2.9, 4.1, 8.0, 20.0):
        assert blocks.packed_bytes(solve(blocks, budget_at(blocks, bits)).profile) <= budget_at(blocks, bits)


@pytest.mark.parametrize("align", [0.0, 3.0])
def test_game_cost_of_a_move_is_the_change_of_damage_and_packed_bytes(align: float) -> None:
    blocks, rng = two_layers(), np.random.default_rng(1)
    coupling = flock(blocks)
    solution = solve(blocks, budget_at(blocks, 3), flock=coupling, align=align)
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
def test_solve_no_player_gains_by_moving_alone(align: float) -> None:
    """By enumeration of every action of every player, from the definition."""
    blocks = two_layers()
    coupling = flock(blocks)
    solution = solve(blocks, budget_at(blocks, 3), flock=coupling, align=align)
    profile = solution.equilibrium.profile
    phi = functools.partial(total, blocks, solution, coupling, align)
    here = phi(profile)
    gains = [here - phi(moved(profile, player, action)) for player in range(24) for action in range(5)]
    assert max(gains) <= 1e-12 * here
    assert solution.game.regret(profile).max() <= 1e-12 * here


def test_report_regret_equals_enumeration() -> None:
    blocks = two_layers()
    solution = solve(blocks, budget_at(blocks, 3))
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


def test_solve_players_choose_on_their_lower_convex_hulls() -> None:
    """No chosen damage lies above a chord of the player's damages by more than its tags of at most 4 bytes."""
    blocks = random_blocks((64, 4096), group_size=256)
    solution = solve(blocks, budget_at(blocks, 3))
    size = np.array([blocks.scheme.tile_bytes(width) for width in WIDTHS])
    slack = 4 * solution.price
    for damages, chosen in zip(blocks.damage, solution.equilibrium.profile, strict=True):
        for fewer in range(chosen):
            for more in range(chosen + 1, 5):
                share = (size[chosen] - size[fewer]) / (size[more] - size[fewer])
                assert damages[chosen] <= (1 - share) * damages[fewer] + share * damages[more] + slack


def test_solve_useless_width_is_never_chosen() -> None:
    blocks = random_blocks((64, 1024))
    blocks.damage[:, 2] = blocks.damage[:, 1]  # 3 bits, no better than 2
    solution = solve(blocks, budget_at(blocks, 3))
    assert not (solution.profile == 2).any()
    assert set(solution.profile) >= {1, 3}


def test_solve_equal_players_share_one_tag() -> None:
    """Blocks that are all alike choose one width, and a run of equal tags costs two bytes."""
    blocks = random_blocks((64, 1024))
    blocks.damage[:] = blocks.damage[0]
    solution = solve(blocks, budget_at(blocks, 3.5))
    assert len(set(solution.equilibrium.profile)) == 1
    assert blocks.packed_bytes(solution.equilibrium.profile) == 16 + 2 + 64 * blocks.scheme.tile_bytes(
        WIDTHS[solution.equilibrium.profile[0]]
    )


@pytest.mark.parametrize("bits", [1.5, 2.5, 3.5])
def test_solve_damage_is_within_one_percent_of_integer_programming(bits: float) -> None:
    """The integer program pays for tiles only, the game for tags too."""
    blocks = random_blocks((128, 1536))
    assert blocks.damage.shape == (192, 5)
    solution = solve(blocks, budget_at(blocks, bits))
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
    assert 0.998 * least <= total_damage(blocks, solution.profile) <= 1.01 * least


def test_solve_repeated_gives_the_same_profile_and_price() -> None:
    first, second = (
        solve(two_layers(), budget_at(two_layers(), 3), flock=flock(two_layers()), align=2.0, shrink=0.5)
        for _ in range(2)
    )
    assert first.price == second.price
    assert np.array_equal(first.profile, second.profile)


def test_solve_larger_budget_lowers_price_and_damage() -> None:
    blocks = random_blocks((64, 1024))
    solutions = [solve(blocks, budget_at(blocks, bits)) for bits in (1.5, 2.5, 3.5, 4.5)]
    prices = [solution.price for solution in solutions]
    damages = [total_damage(blocks, solution.profile) for solution in solutions]
    assert prices == sorted(prices, reverse=True)
    assert damages == sorted(damages, reverse=True)


def test_solve_impossible_budget_raises() -> None:
    with pytest.raises(ValueError, match="no price brings what is spent down to 20"):
        solve(two_layers(), 20)


def test_solve_ample_budget_takes_the_least_damage() -> None:
    blocks = two_layers()
    solution = solve(blocks, budget_at(blocks, 20))
    assert np.array_equal(solution.profile, blocks.damage.argmin(1))


def test_solve_single_block_takes_the_width_that_fits() -> None:
    blocks = random_blocks((16, 64))
    budget = 16 + 2 + blocks.scheme.tile_bytes(3)
    assert WIDTHS[solve(blocks, budget).profile[0]] == 3


@pytest.mark.slow
@pytest.mark.parametrize(("bits", "share"), [(1.0, 0.1), (2.0, 0.5), (4.0, 0.3), (4.0, 0.5)])
def test_solve_pruned_share_is_reached(bits: float, share: float) -> None:
    """The share is reached even where the budget would pay for more."""
    blocks = random_blocks((32, 1024))
    budget = budget_at(blocks, bits)
    solution = solve(blocks, budget, pruned=share)
    assert blocks.packed_bytes(solution.profile) <= budget
    assert (solution.profile == 0).mean() >= share


@pytest.mark.slow
def test_solve_costly_pruning_prunes_little_more_than_the_share() -> None:
    blocks = random_blocks((32, 1024))
    budget = budget_at(blocks, 3)
    free, forced = solve(blocks, budget), solve(blocks, budget, pruned=0.3)
    assert (free.profile == 0).mean() < 0.3 <= (forced.profile == 0).mean() <= 0.4
    assert free.subsidy == 0 < forced.subsidy
    assert total_damage(blocks, free.profile) < total_damage(blocks, forced.profile)


@pytest.mark.parametrize("seed", range(3))
def test_solve_stronger_alignment_lowers_disagreement(seed: int) -> None:
    blocks = random_blocks((64, 1024), (64, 1024), seed=seed)
    coupling, budget = flock(blocks), budget_at(blocks, 3)
    disagreeing = [
        disagreements(coupling, solve(blocks, budget, flock=coupling, align=align).equilibrium.profile)
        for align in (0.0, 20.0, 200.0)
    ]
    assert disagreeing[0] > disagreeing[1] > disagreeing[2]


def test_solve_full_shrinkage_exchanges_sensitivities_of_two_neighbours() -> None:
    """At full strength, two blocks that are each other's only neighbour exchange their sensitivities."""
    blocks = random_blocks((16, 128))
    coupling = sparse.csr_array(np.array([[0.0, 1], [1, 0]]))
    shrunk = solve(blocks, budget_at(blocks, 3), flock=coupling, shrink=1.0)
    exchanged = blocks.damage * np.exp(blocks.log_sensitivity[::-1] - blocks.log_sensitivity)[:, None]
    paid = shrunk.price * np.array([float(blocks.scheme.tile_bytes(width)) for width in WIDTHS])
    assert shrunk.game.own_cost == pytest.approx(exchanged + paid)


def test_solve_flock_without_strength_changes_nothing() -> None:
    blocks = two_layers()
    budget = budget_at(blocks, 3)
    assert np.array_equal(solve(blocks, budget, flock=flock(blocks)).profile, solve(blocks, budget).profile)
