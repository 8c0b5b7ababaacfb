"""Textbook games, and random games against enumeration of all their profiles."""

import functools
import itertools
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import sparse

from nashswarm.games.potential import Coupling, Game, best_response, independent_classes, shadow_price

few_examples = settings(max_examples=30, deadline=None)
Profile = tuple[int, ...]


def prisoners() -> Game:
    """Years in prison for silence (action 0) and betrayal (1): 1 if both are silent, 2 if both betray, else 3 and 0."""
    return Game(np.array([[3.0, 0], [3, 0]]), (pair(np.array([[-2.0, 0], [0, 2]])),))


def pair(disagreement: np.ndarray) -> Coupling:
    return Coupling(sparse.csr_array(np.array([[0.0, 1], [1, 0]])), disagreement)


def profiles(game: Game) -> list[Profile]:
    players, actions = game.own_cost.shape
    return list(itertools.product(range(actions), repeat=players))


def cost(game: Game, profile: Profile, player: int) -> float:
    """u_i(b) from its definition."""
    total = game.own_cost[player, profile[player]]
    for part in game.couplings:
        for other, weight in enumerate(part.weights.toarray()[player]):
            total += weight * part.disagreement[profile[player], profile[other]]
    return float(total)


def potential(game: Game, profile: Profile) -> float:
    """Φ(b) from its definition, every pair once."""
    total = sum(game.own_cost[player, action] for player, action in enumerate(profile))
    for part in game.couplings:
        weights = part.weights.toarray()
        for one, other in itertools.combinations(range(len(profile)), 2):
            total += weights[one, other] * part.disagreement[profile[one], profile[other]]
    return float(total)


def deviations(game: Game, profile: Profile, player: int) -> list[Profile]:
    return [(*profile[:player], action, *profile[player + 1 :]) for action in range(game.own_cost.shape[1])]


def regrets(game: Game, profile: Profile) -> list[float]:
    return [
        cost(game, profile, player) - min(cost(game, other, player) for other in deviations(game, profile, player))
        for player in range(len(profile))
    ]


@st.composite
def numbers_of_games(draw: st.DrawFn) -> tuple[np.ndarray, list[tuple[np.ndarray, np.ndarray]]]:
    """Up to four players, three actions, two sparse couplings; whole numbers, so that sums are exact."""
    players, actions = draw(st.integers(1, 4)), draw(st.integers(1, 3))

    def numbers(rows: int, columns: int) -> np.ndarray:
        values = draw(st.lists(st.integers(-4, 4), min_size=rows * columns, max_size=rows * columns))
        return np.array(values, float).reshape(rows, columns)

    def symmetric(size: int) -> np.ndarray:
        upper = np.triu(numbers(size, size))
        return upper + np.triu(upper, 1).T

    couplings = []
    for _ in range(draw(st.integers(0, 2))):
        weights = symmetric(players)
        np.fill_diagonal(weights, 0)
        weights[abs(weights) < 2] = 0
        couplings.append((weights, symmetric(actions)))
    return numbers(players, actions), couplings


def build_game(numbers: tuple[np.ndarray, list[tuple[np.ndarray, np.ndarray]]]) -> Game:
    own_cost, couplings = numbers
    return Game(own_cost, tuple(Coupling(sparse.csr_array(weights), phi) for weights, phi in couplings))


games = numbers_of_games().map(lambda numbers: functools.partial(build_game, numbers))
MakeGame = Callable[[], Game]  # built outside of the strategy, because shape checks draw from `random`


def test_prisoners_dilemma_has_textbook_costs() -> None:
    years = {
        profile: (cost(prisoners(), profile, 0), cost(prisoners(), profile, 1)) for profile in profiles(prisoners())
    }
    assert years == {(0, 0): (1, 1), (0, 1): (3, 0), (1, 0): (0, 3), (1, 1): (2, 2)}


def test_best_response_finds_equilibrium_of_prisoners_dilemma() -> None:
    game = prisoners()
    assert [profile for profile in profiles(game) if max(regrets(game, profile)) == 0] == [(1, 1)]
    for start in profiles(game):
        assert best_response(game, np.array(start)).profile.tolist() == [1, 1]


def test_coupling_of_matching_pennies_raises() -> None:
    """One player wins if the pennies match, the other if they differ, so the loser always gains by changing."""
    loss = {(a, b): (1 - (a == b), float(a == b)) for a in (0, 1) for b in (0, 1)}
    for a, b in loss:
        assert loss[a, b][0] > loss[1 - a, b][0] or loss[a, b][1] > loss[a, 1 - b][1]
    with pytest.raises(ValueError, match="J_ij ≠ J_ji"):
        Coupling(sparse.csr_array(np.array([[0.0, 1], [-1, 0]])), 1 - np.eye(2))


def test_coordination_game_has_two_equilibria() -> None:
    game = Game(np.zeros((2, 2)), (pair(1 - np.eye(2)),))
    assert [profile for profile in profiles(game) if max(regrets(game, profile)) == 0] == [(0, 0), (1, 1)]


def test_coupling_without_potential_raises() -> None:
    with pytest.raises(ValueError, match="disagreement"):
        pair(np.array([[0.0, 1], [2, 0]]))
    with pytest.raises(ValueError, match="its own neighbour"):
        Coupling(sparse.csr_array(np.eye(2)), 1 - np.eye(2))


@given(games, st.data())
@few_examples
def test_potential_changes_by_cost_change_of_mover(make_game: MakeGame, data: st.DataObject) -> None:
    game = make_game()
    profile = data.draw(st.sampled_from(profiles(game)))
    before = np.array(profile)
    assert game.potential(before) == potential(game, profile)
    for player in range(len(profile)):
        costs = game.costs(before)[player]
        for after in deviations(game, profile, player):
            assert costs[after[player]] == cost(game, after, player)
            gained = costs[after[player]] - costs[profile[player]]
            assert game.potential(np.array(after)) - game.potential(before) == gained


@given(games, st.data())
@few_examples
def test_regret_matches_enumeration(make_game: MakeGame, data: st.DataObject) -> None:
    game = make_game()
    profile = data.draw(st.sampled_from(profiles(game)))
    assert game.regret(np.array(profile)).tolist() == regrets(game, profile)


@given(games, st.data())
@few_examples
def test_best_response_ends_at_equilibrium(make_game: MakeGame, data: st.DataObject) -> None:
    game = make_game()
    start = data.draw(st.sampled_from(profiles(game)))
    before = np.array(start)
    equilibrium = best_response(game, before)
    end = tuple(equilibrium.profile.tolist())
    assert max(regrets(game, end)) == 0
    assert before.tolist() == list(start)
    assert all(later < earlier for earlier, later in itertools.pairwise(equilibrium.potentials))
    assert len(equilibrium.potentials) == len(equilibrium.regrets) == equilibrium.sweeps + 1
    assert (equilibrium.potentials[0], equilibrium.potentials[-1]) == (potential(game, start), potential(game, end))
    assert (equilibrium.regrets[0], equilibrium.regrets[-1]) == (max(regrets(game, start)), 0)
    assert (end == start) == (max(regrets(game, start)) == 0)


@given(games)
@few_examples
def test_profile_of_least_potential_is_equilibrium(make_game: MakeGame) -> None:
    game = make_game()
    least = min(profiles(game), key=lambda profile: potential(game, profile))
    assert best_response(game, np.array(least)).profile.tolist() == list(least)


def lattice(players: int, seed: int) -> Game:
    """Many players with about five neighbours each and costs that are not integers."""
    rng = np.random.default_rng(seed)
    upper = sparse.triu(sparse.random_array((players, players), density=5 / players, rng=rng), 1)
    disagreement = rng.random((4, 4))
    coupling = Coupling(sparse.csr_array(upper + upper.T), disagreement + disagreement.T)
    return Game(rng.random((players, 4)), (coupling,))


@given(st.integers(0, 1000))
@few_examples
def test_independent_classes_partition_players_without_neighbours(seed: int) -> None:
    one, other = lattice(30, seed).couplings[0], lattice(30, seed + 1).couplings[0]
    classes = independent_classes([one, other], 30)
    assert sorted(np.concatenate(classes).tolist()) == list(range(30))
    for members in classes:
        for part in (one, other):
            assert not part.weights.toarray()[np.ix_(members, members)].any()


def test_independent_classes_without_couplings_is_one_class() -> None:
    assert [members.tolist() for members in independent_classes([], 3)] == [[0, 1, 2]]


@given(st.integers(0, 1000))
@few_examples
def test_best_response_by_class_equals_one_by_one(seed: int) -> None:
    game = lattice(30, seed)
    start = np.random.default_rng(seed).integers(0, 4, 30)
    together = independent_classes(game.couplings, 30)
    one_by_one = [np.array([player]) for members in together for player in members]
    by_class, by_player = best_response(game, start, together), best_response(game, start, one_by_one)
    assert np.array_equal(by_class.profile, by_player.profile)
    assert by_class.potentials == by_player.potentials


@pytest.mark.parametrize("seed", range(5))
def test_best_response_of_large_game_ends_at_equilibrium(seed: int) -> None:
    game = lattice(500, seed)
    equilibrium = best_response(game, np.zeros(500, int))
    assert equilibrium.regrets[-1] <= 1e-12
    assert (np.diff(equilibrium.potentials) < 0).all()
    assert np.array_equal(equilibrium.profile, best_response(game, np.zeros(500, int)).profile)


def market(players: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Damage of every action of every player (convex in its bytes), and the bytes of each action."""
    rng = np.random.default_rng(seed)
    size = np.array([0.0, 10, 20, 30])
    return rng.exponential(size=(players, 1)) * np.array([8.0, 3, 1, 0]), size


def chosen(damage: np.ndarray, size: np.ndarray, price: float) -> np.ndarray:
    return (damage + price * size).argmin(1)


@given(st.integers(1, 40), st.integers(0, 1000), st.floats(0, 1), st.sampled_from([1e-6, 1.0, 1e6]))
@few_examples
def test_shadow_price_meets_separable_budget_within_one_step(
    players: int, seed: int, share: float, start: float
) -> None:
    damage, size = market(players, seed)
    budget = share * 30 * players
    price, profile = shadow_price(
        lambda price: chosen(damage, size, price), lambda profile: float(size[profile].sum()), budget, start
    )
    assert budget - 10 < size[profile].sum() <= budget
    assert np.array_equal(profile, chosen(damage, size, price))


@given(st.integers(0, 1000))
@few_examples
def test_shadow_price_with_nonmonotone_spending_keeps_budget(seed: int) -> None:
    noise = np.random.default_rng(seed).random(1000) * 30

    def spent(price: float) -> float:
        return 100 / max(price, 1e-9) + noise[int(price * 997) % 1000]

    price, solution = shadow_price(lambda price: price, spent, 60.0, 1.0)
    assert price == solution
    assert spent(solution) <= 60


def test_shadow_price_with_impossible_budget_raises() -> None:
    with pytest.raises(ValueError, match=r"no price brings what is spent down to 5: .* it is 7"):
        shadow_price(lambda price: price, lambda price: 7 + 1 / (1 + price), 5.0, 1.0)


def test_shadow_price_with_ample_budget_is_almost_zero() -> None:
    damage, size = market(10, 0)
    price, profile = shadow_price(
        lambda price: chosen(damage, size, price), lambda profile: float(size[profile].sum()), 300.0, 1.0
    )
    assert price < 1e-20
    assert (profile == 3).all()
