"""Compression methods: from weights and calibration statistics to packed layers.

A method is a frozen dataclass, its fields are its settings and ``compress`` is what it does.  It sees an ``Oracle`` and
nothing else, so it cannot look at the test text.
"""

import bisect
import dataclasses
import functools
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float, Int
from scipy import sparse
from torch import Tensor

from nashswarm import allocation, swarm
from nashswarm.allocation import Blocks, Layer
from nashswarm.game import Coupling, Equilibrium, Game, best_response, independent_classes, shadow_price
from nashswarm.quant.calibration import Moments
from nashswarm.quant.grid import FLOATS, GRID_WIDTHS, TILE_ROWS, Scheme, quantize
from nashswarm.quant.pack import RUN_BYTES, pack, packed_bytes
from nashswarm.quant.published import quantize_by_magnitude

BUDGET_TOLERANCE = 1e-3
PLAYED_WIDTHS = (0, *GRID_WIDTHS)
PROBED_WIDTHS = (0, 2, 3)  # where the damage of a layer is measured, not only predicted
PROBE_TOKENS = 2048


@dataclasses.dataclass(frozen=True)
class Oracle:
    """All that a method may know.

    ``fixed_bytes``: stored bytes outside the layers (norms, biases, headers, config).  ``parameters``: of the whole model.
    ``moments``: calibration statistics by module, computed or read when first asked for.  ``heldout_kl``: KL in nats per
    token of the model with these layer weights (the others at full precision), on so many tokens of held-out calibration
    text (None: all of it).  ``remember``: tensors by kind and key, read from an earlier run or computed.
    """

    layers: tuple[Layer, ...]
    fixed_bytes: int
    parameters: int
    moments: Callable[[], Mapping[str, Moments]]
    heldout_kl: Callable[[Mapping[str, Tensor], int | None], float]
    remember: Callable[[str, Mapping[str, Any], Callable[[], dict[str, Tensor]]], dict[str, Tensor]]


@dataclasses.dataclass(frozen=True)
class Compressed:
    """The packed bytes of every layer, the weights they decode to, and what the method reports.

    ``float_bits``: the width of everything outside the layers.  ``weight_bits``: the payload of the codes alone, in bits.
    """

    packed: Mapping[str, Any]
    weights: Mapping[str, Tensor]
    allocation: str
    code_bits: int
    damage: Mapping[str, float] = dataclasses.field(default_factory=dict)
    metrics: Mapping[str, float] = dataclasses.field(default_factory=dict)
    series: Mapping[str, list[float]] = dataclasses.field(default_factory=dict)
    float_bits: int = 16


@runtime_checkable
class Method(Protocol):
    """What the runner asks of a method."""

    def compress(self, oracle: Oracle, rng: np.random.Generator) -> Compressed: ...


@dataclasses.dataclass(frozen=True)
class Uniform:
    """``bits`` everywhere: round to nearest at 2, 3, 4 or 8 bits, or plain floats at 16 and 32 (the baseline)."""

    bits: int = 4
    group_size: int = 64
    search: bool = False

    def __post_init__(self) -> None:
        if self.bits not in (*GRID_WIDTHS, *FLOATS):
            raise ValueError(f"method.bits={self.bits}: a uniform width is one of {', '.join(map(str, (*GRID_WIDTHS, *FLOATS)))}")

    def compress(self, oracle: Oracle, rng: np.random.Generator) -> Compressed:
        scheme = Scheme(self.group_size, self.search)
        allocation.check_divisible(oracle.layers, self.group_size)
        bits = {layer.name: np.full(allocation.grid_shape(layer, scheme), self.bits, np.uint8) for layer in oracle.layers}
        if self.bits in FLOATS:
            return _pack(oracle, bits, scheme, None, float_bits=self.bits)
        blocks = survey(oracle, PLAYED_WIDTHS, scheme)
        profile = np.full(len(blocks.damage), PLAYED_WIDTHS.index(self.bits))
        return _pack(oracle, bits, scheme, None, *_report_regret(blocks, profile))


@dataclasses.dataclass(frozen=True)
class AsPublished:
    """The earlier prototype's quantizer: ``nn.Linear`` alone, three classes of weights by magnitude, true bytes."""

    quantiles: Sequence[float] = (0.9, 0.7)

    def compress(self, oracle: Oracle, rng: np.random.Generator) -> Compressed:
        scheme = Scheme(group_size=1)
        untouched = [layer for layer in oracle.layers if "Linear" not in layer.kinds]
        bits = {layer.name: np.full(allocation.grid_shape(layer, scheme), 16, np.uint8) for layer in untouched}
        kept = _pack(dataclasses.replace(oracle, layers=tuple(untouched)), bits, scheme, None)
        classed = {
            layer.name: quantize_by_magnitude(layer.weight, self.quantiles)
            for layer in oracle.layers
            if "Linear" in layer.kinds
        }
        widths = np.array((8, 4, 2))
        return Compressed(
            packed=dict(kept.packed) | {name: tensor.pack() for name, tensor in classed.items()},
            weights=dict(kept.weights) | {name: tensor.dequantize() for name, tensor in classed.items()},
            allocation="".join(f"{layer.name} {'mixed' if layer.name in classed else 16}\n" for layer in oracle.layers),
            code_bits=kept.code_bits + sum(int(widths[tensor.classes].sum()) for tensor in classed.values()),
        )


@dataclasses.dataclass(frozen=True)
class Flock:
    """The swarm's settings; where several values stand, held-out calibration text chooses.

    ``align``: bytes a block pays for each neighbour (of weight 1) that has other bits.  ``shrink``: how far a block's
    sensitivity moves toward its flock's mean, 0 to 1.  ``graph``: the flock or one of its controls.
    """

    neighbours: int = 7
    align: Sequence[float] = (0.0, 4.0, 16.0)
    shrink: Sequence[float] = (0.0, 0.25)
    graph: swarm.Graph = "features"


@dataclasses.dataclass(frozen=True)
class Split:
    """The byte budget of a model with a share ``pruned`` of its blocks removed and the rest at ``bits``."""

    bits: int
    pruned: float


@dataclasses.dataclass(frozen=True)
class NashSwarm:
    """Blocks compete for bits under one price per byte until nobody gains by changing alone; each minds its flock.

    ``bits``: stored bits per parameter of the whole model, everything counted.  ``bit_game``: ``equilibrium``, or what
    the ablations put in its place: ``quantiles`` of importance, or ``lot``, bits handed out at random.  ``code_game``: each
    block replies with the codes of least damage; otherwise one min-max rounding.  ``split``: a preset's budget instead of
    ``bits``, with at least its share of pruned blocks.  ``cache``: reuse statistics and baselines of earlier runs.
    """

    bits: float | int | None = 3.0
    bit_widths: Sequence[int] = PLAYED_WIDTHS
    group_size: int = 64
    bit_game: Literal["equilibrium", "quantiles", "lot"] = "equilibrium"
    quantiles: Sequence[float] = (0.9, 0.7)
    code_game: bool = True
    split: Split | None = None
    cache: bool = True
    swarm: Flock | None = dataclasses.field(default_factory=Flock)

    def __post_init__(self) -> None:
        if (self.bits is None) == (self.split is None):
            raise ValueError("give either method.bits or method.split: one of them must be null")
        if self.bit_game not in ("equilibrium", "quantiles", "lot"):
            raise ValueError(f"unknown method.bit_game {self.bit_game!r}: choose equilibrium, quantiles or lot")
        if self.bit_game == "quantiles" and len(self.bit_widths) != len(self.quantiles) + 1:
            raise ValueError(f"method.quantiles {self.quantiles} need {len(self.quantiles) + 1} method.bit_widths")
        if tuple(self.bit_widths) != tuple(sorted(set(self.bit_widths))) or not self.bit_widths:
            raise ValueError(f"method.bit_widths {self.bit_widths} must be ascending and distinct")

    def compress(self, oracle: Oracle, rng: np.random.Generator) -> Compressed:
        scheme = Scheme(self.group_size, search=self.code_game)
        allocation.check_divisible(oracle.layers, self.group_size)
        budget = self._budget(oracle, scheme)
        moments = oracle.moments()
        blocks = survey(oracle, self.bit_widths, scheme)
        weighed = moments if self.code_game else None
        if self.bit_game != "equilibrium":
            profile = self._by_quantiles(blocks, budget) if self.bit_game == "quantiles" else _by_lot(blocks, budget, rng)
            return _pack(oracle, blocks.bits(profile), scheme, weighed, *_report_regret(blocks, profile))

        pruned = self.split.pruned if self.split else 0.0
        alone = solve(blocks, budget, pruned)
        best, choice, passes = alone, (0.0, 0.0), 0
        if self.swarm is not None:
            coupling = swarm.flock(blocks.features, self.swarm.neighbours, self.swarm.graph, rng)
            candidates = list(itertools.product(self.swarm.align, self.swarm.shrink))
            solved = {
                pair: alone if pair == (0.0, 0.0) else solve(blocks, budget, pruned, coupling, *pair) for pair in candidates
            }
            if len(candidates) > 1:
                passes = len(candidates)
                scores = {
                    pair: oracle.heldout_kl(_decode(oracle, blocks.bits(solution.profile), scheme, weighed), None)
                    for pair, solution in solved.items()
                }
                choice = min(scores, key=lambda pair: scores[pair])
            else:
                choice = candidates[0]
            best = solved[choice]
        metrics, series = best.report(blocks)
        metrics |= {
            "flock_moves": int((best.profile != alone.profile).sum()),
            "flock_align": choice[0],
            "flock_shrink": choice[1],
            "heldout_passes": passes,
        }
        return _pack(oracle, blocks.bits(best.profile), scheme, weighed, _damage(blocks, best.profile), metrics, series)

    def _budget(self, oracle: Oracle, scheme: Scheme) -> int:
        """Bytes that the packed layers may take.  Raises ValueError if not even the smallest widths fit."""

        def bytes_at(bits: int) -> int:
            shapes = [allocation.grid_shape(layer, scheme) for layer in oracle.layers]
            return sum(packed_bytes(np.full(rows * columns, bits), scheme) for rows, columns in shapes)

        if self.split is not None:
            share = 1 - self.split.pruned
            return int(share * bytes_at(self.split.bits) + self.split.pruned * bytes_at(0))
        assert self.bits is not None
        budget = int(self.bits * oracle.parameters / 8) - oracle.fixed_bytes
        smallest = bytes_at(self.bit_widths[0])
        if budget < smallest:
            least = 8 * (smallest + oracle.fixed_bytes) / oracle.parameters
            raise ValueError(
                f"method.bits={self.bits} is below the smallest possible size of this model, "
                f"{least:.3f} bits per parameter with widths {list(self.bit_widths)}; raise method.bits"
            )
        return budget

    def _by_quantiles(self, blocks: Blocks, budget: int) -> Int[np.ndarray, " blocks"]:
        """Importance ranks decide: above the first quantile the widest format, and so on; the quantiles are shifted
        together until the size fits the budget."""
        pruning = blocks.log_sensitivity if blocks.widths[0] else blocks.damage[:, 0]
        ranks = np.argsort(np.argsort(pruning, kind="stable")) / len(pruning)

        def shifted(steps: int) -> Int[np.ndarray, " blocks"]:
            thresholds = np.array(self.quantiles) + steps / 10_000
            return (ranks[:, None] >= thresholds).sum(1)

        start = bisect.bisect_left(range(-10_000, 10_001), -budget, key=lambda steps: -blocks.packed_bytes(shifted(steps)))
        return shifted(start - 10_000)


def survey(oracle: Oracle, widths: Sequence[int], scheme: Scheme) -> Blocks:
    """All players: what every width would cost each block, and what its flock compares.

    The second-order formula is right for small errors and was seen to mislead for large ones, so at the coarse widths
    each layer is compressed alone, the KL of that is measured on held-out calibration text, and the damages of its blocks
    are scaled to add up to it.
    """
    moments = oracle.moments()

    def at_width(width: int) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        for layer in oracle.layers:
            s = allocation.sensitivity(layer, moments)
            quantized = quantize(layer.weight, width, scheme, s).dequantize()
            predicted = allocation.damage(layer, quantized, s, scheme)
            found[layer.name] = predicted
            if width in PROBED_WIDTHS:
                measured = oracle.heldout_kl({layer.name: quantized}, PROBE_TOKENS)
                found[layer.name] = predicted * (measured / float(predicted.sum()))
        return found

    columns = []
    for width in widths:
        key = dataclasses.asdict(scheme) | {"width": width, "probe_tokens": PROBE_TOKENS}
        by_layer = oracle.remember("damage", key, functools.partial(at_width, width))
        columns.append(torch.cat([by_layer[layer.name] for layer in oracle.layers]).numpy())
    log_sensitivity, features = allocation.describe(oracle.layers, moments, scheme)
    return Blocks(oracle.layers, scheme, tuple(widths), np.stack(columns, 1), log_sensitivity, features)


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

    A run-length tag is paid for by the two tiles between which it stands, so tags are a coupling along the storage order,
    and every byte of the layers is part of the potential.  Every price is solved from the same start, all blocks at the
    middle width, so that the answer depends on nothing else.
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
        price, solution = shadow_price(
            lambda price: play(price, subsidy), lambda solution: blocks.packed_bytes(solution.profile), budget, typical
        )
        return solution

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
    waiting = np.ones(len(profile), bool)
    for flat in np.argsort(-gain, axis=None, kind="stable"):
        player, action = np.unravel_index(flat, gain.shape)
        if gain[player, action] <= 0 or room <= BUDGET_TOLERANCE * budget:
            break
        if waiting[player] and extra[player, action] <= room:
            profile[player], waiting[player] = action, False
            room -= extra[player, action]
    return dataclasses.replace(solution, profile=profile)


def _by_lot(blocks: Blocks, budget: int, rng: np.random.Generator) -> Int[np.ndarray, " blocks"]:
    """The widest uniform width that fits, and the next one for as many blocks, drawn at random, as the budget allows."""
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

    winners = bisect.bisect_right(range(count + 1), budget, key=lambda winners: blocks.packed_bytes(lifted(winners))) - 1
    return lifted(winners)


def _damage(blocks: Blocks, profile: Int[np.ndarray, " blocks"]) -> dict[str, float]:
    """Layer → predicted damage in nats per token."""
    chosen = blocks.damage[np.arange(len(profile)), profile]
    counts = [int(np.prod(allocation.grid_shape(layer, blocks.scheme))) for layer in blocks.layers]
    parts = np.split(chosen, np.cumsum(counts)[:-1])
    return {layer.name: float(part.sum()) for layer, part in zip(blocks.layers, parts, strict=True)}


def _report_regret(
    blocks: Blocks, profile: Int[np.ndarray, " blocks"]
) -> tuple[dict[str, float], dict[str, float]]:
    """Damage by layer, and how far a given profile is from an equilibrium at the price at which the game would have spent
    the same bytes."""
    solution = solve(blocks, blocks.packed_bytes(profile))
    regret = solution.game.regret(profile)
    metrics = {
        "regret_max": float(regret.max()),
        "regret_mean": float(regret.mean()),
        "potential_end": solution.game.potential(profile),
        "price": solution.price,
        "players": len(profile),
    }
    return _damage(blocks, profile), metrics


def _decode(
    oracle: Oracle, bits: allocation.Bits, scheme: Scheme, moments: Mapping[str, Moments] | None
) -> dict[str, Float[Tensor, "out in"]]:
    tensors = allocation.quantize_layers(oracle.layers, bits, scheme, moments)
    return {name: tensor.dequantize() for name, tensor in tensors.items()}


def _pack(
    oracle: Oracle,
    bits: allocation.Bits,
    scheme: Scheme,
    moments: Mapping[str, Moments] | None,
    damage: Mapping[str, float] | None = None,
    metrics: Mapping[str, float] | None = None,
    series: Mapping[str, list[float]] | None = None,
    float_bits: int = 16,
) -> Compressed:
    """Quantize and pack every layer at the widths ``bits``."""
    tensors = allocation.quantize_layers(oracle.layers, bits, scheme, moments)
    if damage is not None:
        metrics = dict(metrics or {}) | {"damage": sum(damage.values())}
    return Compressed(
        packed={name: pack(tensor) for name, tensor in tensors.items()},
        weights={name: tensor.dequantize() for name, tensor in tensors.items()},
        allocation=allocation.text(bits),
        code_bits=sum(int(tiles.sum(dtype=np.int64)) * TILE_ROWS * scheme.group_size for tiles in bits.values()),
        damage=damage or {},
        metrics=metrics or {},
        series=series or {},
        float_bits=float_bits,
    )
