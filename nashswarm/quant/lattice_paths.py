"""A matrix on lattice paths: codes down a column, of which each may take every second one (see ``kernels.path_form``).

At equal bits, the squared error of such codes is about four fifths of what the best single codes have: a path chooses
among points that fill space better than a grid of integers.
"""

import dataclasses

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from nashswarm.kernels import path_encoder
from nashswarm.kernels.path_form import SETS, STEPS, Columns, Rows, next_states
from nashswarm.quant.curvature import TINY, FactoredCurvature
from nashswarm.quant.entropy import TABLES, CodeTables
from nashswarm.quant.error_feedback import BLOCK_COLUMNS, CHUNK_WEIGHTS
from nashswarm.quant.lattice import Lattice, LatticeTensor

LANES = 16  # paths that the library encodes together
GAIN = 0.8  # the squared error of a path over that of single codes of the same bits, and so the price of a bit


@dataclasses.dataclass(frozen=True)
class PathTensor(LatticeTensor):
    """A matrix of shape (out, in) as codes on lattice paths; the steps of its lattice are the half steps."""

    def numbers(self) -> tuple[Int[np.ndarray, "out in"], Int[np.ndarray, "out in"]]:
        """Return the set of every code, and the number of its magnitude in the set.

        Raises ValueError for codes that are not on a path.
        """
        magnitudes = self.codes.abs().numpy()
        sets, numbers = np.zeros_like(magnitudes), np.zeros_like(magnitudes)
        states = np.zeros((-(-len(magnitudes) // STEPS), magnitudes.shape[1]), np.int32)
        for step in range(min(STEPS, len(magnitudes))):
            rows = slice(step, None, STEPS)
            states = states[: len(magnitudes[rows])]
            sets[rows] = SETS[states]
            numbers[rows] = (magnitudes[rows] + sets[rows]) >> 1
            states = next_states(states, numbers[rows])
        if (magnitudes != magnitudes_of(sets, numbers)).any():
            raise ValueError("these codes are not on lattice paths")
        return sets, numbers


def magnitudes_of(sets: Int[np.ndarray, "..."], numbers: Int[np.ndarray, "..."]) -> Int[np.ndarray, "..."]:
    """Return the magnitudes of the codes with these numbers in their sets, which broadcast."""
    return 2 * numbers - (sets & (numbers > 0))


def path_error_feedback(
    weight: Float[Tensor, "out in"], curvature: FactoredCurvature, lattice: Lattice, tables: CodeTables, price: float
) -> PathTensor:
    """Quantize a matrix to the paths of least damage plus priced length, by one pass of error feedback.

    ``lattice``: of half steps.  ``tables``: of both sets.  ``price``: of a bit, in nats per token.
    """
    prices = torch.from_numpy(tables.bits() * price).float().view(2, TABLES, -1)
    factor = curvature.factor
    if factor is None:  # columns do not answer one another's errors
        factor = torch.diag(curvature.columns.clamp(min=TINY).rsqrt())
    size = max(CHUNK_WEIGHTS // weight.shape[1] // (LANES * STEPS), 1) * LANES * STEPS
    parts = []
    for start in range(0, len(weight), size):
        chosen = slice(start, start + size)
        part = lattice.select_rows(chosen)
        rows = Rows(part.row_steps(), curvature.rows[chosen], part.row_scale, part.row_size)
        parts.append(_feedback(weight[chosen], rows, lattice, factor, prices, price))
    return PathTensor(torch.cat(parts), lattice)


def _feedback(
    weight: Float[Tensor, "out in"],
    rows: Rows,
    lattice: Lattice,
    factor: Float[Tensor, "in in"],
    prices: Float[Tensor, "2 tables symbols"],
    price: float,
) -> Int[Tensor, "out in"]:
    corrected, codes, steps = weight.T.contiguous(), [], lattice.column_steps()
    for start in range(0, len(corrected), BLOCK_COLUMNS):
        block = slice(start, start + BLOCK_COLUMNS)
        columns = Columns(steps[block], lattice.column_scale[block], lattice.column_size[block])
        block_codes, errors = path_encoder.feedback(
            corrected[block], rows, columns, factor[block, block], prices, price
        )
        corrected[block.stop :].addmm_(factor[block, block.stop :].T, errors, alpha=-1)
        codes.append(block_codes)
    return torch.cat(codes).T.contiguous()
