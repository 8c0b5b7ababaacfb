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


@pytest.mark.parametrize("parts", ["products", "lookups", "both"])
def test_with_row_floor_adds_share_of_mean_damage_of_the_same_error_in_all_rows(parts: str) -> None:
    rows = torch.tensor([1.0, 2.0, 0.5, 0.0]) if parts != "lookups" else torch.zeros(4)
    lookups = torch.rand(4, 8, generator=torch.Generator().manual_seed(3)) if parts != "products" else None
    curvature = Curvature(rows, correlated(8, 1) if parts != "lookups" else None, lookups)
    error = weights(4, 8, 2)
    floored = curvature.with_row_floor(0.5).damage_by_row(error).tolist()
    for row in range(4):
        moved = [torch.zeros(4, 8).index_put((torch.tensor(other),), error[row]) for other in range(4)]
        own, *others = [curvature.damage_by_row(moved[other])[other].item() for other in (row, *range(4))]
        assert floored[row] == pytest.approx(own + 0.5 * sum(others) / 4, rel=1e-5)


@pytest.mark.parametrize("with_lookups", [False, True])
@pytest.mark.parametrize("share", [0.1, 0.5])
def test_with_row_floor_before_damping_and_folding_equals_floor_after_them(with_lookups: bool, share: float) -> None:
    lookups = torch.rand(5, 8, generator=torch.Generator().manual_seed(4)) if with_lookups else None
    curvature = Curvature(torch.tensor([3.6e-8, 1e-4, 2e-4, 0.0, 5e-5]), correlated(8, 2), lookups)
    rows, inputs = curvature.with_row_floor(share).damped().mean_row_curvature()
    late_rows, late_inputs = curvature.damped().mean_row_curvature()
    torch.testing.assert_close(rows, late_rows + share * late_rows.mean(), rtol=1e-5, atol=0)
    torch.testing.assert_close(inputs, late_inputs, rtol=1e-5, atol=1e-6)


def test_with_row_floor_zero_changes_nothing_and_negative_is_refused() -> None:
    curvature = Curvature(torch.rand(3), correlated(8, 1), torch.rand(3, 8))
    assert curvature.with_row_floor(0) is curvature
    with pytest.raises(ValueError, match=r"must not be negative, as -0\.5 is"):
        curvature.with_row_floor(-0.5)


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
