"""One pass of error feedback over the columns of a matrix (GPTQ, Frantar et al. 2023), and the grids it rounds to."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Float, Integer
from torch import Tensor

from nashswarm.quant.curvature import TINY
from nashswarm.quant.grid import TILE_ROWS

BLOCK_COLUMNS = 128  # columns quantized between two matrix products
CHUNK_WEIGHTS = 1 << 22  # weights in work at a time: bounds the memory of temporaries
NEAR_JUMPS: Sequence[int] = (1, -1)
FAR_JUMPS: Sequence[int] = (1, -1, 2, -2)  # changes tried for an entropy-coded code, besides a change to 0
ALL = slice(None)


@dataclasses.dataclass(frozen=True)
class Grid:
    """The values that the weights of some columns may take: ``step · code`` for integer codes.

    ``low`` and ``high`` are the least and the largest code of each weight, or None if codes are unbounded.  For
    entropy-coded codes, ``symbol_price`` is the cost of every symbol in every table (nats per token), ``table`` and
    ``shift`` are the table and the shift of each weight (see ``entropy.table_and_shift``), and ``sign_price`` is the
    cost of a sign bit whose symbol is 0.  ``symbol_price`` is None if the length of codes costs nothing.
    """

    step: Float[Tensor, "out columns"]
    low: Float[Tensor, "out columns"] | None = None
    high: Float[Tensor, "out columns"] | None = None
    symbol_price: Float[Tensor, "tables symbols"] | None = None
    table: Integer[Tensor, "out columns"] | None = None
    shift: Integer[Tensor, "out columns"] | None = None
    sign_price: float = 0.0

    def nearest(self, column: int, target: Float[Tensor, " out"]) -> Float[Tensor, " out"]:
        """Round ``target`` to the nearest codes of one column."""
        step = self.step[:, column]
        codes = torch.where(step > 0, target / step, 0.0).round()
        if self.low is not None and self.high is not None:
            codes = codes.clamp(self.low[:, column], self.high[:, column])
        return codes

    def length_cost(
        self, codes: Integer[Tensor, "*chosen"], chosen: tuple[Any, ...] = (ALL, ALL)
    ) -> Float[Tensor, "*chosen"]:
        """Return what the length of each code costs, in nats per token.

        ``chosen`` indexes the weights that the codes belong to.  Low bits that are stored whatever the code are left
        out: they cancel in every comparison.
        """
        assert self.symbol_price is not None and self.table is not None and self.shift is not None
        magnitudes, symbol_count = codes.abs(), self.symbol_price.shape[1]
        symbols = (magnitudes >> self.shift[chosen]).clamp_(max=symbol_count - 1)
        cost = self.symbol_price.take((self.table[chosen] * symbol_count + symbols).long())
        return cost + self.sign_price * ((magnitudes > 0) & (symbols == 0)) if self.sign_price else cost

    def length_savings(
        self, codes: Float[Tensor, "*chosen"], jumps: Sequence[int], chosen: tuple[Any, ...] = (ALL, ALL)
    ) -> Float[Tensor, "moves *chosen"] | None:
        """Return what each code saves on its length by becoming 0 and by each of the ``jumps``, in nats per token.

        The first entry along ``moves`` is the change to 0.  Returns None if length costs nothing.
        """
        if self.symbol_price is None:
            return None
        codes = codes.int()
        cost, targets = self.length_cost(codes, chosen), [torch.zeros_like(codes), *(codes + jump for jump in jumps)]
        return torch.stack([cost - self.length_cost(target, chosen) for target in targets])

    def best_moves(
        self,
        codes: Float[Tensor, "some columns"],
        slope: Float[Tensor, "some columns"],
        stiffness: Float[Tensor, "some columns"],
        savings: Float[Tensor, "moves some columns"] | None,
        jumps: Sequence[int],
        rows: Integer[Tensor, " some"],
    ) -> tuple[Float[Tensor, "some columns"], Float[Tensor, "some columns"]]:
        """Return the best change of each code if all other weights stay, and the cost it saves (nats per token).

        A change of m codes lowers the damage by ``m · slope − m² · stiffness / 2``.  Codes without a length cost jump
        to the minimum of that parabola within ``low`` and ``high``; others try 0 and each of the ``jumps``, with
        ``savings`` from ``length_savings``.  ``rows`` are the rows of the grid that the arguments belong to.
        """
        if savings is None:
            move = (slope / stiffness.clamp(min=TINY)).round_()
            if self.low is not None and self.high is not None:
                move = (codes + move).clamp_(self.low[rows], self.high[rows]).sub_(codes)
            return move, move * (slope - stiffness * move / 2)
        half = stiffness / 2
        move, gain = -codes, savings[0] - codes * (slope + half * codes)
        for jump, saving in zip(jumps, savings[1:], strict=True):
            jump_gain = saving + jump * slope - jump**2 * half
            move = torch.where(jump_gain > gain, float(jump), move)
            gain = torch.maximum(jump_gain, gain)
        return move, gain


GridFactory = Callable[[Tensor, Float[Tensor, "out columns"]], Grid]  # (column indices, their current weights) → grid


def row_chunks(matrix: Float[Tensor, "out in"]) -> list[slice]:
    """Split the rows of a matrix into slices of at most ``CHUNK_WEIGHTS`` weights each, in whole row blocks.

    Rows are quantized independently, so working on one slice at a time changes no code and bounds the memory.
    """
    size = max(CHUNK_WEIGHTS // matrix.shape[1] // TILE_ROWS, 1) * TILE_ROWS
    return [slice(start, start + size) for start in range(0, len(matrix), size)]


def error_feedback_pass(
    weight: Float[Tensor, "out in"],
    factor: Float[Tensor, "in in"],
    make_grid: GridFactory,
    block: int = BLOCK_COLUMNS,
    order: Integer[Tensor, " in"] | None = None,
) -> Float[Tensor, "out in"]:
    """Quantize the columns one after another, each absorbing the errors of those before it; return the codes.

    The error of column j is added to the later columns in the proportion that minimises the damage, as in GPTQ.
    ``factor`` is ``inverse_cholesky(H)``, with the columns of H in ``order`` (default: as stored).  ``make_grid`` is
    called once per ``block`` of columns with their indices and their weights after all earlier corrections.
    """
    order = torch.arange(weight.shape[1]) if order is None else order
    corrected = column_major(weight[:, order])
    codes = torch.empty_like(corrected)
    for start in range(0, weight.shape[1], block):
        columns = slice(start, start + block)
        block_factor = factor[columns, columns]
        block_weight = corrected[:, columns].clone()
        grid = make_grid(order[columns], block_weight)
        errors = torch.empty_like(block_weight)
        for column in range(block_weight.shape[1]):
            code = grid.nearest(column, block_weight[:, column])
            error = (block_weight[:, column] - code * grid.step[:, column]) / block_factor[column, column]
            block_weight[:, column + 1 :].addr_(error, block_factor[column, column + 1 :], alpha=-1)
            codes[:, order[start + column]], errors[:, column] = code, error
        corrected[:, columns.stop :].addmm_(errors, factor[columns, columns.stop :], alpha=-1)
    return codes


def column_major(matrix: Tensor) -> Tensor:
    """Return the matrix with each column contiguous in memory, which is how the pass walks through it."""
    return matrix.T.contiguous().T
