"""Train the tables of trellis tiles for normal weights, and write them to ``kernels/trellis_tables.json``:

    python -m nashswarm.quant.codebooks

A table starts with the quantiles of a wide normal distribution, dealt to the windows of coded bits by Ungerboeck's
convolutional codes (1982), so that paths that meet again differ much.  Lloyd's iterations follow: encode random weights
by their best paths, and move each entry to the mean of the weights that chose it.  In some trials noise on the tables,
which fades, lets iterations leave poor optima.  The best trial is rounded to whole numbers of 1 / UNIT.
"""

import json
import math
import pathlib

import numpy as np
import torch
from jaxtyping import Float, Int, Num
from scipy.stats import norm
from torch import Tensor

from nashswarm.kernels import encoder, trellis_codes
from nashswarm.kernels.trellis_codes import INT8, MEMORY, STEPS, UNIT

FILE = pathlib.Path(trellis_codes.__file__).parent / "trellis_tables.json"
PARITIES = {2: (0o2, 0o5), 3: (0o04, 0o13), 4: (0o04, 0o23), 5: (0o10, 0o45)}  # by memory; Ungerboeck 1982, table I
SPREAD = 1.05, 1.45  # of the first table over the normal distribution, at few bits and at 5 bits or more
ITERATIONS = 40
SEQUENCES = 4096  # in an iteration
TRIALS = ((0.0, 0), (0.3, 1), (0.3, 2), (0.6, 3))  # noise, in steps of a uniform quantizer, and seed
TEST_SEQUENCES, TEST_SEED = 32768, 99


def first_table(rate: int) -> Float[Tensor, "windows plain"]:
    """Return the table that training starts from, in standard deviations."""
    memory, spread = MEMORY[rate], SPREAD[rate >= 5]
    count = (2 if memory else 1) << rate
    levels = spread * norm.ppf((np.arange(count) + 0.5) / count)
    if memory == 0:
        rows = [levels[first::2] for first in range(2)]
    elif memory == 1:
        rows = [levels[first::4] for first in (0, 2, 1, 3)]
    else:
        high, low = PARITIES[memory]
        subsets = [2 * _parity(window & low) + _parity(window & high) for window in range(2 << memory)]
        rows = [levels[subset::4] for subset in subsets]
    return torch.from_numpy(np.stack(rows)).float()


def train(rate: int, noise: float, seed: int) -> Int[Tensor, "windows plain"]:
    """Return a table trained for normal weights, in whole numbers of 1 / UNIT."""
    generator = torch.Generator().manual_seed(seed)
    table = first_table(rate) * UNIT
    for iteration in range(ITERATIONS):
        weights = torch.randn(SEQUENCES, STEPS, generator=generator) * UNIT
        fading = noise * max(0.0, 1 - iteration / (0.7 * ITERATIONS)) * UNIT * 2.0**-rate
        shaken = table + fading * torch.randn(table.shape, generator=generator)
        entries = _entries(encoder.best_codes(weights, torch.ones(weights.shape), rate, shaken), rate).flatten()
        total = torch.zeros(table.numel(), dtype=torch.float64).index_add_(0, entries, weights.flatten().double())
        count = torch.bincount(entries, minlength=table.numel())
        # Two imagined weights at the present entry keep an entry that nobody chose.
        table = ((total + 2 * table.flatten().double()) / (count + 2)).view(table.shape).float()
    return table.round().clamp(-127, 127).int()


def distortion(rate: int, table: Num[Tensor, "..."]) -> float:
    """Return the mean squared error of normal weights of variance 1 at a rate."""
    generator = torch.Generator().manual_seed(TEST_SEED)
    weights = torch.randn(TEST_SEQUENCES, STEPS, generator=generator) * UNIT
    codes = encoder.best_codes(weights, torch.ones(weights.shape), rate, table.float())
    values = codes.view(torch.int8) if rate == INT8 else table.flatten()[_entries(codes, rate)]
    return float((weights - values).square().mean()) / UNIT**2


def decibels(rate: int, error: float) -> float:
    """Return how far an error is above the rate–distortion bound of normal weights, in decibels.

    >>> round(decibels(2, 1 / 16), 3)
    0.0
    """
    return 10 * math.log10(error * 4**rate)


def _entries(codes: Tensor, rate: int) -> Tensor:
    """Return the entry of the flat table that each code of a sequence stands for."""
    coded = (codes & 1).long()
    window = torch.stack([coded.roll(lag, -1) << lag for lag in range(MEMORY[rate] + 1)]).sum(0)
    return (window << rate - 1) + (codes >> 1)


def _parity(bits: int) -> int:
    return bits.bit_count() & 1


def main() -> None:
    """Train all tables, write them with their mean squared errors, and print their distances to the bound."""
    tables, least = {}, [1.0]
    for rate in range(1, INT8):
        trials = [train(rate, noise, seed) for noise, seed in TRIALS]
        errors = [distortion(rate, table) for table in trials]
        best = int(np.argmin(errors))
        tables[str(rate)] = trials[best].tolist()
        least.append(errors[best])
        print(
            f"{rate} bits, {trials[best].numel():3d} entries: mean squared error {errors[best]:.5f}, "
            f"{decibels(rate, errors[best]):.2f} dB above rate–distortion (trial {best})",
            flush=True,
        )
    least.append(distortion(INT8, torch.zeros(0)))
    stored = {"tables": tables, "distortions": [float(f"{error:.4g}") for error in least]}
    FILE.write_text(json.dumps(stored, separators=(",", ":")) + "\n")


if __name__ == "__main__":
    main()
