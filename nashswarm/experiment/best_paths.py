"""Find the best values of sequences of a trellis-coded matrix, in float64: Viterbi's algorithm over all circular paths.

Part of the second implementation of the game (see ``tile_deviations``): only the tables of the format are imported.
The solver's encoder tries one start state after another and searches every table entry.  Here a circle is cut in three:
the costs of its first and its last steps are plain sums, since the states at both ends fix every coded bit between
them, and only the steps between need minima.  Table entries are found by cells of half a unit.

The C++ library computes the same to the last bit (``csrc/trellis_circles.cpp``), where it was built.
"""

import functools

import numpy as np
from jaxtyping import Bool, Float, Int

from nashswarm.kernels import native
from nashswarm.kernels.trellis_codes import tables

Array = np.ndarray

STEPS = 16  # of a sequence
INT8, LARGEST = 8, 127  # the rate of plain int8, and its largest value
EDGE = 256  # cells of half a unit on either side of zero
STARTS = 8  # start states that are followed at once


def best_values(
    target: Float[Array, "16 sequences"], weight: Float[Array, "16 sequences"], rate: int
) -> Float[Array, "16 sequences"]:
    """Return the values of least weighted squared error that sequences can have at one rate, in units of the table."""
    if rate == 0:
        return np.zeros_like(target)
    if rate == INT8:
        return np.rint(target).clip(-LARGEST, LARGEST)
    nearest = nearest_entries(rate)
    cells = np.fmax(np.fmin(np.floor(2 * target), EDGE), -EDGE).astype(np.int64) + EDGE  # also of what is not a number
    if native.path() != native.SLOW:
        return _values_by_library(nearest, cells, target, weight)
    costs = nearest[:, cells]
    costs -= target
    costs *= costs
    costs *= weight
    costs = np.ascontiguousarray(costs.swapaxes(0, 1))  # steps, windows, sequences
    start, _ = best_starts(costs)
    windows = best_windows(costs, start)
    return nearest[windows, cells]


def _values_by_library(
    nearest: Float[Array, "windows cells"],
    cells: Int[Array, "16 sequences"],
    target: Float[Array, "16 sequences"],
    weight: Float[Array, "16 sequences"],
) -> Float[Array, "16 sequences"]:
    library, state_bits = native.library(), len(nearest).bit_length() - 2
    assert not isinstance(library, str)
    values = np.empty_like(cells, np.float64)
    parts = [np.ascontiguousarray(part) for part in (nearest, cells, target, weight)]
    entries, *given = (part.ctypes.data for part in parts)
    library.nashswarm_trellis_circles(entries, nearest.shape[1], state_bits, *given, cells.shape[1], values.ctypes.data)
    return values


@functools.cache
def nearest_entries(rate: int) -> Float[Array, "windows cells"]:
    """Return the table entry nearest to each cell of half a unit, for each window of coded bits.

    Entries are whole units, so that the boundary between two of them is the boundary of a cell.
    """
    table = tables()[rate].astype(float)
    centres = (np.arange(-EDGE, EDGE + 1) + 0.5) / 2
    entry = np.abs(centres[:, None] - table[:, None]).argmin(2)
    return np.take_along_axis(table, entry, 1)


def best_starts(
    costs: Float[Array, "16 windows sequences"],
) -> tuple[Int[Array, " sequences"], Float[Array, " sequences"]]:
    """Return the state in which the best circle of each sequence starts and ends, and the cost of the circle.

    A window is the last coded bits with the newest lowest, a state all of them but the newest.
    """
    _, windows, count = costs.shape
    states = windows // 2
    memory = states.bit_length() - 1
    first = sums_between(costs[:memory])  # start, state
    last = sums_between(costs[STEPS - memory :])  # state, end
    least, best = np.full(count, np.inf), np.zeros(count, np.int64)
    for start in range(0, states, STARTS):
        total = first[start : start + STARTS]
        for step in costs[memory : STEPS - memory]:
            total = np.minimum(*advance(total, step))
        circles = (total + last[:, start : start + STARTS].swapaxes(0, 1)).min(1)
        better = circles.min(0) < least
        least[better], best[better] = circles.min(0)[better], start + circles.argmin(0)[better]
    return best, least


def sums_between(costs: Float[Array, "steps windows sequences"]) -> Float[Array, "states states sequences"]:
    """Return the cost of the only path from each state to each state, over as many steps as a state has bits."""
    _, windows, count = costs.shape
    states = windows // 2
    total = np.zeros((1, states, 1, count))
    for step in costs:
        total = (total.reshape(-1, states, 1, count) + step.reshape(states, 2, count)).reshape(-1, states, 1, count)
    return total.reshape(states, states, count)


def advance(
    total: Float[Array, "*starts states sequences"], costs: Float[Array, "windows sequences"]
) -> tuple[Float[Array, "*starts states sequences"], Float[Array, "*starts states sequences"]]:
    """Return the cost of entering each state by a window whose oldest bit is 0, and by one whose oldest bit is 1."""
    *starts, states, count = total.shape
    options = (total[..., None, :] + costs.reshape(states, 2, count)).reshape(*starts, 2, states, count)
    return options[..., 0, :, :], options[..., 1, :, :]


def best_windows(
    costs: Float[Array, "16 windows sequences"], start: Int[Array, " sequences"]
) -> Int[Array, "16 sequences"]:
    """Return the windows of the best path from the state ``start`` back to it."""
    _, windows, count = costs.shape
    states, everyone = windows // 2, np.arange(count)
    total = np.full((states, count), np.inf)
    total[start, everyone] = 0
    oldest: list[Bool[Array, "states sequences"]] = []
    for step in costs:
        zero, one = advance(total, step)
        oldest.append(one < zero)
        total = np.minimum(zero, one)
    path, at = np.zeros((STEPS, count), np.int64), start
    for number in reversed(range(STEPS)):
        path[number] = at + states * oldest[number][at, everyone]
        at = path[number] >> 1
    return path
