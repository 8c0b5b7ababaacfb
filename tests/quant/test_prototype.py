"""The earlier prototype's quantizer, against a loop over its three classes."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from nashswarm.quant.pack import unpack_bits
from nashswarm.quant.prototype import CLASS_WIDTHS, KIND, ClassedTensor, quantize_by_magnitude

few = settings(max_examples=25, deadline=None)


@st.composite
def matrices(draw: st.DrawFn) -> Tensor:
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    return torch.randn(draw(st.integers(1, 20)), draw(st.integers(1, 20)), generator=generator)


def test_quantize_by_magnitude_1_to_10_has_classes_by_hand() -> None:
    weight = torch.tensor([[1.0, -2, 3, -4, 5, -6, 7, -8, 9, -10]])
    assert quantize_by_magnitude(weight, (0.9, 0.7)).classes.tolist() == [[2] * 7 + [1, 1, 0]]


@given(matrices())
@few
def test_quantize_by_magnitude_rounds_each_class_on_its_grid(weight: Tensor) -> None:
    classed = quantize_by_magnitude(weight, (0.9, 0.7))
    values = weight.double().numpy()
    large, middle = np.quantile(np.abs(weight.numpy()), (0.9, 0.7))
    members = [np.abs(values) >= large, (np.abs(values) < large) & (np.abs(values) >= middle), np.abs(values) < middle]
    back = classed.dequantize().numpy()
    for rank, (mask, width) in enumerate(zip(members, (8, 4, 2), strict=True)):
        assert ((classed.classes == rank) == mask).all()
        if mask.any():
            low, high = values[mask].min(), values[mask].max()
            levels = 2**width - 1
            step = (high - low) / levels
            by_hand = low + step * np.round((values[mask] - low) / step) if step else values[mask]
            near_a_tie = np.abs((values[mask] - low) / (step or 1) % 1 - 0.5) < 1e-4
            assert back[mask][~near_a_tie] == pytest.approx(by_hand[~near_a_tie], rel=1e-5, abs=1e-5)
            assert (np.abs(back[mask] - values[mask]) <= 0.5001 * step + 1e-6).all()
            assert classed.codes[mask].max() <= levels


def test_quantize_by_magnitude_equal_weights_get_the_widest_class() -> None:
    weight = torch.full((4, 6), -0.5)
    classed = quantize_by_magnitude(weight, (0.9, 0.7))
    assert not classed.classes.any()
    assert torch.equal(classed.dequantize(), weight)


def test_pack_has_bytes_counted_by_hand() -> None:
    """30 weights: kind, shape, three float32 grids, 2 bits of class for each, 3 codes of 8 bits, 6 of 4 and 21 of 2."""
    weight = torch.linspace(-1, 0.9, 30).view(5, 6)
    assert len(quantize_by_magnitude(weight, (0.9, 0.7)).pack()) == 4 + 8 + 24 + math.ceil(60 / 8) + 3 + 3 + 6


@given(matrices())
@few
def test_pack_holds_all_that_decoding_needs(weight: Tensor) -> None:
    tensor = quantize_by_magnitude(weight, (0.8, 0.5))
    kind, content = tensor.pack().tobytes()[:4], tensor.pack().tobytes()[4:]
    assert kind == KIND
    rows, columns = np.frombuffer(content[:8], np.uint32)
    grids = np.frombuffer(content[8:32], np.float32).reshape(3, 2)
    position = 32 + math.ceil(rows * columns / 4)
    classes = unpack_bits(content[32:position], 2)[: rows * columns]
    values = np.zeros(rows * columns, np.float32)
    for rank, width in enumerate(CLASS_WIDTHS):
        chosen = classes == rank
        size = math.ceil(chosen.sum() * width / 8)
        codes = unpack_bits(content[position : position + size], width)[: chosen.sum()]
        values[chosen] = grids[rank, 0] + codes.astype(np.float32) * grids[rank, 1]
        position += size
    assert position == len(content)
    assert np.array_equal(values.reshape(rows, columns), tensor.dequantize().numpy())


@given(matrices())
@few
def test_unpack_returns_what_was_packed(weight: Tensor) -> None:
    tensor = quantize_by_magnitude(weight, (0.9, 0.7))
    classed = ClassedTensor.unpack(tensor.pack())
    for name in ("classes", "codes", "grids"):
        assert np.array_equal(getattr(classed, name), getattr(tensor, name)), name
    assert torch.equal(classed.dequantize(), tensor.dequantize())


def test_unpack_bytes_cut_short_are_refused() -> None:
    packed = quantize_by_magnitude(torch.linspace(-1, 0.9, 30).view(5, 6), (0.9, 0.7)).pack()
    for length in range(len(KIND), len(packed)):
        with pytest.raises(ValueError, match=f"a classed matrix is cut short: {length} bytes"):
            ClassedTensor.unpack(packed[:length])
