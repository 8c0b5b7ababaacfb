"""Group-wise affine quantization of a matrix whose tiles may have different bit widths.

A tile is 16 rows × ``group_size`` columns and has one width b in {0, 2, 3, 4, 8, 16, 32} bits.  In a tile of 2 to 8
bits each row, a group of ``group_size`` weights, has an fp16 scale s and a b-bit zero point z; a code c stands for the
weight ``s · (c − z)``.  A tile of width 0 is pruned: its weights are zero.  At widths 16 and 32 the code is the bit
pattern of the float itself, so that unquantized weights need no code path of their own.
"""

import dataclasses

import torch
from jaxtyping import Float, Integer
from torch import Tensor

TILE_ROWS = 16
WIDTHS = (0, 2, 3, 4, 8, 16, 32)
GRID_WIDTHS = (2, 3, 4, 8)
SHRINKS = tuple(1.0 - 0.05 * step for step in range(13))
FLOATS = {16: (torch.float16, torch.int16), 32: (torch.float32, torch.int32)}
CHUNK_GROUPS = 1 << 12  # groups quantized at a time: the range search then stays in the CPU cache


@dataclasses.dataclass(frozen=True)
class Scheme:
    """How the tiles of a matrix are quantized, apart from their widths.

    Without ``search``, the range of a group runs from its minimum to its maximum; with it, the range is the one of
    least (weighted) squared error among that and 12 smaller ones.  With ``symmetric``, the zero point is the middle of
    the grid and is not stored.
    """

    group_size: int = 64
    search: bool = False
    symmetric: bool = False

    def __post_init__(self) -> None:
        if self.group_size < 1:
            raise ValueError(f"group_size={self.group_size} must be at least 1")

    def bits_per_weight(self, bits: int) -> float:
        """Return the stored bits per weight of a tile of width ``bits``: code, scale and zero point.

        >>> Scheme(group_size=64).bits_per_weight(3)
        3.296875
        """
        return 8 * self.tile_bytes(bits) / (TILE_ROWS * self.group_size)

    def tile_bytes(self, bits: int) -> int:
        """Return the stored bytes of one tile of width ``bits``.

        >>> [Scheme().tile_bytes(bits) for bits in (0, 2, 4, 16)]
        [0, 292, 552, 2048]
        """
        side = (16 + (0 if self.symmetric else bits)) * TILE_ROWS if bits in GRID_WIDTHS else 0
        return (TILE_ROWS * self.group_size * bits + side) // 8


@dataclasses.dataclass(frozen=True)
class QuantizedTensor:
    """A matrix of shape (out, in) as codes on the grids of its groups.

    ``bits`` is the width of each tile.
    """

    codes: Integer[Tensor, "out in"]
    scale: Float[Tensor, "out groups"]
    zero_point: Integer[Tensor, "out groups"]
    bits: Integer[Tensor, "row_blocks groups"]
    scheme: Scheme

    def dequantize(self) -> Float[Tensor, "out in"]:
        """Return the float32 weights that the codes stand for."""
        rows, columns = self.codes.shape
        groups = self.codes.view(rows, -1, self.scheme.group_size)
        values = (groups.float() - self.zero_point.unsqueeze(-1)) * self.scale.float().unsqueeze(-1)
        row_bits = self.bits.repeat_interleave(TILE_ROWS, 0)[:rows]
        for width, (float_type, pattern_type) in FLOATS.items():
            if (chosen := row_bits == width).any():
                values[chosen] = groups[chosen].to(pattern_type).view(float_type).float()
        return values.view(rows, columns)


def row_blocks(rows: int) -> int:
    """Return the number of row blocks of 16 rows, counting a last one that is not full."""
    return -(-rows // TILE_ROWS)


def quantize(
    weight: Float[Tensor, "out in"],
    bits: int | Integer[Tensor, "row_blocks groups"],
    scheme: Scheme,
    sensitivity: Float[Tensor, "out in"] | None = None,
) -> QuantizedTensor:
    """Quantize a matrix by rounding, each tile at its width.

    ``bits`` is one width for all tiles, or a width for each.  ``sensitivity`` weights the squared errors of the range
    search.  Raises ValueError if ``group_size`` does not divide the columns, a width is unknown, or a weight is not
    finite or does not fit its float width.
    """
    rows, columns = weight.shape
    if columns % scheme.group_size:
        raise ValueError(f"a matrix of {columns} columns is not divisible by group_size {scheme.group_size}")
    if not weight.isfinite().all():
        raise ValueError(f"a matrix of shape {rows}x{columns} holds weights that are not finite")
    shape = (row_blocks(rows), columns // scheme.group_size)
    tiles = torch.full(shape, bits) if isinstance(bits, int) else bits
    if tuple(tiles.shape) != shape:
        raise ValueError(f"{tuple(tiles.shape)} widths for the {shape} tiles of a {rows}x{columns} matrix")
    if unknown := sorted(set(tiles.unique().tolist()) - set(WIDTHS)):
        raise ValueError(f"no tile format of {unknown} bits: choose among {', '.join(map(str, WIDTHS))}")
    tiles = tiles.to(torch.uint8)

    widest = int(tiles.max())
    code_type = FLOATS[widest][1] if widest in FLOATS else torch.uint8
    values = weight.float().reshape(rows, -1, scheme.group_size)
    importance = None if sensitivity is None else sensitivity.reshape_as(values)
    codes = torch.zeros(values.shape, dtype=code_type)
    scale = torch.zeros(values.shape[:2], dtype=torch.float16)
    zero_point = torch.zeros(values.shape[:2], dtype=torch.uint8)
    row_bits = tiles.repeat_interleave(TILE_ROWS, 0)[:rows]
    for width in sorted(set(tiles.unique().tolist()) - {0}):
        chosen = row_bits == width
        if width in FLOATS:
            codes[chosen] = _float_codes(values[chosen], width).to(code_type)
        else:
            weights = None if importance is None else importance[chosen]
            group_codes, scale[chosen], zero_point[chosen] = quantize_groups(values[chosen], width, scheme, weights)
            codes[chosen] = group_codes.to(code_type)
    return QuantizedTensor(codes.view(rows, columns), scale, zero_point, tiles, scheme)


def tile_sums(values: Float[Tensor, "out in"], group_size: int) -> Float[Tensor, "row_blocks groups"]:
    """Sum ``values`` over each tile, in float64."""
    by_row = values.double().view(len(values), -1, group_size).sum(-1)
    padded = torch.nn.functional.pad(by_row, (0, 0, 0, -len(by_row) % TILE_ROWS))
    return padded.view(-1, TILE_ROWS, by_row.shape[1]).sum(1)


def _float_codes(values: Tensor, width: int) -> Tensor:
    float_type, pattern_type = FLOATS[width]
    floats = values.to(float_type)
    if not floats.isfinite().all():
        raise ValueError(f"weights up to {values.abs().max():.3g} do not fit {width}-bit floats; keep them at 32 bits")
    return floats.view(pattern_type)


def quantize_groups(
    values: Tensor, bits: int, scheme: Scheme, importance: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Return codes, scales and zero points of ``values``, shape (groups, group_size), at 2 to 8 ``bits``."""
    parts = [
        _search(chunk, bits, scheme, None if importance is None else importance[start : start + CHUNK_GROUPS])
        for start, chunk in zip(range(0, len(values), CHUNK_GROUPS), values.split(CHUNK_GROUPS), strict=True)
    ]
    return tuple(torch.cat(part) for part in zip(*parts, strict=True))  # type: ignore[return-value]


def _search(values: Tensor, bits: int, scheme: Scheme, importance: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Choose each group's range, and return codes, scales and zero points.

    The search tries the shrunken ranges, then refits the scale to the codes by least squares, twice, wherever that
    lowers the error.
    """
    levels = (1 << bits) - 1
    if scheme.symmetric:
        high = values.abs().amax(-1) * (levels / (levels - 1))
        low = -high
    else:
        low, high = values.amin(-1).clamp(max=0), values.amax(-1).clamp(min=0)
    scale, zero = _affine(low, high, levels, scheme.symmetric)
    codes = _round(values, scale, zero, levels)
    if not scheme.search:
        return codes.to(torch.uint8), scale.half(), zero.to(torch.uint8)

    def error(codes: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
        squared = (values - (codes - zero.unsqueeze(-1)) * scale.unsqueeze(-1)).square()
        return (squared if importance is None else squared * importance).sum(-1)

    least_error = error(codes, scale, zero)

    def keep_better(new_scale: Tensor, new_zero: Tensor) -> None:
        nonlocal scale, zero, codes, least_error
        new_codes = _round(values, new_scale, new_zero, levels)
        new_error = error(new_codes, new_scale, new_zero)
        better = new_error < least_error
        scale, zero = torch.where(better, new_scale, scale), torch.where(better, new_zero, zero)
        codes = torch.where(better.unsqueeze(-1), new_codes, codes)
        least_error = torch.where(better, new_error, least_error)

    for shrink in SHRINKS[1:]:
        keep_better(*_affine(low * shrink, high * shrink, levels, scheme.symmetric))
    for _ in range(2):
        steps = codes - zero.unsqueeze(-1)
        weighted = steps if importance is None else steps * importance
        fitted = (weighted * values).sum(-1) / (weighted * steps).sum(-1).clamp(min=torch.finfo(torch.float32).tiny)
        keep_better(torch.where(fitted > 0, fitted, scale).half().float(), zero)
    return codes.to(torch.uint8), scale.half(), zero.to(torch.uint8)


def _affine(low: Tensor, high: Tensor, levels: int, symmetric: bool) -> tuple[Tensor, Tensor]:
    """Return the scale (rounded to fp16, as it is stored) and the zero point of the range from ``low`` to ``high``."""
    scale = ((high - low) / levels).half().float()
    if not scale.isfinite().all():
        largest = torch.maximum(high, -low).max()
        raise ValueError(f"weights up to {largest:.3g} need a scale beyond fp16; keep this matrix at 32 bits")
    middle = torch.full_like(scale, (levels + 1) // 2)
    inverse = torch.where(scale > 0, 1 / scale, 0)
    return scale, middle if symmetric else (-low * inverse).round().clamp(0, levels)


def _round(values: Tensor, scale: Tensor, zero: Tensor, levels: int) -> Tensor:
    inverse = torch.where(scale > 0, 1 / scale, 0).unsqueeze(-1)
    return (values * inverse).round_().add_(zero.unsqueeze(-1)).clamp_(0, levels)
