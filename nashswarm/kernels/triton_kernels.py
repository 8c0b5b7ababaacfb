"""Products with packed matrices on CUDA, with float32 activations.

A program computes the product of one row block of the matrix with some rows of x.
"""

import triton
import triton.language as tl
from jaxtyping import Float32
from torch import Tensor

from nashswarm.kernels import reference
from nashswarm.kernels import tiles as layout
from nashswarm.kernels.tiles import Tiles

BATCH = 16  # rows of x in one program: the fewest that tensor cores take


@triton.jit  # type: ignore[untyped-decorator]
def _multiply(  # type: ignore[no-untyped-def]
    x, payload, places, widths, scale, zero_point, y, batch, columns, row_blocks, groups,
    GROUP_SIZE: tl.constexpr, SCALED: tl.constexpr, BATCH: tl.constexpr,
):  # fmt: skip
    block, first = tl.program_id(0), tl.program_id(1) * BATCH
    item, row, input = first + tl.arange(0, BATCH), tl.arange(0, 16), tl.arange(0, 32)
    position = input // 4
    total = tl.full((BATCH, 16), 0.0, tl.float32)
    for group in range(groups):
        tile = block * groups + group
        width = tl.load(widths + tile).to(tl.int32)
        if width > 0:
            fields = 8 // width
            split = (width == 3) & (position >= 6)  # the highest bit of the code is in the third register
            register = tl.where(width == 3, tl.where(split, position - 6, position // 2), position // fields)
            bit = tl.where(width == 3, tl.where(split, 6, position % 2 * 3), position % fields * width)
            mask = tl.where(split, 3, (1 << width) - 1)
            point = (1 << width >> 1).to(tl.float32) + tl.full((16,), 0.0, tl.float32)
            factor = tl.full((16,), 1.0, tl.float32)
            if SCALED:
                point = tl.load(zero_point + tile * 16 + row).to(tl.float32)
                factor = tl.load(scale + tile * 16 + row).to(tl.float32)
            for chunk in range(GROUP_SIZE // 32):
                lane = payload + tl.load(places + tile) + chunk * width * 64 + row[None, :] * 4 + (input % 4)[:, None]
                byte = tl.load(lane + register[:, None] * 64).to(tl.int32)
                high = tl.load(lane + tl.where(split, 128, 0)[:, None]).to(tl.int32)
                code = (byte >> bit[:, None]) & mask[:, None]
                code += tl.where(split[:, None], (high >> position[:, None] & 1) << 2, 0)
                weight = (code.to(tl.float32) - point[None, :]) * factor[None, :]
                column = group * GROUP_SIZE + chunk * 32 + input
                inside = (item[:, None] < batch) & (column[None, :] < columns)
                values = tl.load(x + item[:, None] * columns + column[None, :], mask=inside, other=0.0)
                total += tl.dot(values, weight, input_precision="ieee")
    tl.store(y + item[:, None] * (16 * row_blocks) + block * 16 + row[None, :], total, mask=item[:, None] < batch)


def matmul(x: Float32[Tensor, "batch columns"], tiles: Tiles) -> Float32[Tensor, "batch rows"]:
    """Compute x Wᵀ."""
    if tiles.column_scale.numel():
        x = x * tiles.column_scale.float()
    row_blocks, groups = tiles.widths.shape
    product = x.new_empty(len(x), layout.TILE_ROWS * row_blocks)
    cached = tiles.order.__dict__
    if "places" not in cached:
        cached["places"] = layout.payload_starts(tiles.widths, tiles.group_size)
    _multiply[row_blocks, triton.cdiv(len(x), BATCH)](
        x, tiles.payload, cached["places"], tiles.widths, tiles.scale, tiles.zero_point, product,
        len(x), tiles.columns, row_blocks, groups,
        GROUP_SIZE=tiles.group_size, SCALED=tiles.scale.numel() > 0, BATCH=BATCH,
    )  # fmt: skip
    return reference.apply_row_terms(product[:, : tiles.rows].contiguous(), x, tiles)
