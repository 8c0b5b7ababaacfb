"""The tables of trellis tiles: they are what the training writes, and near the rate–distortion bound."""

import itertools

import pytest
import torch

from nashswarm.kernels import native
from nashswarm.kernels.trellis_codes import INT8, MEMORY, distortions, tables
from nashswarm.quant import codebooks

LARGEST = {1: 1.0, 2: 1.25, 3: 1.5, 4: 1.65, 5: 2.1, 6: 3.3, 7: 6.0}  # decibels above the bound
SCALAR = {1: 1.66, 2: 2.74, 3: 3.44, 4: 3.86}  # of the best scalar quantizers (Max 1960), which a trellis must beat


@pytest.mark.parametrize("rate", range(1, INT8))
def test_tables_have_the_distortion_that_is_stored_beside_them(rate):
    table = tables()[rate]
    assert table.shape == (2 << MEMORY[rate], 1 << rate - 1)
    error = codebooks.distortion(rate, torch.from_numpy(table))
    assert error == pytest.approx(distortions()[rate], rel=2e-3)
    assert codebooks.decibels(rate, error) < min(LARGEST[rate], SCALAR.get(rate, 99))


def test_distortions_fall_with_the_rate():
    errors = distortions()
    assert errors[0] == 1 and len(errors) == INT8 + 1
    assert all(later < earlier for earlier, later in itertools.pairwise(errors))


@pytest.mark.skipif(native.path() == native.SLOW, reason="training without the C++ library takes long")
@pytest.mark.parametrize("rate", [3, 4])
def test_training_gives_the_stored_table(rate):
    trials = [codebooks.train(rate, noise, seed) for noise, seed in codebooks.TRIALS]
    best = min(trials, key=lambda table: codebooks.distortion(rate, table))
    assert torch.equal(best, torch.from_numpy(tables()[rate]).int())
