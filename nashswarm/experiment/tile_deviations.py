"""Enumerate what the tiles and the paths of a decoded trellis-coded model could gain by deviating alone.

This is a second implementation of the game of rates, and it shares no sum with the solver: that is its point.  Only the
decoder of the stored bytes and plain values are imported.  Everything is in float64.

- Rates: every tile tries every rate of the method.  Its columns answer one after another in the order of encoding, by
  their best paths, while everything else stays as it is stored.
- Paths: every 16 weights of a column that are coded together try every other path at their rate.  The gains of the
  paths of a group of 64 rows are added up.

Nothing but the bytes, the statistics and the settings is needed.  A row counts by its sensitivity as the file can hold
it, in steps of 1/4 octave: the file holds the product of 1/√sensitivity and of one size for each group of rows, and the
sensitivity is computed again.  The rows that fill up the last group cost as others do, as in the game: a rotation mixes
them with rows of the matrix, so that without their errors no path could be priced alone.
"""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from statistics import median_low

import numpy as np
from jaxtyping import Bool, Float, Int
from scipy.linalg import hadamard

from nashswarm.experiment.best_paths import STEPS, best_values
from nashswarm.experiment.decoded_costs import Array, Quadratic, float64
from nashswarm.kernels import trellis as form
from nashswarm.kernels.trellis import Trellis
from nashswarm.kernels.trellis_codes import tables, unpack_codes, values_of
from nashswarm.layers import Layer

ROWS, COLUMNS, LANES = 64, 16, 4  # of a tile; rows r, r + 4, … are one sequence
UNIT, MIDDLE, ROW_STEPS, COLUMN_STEPS, SIZE_STEPS = 36, 128, 8, 16, 4  # fixed by the format
SMALLEST = 1e-30
GROUPS = 64  # of rows that are arranged at once
ROUNDED_UP = 1 + 1e-6  # the most that a tile can gain, with room for rounding
COSTS = 1 << 13  # costs of paths that are held at once, for each step


@dataclasses.dataclass(frozen=True)
class Tiles:
    """Some tiles as the game sees them, each with the columns of its place in the order of encoding.

    Columns that a tile lacks, at the end of a row of tiles, are zero.  ``size``: of the weights of a row.  ``scales``:
    of the columns.  ``slopes``: the derivative of the damage in each value, with the sign changed.  ``inputs``: the
    damped H of the columns.
    """

    rates: Int[Array, " tiles"]
    groups: Int[Array, " tiles"]
    values: Float[Array, "16 16 tiles 4"]
    slopes: Float[Array, "16 16 tiles 4"]
    size: Float[Array, "16 tiles 4"]
    scales: Float[Array, "16 tiles"]
    inputs: Float[Array, "16 16 tiles"]

    def select(self, chosen: Int[Array, " some"]) -> "Tiles":
        """Return some of the tiles."""
        return Tiles(
            self.rates[chosen], self.groups[chosen], self.values[:, :, chosen], self.slopes[:, :, chosen],
            self.size[:, chosen], self.scales[:, chosen], self.inputs[:, :, chosen],
        )  # fmt: skip

    def reply(
        self, column: int, slope: Float[Array, "16 tiles 4"], rate: int
    ) -> tuple[Float[Array, "16 tiles 4"], Float[Array, "16 tiles 4"]]:
        """Return how the values of a column change by its best reply at a rate, and how much each weight gains."""
        stiffness = self.inputs[column, column, :, None]
        unit = self.size * self.scales[column, :, None] / UNIT
        target = self.values[column] + np.divide(slope, stiffness, out=np.zeros_like(slope), where=stiffness > 0)
        best = best_values((target / unit).reshape(STEPS, -1), (self.size**2).reshape(STEPS, -1), rate)
        change = best.reshape(unit.shape) * unit - self.values[column]
        return change, change * (slope - stiffness / 2 * change)

    def most_gain(self) -> Float[Array, " tiles"]:
        """Return by how much each tile's damage would fall with the best weights there are: ½ sᵀ H⁻¹ s of slopes s."""
        inputs, slopes = self.inputs.transpose(2, 0, 1).copy(), self.slopes.transpose(2, 0, 1, 3)
        lacking = np.einsum("tii->ti", inputs) == 0
        np.einsum("tii->ti", inputs)[lacking] = 1  # of columns whose slopes are zero
        slopes = slopes.reshape(len(slopes), COLUMNS, STEPS * LANES)
        return (slopes * np.linalg.solve(inputs, slopes)).sum((1, 2)) / 2 * ROUNDED_UP

    def gain_of_rate(self, rate: int) -> Float[Array, " tiles"]:
        """Return by how much the damage of each tile would fall at another rate, in nats per token."""
        slopes, gains = self.slopes.copy(), np.zeros(len(self.rates))
        for column in range(COLUMNS):
            change, gain = self.reply(column, slopes[column], rate)
            gains += gain.sum((0, 2))
            slopes[column + 1 :] -= self.inputs[column, column + 1 :, None, :, None] * change
        return gains

    def gain_of_paths(self, rate: int) -> Float[Array, " tiles"]:
        """Return what the paths of each tile would gain at ``rate``, their own, each changing alone."""
        gains = np.zeros(len(self.rates))
        for column in range(COLUMNS):
            gain = self.reply(column, self.slopes[column], rate)[1]
            gains += np.maximum(gain.sum(0), 0).sum(1)
        return gains


def gain_of_tiles(
    layer: Layer,
    matrix: Trellis,
    quadratic: Quadratic,
    floor: float,
    allowed: Sequence[int],
    price: float,
    chosen: Bool[Array, "groups across"],
    workers: int = 1,
) -> tuple[Float[Array, " chosen_tiles"], Float[Array, " groups"]]:
    """Return what each chosen tile would gain by its best other rate, and each group of rows by its best other paths.

    Gains are in nats per token.  ``allowed``: the rates that a tile can take.  ``price``: of a byte, in nats per token.
    ``workers``: threads.  Raises ValueError if the scales of rows do not follow from ``quadratic``.
    """
    gains, by_group = [], []
    for tiles, wanted in arranged(layer, matrix, quadratic, floor, chosen):
        paths = np.zeros(tiles.groups[-1] + 1)
        for rate in np.unique(tiles.rates).tolist():
            same = np.flatnonzero(tiles.rates == rate)
            np.add.at(paths, tiles.groups[same], _in_batches(tiles, same, Tiles.gain_of_paths, rate, workers))
        by_group.append(paths)
        best = np.zeros(len(wanted))
        most = tiles.select(wanted).most_gain()
        for rate in allowed:
            saved = price * (ROWS * COLUMNS // 8) * (tiles.rates[wanted] - rate)
            worth = np.flatnonzero(
                most + saved > best
            )  # others would gain no more at this rate with any weights at all
            gain = _in_batches(tiles, wanted[worth], Tiles.gain_of_rate, rate, workers)
            best[worth] = np.maximum(best[worth], gain + saved[worth])
        gains.append(best)
    return np.concatenate(gains), np.concatenate(by_group)


def arranged(
    layer: Layer, matrix: Trellis, quadratic: Quadratic, floor: float, chosen: Bool[Array, "groups across"]
) -> Iterator[tuple[Tiles, Int[Array, " some"]]]:
    """Yield the tiles of a few groups of rows at a time, and the numbers of those among them that are chosen."""
    sensitivity, inputs = one_curvature(quadratic, floor)
    row_order, column_order = (order.numpy() for order in form.orders_of(matrix))
    root, size = row_factors(layer.name, matrix, sensitivity[row_order])
    rates = form.tile_rates(matrix)
    values = values_of(rates, unpack_codes(matrix.payload, rates)).numpy()
    groups, across = rates.shape
    # The places of the columns, tile by tile, in each tile in the order of encoding.
    rank = np.argsort(np.argsort(-inputs.diagonal(), kind="stable"))
    places = np.lexsort((rank[column_order], np.arange(matrix.columns) // COLUMNS))
    columns = column_order[places]
    inputs = inputs[np.ix_(columns, columns)]
    scales = 2.0 ** ((matrix.column_scale.numpy()[places].astype(float) - MIDDLE) / COLUMN_STEPS)
    blocks = np.zeros((across, COLUMNS, COLUMNS))
    for tile, block in enumerate(blocks):
        part = slice(tile * COLUMNS, (tile + 1) * COLUMNS)
        some = inputs[part, part]
        block[: len(some), : len(some)] = some
    lacking = across * COLUMNS - matrix.columns
    by_tile = np.pad(scales, (0, lacking), constant_values=1).reshape(across, COLUMNS)

    def fold(part: Float[Array, "stored_rows columns"]) -> Float[Array, "16 16 tiles 4"]:
        full = np.pad(part, ((0, 0), (0, lacking))).reshape(-1, STEPS, LANES, across, COLUMNS)
        return full.transpose(4, 1, 0, 3, 2).reshape(COLUMNS, STEPS, -1, LANES)

    for start in range(0, groups, GROUPS):
        count = min(GROUPS, groups - start)
        rows = slice(start * ROWS, (start + count) * ROWS)
        wanted = float64(layer.weight[row_order[rows].astype(np.int64)])[:, columns] * root[rows, None]
        wanted = np.pad(wanted, ((0, count * ROWS - len(wanted)), (0, 0)))
        if matrix.rotated:
            wanted = (hadamard(ROWS) / ROWS**0.5 @ wanted.reshape(count, ROWS, -1)).reshape(wanted.shape)
        stored = values[rows][:, places] * np.outer(size[rows] / UNIT, scales)
        by_sequence = np.repeat(size[rows].reshape(count, STEPS, LANES).swapaxes(0, 1), across, 1)
        yield (
            Tiles(
                rates[start : start + count].numpy().ravel().astype(np.int64), np.repeat(np.arange(count), across),
                fold(stored), fold((wanted - stored) @ inputs), by_sequence,
                np.tile(by_tile, (count, 1)).T, np.tile(blocks, (count, 1, 1)).transpose(1, 2, 0),
            ),
            np.flatnonzero(chosen[start : start + count]),
        )  # fmt: skip


def one_curvature(quadratic: Quadratic, floor: float) -> tuple[Float[Array, " out"], Float[Array, "in in"]]:
    """Return the sensitivities of the rows and one H for all of them.

    Every row gets ``floor`` times the mean of all rows on top.  Lookups are averaged: over columns into the
    sensitivities, over rows into the diagonal of H.
    """
    rows, lookups = quadratic.rows + floor * quadratic.rows.mean(), quadratic.lookups
    if lookups is not None:
        lookups = lookups + floor * lookups.mean(0)
    if quadratic.inputs is None:
        assert lookups is not None
        columns = np.maximum(lookups.mean(0), SMALLEST)
        return lookups.mean(1) / columns.mean(), np.diag(columns)
    if lookups is None:
        return rows, quadratic.inputs
    return (
        rows + lookups.mean(1) / quadratic.inputs.diagonal().mean(),
        quadratic.inputs + np.diag(lookups.sum(0) / rows.sum()),
    )


def row_factors(
    name: str, matrix: Trellis, sensitivity: Float[Array, " rows"]
) -> tuple[Float[Array, " rows"], Float[Array, " stored_rows"]]:
    """Return √sensitivity of each row as the file can hold it, and the size of each stored row in a weighted matrix.

    ``sensitivity``: in the stored order.  The scale of a row is that of its group over √sensitivity, rounded to steps.
    What it is more than the latter is therefore the same in all rows of a group, but for one step if both round, and
    for scales at the end of their range.  Raises ValueError if it is not.
    """
    octaves = -np.log2(np.maximum(sensitivity, SMALLEST)) / 2
    if not matrix.scale > 0:
        raise ValueError(f"{name} has the scale {matrix.scale}, which no matrix has; compress the model again")
    # Codes are rounded, and bounded, around the median; the common factor of the file moves all of them alike.
    median = np.rint(median_low(octaves))
    codes = (np.rint(ROW_STEPS * (octaves - median)) + MIDDLE).clip(0, 255)
    own = codes + ROW_STEPS * (median - np.log2(matrix.scale))
    stored = matrix.row_scale.numpy().astype(float)
    group = np.arange(matrix.rows) // ROWS
    inside = (stored > 0) & (stored < 255)
    rises = np.array([median_low((stored - own)[group == number]) for number in range(form.groups_of(matrix.rows))])
    difference = stored - own - rises[group]
    if (np.abs(difference[inside & (codes > 0) & (codes < 255)]) > 1).any():
        raise ValueError(
            f"the scales of the rows of {name} do not follow from their sensitivities: the file was changed, or it "
            "belongs to another text; compress the model again"
        )
    own += np.where(inside, difference, 0)
    root = 1 / (matrix.scale * 2.0 ** ((own - MIDDLE) / ROW_STEPS))
    packed = matrix.row_size.numpy()
    size = 0.5 ** (np.stack([packed & 15, packed >> 4], 1).ravel() / SIZE_STEPS)
    return root, size * 2.0 ** (np.repeat(rises, ROWS) / ROW_STEPS)


def _in_batches(
    tiles: Tiles,
    chosen: Int[Array, " some"],
    gain: Callable[[Tiles, int], Float[Array, " batch"]],
    rate: int,
    workers: int,
) -> Float[Array, " some"]:
    """Return the gain of each of the chosen tiles at a rate, so many tiles at once that their costs stay in a cache."""
    if not len(chosen):
        return np.zeros(0)
    windows = len(tables()[rate]) if rate in tables() else 2
    parts = np.array_split(chosen, -(-len(chosen) * LANES * windows // COSTS))
    with ThreadPoolExecutor(workers) as pool:
        return np.concatenate(list(pool.map(lambda part: gain(tiles.select(part), rate), parts)))
