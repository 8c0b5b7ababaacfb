"""Packing: round trips, sizes counted by hand, and invalid bytes."""

import dataclasses
import math
import struct

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nashswarm.quant.grid import GRID_WIDTHS, WIDTHS, QuantizedTensor, Scheme, quantize
from nashswarm.quant.pack import (
    HEADER,
    VERSION,
    pack,
    pack_bits,
    packed_bytes,
    run_lengths,
    tag_runs,
    unpack,
    unpack_bits,
)

few_examples = settings(max_examples=20, deadline=None)


@st.composite
def tensors(draw: st.DrawFn) -> QuantizedTensor:
    """Matrices of odd shapes and group sizes, of one width or several."""
    rows, groups, group_size = draw(st.integers(1, 50)), draw(st.integers(1, 5)), draw(st.sampled_from([1, 3, 8, 64]))
    count = math.ceil(rows / 16) * groups
    some = draw(st.sets(st.sampled_from(WIDTHS), min_size=1))
    widths = draw(st.lists(st.sampled_from(sorted(some)), min_size=count, max_size=count))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    weight = torch.randn(rows, groups * group_size, generator=generator)
    return quantize(weight, torch.tensor(widths).view(-1, groups), Scheme(group_size, symmetric=draw(st.booleans())))


def assert_same(unpacked: QuantizedTensor, tensor: QuantizedTensor) -> None:
    assert unpacked.scheme == tensor.scheme
    for name in ("codes", "scale", "zero_point", "bits"):
        unpacked_part, original = getattr(unpacked, name), getattr(tensor, name)
        assert unpacked_part.dtype == original.dtype, name
        assert torch.equal(unpacked_part, original), name
    assert torch.equal(unpacked.dequantize(), tensor.dequantize())


@given(tensors())
@few_examples
def test_unpack_inverts_pack(tensor: QuantizedTensor) -> None:
    assert_same(unpack(pack(tensor)), tensor)


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits", WIDTHS)
def test_unpack_inverts_pack_for_each_width(bits: int, symmetric: bool) -> None:
    weight = torch.randn(37, 24, generator=torch.Generator().manual_seed(bits))
    tensor = quantize(weight, bits, Scheme(8, symmetric=symmetric))
    assert_same(unpack(pack(tensor)), tensor)


@given(tensors())
@few_examples
def test_packed_bytes_equals_length_of_pack(tensor: QuantizedTensor) -> None:
    assert packed_bytes(tensor.bits.flatten().numpy(), tensor.scheme) == len(pack(tensor))


def test_pack_size_matches_hand_count() -> None:
    """20×128 weights in four tiles of 2, 4, 0 and 3 bits; the lower two tiles are padded from 4 rows to 16."""
    tensor = quantize(torch.randn(20, 128), torch.tensor([[2, 4], [0, 3]]), Scheme(64))
    header, tags = 16, 4 * 2
    codes = 16 * 64 * (2 + 4 + 0 + 3) // 8
    scales, zero_points = 3 * 16 * 2, 16 * (2 + 4 + 3) // 8
    assert len(pack(tensor)) == header + tags + codes + scales + zero_points == 1290
    assert 8 * len(pack(tensor)) / (20 * 128) == 4.03125


@given(st.lists(st.integers(0, 255), max_size=40), st.integers(1, 8))
@few_examples
def test_pack_bits_equals_one_big_integer(codes: list[int], bits: int) -> None:
    low = [code % 2**bits for code in codes]
    number = sum(code << bits * place for place, code in enumerate(low))
    assert pack_bits(np.array(codes, np.uint8), bits) == number.to_bytes(math.ceil(len(codes) * bits / 8), "little")


@given(st.lists(st.integers(0, 7), min_size=8, max_size=8), st.integers(0, 5))
@few_examples
def test_unpack_bits_inverts_pack_bits(codes: list[int], times: int) -> None:
    stream = np.array(codes * times, np.uint8)
    assert np.array_equal(unpack_bits(pack_bits(stream, 3), 3), stream)


def expanded(tags: np.ndarray) -> list[int]:
    """The widths that run-length tags stand for."""
    return [width for tag in tags.tolist() for width in [WIDTHS[tag % 8]] * (tag // 8 + 1)]


@given(st.lists(st.tuples(st.sampled_from(WIDTHS), st.sampled_from([1, 2, 3, 8191, 8192, 8193, 20000])), max_size=5))
@few_examples
def test_tag_runs_expand_to_widths(runs: list[tuple[int, int]]) -> None:
    widths = [width for width, length in runs for _ in range(length)]
    assert expanded(tag_runs(np.array(widths, np.int64))) == widths


def test_tag_runs_splits_runs_above_8192_tiles() -> None:
    assert [len(tag_runs(np.full(tiles, 4))) for tiles in (1, 8192, 8193, 16384, 16385)] == [1, 1, 2, 2, 3]


@given(st.lists(st.integers(-2, 2), max_size=20))
@few_examples
def test_run_lengths_match_loop(values: list[int]) -> None:
    runs: list[list[int]] = []
    for value in values:
        if runs and runs[-1][0] == value:
            runs[-1][1] += 1
        else:
            runs.append([value, 1])
    values_and_lengths = run_lengths(np.array(values, np.int64))
    assert [list(run) for run in zip(*(part.tolist() for part in values_and_lengths), strict=True)] == runs


def test_unpack_inverts_pack_with_runs_of_several_tags() -> None:
    widths = torch.full((1, 20000), 3)
    widths[0, 17000:17010] = 2
    tensor = quantize(torch.randn(16, 20000), widths, Scheme(1))
    packed = pack(tensor)
    assert HEADER.unpack_from(packed.tobytes())[-1] == 5  # 8192 + 8192 + 616 of 3 bits, 10 of 2, 2990 of 3
    assert len(packed) == packed_bytes(widths.flatten().numpy(), tensor.scheme)
    assert_same(unpack(packed), tensor)


def example() -> np.ndarray:
    """The bytes of a small matrix with every kind of tile."""
    widths = torch.tensor([WIDTHS, WIDTHS[::-1]])
    return pack(quantize(torch.randn(17, 7, generator=torch.Generator().manual_seed(0)), widths, Scheme(1)))


def test_unpack_with_truncated_bytes_raises() -> None:
    packed = example()
    for length in range(len(packed)):
        with pytest.raises(ValueError, match=r"needs at least 16 bytes|cut short"):
            unpack(packed[:length])


def test_unpack_with_trailing_bytes_raises() -> None:
    with pytest.raises(ValueError, match="17x7 matrix has 2 bytes too many"):
        unpack(np.append(example(), np.zeros(2, np.uint8)))


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        (0, VERSION + 1, f"version {VERSION + 1}; this program reads version {VERSION}"),
        (4, 33, "describe 14 tiles, not 21"),  # three row blocks instead of two
        (12, 12, "describe 13 tiles, not 14"),  # one tag fewer
        (HEADER.size, 7, "7"),  # tag 7 is not a width
        (2, 0, "group size"),
    ],
)
def test_unpack_with_damaged_header_raises(place: int, value: int, message: str) -> None:
    packed = example().copy()
    packed[place] = value
    with pytest.raises(ValueError, match=message):
        unpack(packed)


def test_pack_header_describes_matrix() -> None:
    assert struct.unpack("<BBHIII", example()[:16].tobytes()) == (VERSION, 0, 1, 17, 7, 13)  # 32 meets 32 in the middle


@pytest.mark.parametrize("bits", GRID_WIDTHS)
def test_packed_bytes_of_symmetric_scheme_lack_zero_points(bits: int) -> None:
    widths = np.full(6, bits)
    saved = packed_bytes(widths, Scheme(8)) - packed_bytes(widths, Scheme(8, symmetric=True))
    assert saved == 6 * 16 * bits // 8


def test_pack_does_not_store_search() -> None:
    """The file does not say how the ranges were chosen."""
    tensor = quantize(torch.randn(16, 8), 4, Scheme(8, search=True))
    assert_same(unpack(pack(tensor)), dataclasses.replace(tensor, scheme=Scheme(8)))
