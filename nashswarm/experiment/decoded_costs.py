"""What a decoded model's weights cost: the damage of their errors and the length of their codes, in float64.

Part of the second implementation of the game (see ``enumeration``): it shares no sum with the solver or the coder, and
repeats the constants of the file format.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np
from jaxtyping import Float, Int, Integer
from torch import Tensor

from nashswarm.kernels.trellis import Trellis
from nashswarm.layers import Layer, Moments
from nashswarm.packed.file_format import Decoded
from nashswarm.quant.entropy import CodeTables
from nashswarm.quant.grid import GRID_WIDTHS
from nashswarm.quant.lattice import LatticeTensor
from nashswarm.quant.lattice_paths import PathTensor
from nashswarm.quant.prototype import ClassedTensor

BLOCK = 16  # rows of a player
DAMPING = 0.01  # of the mean diagonal of H, where the method names none
LOWEST, HIGHEST, ESCAPE, TOTAL = -12, 5, 48, 1 << 14  # of the code tables, fixed by the format
MIN_MAGNITUDE = 2.0**-7  # added to mean magnitudes, fixed by the format

Array = np.ndarray


@dataclasses.dataclass(frozen=True)
class Quadratic:
    """Second derivatives of the loss in a matrix, in nats per token.

    ``rows`` (f) times ``inputs`` (damped H) for its products, and ``lookups`` (d) for its lookups; None for what the
    matrix does not do.
    """

    rows: Float[Array, " out"]
    inputs: Float[Array, "in in"] | None
    lookups: Float[Array, "out in"] | None

    def scale_rows(self, weights: Float[Array, " out"]) -> "Quadratic":
        """Return the second derivatives with every row times its weight."""
        lookups = None if self.lookups is None else weights[:, None] * self.lookups
        return Quadratic(weights * self.rows, self.inputs, lookups)

    def slope(self, error: Float[Array, "out in"], rows: slice = slice(None)) -> Float[Array, "out in"]:
        """Return the derivative of the damage in each error of these rows."""
        total = np.zeros_like(error)
        if self.inputs is not None:
            total += self.rows[rows, None] * (error @ self.inputs)
        if self.lookups is not None:
            total += self.lookups[rows] * error
        return total

    def stiffness(self, rows: slice = slice(None)) -> Float[Array, "out in"] | float:
        """Return the second derivative of the damage in each weight of these rows alone."""
        total: Any = 0.0
        if self.inputs is not None:
            total = total + self.rows[rows, None] * self.inputs.diagonal()
        return total if self.lookups is None else total + self.lookups[rows]


@dataclasses.dataclass(frozen=True)
class RateCost:
    """What codes pay for their length.

    ``price``: nats per token a bit.  ``bits``: of every symbol in every code table.  ``levels``: which table codes each
    weight.
    """

    price: float
    bits: Float[Array, "tables symbols"]
    levels: Integer[Array, "out in"]

    def length(self, codes: Integer[Array, "rows in"] | int, rows: slice = slice(None)) -> Float[Array, "rows in"]:
        """Return the bits that these codes take in these rows."""
        level, magnitudes = self.levels[rows], np.abs(codes)
        shift = np.maximum((level - HIGHEST + 1) // 2, 0)
        symbols = np.minimum(magnitudes >> shift, ESCAPE)
        signs = (magnitudes > 0) & (symbols == 0)
        return self.bits[np.maximum(level - 2 * shift, LOWEST) - LOWEST, symbols] + shift + signs


@dataclasses.dataclass(frozen=True)
class DecodedMatrix:
    """A decoded matrix and the codes its weights could have.

    ``values``: the weights.  ``codes`` and ``steps``: a value changes by its step when its code changes by 1.  ``low``
    and ``high``: the least and largest code to try.  ``rate``: what codes pay for their length, if they do.
    """

    values: Float[Array, "out in"]
    codes: Integer[Array, "out in"]
    steps: Float[Array, "out in"]
    low: int
    high: Integer[Array, "out in"] | int
    rate: RateCost | None = None


def make_quadratic(layer: Layer, moments: Mapping[str, Moments], settings: Mapping[str, Any]) -> Quadratic:
    """Return the layer's curvature by the method's ``settings``: damped, with a floor, sparse with a local reply."""
    rows, inputs, lookups = np.zeros(len(layer.weight)), None, None
    products = []
    for module_moments in (moments[module] for module in layer.modules):
        if module_moments.lookup:
            outer = np.outer(float64(module_moments.inputs), float64(module_moments.outputs))
            lookups = outer if lookups is None else lookups + outer
        else:
            both = (float64(module_moments.inputs) + float64(module_moments.coupled_inputs)) / 2
            products.append((float64(module_moments.coupled), both))
    if products:
        size = sum(f.sum() * np.trace(h) for f, h in products)
        rows = sum(f * np.trace(h) for f, h in products) if len(products) > 1 else products[0][0]
        inputs = sum(f.sum() * h for f, h in products) / size if len(products) > 1 and size else products[0][1]
        neighbours = (settings.get("swarm") or {}).get("local_reply")
        inputs = inputs if neighbours is None else _keep_top_correlations(inputs, neighbours)
        inputs = inputs + settings.get("damping", DAMPING) * inputs.diagonal().mean() * np.eye(len(inputs))
    floor = settings.get("floor", 0.0)  # of each row, on top of its own: a share of the mean row
    lookups = None if lookups is None else lookups + floor * lookups.mean(0)
    return Quadratic(rows + floor * rows.mean(), inputs, lookups)


def place_codes(
    tensor: Decoded, bits: Float[Array, "tables symbols"] | None = None, price: float = 0.0
) -> DecodedMatrix:
    """Return where the weights of ``tensor`` are and could be; codes pay ``price`` nats per token for each of ``bits``.

    ``tensor`` has players (see ``check_players``).
    """
    assert not isinstance(tensor, ClassedTensor)
    if isinstance(tensor, LatticeTensor):
        lattice = tensor.lattice
        codes = tensor.codes.numpy().astype(np.int64)
        columns = 2.0 ** (float64(lattice.column_scale) / 4)
        steps = np.outer(lattice.base * 2.0 ** (float64(lattice.row_scale) / 4), columns)
        rate = None if bits is None or not price else RateCost(price, bits, levels(*scales_and_sizes(tensor)))
        return DecodedMatrix(codes * steps, codes, steps, int(codes.min()), int(codes.max()), rate)
    size = tensor.scheme.group_size
    width = np.repeat(tensor.bits.numpy().astype(np.int64), BLOCK, 0)[: len(tensor.codes)]
    grid = np.isin(width, GRID_WIDTHS)
    scale, largest = (
        np.repeat(np.where(grid, part, 0), size, 1) for part in (float64(tensor.scale), (1 << width % 16) - 1)
    )
    codes = np.where(np.repeat(grid, size, 1), tensor.codes.numpy(), 0).astype(np.int64)
    return DecodedMatrix(float64(tensor.dequantize()), codes, scale, 0, largest)


def check_players(tensor: Decoded | Trellis) -> None:
    """Raise ValueError for the formats of the prototype and of lattice paths, which have no players."""
    if isinstance(tensor, ClassedTensor | PathTensor):
        method = "nash_archive" if isinstance(tensor, PathTensor) else "as_published"
        raise ValueError(f"the format of method={method} has no players: there is nothing to certify")


def symbol_bits(tables: CodeTables) -> Float[Array, "tables symbols"]:
    """Return the bits of every symbol in every table, with the sign bit and the 32 bits of an escaped magnitude."""
    bits = -np.log2(tables.frequencies / TOTAL)
    bits[:, 1:] += 1
    bits[:, ESCAPE] += 32
    return bits


def expected_size(magnitudes: Float[Array, " n"], scale: Int[Array, " n"]) -> Int[Array, " n"]:
    """Return the size, in half octaves, that the coder expects of rows with codes of these mean ``magnitudes``."""
    return np.rint(2 * np.log2(magnitudes + MIN_MAGNITUDE) + scale / 2).clip(-128, 127).astype(np.int64)


def scales_and_sizes(tensor: LatticeTensor) -> tuple[Int[Array, " n"], ...]:
    """Return the scales of rows and columns, then the sizes that the coder expects of both."""
    names = ("row_scale", "column_scale", "row_size", "column_size")
    return tuple(getattr(tensor.lattice, name).numpy().astype(np.int64) for name in names)


def levels(
    row_scale: Int[Array, " out"],
    column_scale: Int[Array, " in"],
    row_size: Int[Array, " out"],
    column_size: Int[Array, " in"],
) -> Int[Array, "out in"]:
    """Return twice the binary logarithm of the magnitude that the coder expects of every code."""
    return row_size[:, None] + column_size - (row_scale[:, None] + column_scale) // 2


def float64(tensor: Tensor) -> Array:
    """Return a tensor as a float64 array."""
    return tensor.cpu().double().numpy()


def _keep_top_correlations(inputs: Float[Array, "in in"], neighbours: int) -> Float[Array, "in in"]:
    """Return H with each column's entries for its most correlated columns; the others are added to the diagonal."""
    if neighbours >= len(inputs) - 1:
        return inputs
    size = np.sqrt(np.maximum(inputs.diagonal(), np.finfo(np.float32).tiny))
    correlation = np.abs(inputs / np.outer(size, size))
    np.fill_diagonal(correlation, 0)
    mask = np.zeros(inputs.shape, bool)
    np.put_along_axis(mask, np.argsort(-correlation, 1, kind="stable")[:, :neighbours], True, 1)
    mask |= mask.T
    np.fill_diagonal(mask, True)
    return np.where(mask, inputs, 0) + np.diag(np.abs(np.where(mask, 0, inputs)).sum(1))
