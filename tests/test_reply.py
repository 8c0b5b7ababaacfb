"""The codes with which a layer answers: against GPTQ as its paper states it, and against brute force."""

import itertools

import numpy as np
import pytest
import torch

from nashswarm.quant.grid import Scheme, quantize
from nashswarm.quant.reply import DAMPING, Curvature, reply

SCHEME = Scheme(8, search=True)


def correlated(columns: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(200, columns, generator=generator) @ torch.randn(columns, columns, generator=generator)
    return inputs.T @ inputs / 200


def weights(rows: int, columns: int, seed: int) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def gptq(weight: torch.Tensor, bits: int, h: torch.Tensor, diagonal: torch.Tensor) -> np.ndarray:
    """The obvious one: a row, a column and an inverse of the remaining Hessian at a time, in float64."""
    hessian = h.double() + DAMPING * h.double().diagonal().mean() * torch.eye(len(h))
    rest, found = weight.double().clone(), torch.zeros(weight.shape, dtype=torch.float64)
    for column in range(weight.shape[1]):
        if column % SCHEME.group_size == 0:
            group = slice(column, column + SCHEME.group_size)
            grids = quantize(rest[:, group].float(), bits, SCHEME, diagonal[:, group])
        inverse = torch.linalg.inv(hessian[column:, column:])
        scale, zero = grids.scale[:, 0].double(), grids.zero_point[:, 0].double()
        code = ((rest[:, column] / scale).round() + zero).clamp(0, 2**bits - 1)
        found[:, column] = (code - zero) * scale
        error = (rest[:, column] - found[:, column]) / inverse[0, 0]
        rest[:, column:] -= torch.outer(error, inverse[0])
    return found.numpy()


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_the_pass_is_gptq_wherever_it_wins(bits: int) -> None:
    weight, h = weights(24, 32, bits), correlated(32, bits)
    curved = Curvature(torch.ones(24), h, None)
    slow = gptq(weight, bits, h, curved.diagonal())
    plain = quantize(weight, bits, SCHEME, curved.diagonal()).dequantize().numpy()
    answer = reply(weight, bits, SCHEME, curved).dequantize().numpy()
    either = [min(np.abs(answer[row] - one[row]).max() for one in (slow, plain)) for row in range(24)]
    assert np.quantile(either, 0.9) < 1e-5  # a float32 tie may fall the other way now and then
    assert (np.abs(answer - plain).max(1) > 0).mean() > 0.5


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_no_row_is_worse_than_plain_rounding_and_the_layer_is_much_better(bits: int) -> None:
    weight, curved = weights(40, 32, 7), Curvature(torch.rand(40) + 0.1, correlated(32, 7), torch.rand(40, 32))
    plain = curved.damage_by_row(weight - quantize(weight, bits, SCHEME, curved.diagonal()).dequantize())
    answer = curved.damage_by_row(weight - reply(weight, bits, SCHEME, curved).dequantize())
    assert (answer <= plain).all()
    assert answer.sum() < 0.8 * plain.sum()


def test_damage_of_a_row_against_sums() -> None:
    error, h = weights(3, 8, 1), correlated(8, 1)
    curved = Curvature(torch.tensor([1.0, 2.0, 0.5]), h, torch.rand(3, 8))
    for row, found in enumerate(curved.damage_by_row(error).tolist()):
        pairs = itertools.product(range(8), repeat=2)
        products = sum(curved.rows[row] * h[i, j] * error[row, i] * error[row, j] for i, j in pairs)
        lookups = sum(curved.lookups[row, j] * error[row, j] ** 2 for j in range(8))
        assert found == pytest.approx(((products + lookups) / 2).item(), rel=1e-4)


def test_without_correlation_there_is_nothing_to_compensate() -> None:
    weight, curved = weights(16, 16, 3), Curvature(torch.ones(16), torch.diag(torch.rand(16) + 0.1), None)
    plain = quantize(weight, 3, SCHEME, curved.diagonal())
    assert torch.equal(reply(weight, 3, SCHEME, curved).dequantize(), plain.dequantize())


def test_a_matrix_that_is_only_looked_up_is_rounded_plainly() -> None:
    weight, curved = weights(16, 16, 4), Curvature(torch.zeros(16), None, torch.rand(16, 16))
    plain = quantize(weight, 3, SCHEME, curved.lookups)
    assert torch.equal(reply(weight, 3, SCHEME, curved).codes, plain.codes)


def test_pruned_tiles_stay_pruned_and_their_neighbours_make_up_for_them() -> None:
    weight, curved = weights(16, 16, 5), Curvature(torch.ones(16), correlated(16, 5), None)
    widths = torch.tensor([[0, 8]])
    answer = reply(weight, widths, SCHEME, curved).dequantize()
    plain = quantize(weight, widths, SCHEME, curved.diagonal()).dequantize()
    assert (answer[:, :8] == 0).all()
    assert curved.damage_by_row(weight - answer).sum() < curved.damage_by_row(weight - plain).sum()


def test_it_is_deterministic() -> None:
    weight, curved = weights(16, 16, 6), Curvature(torch.ones(16), correlated(16, 6), None)
    assert torch.equal(reply(weight, 2, SCHEME, curved).codes, reply(weight, 2, SCHEME, curved).codes)
