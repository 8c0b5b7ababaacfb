"""The bit game: which block gets how many bits, under one price per byte.

Player i at b_i bits costs ``D_i(b_i) + λ · bytes(b_i)``, the run-length tags that it shares with its neighbours in
storage, and λ · ``align`` bytes for every neighbour of its flock with other bits.  All costs are in nats per token.
The shadow price λ is the same for everybody (Everett 1963; Shoham & Gersho 1988) and is found by bisection.
"""

import bisect
import dataclasses
from collections.abc import Sequence

import numpy as np
from jaxtyping import Int
from scipy import sparse

from nashswarm.games import flock as swarm
from nashswarm.games.potential import Coupling, Equilibrium, Game, best_response, independent_classes, shadow_price
from nashswarm.methods.bit_allocation.blocks import Blocks
from nashswarm.quant.pack import RUN_BYTES

BUDGET_TOLERANCE = 1e-3


@dataclasses.dataclass(frozen=True)
class Solution:
    """A solved bit game: the game at its price (nats per byte), its equilibrium, and the subsidy of pruning (bytes)."""

    game: Game
    price: float
    subsidy: float
    equilibrium: Equilibrium
    profile: Int[np.ndarray, " blocks"]

    def report(self, blocks: Blocks) -> tuple[dict[str, float], dict[str, list[float]]]:
        """Metrics and series of the certificate: regret by enumeration of every action of every player."""
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
    """The equilibrium of the bit game at the price that meets ``budget`` (bytes of the packed layers).

    A run-length tag is paid for by the two tiles between which it stands, so tags are a coupling along the storage
    order, and every byte of the layers is part of the potential.  Every price is solved from the same start, all
    blocks at the middle width, so that the answer depends on nothing else.
    """
    widths = len(blocks.widths)
    own_bytes = np.array([float(blocks.scheme.tile_bytes(width)) for width in blocks.widths])
    damage = blocks.damage
    if flock is not None and shrink:
        shrunk = swarm.shrink(blocks.log_sensitivity, flock, shrink)
        damage = damage * np.exp(shrunk - blocks.log_sensitivity)[:, None]
    potts = 1.0 - np.eye(widths)
    links = [Coupling(blocks.storage_chain(), RUN_BYTES * potts)]
    if flock is not None and align:
        links.append(Coupling(flock, align * potts))
    classes = independent_classes(links, len(damage))
    start = np.full(len(damage), widths // 2)

    def play(price: float, subsidy: float) -> Solution:
        charged = own_bytes - subsidy * (np.array(blocks.widths) == 0)
        game = Game(
            damage + price * charged,
            tuple(Coupling(link.weights, price * link.disagreement) for link in links),
        )
        equilibrium = best_response(game, start, classes)
        return Solution(game, price, subsidy, equilibrium, equilibrium.profile)

    typical = float(damage.mean()) / float(own_bytes.mean())

    def affordable(subsidy: float) -> Solution:
        return shadow_price(
            lambda price: play(price, subsidy), lambda solution: blocks.packed_bytes(solution.profile), budget, typical
        )[1]

    def share_pruned(solution: Solution) -> float:
        return float((np.array(blocks.widths)[solution.profile] == 0).mean())

    solution = affordable(0.0)
    if share_pruned(solution) < pruned:
        _, solution = shadow_price(affordable, lambda found: -share_pruned(found), -pruned, own_bytes.max(), steps=20)
    return _spend_the_rest(blocks, solution, budget)


def _spend_the_rest(blocks: Blocks, solution: Solution, budget: int) -> Solution:
    """Close a gap of more than 0.1 % of the budget by the upgrades of the best gain per byte."""
    room = budget - blocks.packed_bytes(solution.profile)
    if room <= BUDGET_TOLERANCE * budget:
        return solution
    profile = solution.profile.copy()
    own_bytes = np.array([blocks.scheme.tile_bytes(width) for width in blocks.widths])
    players = np.arange(len(profile))
    extra = own_bytes - own_bytes[profile][:, None] + 2 * RUN_BYTES  # a move splits at most one run into three
    gain = (blocks.damage[players, profile][:, None] - blocks.damage) / np.where(extra > 2 * RUN_BYTES, extra, np.inf)
    waiting = own_bytes[profile] > 0 if solution.subsidy else np.ones(len(profile), bool)
    for flat in np.argsort(-gain, axis=None, kind="stable"):
        player, action = np.unravel_index(flat, gain.shape)
        if gain[player, action] <= 0 or room <= BUDGET_TOLERANCE * budget:
            break
        if waiting[player] and extra[player, action] <= room:
            profile[player], waiting[player] = action, False
            room -= extra[player, action]
    return dataclasses.replace(solution, profile=profile)


def by_lot(blocks: Blocks, budget: int, rng: np.random.Generator) -> Int[np.ndarray, " blocks"]:
    """No game: the widest uniform width that fits, and the next one for as many blocks, drawn at random, as the budget
    allows."""
    count = len(blocks.damage)
    order = rng.permutation(count)
    fitting = [rank for rank in range(len(blocks.widths)) if blocks.packed_bytes(np.full(count, rank)) <= budget]
    base = fitting[-1]
    if base + 1 == len(blocks.widths):
        return np.full(count, base)

    def lifted(winners: int) -> Int[np.ndarray, " blocks"]:
        profile = np.full(count, base)
        profile[order[:winners]] += 1
        return profile

    winners = (
        bisect.bisect_right(range(count + 1), budget, key=lambda winners: blocks.packed_bytes(lifted(winners))) - 1
    )
    return lifted(winners)


def by_quantiles(blocks: Blocks, budget: int, quantiles: Sequence[float]) -> Int[np.ndarray, " blocks"]:
    """No game: importance ranks decide.  Blocks above the first quantile get the widest format, and so on down; the
    quantiles are shifted together until the size fits the budget."""
    importance = blocks.damage[:, 0]
    ranks = np.argsort(np.argsort(importance, kind="stable")) / len(importance)

    def shifted(steps: int) -> Int[np.ndarray, " blocks"]:
        return (ranks[:, None] >= np.array(quantiles) + steps / 10_000).sum(1)

    steps = range(-10_000, 10_001)
    return shifted(steps[bisect.bisect_left(steps, -budget, key=lambda step: -blocks.packed_bytes(shifted(step)))])
