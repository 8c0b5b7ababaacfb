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
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
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
MOSTLY = 0.8  # of the tiles at once, fewer than which are copied to leave the others
COSTS = 1 << 13  # costs of paths that are held at once, for each step


@dataclasses.dataclass(frozen=True)
class Tiles:
    """Some tiles as the game sees them, each with the columns of its place in the order of encoding.

    Columns that a tile lacks, at the end of a row of tiles, are zero.  ``size``: of the weights of a row.  ``scales``:
    of the columns.  ``slopes``: the derivative of the damage in each value, with the sign changed.  ``inputs``: the
    damped H of the columns.  ``roots``: U of inputs = U Uᵀ, upper triangular.  ``free``: U⁻¹ of the slopes.
    """

    rates: Int[Array, " tiles"]
    groups: Int[Array, " tiles"]
    values: Float[Array, "16 16 tiles 4"]
    slopes: Float[Array, "16 16 tiles 4"]
    size: Float[Array, "16 tiles 4"]
    scales: Float[Array, "16 tiles"]
    inputs: Float[Array, "16 16 tiles"]
    roots: Float[Array, "16 16 tiles"]
    free: Float[Array, "16 16 tiles 4"]

    def select(self, chosen: Int[Array, " some"]) -> "Tiles":
        """Return some of the tiles."""
        return Tiles(
            self.rates[chosen], self.groups[chosen], self.values[:, :, chosen], self.slopes[:, :, chosen],
            self.size[:, chosen], self.scales[:, chosen], self.inputs[:, :, chosen], self.roots[:, :, chosen],
            self.free[:, :, chosen],
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

    def most_gain(self, column: int = 0) -> Float[Array, " tiles"]:
        """Return by how much each tile's damage would fall with the best weights there are from a column on.

        That is ½ sᵀ H⁻¹ s of slopes s: half the sum of squares of U⁻¹ s, whose end is that of the last columns alone.
        """
        return (self.free[column:] ** 2).sum((0, 1, 3)) / 2 * ROUNDED_UP

    def gain_of_rate(self, rate: int, needed: Float[Array, " tiles"] | None = None) -> Float[Array, " tiles"]:
        """Return by how much the damage of each tile would fall at another rate, in nats per token.

        With ``needed``: -inf for a tile that certainly gains no more than this, which is then not followed to its end.
        """
        gains, left = np.full(len(self.rates), -np.inf), np.arange(len(self.rates))
        tiles = self.select(left)  # copies, which change below
        so_far = np.zeros(len(left))
        for column in range(COLUMNS):
            if needed is not None:
                hopeful = so_far + tiles.most_gain(column) > needed[left]
                if not hopeful.any():
                    return gains
                if hopeful.mean() < MOSTLY:
                    tiles, left, so_far = tiles.select(np.flatnonzero(hopeful)), left[hopeful], so_far[hopeful]
            change, gain = tiles.reply(column, tiles.slopes[column], rate)
            so_far += gain.sum((0, 2))
            tiles.slopes[column + 1 :] -= tiles.inputs[column, column + 1 :, None, :, None] * change
            tiles.free[column + 1 :] -= tiles.roots[column, column + 1 :, None, :, None] * change
        gains[left] = so_far
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
    with ThreadPoolExecutor(workers) as pool:
        for tiles, wanted in arranged(layer, matrix, quadratic, chosen):
            paths = np.zeros(tiles.groups[-1] + 1)
            for rate in np.unique(tiles.rates).tolist():
                parts = _batches(np.flatnonzero(tiles.rates == rate), rate)
                for part, gain in zip(parts, pool.map(partial(_gain_of_paths, tiles, rate), parts), strict=True):
                    np.add.at(paths, tiles.groups[part], gain)
            by_group.append(paths)
            best, most = np.zeros(len(tiles.rates)), tiles.most_gain()
            for rate in allowed:
                saved = price * (ROWS * COLUMNS // 8) * (tiles.rates - rate)
                worth = wanted[(most + saved > best)[wanted]]  # others gain no more with any weights at all
                parts = _batches(worth, rate)
                gain_of_rate = partial(_gain_of_rate, tiles, rate, best - saved)
                for part, gain in zip(parts, pool.map(gain_of_rate, parts), strict=True):
                    best[part] = np.maximum(best[part], gain + saved[part])
            gains.append(best[wanted])
    return np.concatenate(gains), np.concatenate(by_group)


def _gain_of_paths(tiles: Tiles, rate: int, part: Int[Array, " some"]) -> Float[Array, " some"]:
    return tiles.select(part).gain_of_paths(rate)


def _gain_of_rate(
    tiles: Tiles, rate: int, needed: Float[Array, " tiles"], part: Int[Array, " some"]
) -> Float[Array, " some"]:
    return tiles.select(part).gain_of_rate(rate, needed[part])


def arranged(
    layer: Layer, matrix: Trellis, quadratic: Quadratic, chosen: Bool[Array, "groups across"]
) -> Iterator[tuple[Tiles, Int[Array, " some"]]]:
    """Yield the tiles of a few groups of rows at a time, and the numbers of those among them that are chosen."""
    sensitivity, inputs = one_curvature(quadratic)
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
    roots = _roots(blocks)
    inverse = np.linalg.inv(roots)
    lacking = across * COLUMNS - matrix.columns
    by_tile = np.pad(scales, (0, lacking), constant_values=1).reshape(across, COLUMNS)

    def fold(part: Float[Array, "stored_rows columns"]) -> Float[Array, "16 16 tiles 4"]:
        full = np.pad(part, ((0, 0), (0, lacking))).reshape(-1, STEPS, LANES, across, COLUMNS)
        return full.transpose(4, 1, 0, 3, 2).reshape(COLUMNS, STEPS, -1, LANES)

    def tiled(part: Float[Array, "across 16 16"]) -> Float[Array, "16 16 tiles"]:
        return np.tile(part, (count, 1, 1)).transpose(1, 2, 0)

    for start in range(0, groups, GROUPS):
        count = min(GROUPS, groups - start)
        rows = slice(start * ROWS, (start + count) * ROWS)
        wanted = float64(layer.weight[row_order[rows].astype(np.int64)])[:, columns] * root[rows, None]
        wanted = np.pad(wanted, ((0, count * ROWS - len(wanted)), (0, 0)))
        if matrix.rotated:
            wanted = (hadamard(ROWS) / ROWS**0.5 @ wanted.reshape(count, ROWS, -1)).reshape(wanted.shape)
        stored = values[rows][:, places] * np.outer(size[rows] / UNIT, scales)
        by_sequence = np.repeat(size[rows].reshape(count, STEPS, LANES).swapaxes(0, 1), across, 1)
        slopes = fold((wanted - stored) @ inputs)
        free = np.einsum(
            "aij,jsgal->isgal", inverse, slopes.reshape(COLUMNS, STEPS, count, across, LANES), optimize=True
        )
        yield (
            Tiles(
                rates[start : start + count].numpy().ravel().astype(np.int64), np.repeat(np.arange(count), across),
                fold(stored), slopes, by_sequence, np.tile(by_tile, (count, 1)).T,
                tiled(blocks), tiled(roots),
                free.reshape(slopes.shape),
            ),
            np.flatnonzero(chosen[start : start + count]),
        )  # fmt: skip


def one_curvature(quadratic: Quadratic) -> tuple[Float[Array, " out"], Float[Array, "in in"]]:
    """Return the sensitivities of the rows and one H for all of them.

    Lookups are averaged: over columns into the sensitivities, over rows into the diagonal of H.
    """
    rows, lookups = quadratic.rows, quadratic.lookups
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


def _roots(blocks: Float[Array, "across 16 16"]) -> Float[Array, "across 16 16"]:
    """Return U of each block = U Uᵀ, upper triangular; of a column that is lacking, that of 1."""
    filled = blocks + np.eye(COLUMNS) * (np.einsum("tii->ti", blocks) == 0)[:, None]
    return np.linalg.cholesky(filled[:, ::-1, ::-1])[:, ::-1, ::-1]


def _batches(chosen: Int[Array, " some"], rate: int) -> list[Int[Array, " part"]]:
    """Split tiles into so many at once that the costs of their paths at a rate stay in a cache."""
    if not len(chosen):
        return []
    windows = len(tables()[rate]) if rate in tables() else 2
    return np.array_split(chosen, -(-len(chosen) * LANES * windows // COSTS))
