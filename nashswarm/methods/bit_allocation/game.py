"""The bit game: its equilibrium under one price per byte.

At b_i bits, player i pays ``D_i(b_i) + λ · bytes(b_i)``, for the run-length tags that it shares with its neighbours in
storage, and λ · ``align`` bytes for every neighbour of its flock that has another width.  All costs are in nats per
token.  The shadow price λ is the same for all players (Everett 1963; Shoham & Gersho 1988) and is found by bisection.
"""

import dataclasses

import numpy as np
from jaxtyping import Int
from scipy import sparse

from nashswarm.games import flock as swarm
from nashswarm.games.potential import Coupling, Equilibrium, Game, best_response, independent_classes, shadow_price
from nashswarm.methods.bit_allocation.blocks import Blocks
from nashswarm.quant.pack import RUN_BYTES

BUDGET_TOLERANCE = 1e-3  # share of the budget that may stay unspent


@dataclasses.dataclass(frozen=True)
class Solution:
    """A solved bit game.

    ``game``: the game at ``price``, in nats per byte.  ``subsidy``: bytes by which pruning a block was made cheaper, so
    that enough blocks are pruned.  ``equilibrium``: where best response ended.  ``profile``: the equilibrium, changed
    where bytes that it left over could be spent.
    """

    game: Game
    price: float
    subsidy: float
    equilibrium: Equilibrium
    profile: Int[np.ndarray, " blocks"]

    def report(self, blocks: Blocks) -> tuple[dict[str, float], dict[str, list[float]]]:
        """Return metrics and series of the certificate: the regret by enumeration of every action of every player."""
        regret = self.game.regret(self.profile)
        metrics = {
            "regret_max": float(regret.max()),
            "regret_mean": float(regret.mean()),
            "potential_start": self.equilibrium.potentials[0],
            "potential_end": self.game.potential(self.profile),
            "sweeps": self.equilibrium.sweeps,
            "price": self.price,
            "subsidy": self.subsidy,
            "players": len(self.profile),
            "pruned": float((np.array(blocks.widths)[self.profile] == 0).mean()),
        }
        return metrics, {"potential": self.equilibrium.potentials, "regret": self.equilibrium.regrets}


def solve(
    blocks: Blocks,
    budget: int,
    pruned: float = 0.0,
    flock: sparse.csr_array | None = None,
    align: float = 0.0,
    shrink: float = 0.0,
) -> Solution:
    """Solve the bit game at the price that meets ``budget`` (bytes of the packed layers).

    ``pruned``: least share of blocks at 0 bits.  ``flock``: coupling between blocks.  ``align``: bytes that a block
    pays per neighbour with another width.  ``shrink``: how far a block's sensitivity moves toward its flock's mean.

    A run-length tag is paid for by the two tiles between which it stands, so tags are a coupling along the storage
    order, and every byte of the layers is part of the potential.  Every price is solved from the same start, all blocks
    at the middle width, so that the solution depends on nothing else.

    Raises ValueError if no price brings the bytes down to ``budget``.
    """
    widths = len(blocks.widths)
    tile_bytes = np.array([float(blocks.scheme.tile_bytes(width)) for width in blocks.widths])
    damage = blocks.damage
    if flock is not None and shrink:
        shrunk = swarm.shrink(blocks.log_sensitivity, flock, shrink)
        damage = damage * np.exp(shrunk - blocks.log_sensitivity)[:, None]
    potts = 1.0 - np.eye(widths)
    couplings = [Coupling(blocks.storage_chain(), RUN_BYTES * potts)]
    if flock is not None and align:
        couplings.append(Coupling(flock, align * potts))
    classes = independent_classes(couplings, len(damage))
    start = np.full(len(damage), widths // 2)

    def solve_at_price(price: float, subsidy: float) -> Solution:
        charged_bytes = tile_bytes - subsidy * (np.array(blocks.widths) == 0)
        game = Game(
            damage + price * charged_bytes,
            tuple(Coupling(part.weights, price * part.disagreement) for part in couplings),
        )
        equilibrium = best_response(game, start, classes)
        return Solution(game, price, subsidy, equilibrium, equilibrium.profile)

    typical_price = float(damage.mean()) / float(tile_bytes.mean())

    def solve_within_budget(subsidy: float) -> Solution:
        return shadow_price(
            lambda price: solve_at_price(price, subsidy),
            lambda solution: blocks.packed_bytes(solution.profile),
            budget,
            typical_price,
        )[1]

    def share_pruned(solution: Solution) -> float:
        return float((np.array(blocks.widths)[solution.profile] == 0).mean())

    solution = solve_within_budget(0.0)
    if share_pruned(solution) < pruned:
        _, solution = shadow_price(
            solve_within_budget, lambda solution: -share_pruned(solution), -pruned, tile_bytes.max(), steps=20
        )
    return _spend_remaining_bytes(blocks, solution, budget)


def _spend_remaining_bytes(blocks: Blocks, solution: Solution, budget: int) -> Solution:
    """Close a gap of more than 0.1 % of the budget by widening the blocks of the largest gain per byte."""
    remaining = budget - blocks.packed_bytes(solution.profile)
    if remaining <= BUDGET_TOLERANCE * budget:
        return solution
    profile = solution.profile.copy()
    tile_bytes = np.array([blocks.scheme.tile_bytes(width) for width in blocks.widths])
    players = np.arange(len(profile))
    extra = tile_bytes - tile_bytes[profile][:, None] + 2 * RUN_BYTES  # a move splits at most one run into three
    gain = (blocks.damage[players, profile][:, None] - blocks.damage) / np.where(extra > 2 * RUN_BYTES, extra, np.inf)
    may_move = tile_bytes[profile] > 0 if solution.subsidy else np.ones(len(profile), bool)
    for flat in np.argsort(-gain, axis=None, kind="stable"):
        player, action = np.unravel_index(flat, gain.shape)
        if gain[player, action] <= 0 or remaining <= BUDGET_TOLERANCE * budget:
            break
        if may_move[player] and extra[player, action] <= remaining:
            profile[player], may_move[player] = action, False
            remaining -= extra[player, action]
    return dataclasses.replace(solution, profile=profile)
