"""Convert quantized matrices to the tiles that kernels read, and back.

Both directions are exact: quantized tensor → tiles → codes gives the same codes, so a loaded model can be saved again
to the same bytes.  The layout itself is defined in ``kernels.tiles``.
"""

import torch
from jaxtyping import Integer, Num
from torch import Tensor, nn

from nashswarm.kernels import tiles as layout
from nashswarm.kernels.tiles import Tiles
from nashswarm.quant.grid import GRID_WIDTHS, TILE_ROWS, QuantizedTensor, row_blocks
from nashswarm.quant.lattice import LatticeTensor

Packable = QuantizedTensor | LatticeTensor
GROUP = 64  # columns in a tile of a lattice, whose scales belong to rows and columns rather than to groups
ESCAPE_BYTES = 8


def packable(tensor: Packable) -> bool:
    """Check whether kernels can read the matrix: tiles of 0, 2, 3, 4 or 8 bits, groups of a multiple of 32 columns."""
    if isinstance(tensor, LatticeTensor):
        return True
    return tensor.scheme.group_size % layout.CHUNK == 0 and int(tensor.bits.max()) <= max(GRID_WIDTHS)


def to_tiles(tensor: Packable) -> Tiles:
    """Lay a quantized matrix out in tiles, as it is held in memory."""
    if isinstance(tensor, LatticeTensor):
        return _tiles_of_lattice(tensor)
    rows, columns = tensor.codes.shape
    size = tensor.scheme.group_size
    scale, zero_point = scales_by_tile(tensor.scale), scales_by_tile(tensor.zero_point)
    widths = tensor.bits.to(torch.uint8)
    payload = layout.pack(layout.to_tiles(tensor.codes, size).to(torch.uint8), widths.flatten())
    empty = torch.zeros(0)
    return Tiles(rows, columns, size, payload, widths, scale, zero_point, empty, empty, *_no_escapes(len(widths)))


def _tiles_of_lattice(tensor: LatticeTensor) -> Tiles:
    """Give each tile the width that takes the fewest bytes.

    A code beyond the range of its tile's width is stored as an escape, so that a rare large code does not widen a whole
    tile.
    """
    rows, columns = tensor.codes.shape
    tiles = layout.to_tiles(tensor.codes, GROUP)
    widths = _cheapest_widths(tiles)
    low, high = (torch.tensor([_code_range(width)[side] for width in range(9)])[widths] for side in (0, 1))
    low, high = low.view(-1, 1, 1), high.view(-1, 1, 1)
    escaped = (tiles < low) | (tiles > high)
    codes = (torch.where(escaped, 0, tiles) - low).to(torch.uint8)
    grid = (row_blocks(rows), -(-columns // GROUP))
    tile, row, column = torch.nonzero(escaped, as_tuple=True)
    block, place = tile // grid[1], TILE_ROWS * (tile % grid[1] * GROUP + column) + row
    escape_starts = nn.functional.pad(torch.bincount(block, minlength=grid[0]).cumsum(0), (1, 0))
    return Tiles(
        rows=rows,
        columns=columns,
        group_size=GROUP,
        payload=layout.pack(codes, widths.to(torch.uint8)),
        widths=widths.to(torch.uint8).view(grid),
        scale=torch.zeros(0, dtype=torch.float16),
        zero_point=torch.zeros(0, dtype=torch.uint8),
        row_scale=tensor.lattice.row_steps(),
        column_scale=tensor.lattice.column_steps(),
        escape_starts=escape_starts.int(),
        escape_places=place.int(),
        escape_codes=tiles[escaped].int(),
    )


def _cheapest_widths(tiles: Integer[Tensor, "tiles rows columns"]) -> Integer[Tensor, " tiles"]:
    """Return for each tile the width in bits of fewest bytes, its escapes included."""
    smallest, largest = tiles.flatten(1).amin(1), tiles.flatten(1).amax(1)
    size = torch.empty(len(tiles), len(layout.WIDTHS), dtype=torch.int64)
    for column, width in enumerate(layout.WIDTHS):
        low, high = _code_range(width)
        size[:, column] = width * tiles[0].numel() // 8
        overflowing = torch.nonzero((smallest < low) | (largest > high)).flatten()
        escapes = (tiles[overflowing] < low) | (tiles[overflowing] > high)
        size[overflowing, column] += ESCAPE_BYTES * escapes.flatten(1).sum(1)
    return torch.tensor(layout.WIDTHS)[size.argmin(1)]


def codes_of(tiles: Tiles) -> Integer[Tensor, "rows columns"]:
    """Return the integer codes that tiles hold: unsigned if the tiles have scales of groups, signed for a lattice."""
    codes = layout.unpack(tiles.payload, tiles.widths.flatten(), tiles.group_size).int()
    if not tiles.scale.numel():
        lows = torch.tensor([_code_range(width)[0] for width in range(9)], dtype=torch.int32)
        codes += lows[tiles.widths.flatten().int()].view(-1, 1, 1)
    blocks = len(tiles.widths)
    whole = codes.view(*tiles.widths.shape, TILE_ROWS, -1).transpose(1, 2).reshape(TILE_ROWS * blocks, -1)
    block = torch.repeat_interleave(torch.arange(blocks), tiles.escape_starts.diff())
    places = tiles.escape_places.long()
    whole[TILE_ROWS * block + places % TILE_ROWS, places // TILE_ROWS] += tiles.escape_codes
    return whole[: tiles.rows, : tiles.columns]


def _code_range(width: int) -> tuple[int, int]:
    """Return the smallest and the largest signed code of a width in bits.

    >>> _code_range(0), _code_range(3)
    ((0, 0), (-4, 3))
    """
    return (-(1 << width - 1), (1 << width - 1) - 1) if width else (0, 0)


def scales_by_tile(part: Num[Tensor, "out groups"]) -> Num[Tensor, "blocks groups 16"]:
    """Reorder scales or zero points of groups from rows to tiles; the last tiles are filled up with zeros."""
    padded = nn.functional.pad(part, (0, 0, 0, -len(part) % TILE_ROWS))
    return padded.view(-1, TILE_ROWS, part.shape[1]).transpose(1, 2).contiguous()


def scales_by_row(part: Num[Tensor, "blocks groups 16"], rows: int) -> Num[Tensor, "out groups"]:
    """Invert ``scales_by_tile`` for a matrix of so many ``rows``."""
    return part.transpose(1, 2).reshape(-1, part.shape[1])[:rows].contiguous()


def _no_escapes(blocks: int) -> tuple[Tensor, Tensor, Tensor]:
    empty = torch.zeros(0, dtype=torch.int32)
    return torch.zeros(blocks + 1, dtype=torch.int32), empty, empty
