"""How frequent the tokens of a vocabulary are, those included of which calibration text says nothing."""

import torch
from jaxtyping import Float
from torch import Tensor

FIRST_RANKS = 50  # tokens at the start of a vocabulary that are about equally frequent


def expected_shares(rows: int) -> Float[Tensor, " rows"]:
    """Return how often each of so many tokens is expected in any text, as shares that add up to 1.

    Tokenizers number their tokens in the order in which they were merged, the most frequent ones first, so that the
    frequency falls as one over the number (Zipf's law, with Mandelbrot's shift for the first ranks).
    """
    shares = 1 / (torch.arange(rows, dtype=torch.float64) + FIRST_RANKS)
    return shares / shares.sum()


def smoothed(sums: Float[Tensor, " rows"], positions: int, zipf: bool) -> Float[Tensor, " rows"]:
    """Return the mean of each row over the positions, and over as many others as there are rows.

    The others add one to each row, or the mean of a position, spread as tokens are expected.
    """
    rows = len(sums)
    others = rows * expected_shares(rows) * sums.sum() / positions if zipf else 1
    return (sums + others) / (positions + rows)
