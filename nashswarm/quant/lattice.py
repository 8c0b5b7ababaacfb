"""A matrix on a lattice: integer codes times a step that depends on the row and on the column.

Let the sensitivities factor into rows and columns, so that the damage of errors e is ``D = ½ Σ a_o κ_j e_oj²``.  An
error of a given number of steps then costs the same everywhere if the step of weight (o, j) is
``base_step / √(a_o κ_j)``.  For uniform quantizers with an entropy coder at high rate (Gish & Pierce 1968) these steps
are the optimum at one price λ per bit: every weight has the expected damage ``base_step² / 24``, and its next bit would
lower that by ``λ = base_step² · ln 2 / 12``.  With error feedback, κ is the squared diagonal of the Cholesky factor of
H; that columns then need steps of their own was shown by Lifar et al. (WaterSIC, 2026).

Row and column scales are powers of 2^¼ and are stored as int8 exponents.  A second pair of int8 exponents, the sizes,
says how large the weights of a row and of a column are.  Scales and sizes together give the ``level`` of every code:
the magnitude that the entropy coder expects, in half octaves.
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
MIN_MAGNITUDE = 2.0**-7  # added to mean magnitudes, so that rows of zeros have a finite level


@dataclasses.dataclass(frozen=True)
class Lattice:
    """Steps of a matrix, and the code magnitudes that its entropy coder expects.

    The step of weight (o, j) is ``base · 2^((row_scale[o] + column_scale[j]) / 4)``.  ``row_size`` and ``column_size``
    are the exponents of the expected weight magnitudes, in half octaves.  The four exponents are int8 tensors.
    """

    base: float
    row_scale: Integer[Tensor, " out"]
    column_scale: Integer[Tensor, " in"]
    row_size: Integer[Tensor, " out"]
    column_size: Integer[Tensor, " in"]

    def row_steps(self) -> Float[Tensor, " out"]:
        """Return the row factors of the steps, ``base`` included."""
        return self.base * torch.exp2(self.row_scale / SCALES_PER_OCTAVE)

    def column_steps(self) -> Float[Tensor, " in"]:
        """Return the column factors of the steps."""
        return torch.exp2(self.column_scale / SCALES_PER_OCTAVE)

    def levels(self, columns: slice | Tensor = slice(None)) -> Integer[Tensor, "out columns"]:
        """Return the level of every code: the expected magnitude in half octaves (2 log2), rounded."""
        scale = self.row_scale.int()[:, None] + self.column_scale.int()[columns]
        size = self.row_size.int()[:, None] + self.column_size.int()[columns]
        return size - (scale >> 1)  # two scales make one level

    def select_rows(self, rows: Rows) -> "Lattice":
        """Return the lattice of some of the rows."""
        return dataclasses.replace(self, row_scale=self.row_scale[rows], row_size=self.row_size[rows])

    def shift_row_scales(self, shift: Integer[Tensor, " out"] | int) -> "Lattice":
        """Return the lattice with ``shift`` added to the row scales: 4 doubles the steps of a row."""
        return dataclasses.replace(self, row_scale=(self.row_scale.int() + shift).clamp(-128, 127).to(torch.int8))

    def fit_sizes(self, magnitudes: Float[Tensor, "out in"], columns_too: bool = True) -> "Lattice":
        """Return the lattice with sizes fitted to the ``magnitudes`` of its codes.

        ``columns_too=False`` keeps the column sizes, for use when only some rows of the matrix are given.
        """
        octaves = LEVELS_PER_OCTAVE * (magnitudes.mean() + MIN_MAGNITUDE).log2()
        rows = LEVELS_PER_OCTAVE * (magnitudes.mean(1) + MIN_MAGNITUDE).log2() + self.row_scale / LEVELS_PER_OCTAVE
        lattice = dataclasses.replace(self, row_size=_to_int8(rows))
        if not columns_too:
            return lattice
        columns = (
            LEVELS_PER_OCTAVE * (magnitudes.mean(0) + MIN_MAGNITUDE).log2() + self.column_scale / LEVELS_PER_OCTAVE
        )
        return dataclasses.replace(lattice, column_size=_to_int8(columns - octaves))


def stack_rows(lattices: Sequence[Lattice]) -> Lattice:
    """Concatenate the rows of lattices that share their base and their columns."""
    return dataclasses.replace(
        lattices[0],
        row_scale=torch.cat([part.row_scale for part in lattices]),
        row_size=torch.cat([part.row_size for part in lattices]),
    )


@dataclasses.dataclass(frozen=True)
class LatticeTensor:
    """A matrix of shape (out, in) as integer codes on a lattice."""

    codes: Integer[Tensor, "out in"]
    lattice: Lattice

    def dequantize(self) -> Float[Tensor, "out in"]:
        """Return the float32 weights: codes times steps."""
        return self.codes.float() * self.lattice.row_steps()[:, None] * self.lattice.column_steps()

    def select_rows(self, rows: Rows) -> "LatticeTensor":
        """Return some of the rows."""
        return LatticeTensor(self.codes[rows], self.lattice.select_rows(rows))

    def replace_rows(self, rows: Rows, part: "LatticeTensor") -> "LatticeTensor":
        """Return a copy with ``part`` in place of some of the rows."""
        codes, scale, size = self.codes.clone(), self.lattice.row_scale.clone(), self.lattice.row_size.clone()
        codes[rows], scale[rows], size[rows] = part.codes, part.lattice.row_scale, part.lattice.row_size
        return LatticeTensor(codes, dataclasses.replace(self.lattice, row_scale=scale, row_size=size))


def make_lattice(
    weight: Float[Tensor, "out in"], base_step: float, rows: Float[Tensor, " out"], columns: Float[Tensor, " in"]
) -> Lattice:
    """Return the lattice on which an error of one step costs the same in every row and column.

    ``rows`` (a) and ``columns`` (κ) are the sensitivities; ``base_step`` is the step of a weight whose sensitivity is
    1.  Rows and columns without any sensitivity get that of the least sensitive one that has some.  Sizes are fitted to
    ``weight``.
    """
    row_scale, column_scale = _scale(rows), _scale(columns)
    median = (
        _rounded_median(row_scale) + _rounded_median(column_scale)
    ) / SCALES_PER_OCTAVE  # keeps int8 from clipping
    lattice = Lattice(
        float(torch.tensor(base_step * 2.0**median, dtype=torch.float32)),
        _to_int8(row_scale - _rounded_median(row_scale)),
        _to_int8(column_scale - _rounded_median(column_scale)),
        torch.zeros(len(rows), dtype=torch.int8),
        torch.zeros(len(columns), dtype=torch.int8),
    )
    steps = lattice.row_steps()[:, None] * lattice.column_steps()
    return lattice.fit_sizes((weight / steps).abs())


def bit_price(base_step: float) -> float:
    """Return the damage that one more bit per weight saves at ``base_step``, in nats per token and bit.

    >>> round(bit_price(1.0) * 12 / math.log(2), 6)
    1.0
    """
    return base_step**2 * math.log(2) / 12


def _scale(sensitivity: Float[Tensor, " n"]) -> Float[Tensor, " n"]:
    """Return −½ log2 of the sensitivities in units of a scale, a quarter of an octave."""
    least = sensitivity[sensitivity > 0].min() if (sensitivity > 0).any() else torch.ones(())
    return -SCALES_PER_OCTAVE / 2 * sensitivity.clamp(min=least).log2()


def _rounded_median(scale: Float[Tensor, " n"]) -> float:
    return float(scale.median().round())


def _to_int8(values: Float[Tensor, " n"]) -> Integer[Tensor, " n"]:
    return values.round().clamp(-128, 127).to(torch.int8)
