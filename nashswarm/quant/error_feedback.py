"""One pass of error feedback over the columns of a matrix (GPTQ, Frantar et al. 2023), and the grids it rounds to."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Float, Integer
from torch import Tensor

from nashswarm.quant.curvature import TINY
from nashswarm.quant.grid import TILE_ROWS

BLOCK = 128  # columns replied to between two matrix products
CHUNK_WEIGHTS = 1 << 22  # weights that reply together: memory is for the model
NEAR: Sequence[int] = (1, -1)
FAR: Sequence[int] = (1, -1, 2, -2)  # by what codes that pay for their length try to move, or to 0
ALL = slice(None)


@dataclasses.dataclass(frozen=True)
class Grid:
    """Where the weights of some columns may lie: at ``step · code`` for whole codes from ``low`` to ``high``.

    ``price``: nats per token of every magnitude's code in every table, with the table and the shift of every weight;
    None where codes are not entropy-coded.  ``bit``: of the sign that a magnitude has although its symbol is 0.
    """

    step: Float[Tensor, "out columns"]
    low: Float[Tensor, "out columns"] | None = None
    high: Float[Tensor, "out columns"] | None = None
    price: Float[Tensor, "tables symbols"] | None = None
    table: Integer[Tensor, "out columns"] | None = None
    shift: Integer[Tensor, "out columns"] | None = None
    bit: float = 0.0

    def nearest(self, column: int, target: Float[Tensor, " out"]) -> Float[Tensor, " out"]:
        """The codes of a column nearest to ``target``."""
        step = self.step[:, column]
        found = torch.where(step > 0, target / step, 0.0).round()
        if self.low is not None and self.high is not None:
            found = found.clamp(self.low[:, column], self.high[:, column])
        return found

    def length(
        self, codes: Integer[Tensor, "*chosen"], chosen: tuple[Any, ...] = (ALL, ALL)
    ) -> Float[Tensor, "*chosen"]:
        """What the length of these codes costs, in nats per token, but for bits that are stored whatever the code."""
        assert self.price is not None and self.table is not None and self.shift is not None
        magnitudes, symbols = codes.abs(), self.price.shape[1]
        found = (magnitudes >> self.shift[chosen]).clamp_(max=symbols - 1)
        price = self.price.take((self.table[chosen] * symbols + found).long())
        return price + self.bit * ((magnitudes > 0) & (found == 0)) if self.bit else price

    def saved(
        self, codes: Float[Tensor, "*chosen"], jumps: Sequence[int], chosen: tuple[Any, ...] = (ALL, ALL)
    ) -> Float[Tensor, "moves *chosen"] | None:
        """What these codes save on their length, in nats per token, by being 0 and by each of the ``jumps``."""
        if self.price is None:
            return None
        whole = codes.int()
        own, ends = self.length(whole, chosen), [torch.zeros_like(whole), *(whole + jump for jump in jumps)]
        return torch.stack([own - self.length(end, chosen) for end in ends])

    def moves(
        self,
        codes: Float[Tensor, "some columns"],
        slope: Float[Tensor, "some columns"],
        stiffness: Float[Tensor, "some columns"],
        saved: Float[Tensor, "moves some columns"] | None,
        jumps: Sequence[int],
        rows: Integer[Tensor, " some"],
    ) -> tuple[Float[Tensor, "some columns"], Float[Tensor, "some columns"]]:
        """How far the code of every weight of these rows should move, if it alone moved, and what that would gain.

        ``slope``: how fast damage falls with the code; ``stiffness``: how fast that ends.  A code that pays for its
        length moves by one of the ``jumps``, or to 0.
        """
        if saved is None:
            move = (slope / stiffness.clamp(min=TINY)).round_()
            if self.low is not None and self.high is not None:
                move = (codes + move).clamp_(self.low[rows], self.high[rows]).sub_(codes)
            return move, move * (slope - stiffness * move / 2)
        half = stiffness / 2
        move, gain = -codes, saved[0] - codes * (slope + half * codes)
        for jump, saving in zip(jumps, saved[1:], strict=True):
            other = saving + jump * slope - jump**2 * half
            move = torch.where(other > gain, float(jump), move)
            gain = torch.maximum(other, gain)
        return move, gain


GridFactory = Callable[[Tensor, Float[Tensor, "out columns"]], Grid]  # of columns, by number, and their weights by now


def row_chunks(matrix: Float[Tensor, "out in"]) -> list[slice]:
    """Split the rows of a matrix into slices of about ``CHUNK_WEIGHTS`` weights, in whole row blocks."""
    size = max(CHUNK_WEIGHTS // matrix.shape[1] // TILE_ROWS, 1) * TILE_ROWS
    return [slice(start, start + size) for start in range(0, len(matrix), size)]


def error_feedback_pass(
    weight: Float[Tensor, "out in"],
    rows: Float[Tensor, " out"],
    factor: Float[Tensor, "in in"],
    grid_of: GridFactory,
    block: int = BLOCK,
    order: Integer[Tensor, " in"] | None = None,
) -> Float[Tensor, "out in"]:
    """One pass over the columns in ``order``: their codes.  ``factor``: ``inverse_cholesky`` of H in that order."""
    order = torch.arange(weight.shape[1]) if order is None else order
    current = column_major(weight[:, order])
    codes = torch.empty_like(current)
    for start in range(0, weight.shape[1], block):
        columns = slice(start, start + block)
        own = factor[columns, columns]
        now = current[:, columns].clone()
        grid = grid_of(order[columns], now)
        errors = torch.empty_like(now)
        for column in range(now.shape[1]):
            code = grid.nearest(column, now[:, column])
            error = (now[:, column] - code * grid.step[:, column]) / own[column, column]
            now[:, column + 1 :].addr_(error, own[column, column + 1 :], alpha=-1)
            codes[:, order[start + column]], errors[:, column] = code, error
        current[:, columns.stop :].addmm_(errors, factor[columns, columns.stop :], alpha=-1)
    return codes


def column_major(matrix: Tensor) -> Tensor:
    """The same matrix with its columns contiguous in memory, as one column after the other is worked on."""
    return matrix.T.contiguous().T
