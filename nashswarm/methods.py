"""Compression methods: from weights and calibration statistics to packed layers.

A method is a frozen dataclass, its fields are its settings and ``compress`` is what it does.  It sees an ``Oracle`` and
nothing else, so it cannot look at the test text.
"""

import dataclasses
import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Literal, get_args

import numpy as np
from jaxtyping import Int

from nashswarm.bit_game import by_lot, by_quantiles, solve
from nashswarm.blocks import Bits, check_divisible, grid_shape, quantize_layers, text
from nashswarm.calibration.context import Oracle
from nashswarm.errors import NotOffered
from nashswarm.games import flock
from nashswarm.layers import Layer, Moments, curvature
from nashswarm.methods_ import Compressed
from nashswarm.quant.coordinate_descent import reply
from nashswarm.quant.curvature import DAMPING
from nashswarm.quant.entropy import encode_groups
from nashswarm.quant.grid import FLOATS, GRID_WIDTHS, TILE_ROWS, WIDTHS, QuantizedTensor, Scheme
from nashswarm.quant.pack import pack, packed_bytes
from nashswarm.quant.prototype import QUANTILES, quantize_by_magnitude
from nashswarm.rivals import dual_ascent, equal_loss, evolve
from nashswarm.survey import report_regret, survey

PLAYED_WIDTHS = (0, *GRID_WIDTHS)
BitGame = Literal["equilibrium", "quantiles", "lot", "equal_loss", "dual_ascent", "evolution"]


@dataclasses.dataclass(frozen=True)
class Uniform:
    """``bits`` everywhere: round to nearest at 2, 3, 4 or 8 bits, or plain floats at 16 and 32 (the baseline).

    ``search``: the best range of every group instead of minimum and maximum.  ``coded``: entropy-coded storage.
    """

    bits: int = 4
    group_size: int = 64
    search: bool = False
    coded: bool = False

    def __post_init__(self) -> None:
        if self.bits not in (*GRID_WIDTHS, *FLOATS):
            raise NotOffered(
                f"method.bits={self.bits}: a uniform width is one of {', '.join(map(str, (*GRID_WIDTHS, *FLOATS)))}"
            )
        if self.coded and self.bits in FLOATS:
            raise ValueError(f"method.coded is for codes; method.bits={self.bits} stores floats")

    def compress(self, oracle: Oracle, rng: np.random.Generator) -> Compressed:
        scheme = Scheme(self.group_size, self.search)
        check_divisible(oracle.layers, self.group_size)
        bits = {layer.name: np.full(grid_shape(layer, scheme), self.bits, np.uint8) for layer in oracle.layers}
        if self.bits in FLOATS:
            return _store(bits, quantize_layers(oracle.layers, bits, scheme), float_bits=self.bits)
        blocks = survey(oracle, oracle.moments(), PLAYED_WIDTHS, scheme, code_game=False)
        profile = np.full(len(blocks.damage), PLAYED_WIDTHS.index(self.bits))
        tensors = quantize_layers(oracle.layers, bits, scheme)
        return _store(bits, tensors, *report_regret(blocks, profile), coded=self.coded)


@dataclasses.dataclass(frozen=True)
class Gptq:
    """``bits`` everywhere with error feedback, one scale a group (Frantar et al. 2023), the best range of every group.

    ``act_order``: columns of large inputs first, on grids fixed beforehand.  ``sweeps``: best replies after the pass, 0
    for GPTQ itself.  ``coded``: entropy-coded storage.  ``sequential``: layers see what the compressed ones before them
    give out, depth by depth, as GPTQ's authors have it.
    """

    bits: int = 3
    group_size: int = 64
    damping: float = DAMPING
    act_order: bool = False
    sweeps: int = 0
    coded: bool = True
    sequential: bool = False

    def __post_init__(self) -> None:
        if self.bits not in GRID_WIDTHS:
            raise NotOffered(f"method.bits={self.bits}: gptq knows {', '.join(map(str, GRID_WIDTHS))} bits")
        if self.damping <= 0 or self.sweeps < 0:
            raise ValueError(
                f"method.damping={self.damping} must be positive, method.sweeps={self.sweeps} not negative"
            )

    def compress(self, oracle: Oracle, rng: np.random.Generator) -> Compressed:
        scheme = Scheme(self.group_size, search=True)
        check_divisible(oracle.layers, self.group_size)
        moments = dict(oracle.moments())
        tensors: dict[str, QuantizedTensor] = {}
        damage, bits = {}, {}
        depth = oracle.layers[0].depth
        for layer in oracle.track(sorted(oracle.layers, key=lambda layer: layer.depth), "replying"):
            if self.sequential and layer.depth > depth:
                depth = layer.depth
                moments |= _after(tensors, [other for other in oracle.layers if other.depth == depth], moments, oracle)
            curved = curvature(layer, moments)
            found = reply(layer.weight, self.bits, scheme, curved, self.sweeps, self.damping, self.act_order)
            tensors[layer.name], bits[layer.name] = found, found.bits.numpy()
            damage[layer.name] = float(curved.damage_by_row(layer.weight - found.dequantize()).double().sum())
        in_order = {layer.name: tensors[layer.name] for layer in oracle.layers}
        return _store(bits, in_order, damage, coded=self.coded)


@dataclasses.dataclass(frozen=True)
class AsPublished:
    """The earlier prototype's quantizer: ``nn.Linear`` alone, three classes of weights by magnitude, true bytes."""

    quantiles: Sequence[float] = QUANTILES

    def __post_init__(self) -> None:
        if len(self.quantiles) != 2 or not 1 > self.quantiles[0] > self.quantiles[1] > 0:
            raise ValueError(
                f"method.quantiles {list(self.quantiles)} must be two numbers, descending, between 0 and 1"
            )

    def compress(self, oracle: Oracle, rng: np.random.Generator) -> Compressed:
        scheme = Scheme(group_size=1)
        untouched = [layer for layer in oracle.layers if "Linear" not in layer.kinds]
        bits = {layer.name: np.full(grid_shape(layer, scheme), 16, np.uint8) for layer in untouched}
        kept = _store(bits, quantize_layers(untouched, bits, scheme))
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
    sensitivity moves toward its flock's mean, 0 to 1.  ``local_reply``: how many correlated columns a column minds when
    it replies; None: all.  ``graph``: the flock or one of its controls.
    """

    neighbours: int = 7
    align: Sequence[float] = (0.0, 4.0)
    shrink: Sequence[float] = (0.0, 0.25)
    local_reply: int | None = None
    graph: flock.Graph = "features"

    def __post_init__(self) -> None:
        if self.graph not in get_args(flock.Graph):
            raise ValueError(f"unknown method.swarm.graph {self.graph!r}: choose {', '.join(get_args(flock.Graph))}")
        if self.neighbours < 1:
            raise ValueError(
                f"method.swarm.neighbours={self.neighbours} must be at least 1; without a flock use no_swarm"
            )
        if self.local_reply is not None and self.local_reply < 0:
            raise ValueError(f"method.swarm.local_reply={self.local_reply} must be a number of columns or null")
        if not self.align or min(self.align) < 0:
            raise ValueError(f"method.swarm.align {list(self.align)} must hold numbers of bytes, none negative")
        if not self.shrink or min(self.shrink) < 0 or max(self.shrink) > 1:
            raise ValueError(f"method.swarm.shrink {list(self.shrink)} must hold numbers between 0 and 1")


@dataclasses.dataclass(frozen=True)
class Split:
    """The byte budget of a model with a share ``pruned`` of its blocks removed and the rest at ``bits``."""

    bits: int
    pruned: float

    def __post_init__(self) -> None:
        if self.bits not in GRID_WIDTHS or not 0 <= self.pruned < 1:
            raise ValueError(
                f"method.split needs bits among {', '.join(map(str, GRID_WIDTHS))} and pruned from 0 to below 1, "
                f"not bits={self.bits} and pruned={self.pruned}"
            )


@dataclasses.dataclass(frozen=True)
class FixedWidth:
    """Tiles compete for widths under one price per byte until nobody gains by changing alone; each minds its flock.

    ``bits``: stored bits per parameter of the whole model, everything counted.  ``bit_game``: ``equilibrium``, or what
    the ablations put in its place: ``quantiles`` of importance or ``lot``, bits handed out at random; or the idea of
    another: ``equal_loss`` (BAQ), ``dual_ascent`` (Radio), ``evolution`` (EvoPress).  ``code_game``: each block replies
    with the codes of least damage; otherwise one min-max rounding.  ``split``: a preset's budget instead of ``bits``,
    with at least its share of pruned blocks.  ``coded``: entropy-code the tiles of the budget, so that the file takes
    less.  ``generations`` and ``offspring``: of the evolution.  ``cache``: reuse statistics and baselines of earlier
    runs.
    """

    bits: float | None = 3.0
    bit_widths: Sequence[int] = PLAYED_WIDTHS
    group_size: int = 64
    bit_game: BitGame = "equilibrium"
    quantiles: Sequence[float] = QUANTILES
    code_game: bool = True
    coded: bool = False
    split: Split | None = None
    generations: int = 20
    offspring: int = 8
    cache: bool = True
    swarm: Flock | None = dataclasses.field(default_factory=Flock)

    def __post_init__(self) -> None:
        if (self.bits is None) == (self.split is None):
            raise ValueError("give either method.bits or method.split: one of them must be null")
        if self.bits is not None and not math.isfinite(self.bits):
            raise ValueError(f"method.bits={self.bits} must be a finite number")
        if self.bit_game not in get_args(BitGame):
            raise ValueError(f"unknown method.bit_game {self.bit_game!r}: choose {', '.join(get_args(BitGame))}")
        if self.generations < 0 or self.offspring < 1:
            raise ValueError("method.generations must not be negative, and method.offspring at least 1")
        if self.swarm is not None and self.swarm.local_reply is not None:
            raise ValueError("method.swarm.local_reply belongs to method=nash_swarm; set it to null")
        if self.bit_game == "quantiles" and len(self.bit_widths) != len(self.quantiles) + 1:
            raise ValueError(f"method.quantiles {self.quantiles} need {len(self.quantiles) + 1} method.bit_widths")
        if self.split is not None and 0 not in self.bit_widths:
            raise ValueError(f"method.split prunes, so method.bit_widths {list(self.bit_widths)} must contain 0")
        if tuple(self.bit_widths) != tuple(sorted(set(self.bit_widths) & set(WIDTHS))) or not self.bit_widths:
            known = ", ".join(map(str, WIDTHS))
            raise ValueError(f"method.bit_widths {list(self.bit_widths)} must be ascending widths among {known}")
        if self.coded and max(self.bit_widths) > max(GRID_WIDTHS):
            raise ValueError(f"method.coded is for codes; method.bit_widths {list(self.bit_widths)} stores floats")

    def compress(self, oracle: Oracle, rng: np.random.Generator) -> Compressed:
        scheme = Scheme(self.group_size, search=self.code_game)
        check_divisible(oracle.layers, self.group_size)
        budget = self._budget(oracle, scheme)
        moments = oracle.moments()
        blocks = survey(oracle, moments, self.bit_widths, scheme, self.code_game)
        weighed = moments if self.code_game else None

        def tensors_at(profile: Int[np.ndarray, " blocks"]) -> dict[str, QuantizedTensor]:
            return quantize_layers(oracle.layers, blocks.bits(profile), scheme, weighed)

        def measure(profile: Int[np.ndarray, " blocks"]) -> float:
            found = tensors_at(profile)
            return oracle.heldout_kl({name: tensor.dequantize() for name, tensor in found.items()}, None)

        if self.bit_game != "equilibrium":
            passes = 0
            if self.bit_game == "quantiles":
                profile = by_quantiles(blocks, budget, self.quantiles)
            elif self.bit_game == "equal_loss":
                profile = equal_loss(blocks, budget)
            elif self.bit_game == "dual_ascent":
                profile = dual_ascent(blocks, budget)
            elif self.bit_game == "evolution":
                profile = evolve(blocks, budget, measure, rng, self.generations, self.offspring)
                passes = self.offspring * (self.generations + 1)
            else:
                profile = by_lot(blocks, budget, rng)
            damage, metrics = report_regret(blocks, profile)
            metrics["heldout_passes"] = passes
            return _store(blocks.bits(profile), tensors_at(profile), damage, metrics, coded=self.coded)

        pruned = self.split.pruned if self.split else 0.0
        alone = solve(blocks, budget, pruned)
        best, choice, passes = alone, (0.0, 0.0), 0
        if self.swarm is not None:
            coupling = flock.flock(blocks.features, self.swarm.neighbours, self.swarm.graph, rng)
            candidates = list(itertools.product(self.swarm.align, self.swarm.shrink))
            solved = {
                pair: alone if pair == (0.0, 0.0) else solve(blocks, budget, pruned, coupling, *pair)
                for pair in candidates
            }
            if len(candidates) > 1:
                passes = len(candidates)
                scores = {
                    pair: measure(solution.profile)
                    for pair, solution in oracle.track(list(solved.items()), "choosing the flock")
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
        damage = blocks.damage_by_layer(best.profile)
        return _store(blocks.bits(best.profile), tensors_at(best.profile), damage, metrics, series, coded=self.coded)

    def _budget(self, oracle: Oracle, scheme: Scheme) -> int:
        """Bytes that the packed layers may take.  Raises ValueError if not even the smallest widths fit."""

        def bytes_at(bits: int) -> int:
            shapes = [grid_shape(layer, scheme) for layer in oracle.layers]
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


def _after(
    tensors: Mapping[str, QuantizedTensor], layers: Sequence[Layer], moments: Mapping[str, Moments], oracle: Oracle
) -> dict[str, Moments]:
    """The moments of ``layers`` with the inputs that they meet behind compressed ones."""
    if oracle.inputs_after is None:
        raise ValueError("method.sequential needs a model to run, which this oracle has not; set it to false")
    names = [name for layer in layers for name in layer.modules if not moments[name].lookup]
    seen = oracle.inputs_after({name: tensor.dequantize() for name, tensor in tensors.items()}, names)
    return {name: dataclasses.replace(moments[name], inputs=inputs) for name, inputs in seen.items()}


def _store(
    bits: Bits,
    tensors: Mapping[str, QuantizedTensor],
    damage: Mapping[str, float] | None = None,
    metrics: Mapping[str, float] | None = None,
    series: Mapping[str, list[float]] | None = None,
    float_bits: int = 16,
    coded: bool = False,
) -> Compressed:
    """The stored form of every layer: its tiles at their widths, or entropy-coded."""
    if damage is not None:
        metrics = dict(metrics or {}) | {"damage": sum(damage.values())}
    return Compressed(
        packed={name: encode_groups(tensor) if coded else pack(tensor) for name, tensor in tensors.items()},
        weights={name: tensor.dequantize() for name, tensor in tensors.items()},
        allocation=text(bits),
        code_bits=sum(
            int((tensor.bits.double() * TILE_ROWS * tensor.scheme.group_size).sum()) for tensor in tensors.values()
        ),
        damage=damage or {},
        metrics=metrics or {},
        series=series or {},
        float_bits=float_bits,
    )
