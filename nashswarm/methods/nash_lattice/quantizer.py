"""Turn a model's layers into codes on their lattices, given a base step and the players' choices.

The base step is the step of a weight of sensitivity 1, and it fixes the price of a bit (see ``quant.lattice``).  Codes
come from one pass of error feedback and from sweeps of coordinate descent.  In the descent every code weighs its damage
against its length in the code tables of the whole model, both in nats per token.
"""

import dataclasses
import functools
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from jaxtyping import Bool, Float, Shaped
from torch import Tensor

from nashswarm.layers import Layer
from nashswarm.memory import trim_heap
from nashswarm.methods.nash_lattice.budget import COARSE_TOLERANCE, ByteSlope, step_for_budget
from nashswarm.methods.nash_lattice.step_choices import StepChoices
from nashswarm.packed.file_format import TABLES
from nashswarm.progress import Track
from nashswarm.quant.coordinate_descent import DescentResult
from nashswarm.quant.curvature import Curvature, FactoredCurvature
from nashswarm.quant.entropy import CodeTables, coded_bits, count_symbols, encode_lattice, fit_tables
from nashswarm.quant.error_feedback import row_chunks
from nashswarm.quant.grid import TILE_ROWS, row_blocks
from nashswarm.quant.integer_code import encode_integers
from nashswarm.quant.lattice import Lattice, LatticeTensor, Rows, bit_price, make_lattice
from nashswarm.quant.lattice_codes import RateTerm, lattice_descent, lattice_error_feedback

SWEEPS_BEFORE_TABLES = 3  # sweeps before the code tables are fitted again
ALL_ROWS = slice(None)

Blocks = Bool[np.ndarray, " row_blocks"]


@dataclasses.dataclass(frozen=True)
class QuantizedModel:
    """All layers at one base step: their codes, the code tables they share, and the sweeps of each layer's descent."""

    base_step: float
    tensors: dict[str, LatticeTensor]
    tables: CodeTables
    descents: dict[str, DescentResult]

    @functools.cached_property
    def packed(self) -> dict[str, np.ndarray]:
        """The stored bytes of every layer, and of the tables."""
        layers = {name: encode_lattice(tensor, self.tables) for name, tensor in self.tensors.items()}
        return layers | {TABLES: self.tables.pack()}

    @property
    def packed_bytes(self) -> int:
        """Bytes that ``packed`` takes."""
        return sum(len(content) for content in self.packed.values())

    def with_fitted_tables(self) -> "QuantizedModel":
        """Return the same codes with tables, and expected sizes of rows and columns, fitted to them."""
        tensors = {name: with_fitted_sizes(tensor) for name, tensor in self.tensors.items()}
        return dataclasses.replace(self, tensors=tensors, tables=fit_tables(count_symbols(tensors.values())))


class LatticeQuantizer:
    """The layers of one model and their factored curvature, by layer.

    ``uniform``: give every matrix one step, in proportion to its weights instead of its sensitivities.
    ``rate_in_codes``: the share of a code's length, priced per bit, that coordinate descent pays, 0 to 1.
    ``block_counts``: blocks of 16 rows in each layer.  ``neutral``: the choices of a game not yet played, all row
    weights 1 and all offsets 0.
    """

    def __init__(
        self,
        layers: Sequence[Layer],
        curvatures: Mapping[str, FactoredCurvature],
        uniform: bool,
        rate_in_codes: float,
        track: Track,
    ) -> None:
        self.layers, self.curvatures, self.track = layers, curvatures, track
        self.uniform, self.rate_in_codes = uniform, rate_in_codes
        self.block_counts = [row_blocks(len(layer.weight)) for layer in layers]
        self.bytes_per_bit = sum(layer.parameters for layer in layers) / 8  # of one more bit in every weight
        self.neutral = StepChoices(
            {layer.name: torch.ones(len(layer.weight)) for layer in layers},
            {layer.name: np.zeros(row_blocks(len(layer.weight)), int) for layer in layers},
            {"strength": 0.0, "flock_shrink": 0.0, "flock_align": 0.0, "flock_moves": 0, "heldout_passes": 0},
        )

    # One layer.

    def lattice(self, layer: Layer, base_step: float, choices: StepChoices) -> Lattice:
        """Return the layer's grid at ``base_step``, every block's rows moved by its offset."""
        if self.uniform:
            rows, columns = (torch.ones(size) for size in layer.weight.shape)
            return make_lattice(layer.weight, base_step * float(layer.weight.square().mean().sqrt()), rows, columns)
        factored = self.curvatures[layer.name]
        rows = factored.rows * choices.row_weights[layer.name]
        lattice = make_lattice(layer.weight, base_step, rows, factored.columns)
        offsets = torch.from_numpy(choices.offsets[layer.name]).repeat_interleave(TILE_ROWS)
        return lattice.shift_row_scales(offsets[: len(layer.weight)])

    def curvature(self, layer: Layer, choices: StepChoices, rows: Rows = ALL_ROWS) -> Curvature:
        """Return the curvature of these rows, times their row weights."""
        return self.curvatures[layer.name].curvature.select_rows(rows).scale_rows(choices.row_weights[layer.name][rows])

    def damage_by_row(
        self, layer: Layer, tensor: LatticeTensor, choices: StepChoices, rows: Rows = ALL_ROWS
    ) -> Float[Tensor, " out"]:
        """Return the damage of each of these rows in nats per token, by the weighted curvature."""
        weight, curvature = layer.weight[rows], self.curvature(layer, choices, rows)
        parts = [
            curvature.select_rows(piece).damage_by_row(weight[piece] - tensor.select_rows(piece).dequantize())
            for piece in row_chunks(weight)
        ]
        return torch.cat(parts)

    def cost_by_block(
        self, layer: Layer, tensor: LatticeTensor, model: QuantizedModel, choices: StepChoices, rows: Rows = ALL_ROWS
    ) -> Float[Tensor, " blocks"]:
        """Return what each block pays for ``tensor``, in nats per token: damage, and bits by ``model.tables``."""
        rate = bit_price(model.base_step) * coded_bits(tensor, model.tables)
        return by_block(self.damage_by_row(layer, tensor, choices, rows) + rate)

    # The whole model.

    def quantize_at(self, base_step: float, choices: StepChoices, sweeps: int) -> QuantizedModel:
        """Return all layers at ``base_step`` after one pass of error feedback and at most ``sweeps`` of descent.

        Codes that do not pay for their length get tables fitted to them at the end.  Codes that do pay need the tables
        first: these are fitted after ``SWEEPS_BEFORE_TABLES`` more sweeps and then stay, because other tables would
        change which codes are cheapest.
        """
        tensors: dict[str, LatticeTensor] = {}
        for layer in self.track(self.layers, "error feedback"):
            lattice = self.lattice(layer, base_step, choices)
            tensors[layer.name] = with_fitted_sizes(
                lattice_error_feedback(layer.weight, self.curvatures[layer.name], lattice)
            )
        trim_heap()
        model = QuantizedModel(base_step, tensors, fit_tables(count_symbols(tensors.values())), {})
        if not sweeps:
            return model
        if not self.rate_in_codes:
            return self.descend(model, choices, sweeps).with_fitted_tables()
        model = self.descend(model, choices, SWEEPS_BEFORE_TABLES).with_fitted_tables()
        return self.descend(model, choices, sweeps)

    def descend(self, model: QuantizedModel, choices: StepChoices, sweeps: int) -> QuantizedModel:
        """Return ``model`` after at most ``sweeps`` of coordinate descent by all codes; tables and sizes stay."""
        rate_term = self.rate_term(model)
        tensors, descents = {}, {}
        for layer in self.track(self.layers, "coordinate descent"):
            tensors[layer.name], descent = lattice_descent(
                layer.weight, model.tensors[layer.name], self.curvature(layer, choices), rate_term, sweeps
            )
            descents[layer.name] = descent.prepend(model.descents.get(layer.name))
        trim_heap()
        return QuantizedModel(model.base_step, tensors, model.tables, descents)

    def requantize_blocks(
        self, model: QuantizedModel, choices: StepChoices, blocks: Blocks, sweeps: int
    ) -> QuantizedModel:
        """Return ``model`` with new codes for these ``blocks``, at their offsets in ``choices``.

        All other blocks, the tables and the expected sizes of columns stay, so that nobody else's cost changes.
        """
        rate_term = self.rate_term(model)
        tensors = dict(model.tensors)
        for layer, rows in self.row_pieces(blocks):
            weight = layer.weight[rows]
            lattice = self.lattice(layer, model.base_step, choices).select_rows(rows)
            lattice = dataclasses.replace(lattice, column_size=model.tensors[layer.name].lattice.column_size)
            tensor = with_fitted_sizes(
                lattice_error_feedback(weight, self.curvatures[layer.name], lattice), columns_too=False
            )
            if sweeps:
                tensor, _ = lattice_descent(weight, tensor, self.curvature(layer, choices, rows), rate_term, sweeps)
            tensors[layer.name] = tensors[layer.name].replace_rows(rows, tensor)
        return dataclasses.replace(model, tensors=tensors)

    def rate_term(self, model: QuantizedModel) -> RateTerm | None:
        """Return the rate term that coordinate descent pays (tables and price per bit), or None if codes ignore it."""
        return RateTerm(model.tables, self.rate_in_codes * bit_price(model.base_step)) if self.rate_in_codes else None

    # Sizes, and parts of the model.

    def step_of_rounding(self, budget: int) -> float:
        """Return the base step at which plain rounding would take about ``budget`` bytes.

        Rounding costs little time, and its step is close to the one that the same budget allows after error feedback:
        every search begins there.
        """

        def round_at(base_step: float) -> tuple[float, int]:
            tensors = {}
            for layer in self.layers:
                lattice = self.lattice(layer, base_step, self.neutral)
                steps = lattice.row_steps()[:, None] * lattice.column_steps()
                tensors[layer.name] = LatticeTensor((layer.weight / steps).round().int(), lattice)
            return base_step, _estimated_bytes(tensors)

        first_step = 2.0**-1 if self.uniform else 2.0**-12
        slope = ByteSlope(self.bytes_per_bit)
        return step_for_budget(
            round_at, lambda step_and_bytes: step_and_bytes[1], budget, first_step, slope, 2 * COARSE_TOLERANCE
        )[0]

    def smallest_bytes(self) -> int:
        """Return the bytes of the model with every code zero."""
        tensors = {}
        for layer in self.layers:
            zeros = torch.zeros(layer.weight.shape, dtype=torch.int32)
            tensors[layer.name] = with_fitted_sizes(LatticeTensor(zeros, self.lattice(layer, 1.0, self.neutral)))
        return _estimated_bytes(tensors)

    def row_pieces(self, blocks: Blocks | None) -> list[tuple[Layer, Rows]]:
        """Return the rows of these ``blocks`` (None: of all), layer by layer, in pieces that fit in memory."""
        row_pieces: list[tuple[Layer, Rows]] = []
        for layer in self.layers:
            if blocks is None:
                row_pieces += [(layer, piece) for piece in row_chunks(layer.weight)]
                continue
            mask = torch.from_numpy(self.split_by_layer(blocks)[layer.name]).repeat_interleave(TILE_ROWS)
            rows = mask[: len(layer.weight)].nonzero()[:, 0]
            row_pieces += [(layer, rows[piece]) for piece in row_chunks(layer.weight[rows])]
        return row_pieces

    def split_by_layer(self, values: Shaped[np.ndarray, " blocks"]) -> dict[str, np.ndarray]:
        """Return one value per block as one array per layer, by name."""
        parts = np.split(values, np.cumsum(self.block_counts)[:-1])
        return {layer.name: part for layer, part in zip(self.layers, parts, strict=True)}


def with_fitted_sizes(tensor: LatticeTensor, columns_too: bool = True) -> LatticeTensor:
    """Return the same codes, expected sizes of rows (and columns) fitted to them."""
    return LatticeTensor(tensor.codes, tensor.lattice.fit_sizes(tensor.codes.abs().float(), columns_too))


def by_block(rows: Float[Tensor, " out"], mean: bool = False) -> Float[Tensor, " row_blocks"]:
    """Return the sum (or the mean) over every block of 16 rows, in float64."""
    sums = torch.nn.functional.pad(rows.double(), (0, -len(rows) % TILE_ROWS)).view(-1, TILE_ROWS).sum(1)
    return sums / by_block(torch.ones(len(rows))) if mean else sums


def _estimated_bytes(tensors: Mapping[str, LatticeTensor]) -> int:
    """Return about how many bytes these layers take, headers and what the coder adds aside."""
    tables = fit_tables(count_symbols(tensors.values()))
    total = len(tables.pack())
    for tensor in tensors.values():
        lattice = tensor.lattice
        sides = (lattice.row_scale, lattice.column_scale, lattice.row_size, lattice.column_size)
        total += int(coded_bits(tensor, tables).sum() / 8) + sum(len(encode_integers(side.numpy())) for side in sides)
    return total
