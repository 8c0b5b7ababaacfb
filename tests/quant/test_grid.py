"""Rounding to nearest, range search and full precision, against loops over groups."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers.pytorch_utils import Conv1D

from nashswarm.quant.grid import GRID_WIDTHS, SHRINKS, TILE_ROWS, WIDTHS, QuantizedTensor, Scheme, quantize, tile_sums

few_examples = settings(max_examples=25, deadline=None)
grid_widths = st.sampled_from(GRID_WIDTHS)


@st.composite
def matrices(draw: st.DrawFn, group_size: int = 8) -> Tensor:
    """Weights of any number of rows and any usual scale, sometimes shifted to one side of 0."""
    rows, groups = draw(st.integers(1, 40)), draw(st.integers(1, 4))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    weight = torch.randn(rows, groups * group_size, generator=generator) * draw(st.sampled_from([1e-2, 1.0, 300.0]))
    return weight + draw(st.sampled_from([0.0, 0.0, 2.0, -2.0])) * weight.abs().max()


def min_max_by_hand(weight: Tensor, bits: int, group_size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Codes, scales and zero points of rounding to nearest, group by group, in float32 like ``quantize``."""
    levels, one = 2**bits - 1, np.float32(1)
    codes, scales, zeros = [], [], []
    for group in weight.numpy().reshape(-1, group_size):
        low, high = min(group.min(), 0 * one), max(group.max(), 0 * one)
        scale = np.float16((high - low) / np.float32(levels))
        inverse = one / np.float32(scale) if scale > 0 else 0 * one
        zero = np.clip(np.round(-low * inverse), 0, levels)
        codes.append(np.clip(np.round(group * inverse) + zero, 0, levels))
        scales.append(scale)
        zeros.append(zero)
    rows = len(weight)
    return np.reshape(codes, weight.shape), np.reshape(scales, (rows, -1)), np.reshape(zeros, (rows, -1))


def group_errors(weight: Tensor, tensor: QuantizedTensor, importance: Tensor | None = None) -> np.ndarray:
    """The (weighted) squared error of every group, in float64."""
    squared = (weight.double() - tensor.dequantize().double()).square()
    squared = squared if importance is None else squared * importance.double()
    return squared.view(len(weight), -1, tensor.scheme.group_size).sum(-1).numpy()


def step_by_row(tensor: QuantizedTensor) -> Tensor:
    return tensor.scale.float().repeat_interleave(tensor.scheme.group_size, 1)


@pytest.mark.parametrize(("bits", "dtype"), [(16, torch.float16), (32, torch.float32), (32, torch.float16)])
def test_quantize_at_float_width_is_bit_identical(bits: int, dtype: torch.dtype) -> None:
    weight = torch.randn(21, 16, generator=torch.Generator().manual_seed(0)).to(dtype)
    weight[0, :4] = torch.tensor([0.0, -0.0, torch.finfo(dtype).smallest_normal / 2, torch.finfo(dtype).max])
    back = quantize(weight, bits, Scheme(8)).dequantize().to(dtype)
    pattern = torch.int16 if dtype == torch.float16 else torch.int32
    assert torch.equal(back.view(pattern), weight.view(pattern))


@given(matrices())
@few_examples
def test_quantize_at_width_zero_is_zero(weight: Tensor) -> None:
    assert not quantize(weight, 0, Scheme(8)).dequantize().any()


@given(matrices(), grid_widths)
@few_examples
def test_quantize_without_search_matches_loop_over_groups(weight: Tensor, bits: int) -> None:
    tensor = quantize(weight, bits, Scheme(8))
    codes, scale, zero_point = min_max_by_hand(weight, bits, 8)
    assert np.array_equal(tensor.codes.numpy(), codes)
    assert np.array_equal(tensor.scale.numpy(), scale)
    assert np.array_equal(tensor.zero_point.numpy(), zero_point)


@given(matrices(), grid_widths, st.booleans())
@few_examples
def test_quantize_error_within_range_is_at_most_half_a_step(weight: Tensor, bits: int, symmetric: bool) -> None:
    tensor = quantize(weight, bits, Scheme(8, symmetric=symmetric))
    step, zero = step_by_row(tensor), tensor.zero_point.float().repeat_interleave(8, 1)
    inside = (weight >= -zero * step) & (weight <= ((1 << bits) - 1 - zero) * step)
    error = (weight - tensor.dequantize()).abs()
    assert (error[inside] <= 0.5001 * step[inside]).all()
    assert (error <= 1.0001 * step).all()


@given(matrices(), grid_widths)
@few_examples
def test_quantize_symmetric_has_zero_point_in_middle(weight: Tensor, bits: int) -> None:
    tensor = quantize(weight, bits, Scheme(8, symmetric=True))
    assert (tensor.zero_point == 1 << bits - 1).all()
    largest = weight.view(len(weight), -1, 8).abs().amax(-1)
    steps_on_a_side = (1 << bits - 1) - 1
    assert torch.allclose(tensor.scale.float() * steps_on_a_side, largest, rtol=1e-3)


@given(matrices(), grid_widths, st.booleans(), st.booleans())
@few_examples
def test_quantize_with_search_is_never_worse_than_min_max(
    weight: Tensor, bits: int, symmetric: bool, weighted: bool
) -> None:
    importance = weight.flip(0, 1).square() + 1e-3 if weighted else None
    searched = quantize(weight, bits, Scheme(8, search=True, symmetric=symmetric), importance)
    plain = quantize(weight, bits, Scheme(8, symmetric=symmetric))
    assert (group_errors(weight, searched, importance) <= group_errors(weight, plain, importance) * (1 + 1e-5)).all()


def search_by_hand(group: np.ndarray, importance: np.ndarray, bits: int) -> float:
    """The least weighted error of a group over all shrunken ranges, then over two least-squares refits of the scale."""
    levels = 2**bits - 1
    low, high = min(group.min(), 0), max(group.max(), 0)

    def evaluate(scale: float, zero: float) -> tuple[float, float, float, np.ndarray]:
        steps = np.clip(np.round(group / scale) + zero, 0, levels) - zero
        return float((importance * (group - scale * steps) ** 2).sum()), scale, zero, steps

    candidates = []
    for shrink in SHRINKS:
        scale = float(np.float16((high - low) * shrink / levels))
        candidates.append(evaluate(scale, np.clip(np.round(-low * shrink / scale), 0, levels)))
    best = min(candidates, key=lambda candidate: candidate[0])
    for _ in range(2):
        _, _, zero, steps = best
        refitted = float(np.float16((importance * steps * group).sum() / (importance * steps**2).sum()))
        best = min(best, evaluate(refitted, zero), key=lambda candidate: candidate[0])
    return best[0]


@pytest.mark.parametrize("bits", GRID_WIDTHS)
def test_quantize_with_weighted_search_matches_brute_force(bits: int) -> None:
    generator = torch.Generator().manual_seed(bits)
    weight = torch.randn(19, 32, generator=generator)
    importance = torch.rand(19, 32, generator=generator) ** 4
    errors = group_errors(weight, quantize(weight, bits, Scheme(16, search=True), importance), importance)
    groups, weights = weight.double().numpy().reshape(-1, 16), importance.double().numpy().reshape(-1, 16)
    by_hand = [search_by_hand(group, importances, bits) for group, importances in zip(groups, weights, strict=True)]
    assert errors.ravel() == pytest.approx(np.array(by_hand), rel=1e-3)


def test_quantize_with_zero_importance_ignores_outliers() -> None:
    weight = torch.cat([torch.linspace(-1, 1, 14), torch.tensor([-2.0, 2.0])]).view(1, 16)
    importance = torch.ones(1, 16)
    importance[0, -2:] = 0
    searched = quantize(weight, 4, Scheme(16, search=True), importance)
    blind = quantize(weight, 4, Scheme(16, search=True))
    assert group_errors(weight, searched, importance).item() < group_errors(weight, blind, importance).item()


@pytest.mark.parametrize("search", [False, True])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits", GRID_WIDTHS)
def test_quantize_constant_group_is_exact(bits: int, symmetric: bool, search: bool) -> None:
    weight = torch.tensor([0.7, -0.3, 0.0]).view(3, 1).expand(3, 8)
    back = quantize(weight, bits, Scheme(8, search, symmetric)).dequantize()
    assert torch.allclose(back, weight, rtol=1e-3, atol=0)
    assert not back[2].any()


@pytest.mark.parametrize("bits", GRID_WIDTHS)
def test_quantize_one_sided_group_uses_whole_grid(bits: int) -> None:
    weight = torch.rand(4, 16, generator=torch.Generator().manual_seed(1)) + 0.5
    positive, negative = quantize(weight, bits, Scheme(16)), quantize(-weight, bits, Scheme(16))
    assert not positive.zero_point.any()
    assert (negative.zero_point == (1 << bits) - 1).all()
    assert torch.equal(positive.dequantize(), -negative.dequantize())


@given(st.data(), st.booleans(), st.booleans())
@few_examples
def test_quantize_with_mixed_widths_equals_uniform_results_per_tile(
    data: st.DataObject, search: bool, symmetric: bool
) -> None:
    weight = data.draw(matrices())
    shape = (math.ceil(len(weight) / TILE_ROWS), weight.shape[1] // 8)
    count = shape[0] * shape[1]
    widths = data.draw(st.lists(st.sampled_from(WIDTHS), min_size=count, max_size=count))
    tiles = torch.tensor(widths).view(shape)
    scheme, importance = Scheme(8, search, symmetric), weight.abs() + 0.1
    mixed = quantize(weight, tiles, scheme, importance).dequantize()
    uniform = {width: quantize(weight, width, scheme, importance).dequantize() for width in set(widths)}
    for row in range(shape[0]):
        for group in range(shape[1]):
            here = slice(16 * row, 16 * row + 16), slice(8 * group, 8 * group + 8)
            assert torch.equal(mixed[here], uniform[int(tiles[row, group])][here])


@given(matrices(), grid_widths)
@few_examples
def test_quantize_row_is_independent_of_its_tile(weight: Tensor, bits: int) -> None:
    """The last row has the same codes alone as in its matrix, whether its row block is full or not."""
    scheme = Scheme(8, search=True)
    assert torch.equal(quantize(weight[-1:], bits, scheme).codes, quantize(weight, bits, scheme).codes[-1:])


@pytest.mark.parametrize("bits", WIDTHS)
def test_quantize_conv1d_equals_transposed_linear(bits: int) -> None:
    torch.manual_seed(0)
    convolution, linear, inputs = Conv1D(24, 16), torch.nn.Linear(16, 24), torch.randn(5, 16)
    with torch.no_grad():
        linear.weight.copy_(convolution.weight.T)
        linear.bias.copy_(convolution.bias)
        scheme = Scheme(8, search=True)
        transposed = quantize(convolution.weight.T, bits, scheme)
        straight = quantize(linear.weight, bits, scheme)
        assert torch.equal(transposed.codes, straight.codes)
        convolution.weight.copy_(transposed.dequantize().T)
        linear.weight.copy_(straight.dequantize())
        assert torch.allclose(convolution(inputs), linear(inputs), atol=1e-5)


@given(matrices(), st.sampled_from([1, 2, 4, 8]))
@few_examples
def test_tile_sums_match_slices(values: Tensor, group_size: int) -> None:
    sums = tile_sums(values, group_size)
    for row in range(sums.shape[0]):
        for group in range(sums.shape[1]):
            tile = values[16 * row : 16 * row + 16, group_size * group : group_size * (group + 1)]
            assert sums[row, group].item() == pytest.approx(tile.double().sum().item(), rel=1e-9, abs=1e-9)


def test_bits_per_weight_matches_hand_count() -> None:
    assert Scheme(64).bits_per_weight(4) == 4 + (16 + 4) / 64
    assert Scheme(128, symmetric=True).bits_per_weight(2) == 2 + 16 / 128
    assert [Scheme(64).bits_per_weight(bits) for bits in (0, 16, 32)] == [0, 16, 32]


WEIGHT = torch.ones(20, 12)


@pytest.mark.parametrize(
    ("weight", "bits", "group_size", "message"),
    [
        (WEIGHT, 4, 8, "12 columns is not divisible by group_size 8"),
        (WEIGHT, 5, 4, r"no tile format of \[5\] bits"),
        (WEIGHT, -1, 4, r"-1"),
        (WEIGHT, 300, 4, r"300"),
        (WEIGHT, torch.tensor([[4, 4, 7], [1, 4, 4]]), 4, r"no tile format of \[1, 7\] bits"),
        (WEIGHT, torch.full((2, 3), 258), 4, r"no tile format of \[258\] bits"),
        (WEIGHT * float("nan"), 4, 4, "20x12 holds weights that are not finite"),
        (WEIGHT * float("-inf"), 16, 4, "20x12 holds weights that are not finite"),
        (WEIGHT * 70000, 16, 4, "up to 7e[+]04 do not fit 16-bit floats"),
        (WEIGHT * 1e9, 4, 4, "up to 1e[+]09 need a scale beyond fp16"),
        (WEIGHT * -1e9, 4, 4, "up to 1e[+]09 need a scale beyond fp16"),
    ],
)
def test_quantize_with_invalid_argument_raises(
    weight: Tensor, bits: int | Tensor, group_size: int, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        quantize(weight, bits, Scheme(group_size))
