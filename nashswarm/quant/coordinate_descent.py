"""Coordinate descent over the codes of a layer, starting from a pass of error feedback.

Rows are independent.  The damage of row o is ``½ (f_o e_oᵀ H e_o + Σ_j d_oj e_oj²)`` (see ``curvature``); where codes
are entropy-coded, each adds the price of its length.

``error_feedback_pass`` is greedy: each column takes its nearest code, and later columns compensate for its error (GPTQ,
Frantar et al. 2023).  ``coordinate_descent`` continues from there (as QuantEase, Behdin et al. 2023).  If all other
weights stay, the damage is a parabola in the quantized weight Q_j, with its minimum at
``Q_j + (f R_j + d_j E_j) / (f H_jj + d_j)``, where E = W − Q and R = E H.  Weights move to their cheapest code until
none gains by moving.  In terms of games, weights are players and the result is a Nash equilibrium.
"""

import dataclasses
import itertools
from collections.abc import Sequence

import torch
from jaxtyping import Float, Integer, Real
from torch import Tensor

from nashswarm.quant.curvature import DAMPING, Curvature, inverse_cholesky
from nashswarm.quant.error_feedback import (
    BLOCK_COLUMNS,
    FAR_JUMPS,
    NEAR_JUMPS,
    Grid,
    GridFactory,
    column_major,
    error_feedback_pass,
)
from nashswarm.quant.grid import GRID_WIDTHS, TILE_ROWS, QuantizedTensor, Scheme, quantize

SMALLEST_GAIN = 1e-5  # of a move, as a share of the stiffness: below, float32 cannot tell gains from rounding


@dataclasses.dataclass(frozen=True)
class DescentResult:
    """The codes at which coordinate descent ended, and its progress.

    ``moves`` counts the moves of each sweep, and ``gains`` is the cost they saved, in nats per token.  If the last
    sweep has no moves, no weight gains by changing its code alone.
    """

    codes: Real[Tensor, "out in"]
    moves: list[int]
    gains: list[float]

    def prepend(self, earlier: "DescentResult | None") -> "DescentResult":
        """Return this result with the sweeps of an ``earlier`` descent before its own."""
        if earlier is None:
            return self
        return DescentResult(self.codes, earlier.moves + self.moves, earlier.gains + self.gains)

    @classmethod
    def concatenate(cls, parts: Sequence["DescentResult"]) -> "DescentResult":
        """Concatenate the results of disjoint sets of rows, adding up the moves and gains of each sweep."""
        moves, gains = (
            [sum(sweep) for sweep in itertools.zip_longest(*sweeps, fillvalue=0)]
            for sweeps in ([part.moves for part in parts], [part.gains for part in parts])
        )
        return cls(torch.cat([part.codes for part in parts]), moves, gains)


def coordinate_descent(
    weight: Float[Tensor, "out in"],
    codes: Float[Tensor, "out in"],
    curvature: Curvature,
    make_grid: GridFactory,
    sweeps: int = 100,
    tolerance: float = 0.0,
) -> DescentResult:
    """Improve ``codes`` one weight at a time, block of columns after block of columns.

    Stops when no weight moves, when a sweep gains no more than ``tolerance`` times the damage, or after ``sweeps``
    sweeps.  No move raises the cost of its row.  Entropy-coded codes try near jumps first, and far jumps once no near
    jump helps.
    """
    codes = codes.clone()
    spans = [slice(start, start + BLOCK_COLUMNS) for start in range(0, weight.shape[1], BLOCK_COLUMNS)]
    grids = [make_grid(torch.arange(weight.shape[1])[span], weight[:, span]) for span in spans]
    blocks = [_ColumnBlock(span, grid, curvature, codes) for span, grid in zip(spans, grids, strict=True)]
    error = weight - codes * torch.cat([grid.step for grid in grids], 1)
    active = torch.arange(len(weight))
    moves: list[int] = []
    gains: list[float] = []
    while len(moves) < sweeps:
        if not len(active):
            if not any([block.allow_far_jumps(codes) for block in blocks]):  # a list, so that every block switches
                break
            active = torch.arange(len(weight))
        row_moves = torch.zeros(len(weight), dtype=torch.int32)
        gains.append(sum(block.descend(active, error, codes, row_moves) for block in blocks))
        active = active[row_moves[active] > 0]
        moves.append(int(row_moves.sum()))
        if tolerance and gains[-1] <= tolerance * float(curvature.damage_by_row(error).double().sum()):
            break
    return DescentResult(codes, moves, gains)


class _ColumnBlock:
    """A block of columns whose weights move.

    ``stiffness`` is the second derivative of the damage in each code; ``savings`` is what moves would save on the
    length of codes (see ``Grid.length_savings``).
    """

    def __init__(self, span: slice, grid: Grid, curvature: Curvature, codes: Float[Tensor, "out in"]) -> None:
        self.span, self.grid, self.jumps = span, grid, NEAR_JUMPS
        self.savings = grid.length_savings(codes[:, span], NEAR_JUMPS)
        self.rows, self.lookups = curvature.rows, None if curvature.lookups is None else curvature.lookups[:, span]
        self.inputs = None if curvature.inputs is None else curvature.inputs[:, span]
        self.block_inputs = None if self.inputs is None else self.inputs[span]
        self.stiffness = Curvature(self.rows, self.block_inputs, self.lookups).diagonal() * grid.step.square()

    def allow_far_jumps(self, codes: Float[Tensor, "out in"]) -> bool:
        """Try far jumps from now on; return False if they are tried already or codes have no length cost."""
        if self.savings is None or self.jumps == FAR_JUMPS:
            return False
        self.jumps, self.savings = FAR_JUMPS, self.grid.length_savings(codes[:, self.span], FAR_JUMPS)
        return True

    def descend(
        self,
        rows: Integer[Tensor, " some"],
        error: Float[Tensor, "out in"],
        codes: Float[Tensor, "out in"],
        row_moves: Integer[Tensor, " out"],
    ) -> float:
        """Move the best weight of each of these rows, repeatedly, until none gains; return the total gain.

        ``error``, ``codes`` and ``row_moves`` (the number of moves of each row) are updated in place.
        """
        first, total_gain = self.span.start, 0.0
        gradient = None if self.inputs is None else error[rows] @ self.inputs
        while len(rows):
            step, stiffness = self.grid.step[rows], self.stiffness[rows]
            slope = torch.zeros_like(step) if gradient is None else self.rows[rows, None] * gradient
            if self.lookups is not None:
                slope += self.lookups[rows] * error[rows, self.span]
            savings = None if self.savings is None else self.savings[:, rows]
            block_codes = codes[rows, self.span]
            move, gain = self.grid.best_moves(block_codes, slope.mul_(step), stiffness, savings, self.jumps, rows)
            best_gain, column = torch.where(gain > SMALLEST_GAIN * stiffness, gain, 0.0).max(1)
            (better,) = best_gain.nonzero(as_tuple=True)
            rows, column = rows[better], column[better]
            move = move[better, column]
            change = move * step[better, column]
            codes[rows, first + column] += move
            error[rows, first + column] -= change
            if gradient is not None and self.block_inputs is not None:
                gradient = gradient[better].sub_(change[:, None] * self.block_inputs[column])
            new_savings = self.grid.length_savings(codes[rows, first + column], self.jumps, (rows, column))
            if self.savings is not None and new_savings is not None:
                self.savings[:, rows, column] = new_savings
            row_moves[rows] += 1
            total_gain += float(best_gain.double().sum())
        return total_gain


def quantize_layer(
    weight: Float[Tensor, "out in"],
    bits: int | Integer[Tensor, "row_blocks groups"],
    scheme: Scheme,
    curvature: Curvature,
    sweeps: int = 0,
    damping: float = DAMPING,
    act_order: bool = False,
    tolerance: float = 0.0,
    factor: Float[Tensor, "in in"] | None = None,
) -> QuantizedTensor:
    """Quantize a matrix, each tile at its width, by one pass of error feedback and ``sweeps`` of coordinate descent.

    The grids of a group are chosen when the pass reaches it, from its corrected weights.  With ``act_order`` the
    columns are taken in descending order of the diagonal of H, on the grids of plain rounding.  A row keeps the result
    of the pass only if its damage is below that of plain rounding.  Matrices that are only looked up, or have float
    tiles, are rounded plainly.  ``tolerance`` is that of ``coordinate_descent``.  ``factor`` is ``inverse_cholesky`` of
    the damped H, if it is known already.
    """
    diagonal = curvature.diagonal()
    plain = quantize(weight, bits, scheme, diagonal)
    if curvature.inputs is None or not set(plain.bits.unique().tolist()) <= {0, *GRID_WIDTHS}:
        return plain
    if factor is None or act_order:
        _, inputs = curvature.damped(damping).mean_row_curvature()
    if act_order:
        order = inputs.diagonal().argsort(descending=True, stable=True)
        steps = error_feedback_pass(
            weight,
            inverse_cholesky(inputs[order][:, order]),
            lambda columns, _: _affine_grid(plain, columns),
            order=order,
        )
        feedback = dataclasses.replace(plain, codes=_to_codes(steps, plain.zero_point, scheme))
    else:
        groups: list[QuantizedTensor] = []

        def make_group_grid(columns: Tensor, corrected: Tensor) -> Grid:
            group = int(columns[0]) // scheme.group_size
            groups.append(quantize(corrected, plain.bits[:, group : group + 1], scheme, diagonal[:, columns]))
            return _affine_grid(groups[-1])

        factor = inverse_cholesky(inputs) if factor is None else factor
        steps = error_feedback_pass(weight, factor, make_group_grid, scheme.group_size)
        scale, zero_point = (torch.cat([getattr(part, name) for part in groups], 1) for name in ("scale", "zero_point"))
        feedback = QuantizedTensor(_to_codes(steps, zero_point, scheme), scale, zero_point, plain.bits, scheme)
    better = curvature.damage_by_row(weight - feedback.dequantize()) < curvature.damage_by_row(
        weight - plain.dequantize()
    )
    better = better.unsqueeze(1)
    tensor = dataclasses.replace(
        plain,
        codes=torch.where(better, feedback.codes, plain.codes),
        scale=torch.where(better, feedback.scale, plain.scale),
        zero_point=torch.where(better, feedback.zero_point, plain.zero_point),
    )
    if not sweeps:
        return tensor
    zero = tensor.zero_point.repeat_interleave(scheme.group_size, 1)

    def make_grid(columns: Tensor, corrected: Tensor) -> Grid:
        return _affine_grid(tensor, columns)

    result = coordinate_descent(
        weight, tensor.codes.float() - zero, curvature.damped(damping), make_grid, sweeps, tolerance
    )
    return dataclasses.replace(tensor, codes=_to_codes(result.codes, tensor.zero_point, scheme))


def _affine_grid(tensor: QuantizedTensor, columns: Tensor | None = None) -> Grid:
    """Return the grid of some columns (None: of all), with codes counted from the zero point."""
    size = tensor.scheme.group_size
    groups = torch.arange(len(tensor.scale[0])).repeat_interleave(size) if columns is None else columns // size
    levels = ((1 << tensor.bits.int()) - 1).repeat_interleave(TILE_ROWS, 0)[: len(tensor.scale)]
    zero = tensor.zero_point[:, groups].float()
    step, low, high = map(column_major, (tensor.scale[:, groups].float(), -zero, levels[:, groups] - zero))
    return Grid(step, low, high)


def _to_codes(steps: Float[Tensor, "out in"], zero_point: Tensor, scheme: Scheme) -> Integer[Tensor, "out in"]:
    """Return the stored codes of values that are counted in steps from the zero point."""
    return (steps + zero_point.repeat_interleave(scheme.group_size, 1)).to(torch.uint8)
