"""Where the rate game is played: a model's layers on their lattices, and what their codes answer to a unit and offsets.

The unit is the step of a weight whose sensitivity is 1, and sets the price of a bit (see ``quant.lattice``).  Codes
answer by one pass of error feedback and by best replies, each of which minds damage and, at the same price, its length
in the code tables of the whole model.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from scipy import sparse
from torch import Tensor

from nashswarm.games import flock
from nashswarm.layers import Layer
from nashswarm.memory import trim_heap
from nashswarm.packed.file_format import TABLES
from nashswarm.progress import Track
from nashswarm.quant.coordinate_descent import DescentResult
from nashswarm.quant.curvature import Curvature, FactoredCurvature
from nashswarm.quant.entropy import CodeTables, coded_bits, count_symbols, encode_integers, encode_lattice, fit_tables
from nashswarm.quant.error_feedback import row_chunks
from nashswarm.quant.grid import TILE_ROWS, row_blocks
from nashswarm.quant.lattice import Lattice, LatticeTensor, Rows, bit_price, make_lattice
from nashswarm.quant.lattice_codes import RateTerm, lattice_descent, lattice_error_feedback

BUDGET_TOLERANCE = 1e-3
COARSE = 1e-2  # how closely a budget is met before offsets are chosen
FIRST = 3  # sweeps before code tables are fitted again
TRIALS = 12  # units tried until the budget is met

Found = TypeVar("Found")
Offsets = Mapping[str, Int[np.ndarray, " row_blocks"]]
Weights = Mapping[str, Float[Tensor, " out"]]
Blocks = Bool[np.ndarray, " row_blocks"]
ALL = slice(None)


@dataclasses.dataclass(frozen=True)
class Stance:
    """What the players bring to a budget: the multipliers of their rows' sensitivities, the offsets of their steps, and
    how they were found.  ``path``: potential and largest regret at the start and after each sweep of the blocks' best
    replies, nats per token."""

    weights: Weights
    offsets: Offsets
    found: dict[str, float]
    path: dict[str, list[float]] = dataclasses.field(default_factory=dict)

    def tensors(self) -> dict[str, Tensor]:
        """Multipliers and offsets by their kind and the names of the layers."""
        offsets = {f"offsets/{name}": torch.from_numpy(part) for name, part in self.offsets.items()}
        return {f"weights/{name}": part for name, part in self.weights.items()} | offsets

    def moves_from(self, other: "Stance") -> int:
        """How many blocks have another offset."""
        return sum(int((part != other.offsets[name]).sum()) for name, part in self.offsets.items())


@dataclasses.dataclass(frozen=True)
class Played:
    """All layers at one unit: tensors, the tables that code them, and the sweeps of each layer."""

    unit: float
    tensors: dict[str, LatticeTensor]
    tables: CodeTables
    settled: dict[str, DescentResult]

    @functools.cached_property
    def packed(self) -> dict[str, np.ndarray]:
        """The stored bytes of every layer, and of the tables."""
        layers = {name: encode_lattice(tensor, self.tables) for name, tensor in self.tensors.items()}
        return layers | {TABLES: self.tables.pack()}

    def fitted(self) -> "Played":
        """The same codes; tables and sizes fitted to them."""
        tensors = {name: expected(tensor) for name, tensor in self.tensors.items()}
        return dataclasses.replace(self, tensors=tensors, tables=fit_tables(count_symbols(tensors.values())))

    @property
    def bytes(self) -> int:
        return sum(len(packed) for packed in self.packed.values())


class Slope:
    """How many bytes an octave of the unit saves: a bit a weight at high rate, then what was measured last."""

    def __init__(self, at_high_rate: float) -> None:
        self.at_high_rate = self.now = at_high_rate

    def learn(self, octaves: float, saved: int) -> None:
        if abs(octaves) > 0.01:  # what is nearer tells more of ties than of the slope
            self.now = min(max(saved / octaves, self.at_high_rate / 20), 2 * self.at_high_rate)


class Board:
    """The layers of one model, each with its curvature, factored.

    ``uniform``: steps in proportion to the weights of their matrix, not to their sensitivity.  ``rate_in_codes``: how
    much of its length's price a code minds in its best replies.
    """

    def __init__(
        self,
        layers: Sequence[Layer],
        whitened: Mapping[str, FactoredCurvature],
        uniform: bool,
        rate_in_codes: float,
        track: Track,
    ) -> None:
        self.layers, self.whitened, self.track = layers, whitened, track
        self.uniform, self.rate_in_codes = uniform, rate_in_codes
        self.counts = [row_blocks(len(layer.weight)) for layer in layers]
        self.slope = Slope(sum(layer.parameters for layer in layers) / 8)
        self.tried: list[tuple[float, int]] = []  # units, and the bytes that they take
        self.plain = Stance(
            {layer.name: torch.ones(len(layer.weight)) for layer in layers},
            {layer.name: np.zeros(count, int) for layer, count in zip(layers, self.counts, strict=True)},
            {"strength": 0.0, "flock_shrink": 0.0, "flock_align": 0.0, "flock_moves": 0},
        )

    # one layer

    def lattice(self, layer: Layer, unit: float, stance: Stance) -> Lattice:
        """The layer's grid at ``unit``, every block at its offset."""
        ground = self.whitened[layer.name]
        if self.uniform:
            flat = torch.ones(len(layer.weight)), torch.ones(layer.weight.shape[1])
            return make_lattice(layer.weight, unit * float(layer.weight.square().mean().sqrt()), *flat)
        found = make_lattice(layer.weight, unit, ground.rows * stance.weights[layer.name], ground.columns)
        offsets = torch.from_numpy(stance.offsets[layer.name]).repeat_interleave(TILE_ROWS)
        return found.shift_row_scales(offsets[: len(layer.weight)])

    def curvature(self, layer: Layer, stance: Stance, rows: Rows = ALL) -> Curvature:
        """Of these rows, as the players see it."""
        return self.whitened[layer.name].curvature.select_rows(rows).scale_rows(stance.weights[layer.name][rows])

    def damage(self, layer: Layer, tensor: LatticeTensor, stance: Stance, rows: Rows = ALL) -> Float[Tensor, " out"]:
        """Nats per token of every row, as the players see it."""
        weight, curvature = layer.weight[rows], self.curvature(layer, stance, rows)
        by_piece = [
            curvature.select_rows(piece).damage_by_row(weight[piece] - tensor.select_rows(piece).dequantize())
            for piece in row_chunks(weight)
        ]
        return torch.cat(by_piece)

    def cost(
        self, layer: Layer, tensor: LatticeTensor, played: Played, stance: Stance, rows: Rows = ALL
    ) -> Float[Tensor, " blocks"]:
        """What every block pays for these codes, in nats per token: damage and bits."""
        paid = bit_price(played.unit) * coded_bits(tensor, played.tables)
        return by_block(self.damage(layer, tensor, stance, rows) + paid)

    # all of them

    def play(self, unit: float, stance: Stance, sweeps: int) -> Played:
        """Every layer's codes at ``unit``, by one pass and so many ``sweeps``, and the tables that fit them; of codes
        that mind their length, the tables that they paid by, which fit those of the ``FIRST`` sweeps."""
        tensors: dict[str, LatticeTensor] = {}
        for layer in self.track(self.layers, "replying"):
            found = lattice_error_feedback(layer.weight, self.whitened[layer.name], self.lattice(layer, unit, stance))
            tensors[layer.name] = expected(found)
        trim_heap()
        played = Played(unit, tensors, fit_tables(count_symbols(tensors.values())), {})
        if not sweeps:
            return played
        if not self.rate_in_codes:
            return self.settle(played, stance, sweeps).fitted()
        played = self.settle(played, stance, FIRST).fitted()
        return self.settle(played, stance, sweeps)

    def settle(self, played: Played, stance: Stance, sweeps: int) -> Played:
        """So many sweeps of best replies of all codes, at the price of the tables and sizes as they are."""
        coding = self.coding(played.unit, played.tables)
        tensors, settled = {}, {}
        for layer in self.track(self.layers, "settling"):
            now, own = played.tensors[layer.name], self.curvature(layer, stance)
            tensors[layer.name], ended = lattice_descent(layer.weight, now, own, coding, sweeps)
            settled[layer.name] = ended.prepend(played.settled.get(layer.name))
        trim_heap()
        return Played(played.unit, tensors, played.tables, settled)

    def moved(self, played: Played, stance: Stance, movers: Blocks, sweeps: int) -> Played:
        """These blocks reply anew, at the offsets of ``stance``; all others, the tables and column sizes stay."""
        coding = self.coding(played.unit, played.tables)
        tensors = dict(played.tensors)
        for layer, rows in self.rows(movers):
            weight, ground = layer.weight[rows], self.whitened[layer.name].select_rows(rows)
            lattice = self.lattice(layer, played.unit, stance).select_rows(rows)
            column_size = played.tensors[layer.name].lattice.column_size
            passed = lattice_error_feedback(weight, ground, dataclasses.replace(lattice, column_size=column_size))
            found = expected(passed, columns_too=False)
            if sweeps:
                found, _ = lattice_descent(weight, found, self.curvature(layer, stance, rows), coding, sweeps)
            tensors[layer.name] = tensors[layer.name].replace_rows(rows, found)
        return dataclasses.replace(played, tensors=tensors)

    def meet(self, budget: int, unit: float, stance: Stance, sweeps: int, tolerance: float) -> Played:
        """The finest unit found whose bytes stay within ``budget``, to ``tolerance``."""

        def trial(unit: float) -> Played:
            played = self.play(unit, stance, sweeps)
            self.tried.append((unit, played.bytes))
            return played

        return meet(trial, lambda played: played.bytes, budget, unit, self.slope, tolerance)

    def coding(self, unit: float, tables: CodeTables) -> RateTerm | None:
        """What codes cost in their own eyes."""
        return RateTerm(tables, self.rate_in_codes * bit_price(unit)) if self.rate_in_codes else None

    def unit_of_rounding(self, budget: int) -> float:
        """The unit at which plain rounding on the lattice would take ``budget`` bytes: where the search begins."""

        def trial(unit: float) -> tuple[float, int]:
            tensors = {}
            for layer in self.layers:
                lattice = self.lattice(layer, unit, self.plain)
                steps = lattice.row_steps()[:, None] * lattice.column_steps()
                tensors[layer.name] = LatticeTensor((layer.weight / steps).round().int(), lattice)
            return unit, _estimated_bytes(tensors, fit_tables(count_symbols(tensors.values())))

        first = 2.0**-1 if self.uniform else 2.0**-12
        return meet(trial, lambda found: found[1], budget, first, Slope(self.slope.at_high_rate), 2 * COARSE)[0]

    def smallest_bytes(self) -> int:
        """Bytes with every code zero."""
        tensors = {}
        for layer in self.layers:
            zeros = torch.zeros(layer.weight.shape, dtype=torch.int32)
            tensors[layer.name] = expected(LatticeTensor(zeros, self.lattice(layer, 1.0, self.plain)))
        return _estimated_bytes(tensors, fit_tables(count_symbols(tensors.values())))

    def shrink(self, stance: Stance, coupling: sparse.csr_array, strength: float) -> Weights:
        """Every row's log sensitivity moved by ``strength`` toward the mean of its block's flock."""
        logs = {
            layer.name: (self.whitened[layer.name].rows * stance.weights[layer.name]).clamp(min=1e-30).log()
            for layer in self.layers
        }
        means = np.concatenate([by_block(part, mean=True).numpy() for part in logs.values()])
        toward = self.by_layer(flock.shrink(means, coupling, 1.0))
        return {
            name: stance.weights[name]
            * (
                strength * (torch.from_numpy(toward[name]).float().repeat_interleave(TILE_ROWS)[: len(part)] - part)
            ).exp()
            for name, part in logs.items()
        }

    def rows(self, movers: Blocks | None) -> list[tuple[Layer, Rows]]:
        """The rows of these blocks (None: of all), layer by layer, not more at a time than memory should hold."""
        found: list[tuple[Layer, Rows]] = []
        for layer in self.layers:
            if movers is None:
                found += [(layer, piece) for piece in row_chunks(layer.weight)]
                continue
            moving = torch.from_numpy(self.by_layer(movers)[layer.name]).repeat_interleave(TILE_ROWS)
            chosen = moving[: len(layer.weight)].nonzero()[:, 0]
            found += [(layer, chosen[piece]) for piece in row_chunks(layer.weight[chosen])]
        return found

    def by_layer(self, values: np.ndarray) -> dict[str, np.ndarray]:
        parts = np.split(values, np.cumsum(self.counts)[:-1])
        return {layer.name: part for layer, part in zip(self.layers, parts, strict=True)}


def meet(
    trial: Callable[[float], Found],
    size: Callable[[Found], int],
    budget: int,
    unit: float,
    slope: Slope,
    tolerance: float = BUDGET_TOLERANCE,
) -> Found:
    """Units are tried by secants, inside the bracket of those that fitted and those that did not, until one takes
    between (1 − ``tolerance``) and 1 times ``budget`` bytes; ``slope`` is where they begin and what they learn."""
    aim = (1 - tolerance / 2) * budget
    best: Found | None = None
    tried: list[tuple[float, int]] = []
    log_unit = math.log2(unit)
    finest, coarsest = -math.inf, math.inf  # too fine, coarse enough
    while len(tried) < TRIALS or (best is None and len(tried) < 4 * TRIALS):
        found = trial(2.0**log_unit)
        taken = size(found)
        if taken > budget:
            finest = max(finest, log_unit)
        else:
            coarsest = min(coarsest, log_unit)
        tried.append((log_unit, taken))
        if taken <= budget and (best is None or taken > size(best)):
            best = found
        del found  # what is tried may be as large as the model
        if best is not None and size(best) >= (1 - tolerance) * budget:
            return best
        if len(tried) > 1:
            slope.learn(tried[-1][0] - tried[-2][0], tried[-2][1] - tried[-1][1])
        log_unit += min(max((taken - aim) / slope.now, -8.0), 8.0)
        if not finest < log_unit < coarsest:
            log_unit = (finest + coarsest) / 2 if math.isfinite(finest + coarsest) else log_unit
    if best is None:
        raise ValueError(f"no step was found at which the layers take {budget} bytes; raise method.bits")
    return best


def expected(tensor: LatticeTensor, columns_too: bool = True) -> LatticeTensor:
    return LatticeTensor(tensor.codes, tensor.lattice.fit_sizes(tensor.codes.abs().float(), columns_too))


def _estimated_bytes(tensors: Mapping[str, LatticeTensor], tables: CodeTables) -> int:
    """What storing them takes, but for headers and what the coder adds."""
    total = len(tables.pack())
    for tensor in tensors.values():
        lattice = tensor.lattice
        sides = (lattice.row_scale, lattice.column_scale, lattice.row_size, lattice.column_size)
        total += int(coded_bits(tensor, tables).sum() / 8) + sum(len(encode_integers(side.numpy())) for side in sides)
    return total


def by_block(rows: Float[Tensor, " out"], mean: bool = False) -> Float[Tensor, " row_blocks"]:
    """The sum (or the mean) over every block of 16 rows, in float64."""
    padded = torch.nn.functional.pad(rows.double(), (0, -len(rows) % TILE_ROWS)).view(-1, TILE_ROWS).sum(1)
    if not mean:
        return padded
    return padded / by_block(torch.ones(len(rows)))
