"""Codes of trellis tiles: the tables that they index, and the bits of the tiles that they are stored in.

The form is described in ``trellis``.
"""

import functools
import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Int8, Integer, UInt8
from torch import Tensor

ROWS, COLUMNS = 64, 16  # of a tile
LANES, STEPS, HALF = 4, 16, 8  # rows r … r + 3 are four sequences; 16 steps in two halves
REGISTER = 64  # bytes: 4 rows of 16 columns
UNIT = 36  # table values are multiples of 1 / UNIT of the standard deviation that a code expects
MEMORY = (0, 5, 4, 3, 3, 2, 1, 0)  # coded bits of earlier steps that a value depends on, by rate
INT8 = 8  # the rate of plain int8
TILES_AT_ONCE = 4096  # whose values are looked up
# rate → for each step of a half, the (register, bit) of each plain bit, lowest first
PLACES: dict[int, list[list[tuple[int, int]]]] = {
    1: [[]] * HALF,
    2: [[(1, bit)] for bit in (1, 2, 3, 4, 5, 0, 7, 6)],
    3: [
        [(1, 1), (1, 2)],
        [(2, 2), (2, 3)],
        [(1, 3), (1, 4)],
        [(2, 4), (2, 5)],
        [(1, 6), (1, 7)],
        [(2, 0), (2, 1)],
        [(1, 0), (1, 5)],
        [(2, 6), (2, 7)],
    ],
    4: [
        [(1, 2), (2, 3), (1, 7)],
        [(3, 3), (2, 4), (3, 7)],
        [(1, 0), (1, 1), (1, 3)],
        [(1, 4), (1, 5), (1, 6)],
        [(2, 0), (2, 5), (2, 6)],
        [(3, 4), (3, 5), (3, 6)],
        [(3, 0), (3, 1), (3, 2)],
        [(2, 1), (2, 2), (2, 7)],
    ],
}
for _rate in (5, 6, 7):
    PLACES[_rate] = [[(1 + bit, step) for bit in range(_rate - 1)] for step in range(HALF)]


@functools.cache
def tables() -> Mapping[int, Int8[np.ndarray, "windows plain"]]:
    """Return the table of each rate from 1 to 7: values by window of coded bits and by plain bits."""
    return {int(rate): np.array(table, np.int8) for rate, table in _stored()["tables"].items()}


def distortions() -> Sequence[float]:
    """Return the mean squared error of each rate, 0 to 8, for normal weights of variance 1."""
    errors: list[float] = _stored()["distortions"]
    return errors


@functools.cache
def _stored() -> dict[str, Any]:
    """Read what ``python -m nashswarm.quant.codebooks`` wrote."""
    content: dict[str, Any] = json.loads((pathlib.Path(__file__).parent / "trellis_tables.json").read_text())
    return content


def tile_bytes(rates: Integer[Tensor, "*shape"]) -> Integer[Tensor, "*shape"]:
    """Return the bytes that tiles of these rates take in the payload."""
    return rates.long() * (ROWS * COLUMNS // 8)


def tile_starts(rates: UInt8[Tensor, "groups tiles"]) -> Integer[Tensor, "groups tiles"]:
    """Return where each tile starts in the payload, in bytes."""
    sizes = tile_bytes(rates).flatten()
    return (sizes.cumsum(0) - sizes).view(rates.shape)


def unpack_codes(
    payload: UInt8[Tensor, " bytes"], rates: UInt8[Tensor, "groups tiles"]
) -> UInt8[Tensor, "stored_rows places"]:
    """Return the code of every stored weight: plain bits above the coded bit; two's complement for rate 8."""
    codes = torch.zeros(*rates.shape, STEPS, REGISTER, dtype=torch.uint8)
    starts = tile_starts(rates)
    for rate in rates.unique().tolist():
        chosen = rates == rate
        if not rate:
            continue
        bytes_each = int(tile_bytes(torch.tensor(rate)))
        stored = payload[starts[chosen][:, None] + torch.arange(bytes_each)]
        if rate == INT8:
            codes[chosen] = stored.view(-1, STEPS, REGISTER)
            continue
        registers = stored.view(-1, 2, rate, REGISTER)
        steps = torch.zeros(len(stored), 2, HALF, REGISTER, dtype=torch.uint8)
        for step, places in enumerate(PLACES[rate]):
            for bit, (register, place) in enumerate([(0, step), *places]):
                steps[:, :, step] |= (registers[:, :, register] >> place & 1) << bit
        codes[chosen] = steps.view(-1, STEPS, REGISTER)
    # (groups, tiles, steps, lanes, columns) → (groups, steps, lanes, tiles, columns)
    by_row = codes.view(*rates.shape, STEPS, LANES, COLUMNS).permute(0, 2, 3, 1, 4)
    return by_row.reshape(rates.shape[0] * ROWS, rates.shape[1] * COLUMNS)


def pack_codes(
    rates: UInt8[Tensor, "groups tiles"], codes: UInt8[Tensor, "stored_rows places"]
) -> UInt8[Tensor, " bytes"]:
    """Arrange codes in tiles; undoes ``unpack_codes``."""
    groups, across = rates.shape
    payload = torch.zeros(int(tile_bytes(rates).sum()), dtype=torch.uint8)
    steps = (
        codes.view(groups, STEPS, LANES, across, COLUMNS)
        .permute(0, 3, 1, 2, 4)
        .reshape(groups, across, STEPS, REGISTER)
    )
    starts = tile_starts(rates)
    for rate in set(rates.unique().tolist()) - {0}:
        chosen = rates == rate
        tile = steps[chosen]
        if rate != INT8:
            halves = tile.view(-1, 2, HALF, REGISTER)
            registers = torch.zeros(len(tile), 2, rate, REGISTER, dtype=torch.uint8)
            for step, places in enumerate(PLACES[rate]):
                for bit, (register, place) in enumerate([(0, step), *places]):
                    registers[:, :, register] |= (halves[:, :, step] >> bit & 1) << place
            tile = registers
        flat = tile.reshape(len(tile), -1)
        payload[starts[chosen][:, None] + torch.arange(flat.shape[1])] = flat
    return payload


def values_of(
    rates: UInt8[Tensor, "groups tiles"], codes: UInt8[Tensor, "stored_rows places"]
) -> Int8[Tensor, "stored_rows places"]:
    """Return the values that codes stand for, in units of 1 / UNIT."""
    groups, across = rates.shape
    steps = codes.view(groups, STEPS, LANES, across, COLUMNS).permute(0, 3, 2, 4, 1)  # the steps last
    values = torch.zeros(steps.shape, dtype=torch.int8)
    for rate in set(rates.unique().tolist()) - {0}:
        parts = steps[rates == rate].split(TILES_AT_ONCE)  # the indices of a table take 8 bytes each
        values[rates == rate] = torch.cat([values_of_sequences(part, rate) for part in parts])
    return values.permute(0, 4, 2, 1, 3).reshape(codes.shape)


def values_of_sequences(codes: UInt8[Tensor, "*sequences 16"], rate: int) -> Int8[Tensor, "*sequences 16"]:
    """Return the values of sequences of codes at one rate, in units of 1 / UNIT."""
    if rate == INT8:
        return codes.view(torch.int8)
    coded = codes & 1
    window = coded.clone()
    for lag in range(1, MEMORY[rate] + 1):
        window |= coded.roll(lag, -1) << lag
    entries = (window << rate - 1) + (codes >> 1)
    return torch.from_numpy(np.take(tables()[rate], entries.cpu().numpy())).to(codes.device)
