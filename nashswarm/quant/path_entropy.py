"""Entropy-coded storage of lattice paths: numbers of codes ↔ bytes, by tables of both sets.

As in ``entropy``, the level of a code chooses a table and a shift; each of the two sets has tables of its own.  A
decoder has to know the state of a path to know the table, so the symbols are in the order of the steps of paths: those
of the first row of all paths, those of the second row, and so on; of one row, table by table.
"""

import dataclasses
from typing import Any

import constriction
import numpy as np
import torch
from jaxtyping import Float, Int, UInt8

from nashswarm.kernels.path_form import SETS, STEPS, next_states
from nashswarm.quant.container import seal
from nashswarm.quant.entropy import (
    ESCAPE,
    LOWEST,
    SHAPE,
    TABLES,
    CodeTables,
    fit_tables,
    read_lattice,
    table_and_shift,
)
from nashswarm.quant.integer_code import TOTAL, categorical, encode_integers, join_low_bits, split_low_bits
from nashswarm.quant.lattice import Lattice
from nashswarm.quant.lattice_paths import PathTensor, magnitudes_of


def first_tables() -> CodeTables:
    """Return tables to begin with: magnitudes of a Laplace distribution of the size that each level expects."""
    numbers, sets = np.arange(ESCAPE + 1), np.arange(2)[:, None, None]
    sizes = 2.0 ** (np.arange(LOWEST, LOWEST + TABLES)[:, None] / 2)
    shares = np.exp(-magnitudes_of(sets, numbers) / 2 / np.maximum(sizes, 0.05)) * np.where(numbers > 0, 1, 0.5)
    return fit_tables((shares / shares.sum(-1, keepdims=True) * TOTAL).reshape(2 * TABLES, -1))


@dataclasses.dataclass(frozen=True)
class PathCounts:
    """How often each table of each set codes each symbol of a matrix, and the bits that are stored plainly beside."""

    symbols: Float[np.ndarray, "tables symbols"]
    plain_bits: int

    def bits(self, tables: CodeTables) -> float:
        """Return the total length of the codes in bits by these tables, without scales and headers."""
        return float((self.symbols * tables.bits()).sum()) + self.plain_bits


def with_fitted_sizes(tensor: PathTensor) -> tuple[PathTensor, PathCounts]:
    """Return the same codes, the expected sizes of rows and columns fitted to their numbers, and their counts."""
    sets, numbers = tensor.numbers()
    fitted = PathTensor(tensor.codes, tensor.lattice.fit_sizes(torch.from_numpy(numbers).float()))
    table, symbols, shift = _symbols(fitted.lattice, sets, numbers)
    counts = np.bincount((table * (ESCAPE + 1) + symbols).ravel(), minlength=2 * TABLES * (ESCAPE + 1))
    plain_bits = int(shift.sum()) + int(((numbers > 0) & (symbols == 0)).sum())
    return fitted, PathCounts(counts.reshape(2 * TABLES, -1).astype(float), plain_bits)


def encode_paths(tensor: PathTensor, tables: CodeTables) -> UInt8[np.ndarray, " bytes"]:
    """Return the stored bytes of a matrix on paths.  They can be decoded with the same tables only."""
    lattice, codes = tensor.lattice, tensor.codes.numpy()
    sets, numbers = tensor.numbers()
    table, symbols, shift = _symbols(lattice, sets, numbers)
    models, coder = _Models(tables), constriction.stream.stack.AnsCoder()
    for step in reversed(range(min(STEPS, len(codes)))):
        rows = slice(step, None, STEPS)
        row_tables, row_symbols = table[rows].ravel(), symbols[rows].ravel()
        for number in reversed(_present(row_tables)):
            coder.encode_reverse(row_symbols[row_tables == number], models[number])
    escapes = [numbers[step::STEPS][symbols[step::STEPS] == ESCAPE] for step in range(min(STEPS, len(codes)))]
    low = [split_low_bits(numbers[shift == size], size) for size in range(1, int(shift.max()) + 1)]
    exponents = (lattice.row_scale, lattice.column_scale, lattice.row_size, lattice.column_size)
    return seal(
        "paths",
        SHAPE.pack(*codes.shape, lattice.base),
        *(encode_integers(part.numpy()) for part in exponents),
        coder.get_compressed().astype("<u4").tobytes(),
        np.packbits(np.concatenate([np.zeros(0, np.uint8), *low])).tobytes(),
        np.packbits(codes[codes != 0] < 0).tobytes(),
        np.concatenate(escapes).astype("<u4").tobytes(),
    )


def decode_paths(packed: UInt8[np.ndarray, " bytes"], tables: CodeTables) -> PathTensor:
    """Decode the bytes of ``encode_paths``.

    Raises ValueError if they are damaged, of another kind, or coded by other tables.
    """
    lattice, words, low, signs, escapes = read_lattice("paths", packed)
    rows, columns = len(lattice.row_scale), len(lattice.column_scale)
    if len(tables.frequencies) != 2 * TABLES:
        raise ValueError("the code tables are not those of lattice paths")
    level_tables, shift = (part.numpy() for part in table_and_shift(lattice.levels()))
    numbers = _low_numbers(low, shift)
    models, coder = _Models(tables), constriction.stream.stack.AnsCoder(np.frombuffer(words, "<u4").astype(np.uint32))
    escaped, sets = np.frombuffer(escapes, "<u4").astype(np.int64), np.zeros((rows, columns), np.int64)
    states, used = np.zeros((-(-rows // STEPS), columns), np.int64), 0
    for step in range(min(STEPS, rows)):
        chosen = slice(step, None, STEPS)
        states = states[: len(numbers[chosen])]
        sets[chosen] = SETS[states]
        row_tables = (sets[chosen] * TABLES + level_tables[chosen]).ravel()
        symbols = np.zeros(row_tables.shape, np.int64)
        for number in _present(row_tables):
            same = row_tables == number
            symbols[same] = coder.decode(models[number], int(same.sum()))
        symbols = symbols.reshape(states.shape)
        beyond = symbols == ESCAPE
        numbers[chosen] |= symbols << shift[chosen]
        count = int(beyond.sum())
        if used + count > len(escaped):
            raise ValueError("the code tables are not those that coded the paths")
        numbers[chosen][beyond] = escaped[used : used + count]
        used += count
        states = next_states(states, numbers[chosen])
    codes = magnitudes_of(sets, numbers)
    nonzero = np.flatnonzero(codes)
    if used != len(escaped) or len(signs) != -(-len(nonzero) // 8) or codes.max(initial=0) > np.iinfo(np.int32).max:
        raise ValueError("the code tables are not those that coded the paths")
    negative = np.unpackbits(np.frombuffer(signs, np.uint8))[: len(nonzero)].astype(bool)
    codes.ravel()[nonzero[negative]] *= -1
    return PathTensor(torch.from_numpy(codes.astype(np.int32)), lattice)


class _Models:
    """The distributions that the coder takes, by table, each made when it is first used."""

    def __init__(self, tables: CodeTables) -> None:
        self.tables, self.made = tables, dict[int, Any]()

    def __getitem__(self, number: int) -> Any:
        if number not in self.made:
            self.made[number] = categorical(self.tables.probabilities(number))
        return self.made[number]


def _symbols(
    lattice: Lattice, sets: Int[np.ndarray, "out in"], numbers: Int[np.ndarray, "out in"]
) -> tuple[Int[np.ndarray, "out in"], Int[np.ndarray, "out in"], Int[np.ndarray, "out in"]]:
    """Return the table, the symbol and the shift of every code."""
    table, shift = (part.numpy() for part in table_and_shift(lattice.levels()))
    return sets * TABLES + table, np.minimum(numbers >> shift, ESCAPE), shift


def _present(values: Int[np.ndarray, " n"]) -> list[int]:
    return np.flatnonzero(np.bincount(values)).tolist()


def _low_numbers(low: bytes, shift: Int[np.ndarray, "out in"]) -> Int[np.ndarray, "out in"]:
    """Return numbers that have their plain low bits, and zeros above these."""
    numbers, bits = np.zeros(shift.shape, np.int64), np.unpackbits(np.frombuffer(low, np.uint8))
    if len(low) != -(-int(shift.sum()) // 8):
        raise ValueError("the low bits are of other codes")
    for size in range(1, int(shift.max()) + 1):
        chosen = shift == size
        size_bits, bits = np.split(bits, [size * int(chosen.sum())])
        numbers[chosen] = join_low_bits(size_bits, size)
    return numbers
