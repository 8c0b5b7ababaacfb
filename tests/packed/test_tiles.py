"""Tiles in memory: the width of each, escapes, and the same codes back."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as some

from nashswarm.packed.tiles import ESCAPE_BYTES, codes_of, packable, to_tiles
from nashswarm.quant.grid import Scheme, quantize
from tests.packed.lattices import heavy_tailed, on_lattice

few = settings(max_examples=30, deadline=None)


@few
@given(some.integers(1, 40), some.integers(1, 140), some.sampled_from([0.3, 2.0, 20.0, 1e3]), some.integers(0, 9))
def test_to_tiles_chooses_width_of_fewest_bytes(rows: int, columns: int, spread: float, seed: int) -> None:
    """By loops: every width of every tile tried, its escapes counted one by one."""
    codes = heavy_tailed(rows, columns, spread, seed).tolist()
    tiles = to_tiles(on_lattice(torch.tensor(codes)))
    total = 0
    for block, group in itertools.product(range(-(-rows // 16)), range(-(-columns // 64))):
        cells = [row[64 * group : 64 * group + 64] for row in codes[16 * block : 16 * block + 16]]
        costs = {}
        for width in (0, 2, 3, 4, 8):
            low, high = (-(2 ** (width - 1)), 2 ** (width - 1) - 1) if width else (0, 0)
            escapes = sum(not low <= code <= high for row in cells for code in row)
            costs[width] = 16 * 64 * width // 8 + 8 * escapes
        assert costs[int(tiles.widths[block, group])] == min(costs.values())
        total += min(costs.values())
    assert tiles.payload.nbytes + ESCAPE_BYTES * len(tiles.escape_codes) == total


@pytest.mark.parametrize(("largest", "bits"), [(0, 0), (1, 2), (3, 3), (7, 4), (127, 8)])
def test_to_tiles_chooses_smallest_width_that_fits(largest: int, bits: int) -> None:
    codes = torch.arange(16 * 64).view(16, 64).remainder(2 * largest + 1) - largest
    tiles = to_tiles(on_lattice(codes))
    assert tiles.widths.tolist() == [[bits]] and tiles.payload.nbytes == 16 * 64 * bits // 8
    assert not len(tiles.escape_codes)


def test_to_tiles_escapes_match_hand_computation() -> None:
    """20 rows of ones in 100 columns: four tiles of 2 bits, from -2 to 1, and three codes beyond."""
    codes = torch.ones(20, 100, dtype=torch.int32)
    codes[5, 7], codes[3, 69], codes[18, 64] = -1000, 2, 70_000
    tiles = to_tiles(on_lattice(codes))
    assert tiles.widths.tolist() == [[2, 2], [2, 2]]
    assert tiles.escape_starts.tolist() == [0, 2, 3]
    assert tiles.escape_places.tolist() == [16 * 7 + 5, 16 * 69 + 3, 16 * 64 + 2]
    assert tiles.escape_codes.tolist() == [-1000, 2, 70_000]
    assert torch.equal(codes_of(tiles), codes)
    assert tiles.payload.nbytes == 4 * 16 * 64 * 2 // 8


def test_packable_unsupported_widths_and_groups_refused() -> None:
    weight = torch.randn(16, 96)
    assert packable(quantize(weight, 8, Scheme(32))) and packable(quantize(weight, 0, Scheme(96)))
    assert not packable(quantize(weight, 4, Scheme(16))) and not packable(quantize(weight, 4, Scheme(48)))
    assert not packable(quantize(weight, 16, Scheme(32))) and not packable(quantize(weight, 32, Scheme(32)))
