"""Damage, factors and sparse curvature, against their definitions."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nashswarm.quant.curvature import Curvature, inverse_cholesky
from tests.quant.cases import correlated, few_examples, weights


def test_damage_by_row_equals_written_out_sums() -> None:
    error, h = weights(3, 8, 1), correlated(8, 1)
    curvature = Curvature(torch.tensor([1.0, 2.0, 0.5]), h, torch.rand(3, 8))
    for row, damage in enumerate(curvature.damage_by_row(error).tolist()):
        pairs = itertools.product(range(8), repeat=2)
        products = sum(curvature.rows[row] * h[i, j] * error[row, i] * error[row, j] for i, j in pairs)
        lookups = sum(curvature.lookups[row, j] * error[row, j] ** 2 for j in range(8))
        assert damage == pytest.approx(((products + lookups) / 2).item(), rel=1e-4)


def test_inverse_cholesky_diagonal_is_cost_after_compensation() -> None:
    inputs = correlated(12, 3) + 0.05 * torch.eye(12)
    costs = 1 / inverse_cholesky(inputs).diagonal().square()
    for column in range(12):
        diagonal, later = inputs[column, column].double(), inputs[column, column + 1 :].double()
        cost = diagonal - later @ torch.linalg.pinv(inputs[column + 1 :, column + 1 :].double()) @ later
        assert costs[column].item() == pytest.approx(cost.item(), rel=1e-3)


@given(st.integers(2, 24), st.integers(0, 24), st.integers(0, 10**6))
@few_examples
def test_keep_top_correlations_is_sparse_symmetric_and_at_least_full_curvature(
    size: int, neighbours: int, seed: int
) -> None:
    curvature = Curvature(torch.ones(3), correlated(size, seed), None)
    sparse, full = curvature.keep_top_correlations(neighbours).inputs.double(), curvature.inputs.double()
    torch.testing.assert_close(sparse, sparse.T, rtol=1e-5, atol=1e-5)
    scale = full.diagonal().max()
    assert torch.linalg.eigvalsh(sparse).min() >= -1e-5 * scale
    assert torch.linalg.eigvalsh(sparse - full).min() >= -1e-5 * scale
    if neighbours >= size - 1:
        assert torch.equal(sparse, full)
    links = (sparse != 0).sum().item() - size
    assert links <= 2 * neighbours * size
    if neighbours == 0:
        torch.testing.assert_close(sparse, torch.diag(full.abs().sum(1)), rtol=1e-5, atol=0)


def test_keep_top_correlations_keeps_largest_correlations() -> None:
    inputs = correlated(12, 4)
    size = inputs.diagonal().sqrt()
    correlation = (inputs / torch.outer(size, size)).abs().fill_diagonal_(0)
    sparse = Curvature(torch.ones(1), inputs, None).keep_top_correlations(3).inputs
    for column in range(12):
        for neighbour in correlation[column].argsort(descending=True)[:3].tolist():
            assert sparse[column, neighbour] == inputs[column, neighbour]
            assert sparse[neighbour, column] == inputs[neighbour, column]
