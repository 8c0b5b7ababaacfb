"""Finite games on a graph, solved by best response.

Let b be a profile, one action for each player.  Player i pays a cost of its own, c_i, and a cost of disagreeing with
its neighbours: ``u_i(b) = c_i(b_i) + Σ_j J_ij φ(b_i, b_j)``.  If J and φ are symmetric, a move of one player changes
the potential ``Φ(b) = Σ_i c_i(b_i) + Σ_{i<j} J_ij φ(b_i, b_j)`` by exactly the change of its own cost.  This is an
exact potential game (Monderer & Shapley 1996): strictly improving moves end at a pure Nash equilibrium after finitely
many steps.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import TypeVar

import numpy as np
from jaxtyping import Float, Int
from scipy import sparse

Solution = TypeVar("Solution")
LARGEST_RATIO = 2.0**100  # of a price to the first one: no higher price is tried
TOLERANCE = 1e-12  # smallest gain that counts as an improvement, as a share of the scale of costs


@dataclasses.dataclass(frozen=True)
class Coupling:
    """Costs between pairs of players.

    ``weights`` (J) is the sparse matrix of players × players, ``disagreement`` (φ) the cost of each pair of actions.
    Raises ValueError if either is not symmetric or a player is its own neighbour.
    """

    weights: sparse.csr_array
    disagreement: Float[np.ndarray, "actions actions"]

    def __post_init__(self) -> None:
        if abs(self.weights - self.weights.T).max() > 0:
            raise ValueError("the coupling is not symmetric (J_ij ≠ J_ji), so no potential exists: symmetrise it first")
        if (self.disagreement != self.disagreement.T).any():
            raise ValueError("the disagreement φ(a, b) is not symmetric, so no potential exists: symmetrise it first")
        if self.weights.diagonal().any():
            raise ValueError("a player is its own neighbour: move that weight into own_cost")


@dataclasses.dataclass(frozen=True)
class Game:
    """The own cost of each action of each player, and the couplings between players."""

    own_cost: Float[np.ndarray, "players actions"]
    couplings: tuple[Coupling, ...] = ()

    def costs(self, profile: Int[np.ndarray, " players"]) -> Float[np.ndarray, "players actions"]:
        """Compute what each action would cost each player if all others stay at ``profile``."""
        return self.own_cost + sum(part.weights @ part.disagreement[profile] for part in self.couplings)

    def potential(self, profile: Int[np.ndarray, " players"]) -> float:
        """Compute the potential Φ of a profile."""
        players = np.arange(len(profile))
        own = self.own_cost[players, profile]
        return float((own + (self.costs(profile)[players, profile] - own) / 2).sum())

    def regret(self, profile: Int[np.ndarray, " players"]) -> Float[np.ndarray, " players"]:
        """Compute what each player gains by its best deviation if all others stay, over all of its actions."""
        costs = self.costs(profile)
        return costs[np.arange(len(profile)), profile] - costs.min(1)


@dataclasses.dataclass(frozen=True)
class Equilibrium:
    """The profile at which best response ended.

    ``potentials`` and ``regrets`` are the potential and the largest regret, at the start and after each sweep.
    """

    profile: Int[np.ndarray, " players"]
    potentials: list[float]
    regrets: list[float]

    @property
    def sweeps(self) -> int:
        """Number of sweeps in which a player moved."""
        return len(self.potentials) - 1


def independent_classes(couplings: Sequence[Coupling], players: int) -> list[Int[np.ndarray, "_"]]:
    """Split the players into classes whose members do not interact, by a greedy colouring of the coupling graph."""
    if not couplings:
        return [np.arange(players)]
    graph = sum((abs(part.weights) for part in couplings[1:]), abs(couplings[0].weights)).tocsr()
    starts, neighbours = graph.indptr.tolist(), graph.indices.tolist()
    colours = [-1] * players
    for player in range(players):
        taken = {colours[other] for other in neighbours[starts[player] : starts[player + 1]]}
        colours[player] = next(colour for colour in range(len(taken) + 1) if colour not in taken)
    order = np.array(colours)
    return [np.flatnonzero(order == colour) for colour in range(order.max() + 1)]


def best_response(
    game: Game,
    profile: Int[np.ndarray, " players"],
    classes: Sequence[Int[np.ndarray, "_"]] | None = None,
) -> Equilibrium:
    """Move players to their best responses, sweep after sweep from ``profile``, until none gains by moving alone.

    The players of a class (see ``independent_classes``) move at the same time.  They do not interact, so each move
    lowers the potential as if it were made alone.
    """
    profile = profile.copy()
    classes = independent_classes(game.couplings, len(profile)) if classes is None else classes
    local = [[(part.weights[members], part.disagreement) for part in game.couplings] for members in classes]
    largest = max([float(np.abs(game.own_cost).mean())] + [float(part.disagreement.max()) for part in game.couplings])
    tolerance = TOLERANCE * largest
    potentials, regrets = [game.potential(profile)], [float(game.regret(profile).max(initial=0.0))]
    moved = True
    while moved:
        moved = False
        for members, parts in zip(classes, local, strict=True):
            costs = game.own_cost[members] + sum(weights @ disagreement[profile] for weights, disagreement in parts)
            best = costs.argmin(1)
            rows = np.arange(len(members))
            gains = costs[rows, profile[members]] - costs[rows, best]
            better = gains > tolerance
            profile[members[better]] = best[better]
            moved = moved or bool(better.any())
        if moved:
            potentials.append(game.potential(profile))
            regrets.append(float(game.regret(profile).max(initial=0.0)))
    return Equilibrium(profile, potentials, regrets)


def shadow_price(
    solve: Callable[[float], Solution],
    spent: Callable[[Solution], float],
    budget: float,
    start: float,
    steps: int = 40,
) -> tuple[float, Solution]:
    """Find the lowest price at which the solution keeps to ``budget``; return the price and the solution.

    ``solve`` returns the solution at a price, ``spent`` what a solution spends.  The price is doubled or halved from
    ``start`` until it brackets the budget; its logarithm is then bisected (Everett 1963).  ``spent`` may fall in steps,
    and not quite monotonically; the solution returned never spends more than the budget.  The price is 0 if the budget
    does not bind.  Raises ValueError if no price keeps to the budget.
    """
    free = solve(0.0)
    if spent(free) <= budget:
        return 0.0, free
    price, solution = start, solve(start)
    while spent(solution) > budget:
        if price > start * LARGEST_RATIO:
            raise ValueError(
                f"no price brings what is spent down to {budget:g}: at {price:.3g} it is {spent(solution):g}"
            )
        price *= 2
        solution = solve(price)
    too_low = price / 2
    while spent(candidate := solve(too_low)) <= budget:
        price, solution, too_low = too_low, candidate, too_low / 2
    for _ in range(steps):
        middle = float(np.sqrt(too_low * price))
        if not too_low < middle < price or spent(solution) == budget:
            break
        if spent(candidate := solve(middle)) <= budget:
            price, solution = middle, candidate
        else:
            too_low = middle
    return price, solution
