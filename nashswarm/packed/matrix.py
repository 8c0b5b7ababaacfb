"""Weight matrices as modules hold them: in the layout that kernels read, never as floats.

A ``TileMatrix`` holds codes in tiles, which a file may store in another format.  A ``TrellisMatrix`` holds the bytes of
the file themselves: if these are mapped into memory, nothing is read before it is used.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, ClassVar, cast

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn

from nashswarm.kernels import tiles as layout
from nashswarm.kernels import trellis
from nashswarm.kernels.tiles import Tiles
from nashswarm.kernels.trellis import Trellis
from nashswarm.packed.tiles import Packable, codes_of, packable, scales_by_row, to_tiles
from nashswarm.quant.entropy import CodeTables, encode_groups, encode_lattice
from nashswarm.quant.grid import QuantizedTensor, Scheme
from nashswarm.quant.lattice import Lattice, LatticeTensor
from nashswarm.quant.lattice_paths import PathTensor
from nashswarm.quant.pack import pack
from nashswarm.quant.path_entropy import encode_paths
from nashswarm.quant.prototype import ClassedTensor

BUFFERS = tuple(field.name for field in dataclasses.fields(Tiles) if field.type is not int)


class Counted(nn.Module):
    """A module that counts its changes together with all others of its kind.

    Whoever knows what these modules hold need not look again until ``changes`` has grown.
    """

    changes: ClassVar[int] = 0

    def __setattr__(self, name: str, value: Any) -> None:
        Counted.changes += 1
        super().__setattr__(name, value)

    def __delattr__(self, name: str) -> None:
        Counted.changes += 1
        super().__delattr__(name)

    def register_buffer(self, name: str, tensor: Tensor | None, persistent: bool = True) -> None:
        Counted.changes += 1
        super().register_buffer(name, tensor, persistent)

    def add_module(self, name: str, module: nn.Module | None) -> None:
        Counted.changes += 1
        super().add_module(name, module)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        Counted.changes += 1
        return super()._apply(fn, recurse)  # type: ignore[no-untyped-call]


class PackedMatrix(Counted):
    """A weight matrix of ``shape`` (out, in); its buffers are what a kernel reads.

    ``kind``: its format, in words.  ``escapes``: the number of codes beyond the range of their tile.  ``coded``:
    whether its bytes in a file are entropy-coded.  ``tables``: the code tables that all matrices of a model share, if
    its bytes in a file need them.
    """

    kind: str
    escapes = 0
    coded = False
    tables: CodeTables | None = None

    def __init__(self, rows: int, columns: int) -> None:
        super().__init__()
        self.shape = (rows, columns)
        self._tiles: Tiles | Trellis | None = None

    @property
    def tiles(self) -> Tiles | Trellis:
        """Return the buffers as the value that kernels take."""
        raise NotImplementedError

    @property
    def nbytes(self) -> int:
        """Count the bytes in memory."""
        return sum(part.nbytes for part in self.buffers()) + self.weight_bytes

    @property
    def weight_bytes(self) -> int:
        """Count the bytes that it holds beside its buffers."""
        return sum(part.nbytes for part in self.derived())

    def derived(self) -> tuple[Tensor, ...]:
        """Return the tensors that it holds beside its buffers, computed from them."""
        raise NotImplementedError

    def tile_widths(self) -> UInt8[Tensor, "row_groups column_groups"]:
        """Return the bits per weight of every tile, its scales not counted."""
        raise NotImplementedError

    def encode(self) -> UInt8[np.ndarray, " bytes"]:
        """Return its bytes in a file: the same bytes that it was decoded from."""
        raise NotImplementedError

    def dequantize(self) -> Float[Tensor, "out in"]:
        """Return the weights as a float32 matrix."""
        raise NotImplementedError

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "PackedMatrix":
        """Move to another device with the model, but keep every dtype: the buffers are codes and their scales."""
        device = fn(torch.zeros(0, device=next(self.buffers()).device)).device
        self._tiles = None
        super()._apply(lambda part: part.to(device), recurse)
        return self

    def extra_repr(self) -> str:
        return f"{self.shape[0]}x{self.shape[1]}, {self.kind}, {8 * self.nbytes / math.prod(self.shape):.2f} bits"


class TileMatrix(PackedMatrix):
    """A quantized tensor in tiles.

    ``lattice`` or ``scheme``: the parameters of the quantized tensor, one of them None.  ``paths``: whether its codes
    are on lattice paths.
    """

    def __init__(self, tensor: Packable, coded: bool, tables: CodeTables | None = None) -> None:
        packed = to_tiles(tensor)
        super().__init__(packed.rows, packed.columns)
        self.group_size = packed.group_size
        self.coded, self.tables = coded, tables
        self.lattice: Lattice | None = tensor.lattice if isinstance(tensor, LatticeTensor) else None
        self.scheme: Scheme | None = None if isinstance(tensor, LatticeTensor) else tensor.scheme
        self.paths = isinstance(tensor, PathTensor)
        self.escapes = len(packed.escape_codes)
        kind = "lattice paths" if self.paths else "lattice"
        self.kind = f"groups of {self.group_size}" if self.lattice is None else kind
        for name in BUFFERS:
            self.register_buffer(name, getattr(packed, name))

    @property
    def tiles(self) -> Tiles:
        if self._tiles is None:
            self._tiles = Tiles(*self.shape, self.group_size, *(getattr(self, name) for name in BUFFERS))
        return cast(Tiles, self._tiles)

    def derived(self) -> tuple[Tensor, ...]:
        """Return the order in which kernels take the tiles."""
        return (self.tiles.order,)

    def tile_widths(self) -> UInt8[Tensor, "row_groups column_groups"]:
        return self.tiles.widths

    def tensor(self) -> Packable:
        """Return the quantized tensor that it was made from, on the CPU."""
        held = Tiles(*self.shape, self.group_size, *(getattr(self, name).cpu() for name in BUFFERS))
        codes = codes_of(held)
        if self.lattice is not None:
            return (PathTensor if self.paths else LatticeTensor)(codes, self.lattice)
        assert self.scheme is not None
        scale, zero_point = (scales_by_row(part, len(codes)) for part in (held.scale, held.zero_point))
        return QuantizedTensor(codes.to(torch.uint8), scale, zero_point, held.widths, self.scheme)

    def encode(self) -> UInt8[np.ndarray, " bytes"]:
        tensor = self.tensor()
        if isinstance(tensor, LatticeTensor):
            assert self.tables is not None
            if isinstance(tensor, PathTensor):
                return encode_paths(tensor, self.tables)
            return encode_lattice(tensor, self.tables)
        return encode_groups(tensor) if self.coded else pack(tensor)

    def dequantize(self) -> Float[Tensor, "out in"]:
        return layout.dequantize(self.tiles)


class TrellisMatrix(PackedMatrix):
    """A trellis-coded matrix: one buffer, ``content``, whose bytes are those of the file."""

    content: Tensor
    kind = "trellis"

    def __init__(self, matrix: Trellis) -> None:
        super().__init__(matrix.rows, matrix.columns)
        self.register_buffer("content", matrix.content)
        self._tiles = matrix

    @property
    def tiles(self) -> Trellis:
        if self._tiles is None:
            self._tiles = trellis.parse(self.content)
        return cast(Trellis, self._tiles)

    def derived(self) -> tuple[Tensor, ...]:
        """Return where the tiles of each group of rows start."""
        return (self.tiles.starts,)

    def tile_widths(self) -> UInt8[Tensor, "row_groups column_groups"]:
        return trellis.tile_rates(self.tiles)

    def encode(self) -> UInt8[np.ndarray, " bytes"]:
        return self.content.cpu().numpy()

    def dequantize(self) -> Float[Tensor, "out in"]:
        return trellis.dequantize(trellis.parse(self.content.cpu())).to(self.content.device)


def as_held(
    tensor: Packable | ClassedTensor | Trellis, coded: bool, tables: CodeTables | None = None
) -> PackedMatrix | Float[Tensor, "out in"]:
    """Return a decoded matrix as modules hold it, or as floats if kernels cannot read its format.

    ``coded``: whether its bytes in a file are entropy-coded, with these ``tables`` if it is on a lattice.
    """
    if isinstance(tensor, Trellis):
        return TrellisMatrix(tensor)
    if isinstance(tensor, ClassedTensor) or not packable(tensor):
        return tensor.dequantize()
    return TileMatrix(tensor, coded, tables)
