"""Tiles in memory: nothing is lost, and the widths are the cheapest."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as some

from nashswarm.quant.lattice import Lattice, LatticeTensor
from nashswarm.quant.resident import HEADER, from_tiles, to_tiles


def tensor(rows: int, columns: int, spread: float, seed: int) -> LatticeTensor:
    rng = np.random.default_rng(seed)
    codes = torch.from_numpy(np.round(rng.standard_t(3, (rows, columns)) * spread).astype(np.int32))
    scales = [torch.from_numpy(rng.integers(-128, 128, size).astype(np.int8)) for size in (rows, columns)]
    return LatticeTensor(codes, Lattice(0.25, *scales, torch.zeros_like(scales[0]), torch.zeros_like(scales[1])))


@settings(max_examples=40, deadline=None)
@given(some.integers(1, 50), some.integers(1, 150), some.sampled_from([0.0, 0.3, 2.0, 50.0, 1e6]), some.integers(0, 9))
def test_whatever_the_shape_and_the_spread_nothing_is_lost(rows: int, columns: int, spread: float, seed: int) -> None:
    given_tensor = tensor(rows, columns, spread, seed)
    found = from_tiles(to_tiles(given_tensor))
    assert torch.equal(found.codes, given_tensor.codes)
    assert torch.equal(found.dequantize(), given_tensor.dequantize())


@pytest.mark.parametrize(("largest", "bits"), [(0, 0), (1, 2), (3, 3), (7, 4), (127, 8)])
def test_the_width_is_the_smallest_that_holds_the_range(largest: int, bits: int) -> None:
    codes = torch.arange(16 * 64).view(16, 64).remainder(2 * largest + 1) - largest
    one = tensor(16, 64, 0.0, 0)
    size = len(to_tiles(LatticeTensor(codes.int(), one.lattice)))
    assert size == HEADER.size + 2 + 16 + 64 + 16 * 64 * bits // 8


def test_one_large_code_is_an_escape_and_widens_nothing() -> None:
    plain = tensor(16, 64, 0.0, 0)
    codes = torch.ones(16, 64, dtype=torch.int32)
    codes[5, 7] = -1000
    found = to_tiles(LatticeTensor(codes, plain.lattice))
    assert len(found) == HEADER.size + 2 + 16 + 64 + 16 * 64 * 2 // 8 + 8
    assert from_tiles(found).codes[5, 7] == -1000
