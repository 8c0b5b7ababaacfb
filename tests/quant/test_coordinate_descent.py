"""Layers against GPTQ as its paper states it, and descent against brute force."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given

from nashswarm.quant.coordinate_descent import quantize_layer
from nashswarm.quant.curvature import DAMPING, Curvature
from nashswarm.quant.grid import Scheme, quantize
from tests.quant.cases import Case, cases, correlated, few_examples, make_case, weights

SCHEME = Scheme(8, search=True)


def gptq(weight: torch.Tensor, bits: int, h: torch.Tensor, diagonal: torch.Tensor) -> np.ndarray:
    """Quantize as in the GPTQ paper, inverting the remaining Hessian for each column, in float64."""
    hessian = h.double() + DAMPING * h.double().diagonal().mean() * torch.eye(len(h))
    remaining, quantized = weight.double().clone(), torch.zeros(weight.shape, dtype=torch.float64)
    for column in range(weight.shape[1]):
        if column % SCHEME.group_size == 0:
            group = slice(column, column + SCHEME.group_size)
            grids = quantize(remaining[:, group].float(), bits, SCHEME, diagonal[:, group])
        inverse = torch.linalg.inv(hessian[column:, column:])
        scale, zero = grids.scale[:, 0].double(), grids.zero_point[:, 0].double()
        code = ((remaining[:, column] / scale).round() + zero).clamp(0, 2**bits - 1)
        quantized[:, column] = (code - zero) * scale
        error = (remaining[:, column] - quantized[:, column]) / inverse[0, 0]
        remaining[:, column:] -= torch.outer(error, inverse[0])
    return quantized.numpy()


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_quantize_layer_matches_slow_gptq_or_plain_rounding(bits: int) -> None:
    weight, h = weights(24, 32, bits), correlated(32, bits)
    curvature = Curvature(torch.ones(24), h, None)
    by_hand = gptq(weight, bits, h, curvature.diagonal())
    plain = quantize(weight, bits, SCHEME, curvature.diagonal()).dequantize().numpy()
    quantized = quantize_layer(weight, bits, SCHEME, curvature).dequantize().numpy()
    distance = [min(np.abs(quantized[row] - other[row]).max() for other in (by_hand, plain)) for row in range(24)]
    assert np.quantile(distance, 0.9) < 1e-5  # float32 ties may round the other way
    assert (np.abs(quantized - plain).max(1) > 0).mean() > 0.5


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_quantize_layer_never_exceeds_damage_of_plain_rounding(bits: int) -> None:
    weight, curvature = weights(40, 32, 7), Curvature(torch.rand(40) + 0.1, correlated(32, 7), torch.rand(40, 32))
    plain_damage = curvature.damage_by_row(weight - quantize(weight, bits, SCHEME, curvature.diagonal()).dequantize())
    damage = curvature.damage_by_row(weight - quantize_layer(weight, bits, SCHEME, curvature).dequantize())
    assert (damage <= plain_damage).all()
    assert damage.sum() < 0.8 * plain_damage.sum()


def test_quantize_layer_with_diagonal_curvature_equals_plain_rounding() -> None:
    weight, curvature = weights(16, 16, 3), Curvature(torch.ones(16), torch.diag(torch.rand(16) + 0.1), None)
    plain = quantize(weight, 3, SCHEME, curvature.diagonal())
    assert torch.equal(quantize_layer(weight, 3, SCHEME, curvature).dequantize(), plain.dequantize())


def test_quantize_layer_of_lookups_equals_plain_rounding() -> None:
    weight, curvature = weights(16, 16, 4), Curvature(torch.zeros(16), None, torch.rand(16, 16))
    plain = quantize(weight, 3, SCHEME, curvature.lookups)
    assert torch.equal(quantize_layer(weight, 3, SCHEME, curvature).codes, plain.codes)


def test_quantize_layer_with_pruned_tiles_compensates_in_other_tiles() -> None:
    weight, curvature = weights(16, 16, 5), Curvature(torch.ones(16), correlated(16, 5), None)
    widths = torch.tensor([[0, 8]])
    quantized = quantize_layer(weight, widths, SCHEME, curvature).dequantize()
    plain = quantize(weight, widths, SCHEME, curvature.diagonal()).dequantize()
    assert (quantized[:, :8] == 0).all()
    assert curvature.damage_by_row(weight - quantized).sum() < curvature.damage_by_row(weight - plain).sum()


def test_quantize_layer_twice_gives_same_codes() -> None:
    weight, curvature = weights(16, 16, 6), Curvature(torch.ones(16), correlated(16, 6), None)
    assert torch.equal(
        quantize_layer(weight, 2, SCHEME, curvature).codes, quantize_layer(weight, 2, SCHEME, curvature).codes
    )


@pytest.mark.parametrize("bits", [2, 3])
def test_quantize_layer_with_more_sweeps_lowers_damage_of_every_row(bits: int) -> None:
    """No further sweep raises the damage of a row, and the grids stay those of the pass."""
    weight, curvature = weights(40, 32, 8), Curvature(torch.rand(40) + 0.1, correlated(32, 8), torch.rand(40, 32))
    tensors = [quantize_layer(weight, bits, SCHEME, curvature, sweeps) for sweeps in (0, 1, 2, 50)]
    damages = [curvature.damped().damage_by_row(weight - tensor.dequantize()) for tensor in tensors]
    for before, after in itertools.pairwise(damages):
        assert (after <= before * (1 + 1e-5)).all()
    assert damages[-1].sum() < 0.95 * damages[0].sum()
    assert all(torch.equal(tensor.scale, tensors[0].scale) for tensor in tensors)
    assert all((tensor.codes < 2**bits).all() for tensor in tensors)


def test_act_order_with_sorted_diagonal_equals_stored_order() -> None:
    inputs = correlated(16, 9)
    order = inputs.diagonal().argsort(descending=True)
    weight, sorted_inputs = weights(24, 16, 9), inputs[order][:, order]
    one_group = Scheme(16, search=True)
    tensors = [
        quantize_layer(weight, 3, one_group, Curvature(torch.ones(24), sorted_inputs, None), act_order=act_order)
        for act_order in (False, True)
    ]
    assert torch.equal(tensors[0].codes, tensors[1].codes) and torch.equal(tensors[0].scale, tensors[1].scale)


def test_act_order_equals_pass_over_sorted_columns() -> None:
    weight, inputs, one_group = weights(24, 16, 10), correlated(16, 10), Scheme(16, search=True)
    order = inputs.diagonal().argsort(descending=True)
    tensor = quantize_layer(weight, 3, one_group, Curvature(torch.ones(24), inputs, None), act_order=True)
    by_hand = quantize_layer(weight[:, order], 3, one_group, Curvature(torch.ones(24), inputs[order][:, order], None))
    assert (tensor.codes[:, order] == by_hand.codes).float().mean() > 0.99


def test_quantize_layer_with_large_damping_approaches_plain_rounding() -> None:
    weight, curvature = weights(16, 16, 11), Curvature(torch.ones(16), correlated(16, 11), None)
    plain = quantize(weight, 3, SCHEME, curvature.diagonal())
    assert not torch.equal(quantize_layer(weight, 3, SCHEME, curvature).codes, plain.codes)
    assert (quantize_layer(weight, 3, SCHEME, curvature, damping=1e6).codes == plain.codes).float().mean() > 0.99


@given(cases)
@few_examples
def test_descent_result_leaves_no_weight_a_better_code(case: Case) -> None:
    start = (case.weight / case.steps).round()
    result = case.descend(start)
    assert result.moves[-1] == 0 and len(result.moves) < 100
    assert case.worst_gain(result.codes) <= 2e-5


@given(cases)
@few_examples
def test_descent_sweep_never_raises_cost_of_a_row(case: Case) -> None:
    start = torch.zeros_like(case.weight)
    end = case.descend(start)
    costs = [case.costs(start)]
    for sweeps in range(1, len(end.moves) + 1):
        partial = case.descend(start, sweeps)
        assert partial.moves == end.moves[:sweeps]
        costs.append(case.costs(partial.codes))
        assert (costs[-1] <= costs[-2] * (1 + 1e-5)).all()
        gained = costs[-2].sum() - costs[-1].sum()
        assert partial.gains[-1] == pytest.approx(gained, rel=1e-3, abs=1e-5 * costs[0].sum())
    assert torch.equal(partial.codes, end.codes)


@given(cases)
@few_examples
def test_descent_is_deterministic_and_idempotent(case: Case) -> None:
    start = (case.weight / case.steps).round()
    first, second = case.descend(start), case.descend(start)
    assert torch.equal(first.codes, second.codes) and first.moves == second.moves and first.gains == second.gains
    continued = case.descend(first.codes)
    assert torch.equal(continued.codes, first.codes) and not any(continued.moves)


def test_descent_with_zero_sweeps_returns_start() -> None:
    case = make_case(3, 4, 0)
    assert torch.equal(case.descend(torch.zeros(3, 4), 0).codes, torch.zeros(3, 4))


@pytest.mark.parametrize("columns", [2, 3])
@pytest.mark.parametrize("lookups", [False, True])
@pytest.mark.parametrize("price", [0.0, 2.0])
def test_descent_result_is_equilibrium_of_exhaustive_search(columns: int, lookups: bool, price: float) -> None:
    case = make_case(6, columns, 5, unit=1.5, lookups=lookups, price=price)
    result = case.descend((case.weight / case.steps).round())
    best = []
    for row, end in enumerate(result.codes.double().numpy()):
        axes = [np.arange(code - 4, code + 5) for code in end]
        profiles = np.stack(np.meshgrid(*axes, indexing="ij"), -1)
        costs = case.cost(row, profiles)
        slack = 3e-5 * float(case.cost(row, end))
        is_equilibrium = np.all([costs <= costs.min(axis, keepdims=True) + slack for axis in range(columns)], 0)
        assert is_equilibrium[(4,) * columns]
        place = np.unravel_index(costs.argmin(), costs.shape)
        assert is_equilibrium[place]
        best.append(profiles[place])
    optimum = torch.from_numpy(np.array(best)).float()
    assert (case.costs(optimum) <= case.costs(result.codes)).all()
    assert torch.equal(case.descend(optimum).codes, optimum)  # the optimum is an equilibrium, so descent stays there
