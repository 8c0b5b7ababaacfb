"""The rules by which ``FixedWidth`` allocates bits: one signature for the game and for every baseline."""

import dataclasses
import itertools
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from jaxtyping import Int

from nashswarm.games import flock
from nashswarm.methods.bit_allocation.baselines import (
    allocate_by_evolution,
    allocate_by_quantiles,
    allocate_dual_ascent,
    allocate_equal_loss,
    allocate_randomly,
)
from nashswarm.methods.bit_allocation.blocks import Blocks
from nashswarm.methods.bit_allocation.damages import regret_metrics
from nashswarm.methods.bit_allocation.game import solve
from nashswarm.methods.swarm import Flock
from nashswarm.progress import Track, no_track


@dataclasses.dataclass(frozen=True)
class AllocationProblem:
    """Blocks that share a number of bytes, and the settings of the rules.

    ``budget``: bytes of the packed layers.  ``heldout_kl``: profile → KL in nats per token of the model at these widths
    on held-out calibration text.  ``pruned``: least share of blocks at 0 bits, and ``swarm``: the flock, None without;
    both are for ``equilibrium``.  ``quantiles``: of importance, for ``quantiles``.  ``generations`` and ``offspring``:
    of ``evolution``.
    """

    blocks: Blocks
    budget: int
    heldout_kl: Callable[[Int[np.ndarray, " blocks"]], float]
    pruned: float
    swarm: Flock | None
    quantiles: Sequence[float]
    generations: int
    offspring: int
    track: Track = no_track


@dataclasses.dataclass(frozen=True)
class AllocationResult:
    """One index into the widths per block, and what the rule reports about it."""

    profile: Int[np.ndarray, " blocks"]
    metrics: Mapping[str, float]
    series: Mapping[str, list[float]] = dataclasses.field(default_factory=dict)


AllocationRule = Callable[[AllocationProblem, np.random.Generator], AllocationResult]


def equilibrium(problem: AllocationProblem, rng: np.random.Generator) -> AllocationResult:
    """Return the equilibrium of the bit game.

    Where the flock has several values of ``align`` or ``shrink``, the game is solved with each pair and held-out text
    chooses among the equilibria.
    """
    blocks, swarm = problem.blocks, problem.swarm
    without_flock = solve(blocks, problem.budget, problem.pruned)
    solution, chosen, heldout_passes = without_flock, (0.0, 0.0), 0
    if swarm is not None:
        coupling = flock.flock(blocks.features, swarm.neighbours, swarm.graph, rng)
        candidates = list(itertools.product(swarm.align, swarm.shrink))
        solutions = {
            pair: without_flock
            if pair == (0.0, 0.0)
            else solve(blocks, problem.budget, problem.pruned, coupling, *pair)
            for pair in candidates
        }
        chosen = candidates[0]
        if len(candidates) > 1:
            heldout_passes = len(candidates)
            kl = {
                pair: problem.heldout_kl(solution.profile)
                for pair, solution in problem.track(list(solutions.items()), "choosing the flock")
            }
            chosen = min(kl, key=lambda pair: kl[pair])
        solution = solutions[chosen]
    metrics, series = solution.report(blocks)
    metrics |= {
        "flock_moves": int((solution.profile != without_flock.profile).sum()),
        "flock_align": chosen[0],
        "flock_shrink": chosen[1],
        "heldout_passes": heldout_passes,
    }
    return AllocationResult(solution.profile, metrics, series)


def quantiles(problem: AllocationProblem, rng: np.random.Generator) -> AllocationResult:
    """Return widths by quantiles of the blocks' importance."""
    return _without_game(problem, allocate_by_quantiles(problem.blocks, problem.budget, problem.quantiles))


def lot(problem: AllocationProblem, rng: np.random.Generator) -> AllocationResult:
    """Return widths drawn at random."""
    return _without_game(problem, allocate_randomly(problem.blocks, problem.budget, rng))


def equal_loss(problem: AllocationProblem, rng: np.random.Generator) -> AllocationResult:
    """Return the widths of equal predicted damage (BAQ)."""
    return _without_game(problem, allocate_equal_loss(problem.blocks, problem.budget))


def dual_ascent(problem: AllocationProblem, rng: np.random.Generator) -> AllocationResult:
    """Return the widths of a price found by dual ascent (Radio)."""
    return _without_game(problem, allocate_dual_ascent(problem.blocks, problem.budget))


def evolution(problem: AllocationProblem, rng: np.random.Generator) -> AllocationResult:
    """Return the widths that an evolutionary search finds on held-out text (EvoPress)."""
    profile = allocate_by_evolution(
        problem.blocks, problem.budget, problem.heldout_kl, rng, problem.generations, problem.offspring
    )
    return _without_game(problem, profile, heldout_passes=problem.offspring * (problem.generations + 1))


RULES: Mapping[str, AllocationRule] = {
    "equilibrium": equilibrium,
    "quantiles": quantiles,
    "lot": lot,
    "equal_loss": equal_loss,
    "dual_ascent": dual_ascent,
    "evolution": evolution,
}


def _without_game(
    problem: AllocationProblem, profile: Int[np.ndarray, " blocks"], heldout_passes: int = 0
) -> AllocationResult:
    """Return a baseline's result: its profile, and the regret that its players have in the bit game."""
    return AllocationResult(profile, regret_metrics(problem.blocks, profile) | {"heldout_passes": heldout_passes})
