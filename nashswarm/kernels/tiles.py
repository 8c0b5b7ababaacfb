"""The memory layout of a packed matrix: tiles of 16 rows × ``group_size`` columns, each with a bit width of its own.

The weight in row o and column j is

    row_scale[o] · column_scale[j] · scale · (code − zero_point)

Each row of a tile has a ``scale`` and a ``zero_point``.  If they are absent, as for codes of a lattice, the scale is 1
and the zero point is the middle of the range of the width.  Codes of a lattice that do not fit the range are escapes,
stored with their position, and added to the code.

Codes are arranged for 512-bit registers, with one 32-bit lane for each of the 16 rows of a tile.  The four bytes of a
lane hold four consecutive inputs, which make a position.  A chunk is eight positions, 32 inputs, and takes ``width``
registers of 64 bytes::

    2 bits: positions 4k … 4k+3 at bits 0, 2, 4, 6 of register k
    3 bits: positions 2k, 2k+1 at bits 0, 3 of register k; of position 6 the low two bits are the spare ones of
            register 0 and the high one is bit 6 of register 2; of position 7 those of register 1 and bit 7 of 2
    4 bits: positions 2k, 2k+1 at bits 0, 4 of register k
    8 bits: position k is register k

A single AND isolates the codes of a position, and one multiply-add of unsigned by signed bytes takes all four inputs.
"""

import dataclasses
from typing import cast

import torch
from jaxtyping import Float, Int, Int32, Integer, UInt8
from torch import Tensor

TILE_ROWS = 16
CHUNK = 32  # inputs
POSITIONS = 8  # in a chunk, of four inputs each
REGISTER = 64  # bytes
SPAN = 8  # row blocks whose tiles are processed together
WIDTHS = (0, 2, 3, 4, 8)
# width → (position, register, first bit in each byte of the register, first bit of the code, number of bits)
FIELDS = {
    2: [(p, p // 4, p % 4 * 2, 0, 2) for p in range(8)],
    3: [(p, p // 2, p % 2 * 3, 0, 3) for p in range(6)]
    + [(6, 0, 6, 0, 2), (6, 2, 6, 2, 1), (7, 1, 6, 0, 2), (7, 2, 7, 2, 1)],
    4: [(p, p // 2, p % 2 * 4, 0, 4) for p in range(8)],
    8: [(p, p, 0, 0, 8) for p in range(8)],
}


@dataclasses.dataclass(frozen=True)
class Tiles:
    """A packed matrix of ``rows`` × ``columns``.

    ``payload`` holds the codes, row block by row block and tile by tile.  ``widths`` are the bits of the tiles; a tile
    of width 0 is zero, whatever its scale.  ``scale`` and ``zero_point`` belong to the rows of the tiles, and may be
    empty.  ``row_scale`` and ``column_scale`` are empty if they are all 1.  The escapes of row block b are those from
    ``escape_starts[b]`` to ``escape_starts[b + 1]``: ``escape_places`` are their positions, 16 · column + row in the
    block, and ``escape_codes`` are added to the scaled codes.
    """

    rows: int
    columns: int
    group_size: int
    payload: UInt8[Tensor, " bytes"]
    widths: UInt8[Tensor, "row_blocks groups"]
    scale: Float[Tensor, "..."]
    zero_point: UInt8[Tensor, "..."]
    row_scale: Float[Tensor, "..."]
    column_scale: Float[Tensor, "..."]
    escape_starts: Int[Tensor, " row_blocks_and_one"]
    escape_places: Int[Tensor, " escapes"]
    escape_codes: Int[Tensor, " escapes"]

    @property
    def nbytes(self) -> int:
        """Bytes in memory, including the order of the tiles."""
        parts = (getattr(self, field.name) for field in dataclasses.fields(self))
        return sum(part.nbytes for part in (*parts, self.order) if isinstance(part, Tensor))

    def __post_init__(self) -> None:
        with torch.inference_mode(False):  # tiles made in inference mode may be used in training
            object.__setattr__(self, "_order", order(self.widths, self.group_size))

    @property
    def order(self) -> Int32[Tensor, " words"]:
        """The order in which kernels process the tiles (see ``order``)."""
        return cast(Tensor, self.__dict__["_order"])

    def __reduce__(self) -> tuple[type["Tiles"], tuple[object, ...]]:
        """Pickle and copy only the fields; the order and the addresses are derived again."""
        return Tiles, tuple(getattr(self, field.name) for field in dataclasses.fields(self))


def order(widths: UInt8[Tensor, "row_blocks groups"], group_size: int) -> Int32[Tensor, " words"]:
    """Compute the order in which kernels process tiles: span by span, and by width within a span.

    Kernels then branch on the width once for each span and width, not for each tile.  The first words are the starts of
    the tiles of each span and width, and the end of the last.  Two words follow for each tile: its place in the
    payload in units of 64 bytes, and SPAN · group + row block in the span.  Tiles of width 0 come after the end.
    """
    row_blocks, groups = widths.shape
    flat = widths.flatten().long()
    blocks = torch.arange(row_blocks, device=widths.device).repeat_interleave(groups)
    spans = -(-row_blocks // SPAN)
    key, chosen = torch.where(flat > 0, blocks // SPAN * 16 + flat, 16 * spans).sort(stable=True)
    firsts = torch.arange(spans, device=widths.device)[:, None] * 16 + torch.tensor(WIDTHS[1:], device=widths.device)
    starts = torch.searchsorted(key, torch.nn.functional.pad(firsts.flatten(), (0, 1), value=16 * spans))
    places = payload_starts(widths, group_size)[chosen] // REGISTER
    where = chosen % groups * SPAN + blocks[chosen] % SPAN
    return torch.cat([starts, torch.stack([places, where], 1).flatten()]).int()


def pack(codes: UInt8[Tensor, "tiles 16 inputs"], widths: UInt8[Tensor, " tiles"]) -> UInt8[Tensor, " bytes"]:
    """Pack tiles of codes into a payload.  Codes must be below 2 to the power of the width of their tile."""
    group_size = codes.shape[2]
    starts = payload_starts(widths, group_size)
    payload = torch.zeros(int(starts[-1]), dtype=torch.uint8)
    for width, fields in FIELDS.items():
        chosen = torch.nonzero(widths == width).flatten()
        if not len(chosen):
            continue
        # (tiles, chunks, positions, bytes of a register: lane · 4 + input)
        lanes = codes[chosen].view(-1, TILE_ROWS, group_size // CHUNK, POSITIONS, 4).permute(0, 2, 3, 1, 4)
        lanes = lanes.reshape(len(chosen), -1, POSITIONS, 64)
        registers = torch.zeros(*lanes.shape[:2], width, 64, dtype=torch.uint8)
        for position, register, bit, low, bits in fields:
            registers[:, :, register] |= (lanes[:, :, position] >> low & (1 << bits) - 1) << bit
        places = starts[chosen][:, None] + torch.arange(registers[:1].numel())
        payload[places] = registers.flatten(1)
    return payload


def unpack(
    payload: UInt8[Tensor, " bytes"], widths: UInt8[Tensor, " tiles"], group_size: int
) -> UInt8[Tensor, "tiles 16 inputs"]:
    """Return the codes of a payload of ``pack``, zeros for tiles of width 0."""
    starts = payload_starts(widths, group_size)
    codes = torch.zeros(len(widths), TILE_ROWS, group_size, dtype=torch.uint8, device=payload.device)
    for width, fields in FIELDS.items():
        chosen = torch.nonzero(widths == width).flatten()
        if not len(chosen):
            continue
        size = TILE_ROWS * group_size * width // 8
        places = starts[chosen][:, None] + torch.arange(size, device=payload.device)
        registers = payload[places].view(len(chosen), -1, width, 64)
        lanes = torch.zeros(*registers.shape[:2], POSITIONS, 64, dtype=torch.uint8, device=payload.device)
        for position, register, bit, low, bits in fields:
            lanes[:, :, position] |= (registers[:, :, register] >> bit & (1 << bits) - 1) << low
        lanes = lanes.view(len(chosen), group_size // CHUNK, POSITIONS, TILE_ROWS, 4).permute(0, 3, 1, 2, 4)
        codes[chosen] = lanes.reshape(len(chosen), TILE_ROWS, group_size)
    return codes


def payload_starts(widths: UInt8[Tensor, "*shape"], group_size: int) -> Int[Tensor, " tiles_and_one"]:
    """Return the byte at which each tile begins in the payload, and the end of the last one."""
    sizes = widths.flatten().long() * (TILE_ROWS * group_size // 8)
    return torch.nn.functional.pad(sizes.cumsum(0), (1, 0))


def to_tiles(matrix: Integer[Tensor, "rows columns"], group_size: int) -> Integer[Tensor, "tiles 16 inputs"]:
    """Split a matrix into tiles, padding it with zeros to whole tiles."""
    rows, columns = matrix.shape
    padded = torch.nn.functional.pad(matrix, (0, -columns % group_size, 0, -rows % TILE_ROWS))
    blocks = padded.view(-1, TILE_ROWS, padded.shape[1] // group_size, group_size).transpose(1, 2)
    return blocks.reshape(-1, TILE_ROWS, group_size)


def dequantize(tiles: Tiles) -> Float[Tensor, "rows columns"]:
    """Return the float32 matrix that the tiles stand for."""
    matrix = grid_values(tiles)
    rows, columns = escape_positions(tiles)
    matrix.index_put_((rows, columns), tiles.escape_codes.float(), accumulate=True)
    if tiles.row_scale.numel():
        matrix *= tiles.row_scale.float()[:, None]
    if tiles.column_scale.numel():
        matrix *= tiles.column_scale.float()
    return matrix


def grid_values(tiles: Tiles) -> Float[Tensor, "rows columns"]:
    """Return scale · (code − zero_point), without escapes, row scales and column scales."""
    widths = tiles.widths.flatten()
    values = unpack(tiles.payload, widths, tiles.group_size).float()
    if tiles.scale.numel():
        values -= tiles.zero_point.view(-1, TILE_ROWS, 1)
        values *= tiles.scale.float().view(-1, TILE_ROWS, 1)
    else:
        values -= 2.0 ** (widths.view(-1, 1, 1) - 1.0)
    values[widths == 0] = 0.0
    row_blocks, groups = tiles.widths.shape
    matrix = values.view(row_blocks, groups, TILE_ROWS, tiles.group_size).transpose(1, 2)
    return matrix.reshape(row_blocks * TILE_ROWS, -1)[: tiles.rows, : tiles.columns].contiguous()


def select_row_blocks(tiles: Tiles, blocks: Int[Tensor, " blocks"]) -> Tiles:
    """Return the matrix of some row blocks, in the given order, padded to whole blocks."""
    groups = tiles.widths.shape[1]
    payload = tiles.payload[_ranges(payload_starts(tiles.widths, tiles.group_size)[::groups], blocks)]
    starts = tiles.escape_starts.long()
    escapes = _ranges(starts, blocks)
    row_scale = tiles.row_scale
    if row_scale.numel():
        row_scale = (
            torch.nn.functional.pad(row_scale, (0, -tiles.rows % TILE_ROWS)).view(-1, TILE_ROWS)[blocks].flatten()
        )
    return dataclasses.replace(
        tiles,
        rows=TILE_ROWS * len(blocks),
        payload=payload,
        widths=tiles.widths[blocks],
        scale=tiles.scale.view(-1, groups, TILE_ROWS)[blocks] if tiles.scale.numel() else tiles.scale,
        zero_point=tiles.zero_point.view(-1, groups, TILE_ROWS)[blocks] if tiles.scale.numel() else tiles.zero_point,
        row_scale=row_scale,
        escape_starts=torch.nn.functional.pad(starts.diff()[blocks].cumsum(0), (1, 0)),
        escape_places=tiles.escape_places[escapes],
        escape_codes=tiles.escape_codes[escapes],
    )


def _ranges(starts: Int[Tensor, " parts_and_one"], chosen: Int[Tensor, " chosen"]) -> Int[Tensor, " places"]:
    """Return the indices of the elements of the chosen parts, one part after another."""
    counts = starts.diff()[chosen]
    shifts = starts[chosen] - counts.cumsum(0) + counts
    return torch.arange(int(counts.sum()), device=starts.device) + shifts.repeat_interleave(counts)


def missing_row(rows: int, row: int) -> IndexError:
    """Return the error to raise for a row that does not exist."""
    return IndexError(f"row {row} is asked for: the packed matrix has rows 0 … {rows - 1}")


def escape_positions(tiles: Tiles) -> tuple[Int[Tensor, " escapes"], Int[Tensor, " escapes"]]:
    """Return the row and the column of each escape."""
    counts = tiles.escape_starts.diff().long()
    blocks = torch.repeat_interleave(torch.arange(len(counts), device=counts.device), counts)
    places = tiles.escape_places.long()
    return blocks * TILE_ROWS + places % TILE_ROWS, places // TILE_ROWS
