"""Lay packed matrices out for the operators of other runtimes, without changing a weight.

``Native`` keeps the matrix as it is, and calls nashswarm's own operators.  ``Grouped`` is the layout of onnxruntime's
MatMulNBits: one width of 2, 4 or 8 bits, and scales of groups.  ``Planes`` takes any widths: bit b of all codes of one
width is stored in one array of bytes, eight columns to a byte, and sums of masked bytes give the codes.  ``qdq.Digits``
takes any widths, too, as integers that standard operators read.  Each layout has ``product``, x Wᵀ, and ``rows``, the
rows of the dequantized matrix with given ids.
"""

import copy
import math
from collections.abc import Callable
from typing import Any, Protocol, cast, runtime_checkable

import numpy as np
import torch
from jaxtyping import Integer, UInt8
from torch import Tensor, nn

from nashswarm import kernels
from nashswarm.kernels import tiles as layout
from nashswarm.kernels.trellis import Trellis
from nashswarm.packed.matrix import PackedMatrix, TileMatrix
from nashswarm.packed.modules import QUANTIZED, QuantizedLinear
from nashswarm.quant.grid import QuantizedTensor

NBITS_WIDTHS = (2, 4, 8)
NBITS_GROUPS = (16, 32, 64, 128, 256)
ACCURACY = {"float32": 1, "int8": 4}  # onnxruntime's accuracy_level


@runtime_checkable
class Weight(Protocol):
    """The interface of all layouts of a packed matrix."""

    def product(self, x: Tensor) -> Tensor: ...

    def rows(self, ids: Tensor) -> Tensor: ...


class Native(nn.Module):
    """The matrix as it is held, for nashswarm's operators; a program that loads the export imports nashswarm first."""

    def __init__(self, matrix: PackedMatrix, activations: str) -> None:
        super().__init__()
        in_trellis = isinstance(matrix.tiles, Trellis)
        self.names = ("content", "starts") if in_trellis else (*kernels.PARTS, "order")
        for name in self.names:
            self.register_buffer(name, getattr(matrix.tiles, name))
        self.sizes = kernels.operator_arguments(matrix.tiles)[len(self.names) :]
        self.prefix, self.activations = "trellis_" if in_trellis else "", activations

    def product(self, x: Tensor) -> Tensor:
        multiply = getattr(torch.ops.nashswarm, f"{self.prefix}matmul")
        return cast(Tensor, multiply(x, None, self.activations, *self._arguments()))

    def rows(self, ids: Tensor) -> Tensor:
        return cast(Tensor, getattr(torch.ops.nashswarm, f"{self.prefix}rows")(ids, *self._arguments()))

    def _arguments(self) -> tuple[Any, ...]:
        return *(getattr(self, name) for name in self.names), *self.sizes


class Grouped(nn.Module):
    """Codes of one width in groups, the first one lowest in every byte, as MatMulNBits reads them."""

    codes: Tensor
    scale: Tensor
    zero_point: Tensor
    masks: Tensor
    places: Tensor

    def __init__(self, matrix: TileMatrix, activations: str) -> None:
        super().__init__()
        tensor = matrix.tensor()
        assert isinstance(tensor, QuantizedTensor)
        bits, size = int(tensor.bits.flatten()[0]), tensor.scheme.group_size
        rows, columns = matrix.shape
        self.register_buffer("codes", _pack_little_endian(tensor.codes.view(rows, -1, size), bits))
        self.register_buffer("scale", tensor.scale.half())
        self.register_buffer("zero_point", _pack_little_endian(tensor.zero_point, bits))
        shifts = torch.arange(0, 8, bits)
        self.register_buffer("masks", (((1 << bits) - 1) << shifts).to(torch.uint8))
        self.register_buffer("places", 1.0 / (1 << shifts))
        self.attributes: dict[str, Any] = {"K": columns, "N": rows, "bits": bits, "block_size": size}
        self.attributes["accuracy_level"] = ACCURACY[activations]

    def product(self, x: Tensor) -> Tensor:
        return torch.onnx.ops.symbolic(
            "com.microsoft::MatMulNBits",
            (x, self.codes, self.scale.float(), self.zero_point),
            self.attributes,
            dtype=x.dtype,
            shape=(*x.shape[:-1], self.attributes["N"]),
            version=1,
        )

    def rows(self, ids: Tensor) -> Tensor:
        codes, scale = self._fields(self.codes[ids]), self.scale[ids].float()
        zero_point = self._fields(self.zero_point[ids])[..., : self.scale.shape[1]]
        return ((codes - zero_point.unsqueeze(-1)) * scale.unsqueeze(-1)).flatten(-2)

    def _fields(self, packed: Tensor) -> Tensor:
        """Unpack bytes to the codes in them, as floats."""
        return ((packed.unsqueeze(-1) & self.masks).float() * self.places).flatten(-2)


class Planes(nn.Module):
    """Tiles of any widths, sorted by width: an array of bytes for each bit of their codes, unpacked at every call."""

    place: Tensor
    masks: Tensor
    places: Tensor
    scale: Tensor
    zero_point: Tensor
    row_scale: Tensor
    escape_places: Tensor
    escape_codes: Tensor

    def __init__(self, matrix: TileMatrix, activations: str) -> None:
        super().__init__()
        tiles = matrix.tiles
        widths = tiles.widths.flatten().long()
        codes = layout.unpack(tiles.payload, tiles.widths.flatten(), tiles.group_size).numpy()
        self.widths = [width for width in layout.WIDTHS[1:] if (widths == width).any()]
        order = torch.cat([torch.nonzero(widths == width).flatten() for width in (*self.widths, 0)])
        self.shape, self.blocks, self.size = matrix.shape, tuple(tiles.widths.shape), tiles.group_size
        self.empty = bool((widths == 0).any())
        packed = len(widths) - int((widths == 0).sum())
        place = torch.empty_like(order)
        place[order] = torch.arange(len(order)).clamp(max=packed)  # all empty tiles share one place
        self.register_buffer("place", place.int())
        self.register_buffer("masks", (1 << torch.arange(8)).to(torch.uint8))
        self.register_buffer("places", 1.0 / (1 << torch.arange(8)))
        for width in self.widths:
            bits = codes[(widths == width).numpy()][None] >> np.arange(width, dtype=np.uint8)[:, None, None, None] & 1
            planes = np.packbits(bits, -1, bitorder="little")
            self.register_buffer(f"planes{width}", torch.from_numpy(planes))
        self.grouped = tiles.scale.numel() > 0
        if self.grouped:
            for name in ("scale", "zero_point"):
                part = getattr(tiles, name).reshape(-1, layout.TILE_ROWS)
                self.register_buffer(name, part[order[:packed]].unsqueeze(-1))
        self.sides = [name for name in ("row_scale", "column_scale") if getattr(tiles, name).numel()]
        for name in self.sides:
            self.register_buffer(name, getattr(tiles, name).float())
        self.escapes = len(tiles.escape_codes)
        if self.escapes:
            rows, columns = layout.escape_positions(tiles)
            self.register_buffer("escape_places", (rows * matrix.shape[1] + columns).int())
            self.register_buffer("escape_codes", tiles.escape_codes)

    def product(self, x: Tensor) -> Tensor:
        y = self._scaled("column_scale", x) @ self._values().T
        return self._scaled("row_scale", y)

    def rows(self, ids: Tensor) -> Tensor:
        rows = self._scaled("column_scale", self._values()[ids])
        return rows * self.row_scale[ids].unsqueeze(-1) if "row_scale" in self.sides else rows

    def _scaled(self, side: str, x: Tensor) -> Tensor:
        return x * getattr(self, side) if side in self.sides else x

    def _values(self) -> Tensor:
        """Return the matrix without the scales of its rows and columns."""
        parts = [self._codes(width) for width in self.widths]
        values = torch.cat(parts) if parts else torch.zeros(0, layout.TILE_ROWS, self.size)
        if self.grouped:
            values = (values - self.zero_point.float()) * self.scale.float()
        if self.empty:
            values = torch.cat([values, torch.zeros(1, layout.TILE_ROWS, self.size)])
        whole = values[self.place.long()].view(*self.blocks, layout.TILE_ROWS, self.size).transpose(1, 2)
        matrix = whole.reshape(self.blocks[0] * layout.TILE_ROWS, -1)[: self.shape[0], : self.shape[1]]
        if not self.escapes:
            return matrix
        places = self.escape_places.long()
        return matrix.reshape(-1).scatter_add(0, places, self.escape_codes.float()).view(self.shape)

    def _codes(self, width: int) -> Tensor:
        planes = getattr(self, f"planes{width}")
        bits = [(planes[bit].unsqueeze(-1) & self.masks).float() * (self.places * 2.0**bit) for bit in range(width)]
        codes = sum(bits[1:], bits[0]).flatten(2)
        return codes if self.grouped else codes - 2.0 ** (width - 1)


class Product(nn.Module):
    """A linear layer y = x Wᵀ + b around one of the layouts."""

    def __init__(self, weight: Weight, bias: Tensor | None) -> None:
        super().__init__()
        self.weight, self.bias = weight, bias

    def forward(self, x: Tensor) -> Tensor:
        y = self.weight.product(x)
        return y if self.bias is None else y + self.bias


class Rows(nn.Module):
    """An embedding around one of the layouts: the rows of W with given ids."""

    def __init__(self, weight: Weight) -> None:
        super().__init__()
        self.weight = weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.weight.rows(ids)


def for_torch(matrix: PackedMatrix, activations: str) -> Native:
    """Lay a matrix out for a program of torch.export."""
    return Native(matrix, activations)


def for_onnx(matrix: PackedMatrix, activations: str) -> Grouped | Planes:
    """Lay a matrix out for an ONNX file: for MatMulNBits if that operator can read it."""
    tiled = in_tiles(matrix)
    widths = set(tiled.tile_widths().unique().tolist())
    fits = tiled.scheme is not None and len(widths) == 1 and widths <= set(NBITS_WIDTHS)
    return (Grouped if fits and tiled.group_size in NBITS_GROUPS else Planes)(tiled, activations)


def in_tiles(matrix: PackedMatrix) -> TileMatrix:
    """Return the matrix, whose tiles can be laid out anew.  Raises ValueError if it is trellis-coded."""
    if not isinstance(matrix, TileMatrix):
        raise ValueError(
            "no operator of ONNX reads trellis-coded matrices: compress with method=nash_lattice, or take "
            "--to torch-export"
        )
    return matrix


def portable(model: Any, activations: str, layout_of: Callable[[PackedMatrix, str], Any]) -> Any:
    """Copy a model and replace its packed modules by another layout; modules that share a matrix still share it."""
    exported = copy.deepcopy(model)
    weights: dict[PackedMatrix, Any] = {}
    for name, module in list(exported.named_modules(remove_duplicate=False)):
        if isinstance(module, QUANTIZED):
            if module.matrix not in weights:
                weights[module.matrix] = layout_of(module.matrix, activations)
            weight = weights[module.matrix]
            bias = module.bias if isinstance(module, QuantizedLinear) else None
            replacement = Product(weight, bias) if isinstance(module, QuantizedLinear) else Rows(weight)
            exported.set_submodule(name, replacement)
    return exported


def _pack_little_endian(codes: Integer[Tensor, "*rows columns"], bits: int) -> UInt8[Tensor, "*rows bytes"]:
    """Pack codes, 8 / bits to a byte, the first one lowest; the last byte is filled with zeros."""
    count = 8 // bits
    filled = nn.functional.pad(codes.int(), (0, -codes.shape[-1] % count))
    fields = filled.view(*codes.shape[:-1], math.ceil(codes.shape[-1] / count), count)
    return (fields << torch.arange(0, 8, bits)).sum(-1).to(torch.uint8)
