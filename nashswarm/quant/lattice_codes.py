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
from nashswarm.quant.entropy import CodeTables, table_and_shift
from nashswarm.quant.error_feedback import FAR, Grid, GridFactory, error_feedback_pass, row_chunks
from nashswarm.quant.lattice import Lattice, LatticeTensor


@dataclasses.dataclass(frozen=True)
class RateTerm:
    """What a code costs: the model's tables, and the price of a bit in nats per token."""

    tables: CodeTables
    price: float


def lattice_error_feedback(
    weight: Float[Tensor, "out in"], whitened: FactoredCurvature, lattice: Lattice
) -> LatticeTensor:
    """The codes of a matrix on its lattice after one pass, or after plain rounding where there is no factor."""
    column_steps = lattice.column_steps()

    def codes(rows: slice) -> Integer[Tensor, "some in"]:
        row_steps = lattice.select_rows(rows).row_steps()
        if whitened.factor is None:
            steps = torch.outer(row_steps, column_steps)
            return torch.where(steps > 0, weight[rows] / steps, 0.0).round().int()

        def grid_of(columns: Tensor, current: Tensor) -> Grid:
            return Grid(torch.outer(column_steps[columns], row_steps).T)

        return error_feedback_pass(weight[rows], whitened.rows[rows], whitened.factor, grid_of).int()

    return LatticeTensor(torch.cat([codes(rows) for rows in row_chunks(weight)]), lattice)


def lattice_descent(
    weight: Float[Tensor, "out in"],
    tensor: LatticeTensor,
    curvature: Curvature,
    rate: RateTerm | None = None,
    sweeps: int = 100,
) -> tuple[LatticeTensor, DescentResult]:
    """The codes after so many sweeps of best replies, and how those went.  ``rate``: what codes cost, if they do."""

    def settled(rows: slice) -> DescentResult:
        own = tensor.select_rows(rows)
        grid_of = _lattice_grid(own.lattice, rate)
        found = coordinate_descent(weight[rows], own.codes.float(), curvature.select_rows(rows), grid_of, sweeps)
        return dataclasses.replace(found, codes=found.codes.int())

    ended = DescentResult.concatenate([settled(rows) for rows in row_chunks(weight)])
    return LatticeTensor(ended.codes, tensor.lattice), ended


def regret_by_row(
    weight: Float[Tensor, "out in"], tensor: LatticeTensor, curvature: Curvature, rate: RateTerm | None = None
) -> Float[Tensor, " out"]:
    """What the weights of every row would still gain, in nats per token, each changing its code alone, all added up.

    Codes that pay for their length try 0, and from the one of least damage as far as a shorter code could pay.
    """

    def regret(rows: slice) -> Float[Tensor, " some"]:
        own, curved = tensor.select_rows(rows), curvature.select_rows(rows)
        error = weight[rows] - own.dequantize()
        stiffness, slope = curved.diagonal(), torch.zeros_like(error)
        if curved.inputs is not None:
            slope += curved.rows[:, None] * (error @ curved.inputs)
        if curved.lookups is not None:
            slope += curved.lookups * error
        grid = _lattice_grid(own.lattice, rate)(torch.arange(weight.shape[1]), error)
        slope, stiffness = slope * grid.step, stiffness * grid.step.square()
        nearest = (slope / stiffness.clamp(min=TINY)).round()
        gains = torch.zeros_like(slope)

        def consider(move: Tensor) -> None:
            gain = move * (slope - stiffness * move / 2)
            if rate is not None:
                gain += grid.length(own.codes) - grid.length(own.codes + move.int())
            torch.maximum(gains, gain, out=gains)

        consider(nearest)
        if rate is not None:
            for move in (-own.codes.float(), *(nearest + jump for jump in FAR)):
                consider(move)
            shorter = grid.length((own.codes + nearest).int()) - rate.price * rate.tables.bits().min()
            for far in range(max(FAR) + 1, int(own.codes.abs().max()) + 1):
                rise = stiffness * (far * (far - 1) / 2)  # at least, from the code of least damage
                if not ((rise > 0) & (rise < shorter)).any():
                    break
                consider(nearest - far)
                consider(nearest + far)
        return gains.double().sum(1)

    return torch.cat([regret(rows) for rows in row_chunks(weight)])


def _lattice_grid(lattice: Lattice, rate: RateTerm | None) -> GridFactory:
    row_steps, column_steps = lattice.row_steps(), lattice.column_steps()
    price = None if rate is None else torch.from_numpy(rate.tables.bits() * rate.price).float()

    def grid_of(columns: Tensor, current: Tensor) -> Grid:
        step = torch.outer(row_steps, column_steps[columns])
        if price is None:
            return Grid(step)
        table, shift = table_and_shift(lattice.levels(columns))
        sign = 0.0 if rate is None or not shift.any() else rate.price
        return Grid(step, price=price, table=table, shift=shift, bit=sign)

    return grid_of
