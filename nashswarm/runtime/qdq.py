"""Packed matrices in the integers that standard ONNX dequantizes: INT4 and INT8, as TensorRT reads them too.

A code is a sum of signed digits, so that none is too large for them, and a matrix a sum of products:

    W = Σ_k scale · 2^(bits k) · D_k · column_scale

with one DequantizeLinear for every D_k.  D_0 has all columns, a later digit only those in which a code is beyond the
digits before it.  No zero point is used and every scale is positive, which TensorRT asks for (NVIDIA, TensorRT
documentation, "Quantization schemes": INT4 in blocks of 64 or 128 columns, INT8 by row).

A matrix in groups has INT4 digits.  A code of 2 or 3 bits less its zero point is one digit: 4 bits in the file.  So is
one of 4 bits, and one of 8 is two: 8 bits, up to an offset of its group that sums over groups of x add.  A matrix on a
lattice has INT4 digits too, or INT8 ones where those take no more bytes; an escape takes a digit of its whole column.
"""

from typing import Any

import torch
from jaxtyping import Float, Integer
from torch import Tensor, nn

from nashswarm.packed.modules import PackedMatrix
from nashswarm.quant.grid import TILE_ROWS, QuantizedTensor
from nashswarm.quant.lattice import LatticeTensor

OPSET = 21  # of ONNX: the first with INT4 and with scales of blocks
BLOCK = 64  # columns with one scale, where that divides them
Parts = list[tuple[Tensor, Tensor]]  # columns, and int8 digits (rows, columns)


class Digits(nn.Module):
    """A matrix as digits of ``bits`` bits, ``count`` of them, the first one lowest; inputs of products stay floats."""

    scale: Tensor
    column_scale: Tensor
    offset: Tensor

    def __init__(self, matrix: PackedMatrix, activations: str) -> None:
        super().__init__()
        tensor = matrix.tensor()
        self.bits, reach = 4, matrix.shape[1]  # columns that a scale of the matrix belongs to
        if isinstance(tensor, LatticeTensor):
            parts, scale = digits(tensor.codes.int(), 4), tensor.lattice.row_steps().unsqueeze(1)
            parts = parts[:1] + [_filled(*part) for part in parts[1:]]
            wide = digits(tensor.codes.int(), 8)
            if _columns(wide) <= _columns(parts) / 2:
                self.bits, parts = 8, wide
            self.register_buffer("column_scale", tensor.lattice.column_steps())
        else:
            values, scale, offset = _in_range(tensor)
            reach = tensor.scheme.group_size
            parts = digits(values, 4, reach)
            if offset.any():
                self.register_buffer("offset", offset.half())
        self.register_buffer("scale", scale)
        self.reach, self.count = reach, len(parts)
        self.scales_x = self.bits == 4 and isinstance(tensor, LatticeTensor)
        for number, (chosen, part) in enumerate(parts):
            places = torch.full((matrix.shape[1],), len(chosen))
            places.scatter_reduce_(0, chosen, torch.arange(len(chosen)), "amin")  # the first, where blocks are filled
            self.register_buffer(f"digits{number}", part)
            self.register_buffer(f"chosen{number}", chosen.int())
            self.register_buffer(f"places{number}", places.int())
            self.register_buffer(f"groups{number}", (chosen[::reach] // reach).unique().int())

    def product(self, x: Tensor) -> Tensor:
        scaled = x * self.column_scale if self.scales_x else x
        answer = scaled @ self._dequantized(0).T
        for number in range(1, self.count):
            chosen = scaled.index_select(-1, getattr(self, f"chosen{number}"))
            answer = answer + chosen @ self._dequantized(number).T
        if hasattr(self, "offset"):
            answer = answer + x.unflatten(-1, (-1, self.reach)).sum(-1) @ self._shift().T
        return answer

    def rows(self, ids: Tensor) -> Tensor:
        found = nn.functional.embedding(ids, self._dequantized(0))
        for number in range(1, self.count):
            part = nn.functional.pad(nn.functional.embedding(ids, self._dequantized(number)), (0, 1))
            found = found + part.index_select(-1, getattr(self, f"places{number}"))
        if hasattr(self, "offset"):
            found = found + _repeated(nn.functional.embedding(ids, self._shift()), self.reach)
        return found * self.column_scale if self.scales_x else found

    def _dequantized(self, number: int) -> Float[Tensor, "rows chosen"]:
        """scale · 2^(bits k) · D_k.  The scales of columns stand between INT8 digits and their product: onnxruntime
        would join the two and, by itself, round x to 8 bits there."""
        part, chosen, groups = (getattr(self, f"{name}{number}") for name in ("digits", "chosen", "groups"))
        scale = self.scale.float() * 2.0 ** (self.bits * number)
        if self.bits == 8:
            return _dequantize(part, scale.flatten(), {"axis": 0}) * self.column_scale.index_select(0, chosen)
        if number:
            scale = scale.index_select(1, groups)
        reach = part.shape[1] // scale.shape[1]
        block = BLOCK if reach % BLOCK == 0 else reach
        return _dequantize(part, _repeated(scale, reach // block), {"axis": 1, "block_size": block})

    def _shift(self) -> Float[Tensor, "rows groups"]:
        """What is added to all weights of a group."""
        return self.offset.float() * self.scale.float()


def digits(values: Integer[Tensor, "rows columns"], bits: int, unit: int = 1) -> Parts:
    """values = Σ_k 2^(bits k) · D_k with signed digits: of every k the columns, in whole units, in which D_k or a later
    digit is not zero anywhere, and D_k there; D_0 has all columns.

    >>> [(chosen.tolist(), part.tolist()) for chosen, part in digits(torch.tensor([[7, 8, -9]]), 4)]
    [([0, 1, 2], [[7, -8, 7]]), ([1, 2], [[1, -1]])]
    """
    half = 1 << bits - 1
    chosen = torch.arange(values.shape[1])
    found: Parts = []
    while len(chosen) and (not found or values.any()):
        digit = (values + half & 2 * half - 1) - half
        found.append((chosen, digit.to(torch.int8)))
        values = values - digit >> bits
        used = values.any(0).view(-1, unit).any(1).repeat_interleave(unit)
        values, chosen = values[:, used], chosen[used]
    return found


def _in_range(tensor: QuantizedTensor) -> tuple[Tensor, Tensor, Tensor]:
    """Codes less zero points and offsets, positive scales, and the offsets (out, groups): such that one digit of 4 bits
    holds a group of up to 4 bits, and two any other."""
    rows = len(tensor.codes)
    widths = tensor.bits.repeat_interleave(TILE_ROWS, 0)[:rows]
    values = tensor.codes.int().view(rows, -1, tensor.scheme.group_size) - tensor.zero_point.int().unsqueeze(-1)
    values[(widths == 0) | (tensor.scale == 0)] = 0
    low, high = values.amin(-1), values.amax(-1)
    ones = torch.where(high - low < 16, 1, 17)  # 1, or 11 to base 16
    offset = torch.where((low < -8 * ones) | (high > 7 * ones), low + 8 * ones, 0)
    scale = torch.where(tensor.scale > 0, tensor.scale, 1)
    return (values - offset.unsqueeze(-1)).view(rows, -1), scale, offset


def _filled(chosen: Tensor, part: Tensor) -> tuple[Tensor, Tensor]:
    """To whole blocks, with zeros in column 0."""
    more = -len(chosen) % BLOCK
    return nn.functional.pad(chosen, (0, more)), nn.functional.pad(part, (0, more))


def _columns(parts: Parts) -> int:
    return sum(len(chosen) for chosen, _ in parts)


def _dequantize(part: Tensor, scale: Tensor, attributes: dict[str, Any]) -> Tensor:
    return torch.onnx.ops.symbolic(
        "DequantizeLinear", (part, scale), attributes, dtype=torch.float32, shape=part.shape, version=OPSET
    )


def _repeated(part: Tensor, times: int) -> Tensor:
    """Every number so many times, one after another."""
    return part.unsqueeze(-1).expand(*[-1] * part.ndim, times).flatten(-2)
