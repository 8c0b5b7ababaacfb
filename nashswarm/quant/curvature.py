"""What an error of a matrix's weights costs: second derivatives of the loss, damped, and factored for error feedback.

The damage of a row o is ``½ (f_o e_oᵀ H e_o + Σ_j d_oj e_oj²)``, d being what a lookup of the same matrix adds.
"""

import dataclasses

import torch
from jaxtyping import Float
from torch import Tensor

from nashswarm.quant.lattice import Rows

DAMPING = 0.01  # of the mean diagonal of H, as in GPTQ
TINY = torch.finfo(torch.float32).tiny
SMALL = 128  # columns of a triangle that is solved at once


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

    def select_rows(self, rows: Rows) -> "Curvature":
        """Of some of the rows alone."""
        lookups = None if self.lookups is None else self.lookups[rows]
        return dataclasses.replace(self, rows=self.rows[rows], lookups=lookups)

    def scale_rows(self, weights: Float[Tensor, " out"]) -> "Curvature":
        """Every row's damage times its weight."""
        lookups = None if self.lookups is None else self.lookups * weights[:, None]
        return dataclasses.replace(self, rows=self.rows * weights, lookups=lookups)

    def damped(self, damping: float = DAMPING) -> "Curvature":
        """With ``damping`` times its mean on the diagonal of H: calibration text is a sample."""
        if self.inputs is None:
            return self
        inputs = self.inputs.clone()
        inputs.diagonal().add_(damping * inputs.diagonal().mean() + TINY)
        return dataclasses.replace(self, inputs=inputs)

    def keep_top_correlations(self, neighbours: int) -> "Curvature":
        """Every column minds only the columns it is most correlated with: the local reply of the flock.

        What is dropped from H is added, in absolute value, to its diagonal; so the sparse H is no less than the true
        one and a reply to it cannot diverge.
        """
        if self.inputs is None or neighbours >= len(self.inputs) - 1:
            return self
        size = self.inputs.diagonal().clamp(min=TINY).sqrt()
        correlation = (self.inputs / torch.outer(size, size)).abs().fill_diagonal_(0)
        kept = torch.zeros_like(correlation, dtype=torch.bool)
        kept.scatter_(1, correlation.topk(neighbours, 1).indices, True)
        kept = (kept | kept.T).fill_diagonal_(True)
        dropped = self.inputs.abs().masked_fill(kept, 0).sum(1)
        return dataclasses.replace(self, inputs=self.inputs.masked_fill(~kept, 0) + torch.diag(dropped))

    def mean_row_curvature(self) -> tuple[Float[Tensor, " out"], Float[Tensor, "in in"]]:
        """(a, H) with the lookups taken in on average: a row of H for every row is more than can be factored."""
        assert self.inputs is not None
        if self.lookups is None:
            return self.rows, self.inputs
        share = self.lookups.sum(0) / self.rows.sum().clamp(min=TINY)
        return self.rows + self.lookups.mean(1) / self.inputs.diagonal().mean(), self.inputs + torch.diag(share)


@dataclasses.dataclass(frozen=True)
class FactoredCurvature:
    """A layer's curvature ready for replies: ``rows`` (a) and ``columns`` (κ), the sensitivities with error feedback,
    and the inverse_cholesky (None: the matrix is only looked up)."""

    curvature: Curvature
    rows: Float[Tensor, " out"]
    columns: Float[Tensor, " in"]
    factor: Float[Tensor, "in in"] | None

    def select_rows(self, rows: Rows) -> "FactoredCurvature":
        """Of some of the rows alone."""
        return dataclasses.replace(self, curvature=self.curvature.select_rows(rows), rows=self.rows[rows])


def factor_curvature(curvature: Curvature, damping: float = DAMPING, feedback: bool = True) -> FactoredCurvature:
    """The damped curvature, factored; without ``feedback`` the columns cost what they cost alone."""
    damped = curvature.damped(damping)
    if damped.inputs is not None and not feedback:
        rows, inputs = damped.mean_row_curvature()
        return FactoredCurvature(damped, rows, inputs.diagonal(), None)
    if damped.inputs is None:
        diagonal = damped.diagonal()
        columns = diagonal.mean(0) / diagonal.mean().clamp(min=TINY)
        return FactoredCurvature(damped, diagonal.mean(1), columns, None)
    rows, inputs = damped.mean_row_curvature()
    factor = inverse_cholesky(inputs)
    return FactoredCurvature(damped, rows, 1 / factor.diagonal().square(), factor)


def inverse_cholesky(inputs: Float[Tensor, "in in"]) -> Float[Tensor, "in in"]:
    """U, upper triangular, with H⁻¹ = Uᵀ U; 1 / U_jj² is what an error of column j costs once later columns have
    answered.  It is the inverse of the upper triangular R with H = R Rᵀ."""
    return _inverse(torch.linalg.cholesky(inputs.double().flip(0, 1)).flip(0, 1)).float()


def _inverse(upper: Float[Tensor, "in in"]) -> Float[Tensor, "in in"]:
    """Of an upper triangular matrix, from those of its halves: nearly all of it is matrix products."""
    size, half = len(upper), len(upper) // 2
    if size <= SMALL:
        return torch.linalg.solve_triangular(upper, torch.eye(size, dtype=upper.dtype), upper=True)
    found = torch.zeros_like(upper)
    found[:half, :half], found[half:, half:] = _inverse(upper[:half, :half]), _inverse(upper[half:, half:])
    found[:half, half:] = found[:half, :half] @ upper[:half, half:] @ found[half:, half:].neg()
    return found
