"""The form of trellis-coded matrices: the bytes that are stored, held in memory, and multiplied.

A matrix is cut into tiles of 64 rows × 16 columns.  Each tile has a rate R: 0 to 7 bits for every weight of it, or 8
for plain int8.  In a tile, the rows r, r + 4, …, r + 60 of a column are one sequence of 16 steps.  At step t a weight
has one coded bit and R − 1 plain bits.  Let m be ``trellis_codes.MEMORY[R]``.  The last m + 1 coded bits, the newest
lowest, select a row of the table of the rate, and the plain bits an entry of it (trellis-coded quantization, Marcellin
& Fischer 1990)::

    value(t) = table_R[Σ_i coded(t − i) · 2^i, plain(t)] / UNIT          i = 0 … m

Steps are counted in a circle: before the first comes the last (a tail-biting trellis).  A tile can therefore be decoded
alone, and any weight of it from its own bits and those of m others.

The weight in row o and column j follows from the values V of its group of 64 rows.  Let p and c be the places of the
row and the column in the stored order, and let r run over the rows of the group::

    W[o, j] = scale · row_scale[p] · Σ_r T[p, r] · row_size[r] · V[r, c] · column_scale[c]

T is the orthonormal Hadamard matrix of 64 rows (Sylvester's), or the identity if the matrix is not rotated.  Scales are
powers of two: ``row_scale`` in steps of 1/8 octave, ``column_scale`` in steps of 1/16, ``row_size`` in steps of -1/4.

The bytes are a header, the sections of ``_sections``, each aligned to 8 bytes, and the tiles, row group by row group,
aligned to 64 bytes, a cache line.  A matrix is a multiple of 64 bytes, so that matrices one after another stay aligned.
A tile of R bits takes 2R registers of 64 bytes: R for its steps 0 to 7, and R for its steps 8 to 15.  Byte 16q + c of a
register belongs to column c and to the rows 4t + q.  Bit s of the first register of a half is the coded bit of step s;
the places of the plain bits are in ``trellis_codes.PLACES``, chosen so that kernels find most of them where a table
index needs them.
"""

import dataclasses
import functools
import struct

import numpy as np
import torch
from jaxtyping import Float, Integer, UInt8
from torch import Tensor

from nashswarm.kernels.trellis_codes import (
    COLUMNS,
    INT8,
    ROWS,
    UNIT,
    pack_codes,
    tile_bytes,
    unpack_codes,
    values_of,
)

MAGIC = b"NSr1"
HEADER = struct.Struct("<4sBBHIIf")  # magic, rotated, orders, reserved, rows, columns, scale
ALIGNMENT, LINE = 8, 64  # bytes, of sections and of tiles
ROW_ORDER, COLUMN_ORDER = 1, 2  # flags in the header
MIDDLE, ROW_STEPS, COLUMN_STEPS, SIZE_STEPS = (
    128,
    8,
    16,
    4,
)  # scale = 2^((code − MIDDLE) / STEPS), size = 2^(−code / STEPS)


@dataclasses.dataclass(frozen=True)
class Trellis:
    """A matrix of ``rows`` × ``columns`` in trellis tiles; every tensor is a view of ``content``, the stored bytes.

    ``rates``: of the tiles, two to a byte, the first in the low bits.  ``row_size``: codes by stored row, two to a
    byte.  ``row_scale``, ``column_scale``: codes by stored row and column.  ``row_order``, ``column_order``: the row or
    column of the matrix at each place; empty for the order of the matrix.  ``payload``: the tiles.
    """

    rows: int
    columns: int
    rotated: bool
    scale: float
    content: UInt8[Tensor, " bytes"]
    rates: UInt8[Tensor, "groups pairs"]
    row_size: UInt8[Tensor, " half_rows"]
    row_scale: UInt8[Tensor, " rows"]
    row_order: Integer[Tensor, " rows_or_0"]
    column_scale: UInt8[Tensor, " places"]
    column_order: Integer[Tensor, " columns_or_0"]
    payload: UInt8[Tensor, " payload"]

    @property
    def nbytes(self) -> int:
        """Bytes in memory, which are the bytes in a file."""
        return self.content.nbytes

    @functools.cached_property
    def starts(self) -> Integer[Tensor, " groups_and_1"]:
        """Return where the tiles of each row group start in the payload, in bytes, and where the last ends."""
        sizes = tile_bytes(tile_rates(self)).sum(1)
        return torch.nn.functional.pad(sizes.cumsum(0), (1, 0))

    def __reduce__(self) -> tuple[object, ...]:
        """Pickle and copy the bytes alone."""
        return parse, (self.content,)


def groups_of(rows: int) -> int:
    """Return the number of groups of 64 rows."""
    return -(-rows // ROWS)


def tiles_across(columns: int) -> int:
    """Return the number of tiles in a group of rows."""
    return -(-columns // COLUMNS)


def side_bytes(rows: int, columns: int, row_order: bool, column_order: bool) -> int:
    """Return the bytes of everything but the tiles."""
    sections = _sections(rows, columns, ROW_ORDER * row_order | COLUMN_ORDER * column_order)
    end = HEADER.size
    for shape, dtype in sections.values():
        end = _aligned(end) + int(np.prod(shape)) * dtype.itemsize
    return _aligned(end, LINE)


def build(
    rates: UInt8[Tensor, "groups tiles"],
    codes: UInt8[Tensor, "stored_rows places"],
    rows: int,
    columns: int,
    rotated: bool,
    scale: float,
    row_size: UInt8[Tensor, " stored_rows"],
    row_scale: UInt8[Tensor, " rows"],
    column_scale: UInt8[Tensor, " places"],
    row_order: Integer[Tensor, " rows"] | None = None,
    column_order: Integer[Tensor, " columns"] | None = None,
) -> Trellis:
    """Lay out a matrix from its codes: plain bits above the coded bit; two's complement for rate 8.

    ``stored_rows`` and ``places`` are rows and columns, filled up to multiples of 64 and 16.
    """
    orders = ROW_ORDER * (row_order is not None) | COLUMN_ORDER * (column_order is not None)
    parts = {
        "rates": _pairs(rates),
        "row_size": _pairs(row_size[None])[0],
        "row_scale": row_scale,
        "row_order": row_order,
        "column_scale": column_scale,
        "column_order": column_order,
    }
    content = bytearray(HEADER.pack(MAGIC, rotated, orders, 0, rows, columns, scale))
    for name, (shape, dtype) in _sections(rows, columns, orders).items():
        content += bytes(-len(content) % ALIGNMENT)
        part = parts[name]
        if part is not None and part.numel():
            content += part.reshape(shape).to(dtype).numpy().tobytes()
    content += bytes(-len(content) % LINE)
    content += pack_codes(rates, codes).numpy().tobytes()
    return parse(torch.frombuffer(content, dtype=torch.uint8))


def parse(content: UInt8[Tensor, " bytes"]) -> Trellis:
    """Read a matrix from its stored bytes, without copying them.

    Raises ValueError if the bytes are damaged, or not one after another in memory.  Kernels rely on these checks.
    """
    if not content.is_contiguous():
        raise ValueError("the bytes of a trellis-coded matrix are not one after another in memory: copy them first")
    if len(content) < HEADER.size:
        raise ValueError(f"{len(content)} bytes are too few for a header: the file is damaged; copy it again")
    magic, rotated, orders, reserved, rows, columns, scale = HEADER.unpack(
        content[: HEADER.size].cpu().numpy().tobytes()
    )
    if magic[:3] == MAGIC[:3] and magic != MAGIC:
        raise ValueError(
            f"it is in version {chr(magic[3])} of trellis tiles, this program reads version {chr(MAGIC[3])}; install "
            "the nashswarm that wrote it"
        )
    if magic != MAGIC or rotated > 1 or orders > 3 or reserved or not rows or not columns or not np.isfinite(scale):
        raise ValueError("the header of a trellis-coded matrix is wrong: the file is damaged; copy it again")
    fields: dict[str, Tensor] = {}
    end = HEADER.size
    for name, (shape, dtype) in _sections(rows, columns, orders).items():
        start = _aligned(end)
        end = start + int(np.prod(shape)) * dtype.itemsize
        if end > len(content):
            raise ValueError("a trellis-coded matrix is cut short: the file is damaged; copy it again")
        fields[name] = content[start:end].view(dtype).view(shape)
    trellis = Trellis(
        rows, columns, bool(rotated), scale, content, fields["rates"], fields["row_size"], fields["row_scale"],
        fields["row_order"], fields["column_scale"], fields["column_order"], content[_aligned(end, LINE) :],
    )  # fmt: skip
    _check(trellis)
    return trellis


def tile_rates(trellis: Trellis) -> UInt8[Tensor, "groups tiles"]:
    """Return the rate of every tile."""
    return _singles(trellis.rates)[:, : tiles_across(trellis.columns)]


def row_sizes(trellis: Trellis) -> Float[Tensor, " stored_rows"]:
    """Return the size of every stored row, at most 1."""
    return torch.exp2(-_singles(trellis.row_size[None])[0].double() / SIZE_STEPS).float()


def scales(codes: UInt8[Tensor, " n"], steps: int) -> Float[Tensor, " n"]:
    """Return the scales that logarithmic codes stand for, with so many ``steps`` in an octave."""
    return torch.exp2((codes.double() - MIDDLE) / steps).float()


def dequantize(trellis: Trellis) -> Float[Tensor, "rows columns"]:
    """Return the weights as floats."""
    rates = tile_rates(trellis)
    values = values_of(rates, unpack_codes(trellis.payload, rates)).float()
    values.div_(UNIT).mul_(row_sizes(trellis)[:, None])
    values = values.view(len(rates), ROWS, -1)
    if trellis.rotated:
        values = hadamard() @ values
    stored = values.reshape(len(rates) * ROWS, -1)[: trellis.rows, : trellis.columns]
    rows = trellis.scale * scales(trellis.row_scale, ROW_STEPS)
    stored = (stored * rows[:, None]).mul_(scales(trellis.column_scale, COLUMN_STEPS)[: trellis.columns])
    matrix = torch.empty_like(stored)
    row_order, column_order = orders_of(trellis)
    matrix[row_order[:, None], column_order] = stored
    return matrix


def orders_of(trellis: Trellis) -> tuple[Integer[Tensor, " rows"], Integer[Tensor, " columns"]]:
    """Return the row and the column of the matrix at every place of the stored order."""
    sizes = ((trellis.row_order, trellis.rows), (trellis.column_order, trellis.columns))
    row_order, column_order = (order.long() if order.numel() else torch.arange(size) for order, size in sizes)
    return row_order, column_order


@functools.cache
def hadamard() -> Float[Tensor, "64 64"]:
    """Return the orthonormal Hadamard matrix of Sylvester's construction, which is its own inverse."""
    matrix = torch.ones(1, 1)
    while len(matrix) < ROWS:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    return matrix / ROWS**0.5


def _sections(rows: int, columns: int, orders: int) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Return shape and dtype of every section before the tiles, in their order."""
    groups, across = groups_of(rows), tiles_across(columns)
    return {
        "rates": ((groups, -(-across // 2)), torch.uint8),
        "row_size": ((groups * ROWS // 2,), torch.uint8),
        "row_scale": ((rows,), torch.uint8),
        "row_order": ((rows if orders & ROW_ORDER else 0,), _index_type(rows)),
        "column_scale": ((across * COLUMNS,), torch.uint8),
        "column_order": ((columns if orders & COLUMN_ORDER else 0,), _index_type(columns)),
    }


def _index_type(size: int) -> torch.dtype:
    return torch.uint16 if size <= 1 << 16 else torch.int32


def _check(trellis: Trellis) -> None:
    """Raise ValueError for rates, orders or a payload that no matrix has."""
    rates = tile_rates(trellis)
    if int(rates.max()) > INT8 or int(trellis.starts[-1]) != len(trellis.payload):
        raise ValueError("the tiles of a trellis-coded matrix do not fit its rates: the file is damaged; copy it again")
    for order in (trellis.row_order, trellis.column_order):
        places = torch.arange(len(order), device=order.device)
        if order.numel() and not torch.equal(order.long().sort().values, places):
            raise ValueError("an order in a trellis-coded matrix is no permutation: the file is damaged; copy it again")


def _aligned(size: int, alignment: int = ALIGNMENT) -> int:
    return -(-size // alignment) * alignment


def _pairs(values: UInt8[Tensor, "rows n"]) -> UInt8[Tensor, "rows pairs"]:
    """Put two values below 16 into each byte."""
    padded = torch.nn.functional.pad(values, (0, values.shape[1] % 2))
    return padded[:, 0::2] | padded[:, 1::2] << 4


def _singles(pairs: UInt8[Tensor, "rows pairs"]) -> UInt8[Tensor, "rows n"]:
    """Invert ``_pairs``."""
    return torch.stack([pairs & 15, pairs >> 4], 2).flatten(1)
