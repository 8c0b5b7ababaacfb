"""What equilibria are compared with: bounds, exact optima and the price of anarchy.

The separable problem is a multiple-choice knapsack (Kellerer, Pferschy & Pisinger 2004, chapter 11): minimise
``Σ_i damage[i, a_i]`` (nats per token) subject to ``Σ_i cost[i, a_i] ≤ budget`` (whole bytes).  A profile holds one
action per player.  A budget below the cheapest profile raises ValueError everywhere.
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

MOST_CELLS = 1 << 29  # of a table of the dynamic programme, one byte each
MOST_PROFILES = 1 << 20  # enumerated within a second or two
LARGEST = 1e4  # coefficient of an integer programme: HiGHS stops 1e-6 away, whatever the unit
ROUNDING = 1e-9  # share of a damage that sums may be wrong by


@dataclasses.dataclass(frozen=True)
class Hull:
    """The lower convex hull of every player's damages over its bytes.

    ``corners``: actions from the cheapest to the least damage, the last one repeated.  ``prices``: nats per byte that
    the step to the next corner saves, descending; 0 where no step is left.
    """

    corners: Int[np.ndarray, "players actions"]
    prices: Float[np.ndarray, "players steps"]


@dataclasses.dataclass(frozen=True)
class Anarchy:
    """Where best replies from random starts ended, and the least potential known, in the unit of the game's costs."""

    equilibria: tuple[Equilibrium, ...]
    least: float

    @property
    def potentials(self) -> Float[np.ndarray, " starts"]:
        return np.array([found.potentials[-1] for found in self.equilibria])

    @property
    def price(self) -> float:
        """The worst potential of an equilibrium in units of the least one; raises ValueError if that is not above 0."""
        return _ratio(float(self.potentials.max()), self.least)


def total(values: Float[np.ndarray, "players actions"] | Cost, profile: Profile) -> float:
    """What ``profile`` adds up to: nats per token or bytes."""
    return float(values[np.arange(len(profile)), profile].sum())


def convex_hull(damage: Damage, cost: Cost) -> Hull:
    """All hulls at once, by steps of the steepest descent."""
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
    """The Lagrangian dual ``max_λ Σ_i min_a (damage + λ cost) − λ budget`` (Everett 1963) and the price λ that attains
    it, in nats per token and nats per byte.

    No profile within the budget has less damage.  The maximum is at a slope of a hull: the one of the first step that
    is no longer affordable when steps are taken from the steepest on (Sinha & Zoltners 1979).
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
    """From the cheapest profile, the affordable upgrade of the largest gain per byte, until none is left (Fox 1966)."""
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
    """A profile of the least damage within the budget, exact to the rounding of sums.

    Actions that the dual rules out are left out first (see ``candidates``).  Raises ValueError if the table of the
    others, players × bytes in units of their greatest common divisor, would be too large.
    """
    kept = candidates(damage, cost, budget)
    least = np.where(kept, cost, np.iinfo(np.int64).max).min(1)
    extra = np.where(kept, cost - least[:, None], 0)
    unit = max(int(np.gcd.reduce(extra, axis=None)), 1)
    steps = extra // unit
    states = min(_room(least, budget) // unit, int(steps.max(1).sum())) + 1
    free = np.flatnonzero(kept.sum(1) > 1)
    if len(free) * states > MOST_CELLS:
        raise ValueError(
            f"a dynamic programme of {len(free)} players over {states} sizes needs {len(free) * states} cells, "
            f"more than {MOST_CELLS}: compare with the dual bound or on fewer players"
        )
    lowest = np.zeros(states)  # damage of the players so far that use at most so many units
    choices = np.zeros((len(free), states), np.uint8)
    for choice, player in zip(choices, free.tolist(), strict=True):
        before, lowest = lowest, np.full(states, np.inf)
        for action in np.flatnonzero(kept[player]).tolist():
            step = int(steps[player, action])
            reached = before[: max(states - step, 0)] + damage[player, action]
            better = reached < lowest[step:]
            np.copyto(lowest[step:], reached, where=better)
            choice[step:][better] = action
    profile = kept.argmax(1)
    state = states - 1
    for choice, player in zip(choices[::-1], free[::-1].tolist(), strict=True):
        profile[player] = choice[state]
        state -= int(steps[player, profile[player]])
    return profile


def candidates(damage: Damage, cost: Cost, budget: int) -> Bool[np.ndarray, "players actions"]:
    """Which actions an optimum may hold (Dyer, Kayal & Walker 1984).

    A profile with action a of player i is worse than the dual bound by at least the reduced cost of a, what it costs
    at the dual's price beyond the player's best; none that exceeds the gap of the greedy profile is optimal.
    """
    bound, price = dual_bound(damage, cost, budget)
    known = total(damage, greedy(damage, cost, budget))
    gap = known - bound + ROUNDING * (abs(known) + abs(bound) + price * budget)
    priced = damage + price * cost
    return priced - priced.min(1, keepdims=True) <= gap


def integer_programme(damage: Damage, cost: Cost, budget: int, gap: float = 0.0) -> Profile:
    """A profile within ``gap`` (a share) of the least damage, by SciPy's HiGHS; ``gap`` 0 asks for the least, up to
    the solver's tolerances (1e-10 of the largest difference of damages).

    Raises RuntimeError where the solver gives up.
    """
    players, actions = damage.shape
    _room(cost.min(1), budget)
    above = damage - damage.min(1, keepdims=True)
    found = optimize.milp(
        above.ravel() * (LARGEST / (above.max() or 1.0)),
        constraints=[
            optimize.LinearConstraint(sparse.kron(sparse.eye_array(players), np.ones((1, actions))), 1, 1),
            optimize.LinearConstraint(sparse.csr_array(cost.reshape(1, -1).astype(float)), -np.inf, budget),
        ],
        integrality=np.ones(damage.size),
        bounds=optimize.Bounds(0, 1),
        options={"mip_rel_gap": gap},
    )
    if found.x is None:
        raise RuntimeError(f"the integer programme has no answer: {found.message}")
    profile: Profile = found.x.reshape(players, actions).argmax(1)
    if total(cost, profile) > budget:
        raise RuntimeError(f"the integer programme spends {total(cost, profile):.0f} bytes of {budget}")
    return profile


def least_potential(game: Game) -> float:
    """The least Φ over all profiles, by enumeration.  Raises ValueError if there are too many."""
    return float(_all_potentials(game).min())


def exact_price_of_anarchy(game: Game) -> float:
    """The worst pure equilibrium's Φ in units of the least Φ, by enumeration of all profiles.

    In a potential game an equilibrium is a profile whose Φ nobody lowers alone.  Raises ValueError if there are too
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
    """The worst equilibrium against the least potential (Koutsoupias & Papadimitriou 1999), over random starts.

    The least potential is exact where all profiles can be enumerated, otherwise the least that was found.  Either way
    the price is a lower estimate: a worse equilibrium may exist.
    """
    players, actions = game.own_cost.shape
    classes = independent_classes(game.couplings, players)
    equilibria = tuple(
        best_response(game, seed.integers(actions, size=(players,)), classes)
        for seed in track(rng.spawn(starts), "equilibria from random starts")
    )
    least = min(found.potentials[-1] for found in equilibria)
    if actions**players <= MOST_PROFILES:
        least = min(least, least_potential(game))
    return Anarchy(equilibria, least)


def _all_potentials(game: Game) -> Float[np.ndarray, " profiles"]:
    """Φ of every profile; the first player's action changes fastest.  Raises ValueError if there are too many."""
    players, actions = game.own_cost.shape
    if (count := actions**players) > MOST_PROFILES:
        raise ValueError(f"{actions} actions of {players} players make {count} profiles, more than {MOST_PROFILES}")
    numbers = np.arange(count)
    chosen = [numbers // actions**player % actions for player in range(players)]
    potentials = np.zeros(count)
    for own, taken in zip(game.own_cost, chosen, strict=True):
        potentials += own[taken]
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
    """Everybody at its fewest bytes, at the least damage among equals."""
    return np.where(cost == cost.min(1, keepdims=True), damage, np.inf).argmin(1)


def _room(cheapest: Int[np.ndarray, " players"], budget: int) -> int:
    """The bytes that the cheapest profile leaves of the budget."""
    room = budget - int(cheapest.sum())
    if room < 0:
        raise ValueError(f"a budget of {budget} bytes is below the cheapest profile, {int(cheapest.sum())} bytes")
    return room
