"""Lattice matrices that tests of packed formats share."""

import numpy as np
import torch
from torch import Tensor

from nashswarm.quant.lattice import Lattice, LatticeTensor


def on_lattice(codes: Tensor, seed: int = 0) -> LatticeTensor:
    rng = np.random.default_rng(seed)
    row, column = (torch.from_numpy(rng.integers(-128, 128, size).astype(np.int8)) for size in codes.shape)
    return LatticeTensor(codes.int(), Lattice(0.25, row, column, torch.zeros_like(row), torch.zeros_like(column)))


def heavy_tailed(rows: int, columns: int, spread: float, seed: int) -> Tensor:
    rng = np.random.default_rng(seed)
    return torch.from_numpy(np.round(rng.standard_t(3, (rows, columns)) * spread).astype(np.int32))
