"""Entropy-coded storage: codes ↔ bytes, the code tables and headers counted.

The magnitude of a lattice code is coded by the table of its level, its sign and what a level shifts out as plain bits.
The tables belong to the whole model: a code that many players use becomes cheaper for everybody, which makes the codes
a congestion game in which company helps (Rosenthal 1973).  The coder is an asymmetric numeral system (Duda 2009) of the
``constriction`` library (Bamler 2022).
"""

import dataclasses
import itertools
import struct
import zlib
from collections.abc import Iterable
from typing import Any

import constriction
import numpy as np
import torch
from jaxtyping import Float, Integer, UInt8
from torch import Tensor

from nashswarm.quant.grid import GRID_WIDTHS, TILE_ROWS, QuantizedTensor, Scheme, row_blocks
from nashswarm.quant.lattice import Lattice, LatticeTensor
from nashswarm.quant.pack import matrix, tag_runs, tiles, widths_of

LOWEST, HIGHEST = -12, 5  # levels with a table of their own; above, low bits are stored plainly
TABLES = HIGHEST - LOWEST + 1
ESCAPE = 48  # the symbol of magnitudes from here on, which are stored whole
TOTAL = 1 << 14  # of a table's frequencies
KINDS = {"lattice": b"NSl1", "groups": b"NSg1", "tables": b"NSt1"}
SHAPE = struct.Struct("<IIf")  # rows, columns, base
GROUPS = struct.Struct("<IIH?")  # rows, columns, group size, symmetric
INTEGERS = struct.Struct("<IiH")  # how many, the least, bytes of the table
COUNT = struct.Struct("<I")


@dataclasses.dataclass(frozen=True)
class CodeTables:
    """Frequencies of the magnitudes 0 to 47 and of an escape, one table a level, each summing to 2¹⁴."""

    frequencies: Integer[np.ndarray, "tables symbols"]

    def probabilities(self, table: int) -> Float[np.ndarray, " symbols"]:
        return self.frequencies[table] / TOTAL

    def bits(self) -> Float[np.ndarray, "tables symbols"]:
        """The length of every magnitude's code, its sign included, in bits."""
        signs = np.arange(ESCAPE + 1) > 0
        escape = 32.0 * (np.arange(ESCAPE + 1) == ESCAPE)
        return -np.log2(self.frequencies / TOTAL) + signs + escape

    def pack(self) -> UInt8[np.ndarray, " bytes"]:
        return _sealed("tables", zlib.compress(self.frequencies.astype(np.uint16).tobytes(), 9))

    @staticmethod
    def unpack(packed: UInt8[np.ndarray, " bytes"]) -> "CodeTables":
        """Raises ValueError if the bytes are damaged."""
        frequencies = np.frombuffer(zlib.decompress(_opened("tables", packed)[0]), np.uint16).astype(np.int64)
        return CodeTables(frequencies.reshape(TABLES, ESCAPE + 1))


def fit_tables(counts: Float[np.ndarray, "tables symbols"]) -> CodeTables:
    """Tables in proportion to ``counts``; every symbol keeps a frequency of at least 1."""
    smooth = counts + 0.1
    free = TOTAL - smooth.shape[1]
    shares = smooth / smooth.sum(1, keepdims=True) * free
    frequencies = np.floor(shares).astype(np.int64) + 1
    frequencies[np.arange(len(shares)), shares.argmax(1)] += TOTAL - frequencies.sum(1)
    return CodeTables(frequencies)


def table_and_shift(levels: Integer[Tensor, "*shape"]) -> tuple[Integer[Tensor, "*shape"], Integer[Tensor, "*shape"]]:
    """(table, shift) of every level: how many low bits of the magnitude are stored plainly."""
    shift = ((levels - HIGHEST + 1) >> 1).clamp(min=0)
    return (levels - 2 * shift).clamp(min=LOWEST) - LOWEST, shift


def count_symbols(tensors: Iterable[LatticeTensor]) -> Float[np.ndarray, "tables symbols"]:
    """How often every table codes every symbol."""
    total = torch.zeros(TABLES * (ESCAPE + 1), dtype=torch.int64)
    for tensor in tensors:
        table, shift = table_and_shift(tensor.lattice.levels())
        symbols = (tensor.codes.abs() >> shift).clamp(max=ESCAPE)
        total += torch.bincount((table * (ESCAPE + 1) + symbols).flatten(), minlength=len(total))
    return total.view(TABLES, ESCAPE + 1).double().numpy()


def code_lengths(
    codes: Integer[Tensor, "out in"], levels: Integer[Tensor, "out in"], tables: CodeTables
) -> Float[Tensor, "out in"]:
    """The length of every code in bits."""
    table, shift = table_and_shift(levels)
    magnitudes = codes.abs()
    symbols = (magnitudes >> shift).clamp(max=ESCAPE)
    bits = torch.from_numpy(tables.bits()).float().to(codes.device).take((table * (ESCAPE + 1) + symbols).long())
    if shift.any():
        bits += shift + ((magnitudes > 0) & (symbols == 0))
    return bits


def coded_bits(tensor: LatticeTensor, tables: CodeTables) -> Float[Tensor, " out"]:
    """The length of every row's codes in bits, scales and headers aside."""
    return code_lengths(tensor.codes, tensor.lattice.levels(), tables).sum(1, dtype=torch.float64)


def encode_lattice(tensor: LatticeTensor, tables: CodeTables) -> UInt8[np.ndarray, " bytes"]:
    """The stored bytes of a lattice tensor, to be decoded with the same tables."""
    lattice = tensor.lattice
    table, shift = (part.flatten().numpy() for part in table_and_shift(lattice.levels()))
    codes = tensor.codes.flatten().numpy()
    magnitudes = np.abs(codes)
    symbols = np.minimum(magnitudes >> shift, ESCAPE)
    coder = constriction.stream.stack.AnsCoder()
    for used in np.unique(table)[::-1].tolist():
        coder.encode_reverse(symbols[table == used], _model(tables.probabilities(used)))
    escaped = symbols == ESCAPE
    low = [_planes(magnitudes[(shift == size) & ~escaped], size) for size in range(1, int(shift.max()) + 1)]
    sides = (lattice.row_scale, lattice.column_scale, lattice.row_size, lattice.column_size)
    return _sealed(
        "lattice",
        SHAPE.pack(*tensor.codes.shape, lattice.base),
        *(encode_integers(side.numpy()) for side in sides),
        coder.get_compressed().astype("<u4").tobytes(),
        np.packbits(np.concatenate([np.zeros(0, np.uint8), *low])).tobytes(),
        np.packbits(codes[codes != 0] < 0).tobytes(),
        magnitudes[escaped].astype("<u4").tobytes(),
    )


def decode_lattice(packed: UInt8[np.ndarray, " bytes"], tables: CodeTables) -> LatticeTensor:
    """The tensor that ``encode_lattice`` turned into these bytes.  Raises ValueError if they are damaged or of another
    kind."""
    shape, *sides, words, low, signs, escapes = _opened("lattice", packed)
    rows, columns, base = SHAPE.unpack(shape)
    lattice = Lattice(base, *(torch.from_numpy(decode_integers(side).astype(np.int8)) for side in sides))
    table, shift = (part.flatten().numpy() for part in table_and_shift(lattice.levels()))
    coder = constriction.stream.stack.AnsCoder(np.frombuffer(words, "<u4").astype(np.uint32))
    symbols = np.zeros(rows * columns, np.int64)
    for used in np.unique(table).tolist():
        symbols[table == used] = coder.decode(_model(tables.probabilities(used)), int((table == used).sum()))
    escaped = symbols == ESCAPE
    codes = symbols << shift
    codes[escaped] = np.frombuffer(escapes, "<u4")
    planes = np.unpackbits(np.frombuffer(low, np.uint8))
    for size in range(1, int(shift.max()) + 1):
        chosen = (shift == size) & ~escaped
        own, planes = np.split(planes, [size * int(chosen.sum())])
        codes[chosen] |= _from_planes(own, size)
    negative = np.unpackbits(np.frombuffer(signs, np.uint8))[: np.count_nonzero(codes)].astype(bool)
    codes[np.flatnonzero(codes)[negative]] *= -1
    return LatticeTensor(torch.from_numpy(codes.reshape(rows, columns).astype(np.int32)), lattice)


def encode_groups(tensor: QuantizedTensor) -> UInt8[np.ndarray, " bytes"]:
    """The stored bytes of a tensor with one scale a group; codes and zero points of every width have a table of their
    own, scales are split into bytes."""
    flat_bits = tensor.bits.flatten().numpy()
    if unknown := set(flat_bits.tolist()) - {0, *GRID_WIDTHS}:
        raise ValueError(f"tiles of {sorted(unknown)} bits hold floats, not codes: pack them instead")
    codes, scale, zero_point = (
        tiles(part, tensor.bits.shape[1]) for part in (tensor.codes, tensor.scale, tensor.zero_point)
    )
    parts = [
        GROUPS.pack(*tensor.codes.shape, tensor.scheme.group_size, tensor.scheme.symmetric),
        tag_runs(flat_bits).tobytes(),
    ]
    for width in GRID_WIDTHS:
        chosen = flat_bits == width
        if chosen.any():
            halves = scale[chosen].view(np.uint8).reshape(-1, 2)
            parts += [encode_integers(part) for part in (halves[:, 0], halves[:, 1], zero_point[chosen].ravel())]
            parts.append(encode_integers(codes[chosen].ravel()))
    return _sealed("groups", *parts)


def decode_groups(packed: UInt8[np.ndarray, " bytes"]) -> QuantizedTensor:
    """The tensor that ``encode_groups`` turned into these bytes.  Raises ValueError if they are damaged or of another
    kind."""
    head, tags, *parts = _opened("groups", packed)
    rows, columns, group_size, symmetric = GROUPS.unpack(head)
    flat_bits = widths_of(np.frombuffer(tags, np.uint16))
    shape = (row_blocks(rows), columns // group_size)
    codes = np.zeros((len(flat_bits), TILE_ROWS, group_size), np.uint8)
    scale = np.zeros((len(flat_bits), TILE_ROWS, 1), np.float16)
    zero_point = np.zeros((len(flat_bits), TILE_ROWS, 1), np.uint8)
    remaining = iter(parts)
    for width in GRID_WIDTHS:
        chosen = flat_bits == width
        if chosen.any():
            low, high, zeros, own = (decode_integers(next(remaining)).astype(np.uint8) for _ in range(4))
            scale[chosen] = np.stack([low, high], 1).copy().view(np.float16).reshape(-1, TILE_ROWS, 1)
            zero_point[chosen] = zeros.reshape(-1, TILE_ROWS, 1)
            codes[chosen] = own.reshape(-1, TILE_ROWS, group_size)
    bits = torch.from_numpy(flat_bits.reshape(shape))
    return QuantizedTensor(
        matrix(codes, shape, rows),
        matrix(scale, shape, rows),
        matrix(zero_point, shape, rows),
        bits,
        Scheme(group_size, symmetric=symmetric),
    )


def encode_integers(values: Integer[np.ndarray, " n"]) -> bytes:
    """A table of how often each value between the least and the largest occurs, and the values by it.

    Raises ValueError for a range of more than 2¹⁶ values.
    """
    if not len(values):
        return b""
    values = values.astype(np.int64)
    least = int(values.min())
    counts = np.bincount(values - least)
    if len(counts) > 1 << 16:
        raise ValueError(f"integers from {least} to {least + len(counts) - 1} are too many kinds for one table")
    logs = np.where(counts > 0, np.ceil(8 * np.log2(np.maximum(counts, 1) / counts.max() * TOTAL).clip(1)), 0)
    coder = constriction.stream.stack.AnsCoder()
    if len(counts) > 1:
        coder.encode_reverse((values - least).astype(np.int32), _model(_shares(logs.astype(np.uint8))))
    table = zlib.compress(logs.astype(np.uint8).tobytes(), 9)
    head = INTEGERS.pack(len(values), least, len(table))
    return head + table + coder.get_compressed().astype("<u4").tobytes()


def decode_integers(coded: bytes) -> Integer[np.ndarray, " n"]:
    """What ``encode_integers`` was given.

    >>> decode_integers(encode_integers(np.array([3, -1, 3, 3, 7]))).tolist()
    [3, -1, 3, 3, 7]
    """
    if not coded:
        return np.zeros(0, np.int64)
    length, least, size = INTEGERS.unpack_from(coded)
    start = INTEGERS.size + size
    logs = np.frombuffer(zlib.decompress(coded[INTEGERS.size : start]), np.uint8)
    if len(logs) == 1:
        return np.full(length, least)
    coder = constriction.stream.stack.AnsCoder(np.frombuffer(coded[start:], "<u4").astype(np.uint32))
    return coder.decode(_model(_shares(logs)), length).astype(np.int64) + least


def _shares(logs: UInt8[np.ndarray, " symbols"]) -> Float[np.ndarray, " symbols"]:
    """Probabilities from their binary logarithms in eighths; whole frequencies first, so that every machine agrees."""
    frequencies = np.where(logs > 0, np.round(16 * 2.0 ** (logs / 8)), 0.0)
    return frequencies / frequencies.sum()


def _model(probabilities: Float[np.ndarray, " symbols"]) -> Any:
    return constriction.stream.model.Categorical(probabilities, perfect=False)


def _planes(values: Integer[np.ndarray, " n"], bits: int) -> UInt8[np.ndarray, " planes"]:
    """The low ``bits`` bits of each value, one after the other."""
    return (values[:, None] >> np.arange(bits) & 1).astype(np.uint8).ravel()


def _from_planes(planes: UInt8[np.ndarray, " planes"], bits: int) -> Integer[np.ndarray, " n"]:
    return (planes.reshape(-1, bits).astype(np.int64) << np.arange(bits)).sum(1)


def _sealed(kind: str, *parts: bytes) -> UInt8[np.ndarray, " bytes"]:
    """Kind, checksum, and the parts with their lengths."""
    body = b"".join([COUNT.pack(len(parts)), *(COUNT.pack(len(part)) for part in parts), *parts])
    return np.frombuffer(KINDS[kind] + COUNT.pack(zlib.crc32(body)) + body, np.uint8)


def _opened(kind: str, packed: UInt8[np.ndarray, " bytes"]) -> list[bytes]:
    """The parts that ``_sealed`` put together.  Raises ValueError if a bit of them has changed."""
    content = packed.tobytes()
    if content[:4] != KINDS[kind]:
        raise ValueError(f"these bytes begin with {content[:4]!r}; entropy-coded {kind} begin with {KINDS[kind]!r}")
    body = content[8:]
    if len(content) < 12 or zlib.crc32(body) != COUNT.unpack_from(content, 4)[0]:
        raise ValueError(f"the checksum of entropy-coded {kind} is wrong: the file is damaged; copy it again")
    (parts,) = COUNT.unpack_from(body)
    lengths = [COUNT.unpack_from(body, 4 * number)[0] for number in range(1, parts + 1)]
    ends = np.cumsum([4 * (parts + 1), *lengths])
    return [body[start:end] for start, end in itertools.pairwise(ends)]
