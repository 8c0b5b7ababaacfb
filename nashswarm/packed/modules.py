"""Modules that compute on packed weights: a linear layer and an embedding around a ``PackedMatrix``.

A matrix in memory is held in the tiles that kernels read, never as floats.  An output head that is tied to the
embedding holds the same ``PackedMatrix``.
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
from nashswarm.packed.tiles import Packable, codes_of, scales_by_row, to_tiles
from nashswarm.quant.entropy import CodeTables, encode_groups, encode_lattice
from nashswarm.quant.grid import QuantizedTensor, Scheme
from nashswarm.quant.lattice import Lattice, LatticeTensor
from nashswarm.quant.pack import pack

Activations = Literal["int8", "float32"]
BUFFERS = tuple(field.name for field in dataclasses.fields(Tiles) if field.type is not int)


class PackedMatrix(nn.Module):
    """A weight matrix of shape (out, in) in tiles.

    ``lattice`` or ``scheme``: the parameters of the quantized tensor that it holds, one of them None.  ``coded``:
    whether its bytes in a file are entropy-coded; a lattice is coded by the ``tables`` that all matrices of a model
    share.
    """

    def __init__(self, tensor: Packable, coded: bool, tables: CodeTables | None = None) -> None:
        super().__init__()
        tiles = to_tiles(tensor)
        self.shape = (tiles.rows, tiles.columns)
        self.group_size = tiles.group_size
        self.coded, self.tables = coded, tables
        self.lattice: Lattice | None = tensor.lattice if isinstance(tensor, LatticeTensor) else None
        self.scheme: Scheme | None = None if isinstance(tensor, LatticeTensor) else tensor.scheme
        for name in BUFFERS:
            self.register_buffer(name, getattr(tiles, name))
        self._tiles: Tiles | None = None

    @property
    def tiles(self) -> Tiles:
        """Return the buffers as the value that kernels take."""
        if self._tiles is None:
            self._tiles = Tiles(*self.shape, self.group_size, *(getattr(self, name) for name in BUFFERS))
        return self._tiles

    @property
    def weight_bytes(self) -> int:
        """Count the bytes that it holds beside its buffers: the order in which kernels take the tiles."""
        return self.tiles.order.nbytes

    def tensor(self) -> Packable:
        """Return the quantized tensor that it was made from, on the CPU."""
        tiles = Tiles(*self.shape, self.group_size, *(getattr(self, name).cpu() for name in BUFFERS))
        codes = codes_of(tiles)
        if self.lattice is not None:
            return LatticeTensor(codes, self.lattice)
        assert self.scheme is not None
        scale, zero_point = (scales_by_row(part, len(codes)) for part in (tiles.scale, tiles.zero_point))
        return QuantizedTensor(codes.to(torch.uint8), scale, zero_point, tiles.widths, self.scheme)

    def encode(self) -> UInt8[np.ndarray, " bytes"]:
        """Return its bytes in a file: the same bytes that it was decoded from."""
        tensor = self.tensor()
        if isinstance(tensor, LatticeTensor):
            assert self.tables is not None
            return encode_lattice(tensor, self.tables)
        return encode_groups(tensor) if self.coded else pack(tensor)

    def dequantize(self) -> Float[Tensor, "out in"]:
        """Return the weights as a float32 matrix."""
        return layout.dequantize(self.tiles)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "PackedMatrix":
        """Move to another device with the model, but keep every dtype: the buffers are codes and their scales."""
        device = fn(torch.zeros(0, device=self.tiles.payload.device)).device
        self._tiles = None
        super()._apply(lambda part: part.to(device), recurse)  # type: ignore[no-untyped-call]
        return self

    def extra_repr(self) -> str:
        kind = "lattice" if self.lattice is not None else f"groups of {self.group_size}"
        return f"{self.shape[0]}x{self.shape[1]}, {kind}, {8 * self.tiles.nbytes / math.prod(self.shape):.2f} bits"


class QuantizedLinear(nn.Linear):
    """y = x Wᵀ + b with a packed W.

    ``activations``: the type that x is rounded to inside the product.  ``transposed``: whether the layer replaced a
    Conv1D, which keeps Wᵀ.
    """

    matrix: PackedMatrix
    activations: Activations = "int8"
    transposed: bool = False

    @property
    def weight(self) -> Float[Tensor, "out in"]:  # type: ignore[override]
        """Return W as floats, computed at every call.

        Changing the result in place is an error, because the change would be lost.
        """
        return _read_only(self.matrix)

    def forward(self, x: Float[Tensor, "*batch in"]) -> Float[Tensor, "*batch out"]:
        return kernels.matmul(x, self.matrix.tiles, self.activations, self.bias)


class QuantizedEmbedding(nn.Embedding):
    """An embedding that dequantizes the rows of a packed matrix as they are looked up.

    ``like``: an empty tensor of the dtype that rows are returned in; it follows the model to another dtype.
    """

    matrix: PackedMatrix
    like: Float[Tensor, "0"]

    @property
    def weight(self) -> Float[Tensor, "out in"]:  # type: ignore[override]
        """Return all rows as floats, computed at every call; changing them in place is an error."""
        return _read_only(self.matrix)

    def forward(self, ids: Integer[Tensor, "*batch"]) -> Float[Tensor, "*batch in"]:
        return kernels.rows_of(self.matrix.tiles, ids).to(self.like.dtype)


def quantized(module: nn.Module, matrix: PackedMatrix, dtype: torch.dtype) -> QuantizedLinear | QuantizedEmbedding:
    """Return the packed module that replaces a Linear, a Conv1D, an Embedding or an instance of a derived class.

    ``dtype``: of the rows that an embedding returns.  A derived class keeps its own ``forward``: OPT's positional
    embedding adds an offset there.
    """
    if isinstance(module, Conv1D):
        linear = nn.Linear(module.nx, module.nf, bias=False, device="meta")
        linear.bias = module.bias
        replacement = quantized(linear, matrix, dtype)
        replacement.transposed = True
        return replacement
    kind, packed = type(module), QuantizedEmbedding if isinstance(module, nn.Embedding) else QuantizedLinear
    replacement = _shallow_copy(module)
    del replacement._parameters["weight"]
    derived = kind not in packed.__bases__
    replacement.__class__ = type(f"Quantized{kind.__name__}", (kind, packed), {}) if derived else packed
    replacement.matrix = matrix
    if isinstance(replacement, QuantizedEmbedding):
        replacement.register_buffer("like", torch.zeros(0, dtype=dtype), persistent=False)
    return replacement


def dequantized(module: QuantizedLinear | QuantizedEmbedding, weight: nn.Parameter) -> nn.Module:
    """Return the module that ``quantized`` replaced, with this weight of shape (out, in)."""
    if getattr(module, "transposed", False):
        plain: Any = Conv1D(*module.matrix.shape)
        plain.weight, plain.bias = nn.Parameter(weight.T.contiguous()), module.bias
        return plain
    plain = _shallow_copy(module)
    del plain._modules["matrix"]
    plain._buffers.pop("like", None)
    plain.__class__ = type(module).__bases__[0]
    plain.weight = weight
    return plain


def _shallow_copy(module: nn.Module) -> Any:
    """Copy a module: the copy shares its tensors, but not the dictionaries that name them."""
    twin = copy.copy(module)
    twin.__dict__ |= {name: dict(module.__dict__[name]) for name in ("_parameters", "_buffers", "_modules")}
    return twin


def set_activations(model: nn.Module, activations: Activations) -> None:
    """Set the type that every packed linear layer of ``model`` rounds its inputs to inside the product.

    ``int8`` is fast; ``float32`` does not round and is slower.  Raises ValueError for anything else.
    """
    if activations not in get_args(Activations):
        raise ValueError(f"unknown activations {activations!r}: choose {', '.join(get_args(Activations))}")
    for module in model.modules():
        if isinstance(module, QuantizedLinear):
            module.activations = activations


class _ReadOnly(Tensor):
    """A tensor that refuses changes in place; results of operations on it are ordinary tensors."""

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @property
    def data(self) -> Tensor:  # type: ignore[override]
        """Refuse the detached view, which would allow changes: adapters use it when they are merged."""
        raise RuntimeError("packed weights cannot be changed: call the model's dequantize() first")


def _read_only(matrix: PackedMatrix) -> Tensor:
    with torch.inference_mode():  # a tensor made here refuses changes in place
        return matrix.dequantize().as_subclass(_ReadOnly)
