"""Finite games on a graph, solved.

Player i has action costs c_i(a) of its own and disagrees with its neighbours: its cost is ``u_i(b) = c_i(b_i) + Σ_j
J_ij φ(b_i, b_j)``.  With J and φ symmetric a unilateral move changes the potential ``Φ(b) = Σ_i c_i(b_i) + Σ_{i<j}
J_ij φ(b_i, b_j)`` by exactly the mover's change of cost: an exact potential game (Monderer & Shapley 1996), so strict
improvement ends at a pure Nash equilibrium after finitely many moves.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import TypeVar

import numpy as np
from jaxtyping import Float, Int
from scipy import sparse

Solution = TypeVar("Solution")
DEAREST = 2.0**100  # times the first price: beyond it no price is going to help
TOLERANCE = 1e-12  # a deviation must gain more than this share of what players care about


@dataclasses.dataclass(frozen=True)
class Coupling:
    """Who minds whom (``weights``, players × players, sparse) and how much (``disagreement``, actions × actions)."""

    weights: sparse.csr_array
    disagreement: Float[np.ndarray, "actions actions"]

    def __post_init__(self) -> None:
        if abs(self.weights - self.weights.T).max() > 0:
            raise ValueError("the coupling is not symmetric (J_ij ≠ J_ji): no potential exists; symmetrise it first")
        if (self.disagreement != self.disagreement.T).any():
            raise ValueError("the disagreement φ(a, b) is not symmetric: no potential exists")
        if self.weights.diagonal().any():
            raise ValueError("a player is its own neighbour: put that cost into its own costs")


@dataclasses.dataclass(frozen=True)
class Game:
    """Costs of every player's actions and the couplings between players."""

    own_cost: Float[np.ndarray, "players actions"]
    couplings: tuple[Coupling, ...] = ()

    def costs(self, profile: Int[np.ndarray, " players"]) -> Float[np.ndarray, "players actions"]:
        """What each action would cost each player, all others staying at ``profile``."""
        return self.own_cost + sum(part.weights @ part.disagreement[profile] for part in self.couplings)

    def potential(self, profile: Int[np.ndarray, " players"]) -> float:
        """Φ at ``profile``."""
        players = np.arange(len(profile))
        own = self.own_cost[players, profile]
        return float((own + (self.costs(profile)[players, profile] - own) / 2).sum())

    def regret(self, profile: Int[np.ndarray, " players"]) -> Float[np.ndarray, " players"]:
        """What each player still gains by its best deviation alone, by enumeration of all its actions."""
        costs = self.costs(profile)
        return costs[np.arange(len(profile)), profile] - costs.min(1)


@dataclasses.dataclass(frozen=True)
class Equilibrium:
    """Where best replies ended, and the potential and the largest regret at the start and after every sweep."""

    profile: Int[np.ndarray, " players"]
    potentials: list[float]
    regrets: list[float]

    @property
    def sweeps(self) -> int:
        return len(self.potentials) - 1


def independent_classes(couplings: Sequence[Coupling], players: int) -> list[Int[np.ndarray, "_"]]:
    """The players split so that no two of one class interact: a greedy colouring of the coupling graph."""
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
    """Sweeps of best replies from ``profile`` until no player gains by moving alone.

    The players of one class (see ``independent_classes``) move together: they do not interact, so each of their moves
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
            replies = costs.argmin(1)
            rows = np.arange(len(members))
            gains = costs[rows, profile[members]] - costs[rows, replies]
            better = gains > tolerance
            profile[members[better]] = replies[better]
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
    """The lowest price found at which the solution spends no more than ``budget``, and that solution.

    Doubles or halves ``start`` until it brackets the budget, then bisects its logarithm (Everett 1963).  ``spent`` may
    be a staircase that is not quite monotone; what comes back never overspends.  Where the budget binds nobody the
    price is 0.  Raises ValueError if no price suffices.
    """
    free = solve(0.0)
    if spent(free) <= budget:
        return 0.0, free
    dear, solution = start, solve(start)
    while spent(solution) > budget:
        if dear > start * DEAREST:
            raise ValueError(
                f"no price brings what is spent down to {budget:g}: at {dear:.3g} it is {spent(solution):g}"
            )
        dear *= 2
        solution = solve(dear)
    cheap = dear / 2
    while spent(cheaper := solve(cheap)) <= budget:
        dear, solution, cheap = cheap, cheaper, cheap / 2
    for _ in range(steps):
        middle = float(np.sqrt(cheap * dear))
        if not cheap < middle < dear or spent(solution) == budget:
            break
        if spent(found := solve(middle)) <= budget:
            dear, solution = middle, found
        else:
            cheap = middle
    return dear, solution
