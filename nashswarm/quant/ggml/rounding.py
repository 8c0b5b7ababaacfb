"""Round a matrix into a type of ggml: error feedback along the columns, then descent over codes, steps and shifts.

Scales are chosen block by block, from weights that have absorbed the errors of the columns before (GPTQ, Frantar et
al. 2023).  The descent then takes the groups in turn.  With everything else as it is, the damage of a row is a
parabola in each code, each step and each shift: the allowed value nearest to its minimum is the best one.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from nashswarm.quant.curvature import TINY, Curvature, FactoredCurvature
from nashswarm.quant.error_feedback import CHUNK_WEIGHTS
from nashswarm.quant.ggml.scales import choose_scales, nearest_codes, set_shifts, set_steps
from nashswarm.quant.ggml.types import BlockMatrix, BlockType, Scales, combine


def round_matrix(
    kind: BlockType, weight: Float[Tensor, "rows columns"], factored: FactoredCurvature, sweeps: int
) -> BlockMatrix:
    """Return the matrix in a type: by error feedback and ``sweeps`` of descent, or rounded if it is only looked up."""
    size = max(CHUNK_WEIGHTS // weight.shape[1], 1)  # rows are independent: a few at a time bound the memory
    parts = []
    for first in range(0, len(weight), size):
        rows = slice(first, first + size)
        curvature = factored.curvature.select_rows(rows)
        if factored.factor is None:
            parts.append(round_plainly(kind, weight[rows], curvature.diagonal()))
            continue
        matrix = error_feedback(kind, weight[rows], factored.factor, factored.columns)
        for _ in range(sweeps):
            matrix = descend(matrix, weight[rows], curvature)
        parts.append(matrix)
    return BlockMatrix(torch.cat([part.codes for part in parts]), combine([part.scales for part in parts], torch.cat))


def round_plainly(
    kind: BlockType, weight: Float[Tensor, "rows columns"], importance: Float[Tensor, "#rows columns"]
) -> BlockMatrix:
    """Round every weight to the nearest value, at the scales of least error, each square times its ``importance``."""
    scales, groups = choose_scales(kind, weight, importance), weight.unflatten(1, (-1, kind.group))
    codes = nearest_codes(kind, groups, scales.steps()[..., None], scales.shifts()[..., None])
    return BlockMatrix(codes.flatten(1).to(torch.uint8), scales)


def error_feedback(
    kind: BlockType,
    weight: Float[Tensor, "rows columns"],
    factor: Float[Tensor, "columns columns"],
    importance: Float[Tensor, " columns"],
) -> BlockMatrix:
    """Quantize the columns one after another, each absorbing the errors of those before it.

    ``factor`` is ``inverse_cholesky(H)``; ``importance`` weighs the columns when scales are chosen.
    """
    corrected = weight.T.clone(memory_format=torch.contiguous_format)  # columns are contiguous
    codes = torch.empty_like(corrected, dtype=torch.uint8)
    scales: list[Scales] = []
    for start in range(0, len(corrected), kind.block):
        span = slice(start, start + kind.block)
        own, block_factor = corrected[span], factor[span, span]
        scales.append(choose_scales(kind, own.T.contiguous(), importance[None, span]))
        steps, shifts = scales[-1].steps().T.contiguous(), scales[-1].shifts().T.contiguous()
        errors = torch.empty_like(own)
        for column in range(len(own)):
            step, shift = steps[column // kind.group], shifts[column // kind.group]
            code = nearest_codes(kind, own[column], step, shift)
            errors[column] = (own[column] - (kind.level(code) * step + shift)) / block_factor[column, column]
            own[column + 1 :].addr_(block_factor[column, column + 1 :], errors[column], alpha=-1)
            codes[start + column] = code
        corrected[span.stop :].addmm_(factor[span, span.stop :].T, errors, alpha=-1)
    return BlockMatrix(codes.T.contiguous(), combine(scales, torch.hstack))


def descend(matrix: BlockMatrix, weight: Float[Tensor, "rows columns"], curvature: Curvature) -> BlockMatrix:
    """Improve steps, shifts and codes once, group after group; no move raises the damage of its row."""
    kind, scales = matrix.scales.kind, matrix.scales.map(torch.clone)
    codes, error = matrix.codes.clone(), weight - matrix.dequantize()
    for group in range(weight.shape[1] // kind.group):
        span, own = slice(group * kind.group, (group + 1) * kind.group), scales.group(group)
        window, levels = _Window(error, curvature, span), kind.level(codes[:, span])
        before = own.steps()
        set_steps(own, before + window.best_amount(levels))
        window.move(own.steps() - before, levels)
        if kind.shifted:
            before, ones = own.shifts(), torch.ones_like(levels)
            set_shifts(own, before + window.best_amount(ones))
            window.move(own.shifts() - before, ones)
        step, shift = own.steps()[:, 0], own.shifts()[:, 0]
        for column in range(kind.group):
            value = levels[:, column] * step + shift
            code = nearest_codes(kind, value + window.best_change(column), step, shift)
            window.change(column, kind.level(code) * step + shift - value)
            codes[:, span.start + column] = code
    return BlockMatrix(codes, scales)


class _Window:
    """Some columns of a matrix whose values move, and the slope of the damage in each of them.

    With E the error of a row, adding ``m · u`` to its values lowers the damage by ``m · slope − m² · stiffness / 2``,
    where ``slope = u (f H + d) E`` and ``stiffness = u (f H + d) u`` (see ``Curvature``).  ``error`` is updated.
    """

    def __init__(self, error: Float[Tensor, "rows columns"], curvature: Curvature, span: slice) -> None:
        assert curvature.inputs is not None
        self.error, self.rows, self.inputs = error[:, span], curvature.rows, curvature.inputs[span, span]
        self.lookups = None if curvature.lookups is None else curvature.lookups[:, span]
        self.slope = self.rows[:, None] * (error @ curvature.inputs[:, span])
        if self.lookups is not None:
            self.slope += self.lookups * self.error

    def best_amount(self, along: Float[Tensor, "rows span"]) -> Float[Tensor, "rows 1"]:
        """Return how far the values of each row had best move along a direction."""
        return _ratio((self.slope * along).sum(1, keepdim=True), (self._pushed(along) * along).sum(1, keepdim=True))

    def move(self, amount: Float[Tensor, "rows 1"], along: Float[Tensor, "rows span"]) -> None:
        """Move the values of each row along a direction."""
        self.slope -= amount * self._pushed(along)
        self.error -= amount * along

    def best_change(self, column: int) -> Float[Tensor, " rows"]:
        """Return the best change of the values of one column."""
        stiffness = self.rows * self.inputs[column, column]
        return _ratio(self.slope[:, column], stiffness if self.lookups is None else stiffness + self.lookups[:, column])

    def change(self, column: int, change: Float[Tensor, " rows"]) -> None:
        """Add to the values of one column."""
        self.slope.addr_(self.rows * change, self.inputs[column], alpha=-1)
        if self.lookups is not None:
            self.slope[:, column] -= change * self.lookups[:, column]
        self.error[:, column] -= change

    def _pushed(self, along: Float[Tensor, "rows span"]) -> Float[Tensor, "rows span"]:
        pushed = self.rows[:, None] * (along @ self.inputs)
        return pushed if self.lookups is None else pushed + self.lookups * along


def _ratio(slope: Float[Tensor, "*shape"], stiffness: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    return torch.where(stiffness > 0, slope / stiffness.clamp(min=TINY), 0.0)
