"""The code game on a lattice: codes that pay for their length, and what they would regret.

Where codes are entropy-coded each pays its length in the model's tables at the price of a bit (see ``reply`` for the
passes and the sweeps themselves).
"""

import dataclasses

import torch
from jaxtyping import Float, Integer
from torch import Tensor

from nashswarm.quant.coordinate_descent import DescentResult, coordinate_descent
from nashswarm.quant.curvature import TINY, Curvature, FactoredCurvature
from nashswarm.quant.entropy import CodeTables, address
from nashswarm.quant.error_feedback import FAR, Grid, GridOf, error_feedback_pass, pieces
from nashswarm.quant.lattice import Lattice, LatticeTensor


@dataclasses.dataclass(frozen=True)
class Coding:
    """What a code costs: the model's tables, and the price of a bit in nats per token."""

    tables: CodeTables
    price: float


def lattice_error_feedback(
    weight: Float[Tensor, "out in"], whitened: FactoredCurvature, lattice: Lattice
) -> LatticeTensor:
    """The codes of a matrix on its lattice after one pass, or after plain rounding where there is no factor."""
    column_steps = lattice.column_steps()

    def codes(rows: slice) -> Integer[Tensor, "some in"]:
        row_steps = lattice.of_rows(rows).row_steps()
        if whitened.factor is None:
            steps = torch.outer(row_steps, column_steps)
            return torch.where(steps > 0, weight[rows] / steps, 0.0).round().int()

        def grid_of(columns: Tensor, current: Tensor) -> Grid:
            return Grid(torch.outer(column_steps[columns], row_steps).T)

        return error_feedback_pass(weight[rows], whitened.rows[rows], whitened.factor, grid_of).int()

    return LatticeTensor(torch.cat([codes(rows) for rows in pieces(weight)]), lattice)


def lattice_descent(
    weight: Float[Tensor, "out in"],
    tensor: LatticeTensor,
    curvature: Curvature,
    coding: Coding | None = None,
    sweeps: int = 100,
) -> tuple[LatticeTensor, DescentResult]:
    """The codes after so many sweeps of best replies, and how those went.  ``coding``: what codes cost, if they do."""

    def settled(rows: slice) -> DescentResult:
        own = tensor.of_rows(rows)
        grid_of = _lattice_grid(own.lattice, coding)
        found = coordinate_descent(weight[rows], own.codes.float(), curvature.of_rows(rows), grid_of, sweeps)
        return dataclasses.replace(found, codes=found.codes.int())

    ended = DescentResult.beside([settled(rows) for rows in pieces(weight)])
    return LatticeTensor(ended.codes, tensor.lattice), ended


def regret_by_row(
    weight: Float[Tensor, "out in"], tensor: LatticeTensor, curvature: Curvature, coding: Coding | None = None
) -> Float[Tensor, " out"]:
    """What the weights of every row would still gain, in nats per token, each changing its code alone, all added up.

    Codes that pay for their length try 0, and from the one of least damage as far as a shorter code could pay.
    """

    def regret(rows: slice) -> Float[Tensor, " some"]:
        own, curved = tensor.of_rows(rows), curvature.of_rows(rows)
        error = weight[rows] - own.dequantize()
        stiffness, slope = curved.diagonal(), torch.zeros_like(error)
        if curved.inputs is not None:
            slope += curved.rows[:, None] * (error @ curved.inputs)
        if curved.lookups is not None:
            slope += curved.lookups * error
        grid = _lattice_grid(own.lattice, coding)(torch.arange(weight.shape[1]), error)
        slope, stiffness = slope * grid.step, stiffness * grid.step.square()
        nearest = (slope / stiffness.clamp(min=TINY)).round()
        gains = torch.zeros_like(slope)

        def consider(move: Tensor) -> None:
            gain = move * (slope - stiffness * move / 2)
            if coding is not None:
                gain += grid.length(own.codes) - grid.length(own.codes + move.int())
            torch.maximum(gains, gain, out=gains)

        consider(nearest)
        if coding is not None:
            for move in (-own.codes.float(), *(nearest + jump for jump in FAR)):
                consider(move)
            shorter = grid.length((own.codes + nearest).int()) - coding.price * coding.tables.bits().min()
            for far in range(max(FAR) + 1, int(own.codes.abs().max()) + 1):
                rise = stiffness * (far * (far - 1) / 2)  # at least, from the code of least damage
                if not ((rise > 0) & (rise < shorter)).any():
                    break
                consider(nearest - far)
                consider(nearest + far)
        return gains.double().sum(1)

    return torch.cat([regret(rows) for rows in pieces(weight)])


def _lattice_grid(lattice: Lattice, coding: Coding | None) -> GridOf:
    row_steps, column_steps = lattice.row_steps(), lattice.column_steps()
    price = None if coding is None else torch.from_numpy(coding.tables.bits() * coding.price).float()

    def grid_of(columns: Tensor, current: Tensor) -> Grid:
        step = torch.outer(row_steps, column_steps[columns])
        if price is None:
            return Grid(step)
        table, shift = address(lattice.levels(columns))
        sign = 0.0 if coding is None or not shift.any() else coding.price
        return Grid(step, price=price, table=table, shift=shift, bit=sign)

    return grid_of
