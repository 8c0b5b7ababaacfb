"""The codes with which a layer answers the widths of its tiles.

One greedy pass of best replies, group by group and column by column: each column is rounded on its grid and the columns
after it take over its error, weighed by H (GPTQ, Frantar et al. 2023).  The damage of a row is
``½ (f_o e_oᵀ H e_o + Σ_j d_oj e_oj²)``, d being what a lookup of the same matrix adds; a row keeps the pass only where
that damage is less than plain rounding's.
"""

import dataclasses

import torch
from jaxtyping import Float, Integer
from torch import Tensor

from nashswarm.quant.grid import GRID_WIDTHS, TILE_ROWS, QuantizedTensor, Scheme, quantize

DAMPING = 0.01  # of the mean diagonal of H, as in GPTQ


@dataclasses.dataclass(frozen=True)
class Curvature:
    """Second derivatives of the loss in a matrix's weights, in nats per token.

    ``rows`` (f) times ``inputs`` (H) for its products, ``lookups`` (d) for its lookups; ``inputs`` of None: it is only
    looked up.
    """

    rows: Float[Tensor, " out"]
    inputs: Float[Tensor, "in in"] | None
    lookups: Float[Tensor, "out in"] | None

    def diagonal(self) -> Float[Tensor, "out in"]:
        """s: what half a unit of squared error of each weight costs."""
        products = None if self.inputs is None else torch.outer(self.rows, self.inputs.diagonal())
        parts = [part for part in (products, self.lookups) if part is not None]
        return torch.stack(parts).sum(0)

    def damage_by_row(self, error: Float[Tensor, "out in"]) -> Float[Tensor, " out"]:
        """Damage of each row of ``error``, cross terms of H in full."""
        total = torch.zeros(len(error))
        if self.inputs is not None:
            total += self.rows * ((error @ self.inputs) * error).sum(1)
        if self.lookups is not None:
            total += (self.lookups * error.square()).sum(1)
        return total / 2


def reply(
    weight: Float[Tensor, "out in"],
    bits: int | Integer[Tensor, "row_blocks groups"],
    scheme: Scheme,
    curvature: Curvature,
) -> QuantizedTensor:
    """Codes, scales and zero points of least damage found, each tile at its width.

    Float tiles, and matrices that are only looked up, have no columns to compensate and are rounded plainly.
    """
    diagonal = curvature.diagonal()
    plain = quantize(weight, bits, scheme, diagonal)
    if curvature.inputs is None or not set(plain.bits.unique().tolist()) <= {0, *GRID_WIDTHS}:
        return plain
    passed = _feedback(weight, plain.bits, scheme, curvature.inputs + torch.diag(_lookup_share(curvature)), diagonal)
    better = curvature.damage_by_row(weight - passed.dequantize()) < curvature.damage_by_row(
        weight - plain.dequantize()
    )
    rows = better.unsqueeze(1)
    return QuantizedTensor(
        torch.where(rows, passed.codes, plain.codes),
        torch.where(rows, passed.scale, plain.scale),
        torch.where(rows, passed.zero_point, plain.zero_point),
        plain.bits,
        scheme,
    )


def _lookup_share(curvature: Curvature) -> Float[Tensor, " in"]:
    """What lookups add to the diagonal of H, on average over the rows."""
    assert curvature.inputs is not None
    if curvature.lookups is None:
        return torch.zeros(len(curvature.inputs))
    return curvature.lookups.sum(0) / curvature.rows.sum().clamp(min=torch.finfo(torch.float32).tiny)


def _feedback(
    weight: Float[Tensor, "out in"],
    bits: Integer[Tensor, "row_blocks groups"],
    scheme: Scheme,
    inputs: Float[Tensor, "in in"],
    diagonal: Float[Tensor, "out in"],
) -> QuantizedTensor:
    """The pass itself: a group's grids are chosen when its turn comes, from the weights as they have become."""
    hessian = inputs.double()
    hessian.diagonal().add_(DAMPING * hessian.diagonal().mean() + torch.finfo(torch.float32).tiny)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(hessian))
    factor = torch.linalg.cholesky(inverse, upper=True).float()
    current = weight.clone()
    rows = len(weight)
    parts = []
    for group, start in enumerate(range(0, weight.shape[1], scheme.group_size)):
        columns = slice(start, start + scheme.group_size)
        own = factor[columns, columns]
        grids = quantize(current[:, columns], bits[:, group : group + 1], scheme, diagonal[:, columns])
        scale, zero = grids.scale[:, 0].float(), grids.zero_point[:, 0].float()
        inverse_scale = torch.where(scale > 0, 1 / scale, 0)
        levels = ((1 << bits[:, group].int()) - 1).repeat_interleave(TILE_ROWS)[:rows].float()
        codes, errors = torch.zeros_like(current[:, columns]), torch.zeros_like(current[:, columns])
        block = current[:, columns].clone()
        for column in range(scheme.group_size):
            value = block[:, column]
            code = ((value * inverse_scale).round() + zero).clamp(min=torch.zeros(()), max=levels)
            error = (value - (code - zero) * scale) / own[column, column]
            block[:, column + 1 :] -= torch.outer(error, own[column, column + 1 :])
            codes[:, column], errors[:, column] = code, error
        current[:, columns.stop :] -= errors @ factor[columns, columns.stop :]
        parts.append(dataclasses.replace(grids, codes=codes.to(torch.uint8)))
    return QuantizedTensor(
        torch.cat([part.codes for part in parts], 1),
        torch.cat([part.scale for part in parts], 1),
        torch.cat([part.zero_point for part in parts], 1),
        bits,
        scheme,
    )
