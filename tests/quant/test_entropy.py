"""Entropy coding: round trips, damaged bytes, and lengths against entropy."""

import dataclasses
import math
import struct
import zlib
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nashswarm.quant import entropy
from nashswarm.quant.container import seal, unseal
from nashswarm.quant.entropy import (
    ESCAPE,
    HIGHEST,
    LOWEST,
    TABLES,
    CodeTables,
    coded_bits,
    count_symbols,
    decode_groups,
    decode_lattice,
    encode_groups,
    encode_lattice,
    fit_tables,
)
from nashswarm.quant.grid import GRID_WIDTHS, QuantizedTensor, Scheme, quantize
from nashswarm.quant.integer_code import TOTAL, decode_integers, encode_integers
from nashswarm.quant.lattice import Lattice, LatticeTensor
from tests.quant.laplace import LAPLACE

few_examples = settings(max_examples=40, deadline=None)
INT8 = st.integers(-128, 127)


def flat(rows: int, columns: int, level: int = 0) -> Lattice:
    """A lattice of equal steps that expects codes of magnitude 2^(level/2) everywhere."""
    zero = torch.zeros(max(rows, columns), dtype=torch.int8)
    return Lattice(1.0, zero[:rows], zero[:columns], zero[:rows] + level, zero[:columns])


@st.composite
def lattice_tensors(draw: st.DrawFn) -> LatticeTensor:
    """Any shape; codes small, of many sizes, huge or all zero; steps and sizes fitted to the codes, or random."""
    rows, columns = draw(st.integers(1, 35)), draw(st.integers(1, 35))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    largest = draw(st.sampled_from([0, 1, 60, 5000, 2**31 - 1]))
    octaves = rng.random((rows, columns)) * np.log2(largest + 1)
    codes = np.minimum(2.0**octaves - 1, largest).astype(np.int64) * rng.choice([-1, 1], (rows, columns))
    base = float(np.float32(draw(st.floats(1e-6, 1e3))))
    if draw(st.booleans()):
        sides = [torch.from_numpy(rng.integers(-128, 128, size).astype(np.int8)) for size in (rows, columns) * 2]
        lattice = Lattice(base, *sides)
    else:
        lattice = dataclasses.replace(flat(rows, columns), base=base).fit_sizes(torch.from_numpy(np.abs(codes)).float())
    return LatticeTensor(torch.from_numpy(codes.astype(np.int32)), lattice)


@st.composite
def grouped_tensors(draw: st.DrawFn) -> QuantizedTensor:
    """Matrices of odd shapes and group sizes, of one width or several, sometimes with pruned tiles."""
    rows, groups, group_size = draw(st.integers(1, 50)), draw(st.integers(1, 5)), draw(st.sampled_from([1, 3, 8, 64]))
    kinds = sorted(draw(st.sets(st.sampled_from([0, *GRID_WIDTHS]), min_size=1)))
    tiles = math.ceil(rows / 16) * groups
    widths = draw(st.lists(st.sampled_from(kinds), min_size=tiles, max_size=tiles))
    weight = torch.randn(rows, groups * group_size, generator=torch.Generator().manual_seed(draw(st.integers(0, 99))))
    weight *= draw(st.sampled_from([0.0, 1e-3, 1.0, 1e3]))
    return quantize(weight, torch.tensor(widths).view(-1, groups), Scheme(group_size, symmetric=draw(st.booleans())))


def assert_same(decoded: LatticeTensor, tensor: LatticeTensor) -> None:
    assert decoded.codes.dtype == torch.int32 and torch.equal(decoded.codes, tensor.codes.int())
    assert decoded.lattice.base == tensor.lattice.base
    for name in ("row_scale", "column_scale", "row_size", "column_size"):
        decoded_part, part = getattr(decoded.lattice, name), getattr(tensor.lattice, name)
        assert decoded_part.dtype == part.dtype == torch.int8 and torch.equal(decoded_part, part), name
    assert torch.equal(decoded.dequantize(), tensor.dequantize())


@given(lattice_tensors(), st.booleans())
@few_examples
def test_decode_lattice_inverts_encode_lattice(tensor: LatticeTensor, fitted: bool) -> None:
    tables = fit_tables(count_symbols([tensor])) if fitted else LAPLACE
    assert_same(decode_lattice(encode_lattice(tensor, tables), tables), tensor)


@pytest.mark.parametrize("shape", [(1, 1), (1, 300), (300, 1), (17, 31)])
@pytest.mark.parametrize("value", [0, 1, -1, ESCAPE - 1, -ESCAPE, 2**31 - 1, -(2**31 - 1)])
@pytest.mark.parametrize("level", [-20, 0, HIGHEST, HIGHEST + 1, 13, 60])
def test_decode_lattice_inverts_constant_matrix(shape: tuple[int, int], value: int, level: int) -> None:
    tensor = LatticeTensor(torch.full(shape, value, dtype=torch.int32), flat(*shape, level))
    assert_same(decode_lattice(encode_lattice(tensor, LAPLACE), LAPLACE), tensor)


@given(grouped_tensors())
@few_examples
def test_decode_groups_inverts_encode_groups(tensor: QuantizedTensor) -> None:
    decoded = decode_groups(encode_groups(tensor))
    assert decoded.scheme == tensor.scheme
    for name in ("codes", "scale", "zero_point", "bits"):
        decoded_part, original = getattr(decoded, name), getattr(tensor, name)
        assert decoded_part.dtype == original.dtype and torch.equal(decoded_part, original), name


@given(
    st.one_of(
        st.lists(INT8, max_size=300),
        st.lists(st.integers(-(2**31), -(2**31) + 1000), max_size=20),
        st.lists(st.integers(0, 2**16 - 1), max_size=20),
    )
)
@few_examples
def test_decode_integers_inverts_encode_integers(values: list[int]) -> None:
    coded = encode_integers(np.array(values, np.int64))
    assert decode_integers(coded).tolist() == values
    assert (coded == b"") == (values == [])


def test_encode_integers_with_rare_values_is_short_and_invertible() -> None:
    values = np.repeat([-100, 3, 4, 127], [1, 1_000_000, 1, 7])
    np.random.default_rng(0).shuffle(values)
    coded = encode_integers(values)
    assert np.array_equal(decode_integers(coded), values)
    assert len(coded) < 400  # 9 in a million are not the most frequent value


def test_encode_integers_with_too_wide_range_raises() -> None:
    assert decode_integers(encode_integers(np.array([0, 2**16 - 1]))).tolist() == [0, 2**16 - 1]
    with pytest.raises(ValueError, match="integers from 0 to 65536 are too many kinds"):
        encode_integers(np.array([0, 2**16]))


def gaussian(rows: int, columns: int, spread: float, seed: int = 0) -> LatticeTensor:
    """Rounded normal codes with rows and columns of very different size, on a lattice with fitted sizes."""
    generator = torch.Generator().manual_seed(seed)
    sizes = (torch.randn(rows, 1, generator=generator) + torch.randn(columns, generator=generator)).exp()
    codes = (spread * sizes * torch.randn(rows, columns, generator=generator)).round().int()
    return LatticeTensor(codes, flat(rows, columns).fit_sizes(codes.abs().float()))


EXAMPLES: dict[str, tuple[Callable[[], np.ndarray], Callable[[np.ndarray], object]]] = {
    "lattice": (lambda: encode_lattice(gaussian(9, 21, 5.0), LAPLACE), lambda packed: decode_lattice(packed, LAPLACE)),
    "groups": (lambda: encode_groups(quantize(torch.randn(17, 24), 3, Scheme(8))), decode_groups),
    "tables": (LAPLACE.pack, CodeTables.unpack),
}


@pytest.mark.parametrize("kind", EXAMPLES)
def test_decode_with_flipped_bit_raises(kind: str) -> None:
    encode, decode = EXAMPLES[kind]
    packed = encode()
    for place in [*range(min(16, len(packed))), *range(16, len(packed), 7), len(packed) - 1]:
        for bit in (0, 3, 7):
            damaged = packed.copy()
            damaged[place] ^= 1 << bit
            with pytest.raises(ValueError, match=r"damaged|begin with"):
                decode(damaged)


@pytest.mark.parametrize("kind", EXAMPLES)
def test_decode_with_wrong_length_raises(kind: str) -> None:
    encode, decode = EXAMPLES[kind]
    packed = encode()
    for length in [*range(16), *range(16, len(packed), 11), len(packed) - 1]:
        with pytest.raises(ValueError, match=r"damaged|begin with"):
            decode(packed[:length])
    with pytest.raises(ValueError, match="damaged"):
        decode(np.append(packed, np.uint8(0)))


def resealed(packed: np.ndarray, place: int, value: int) -> np.ndarray:
    """Change an integer behind the checksum, and mend that."""
    body = bytearray(packed[8:].tobytes())
    body[place : place + 4] = value.to_bytes(4, "little")
    return np.frombuffer(packed[:4].tobytes() + zlib.crc32(body).to_bytes(4, "little") + body, np.uint8)


@pytest.mark.parametrize("kind", EXAMPLES)
@pytest.mark.parametrize("place", [0, 4])
def test_decode_with_lengths_that_do_not_fit_raises_before_any_allocation(kind: str, place: int) -> None:
    encode, decode = EXAMPLES[kind]
    for value in (0, 1, 2**31, 2**32 - 1):
        if value != int.from_bytes(encode()[8 + place :][:4].tobytes(), "little"):
            with pytest.raises(ValueError, match="not as long as they claim: the file is damaged"):
                decode(resealed(encode(), place, value))


@pytest.mark.parametrize(("kind", "parts"), [("lattice", 9), ("groups", 6)])
def test_decode_with_rows_that_do_not_fit_raises_before_any_allocation(kind: str, parts: int) -> None:
    encode, decode = EXAMPLES[kind]
    for rows in (0, 1, 2**31, 2**32 - 1):
        with pytest.raises(ValueError, match="damaged"):
            decode(resealed(encode(), 4 * (parts + 1), rows))


def test_decode_groups_with_tags_of_no_width_raises() -> None:
    packed = EXAMPLES["groups"][0]()
    with pytest.raises(ValueError, match="tags of an unknown kind: the file is damaged"):
        decode_groups(resealed(packed, 4 * 7 + 11, 0xFFFFFFFF))  # after the lengths of six parts and the head


def test_decode_tables_with_frequencies_of_another_sum_raises() -> None:
    with pytest.raises(ValueError, match=f"not above 0 with the sum {TOTAL}"):
        CodeTables.unpack(CodeTables(LAPLACE.frequencies + 1).pack())


def test_decode_integers_of_another_number_raises() -> None:
    coded = encode_integers(np.arange(9))
    assert decode_integers(coded, 9).tolist() == list(range(9))
    for wrong, number in ((coded, 8), (b"", 1), (coded[:5], None)):
        with pytest.raises(ValueError, match="damaged"):
            decode_integers(wrong, number)


def test_decode_lattice_compares_all_counts_before_it_decodes_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows that the shape and their own part claim alike, 268 million of them, took eleven seconds to decode."""
    tensor = gaussian(4, 6, 1.0)
    shape, *parts = unseal("lattice", encode_lattice(tensor, LAPLACE))
    many = struct.pack("<I", 1 << 28)
    changed = seal("lattice", many + shape[4:], many + parts[0][4:], *parts[1:])
    monkeypatch.setattr(entropy, "decode_integers", lambda *_: pytest.fail("something was decoded"))
    with pytest.raises(ValueError, match="4 coded integers stand where 268435456 belong"):
        decode_lattice(changed, LAPLACE)


@pytest.mark.parametrize("kind", EXAMPLES)
def test_decode_with_other_kind_raises(kind: str) -> None:
    for other, (encode, _) in EXAMPLES.items():
        if other != kind:
            with pytest.raises(ValueError, match=f"entropy-coded {kind} begin with"):
                EXAMPLES[kind][1](encode())


@given(st.integers(0, 2**32), st.sampled_from([0.0, 0.1, 1.0]), st.sampled_from([1e-9, 1.0, 1e12]))
@few_examples
def test_fit_tables_keeps_total_and_every_symbol(seed: int, share: float, largest: float) -> None:
    rng = np.random.default_rng(seed)
    counts = largest ** rng.random((TABLES, ESCAPE + 1)) * (rng.random((TABLES, ESCAPE + 1)) < share)
    tables = fit_tables(counts)
    assert (tables.frequencies.sum(1) == TOTAL).all() and (tables.frequencies >= 1).all()
    ideal = (counts + 0.1) / (counts + 0.1).sum(1, keepdims=True)
    others = np.ones(counts.shape, bool)
    others[np.arange(TABLES), ideal.argmax(1)] = False  # the most frequent symbol gets what rounding leaves over
    assert (np.abs(tables.frequencies - ideal * TOTAL)[others] <= 1 + (ESCAPE + 1) * ideal[others]).all()
    assert np.array_equal(CodeTables.unpack(tables.pack()).frequencies, tables.frequencies)


def test_table_bits_equal_rarity_plus_sign_and_escape() -> None:
    bits, table = LAPLACE.bits(), 4
    for magnitude in range(ESCAPE + 1):
        rarity = -math.log2(LAPLACE.frequencies[table, magnitude] / 2**14)
        extra = (magnitude > 0) + 32 * (magnitude == ESCAPE)
        assert bits[table, magnitude] == pytest.approx(rarity + extra)


def slow_table_and_shift(level: int) -> tuple[int, int]:
    shift = 0
    while level > HIGHEST:
        level, shift = level - 2, shift + 1
    return max(level, LOWEST) - LOWEST, shift


def test_table_and_shift_matches_loop() -> None:
    levels = torch.arange(-40, 60)
    table, shift = entropy.table_and_shift(levels)
    assert list(zip(table.tolist(), shift.tolist(), strict=True)) == [
        slow_table_and_shift(level) for level in range(-40, 60)
    ]


@given(lattice_tensors())
@few_examples
def test_count_symbols_and_coded_bits_match_loop(tensor: LatticeTensor) -> None:
    counts, bits, lengths = np.zeros((TABLES, ESCAPE + 1)), LAPLACE.bits(), []
    levels = tensor.lattice.levels().tolist()
    for row, codes in zip(levels, tensor.codes.tolist(), strict=True):
        lengths.append(0.0)
        for level, code in zip(row, codes, strict=True):
            table, shift = slow_table_and_shift(level)
            symbol = min(abs(code) >> shift, ESCAPE)
            counts[table, symbol] += 1
            separate_sign = symbol == 0 and code != 0  # the lengths in the table include the sign of all other symbols
            lengths[-1] += bits[table, symbol] + shift + separate_sign
    assert np.array_equal(count_symbols([tensor]), counts)
    assert np.array_equal(count_symbols([tensor, tensor]), 2 * counts)
    assert coded_bits(tensor, LAPLACE).tolist() == pytest.approx(lengths, rel=1e-5)


@pytest.mark.parametrize("spread", [0.02, 0.3, 2.0, 100.0])
def test_coded_bits_equal_length_of_file(spread: float) -> None:
    tensor = gaussian(300, 400, spread)
    tables = fit_tables(count_symbols([tensor]))
    sides = (getattr(tensor.lattice, name) for name in ("row_scale", "column_scale", "row_size", "column_size"))
    header = 4 + 4 + 4 * 9 + 12 + sum(len(encode_integers(side.numpy())) for side in sides)
    expected = coded_bits(tensor, tables).sum().item() / 8
    assert len(encode_lattice(tensor, tables)) - header == pytest.approx(expected, rel=0.01, abs=12)


@pytest.mark.parametrize("ratio", [0.05, 0.3, 0.7, 0.9])
def test_encode_lattice_of_geometric_codes_reaches_entropy(ratio: float) -> None:
    """P(c) ∝ ratio^|c|: zero has no sign, and the tables are fitted to the codes themselves."""
    chances = ratio ** np.abs(np.arange(-40, 41))
    chances /= chances.sum()
    codes = np.random.default_rng(0).choice(np.arange(-40, 41), (400, 500), p=chances).astype(np.int32)
    lattice = flat(400, 500).fit_sizes(torch.from_numpy(np.abs(codes)).float())
    tensor = LatticeTensor(torch.from_numpy(codes), lattice)
    tables = fit_tables(count_symbols([tensor]))
    ideal = -(chances * np.log2(chances)).sum() * codes.size / 8
    length = len(encode_lattice(tensor, tables))
    assert 0.99 * ideal < length < 1.02 * ideal + 400
    assert len(tables.pack()) < 1000


def test_encode_lattice_with_fitted_sizes_is_shorter() -> None:
    tensor = gaussian(200, 300, 2.0)
    blind = LatticeTensor(tensor.codes, flat(200, 300, level=3))
    long, short = (len(encode_lattice(one, fit_tables(count_symbols([one])))) for one in (blind, tensor))
    assert short < 0.8 * long


@pytest.mark.parametrize("bits", GRID_WIDTHS)
def test_encode_groups_reaches_entropy_of_each_part(bits: int) -> None:
    tensor = quantize(torch.randn(160, 512, generator=torch.Generator().manual_seed(bits)), bits, Scheme(64))
    halves = tensor.scale.numpy().view(np.uint8).reshape(-1, 2)
    ideal = 0.0
    for part in (tensor.codes.numpy(), halves[:, 0], halves[:, 1], tensor.zero_point.numpy()):
        shares = np.unique(part, return_counts=True)[1] / part.size
        ideal -= part.size * (shares * np.log2(shares)).sum() / 8
    assert 0.99 * ideal < len(encode_groups(tensor)) < 1.02 * ideal + 500
    assert len(encode_groups(tensor)) < 160 * 512 * (bits + 24 / 64) / 8


def test_laplace_tables_have_mean_of_their_level() -> None:
    for table in range(TABLES):
        mean = LAPLACE.probabilities(table) @ np.arange(ESCAPE + 1)
        wanted = 2.0 ** ((table + LOWEST) / 2)
        assert mean == pytest.approx(wanted, rel=0.06, abs=0.08)  # 48 rare symbols of 2⁻¹⁴ each, whatever the level
