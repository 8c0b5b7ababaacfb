"""Lattice paths: which codes a weight may take, and what the encoder knows of rows and columns.

A column is cut into paths of ``STEPS`` rows.  The steps of the lattice are half as fine as plain rounding would need
them, but a weight may take every second code only: even ones (set 0), or odd ones and zero (set 1).  A code of
magnitude c has the number (c + set) // 2.  A state of 5 bits says which set is next.  The parities of the numbers of
the rows above drive it, by a convolutional code of Ungerboeck (1982), as in the dependent quantization of video codecs
(VVC).
Every path starts in state 0, so that a decoder that knows the numbers follows all states.
"""

import dataclasses

import numpy as np
from jaxtyping import Float, Int, Int8
from torch import Tensor

STATES, STEPS = 32, 192
SET_BITS, PARITY_BITS = 0o10, 0o45  # of a window, which is a state and the bit that follows it


def _parities(mask: int, windows: int) -> Int[np.ndarray, " windows"]:
    return np.array([bin(window & mask).count("1") & 1 for window in range(windows)])


WINDOW_SETS, WINDOW_PARITIES = _parities(SET_BITS, 2 * STATES), _parities(PARITY_BITS, 2 * STATES)
SETS, FLIPS = WINDOW_SETS[::2].astype(np.int32), WINDOW_PARITIES[::2].astype(np.int32)  # by state


def next_states(states: Int[np.ndarray, "*shape"], numbers: Int[np.ndarray, "*shape"]) -> Int[np.ndarray, "*shape"]:
    """Return the states that follow ``states`` after weights whose magnitudes have these numbers."""
    return (2 * states | (FLIPS[states] ^ (numbers & 1))) & (STATES - 1)


@dataclasses.dataclass(frozen=True)
class Rows:
    """What the encoder knows of the rows of a matrix: step sizes, sensitivities, and exponents of the lattice."""

    steps: Float[Tensor, " out"]
    sensitivities: Float[Tensor, " out"]
    scale: Int8[Tensor, " out"]
    size: Int8[Tensor, " out"]


@dataclasses.dataclass(frozen=True)
class Columns:
    """What the encoder knows of a block of columns: step sizes, and exponents of the lattice."""

    steps: Float[Tensor, " columns"]
    scale: Int8[Tensor, " columns"]
    size: Int8[Tensor, " columns"]
