"""Matrices with a curvature, a lattice and perhaps a rate term, and what their codes cost."""

import dataclasses
import functools
from collections.abc import Iterable

import numpy as np
import torch
from hypothesis import settings
from hypothesis import strategies as st

from nashswarm.quant.coordinate_descent import DescentResult, coordinate_descent
from nashswarm.quant.curvature import Curvature, factor_curvature
from nashswarm.quant.entropy import table_and_shift
from nashswarm.quant.error_feedback import Grid
from nashswarm.quant.lattice import Lattice, make_lattice
from tests.quant.laplace import LAPLACE

LAPLACE_BITS = LAPLACE.bits()
few_examples = settings(max_examples=30, deadline=None)


def correlated(columns: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(200, columns, generator=generator) @ torch.randn(columns, columns, generator=generator)
    return inputs.T @ inputs / 200


def weights(rows: int, columns: int, seed: int) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


@dataclasses.dataclass(frozen=True)
class Case:
    """A matrix, its curvature, a lattice, and perhaps the price of a bit."""

    weight: torch.Tensor
    curvature: Curvature
    lattice: Lattice
    price: float | None = None

    @functools.cached_property
    def steps(self) -> torch.Tensor:
        return self.lattice.row_steps()[:, None] * self.lattice.column_steps()

    @functools.cached_property
    def tables_and_shifts(self) -> tuple[np.ndarray, np.ndarray]:
        table, shift = table_and_shift(self.lattice.levels())
        return table.numpy(), shift.numpy()

    def make_grid(self, columns: torch.Tensor, current: torch.Tensor) -> Grid:
        if self.price is None:
            return Grid(self.steps[:, columns])
        table, shift = table_and_shift(self.lattice.levels(columns))
        prices = self.price * torch.from_numpy(LAPLACE.bits()).float()
        return Grid(self.steps[:, columns], symbol_price=prices, table=table, shift=shift, sign_price=self.price)

    def descend(self, codes: torch.Tensor, sweeps: int = 100) -> DescentResult:
        return coordinate_descent(self.weight, codes, self.curvature, self.make_grid, sweeps)

    def cost(self, row: int, codes: np.ndarray) -> np.ndarray:
        """Cost of one row for any number of code vectors, in float64: the quadratic form and the length of codes."""
        error = self.weight[row].double().numpy() - codes * self.steps[row].double().numpy()
        total = np.zeros(codes.shape[:-1])
        if self.curvature.inputs is not None:
            products = (error @ self.curvature.inputs.double().numpy()) * error
            total += self.curvature.rows[row].item() * products.sum(-1) / 2
        if self.curvature.lookups is not None:
            total += (self.curvature.lookups[row].double().numpy() * error**2).sum(-1) / 2
        if self.price is not None:
            table, shift = (part[row] for part in self.tables_and_shifts)
            symbols = np.abs(codes).astype(int) >> shift
            separate_sign = (codes != 0) & (symbols == 0)
            total += self.price * (LAPLACE_BITS[table, np.minimum(symbols, 48)] + separate_sign).sum(-1)
        return total

    def costs(self, codes: torch.Tensor) -> np.ndarray:
        return np.array([self.cost(row, row_codes) for row, row_codes in enumerate(codes.double().numpy())])

    def best_gain(self, row: int, codes: np.ndarray, column: int, targets: Iterable[float]) -> float:
        """Largest gain of one weight by changing its code to one of the ``targets``."""
        targets = np.array(list(targets))
        changed = np.repeat(codes[None], len(targets), 0)
        changed[:, column] = targets
        return float(self.cost(row, codes) - self.cost(row, changed).min())

    def worst_gain(self, codes: torch.Tensor, reach: int = 6) -> float:
        """Largest gain of a weight by a code near its own or by 0, relative to the cost of one step."""
        stiffness = self.curvature.diagonal() * self.steps.square()
        return max(
            self.best_gain(row, row_codes, column, [*np.arange(code - reach, code + reach + 1), 0.0])
            / stiffness[row, column].item()
            for row, row_codes in enumerate(codes.double().numpy())
            for column, code in enumerate(row_codes)
        )


def make_case(rows: int, columns: int, seed: int, unit: float = 0.5, lookups: bool = False, price: float = 0.0) -> Case:
    """``price`` is relative to the price of a bit at high rate."""
    generator = torch.Generator().manual_seed(seed)
    curvature = Curvature(
        torch.rand(rows, generator=generator) + 0.2,
        correlated(columns, seed) + 0.05 * torch.eye(columns),
        torch.rand(rows, columns, generator=generator) if lookups else None,
    )
    weight, factored = weights(rows, columns, seed), factor_curvature(curvature)
    lattice = make_lattice(weight, unit, factored.rows, factored.columns)
    return Case(weight, curvature, lattice, price * unit**2 * np.log(2) / 12 if price else None)


cases = st.builds(
    make_case,
    st.integers(1, 4),
    st.integers(1, 5),
    st.integers(0, 10**6),
    st.sampled_from([0.1, 0.7, 3.0]),
    st.booleans(),
    st.sampled_from([0.0, 0.5, 1.0, 3.0]),
)
