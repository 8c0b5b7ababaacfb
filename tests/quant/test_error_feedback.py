"""The pass of error feedback, against GPTQ as its paper states it."""

import numpy as np
import pytest
import torch

from nashswarm.quant.curvature import inverse_cholesky
from nashswarm.quant.error_feedback import error_feedback_pass
from tests.quant.cases import make_case


def slow_pass(weight: torch.Tensor, h: torch.Tensor, steps: torch.Tensor) -> np.ndarray:
    """GPTQ on a lattice, inverting the remaining Hessian for each column, in float64."""
    remaining, h, codes = weight.double().numpy().copy(), h.double().numpy(), np.zeros(weight.shape)
    for column in range(weight.shape[1]):
        inverse = np.linalg.inv(h[column:, column:])
        codes[:, column] = np.round(remaining[:, column] / steps[:, column].double().numpy())
        error = remaining[:, column] - codes[:, column] * steps[:, column].double().numpy()
        remaining[:, column:] -= np.outer(error, inverse[0] / inverse[0, 0])
    return codes


@pytest.mark.parametrize("block", [1, 7, 64])
def test_error_feedback_pass_on_fine_lattice_matches_slow_gptq(block: int) -> None:
    case = make_case(30, 40, 1, unit=0.05)
    inputs = case.curvature.inputs
    codes = error_feedback_pass(case.weight, inverse_cholesky(inputs), case.make_grid, block)
    by_hand = torch.from_numpy(slow_pass(case.weight, inputs, case.steps)).float()
    same = (codes == by_hand).all(1)
    assert same.float().mean() >= 0.9  # after a float32 tie that rounds the other way, the rest of its row differs
    assert case.costs(codes) == pytest.approx(case.costs(by_hand), rel=0.2)
    assert case.costs(codes).sum() < 0.7 * case.costs((case.weight / case.steps).round()).sum()


def test_error_feedback_pass_with_order_equals_pass_over_permuted_columns() -> None:
    case = make_case(30, 20, 2, unit=0.2)
    order = torch.randperm(20, generator=torch.Generator().manual_seed(0))
    permuted = case.curvature.inputs[order][:, order]
    codes = error_feedback_pass(case.weight, inverse_cholesky(permuted), case.make_grid, 8, order)
    by_hand = slow_pass(case.weight[:, order], permuted, case.steps[:, order])
    assert (codes[:, order].numpy() == by_hand).all(1).mean() >= 0.9
