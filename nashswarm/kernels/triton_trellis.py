"""Products with trellis-coded matrices on CUDA, with float32 activations.

A program computes the product of one group of 64 rows with some rows of x.  It decodes one tile at a time: the bits of
every weight are gathered from the registers of the tile, and its value is looked up in the table of the rate.
"""

import functools

import torch
import triton
import triton.language as tl
from jaxtyping import Float32, Int32
from torch import Tensor

from nashswarm.kernels import trellis as form
from nashswarm.kernels.trellis import Trellis
from nashswarm.kernels.trellis_codes import (
    COLUMNS,
    HALF,
    INT8,
    LANES,
    MEMORY,
    PLACES,
    REGISTER,
    ROWS,
    STEPS,
    UNIT,
    tables,
    tile_starts,
)

BATCH = 16  # rows of x in one program: the fewest that tensor cores take
PLAIN_BITS = INT8 - 2  # at most, of a weight
ENTRIES = 128  # of the largest table


@triton.jit  # type: ignore[untyped-decorator]
def _multiply(  # type: ignore[no-untyped-def]
    x, payload, starts, rates, values, places, memory, rotation, size, y, batch, columns, groups, across,
    BATCH: tl.constexpr, PLAIN: tl.constexpr, LONGEST: tl.constexpr,
):  # fmt: skip
    group, first = tl.program_id(0), tl.program_id(1) * BATCH
    item, row, column = first + tl.arange(0, BATCH), tl.arange(0, 64), tl.arange(0, 16)
    step, lane = row // 4, row % 4
    inside_register = lane[:, None] * 16 + column[None, :]
    total = tl.full((64, BATCH), 0.0, tl.float32)
    for tile in range(across):
        rate = tl.load(rates + group * across + tile)
        if rate > 0:
            start = payload + tl.load(starts + group * across + tile)
            weight = tl.full((64, 16), 0.0, tl.float32)
            if rate == 8:  # a byte for each weight
                byte = tl.load(start + step[:, None] * 64 + inside_register).to(tl.int32)
                weight = (byte - (byte >> 7) * 256).to(tl.float32)
            else:
                index = tl.full((64, 16), 0, tl.int32)
                window = tl.load(memory + rate)
                for lag in range(LONGEST + 1):
                    if lag <= window:
                        at = (step - lag + 16) % 16
                        byte = tl.load(start + (at // 8 * rate * 64)[:, None] + inside_register).to(tl.int32)
                        index += (byte >> (at % 8)[:, None] & 1) << (lag + rate - 1)
                for bit in range(PLAIN):
                    if bit < rate - 1:
                        place = tl.load(places + (rate * 8 + step % 8) * PLAIN + bit)
                        register = step // 8 * rate + place // 8
                        byte = tl.load(start + register[:, None] * 64 + inside_register).to(tl.int32)
                        index += (byte >> (place % 8)[:, None] & 1) << bit
                weight = tl.load(values + rate * 128 + index)
            input = tile * 16 + column
            inside = (input[:, None] < columns) & (item[None, :] < batch)
            inputs = tl.load(x + item[None, :] * columns + input[:, None], mask=inside, other=0.0)
            total += tl.dot(weight, inputs, input_precision="ieee")
    total *= tl.load(size + group * 64 + row)[:, None]
    turn = tl.load(rotation + row[:, None] * 64 + row[None, :])
    turned = tl.dot(turn, total, input_precision="ieee")
    tl.store(y + item[None, :] * (64 * groups) + (group * 64 + row)[:, None], turned, mask=item[None, :] < batch)


def matmul(x: Float32[Tensor, "batch columns"], trellis: Trellis) -> Float32[Tensor, "batch rows"]:
    """Compute x Wᵀ."""
    parts = _parts(trellis)
    row_order, column_order = parts["row_order"], parts["column_order"]
    stored = (x[:, column_order] * parts["column_scale"]).contiguous()
    groups, across = form.groups_of(trellis.rows), form.tiles_across(trellis.columns)
    turned = x.new_empty(len(x), ROWS * groups)
    _multiply[groups, triton.cdiv(len(x), BATCH)](
        stored, trellis.payload, parts["starts"], parts["rates"], parts["values"], parts["places"], parts["memory"],
        parts["rotation"], parts["size"], turned, len(x), trellis.columns, groups, across,
        BATCH=BATCH, PLAIN=PLAIN_BITS, LONGEST=max(MEMORY),
    )  # fmt: skip
    product = torch.empty(len(x), trellis.rows, dtype=x.dtype, device=x.device)
    product[:, row_order] = turned[:, : trellis.rows] * parts["row_scale"]
    return product


def _parts(trellis: Trellis) -> dict[str, Tensor]:
    """Return what programs need beside the tiles, on the device of the matrix; it is made once for each matrix."""
    cached = trellis.__dict__.get("triton")
    if cached is None:
        device = trellis.content.device
        on_cpu = form.parse(trellis.content.cpu())
        rates = form.tile_rates(on_cpu)
        row_order, column_order = form.orders_of(on_cpu)
        cached = {
            "starts": tile_starts(rates),
            "rates": rates.int(),
            "values": _values(),
            "places": _places(),
            "memory": torch.tensor((*MEMORY, 0), dtype=torch.int32),
            "rotation": form.hadamard() if trellis.rotated else torch.eye(ROWS),
            "size": form.row_sizes(on_cpu) / UNIT,
            "row_scale": trellis.scale * form.scales(on_cpu.row_scale, form.ROW_STEPS),
            "column_scale": form.scales(on_cpu.column_scale, form.COLUMN_STEPS)[: trellis.columns],
            "row_order": row_order,
            "column_order": column_order,
        }
        cached = {name: part.contiguous().to(device) for name, part in cached.items()}
        trellis.__dict__["triton"] = cached
    return cached


@functools.cache
def _values() -> Float32[Tensor, "9 128"]:
    """Return the tables of all rates as floats, each filled up to ``ENTRIES``."""
    padded = torch.zeros(INT8 + 1, ENTRIES)
    for rate, table in tables().items():
        padded[rate, : table.size] = torch.from_numpy(table.flatten()).float()
    return padded


@functools.cache
def _places() -> Int32[Tensor, "9 8 6"]:
    """Return where each plain bit of each step of a half is: 8 times its register, plus its bit."""
    places = torch.zeros(INT8 + 1, HALF, PLAIN_BITS, dtype=torch.int32)
    for rate, steps in PLACES.items():
        for step, bits in enumerate(steps):
            for number, (register, bit) in enumerate(bits):
                places[rate, step, number] = 8 * register + bit
    return places


assert (ROWS, COLUMNS, LANES, STEPS, REGISTER) == (64, 16, 4, 16, 64)  # as the program has them
