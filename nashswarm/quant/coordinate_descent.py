"""The code game of one layer: its columns are the players, their codes the actions.

All rows play for themselves; the damage of a row is ``½ (f_o e_oᵀ H e_o + Σ_j d_oj e_oj²)``, d being what a lookup of
the same matrix adds, and where codes are entropy-coded each pays its length at the price of a bit.

``feedback`` is one greedy pass: each column takes its best code and the columns after it take over its error, weighed
by H (GPTQ, Frantar et al. 2023).  It stops before equilibrium.  ``settle`` goes on: with all others fixed the cost of
column j is a parabola around ``Q_j + (f R_j + d_j E_j) / (f H_jj + d_j)``, E = W − Q, R = E H, and column after column
takes its cheapest code until nobody moves (coordinate descent, as QuantEase, Behdin et al. 2023).
"""

import dataclasses
import itertools
from collections.abc import Sequence

import torch
from jaxtyping import Float, Integer, Real
from torch import Tensor

from nashswarm.quant.curvature import DAMPING, Curvature, inverse_cholesky
from nashswarm.quant.error_feedback import BLOCK, FAR, NEAR, Grid, GridFactory, column_major, error_feedback_pass
from nashswarm.quant.grid import GRID_WIDTHS, TILE_ROWS, QuantizedTensor, Scheme, quantize


@dataclasses.dataclass(frozen=True)
class DescentResult:
    """Where best replies ended: the codes, the sweeps it took, the weights that moved in each of them and what was
    gained, in nats per token; at the equilibrium the last sweep moves nobody."""

    codes: Real[Tensor, "out in"]
    moves: list[int]
    gains: list[float]

    def prepend(self, earlier: "DescentResult | None") -> "DescentResult":
        """With the sweeps of ``earlier`` before these."""
        if earlier is None:
            return self
        return DescentResult(self.codes, earlier.moves + self.moves, earlier.gains + self.gains)

    @classmethod
    def concatenate(cls, parts: Sequence["DescentResult"]) -> "DescentResult":
        """Of all rows, where each of the ``parts`` settled some."""
        moves, gains = (
            [sum(sweep) for sweep in itertools.zip_longest(*each, fillvalue=0)]
            for each in ([part.moves for part in parts], [part.gains for part in parts])
        )
        return cls(torch.cat([part.codes for part in parts]), moves, gains)


def coordinate_descent(
    weight: Float[Tensor, "out in"],
    codes: Float[Tensor, "out in"],
    curvature: Curvature,
    grid_of: GridFactory,
    sweeps: int = 100,
    tolerance: float = 0.0,
) -> DescentResult:
    """Best replies from ``codes``, one block of columns after the other, until no weight moves, the gain of a sweep
    falls below ``tolerance`` of the damage, or ``sweeps`` are over.  No move ever raises the cost of its row.

    Codes that pay for their length try near moves first, and once nobody moves, far ones.
    """
    codes = codes.clone()
    spans = [slice(start, start + BLOCK) for start in range(0, weight.shape[1], BLOCK)]
    grids = [grid_of(torch.arange(weight.shape[1])[span], weight[:, span]) for span in spans]
    blocks = [_Block(span, grid, curvature, codes) for span, grid in zip(spans, grids, strict=True)]
    error = weight - codes * torch.cat([grid.step for grid in grids], 1)
    active = torch.arange(len(weight))
    moves: list[int] = []
    gains: list[float] = []
    while len(moves) < sweeps:
        if not len(active):
            if not any([block.look_far(codes) for block in blocks]):
                break
            active = torch.arange(len(weight))
        moved = torch.zeros(len(weight), dtype=torch.int32)
        gains.append(sum(block.settle(active, error, codes, moved) for block in blocks))
        active = active[moved[active] > 0]
        moves.append(int(moved.sum()))
        if tolerance and gains[-1] <= tolerance * float(curvature.damage_by_row(error).double().sum()):
            break
    return DescentResult(codes, moves, gains)


class _Block:
    """Some columns of a matrix whose weights reply: ``stiffness``, what a step of each costs, and ``saved``, what moves
    would save of their codes' lengths."""

    def __init__(self, span: slice, grid: Grid, curvature: Curvature, codes: Float[Tensor, "out in"]) -> None:
        self.span, self.grid, self.jumps, self.saved = span, grid, NEAR, grid.saved(codes[:, span], NEAR)
        self.rows, self.lookups = curvature.rows, None if curvature.lookups is None else curvature.lookups[:, span]
        self.inputs = None if curvature.inputs is None else curvature.inputs[:, span]
        self.near = None if self.inputs is None else self.inputs[span]
        self.stiffness = Curvature(self.rows, self.near, self.lookups).diagonal() * grid.step.square()

    def look_far(self, codes: Float[Tensor, "out in"]) -> bool:
        """Try far moves from now on; False if there are none that were not tried."""
        if self.saved is None or self.jumps == FAR:
            return False
        self.jumps, self.saved = FAR, self.grid.saved(codes[:, self.span], FAR)
        return True

    def settle(
        self,
        rows: Integer[Tensor, " some"],
        error: Float[Tensor, "out in"],
        codes: Float[Tensor, "out in"],
        moved: Integer[Tensor, " out"],
    ) -> float:
        """What these ``rows`` gain here, each moving its best weight again and again until it has none; ``error``,
        ``codes`` and the count of moves change in place."""
        first, gained = self.span.start, 0.0
        pull = None if self.inputs is None else error[rows] @ self.inputs
        while len(rows):
            step, stiffness = self.grid.step[rows], self.stiffness[rows]
            slope = torch.zeros_like(step) if pull is None else self.rows[rows, None] * pull
            if self.lookups is not None:
                slope += self.lookups[rows] * error[rows, self.span]
            saved = None if self.saved is None else self.saved[:, rows]
            move, gain = self.grid.moves(codes[rows, self.span], slope.mul_(step), stiffness, saved, self.jumps, rows)
            most, column = torch.where(gain > 1e-5 * stiffness, gain, 0.0).max(1)  # beyond what float32 can tell
            (better,) = most.nonzero(as_tuple=True)
            rows, column = rows[better], column[better]
            move = move[better, column]
            change = move * step[better, column]
            codes[rows, first + column] += move
            error[rows, first + column] -= change
            if pull is not None and self.near is not None:
                pull = pull[better].sub_(change[:, None] * self.near[column])
            renewed = self.grid.saved(codes[rows, first + column], self.jumps, (rows, column))
            if self.saved is not None and renewed is not None:
                self.saved[:, rows, column] = renewed
            moved[rows] += 1
            gained += float(most.double().sum())
        return gained


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
    """Codes, scales and zero points of least damage found, each tile at its width: one pass and so many ``sweeps``.

    A group's grids are chosen when its turn comes, from the weights as they have become; with ``act_order`` the columns
    come in the order of their inputs, largest first, on plain rounding's grids.  A row keeps the pass only where its
    damage is less than plain rounding's.  Float tiles, and matrices that are only looked up, have no columns to
    compensate and are rounded plainly.  ``factor``: ``inverse_cholesky`` of the damped H if known.
    """
    diagonal = curvature.diagonal()
    plain = quantize(weight, bits, scheme, diagonal)
    if curvature.inputs is None or not set(plain.bits.unique().tolist()) <= {0, *GRID_WIDTHS}:
        return plain
    rows = curvature.rows
    if factor is None or act_order:
        rows, inputs = curvature.damped(damping).mean_row_curvature()
    if act_order:
        order = inputs.diagonal().argsort(descending=True, stable=True)
        steps = error_feedback_pass(
            weight,
            rows,
            inverse_cholesky(inputs[order][:, order]),
            lambda now, _: _affine_grid(plain, now),
            order=order,
        )
        passed = dataclasses.replace(plain, codes=_stored(steps, plain.zero_point, scheme))
    else:
        chosen: list[QuantizedTensor] = []

        def open_group(columns: Tensor, current: Tensor) -> Grid:
            group = int(columns[0]) // scheme.group_size
            chosen.append(quantize(current, plain.bits[:, group : group + 1], scheme, diagonal[:, columns]))
            return _affine_grid(chosen[-1])

        factor = inverse_cholesky(inputs) if factor is None else factor
        steps = error_feedback_pass(weight, rows, factor, open_group, scheme.group_size)
        scale, zero_point = (torch.cat([getattr(part, name) for part in chosen], 1) for name in ("scale", "zero_point"))
        passed = QuantizedTensor(_stored(steps, zero_point, scheme), scale, zero_point, plain.bits, scheme)
    better = curvature.damage_by_row(weight - passed.dequantize()) < curvature.damage_by_row(
        weight - plain.dequantize()
    )
    won = better.unsqueeze(1)
    kept = dataclasses.replace(
        plain,
        codes=torch.where(won, passed.codes, plain.codes),
        scale=torch.where(won, passed.scale, plain.scale),
        zero_point=torch.where(won, passed.zero_point, plain.zero_point),
    )
    if not sweeps:
        return kept
    spread = kept.zero_point.repeat_interleave(scheme.group_size, 1)

    def grid_of(columns: Tensor, current: Tensor) -> Grid:
        return _affine_grid(kept, columns)

    settled = coordinate_descent(
        weight, kept.codes.float() - spread, curvature.damped(damping), grid_of, sweeps, tolerance
    )
    return dataclasses.replace(kept, codes=_stored(settled.codes, kept.zero_point, scheme))


def _affine_grid(tensor: QuantizedTensor, columns: Tensor | None = None) -> Grid:
    """The grid of these columns; codes are counted from the zero point."""
    size = tensor.scheme.group_size
    groups = torch.arange(len(tensor.scale[0])).repeat_interleave(size) if columns is None else columns // size
    levels = ((1 << tensor.bits.int()) - 1).repeat_interleave(TILE_ROWS, 0)[: len(tensor.scale)]
    zero = tensor.zero_point[:, groups].float()
    step, low, high = map(column_major, (tensor.scale[:, groups].float(), -zero, levels[:, groups] - zero))
    return Grid(step, low, high)


def _stored(steps: Float[Tensor, "out in"], zero_point: Tensor, scheme: Scheme) -> Integer[Tensor, "out in"]:
    return (steps + zero_point.repeat_interleave(scheme.group_size, 1)).to(torch.uint8)
