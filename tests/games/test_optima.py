"""Bounds, solvers and the price of anarchy, against enumeration of all profiles of small problems."""

import itertools
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import sparse

from nashswarm.games import optima
from nashswarm.games.potential import Coupling, Game, best_response

few_examples = settings(max_examples=60, deadline=None)
SOLVERS = (optima.greedy, optima.dynamic_programme, optima.integer_programme)
Problem = tuple[np.ndarray, np.ndarray, int]


@st.composite
def problems(draw: st.DrawFn) -> Problem:
    """Up to five players, four actions, whole damages; any budget from the cheapest profile to beyond the dearest."""
    players, actions = draw(st.integers(1, 5)), draw(st.integers(1, 4))

    def numbers(most: int) -> np.ndarray:
        size = players * actions
        return np.array(draw(st.lists(st.integers(0, most), min_size=size, max_size=size))).reshape(players, actions)

    damage, cost = numbers(30), numbers(12) * draw(st.integers(1, 3))
    least, most = int(cost.min(1).sum()), int(cost.max(1).sum())
    return damage.astype(float), cost, draw(st.integers(least, most + 3))


def smooth(players: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Convex damages that fall fourfold with each bit, of very different scales, and the bytes of a tile."""
    rng = np.random.default_rng(seed)
    damage = rng.lognormal(sigma=2, size=(players, 1)) * 4.0 ** -np.array([0.0, 2, 3, 4, 8])
    return damage, np.tile([0, 292, 422, 552, 1072], (players, 1))


def enumerated(damage: np.ndarray, cost: np.ndarray, budget: int) -> float:
    """The least damage within the budget."""
    players, actions = damage.shape
    profiles = np.array(list(itertools.product(range(actions), repeat=players)))
    each = np.arange(players)
    return float(damage[each, profiles].sum(1)[cost[each, profiles].sum(1) <= budget].min())


def small_game(players: int, seed: int) -> Game:
    """A game of three actions in which all players are coupled and no cost is negative."""
    rng = np.random.default_rng(seed)
    upper = np.triu(rng.random((players, players)), 1)
    return Game(rng.random((players, 3)), (Coupling(sparse.csr_array(upper + upper.T), 1 - np.eye(3)),))


@given(problems())
@few_examples
def test_exact_solvers_match_enumeration(problem: Problem) -> None:
    least = enumerated(*problem)
    for solve in (optima.dynamic_programme, optima.integer_programme):
        assert optima.total(problem[0], solve(*problem)) == pytest.approx(least, abs=1e-7)


@given(problems())
@few_examples
def test_dual_bound_optimum_and_greedy_are_ordered_within_budget(problem: Problem) -> None:
    damage, cost, budget = problem
    bound, price = optima.dual_bound(*problem)
    least = enumerated(*problem)
    assert price >= 0
    assert bound <= least + 1e-9
    assert least <= optima.total(damage, optima.greedy(*problem)) + 1e-9
    assert all(optima.total(cost, solve(*problem)) <= budget for solve in SOLVERS)


@given(problems())
@few_examples
def test_dual_bound_is_maximum_over_prices(problem: Problem) -> None:
    """The dual is concave and piecewise linear: its maximum is at 0 or where two actions of a player cost the same."""
    damage, cost, budget = problem
    pairs = itertools.product(range(damage.shape[1]), repeat=2)
    slopes = [
        (damages[a] - damages[b]) / (sizes[b] - sizes[a])
        for a, b in pairs
        for damages, sizes in zip(damage, cost, strict=True)
        if sizes[b] > sizes[a]
    ]
    bounds = [(damage + price * cost).min(1).sum() - price * budget for price in (0, *slopes) if price >= 0]
    assert optima.dual_bound(*problem)[0] == pytest.approx(max(bounds), abs=1e-9)


@given(problems())
@few_examples
def test_convex_hull_has_no_chord_below_its_corners(problem: Problem) -> None:
    damage, cost, _ = problem
    corners = optima.convex_hull(damage, cost).corners
    for damages, sizes, hull in zip(damage, cost, corners, strict=True):
        assert (np.diff(sizes[hull]) >= 0).all()
        assert damages[hull[-1]] == damages.min()
        for here, (left, right) in itertools.product(hull, itertools.permutations(range(len(damages)), 2)):
            if sizes[left] <= sizes[here] <= sizes[right] and sizes[left] < sizes[right]:
                share = (sizes[here] - sizes[left]) / (sizes[right] - sizes[left])
                assert damages[here] <= (1 - share) * damages[left] + share * damages[right] + 1e-9


@given(st.integers(1, 60), st.integers(0, 1000), st.floats(0, 1))
@few_examples
def test_greedy_on_convex_curves_equals_choices_at_one_price(players: int, seed: int, share: float) -> None:
    damage, cost = smooth(players, seed)
    price = optima.dual_bound(damage, cost, int(share * 1072 * players))[1] * 1.0001
    wanted = (damage + price * cost).argmin(1)
    spent = int(optima.total(cost, wanted))
    assert np.array_equal(optima.greedy(damage, cost, spent), wanted)
    assert optima.dual_bound(damage, cost, spent)[0] == pytest.approx(optima.total(damage, wanted))


@given(st.integers(1, 60), st.integers(0, 1000), st.floats(0, 1))
@few_examples
def test_equilibrium_without_couplings_is_on_hull(players: int, seed: int, share: float) -> None:
    damage, cost = smooth(players, seed)
    damage *= np.random.default_rng(seed).uniform(0.3, 3, damage.shape)  # no longer convex
    price = optima.dual_bound(damage, cost, int(share * 1072 * players))[1]
    equilibrium = best_response(Game(damage + price * cost), np.zeros(players, int))
    assert (optima.convex_hull(damage, cost).corners == equilibrium.profile[:, None]).any(1).all()


@pytest.mark.parametrize("seed", range(3))
def test_solvers_agree_on_100_players_and_greedy_is_near_bound(seed: int) -> None:
    damage, cost = smooth(100, seed)
    bound, price = optima.dual_bound(damage, cost, 40_000)
    greedy, exact, other = (optima.total(damage, solve(damage, cost, 40_000)) for solve in SOLVERS)
    assert bound <= exact <= greedy <= bound + 520 * price
    assert exact == pytest.approx(other, rel=1e-7)


@pytest.mark.parametrize("solve", [*SOLVERS, optima.dual_bound])
def test_solvers_with_impossible_budget_raise(solve: Callable[..., object]) -> None:
    with pytest.raises(ValueError, match="a budget of 5 bytes is below the cheapest profile, 6 bytes"):
        solve(np.ones((2, 2)), np.array([[3, 4], [3, 9]]), 5)


def test_solvers_with_too_large_problem_raise(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(optima, "MOST_CELLS", 1)
    with pytest.raises(ValueError, match=r"needs \d+ cells, more than 1:"):
        optima.dynamic_programme(*smooth(20, 0), 20 * 400)
    with pytest.raises(ValueError, match="3 actions of 13 players make 1594323 profiles"):
        optima.least_potential(small_game(13, 0))


@given(st.integers(1, 4), st.integers(0, 1000))
@few_examples
def test_price_of_anarchy_matches_enumeration_of_small_games(players: int, seed: int) -> None:
    game = small_game(players, seed)
    profiles = [np.array(profile) for profile in itertools.product(range(3), repeat=players)]
    least = min(map(game.potential, profiles))
    worst = max(game.potential(profile) for profile in profiles if game.regret(profile).max() <= 1e-9)
    estimate, again = (optima.price_of_anarchy(game, 5, np.random.default_rng(seed)) for _ in range(2))
    assert optima.least_potential(game) == pytest.approx(least)
    assert optima.exact_price_of_anarchy(game) == pytest.approx(worst / least)
    assert estimate.price == pytest.approx(max(estimate.potentials) / least)
    assert 1 <= estimate.price == again.price <= worst / least + 1e-9
    assert all(game.regret(equilibrium.profile).max() <= 1e-12 for equilibrium in estimate.equilibria)


def test_price_of_anarchy_of_coordination_game_is_two() -> None:
    agree = Coupling(sparse.csr_array(np.array([[0.0, 1], [1, 0]])), 9 * (1 - np.eye(2)))
    game = Game(np.array([[1.0, 2], [1, 2]]), (agree,))
    assert optima.price_of_anarchy(game, 50, np.random.default_rng(0)).price == 2
    assert optima.exact_price_of_anarchy(game) == 2


def test_price_of_anarchy_with_zero_potential_raises() -> None:
    with pytest.raises(ValueError, match="the least potential is 0"):
        optima.exact_price_of_anarchy(Game(np.zeros((2, 2))))
