"""The bytes of the blocks of every type, as ggml stores them.

A block's fields follow one another without padding, numbers little-endian.  Codes of less than 8 bits share bytes: the
codes that lie ``width`` apart in a chunk of columns are the bit fields of one byte, the first one lowest.
"""

from collections.abc import Callable, Mapping

import numpy as np
from jaxtyping import Shaped, UInt8
from torch import Tensor

from nashswarm.quant.ggml.types import BlockMatrix

Part = Shaped[np.ndarray, "blocks _"]
MOST_WEIGHTS = 1 << 23  # packed at a time, which bounds the memory of temporaries


def pack(matrix: BlockMatrix) -> UInt8[np.ndarray, "rows bytes"]:
    """Return the rows of a matrix as bytes."""
    rows, columns = matrix.codes.shape
    size = max(MOST_WEIGHTS // columns, 1)
    packed = np.empty((rows, matrix.scales.kind.row_bytes(columns)), np.uint8)
    for first in range(0, rows, size):
        some = slice(first, first + size)
        packed[some] = _pack(BlockMatrix(matrix.codes[some], matrix.scales.select(some)))
    return packed


def _pack(matrix: BlockMatrix) -> UInt8[np.ndarray, "rows bytes"]:
    kind, scales = matrix.scales.kind, matrix.scales

    def by_block(part: Tensor | None, width: int) -> Part:
        return np.empty((scales.scale.numel(), 0)) if part is None else part.numpy().reshape(-1, width)

    groups = kind.block // kind.group
    codes, steps = by_block(matrix.codes, kind.block), by_block(scales.scale, 1).view(np.uint8)
    offsets = by_block(scales.offset, 1).view(np.uint8)
    fields = FIELDS[kind.name](
        codes, steps, offsets, by_block(scales.sub_scale, groups), by_block(scales.sub_offset, groups)
    )
    return np.concatenate([field.view(np.uint8) for field in fields], 1).reshape(len(matrix.codes), -1)


def _fields(codes: Part, bits: int, chunk: int, width: int) -> UInt8[np.ndarray, "blocks _"]:
    """Pack codes of ``bits``: in each ``chunk`` of columns, those ``width`` apart share a byte."""
    parts = codes.reshape(len(codes), -1, chunk // width, width)
    shifts = (bits * np.arange(chunk // width, dtype=np.uint8))[:, None]
    return np.bitwise_or.reduce(parts << shifts, 2).reshape(len(codes), -1)


def _high_bits(codes: Part, bit: int, width: int) -> UInt8[np.ndarray, "blocks _"]:
    """Pack one bit of every code: those ``width`` apart share a byte."""
    return _fields(codes >> bit & 1, 1, codes.shape[1], width)


def _mask(codes: Part) -> UInt8[np.ndarray, "blocks 4"]:
    """Pack bit 4 of 32 codes into four bytes, code by code."""
    return np.packbits(codes >> 4 & 1, axis=1, bitorder="little")


def _six_bit_pairs(first: Part, second: Part) -> UInt8[np.ndarray, "blocks 12"]:
    """Pack eight 6-bit steps and eight 6-bit offsets into twelve bytes, as Q4_K and Q5_K do."""
    first, second = first.astype(np.uint8), second.astype(np.uint8)
    low = [part[:, :4] | part[:, 4:] >> 4 << 6 for part in (first, second)]
    return np.concatenate([*low, first[:, 4:] & 15 | (second[:, 4:] & 15) << 4], 1)


def _six_bits(steps: Part) -> UInt8[np.ndarray, "blocks 12"]:
    """Pack sixteen 6-bit steps into twelve bytes, as Q3_K does."""
    raised = (steps + 32).astype(np.uint8)
    return np.concatenate([_fields(raised & 15, 4, 16, 8), _fields(raised >> 4, 2, 16, 4)], 1)


def _q2_k(codes: Part, d: Part, m: Part, steps: Part, offsets: Part) -> list[Part]:
    return [(steps | offsets << 4).astype(np.uint8), _fields(codes, 2, 128, 32), d, m]


def _q3_k(codes: Part, d: Part, m: Part, steps: Part, offsets: Part) -> list[Part]:
    return [_high_bits(codes, 2, 32), _fields(codes & 3, 2, 128, 32), _six_bits(steps), d]


def _q4_k(codes: Part, d: Part, m: Part, steps: Part, offsets: Part) -> list[Part]:
    return [d, m, _six_bit_pairs(steps, offsets), _fields(codes, 4, 64, 32)]


def _q5_k(codes: Part, d: Part, m: Part, steps: Part, offsets: Part) -> list[Part]:
    return [d, m, _six_bit_pairs(steps, offsets), _high_bits(codes, 4, 32), _fields(codes & 15, 4, 64, 32)]


def _q6_k(codes: Part, d: Part, m: Part, steps: Part, offsets: Part) -> list[Part]:
    return [_fields(codes & 15, 4, 128, 64), _fields(codes >> 4, 2, 128, 32), steps.astype(np.int8), d]


def _iq4_xs(codes: Part, d: Part, m: Part, steps: Part, offsets: Part) -> list[Part]:
    raised = (steps + 32).astype(np.uint8)
    return [d, _fields(raised >> 4, 2, 4, 1), _fields(raised & 15, 4, 2, 1), _fields(codes, 4, 32, 16)]


FIELDS: Mapping[str, Callable[[Part, Part, Part, Part, Part], list[Part]]] = {
    "Q2_K": _q2_k,
    "Q3_K": _q3_k,
    "IQ4_XS": _iq4_xs,
    "Q4_0": lambda codes, d, *_: [d, _fields(codes, 4, 32, 16)],
    "IQ4_NL": lambda codes, d, *_: [d, _fields(codes, 4, 32, 16)],
    "Q4_K": _q4_k,
    "Q4_1": lambda codes, d, m, *_: [d, m, _fields(codes, 4, 32, 16)],
    "Q5_0": lambda codes, d, *_: [d, _mask(codes), _fields(codes & 15, 4, 32, 16)],
    "Q5_K": _q5_k,
    "Q5_1": lambda codes, d, m, *_: [d, m, _mask(codes), _fields(codes & 15, 4, 32, 16)],
    "Q6_K": _q6_k,
    "Q8_0": lambda codes, d, *_: [d, codes ^ 128],
}
