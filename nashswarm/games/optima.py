"""What equilibria are compared with: bounds, exact optima and the price of anarchy.

Without couplings, choosing widths under a budget is a multiple-choice knapsack problem (Kellerer, Pferschy & Pisinger
2004, chapter 11): minimise ``Σ_i damage[i, a_i]`` (nats per token) subject to ``Σ_i cost[i, a_i] ≤ budget`` (bytes,
integers).  A profile is one action for each player.  All functions raise ValueError if the budget is below the cost of
the cheapest profile.
"""

import dataclasses
import heapq
from collections.abc import Callable, Iterable, Sequence

import numpy as np
from jaxtyping import Bool, Float, Int
from scipy import optimize, sparse

from nashswarm.games.potential import Equilibrium, Game, best_response, independent_classes

Damage = Float[np.ndarray, "players actions"]
Cost = Int[np.ndarray, "players actions"]
Profile = Int[np.ndarray, " players"]
Seeds = Sequence[np.random.Generator]

MOST_CELLS = 1 << 29  # in the table of the dynamic programme, one byte each
MOST_PROFILES = 1 << 20  # that are enumerated, within a second or two
LARGEST_COEFFICIENT = 1e4  # of an integer programme: HiGHS has an absolute tolerance of 1e-6
ROUNDING = 1e-9  # relative error that sums may have


@dataclasses.dataclass(frozen=True)
class Hull:
    """The lower convex hull of each player's damage as a function of its bytes.

    ``corners`` are the actions on the hull, from the fewest bytes to the least damage; the last one is repeated.
    ``prices`` are the nats per byte that each step to the next corner saves, descending; 0 after the last corner.
    """

    corners: Int[np.ndarray, "players actions"]
    prices: Float[np.ndarray, "players steps"]


@dataclasses.dataclass(frozen=True)
class Anarchy:
    """Equilibria from random starts, and the least potential known, in the unit of the costs of the game."""

    equilibria: tuple[Equilibrium, ...]
    least: float

    @property
    def potentials(self) -> Float[np.ndarray, " starts"]:
        """Potential of each equilibrium."""
        return np.array([equilibrium.potentials[-1] for equilibrium in self.equilibria])

    @property
    def price(self) -> float:
        """Ratio of the largest potential of an equilibrium to the least potential.

        Raises ValueError if the least potential is 0 or below.
        """
        return _ratio(float(self.potentials.max()), self.least)


def total(values: Float[np.ndarray, "players actions"] | Cost, profile: Profile) -> float:
    """Add up the values of the actions of a profile (nats per token, or bytes)."""
    return float(values[np.arange(len(profile)), profile].sum())


def convex_hull(damage: Damage, cost: Cost) -> Hull:
    """Compute the hulls of all players at once, following the steepest descent from corner to corner."""
    players, actions = damage.shape
    rows = np.arange(players)
    here = _cheapest(damage, cost)
    corners, prices = [here], []
    for _ in range(actions - 1):
        more = cost - cost[rows, here][:, None]
        saved = damage[rows, here][:, None] - damage
        rate = np.where((more > 0) & (saved > 0), saved / np.maximum(more, 1), 0.0)
        steepest = rate.max(1)
        farthest = np.where(rate == steepest[:, None], more, -1).argmax(1)
        here = np.where(steepest > 0, farthest, here)
        corners.append(here)
        prices.append(steepest)
    return Hull(np.stack(corners, 1), np.stack(prices, 1) if prices else np.empty((players, 0)))


def dual_bound(damage: Damage, cost: Cost, budget: int) -> tuple[float, float]:
    """Compute a lower bound on the damage within the budget (nats per token), and its price λ (nats per byte).

    The bound is the Lagrangian dual ``max_λ Σ_i min_a (damage + λ cost) − λ budget`` (Everett 1963).  The maximum is at
    a slope of a hull: take the steps of all hulls in descending order of their slope; λ is the slope of the first step
    that the budget does not cover (Sinha & Zoltners 1979).
    """
    hull = convex_hull(damage, cost)
    along = np.take_along_axis(cost, hull.corners, 1)
    room = _room(along[:, 0], budget)
    order = np.argsort(-hull.prices, axis=None, kind="stable")
    spent = np.cumsum(np.diff(along, axis=1).ravel()[order])
    first = int(np.searchsorted(spent, room, side="right"))
    price = float(hull.prices.ravel()[order[first]]) if first < len(order) else 0.0
    return float((damage + price * cost).min(1).sum()) - price * budget, price


def greedy(damage: Damage, cost: Cost, budget: int) -> Profile:
    """Start at the cheapest profile and take affordable upgrades in order of their gain per byte (Fox 1966)."""
    profile = _cheapest(damage, cost)
    room = _room(cost[np.arange(len(profile)), profile], budget)

    def upgrades(player: int, action: int) -> list[tuple[float, int, int, int]]:
        gains = (damage[player, action] - damage[player]).tolist()
        extra = (cost[player] - cost[player, action]).tolist()
        return [
            (-gain / more, player, action, other)
            for other, (gain, more) in enumerate(zip(gains, extra, strict=True))
            if gain > 0 and more > 0
        ]

    waiting = [upgrade for player, action in enumerate(profile.tolist()) for upgrade in upgrades(player, action)]
    heapq.heapify(waiting)
    while waiting:
        _, player, action, other = heapq.heappop(waiting)
        extra = int(cost[player, other] - cost[player, action])
        if profile[player] == action and extra <= room:
            profile[player], room = other, room - extra
            for upgrade in upgrades(player, other):
                heapq.heappush(waiting, upgrade)
    return profile


def dynamic_programme(damage: Damage, cost: Cost, budget: int) -> Profile:
    """Find a profile of the least damage within the budget, exact up to the rounding of sums.

    Actions that the dual bound rules out are dropped first (see ``candidates``).  Raises ValueError if the table of the
    remaining players and budgets, in units of the greatest common divisor of the costs, would be too large.
    """
    possible = candidates(damage, cost, budget)
    least = np.where(possible, cost, np.iinfo(np.int64).max).min(1)
    extra = np.where(possible, cost - least[:, None], 0)
    unit = max(int(np.gcd.reduce(extra, axis=None)), 1)
    steps = extra // unit
    states = min(_room(least, budget) // unit, int(steps.max(1).sum())) + 1
    free = np.flatnonzero(possible.sum(1) > 1)
    if len(free) * states > MOST_CELLS:
        raise ValueError(
            f"a dynamic programme of {len(free)} players over {states} sizes needs {len(free) * states} cells, "
            f"more than {MOST_CELLS}: compare with the dual bound or on fewer players"
        )
    lowest = np.zeros(states)  # damage of the players so far, for each number of units that they may use
    choices = np.zeros((len(free), states), np.uint8)
    for choice, player in zip(choices, free.tolist(), strict=True):
        before, lowest = lowest, np.full(states, np.inf)
        for action in np.flatnonzero(possible[player]).tolist():
            step = int(steps[player, action])
            reached = before[: max(states - step, 0)] + damage[player, action]
            better = reached < lowest[step:]
            np.copyto(lowest[step:], reached, where=better)
            choice[step:][better] = action
    profile = possible.argmax(1)
    state = states - 1
    for choice, player in zip(choices[::-1], free[::-1].tolist(), strict=True):
        profile[player] = choice[state]
        state -= int(steps[player, profile[player]])
    return profile


def candidates(damage: Damage, cost: Cost, budget: int) -> Bool[np.ndarray, "players actions"]:
    """Return a mask of the actions that an optimal profile may contain (Dyer, Kayal & Walker 1984).

    The reduced cost of an action is what it costs at the price of the dual beyond the player's best action.  A profile
    with that action exceeds the dual bound by at least its reduced cost.  Actions whose reduced cost exceeds the gap
    between the greedy profile and the dual bound are therefore not optimal.
    """
    bound, price = dual_bound(damage, cost, budget)
    known = total(damage, greedy(damage, cost, budget))
    gap = known - bound + ROUNDING * (abs(known) + abs(bound) + price * budget)
    priced = damage + price * cost
    return priced - priced.min(1, keepdims=True) <= gap


def integer_programme(damage: Damage, cost: Cost, budget: int, gap: float = 0.0) -> Profile:
    """Find a profile whose damage is within ``gap`` (relative) of the least one, by SciPy's HiGHS solver.

    ``gap=0`` asks for the least damage, up to the tolerance of the solver (1e-10 of the largest difference of damages).
    Raises RuntimeError if the solver gives up.
    """
    players, actions = damage.shape
    _room(cost.min(1), budget)
    above = damage - damage.min(1, keepdims=True)
    solution = optimize.milp(
        above.ravel() * (LARGEST_COEFFICIENT / (above.max() or 1.0)),
        constraints=[
            optimize.LinearConstraint(sparse.kron(sparse.eye_array(players), np.ones((1, actions))), 1, 1),
            optimize.LinearConstraint(sparse.csr_array(cost.reshape(1, -1).astype(float)), -np.inf, budget),
        ],
        integrality=np.ones(damage.size),
        bounds=optimize.Bounds(0, 1),
        options={"mip_rel_gap": gap},
    )
    if solution.x is None:
        raise RuntimeError(f"the integer programme has no solution: {solution.message}")
    profile: Profile = solution.x.reshape(players, actions).argmax(1)
    if total(cost, profile) > budget:
        raise RuntimeError(f"the integer programme spends {total(cost, profile):.0f} bytes of {budget}")
    return profile


def least_potential(game: Game) -> float:
    """Compute the least potential Φ by enumerating all profiles.

    Raises ValueError if there are too many.
    """
    return float(_all_potentials(game).min())


def exact_price_of_anarchy(game: Game) -> float:
    """Compute the ratio of the largest Φ of a pure equilibrium to the least Φ, by enumerating all profiles.

    In a potential game, a profile is an equilibrium if no player can lower Φ alone.  Raises ValueError if there are too
    many profiles, or if the least Φ is 0 or below.
    """
    players, actions = game.own_cost.shape
    potentials = _all_potentials(game)
    tolerance = ROUNDING * float(np.abs(potentials).max())
    stable = np.ones(len(potentials), bool)
    for player in range(players):
        alone = potentials.reshape(-1, actions, actions**player)  # the middle axis is the player's action
        stable &= (alone <= alone.min(1, keepdims=True) + tolerance).ravel()
    return _ratio(float(potentials[stable].max()), float(potentials.min()))


def price_of_anarchy(
    game: Game,
    starts: int,
    rng: np.random.Generator,
    track: Callable[[Seeds, str], Iterable[np.random.Generator]] = lambda seeds, description: seeds,
) -> Anarchy:
    """Estimate the price of anarchy (Koutsoupias & Papadimitriou 1999) from equilibria of random starts.

    The least potential is exact if all profiles can be enumerated; otherwise it is the least of the equilibria.  The
    price is a lower estimate either way, because a worse equilibrium may exist.
    """
    players, actions = game.own_cost.shape
    classes = independent_classes(game.couplings, players)
    equilibria = tuple(
        best_response(game, seed.integers(actions, size=(players,)), classes)
        for seed in track(rng.spawn(starts), "equilibria from random starts")
    )
    least = min(equilibrium.potentials[-1] for equilibrium in equilibria)
    if actions**players <= MOST_PROFILES:
        least = min(least, least_potential(game))
    return Anarchy(equilibria, least)


def _all_potentials(game: Game) -> Float[np.ndarray, " profiles"]:
    """Compute Φ of all profiles, the first player's action changing fastest.

    Raises ValueError if there are too many.
    """
    players, actions = game.own_cost.shape
    if (count := actions**players) > MOST_PROFILES:
        raise ValueError(f"{actions} actions of {players} players make {count} profiles, more than {MOST_PROFILES}")
    numbers = np.arange(count)
    chosen = [numbers // actions**player % actions for player in range(players)]
    potentials = np.zeros(count)
    for own_cost, action in zip(game.own_cost, chosen, strict=True):
        potentials += own_cost[action]
    for part in game.couplings:
        pairs = sparse.triu(part.weights).tocoo()
        for one, other, weight in zip(pairs.row.tolist(), pairs.col.tolist(), pairs.data.tolist(), strict=True):
            potentials += weight * part.disagreement[chosen[one], chosen[other]]
    return potentials


def _ratio(worst: float, least: float) -> float:
    if least <= 0:
        raise ValueError(f"the least potential is {least:g}: the price of anarchy needs one above 0")
    return worst / least


def _cheapest(damage: Damage, cost: Cost) -> Profile:
    """Return the profile of the fewest bytes, and of the least damage among equals."""
    return np.where(cost == cost.min(1, keepdims=True), damage, np.inf).argmin(1)


def _room(cheapest: Int[np.ndarray, " players"], budget: int) -> int:
    """Return the bytes of the budget that the cheapest profile leaves."""
    room = budget - int(cheapest.sum())
    if room < 0:
        raise ValueError(f"a budget of {budget} bytes is below the cheapest profile, {int(cheapest.sum())} bytes")
    return room
