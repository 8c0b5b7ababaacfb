"""Storage of grouped codes without an entropy coder: codes ↔ bytes.

The size of a matrix is the length of what ``pack`` returns.  Layout: a header of 16 bytes; the widths of the tiles as
run-length tags, two bytes each; then, for each width, the fp16 scales, the b-bit zero points and the b-bit codes of its
tiles, in row-major order of the tiles.  A last row block of fewer than 16 rows is padded with zeros, which count.
"""

import struct

import numpy as np
import torch
from jaxtyping import Integer, UInt8, UInt16
from torch import Tensor

from nashswarm.quant.grid import FLOATS, GRID_WIDTHS, TILE_ROWS, WIDTHS, QuantizedTensor, Scheme, row_blocks

HEADER = struct.Struct("<BBHIII")  # version, symmetric, group size, rows, columns, runs
VERSION = 1
RUN_BYTES = 2
LONGEST_RUN = 1 << 13  # a tag holds the width in 3 bits and the length of its run in 13
CHUNK_CODES = 1 << 22  # codes split into bits at a time: bounds the memory of temporaries


def run_lengths(values: Integer[np.ndarray, " n"]) -> tuple[Integer[np.ndarray, " runs"], Integer[np.ndarray, " runs"]]:
    """Return the value and the length of each run of equal values.

    >>> [part.tolist() for part in run_lengths(np.array([3, 3, 2, 2, 2]))]
    [[3, 2], [2, 3]]
    """
    starts = np.flatnonzero(np.diff(values, prepend=values[:1] - 1)) if len(values) else np.zeros(0, int)
    return values[starts], np.diff(starts, append=len(values))


def tag_runs(bits: Integer[np.ndarray, " tiles"]) -> UInt16[np.ndarray, " runs"]:
    """Return the run-length tags of tile widths.  Runs longer than 8192 tiles take several tags."""
    widths, lengths = run_lengths(bits.astype(np.int64))
    tags = -(-lengths // LONGEST_RUN)
    kinds = np.repeat(np.searchsorted(WIDTHS, widths), tags)
    sizes = np.full(len(kinds), LONGEST_RUN)
    sizes[np.cumsum(tags) - 1] = lengths - (tags - 1) * LONGEST_RUN
    return (kinds | (sizes - 1) << 3).astype(np.uint16)


def expand_tags(tags: UInt16[np.ndarray, " runs"]) -> UInt8[np.ndarray, " tiles"]:
    """Return the tile widths that run-length tags stand for.

    >>> expand_tags(tag_runs(np.array([2, 2, 8]))).tolist()
    [2, 2, 8]

    Raises ValueError for tags of no width.
    """
    if (tags & 7).max(initial=0) >= len(WIDTHS):
        raise ValueError("a matrix has tags of an unknown kind: the file is damaged")
    return np.repeat(np.array(WIDTHS, np.uint8)[tags & 7], (tags >> 3).astype(np.int64) + 1)


def packed_bytes(bits: Integer[np.ndarray, " tiles"], scheme: Scheme) -> int:
    """Return the number of bytes that ``pack`` needs for a matrix whose tiles have the widths ``bits``."""
    widths, counts = np.unique(bits, return_counts=True)
    tile_bytes = sum(int(count) * scheme.tile_bytes(int(width)) for width, count in zip(widths, counts, strict=True))
    return HEADER.size + RUN_BYTES * len(tag_runs(bits)) + tile_bytes


def pack(tensor: QuantizedTensor) -> UInt8[np.ndarray, " bytes"]:
    """Return the stored bytes of a tensor: header, tags, scales, zero points, codes."""
    rows, columns = tensor.codes.shape
    flat_bits = tensor.bits.flatten().numpy()
    tags = tag_runs(flat_bits)
    scheme = tensor.scheme
    parts = [HEADER.pack(VERSION, scheme.symmetric, scheme.group_size, rows, columns, len(tags)), tags.tobytes()]
    codes, scale, zero_point = (
        to_tiles(part, tensor.bits.shape[1]) for part in (tensor.codes, tensor.scale, tensor.zero_point)
    )
    for width in WIDTHS[1:]:
        chosen = flat_bits == width
        if width in GRID_WIDTHS:
            parts.append(scale[chosen].tobytes())
            if not scheme.symmetric:
                parts.append(pack_bits(zero_point[chosen], width))
            parts.append(pack_bits(codes[chosen].astype(np.uint8, copy=False), width))
        else:
            parts.append(codes[chosen].astype(f"int{width}").tobytes())
    return np.frombuffer(b"".join(parts), np.uint8)


def unpack(packed: UInt8[np.ndarray, " bytes"]) -> QuantizedTensor:
    """Read a tensor from the bytes of ``pack``.

    Raises ValueError if they are of another version, damaged, cut short or too long.
    """
    content = packed.tobytes()
    if len(content) < HEADER.size:
        raise ValueError(f"a packed matrix needs at least {HEADER.size} bytes, not {len(content)}")
    version, symmetric, group_size, rows, columns, runs = HEADER.unpack_from(content)
    if version != VERSION:
        raise ValueError(f"packed by format version {version}; this program reads version {VERSION}")
    if not group_size or columns % group_size:
        raise ValueError(f"a packed {rows}x{columns} matrix claims the group size {group_size}")
    scheme = Scheme(group_size, symmetric=bool(symmetric))
    position = HEADER.size

    def take(size: int) -> bytes:
        nonlocal position
        position += size
        if position > len(content):
            raise ValueError(
                f"a packed {rows}x{columns} matrix is cut short: {len(content)} bytes, at least {position} needed"
            )
        return content[position - size : position]

    tags = np.frombuffer(take(RUN_BYTES * runs), np.uint16)
    if unknown := set((tags & 7).tolist()) - set(range(len(WIDTHS))):
        raise ValueError(f"a packed {rows}x{columns} matrix has tags of an unknown kind: {unknown}")
    flat_bits = expand_tags(tags)
    shape = (row_blocks(rows), columns // group_size)
    if len(flat_bits) != shape[0] * shape[1]:
        raise ValueError(
            f"the tags of a packed {rows}x{columns} matrix describe {len(flat_bits)} tiles, not {shape[0] * shape[1]}"
        )
    widest = int(flat_bits.max())
    code_type = FLOATS[widest][1] if widest in FLOATS else torch.uint8
    codes = np.zeros((len(flat_bits), TILE_ROWS, group_size), str(code_type).removeprefix("torch."))
    scale = np.zeros((len(flat_bits), TILE_ROWS, 1), np.float16)
    zero_point = np.zeros((len(flat_bits), TILE_ROWS, 1), np.uint8)
    for width in WIDTHS[1:]:
        chosen = flat_bits == width
        count = int(chosen.sum())
        if width in GRID_WIDTHS:
            scale[chosen] = np.frombuffer(take(2 * TILE_ROWS * count), np.float16).reshape(-1, TILE_ROWS, 1)
            if symmetric:
                zero_point[chosen] = 1 << (width - 1)
            else:
                zero_point[chosen] = unpack_bits(take(width * TILE_ROWS * count // 8), width).reshape(-1, TILE_ROWS, 1)
            codes[chosen] = unpack_bits(take(width * TILE_ROWS * group_size * count // 8), width).reshape(
                count, TILE_ROWS, group_size
            )
        else:
            patterns = take(width * TILE_ROWS * group_size * count // 8)
            codes[chosen] = np.frombuffer(patterns, f"int{width}").reshape(count, TILE_ROWS, group_size)
    if position != len(content):
        raise ValueError(f"a packed {rows}x{columns} matrix has {len(content) - position} bytes too many")
    bits = torch.from_numpy(flat_bits.reshape(shape))
    return QuantizedTensor(
        from_tiles(codes, shape, rows),
        from_tiles(scale, shape, rows),
        from_tiles(zero_point, shape, rows),
        bits,
        scheme,
    )


def pack_bits(codes: UInt8[np.ndarray, "..."], bits: int) -> bytes:
    """Return the low ``bits`` bits of each code as bytes, without gaps, least significant bit first.

    >>> pack_bits(np.array([1, 2, 3, 0], np.uint8), 2)
    b'9'
    """
    flat = codes.reshape(-1, 1)
    planes = (
        flat[start : start + CHUNK_CODES] >> np.arange(bits, dtype=np.uint8) & 1
        for start in range(0, len(flat), CHUNK_CODES)
    )
    return b"".join(np.packbits(plane, bitorder="little").tobytes() for plane in planes)


def unpack_bits(packed: bytes, bits: int) -> UInt8[np.ndarray, " codes"]:
    """Return the codes of ``pack_bits``.  They must fill whole bytes."""
    planes = np.unpackbits(np.frombuffer(packed, np.uint8), bitorder="little").reshape(-1, bits)
    return (planes << np.arange(bits, dtype=np.uint8)).sum(1, dtype=np.uint8)


def to_tiles(part: Tensor, groups: int) -> np.ndarray:
    """Reshape (out, …) to (tiles, 16, values per row of a tile), padding the last row block with zeros."""
    padded = torch.nn.functional.pad(part, (0, 0, 0, -len(part) % TILE_ROWS)).numpy()
    return (
        padded.reshape(-1, TILE_ROWS, groups, padded.shape[1] // groups)
        .transpose(0, 2, 1, 3)
        .reshape(-1, TILE_ROWS, padded.shape[1] // groups)
    )


def from_tiles(tiles: np.ndarray, shape: tuple[int, int], rows: int) -> Tensor:
    """Reshape (tiles, 16, values per row of a tile) to (out, …) without the padding.

    ``shape`` is the number of row blocks and of groups.
    """
    blocks = tiles.reshape(*shape, TILE_ROWS, -1).transpose(0, 2, 1, 3)
    return torch.from_numpy(blocks.reshape(shape[0] * TILE_ROWS, -1)[:rows].copy())
