"""Second derivatives of the loss in the weights of a matrix, damped, and factored for error feedback.

Let e_o be the error of row o.  Its damage, the expected rise of the loss in nats per token, is
``½ (f_o e_oᵀ H e_o + Σ_j d_oj e_oj²)``.  H and f come from products with the matrix; d comes from lookups of its rows,
as in an embedding that is also the output head.
"""

import dataclasses
import functools

import torch
from jaxtyping import Float
from torch import Tensor

from nashswarm.quant.lattice import Rows

DAMPING = 0.01  # as a share of the mean diagonal of H, as in GPTQ
TINY = torch.finfo(torch.float32).tiny
SMALL_TRIANGLE = 128  # columns up to which a triangular matrix is inverted without splitting it


@dataclasses.dataclass(frozen=True)
class Curvature:
    """Second derivatives of the loss in the weights of a matrix, in nats per token.

    ``rows`` (f) and ``inputs`` (H) describe products with the matrix, ``lookups`` (d) lookups of its rows.  ``inputs``
    is None for a matrix that is only looked up, ``lookups`` is None for one that is never looked up.
    """

    rows: Float[Tensor, " out"]
    inputs: Float[Tensor, "in in"] | None
    lookups: Float[Tensor, "out in"] | None

    def diagonal(self) -> Float[Tensor, "out in"]:
        """Return the second derivative of the loss in each weight: twice the damage of a unit error in it alone."""
        products = None if self.inputs is None else torch.outer(self.rows, self.inputs.diagonal())
        parts = [part for part in (products, self.lookups) if part is not None]
        return functools.reduce(torch.add, parts)  # a sum over a stack of them would be two copies more

    def damage_by_row(self, error: Float[Tensor, "out in"]) -> Float[Tensor, " out"]:
        """Compute the damage of the errors of each row, in nats per token, with all cross terms of H."""
        total = torch.zeros(len(error))
        if self.inputs is not None:
            total += self.rows * ((error @ self.inputs) * error).sum(1)
        if self.lookups is not None:
            total += (self.lookups * error.square()).sum(1)
        return total / 2

    def select_rows(self, rows: Rows) -> "Curvature":
        """Return the curvature of some of the rows."""
        lookups = None if self.lookups is None else self.lookups[rows]
        return dataclasses.replace(self, rows=self.rows[rows], lookups=lookups)

    def scale_rows(self, weights: Float[Tensor, " out"]) -> "Curvature":
        """Return the curvature with the damage of each row multiplied by its weight."""
        lookups = None if self.lookups is None else self.lookups * weights[:, None]
        return dataclasses.replace(self, rows=self.rows * weights, lookups=lookups)

    def with_row_floor(self, share: float) -> "Curvature":
        """Return the curvature with ``share`` times the layer's mean over rows added to every row.

        An error in one row then costs its own damage plus ``share`` times the mean of what it would cost in all rows.
        A saturated attention head has hardly any gradient at the full model, although a finite error of it does harm;
        the floor keeps its rows from being rounded away.  ``damped`` and ``mean_row_curvature`` may come before or
        after it.  Raises ValueError if ``share`` is negative.
        """
        if share < 0:
            raise ValueError(f"the floor of the row sensitivities must not be negative, as {share} is")
        if share == 0:
            return self
        lookups = None if self.lookups is None else self.lookups + share * self.lookups.mean(0)
        return dataclasses.replace(self, rows=self.rows + share * self.rows.mean(), lookups=lookups)

    def damped(self, damping: float = DAMPING) -> "Curvature":
        """Return the curvature with ``damping`` times the mean diagonal of H added to its diagonal.

        H is estimated from a sample of text; damping keeps it invertible and trusts its off-diagonal less.
        """
        if self.inputs is None:
            return self
        inputs = self.inputs.clone()
        inputs.diagonal().add_(damping * inputs.diagonal().mean() + TINY)
        return dataclasses.replace(self, inputs=inputs)

    def keep_top_correlations(self, neighbours: int) -> "Curvature":
        """Return the curvature with H made sparse: each column keeps its ``neighbours`` most correlated columns.

        A pair of columns stays if either keeps the other.  The absolute values of the entries that are dropped are
        added to the diagonal, so that the sparse H is at least the full H (as quadratic forms).  Coordinate descent on
        the sparse H therefore cannot diverge on the full one.
        """
        if self.inputs is None or neighbours >= len(self.inputs) - 1:
            return self
        size = self.inputs.diagonal().clamp(min=TINY).sqrt()
        correlation = (self.inputs / torch.outer(size, size)).abs().fill_diagonal_(0)
        keep = torch.zeros_like(correlation, dtype=torch.bool)
        keep.scatter_(1, correlation.topk(neighbours, 1).indices, True)
        keep = (keep | keep.T).fill_diagonal_(True)
        dropped = self.inputs.abs().masked_fill(keep, 0).sum(1)
        return dataclasses.replace(self, inputs=self.inputs.masked_fill(~keep, 0) + torch.diag(dropped))

    def mean_row_curvature(self) -> tuple[Float[Tensor, " out"], Float[Tensor, "in in"]]:
        """Return row sensitivities and one H for all rows, with the lookups averaged over rows and over columns.

        Exact lookups would give every row an H of its own, and too many matrices to factor.
        """
        assert self.inputs is not None
        if self.lookups is None:
            return self.rows, self.inputs
        share = self.lookups.sum(0) / self.rows.sum().clamp(min=TINY)
        return self.rows + self.lookups.mean(1) / self.inputs.diagonal().mean(), self.inputs + torch.diag(share)


@dataclasses.dataclass(frozen=True)
class FactoredCurvature:
    """The damped curvature of a matrix, with what lattices and error feedback need of it.

    ``rows`` (a) and ``columns`` (κ) are the sensitivities from which a lattice is made.  ``factor`` is
    ``inverse_cholesky(H)``; it is None if there is no error feedback, as for a matrix that is only looked up.
    """

    curvature: Curvature
    rows: Float[Tensor, " out"]
    columns: Float[Tensor, " in"]
    factor: Float[Tensor, "in in"] | None


def factor_curvature(curvature: Curvature, damping: float = DAMPING, feedback: bool = True) -> FactoredCurvature:
    """Damp the curvature and factor it for error feedback.

    With ``feedback`` the sensitivity of a column is what its error costs after later columns have compensated for it;
    without, it is the diagonal of H.
    """
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
    """Compute the upper triangular U with H⁻¹ = Uᵀ U.

    ``1 / U_jj²`` is what an error of column j costs once later columns have compensated for it.  U is the inverse of
    the upper triangular R with H = R Rᵀ.
    """
    return _invert_triangle(torch.linalg.cholesky(inputs.double().flip(0, 1)).flip(0, 1)).float()


def _invert_triangle(upper: Float[Tensor, "in in"]) -> Float[Tensor, "in in"]:
    """Invert an upper triangular matrix by inverting its halves, which makes nearly all of the work matrix products."""
    size, half = len(upper), len(upper) // 2
    if size <= SMALL_TRIANGLE:
        return torch.linalg.solve_triangular(upper, torch.eye(size, dtype=upper.dtype), upper=True)
    inverse = torch.zeros_like(upper)
    inverse[:half, :half] = _invert_triangle(upper[:half, :half])
    inverse[half:, half:] = _invert_triangle(upper[half:, half:])
    inverse[:half, half:] = inverse[:half, :half] @ upper[:half, half:] @ inverse[half:, half:].neg()
    return inverse
