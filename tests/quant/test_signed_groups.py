"""Signed groups: error feedback against exact compensation, descent and codes by hand."""

import pytest
import torch

from nashswarm.quant.curvature import Curvature, factor_curvature
from nashswarm.quant.grid import Scheme, quantize_groups
from nashswarm.quant.signed_groups import SignedGroups, round_signed
from tests.quant.cases import correlated, weights

GROUP = 8
WIDTHS = pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 7, 8])


def slow_feedback(weight: torch.Tensor, bits: int, curvature: Curvature) -> torch.Tensor:
    """Round column after column; each error moves the later columns to where a linear system has least damage."""
    factored = factor_curvature(curvature)
    inputs = factored.curvature.inputs
    assert inputs is not None
    current, rounded = weight.double(), torch.empty_like(weight)
    for column in range(weight.shape[1]):
        if column % GROUP == 0:
            span = slice(column, column + GROUP)
            importance = factored.columns[span].expand(len(weight), GROUP)
            scheme = Scheme(GROUP, search=True, symmetric=True)
            _, scale, _ = quantize_groups(current[:, span].float(), bits, scheme, importance)
        codes = (current[:, column] / scale.double()).round().clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
        rounded[:, column] = codes * scale.double()
        error, later = current[:, column] - rounded[:, column], slice(column + 1, weight.shape[1])
        response = torch.linalg.solve(inputs[later, later].double(), inputs[later, column].double())
        current[:, later] += error[:, None] * response
    return rounded


def rounded_plainly(weight: torch.Tensor, bits: int, curvature: Curvature) -> torch.Tensor:
    diagonal = curvature.diagonal()
    alone = Curvature(curvature.rows, None, diagonal)  # only looked up: there is nothing to feed back
    return round_signed(weight, bits, GROUP, factor_curvature(alone)).dequantize()


@WIDTHS
def test_round_signed_equals_exact_compensation_or_plain_rounding(bits: int) -> None:
    weight, curvature = weights(24, 32, bits), Curvature(torch.ones(24), correlated(32, bits), None)
    found = round_signed(weight, bits, GROUP, factor_curvature(curvature)).dequantize()
    by_hand = slow_feedback(weight, bits, curvature)
    plain = rounded_plainly(weight, bits, factor_curvature(curvature).curvature)
    distance = torch.minimum((found - by_hand).abs().amax(1), (found - plain).abs().amax(1))
    assert (distance < 1e-5).float().mean() >= 0.9  # ties of float32 round the other way in few rows
    assert ((found - plain).abs().amax(1) > 0).float().mean() > 0.5


@WIDTHS
def test_round_signed_damage_falls_by_feedback_and_by_descent(bits: int) -> None:
    weight, curvature = weights(40, 32, 7), Curvature(torch.rand(40) + 0.1, correlated(32, 7), torch.rand(40, 32))
    factored = factor_curvature(curvature)
    results = [rounded_plainly(weight, bits, factored.curvature)]
    results += [round_signed(weight, bits, GROUP, factored, sweeps).dequantize() for sweeps in (0, 3)]
    plain, feedback, descent = (factored.curvature.damage_by_row(weight - result) for result in results)
    assert (feedback <= plain * (1 + 1e-5)).all() and (descent <= feedback * (1 + 1e-5)).all()
    assert feedback.sum() < 0.9 * plain.sum() and descent.sum() < 0.99 * feedback.sum()


@WIDTHS
def test_codes_fit_their_bits_and_stand_for_products_with_their_scale(bits: int) -> None:
    weight, curvature = weights(6, 16, 1), Curvature(torch.ones(6), correlated(16, 1), None)
    matrix = round_signed(weight, bits, GROUP, factor_curvature(curvature), 1)
    assert matrix.bits == bits and matrix.group_size == GROUP and matrix.codes.dtype == torch.int8
    assert -(2 ** (bits - 1)) <= int(matrix.codes.min()) and int(matrix.codes.max()) < 2 ** (bits - 1)
    for row in range(6):
        for column in range(16):
            expected = float(matrix.codes[row, column]) * float(matrix.scale[row, column // GROUP])
            assert float(matrix.dequantize()[row, column]) == pytest.approx(expected, abs=1e-7)


def test_matrix_of_zeros_stays_zero() -> None:
    curvature = Curvature(torch.ones(3), correlated(16, 2), None)
    matrix = round_signed(torch.zeros(3, 16), 4, GROUP, factor_curvature(curvature), 1)
    assert isinstance(matrix, SignedGroups) and torch.equal(matrix.dequantize(), torch.zeros(3, 16))
