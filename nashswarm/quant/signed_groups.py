"""Signed codes in groups of columns, each with one 16-bit scale and no zero point, as compressed-tensors packs them."""

import dataclasses

import torch
from jaxtyping import Float, Float16, Int8
from torch import Tensor

from nashswarm.quant.coordinate_descent import coordinate_descent
from nashswarm.quant.curvature import FactoredCurvature
from nashswarm.quant.error_feedback import Grid, column_major, error_feedback_pass, row_chunks
from nashswarm.quant.grid import Scheme, quantize_groups


@dataclasses.dataclass(frozen=True)
class SignedGroups:
    """A matrix whose weights are ``scale · code``, codes between −2^(bits−1) and 2^(bits−1)−1, one scale a group."""

    bits: int
    codes: Int8[Tensor, "rows columns"]
    scale: Float16[Tensor, "rows groups"]

    @property
    def group_size(self) -> int:
        """Number of columns that share a scale."""
        return self.codes.shape[1] // self.scale.shape[1]

    def dequantize(self) -> Float[Tensor, "rows columns"]:
        """Return the float32 weights that the codes stand for."""
        return self.codes.float() * self.scale.float().repeat_interleave(self.group_size, 1)


def round_signed(
    weight: Float[Tensor, "rows columns"], bits: int, group_size: int, factored: FactoredCurvature, sweeps: int = 0
) -> SignedGroups:
    """Round a matrix at 2 to 8 bits, by error feedback and then ``sweeps`` of coordinate descent over the codes.

    The scale of a group is chosen when the pass reaches it, from its corrected weights.  A row keeps the result of the
    pass only if its damage is below that of plain rounding.  A matrix that is only looked up is rounded plainly.
    """
    parts = [
        _round_rows(weight[rows], bits, group_size, dataclasses.replace(
            factored, curvature=factored.curvature.select_rows(rows), rows=factored.rows[rows]
        ), sweeps)
        for rows in row_chunks(weight)
    ]  # fmt: skip
    return SignedGroups(bits, torch.cat([part.codes for part in parts]), torch.cat([part.scale for part in parts]))


def _round_rows(
    weight: Float[Tensor, "rows columns"], bits: int, group_size: int, factored: FactoredCurvature, sweeps: int
) -> SignedGroups:
    curvature = factored.curvature
    plain = _round_plainly(weight, bits, group_size, curvature.diagonal())
    if factored.factor is None:
        return plain
    scales: list[Tensor] = []

    def make_grid(columns: Tensor, corrected: Float[Tensor, "rows columns"]) -> Grid:
        importance = factored.columns[columns].expand_as(corrected)
        scales.append(_round_plainly(corrected, bits, group_size, importance).scale)
        return _grid(scales[-1], bits, group_size)

    codes = error_feedback_pass(weight, factored.factor, make_grid, group_size)
    after = SignedGroups(bits, codes.to(torch.int8), torch.hstack(scales))
    damage = [curvature.damage_by_row(weight - result.dequantize()) for result in (plain, after)]
    better = (damage[1] < damage[0])[:, None]
    scale = torch.where(better, after.scale, plain.scale)
    codes = torch.where(better, after.codes, plain.codes)
    if sweeps:
        whole = _grid(scale, bits, group_size)

        def grid_of(columns: Tensor, _: Tensor) -> Grid:
            assert whole.low is not None and whole.high is not None
            return Grid(whole.step[:, columns], whole.low[:, columns], whole.high[:, columns])

        codes = coordinate_descent(weight, codes.float(), curvature, grid_of, sweeps).codes.to(torch.int8)
    return SignedGroups(bits, codes, scale)


def _round_plainly(
    weight: Float[Tensor, "rows columns"], bits: int, group_size: int, importance: Float[Tensor, "rows columns"]
) -> SignedGroups:
    """Round to nearest, at the scale of least error of each group, each square times its ``importance``."""
    scheme = Scheme(group_size, search=True, symmetric=True)
    groups, weighed = weight.reshape(-1, group_size), importance.reshape(-1, group_size)
    codes, scale, _ = quantize_groups(groups, bits, scheme, weighed)
    signed = (codes.int() - (1 << (bits - 1))).to(torch.int8)
    return SignedGroups(bits, signed.view(weight.shape), scale.view(len(weight), -1))


def _grid(scale: Float16[Tensor, "rows groups"], bits: int, group_size: int) -> Grid:
    """Return the grid of some whole groups."""
    step, half = column_major(scale.float().repeat_interleave(group_size, 1)), float(1 << (bits - 1))
    return Grid(step, torch.full_like(step, -half), torch.full_like(step, half - 1))
