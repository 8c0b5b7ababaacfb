"""Codes of a matrix on a lattice: error feedback, coordinate descent with a rate term, and the regret that is left.

Where codes are entropy-coded, each costs its length times the price of a bit, besides its damage.  The passes and
sweeps themselves are in ``error_feedback`` and ``coordinate_descent``.
"""

import dataclasses

import torch
from jaxtyping import Float, Integer
from torch import Tensor

from nashswarm.quant.coordinate_descent import DescentResult, coordinate_descent
from nashswarm.quant.curvature import TINY, Curvature, FactoredCurvature
from nashswarm.quant.entropy import CodeTables, table_and_shift
from nashswarm.quant.error_feedback import FAR_JUMPS, Grid, GridFactory, error_feedback_pass, row_chunks
from nashswarm.quant.lattice import Lattice, LatticeTensor


@dataclasses.dataclass(frozen=True)
class RateTerm:
    """What the length of codes costs: the code tables of the model, and the price of a bit in nats per token."""

    tables: CodeTables
    price: float


def lattice_error_feedback(
    weight: Float[Tensor, "out in"], curvature: FactoredCurvature, lattice: Lattice
) -> LatticeTensor:
    """Quantize a matrix on its lattice by one pass of error feedback, or by rounding if there is no factor."""
    column_steps = lattice.column_steps()

    def quantize_rows(rows: slice) -> Integer[Tensor, "some in"]:
        row_steps = lattice.select_rows(rows).row_steps()
        if curvature.factor is None:
            steps = torch.outer(row_steps, column_steps)
            return torch.where(steps > 0, weight[rows] / steps, 0.0).round().int()

        def make_grid(columns: Tensor, corrected: Tensor) -> Grid:
            return Grid(torch.outer(column_steps[columns], row_steps).T)

        return error_feedback_pass(weight[rows], curvature.factor, make_grid).int()

    return LatticeTensor(torch.cat([quantize_rows(rows) for rows in row_chunks(weight)]), lattice)


def lattice_descent(
    weight: Float[Tensor, "out in"],
    tensor: LatticeTensor,
    curvature: Curvature,
    rate: RateTerm | None = None,
    sweeps: int = 100,
) -> tuple[LatticeTensor, DescentResult]:
    """Improve the codes of ``tensor`` by up to ``sweeps`` of coordinate descent.

    Returns the tensor with its new codes, and the progress of the descent.  ``rate`` is None if length costs nothing.
    """

    def descend(rows: slice) -> DescentResult:
        part = tensor.select_rows(rows)
        make_grid = _lattice_grid(part.lattice, rate)
        result = coordinate_descent(weight[rows], part.codes.float(), curvature.select_rows(rows), make_grid, sweeps)
        return dataclasses.replace(result, codes=result.codes.int())

    result = DescentResult.concatenate([descend(rows) for rows in row_chunks(weight)])
    return LatticeTensor(result.codes, tensor.lattice), result


def regret_by_row(
    weight: Float[Tensor, "out in"], tensor: LatticeTensor, curvature: Curvature, rate: RateTerm | None = None
) -> Float[Tensor, " out"]:
    """Compute the regret of each row: the sum of what its weights would gain, in nats per token.

    The gain of a weight is that of its best code while all others stay.  With a rate term, the codes that are tried are
    0 and all codes around the one of least damage, as far away as a shorter code could still pay for the damage.
    """

    def regret(rows: slice) -> Float[Tensor, " some"]:
        part, part_curvature = tensor.select_rows(rows), curvature.select_rows(rows)
        error = weight[rows] - part.dequantize()
        stiffness, slope = part_curvature.diagonal(), torch.zeros_like(error)
        if part_curvature.inputs is not None:
            slope += part_curvature.rows[:, None] * (error @ part_curvature.inputs)
        if part_curvature.lookups is not None:
            slope += part_curvature.lookups * error
        grid = _lattice_grid(part.lattice, rate)(torch.arange(weight.shape[1]), error)
        slope, stiffness = slope * grid.step, stiffness * grid.step.square()
        nearest = (slope / stiffness.clamp(min=TINY)).round()
        gains = torch.zeros_like(slope)

        def consider(move: Tensor) -> None:
            gain = move * (slope - stiffness * move / 2)
            if rate is not None:
                gain += grid.length_cost(part.codes) - grid.length_cost(part.codes + move.int())
            torch.maximum(gains, gain, out=gains)

        consider(nearest)
        if rate is not None:
            for move in (-part.codes.float(), *(nearest + jump for jump in FAR_JUMPS)):
                consider(move)
            cheapest = rate.price * rate.tables.bits().min()
            most_saved = grid.length_cost((part.codes + nearest).int()) - cheapest
            for distance in range(max(FAR_JUMPS) + 1, int(part.codes.abs().max()) + 1):
                least_damage = stiffness * (distance * (distance - 1) / 2)  # of this distance from the nearest code
                if not ((least_damage > 0) & (least_damage < most_saved)).any():
                    break
                consider(nearest - distance)
                consider(nearest + distance)
        return gains.double().sum(1)

    return torch.cat([regret(rows) for rows in row_chunks(weight)])


def _lattice_grid(lattice: Lattice, rate: RateTerm | None) -> GridFactory:
    """Return the function that makes the grid of some columns of a lattice."""
    row_steps, column_steps = lattice.row_steps(), lattice.column_steps()
    symbol_price = None if rate is None else torch.from_numpy(rate.tables.bits() * rate.price).float()

    def make_grid(columns: Tensor, corrected: Tensor) -> Grid:
        step = torch.outer(row_steps, column_steps[columns])
        if rate is None:
            return Grid(step)
        table, shift = table_and_shift(lattice.levels(columns))
        sign_price = rate.price if shift.any() else 0.0
        return Grid(step, symbol_price=symbol_price, table=table, shift=shift, sign_price=sign_price)

    return make_grid
