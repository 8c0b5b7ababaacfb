"""Store packed matrices as integers that the standard operators of ONNX dequantize: INT4 and INT8.

A code is a sum of signed digits, so that none is too large for these types, and a matrix is a sum of products:

    W = Σ_k scale · 2^(bits k) · D_k · column_scale

with one DequantizeLinear for every D_k.  D_0 has all columns; a later D_k only has the columns in which a code does not
fit the digits before it.  There are no zero points and every scale is positive, as TensorRT requires (NVIDIA, TensorRT
documentation, "Quantization schemes": INT4 in blocks of 64 or 128 columns, INT8 by row).

A matrix in groups has INT4 digits.  A code of 2, 3 or 4 bits less its zero point is one digit, 4 bits in the file.  A
code of 8 bits is two digits, 8 bits in the file, up to an offset of its group, which sums over groups of x add.  A
matrix on a lattice has INT4 digits too, or INT8 digits if those take no more bytes; an escape takes a digit of its
whole column.
"""

from typing import Any

import torch
from jaxtyping import Float, Integer
from torch import Tensor, nn

from nashswarm.packed.matrix import TileMatrix
from nashswarm.quant.grid import TILE_ROWS, QuantizedTensor
from nashswarm.quant.lattice import LatticeTensor

OPSET = 21  # of ONNX: the first with INT4 and with scales of blocks
BLOCK = 64  # columns with one scale, where that divides them
DigitMatrices = list[tuple[Tensor, Tensor]]  # of each k the columns, and D_k as int8 (rows, columns)


class Digits(nn.Module):
    """A matrix as ``count`` digits of ``bits`` bits, the first one lowest; inputs of products stay floats."""

    scale: Tensor
    column_scale: Tensor
    offset: Tensor

    def __init__(self, matrix: TileMatrix, activations: str) -> None:
        super().__init__()
        tensor = matrix.tensor()
        self.bits, span = 4, matrix.shape[1]  # columns that share a scale
        if isinstance(tensor, LatticeTensor):
            parts, scale = digits(tensor.codes.int(), 4), tensor.lattice.row_steps().unsqueeze(1)
            parts = parts[:1] + [_fill_block(*part) for part in parts[1:]]
            bytewise = digits(tensor.codes.int(), 8)
            if _total_columns(bytewise) <= _total_columns(parts) / 2:
                self.bits, parts = 8, bytewise
            self.register_buffer("column_scale", tensor.lattice.column_steps())
        else:
            values, scale, offset = _in_range(tensor)
            span = tensor.scheme.group_size
            parts = digits(values, 4, span)
            if offset.any():
                self.register_buffer("offset", offset.half())
        self.register_buffer("scale", scale)
        self.span, self.count = span, len(parts)
        self.scales_x = self.bits == 4 and isinstance(tensor, LatticeTensor)
        for number, (columns, part) in enumerate(parts):
            places = torch.full((matrix.shape[1],), len(columns))
            places.scatter_reduce_(0, columns, torch.arange(len(columns)), "amin")  # padding repeats column 0
            self.register_buffer(f"digits{number}", part)
            self.register_buffer(f"chosen{number}", columns.int())
            self.register_buffer(f"places{number}", places.int())
            self.register_buffer(f"groups{number}", (columns[::span] // span).unique().int())

    def product(self, x: Tensor) -> Tensor:
        scaled = x * self.column_scale if self.scales_x else x
        y = scaled @ self._dequantized(0).T
        for number in range(1, self.count):
            selected = scaled.index_select(-1, getattr(self, f"chosen{number}"))
            y = y + selected @ self._dequantized(number).T
        if hasattr(self, "offset"):
            y = y + x.unflatten(-1, (-1, self.span)).sum(-1) @ self._shift().T
        return y

    def rows(self, ids: Tensor) -> Tensor:
        rows = nn.functional.embedding(ids, self._dequantized(0))
        for number in range(1, self.count):
            part = nn.functional.pad(nn.functional.embedding(ids, self._dequantized(number)), (0, 1))
            rows = rows + part.index_select(-1, getattr(self, f"places{number}"))
        if hasattr(self, "offset"):
            rows = rows + _repeated(nn.functional.embedding(ids, self._shift()), self.span)
        return rows * self.column_scale if self.scales_x else rows

    def _dequantized(self, number: int) -> Float[Tensor, "rows chosen"]:
        """Return scale · 2^(bits k) · D_k.

        The scales of columns multiply INT8 digits here and not x: otherwise onnxruntime would fuse DequantizeLinear
        with the product and round x to 8 bits.
        """
        part, columns, groups = (getattr(self, f"{name}{number}") for name in ("digits", "chosen", "groups"))
        scale = self.scale.float() * 2.0 ** (self.bits * number)
        if self.bits == 8:
            return _dequantize(part, scale.flatten(), {"axis": 0}) * self.column_scale.index_select(0, columns)
        if number:
            scale = scale.index_select(1, groups)
        span = part.shape[1] // scale.shape[1]
        block = BLOCK if span % BLOCK == 0 else span
        return _dequantize(part, _repeated(scale, span // block), {"axis": 1, "block_size": block})

    def _shift(self) -> Float[Tensor, "rows groups"]:
        """Return the number that is added to all weights of a group."""
        return self.offset.float() * self.scale.float()


def digits(values: Integer[Tensor, "rows columns"], bits: int, unit: int = 1) -> DigitMatrices:
    """Decompose values = Σ_k 2^(bits k) · D_k into matrices of signed digits.

    Returns for each k the columns in which D_k or a later digit is not zero, in whole units of ``unit`` columns, and
    D_k in these columns; D_0 has all columns.

    >>> [(columns.tolist(), part.tolist()) for columns, part in digits(torch.tensor([[7, 8, -9]]), 4)]
    [([0, 1, 2], [[7, -8, 7]]), ([1, 2], [[1, -1]])]
    """
    half = 1 << bits - 1
    columns = torch.arange(values.shape[1])
    parts: DigitMatrices = []
    while len(columns) and (not parts or values.any()):
        digit = (values + half & 2 * half - 1) - half
        parts.append((columns, digit.to(torch.int8)))
        values = values - digit >> bits
        used = values.any(0).view(-1, unit).any(1).repeat_interleave(unit)
        values, columns = values[:, used], columns[used]
    return parts


def _in_range(tensor: QuantizedTensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return codes less zero points and offsets, positive scales, and the offsets (out, groups).

    The offsets are chosen such that one digit of 4 bits holds a group of up to 4 bits, and two digits any other.
    """
    rows = len(tensor.codes)
    widths = tensor.bits.repeat_interleave(TILE_ROWS, 0)[:rows]
    values = tensor.codes.int().view(rows, -1, tensor.scheme.group_size) - tensor.zero_point.int().unsqueeze(-1)
    values[(widths == 0) | (tensor.scale == 0)] = 0
    low, high = values.amin(-1), values.amax(-1)
    ones = torch.where(high - low < 16, 1, 17)  # 1, or 11 to base 16
    offset = torch.where((low < -8 * ones) | (high > 7 * ones), low + 8 * ones, 0)
    scale = torch.where(tensor.scale > 0, tensor.scale, 1)
    return (values - offset.unsqueeze(-1)).view(rows, -1), scale, offset


def _fill_block(columns: Tensor, part: Tensor) -> tuple[Tensor, Tensor]:
    """Pad to whole blocks: zeros that belong to column 0."""
    missing = -len(columns) % BLOCK
    return nn.functional.pad(columns, (0, missing)), nn.functional.pad(part, (0, missing))


def _total_columns(parts: DigitMatrices) -> int:
    return sum(len(columns) for columns, _ in parts)


def _dequantize(part: Tensor, scale: Tensor, attributes: dict[str, Any]) -> Tensor:
    return torch.onnx.ops.symbolic(
        "DequantizeLinear", (part, scale), attributes, dtype=torch.float32, shape=part.shape, version=OPSET
    )


def _repeated(part: Tensor, times: int) -> Tensor:
    """Repeat every number ``times`` times along the last dimension."""
    return part.unsqueeze(-1).expand(*[-1] * part.ndim, times).flatten(-2)
