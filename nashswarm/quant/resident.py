"""A lattice tensor as it stands in memory: tiles of 16 rows × 64 columns at widths that a kernel reads directly.

The width of a tile is the one of 0, 2, 3, 4 and 8 bits that takes the fewest bytes: codes beyond its range are escapes,
stored with their place, so that a rare large code does not widen a whole tile.  Nothing is lost.  Ragged tiles are
padded, and the padding is counted.
"""

import struct

import numpy as np
import torch
from jaxtyping import Integer, UInt8

from nashswarm.quant.grid import GRID_WIDTHS, TILE_ROWS
from nashswarm.quant.lattice import Lattice, LatticeTensor
from nashswarm.quant.pack import pack_bits, tag_runs, unpack_bits, widths_of

GROUP = 64
HEADER = struct.Struct("<IIfII")  # rows, columns, base, runs of tags, escapes
ESCAPE = np.dtype([("place", "<u4"), ("code", "<i4")])
WIDTHS = (0, *GRID_WIDTHS)


def to_tiles(tensor: LatticeTensor) -> UInt8[np.ndarray, " bytes"]:
    """The bytes that a loaded matrix takes in memory."""
    lattice = tensor.lattice
    tiles = _tiled(tensor.codes.numpy())
    beyond = np.stack([((tiles < _low(width)) | (tiles > _high(width))).sum(1) for width in WIDTHS], 1)
    cost = np.array(WIDTHS) * tiles.shape[1] // 8 + ESCAPE.itemsize * beyond
    bits = np.array(WIDTHS, np.uint8)[cost.argmin(1)]
    low, high = (np.array([bound(int(width)) for width in bits])[:, None] for bound in (_low, _high))
    escaped = (tiles < low) | (tiles > high)
    escapes = np.zeros(int(escaped.sum()), ESCAPE)
    escapes["place"], escapes["code"] = np.flatnonzero(escaped), tiles[escaped]
    kept = (np.where(escaped, 0, tiles) - low).astype(np.uint8)
    tags = tag_runs(bits)
    parts = [HEADER.pack(*tensor.codes.shape, lattice.base, len(tags), len(escapes)), tags.tobytes()]
    parts += [part.numpy().tobytes() for part in (lattice.row_scale, lattice.column_scale)]
    parts += [pack_bits(kept[bits == width], width) for width in GRID_WIDTHS]
    return np.frombuffer(b"".join([*parts, escapes.tobytes()]), np.uint8)


def from_tiles(resident: UInt8[np.ndarray, " bytes"]) -> LatticeTensor:
    """The tensor that ``to_tiles`` laid out; what its coder expected is not kept."""
    content = resident.tobytes()
    rows, columns, base, runs, escaped = HEADER.unpack_from(content)
    position = HEADER.size

    def take(size: int) -> bytes:
        nonlocal position
        position += size
        return content[position - size : position]

    bits = widths_of(np.frombuffer(take(2 * runs), np.uint16))
    row_scale, column_scale = (torch.from_numpy(np.frombuffer(take(n), np.int8).copy()) for n in (rows, columns))
    tiles = np.zeros((len(bits), TILE_ROWS * GROUP), np.int64)
    for width in GRID_WIDTHS:
        chosen = bits == width
        size = int(chosen.sum()) * tiles.shape[1]
        codes = unpack_bits(take(size * width // 8), width).astype(np.int64)
        tiles[chosen] = codes.reshape(-1, tiles.shape[1]) + _low(width)
    escapes = np.frombuffer(take(escaped * ESCAPE.itemsize), ESCAPE)
    tiles.ravel()[escapes["place"]] = escapes["code"]
    across = -(-columns // GROUP)
    whole = tiles.reshape(-1, across, TILE_ROWS, GROUP).transpose(0, 2, 1, 3).reshape(-1, across * GROUP)
    lattice = Lattice(base, row_scale, column_scale, torch.zeros_like(row_scale), torch.zeros_like(column_scale))
    return LatticeTensor(torch.from_numpy(whole[:rows, :columns].astype(np.int32)), lattice)


def _tiled(codes: Integer[np.ndarray, "out in"]) -> Integer[np.ndarray, "tiles codes"]:
    padded = np.pad(
        codes.astype(np.int64), [(0, -size % unit) for size, unit in zip(codes.shape, (TILE_ROWS, GROUP), strict=True)]
    )
    blocks = padded.reshape(-1, TILE_ROWS, padded.shape[1] // GROUP, GROUP).transpose(0, 2, 1, 3)
    return blocks.reshape(-1, TILE_ROWS * GROUP)


def _low(width: int) -> int:
    return -(1 << width - 1) if width else 0


def _high(width: int) -> int:
    return (1 << width - 1) - 1 if width else 0
