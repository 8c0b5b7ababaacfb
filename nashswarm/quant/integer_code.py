"""Entropy-coded integers with a table of their own, and what other entropy coders share with them."""

import struct
import zlib
from typing import Any

import constriction
import numpy as np
from jaxtyping import Float, Integer, UInt8

TOTAL = 1 << 14  # the sum of the frequencies of a table
INTEGERS = struct.Struct("<IiH")  # count, least value, bytes of the table


def encode_integers(values: Integer[np.ndarray, " n"]) -> bytes:
    """Return the entropy-coded bytes of integers, with a table of their frequencies.

    Raises ValueError if their range is larger than 2¹⁶.
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
        coder.encode_reverse((values - least).astype(np.int32), categorical(_shares(logs.astype(np.uint8))))
    table = zlib.compress(logs.astype(np.uint8).tobytes(), 9)
    head = INTEGERS.pack(len(values), least, len(table))
    return head + table + coder.get_compressed().astype("<u4").tobytes()


def decode_integers(coded: bytes, expected: int | None = None) -> Integer[np.ndarray, " n"]:
    """Decode the bytes of ``encode_integers``.

    ``expected``: how many integers they must be; default: as many as they say.  Raises ValueError for damaged bytes.

    >>> decode_integers(encode_integers(np.array([3, -1, 3, 3, 7]))).tolist()
    [3, -1, 3, 3, 7]
    """
    check_count(coded, expected)
    if not coded:
        return np.zeros(0, np.int64)
    length, least, size = INTEGERS.unpack_from(coded)
    start = INTEGERS.size + size
    logs = np.frombuffer(decompress(coded[INTEGERS.size : start]), np.uint8)
    if not logs.any() or len(logs) > 1 << 16:
        raise ValueError("the table of coded integers is none: the file is damaged")
    if len(logs) == 1:
        return np.full(length, least)
    coder = constriction.stream.stack.AnsCoder(np.frombuffer(coded[start:], "<u4").astype(np.uint32))
    return coder.decode(categorical(_shares(logs)), length).astype(np.int64) + least


def check_count(coded: bytes, expected: int | None) -> None:
    """Raise ValueError unless coded integers say that they are as many as ``expected``; None: as any number.

    Where several parts have to agree, all are checked before the first is decoded, which may take long.
    """
    if not coded and not expected:
        return
    length, _, _ = INTEGERS.unpack_from(coded.ljust(INTEGERS.size, b"\0"))
    if len(coded) < INTEGERS.size or length != (length if expected is None else expected):
        raise ValueError(f"{length} coded integers stand where {expected} belong: the file is damaged")


def decompress(table: bytes) -> bytes:
    """Decompress a table.  Raises ValueError if it is damaged."""
    try:
        return zlib.decompress(table)
    except zlib.error as error:
        raise ValueError(f"a table cannot be decompressed ({error}): the file is damaged") from error


def _shares(logs: UInt8[np.ndarray, " symbols"]) -> Float[np.ndarray, " symbols"]:
    """Return probabilities from binary logarithms in eighths.

    Frequencies are rounded to integers first, so that all machines compute the same probabilities.
    """
    frequencies = np.where(logs > 0, np.round(16 * 2.0 ** (logs / 8)), 0.0)
    return frequencies / frequencies.sum()


def categorical(probabilities: Float[np.ndarray, " symbols"]) -> Any:
    return constriction.stream.model.Categorical(probabilities, perfect=False)


def split_low_bits(values: Integer[np.ndarray, " n"], bits: int) -> UInt8[np.ndarray, " n_times_bits"]:
    """Return the low ``bits`` bits of each value, value by value, least significant bit first."""
    return (values[:, None] >> np.arange(bits) & 1).astype(np.uint8).ravel()


def join_low_bits(low_bits: UInt8[np.ndarray, " n_times_bits"], bits: int) -> Integer[np.ndarray, " n"]:
    return (low_bits.reshape(-1, bits).astype(np.int64) << np.arange(bits)).sum(1)
