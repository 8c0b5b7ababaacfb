"""A matrix on a lattice: integers times a step that every row and every column scales.

With sensitivities that factor into rows and columns, ``D = ½ Σ a_o κ_j e_oj²``, an error costs the same everywhere when
the step of weight (o, j) is ``unit / √(a_o κ_j)``.  At one price λ per bit that is the equilibrium of uniform
quantizers with an entropy coder at high rate (Gish & Pierce 1968): all spend the damage ``unit² / 24`` and would buy
the next bit at ``λ = unit² · ln 2 / 12``.  κ are the pivots of the factor of H, so that it holds with error feedback;
that columns need steps of their own there was shown by Lifar et al. (WaterSIC, 2026).

Row and column scales are powers of 2^¼, small integers in the file.  A second pair of small integers says how large the
weights of a row and of a column are; together they give the ``level`` of every code: what the coder expects its
magnitude to be, in half octaves.
"""

import dataclasses
import math
from collections.abc import Sequence

import torch
from jaxtyping import Float, Integer
from torch import Tensor

SCALES_PER_OCTAVE = 4
LEVELS_PER_OCTAVE = 2
Rows = Integer[Tensor, " some"] | slice
MIN_MAGNITUDE = 2.0**-7  # added to mean magnitudes, so that rows of zeros have a level too


@dataclasses.dataclass(frozen=True)
class Lattice:
    """The grid of a matrix (``base``, ``row_scale``, ``column_scale``) and the sizes its coder expects (``row_size``,
    ``column_size``); everything but ``base`` is an int8."""

    base: float
    row_scale: Integer[Tensor, " out"]
    column_scale: Integer[Tensor, " in"]
    row_size: Integer[Tensor, " out"]
    column_size: Integer[Tensor, " in"]

    def row_steps(self) -> Float[Tensor, " out"]:
        """``base`` times the scales of the rows; times ``column_steps``, the steps."""
        return self.base * torch.exp2(self.row_scale / SCALES_PER_OCTAVE)

    def column_steps(self) -> Float[Tensor, " in"]:
        return torch.exp2(self.column_scale / SCALES_PER_OCTAVE)

    def levels(self, columns: slice | Tensor = slice(None)) -> Integer[Tensor, "out columns"]:
        """Twice the binary logarithm of the expected magnitudes of the codes, in whole numbers."""
        scale = self.row_scale.int()[:, None] + self.column_scale.int()[columns]
        size = self.row_size.int()[:, None] + self.column_size.int()[columns]
        return size - (scale >> 1)  # two scales a level

    def select_rows(self, rows: Rows) -> "Lattice":
        """The grid of some of the rows."""
        return dataclasses.replace(self, row_scale=self.row_scale[rows], row_size=self.row_size[rows])

    def shift_row_scales(self, scales: Integer[Tensor, " out"] | int) -> "Lattice":
        """With coarser rows, by so many scales."""
        return dataclasses.replace(self, row_scale=(self.row_scale.int() + scales).clamp(-128, 127).to(torch.int8))

    def fit_sizes(self, magnitudes: Float[Tensor, "out in"], columns_too: bool = True) -> "Lattice":
        """The same grid, its expected sizes fitted to the ``magnitudes`` of codes; or those of its rows only."""
        octaves = LEVELS_PER_OCTAVE * (magnitudes.mean() + MIN_MAGNITUDE).log2()
        rows = LEVELS_PER_OCTAVE * (magnitudes.mean(1) + MIN_MAGNITUDE).log2() + self.row_scale / LEVELS_PER_OCTAVE
        found = dataclasses.replace(self, row_size=_whole(rows))
        if not columns_too:
            return found
        columns = (
            LEVELS_PER_OCTAVE * (magnitudes.mean(0) + MIN_MAGNITUDE).log2() + self.column_scale / LEVELS_PER_OCTAVE
        )
        return dataclasses.replace(found, column_size=_whole(columns - octaves))


def stack_rows(lattices: Sequence[Lattice]) -> Lattice:
    """Lattices of the same base and columns above one another."""
    return dataclasses.replace(
        lattices[0],
        row_scale=torch.cat([part.row_scale for part in lattices]),
        row_size=torch.cat([part.row_size for part in lattices]),
    )


@dataclasses.dataclass(frozen=True)
class LatticeTensor:
    """A matrix of shape (out, in) as integers on its lattice."""

    codes: Integer[Tensor, "out in"]
    lattice: Lattice

    def dequantize(self) -> Float[Tensor, "out in"]:
        """The float32 matrix that the codes stand for."""
        return self.codes.float() * self.lattice.row_steps()[:, None] * self.lattice.column_steps()

    def select_rows(self, rows: Rows) -> "LatticeTensor":
        """Some of the rows."""
        return LatticeTensor(self.codes[rows], self.lattice.select_rows(rows))

    def replace_rows(self, rows: Rows, part: "LatticeTensor") -> "LatticeTensor":
        """With ``part`` in the place of some of the rows."""
        codes, scale, size = self.codes.clone(), self.lattice.row_scale.clone(), self.lattice.row_size.clone()
        codes[rows], scale[rows], size[rows] = part.codes, part.lattice.row_scale, part.lattice.row_size
        return LatticeTensor(codes, dataclasses.replace(self.lattice, row_scale=scale, row_size=size))


def make_lattice(
    weight: Float[Tensor, "out in"], unit: float, rows: Float[Tensor, " out"], columns: Float[Tensor, " in"]
) -> Lattice:
    """The lattice on which an error of ``unit`` steps costs the same in every row (sensitivities ``rows``, a) and every
    column (``columns``, κ), with the sizes of ``weight`` itself.

    Rows and columns without any sensitivity count as the least sensitive ones that have some.
    """
    row_scale, column_scale = _scale(rows), _scale(columns)
    middle = (_middle(row_scale) + _middle(column_scale)) / SCALES_PER_OCTAVE  # keeps the integers small
    lattice = Lattice(
        float(torch.tensor(unit * 2.0**middle, dtype=torch.float32)),
        _whole(row_scale - _middle(row_scale)),
        _whole(column_scale - _middle(column_scale)),
        torch.zeros(len(rows), dtype=torch.int8),
        torch.zeros(len(columns), dtype=torch.int8),
    )
    steps = lattice.row_steps()[:, None] * lattice.column_steps()
    return lattice.fit_sizes((weight / steps).abs())


def bit_price(unit: float) -> float:
    """What the next bit is worth at ``unit``, in nats per token.

    >>> round(bit_price(1.0) * 12 / math.log(2), 6)
    1.0
    """
    return unit**2 * math.log(2) / 12


def _scale(sensitivity: Float[Tensor, " n"]) -> Float[Tensor, " n"]:
    """−½ log2 of the sensitivities, in scales."""
    least = sensitivity[sensitivity > 0].min() if (sensitivity > 0).any() else torch.ones(())
    return -SCALES_PER_OCTAVE / 2 * sensitivity.clamp(min=least).log2()


def _middle(scale: Float[Tensor, " n"]) -> float:
    return float(scale.median().round())


def _whole(values: Float[Tensor, " n"]) -> Integer[Tensor, " n"]:
    return values.round().clamp(-128, 127).to(torch.int8)
