"""Modules that compute on packed weights: a linear layer and an embedding around a ``PackedMatrix``.

A matrix in memory is what kernels read (``kernels.tiles``), never floats; a head that is tied to the embedding holds
the same ``PackedMatrix``.  Both directions are exact: quantized tensor → tiles → quantized tensor gives the same codes,
so a loaded model can be saved again to the same bytes.
"""

import copy
import dataclasses
import math
from collections.abc import Callable
from typing import Any, Literal, get_args

import numpy as np
import torch
from jaxtyping import Float, Integer, UInt8
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from nashswarm import kernels
from nashswarm.kernels import tiles as layout
from nashswarm.kernels.tiles import Tiles
from nashswarm.quant.entropy import CodeTables, encode_groups, encode_lattice
from nashswarm.quant.grid import GRID_WIDTHS, TILE_ROWS, QuantizedTensor, Scheme, row_blocks
from nashswarm.quant.lattice import Lattice, LatticeTensor
from nashswarm.quant.pack import pack

Activations = Literal["int8", "float32"]
Packable = QuantizedTensor | LatticeTensor
GROUP = 64  # columns of a tile of a lattice, whose scales belong to rows and columns
ESCAPE_BYTES = 8
BUFFERS = tuple(field.name for field in dataclasses.fields(Tiles) if field.type is not int)


def packable(tensor: Packable) -> bool:
    """Whether kernels can read it: tiles of 0, 2, 3, 4 or 8 bits, in groups of a multiple of 32 columns."""
    if isinstance(tensor, LatticeTensor):
        return True
    return tensor.scheme.group_size % layout.CHUNK == 0 and int(tensor.bits.max()) <= max(GRID_WIDTHS)


def to_tiles(tensor: Packable) -> Tiles:
    """The matrix as it stands in memory."""
    if isinstance(tensor, LatticeTensor):
        return _tiles_of_lattice(tensor)
    rows, columns = tensor.codes.shape
    size = tensor.scheme.group_size
    scale, zero_point = (_by_tile(part) for part in (tensor.scale, tensor.zero_point))
    widths = tensor.bits.to(torch.uint8)
    payload = layout.pack(layout.to_tiles(tensor.codes, size).to(torch.uint8), widths.flatten())
    none = torch.zeros(0)
    return Tiles(rows, columns, size, payload, widths, scale, zero_point, none, none, *_no_escapes(len(widths)))


def _tiles_of_lattice(tensor: LatticeTensor) -> Tiles:
    """The width of a tile is the one that takes the fewest bytes: codes beyond its range are escapes, so that a rare
    large code does not widen a whole tile."""
    rows, columns = tensor.codes.shape
    tiles = layout.to_tiles(tensor.codes, GROUP)
    choices = torch.tensor(layout.WIDTHS)
    least, most = tiles.flatten(1).amin(1), tiles.flatten(1).amax(1)
    cost = torch.empty(len(tiles), len(choices), dtype=torch.int64)
    for number, width in enumerate(layout.WIDTHS):
        cost[:, number] = width * tiles[0].numel() // 8
        wide = torch.nonzero((least < _range(width)[0]) | (most > _range(width)[1])).flatten()
        beyond = (tiles[wide] < _range(width)[0]) | (tiles[wide] > _range(width)[1])
        cost[wide, number] += ESCAPE_BYTES * beyond.flatten(1).sum(1)
    widths = choices[cost.argmin(1)]
    low, high = (torch.tensor([_range(width)[side] for width in range(9)])[widths].view(-1, 1, 1) for side in (0, 1))
    escaped = (tiles < low) | (tiles > high)
    codes = (torch.where(escaped, 0, tiles) - low).to(torch.uint8)
    shape = (row_blocks(rows), -(-columns // GROUP))
    tile, row, column = torch.nonzero(escaped, as_tuple=True)
    block, place = tile // shape[1], TILE_ROWS * (tile % shape[1] * GROUP + column) + row
    starts = torch.nn.functional.pad(torch.bincount(block, minlength=shape[0]).cumsum(0), (1, 0))
    lattice = tensor.lattice
    return Tiles(
        rows,
        columns,
        GROUP,
        layout.pack(codes, widths.to(torch.uint8)),
        widths.to(torch.uint8).view(shape),
        torch.zeros(0, dtype=torch.float16),
        torch.zeros(0, dtype=torch.uint8),
        lattice.row_steps(),
        lattice.column_steps(),
        starts.int(),
        place.int(),
        tiles[escaped].int(),
    )


def codes_of(tiles: Tiles) -> Integer[Tensor, "rows columns"]:
    """The integers that tiles hold: unsigned where they have scales, signed where they are a lattice's."""
    codes = layout.unpack(tiles.payload, tiles.widths.flatten(), tiles.group_size).int()
    if not tiles.scale.numel():
        lows = torch.tensor([_range(width)[0] for width in range(9)], dtype=torch.int32)
        codes += lows[tiles.widths.flatten().int()].view(-1, 1, 1)
    shape = tiles.widths.shape
    whole = codes.view(*shape, TILE_ROWS, -1).transpose(1, 2).reshape(TILE_ROWS * shape[0], -1)
    block = torch.repeat_interleave(torch.arange(shape[0]), tiles.escape_starts.diff())
    places = tiles.escape_places.long()
    whole[TILE_ROWS * block + places % TILE_ROWS, places // TILE_ROWS] += tiles.escape_codes
    return whole[: tiles.rows, : tiles.columns]


class PackedMatrix(nn.Module):
    """A weight matrix of shape (out, in) in tiles.  ``lattice`` or ``scheme``: what kind of tensor it was; ``coded``:
    whether its stored form is entropy-coded, a lattice's by the ``tables`` of the model."""

    def __init__(self, tensor: Packable, coded: bool, tables: CodeTables | None = None) -> None:
        super().__init__()
        found = to_tiles(tensor)
        self.shape = (found.rows, found.columns)
        self.group_size = found.group_size
        self.coded, self.tables = coded, tables
        self.lattice: Lattice | None = tensor.lattice if isinstance(tensor, LatticeTensor) else None
        self.scheme: Scheme | None = None if isinstance(tensor, LatticeTensor) else tensor.scheme
        for name in BUFFERS:
            self.register_buffer(name, getattr(found, name))
        self._tiles: Tiles | None = None

    @property
    def tiles(self) -> Tiles:
        if self._tiles is None:
            self._tiles = Tiles(*self.shape, self.group_size, *(getattr(self, name) for name in BUFFERS))
        return self._tiles

    @property
    def weight_bytes(self) -> int:
        """What it holds beside its buffers: the order in which kernels take the tiles."""
        return self.tiles.order.nbytes

    def tensor(self) -> Packable:
        """The tensor it was made of, on the CPU."""
        tiles = Tiles(*self.shape, self.group_size, *(getattr(self, name).cpu() for name in BUFFERS))
        codes = codes_of(tiles)
        if self.lattice is not None:
            return LatticeTensor(codes, self.lattice)
        assert self.scheme is not None
        scale, zero_point = (_by_row(part, len(codes)) for part in (tiles.scale, tiles.zero_point))
        return QuantizedTensor(codes.to(torch.uint8), scale, zero_point, tiles.widths, self.scheme)

    def stored(self) -> UInt8[np.ndarray, " bytes"]:
        """Its bytes in a file: those it was decoded from."""
        tensor = self.tensor()
        if isinstance(tensor, LatticeTensor):
            assert self.tables is not None
            return encode_lattice(tensor, self.tables)
        return encode_groups(tensor) if self.coded else pack(tensor)

    def dequantize(self) -> Float[Tensor, "out in"]:
        """The float32 matrix that it stands for."""
        return layout.dequantize(self.tiles)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "PackedMatrix":
        """Follow the model to another device, but keep every dtype: these are no activations."""
        device = fn(torch.zeros(0, device=self.tiles.payload.device)).device
        self._tiles = None
        super()._apply(lambda part: part.to(device), recurse)  # type: ignore[no-untyped-call]
        return self

    def extra_repr(self) -> str:
        kind = "lattice" if self.lattice is not None else f"groups of {self.group_size}"
        return f"{self.shape[0]}x{self.shape[1]}, {kind}, {8 * self.tiles.nbytes / math.prod(self.shape):.2f} bits"


class QuantizedLinear(nn.Linear):
    """y = x Wᵀ + b on a packed W; ``activations``: what x is rounded to inside the product.  ``transposed``: it
    took the place of a Conv1D."""

    matrix: PackedMatrix
    activations: Activations = "int8"
    transposed: bool = False

    @property
    def weight(self) -> Float[Tensor, "out in"]:  # type: ignore[override]
        """W as floats, made anew at every call; changing it in place is an error, for nothing would keep the change."""
        return _read_only(self.matrix)

    def forward(self, x: Float[Tensor, "*batch in"]) -> Float[Tensor, "*batch out"]:
        return kernels.matmul(x, self.matrix.tiles, self.activations, self.bias)


class QuantizedEmbedding(nn.Embedding):
    """Rows of a packed matrix, dequantized as they are looked up; ``like``: of the dtype they come in."""

    matrix: PackedMatrix
    like: Float[Tensor, "0"]

    @property
    def weight(self) -> Float[Tensor, "out in"]:  # type: ignore[override]
        """All rows as floats, made anew at every call; changing them in place is an error."""
        return _read_only(self.matrix)

    def forward(self, ids: Integer[Tensor, "*batch"]) -> Float[Tensor, "*batch in"]:
        return kernels.rows_of(self.matrix.tiles, ids).to(self.like.dtype)


def quantized(module: nn.Module, matrix: PackedMatrix, dtype: torch.dtype) -> QuantizedLinear | QuantizedEmbedding:
    """What takes the place of a Linear, Conv1D or Embedding, or of a module of a class derived from them; ``dtype``:
    of the rows that an embedding gives out."""
    if isinstance(module, Conv1D):
        plain = nn.Linear(module.nx, module.nf, bias=False, device="meta")
        plain.bias = module.bias
        found = quantized(plain, matrix, dtype)
        found.transposed = True
        return found
    kind, packed = type(module), QuantizedEmbedding if isinstance(module, nn.Embedding) else QuantizedLinear
    found = _twin(module)
    del found._parameters["weight"]
    found.__class__ = packed if kind in packed.__bases__ else type(f"Quantized{kind.__name__}", (kind, packed), {})
    found.matrix = matrix
    if isinstance(found, QuantizedEmbedding):
        found.register_buffer("like", torch.zeros(0, dtype=dtype), persistent=False)
    return found


def dequantized(module: QuantizedLinear | QuantizedEmbedding, weight: nn.Parameter) -> nn.Module:
    """The module that ``quantized`` took the place of, with this weight of shape (out, in)."""
    if getattr(module, "transposed", False):
        plain: Any = Conv1D(*module.matrix.shape)
        plain.weight, plain.bias = nn.Parameter(weight.T.contiguous()), module.bias
        return plain
    plain = _twin(module)
    del plain._modules["matrix"]
    plain._buffers.pop("like", None)
    plain.__class__ = type(module).__bases__[0]
    plain.weight = weight
    return plain


def _twin(module: nn.Module) -> Any:
    """A copy that shares the module's tensors and nothing else that may change."""
    found = copy.copy(module)
    found.__dict__ |= {name: dict(module.__dict__[name]) for name in ("_parameters", "_buffers", "_modules")}
    return found


def set_activations(model: nn.Module, activations: Activations) -> None:
    """What every packed linear layer of ``model`` rounds its inputs to: ``int8``, or ``float32`` (not at all, slower).

    Raises ValueError for anything else.
    """
    if activations not in get_args(Activations):
        raise ValueError(f"unknown activations {activations!r}: choose {', '.join(get_args(Activations))}")
    for module in model.modules():
        if isinstance(module, QuantizedLinear):
            module.activations = activations


class _ReadOnly(Tensor):
    """Floats that nobody may change: what is made of them are ordinary tensors."""

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @property
    def data(self) -> Tensor:  # type: ignore[override]
        """The way around the refusal of ``_read_only``, which adapters take when they are merged."""
        raise RuntimeError("packed weights cannot be changed: call the model's dequantize() first")


def _read_only(matrix: PackedMatrix) -> Tensor:
    with torch.inference_mode():  # such a tensor refuses to be changed
        return matrix.dequantize().as_subclass(_ReadOnly)


def _range(width: int) -> tuple[int, int]:
    """The least and the largest signed code of a width."""
    return (-(1 << width - 1), (1 << width - 1) - 1) if width else (0, 0)


def _by_tile(part: Tensor) -> Tensor:
    """(out, groups) → (row blocks, groups, 16)"""
    padded = nn.functional.pad(part, (0, 0, 0, -len(part) % TILE_ROWS))
    return padded.view(-1, TILE_ROWS, part.shape[1]).transpose(1, 2).contiguous()


def _by_row(part: Tensor, rows: int) -> Tensor:
    """(row blocks, groups, 16) → (out, groups)"""
    return part.transpose(1, 2).reshape(-1, part.shape[1])[:rows].contiguous()


def _no_escapes(blocks: int) -> tuple[Tensor, Tensor, Tensor]:
    none = torch.zeros(0, dtype=torch.int32)
    return torch.zeros(blocks + 1, dtype=torch.int32), none, none
