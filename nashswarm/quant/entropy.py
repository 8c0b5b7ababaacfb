"""Entropy-coded storage: codes ↔ bytes.

Lattice codes have a level each, the magnitude that is expected of them.  The level chooses one of 18 tables of symbol
frequencies and a shift: the magnitude without its lowest ``shift`` bits is the symbol, coded by the table; those bits
and the sign are stored plainly.  All matrices of a model share the tables, so a symbol that is used often becomes
cheaper everywhere (a congestion game with falling costs, Rosenthal 1973).  Grouped codes have a table for each width
of a matrix instead.  The coder is the asymmetric numeral system (Duda 2009) of the ``constriction`` library (Bamler
2022).
"""

import dataclasses
import itertools
import struct
import zlib
from collections.abc import Iterable

import constriction
import numpy as np
import torch
from jaxtyping import Float, Integer, UInt8
from torch import Tensor

from nashswarm.quant.container import seal, unseal
from nashswarm.quant.grid import GRID_WIDTHS, TILE_ROWS, QuantizedTensor, Scheme, row_blocks
from nashswarm.quant.integer_code import (
    TOTAL,
    categorical,
    check_count,
    decode_integers,
    decompress,
    encode_integers,
    join_low_bits,
    split_low_bits,
)
from nashswarm.quant.lattice import Lattice, LatticeTensor
from nashswarm.quant.pack import expand_tags, from_tiles, tag_runs, to_tiles

LOWEST, HIGHEST = -12, 5  # levels with a table of their own; levels above shift low bits out
TABLES = HIGHEST - LOWEST + 1
ESCAPE = 48  # the symbol of all magnitudes from 48 on, which are stored as 32-bit integers
SHAPE = struct.Struct("<IIf")  # rows, columns, base
GROUPS = struct.Struct("<IIH?")  # rows, columns, group size, symmetric


@dataclasses.dataclass(frozen=True)
class CodeTables:
    """Frequencies of the symbols (magnitudes 0 to 47 and an escape), one table for each level; each sums to 2¹⁴.

    Lattice paths have twice as many: those of set 0, then those of set 1 (see ``path_entropy``).
    """

    frequencies: Integer[np.ndarray, "tables symbols"]

    def probabilities(self, table: int) -> Float[np.ndarray, " symbols"]:
        """Return the probabilities of the symbols in one table."""
        return self.frequencies[table] / TOTAL

    def bits(self) -> Float[np.ndarray, "tables symbols"]:
        """Return the code length of each symbol in bits, including the sign and the 32 bits of an escape."""
        signs = np.arange(ESCAPE + 1) > 0
        escape = 32.0 * (np.arange(ESCAPE + 1) == ESCAPE)
        return -np.log2(self.frequencies / TOTAL) + signs + escape

    def pack(self) -> UInt8[np.ndarray, " bytes"]:
        """Return the stored bytes of the tables."""
        return seal("tables", zlib.compress(self.frequencies.astype(np.uint16).tobytes(), 9))

    @staticmethod
    def unpack(packed: UInt8[np.ndarray, " bytes"]) -> "CodeTables":
        """Read tables from their stored bytes.

        Raises ValueError if the bytes are damaged.
        """
        (part,) = unseal("tables", packed)
        frequencies = np.frombuffer(decompress(part), np.uint16).astype(np.int64)
        if len(frequencies) not in (TABLES * (ESCAPE + 1), 2 * TABLES * (ESCAPE + 1)):
            raise ValueError(f"{len(frequencies)} frequencies are not those of code tables: the file is damaged")
        frequencies = frequencies.reshape(-1, ESCAPE + 1)
        if not frequencies.all() or (frequencies.sum(1) != TOTAL).any():
            raise ValueError(
                f"the frequencies of a code table are not above 0 with the sum {TOTAL}: the file is damaged"
            )
        return CodeTables(frequencies)


def fit_tables(counts: Float[np.ndarray, "tables symbols"]) -> CodeTables:
    """Return tables with frequencies in proportion to ``counts``, and at least 1 for every symbol."""
    smoothed = counts + 0.1
    shares = smoothed / smoothed.sum(1, keepdims=True) * (TOTAL - smoothed.shape[1])
    frequencies = np.floor(shares).astype(np.int64) + 1
    frequencies[np.arange(len(shares)), shares.argmax(1)] += TOTAL - frequencies.sum(1)
    return CodeTables(frequencies)


def table_and_shift(levels: Integer[Tensor, "*shape"]) -> tuple[Integer[Tensor, "*shape"], Integer[Tensor, "*shape"]]:
    """Return the table of each level, and its shift: how many low bits of the magnitude are stored plainly."""
    shift = ((levels - HIGHEST + 1) >> 1).clamp(min=0)
    return (levels - 2 * shift).clamp(min=LOWEST) - LOWEST, shift


def count_symbols(tensors: Iterable[LatticeTensor]) -> Float[np.ndarray, "tables symbols"]:
    """Count how often each table codes each symbol."""
    total = torch.zeros(TABLES * (ESCAPE + 1), dtype=torch.int64)
    for tensor in tensors:
        table, shift = table_and_shift(tensor.lattice.levels())
        symbols = (tensor.codes.abs() >> shift).clamp(max=ESCAPE)
        total += torch.bincount((table * (ESCAPE + 1) + symbols).flatten(), minlength=len(total))
    return total.view(TABLES, ESCAPE + 1).double().numpy()


def code_lengths(
    codes: Integer[Tensor, "out in"], levels: Integer[Tensor, "out in"], tables: CodeTables
) -> Float[Tensor, "out in"]:
    """Compute the length of each code in bits: symbol, sign, and bits that are stored plainly."""
    table, shift = table_and_shift(levels)
    magnitudes = codes.abs()
    symbols = (magnitudes >> shift).clamp(max=ESCAPE)
    bits = torch.from_numpy(tables.bits()).float().to(codes.device).take((table * (ESCAPE + 1) + symbols).long())
    if shift.any():
        bits += shift + ((magnitudes > 0) & (symbols == 0))
    return bits


def coded_bits(tensor: LatticeTensor, tables: CodeTables) -> Float[Tensor, " out"]:
    """Compute the total length of the codes of each row in bits, without scales and headers."""
    return code_lengths(tensor.codes, tensor.lattice.levels(), tables).sum(1, dtype=torch.float64)


def encode_lattice(tensor: LatticeTensor, tables: CodeTables) -> UInt8[np.ndarray, " bytes"]:
    """Return the stored bytes of a lattice tensor.  They can be decoded with the same tables only."""
    lattice = tensor.lattice
    table, shift = (part.flatten().numpy() for part in table_and_shift(lattice.levels()))
    codes = tensor.codes.flatten().numpy()
    magnitudes = np.abs(codes)
    symbols = np.minimum(magnitudes >> shift, ESCAPE)
    coder = constriction.stream.stack.AnsCoder()
    for number in np.unique(table)[::-1].tolist():
        coder.encode_reverse(symbols[table == number], categorical(tables.probabilities(number)))
    escaped = symbols == ESCAPE
    low = [split_low_bits(magnitudes[(shift == size) & ~escaped], size) for size in range(1, int(shift.max()) + 1)]
    exponents = (lattice.row_scale, lattice.column_scale, lattice.row_size, lattice.column_size)
    return seal(
        "lattice",
        SHAPE.pack(*tensor.codes.shape, lattice.base),
        *(encode_integers(part.numpy()) for part in exponents),
        coder.get_compressed().astype("<u4").tobytes(),
        np.packbits(np.concatenate([np.zeros(0, np.uint8), *low])).tobytes(),
        np.packbits(codes[codes != 0] < 0).tobytes(),
        magnitudes[escaped].astype("<u4").tobytes(),
    )


def decode_lattice(packed: UInt8[np.ndarray, " bytes"], tables: CodeTables) -> LatticeTensor:
    """Decode the bytes of ``encode_lattice``.

    Raises ValueError if they are damaged or of another kind.
    """
    lattice, words, low, signs, escapes = read_lattice("lattice", packed)
    table, shift = (part.flatten().numpy() for part in table_and_shift(lattice.levels()))
    coder = constriction.stream.stack.AnsCoder(np.frombuffer(words, "<u4").astype(np.uint32))
    symbols = np.zeros(table.shape, np.int64)
    for number in np.unique(table).tolist():
        symbols[table == number] = coder.decode(categorical(tables.probabilities(number)), int((table == number).sum()))
    escaped = symbols == ESCAPE
    codes = symbols << shift
    if len(escapes) != 4 * np.count_nonzero(escaped):
        raise ValueError("the escapes are of other codes, or the code tables are not those that coded them")
    codes[escaped] = np.frombuffer(escapes, "<u4")
    low_bits = np.unpackbits(np.frombuffer(low, np.uint8))
    for size in range(1, int(shift.max()) + 1):
        chosen = (shift == size) & ~escaped
        size_bits, low_bits = np.split(low_bits, [size * int(chosen.sum())])
        codes[chosen] |= join_low_bits(size_bits, size)
    if len(signs) != -(-np.count_nonzero(codes) // 8):
        raise ValueError("the signs are of other codes, or the code tables are not those that coded them")
    negative = np.unpackbits(np.frombuffer(signs, np.uint8))[: np.count_nonzero(codes)].astype(bool)
    codes[np.flatnonzero(codes)[negative]] *= -1
    return LatticeTensor(torch.from_numpy(codes.reshape(len(lattice.row_scale), -1).astype(np.int32)), lattice)


def read_lattice(kind: str, packed: UInt8[np.ndarray, " bytes"]) -> tuple[Lattice, bytes, bytes, bytes, bytes]:
    """Return the lattice of coded bytes of this kind, and their four other parts: words, low bits, signs and escapes.

    Raises ValueError if they are damaged or of another kind.
    """
    shape, *exponents, words, low, signs, escapes = unseal(kind, packed)
    if len(shape) != SHAPE.size or len(exponents) != 4:
        raise ValueError(f"entropy-coded {kind} have other parts than these: the file is damaged")
    rows, columns, base = SHAPE.unpack(shape)
    for part, size in zip(exponents, (rows, columns) * 2, strict=True):
        check_count(part, size)
    decoded = list(map(decode_integers, exponents))
    return Lattice(base, *(torch.from_numpy(part.astype(np.int8)) for part in decoded)), words, low, signs, escapes


def encode_groups(tensor: QuantizedTensor) -> UInt8[np.ndarray, " bytes"]:
    """Return the stored bytes of a tensor with a scale and a zero point for each group.

    The codes and the zero points of each width have a table of their own, and so have the low and the high bytes of the
    scales.  Raises ValueError for tiles of 16 or 32 bits.
    """
    flat_bits = tensor.bits.flatten().numpy()
    if unknown := set(flat_bits.tolist()) - {0, *GRID_WIDTHS}:
        raise ValueError(f"tiles of {sorted(unknown)} bits hold floats, not codes: pack them instead")
    codes, scale, zero_point = (
        to_tiles(part, tensor.bits.shape[1]) for part in (tensor.codes, tensor.scale, tensor.zero_point)
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
    return seal("groups", *parts)


def decode_groups(packed: UInt8[np.ndarray, " bytes"]) -> QuantizedTensor:
    """Decode the bytes of ``encode_groups``.

    Raises ValueError if they are damaged or of another kind.
    """
    head, tags, *parts = unseal("groups", packed)
    rows, columns, group_size, symmetric = GROUPS.unpack(head.ljust(GROUPS.size, b"\0")[: GROUPS.size])
    if len(head) != GROUPS.size or not group_size or columns % group_size:
        raise ValueError(f"an entropy-coded {rows}x{columns} matrix claims the group size {group_size}")
    flat_bits = expand_tags(np.frombuffer(tags, np.uint16))
    shape, widths = (row_blocks(rows), columns // group_size), set(flat_bits.tolist()) - {0}
    if len(flat_bits) != shape[0] * shape[1] or not widths <= set(GRID_WIDTHS) or len(parts) != 4 * len(widths):
        raise ValueError(
            f"the tags of an entropy-coded {rows}x{columns} matrix are of other tiles: the file is damaged"
        )
    codes = np.zeros((len(flat_bits), TILE_ROWS, group_size), np.uint8)
    scale = np.zeros((len(flat_bits), TILE_ROWS, 1), np.float16)
    zero_point = np.zeros((len(flat_bits), TILE_ROWS, 1), np.uint8)
    remaining = iter(parts)
    for width in GRID_WIDTHS:
        chosen = flat_bits == width
        if chosen.any():
            count = TILE_ROWS * int(chosen.sum())
            low, high, zeros, width_codes = (
                decode_integers(part, size).astype(np.uint8)
                for part, size in zip(
                    itertools.islice(remaining, 4), (count, count, count, count * group_size), strict=True
                )
            )
            scale[chosen] = np.stack([low, high], 1).copy().view(np.float16).reshape(-1, TILE_ROWS, 1)
            zero_point[chosen] = zeros.reshape(-1, TILE_ROWS, 1)
            codes[chosen] = width_codes.reshape(-1, TILE_ROWS, group_size)
    bits = torch.from_numpy(flat_bits.reshape(shape))
    return QuantizedTensor(
        from_tiles(codes, shape, rows),
        from_tiles(scale, shape, rows),
        from_tiles(zero_point, shape, rows),
        bits,
        Scheme(group_size, symmetric=symmetric),
    )
