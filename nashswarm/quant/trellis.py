"""Encode an arranged matrix in trellis tiles: error feedback, sweeps of whole columns, and deviations of tiles.

Columns are encoded in the order of their curvature, the largest first (as GPTQ's act-order).  A column is a set of
paths, one for every 16 weights of a tile.  Its best reply to all other columns is the best path to
``q + (W − Q) H / H_jj``, exact over all codes.  Sweeps of such replies are block coordinate descent: they never raise
the damage.
"""

import dataclasses

import torch
from jaxtyping import Float, Float64, Int32, Integer, UInt8
from torch import Tensor

from nashswarm.kernels import encoder, trellis
from nashswarm.kernels.encoder import KEEP, RATES, Columns
from nashswarm.kernels.trellis import COLUMN_STEPS, MIDDLE, Trellis
from nashswarm.kernels.trellis_codes import COLUMNS, ROWS, UNIT, values_of
from nashswarm.quant.trellis_arrangement import Arrangement, Layout

BLOCK = 64  # columns
ROWS_AT_ONCE = 8192  # whose errors are in memory
ALL_RATES = (1 << RATES) - 1


@dataclasses.dataclass(frozen=True)
class Encoded:
    """An arranged matrix in codes, columns in the order of encoding.  ``column_scale``: codes of their scales."""

    rates: UInt8[Tensor, "groups tiles"]
    codes: UInt8[Tensor, "columns stored_rows"]
    column_scale: UInt8[Tensor, " columns"]


@dataclasses.dataclass
class State:
    """A matrix while it is encoded: its codes, the values that they stand for, and the slopes of the damage, (W − Q) H.

    Everything changes in place.  ``rates_by_column``: the rates of the tiles of each column.
    """

    arrangement: Arrangement
    rates: UInt8[Tensor, "groups tiles"]
    columns: Columns
    slopes: Float[Tensor, "columns stored_rows"]

    @property
    def rates_by_column(self) -> UInt8[Tensor, "columns groups"]:
        return self.rates[:, self.arrangement.layout.tiles].T.contiguous()

    @property
    def damage(self) -> float:
        """The damage in nats per token."""
        parts = zip(self.arrangement.weights, self.columns.values, self.slopes, strict=True)
        return sum(float(((weight - value) * slope).sum(dtype=torch.float64)) for weight, value, slope in parts) / 2

    def refresh(self) -> None:
        """Compute the slopes anew, without the rounding errors of many updates."""
        for start in range(0, self.slopes.shape[1], ROWS_AT_ONCE):
            rows = slice(start, start + ROWS_AT_ONCE)
            error = self.arrangement.weights[:, rows] - self.columns.values[:, rows]
            self.slopes[:, rows] = self.arrangement.inputs @ error

    def encoded(self) -> Encoded:
        """Return what a file holds of it."""
        return Encoded(self.rates.clone(), self.columns.codes, scale_codes(self.columns.scales))


def feedback(
    arrangement: Arrangement, factor: Float[Tensor, "columns columns"], rates: UInt8[Tensor, "groups tiles"]
) -> State:
    """Encode a matrix at these rates by one pass of error feedback (GPTQ, Frantar et al. 2023), scales included."""
    corrected, columns = arrangement.weights.clone(), _empty(arrangement)
    by_column = rates[:, arrangement.layout.tiles].T.contiguous()
    for start in range(0, len(corrected), BLOCK):
        block = slice(start, min(start + BLOCK, len(corrected)))
        errors = encoder.feedback(_select(columns, block), corrected[block], factor[block, block], by_column[block])
        corrected[block.stop :].addmm_(factor[block, block.stop :].T, errors, alpha=-1)
    erased = (by_column == 0).all(1)  # what they are scaled by counts once their tiles try other rates
    spread = (arrangement.weights[erased] / arrangement.layout.size).square().mean(1).sqrt()
    columns.scales[erased] = trellis.scales(scale_codes(spread), COLUMN_STEPS)
    state = State(arrangement, rates, columns, corrected)  # whose memory the slopes take
    state.refresh()
    return state


def reopen(arrangement: Arrangement, encoded: Encoded) -> State:
    """Return the state of a matrix that was encoded before.  The state holds its codes, which change with it."""
    layout, scales = arrangement.layout, trellis.scales(encoded.column_scale, COLUMN_STEPS)
    columns = Columns(encoded.codes, _decode(layout, encoded, scales), scales, layout.size)
    state = State(arrangement, encoded.rates.clone(), columns, torch.empty(encoded.codes.shape))
    state.refresh()
    return state


def sweep(state: State) -> tuple[float, int]:
    """Give every column its best codes once; return by how much the damage fell, and how many sequences changed."""
    by_column, inputs = state.rates_by_column, state.arrangement.inputs
    total, changed = 0.0, 0
    for start in range(0, len(inputs), BLOCK):
        block = slice(start, min(start + BLOCK, len(inputs)))
        moves, gains, moved = encoder.sweep(
            _select(state.columns, block), state.slopes[block], inputs[block, block], by_column[block]
        )
        if moved:
            for others in (slice(0, block.start), slice(block.stop, None)):
                state.slopes[others].addmm_(inputs[others, block], moves, alpha=-1)
        total, changed = total + float(gains.sum()), changed + moved
    return total, changed


def deviations(state: State, tile: int, masks: Int32[Tensor, " groups"] | None = None) -> Float64[Tensor, "groups 9"]:
    """Return the change of damage if the tiles in one place across replied at each other rate, all others staying.

    Bit r of its mask says whether a tile tries rate r; by default all are tried.
    """
    if masks is None:
        masks = torch.full((len(state.rates),), ALL_RATES, dtype=torch.int32)
    chosen = _columns_of(state, tile)
    inputs = state.arrangement.inputs[chosen[:, None], chosen]
    return encoder.deviations(_select(state.columns, chosen), state.slopes[chosen], inputs, masks)


def most_gain(state: State, tile: int) -> Float64[Tensor, " groups"]:
    """Return the most by which the damage could fall if the tiles in one place across had any weights at all.

    That is ½ sᵀ H⁻¹ s, of the slopes s of a tile and the part of H between its columns.  No rate can gain more.
    """
    chosen = _columns_of(state, tile)
    slopes = state.slopes[chosen].double()
    inputs = state.arrangement.inputs[chosen[:, None], chosen].double()
    return (slopes * torch.linalg.solve(inputs, slopes)).sum(0).view(-1, ROWS).sum(1) / 2


def adopt(state: State, tile: int, rates: UInt8[Tensor, " groups"]) -> None:
    """Let the tiles in one place across take these rates (``encoder.KEEP``: stay) and reply."""
    chosen = _columns_of(state, tile)
    inputs = state.arrangement.inputs
    part = _select(state.columns, chosen)
    moves = encoder.adopt(part, state.slopes[chosen], inputs[chosen[:, None], chosen], rates)
    state.columns.codes[chosen], state.columns.values[chosen] = part.codes, part.values
    state.slopes.addmm_(inputs[:, chosen], moves, alpha=-1)
    state.rates[:, tile] = torch.where(rates == KEEP, state.rates[:, tile], rates)


def path_regret(state: State) -> float:
    """Return the most that a group of rows could gain: the sum over its columns, each changing alone."""
    total = torch.zeros(state.arrangement.layout.shape[0], dtype=torch.float64)
    by_column, inputs = state.rates_by_column, state.arrangement.inputs
    for start in range(0, len(inputs), BLOCK):
        block = torch.arange(start, min(start + BLOCK, len(inputs)))  # copies: nothing moves
        alone = torch.diag(inputs.diagonal()[block])
        total += encoder.sweep(_select(state.columns, block), state.slopes[block], alone, by_column[block])[1]
    return float(total.max())


def finish(layout: Layout, encoded: Encoded) -> Trellis:
    """Return the matrix in the form that is stored and multiplied."""
    codes = _stored(layout, encoded)
    column_scale = torch.zeros(codes.shape[1], dtype=torch.uint8)
    column_scale[layout.places] = encoded.column_scale
    return trellis.build(
        encoded.rates, codes, layout.rows, layout.columns, layout.rotated, layout.scale,
        layout.row_size, layout.row_scale, column_scale, layout.row_order, layout.column_order,
    )  # fmt: skip


def scale_codes(scales: Float[Tensor, " n"]) -> UInt8[Tensor, " n"]:
    """Return the logarithmic codes nearest to column scales."""
    octaves = scales.double().clamp(min=2.0 ** (-MIDDLE / COLUMN_STEPS)).log2()
    return ((COLUMN_STEPS * octaves).round() + MIDDLE).clamp(0, 255).to(torch.uint8)


def _stored(layout: Layout, encoded: Encoded) -> UInt8[Tensor, "stored_rows places"]:
    """Return the codes as they are stored: by row, each column in its place."""
    by_place = torch.zeros(encoded.rates.shape[1] * COLUMNS, encoded.codes.shape[1], dtype=torch.uint8)
    by_place[layout.places] = encoded.codes
    return by_place.T.contiguous()


def _decode(
    layout: Layout, encoded: Encoded, scales: Float[Tensor, " columns"]
) -> Float[Tensor, "columns stored_rows"]:
    """Return the values that the codes stand for."""
    values = values_of(encoded.rates, _stored(layout, encoded)).T[layout.places]
    decoded = torch.empty(encoded.codes.shape)  # contiguous, as indexing a transposed tensor need not be
    return torch.mul(values, (layout.size / UNIT)[None], out=decoded).mul_(scales[:, None])


def _empty(arrangement: Arrangement) -> Columns:
    shape = arrangement.weights.shape
    return Columns(
        torch.zeros(shape, dtype=torch.uint8), torch.zeros(shape), torch.ones(shape[0]), arrangement.layout.size
    )


def _select(columns: Columns, chosen: slice | Integer[Tensor, " some"]) -> Columns:
    """Return some of the columns: views for a slice, copies for a list."""
    return Columns(columns.codes[chosen], columns.values[chosen], columns.scales[chosen], columns.size)


def _columns_of(state: State, tile: int) -> Integer[Tensor, " some"]:
    return (state.arrangement.layout.tiles == tile).nonzero()[:, 0]
