"""The encoder of trellis tiles in torch: slow, for machines without the C++ library, which is tested against it."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from nashswarm.kernels.trellis_codes import INT8, LANES, MEMORY, ROWS, STEPS, UNIT, tables, values_of_sequences

if TYPE_CHECKING:
    from nashswarm.kernels.encoder import Columns

LOWEST, HIGHEST = -128, 127  # logarithms of scales, in 1/16 octave


def best_codes(
    targets: Float[Tensor, "sequences 16"],
    weights: Float[Tensor, "sequences 16"],
    rate: int,
    table: Float[Tensor, "windows plain"] | None = None,
) -> UInt8[Tensor, "sequences 16"]:
    """Compute ``encoder.best_codes`` by Viterbi's algorithm from every start state (Forney 1973)."""
    if rate in (0, INT8):
        return (targets.round().clamp(-127, 127) * bool(rate)).to(torch.int8).view(torch.uint8)
    if table is None:
        table = torch.from_numpy(tables()[rate]).float()
    costs, plain = ((targets[:, :, None, None] - table).square()).min(3)
    costs = costs * weights[:, :, None]  # sequences, steps, windows
    states = 1 << MEMORY[rate]
    zero = torch.arange(states)  # the window whose oldest bit is 0 and that ends in each state
    windows = torch.stack([zero, zero + states])
    count = len(targets)
    # Paths from every start state at once: (sequences, starts, states).
    total = torch.full((count, states, states), torch.inf)
    total[:, zero, zero] = 0
    choices = []
    for step in range(STEPS):
        options = total[:, :, windows >> 1] + costs[:, None, step, windows]
        total, oldest = options.min(2)
        choices.append(oldest)
    at, everyone = total.diagonal(dim1=1, dim2=2).argmin(1), torch.arange(count)
    start = at
    codes = torch.empty(count, STEPS, dtype=torch.uint8)
    for step in reversed(range(STEPS)):
        window = at + states * choices[step][everyone, start, at]
        codes[:, step] = (plain[everyone, step, window] << 1 | window & 1).to(torch.uint8)
        at = window >> 1
    return codes


def encode_column(
    target: Float[Tensor, " stored_rows"], size: Float[Tensor, " stored_rows"], rates: UInt8[Tensor, " groups"]
) -> tuple[UInt8[Tensor, " stored_rows"], Float[Tensor, " stored_rows"]]:
    """Return the best codes of a column and their values; ``size``: what each weight is expected to be as large as."""
    by_sequence = [part.view(-1, STEPS, LANES).transpose(1, 2).reshape(-1, STEPS) for part in (target, size)]
    targets, sizes = by_sequence
    codes, values = torch.zeros(targets.shape, dtype=torch.uint8), torch.zeros(targets.shape)
    rate_of_sequence = rates.repeat_interleave(LANES)
    for rate in set(rates.tolist()) - {0}:
        chosen = rate_of_sequence == rate
        codes[chosen] = best_codes(targets[chosen] * UNIT / sizes[chosen], sizes[chosen].square(), rate)
        values[chosen] = values_of_sequences(codes[chosen], rate) / UNIT * sizes[chosen]
    rows = [part.view(-1, LANES, STEPS).transpose(1, 2).reshape(-1) for part in (codes, values)]
    return rows[0], rows[1]


def feedback(columns: "Columns", targets: Tensor, factor: Tensor, rates: Tensor, offsets: Sequence[int]) -> Tensor:
    """Compute ``encoder.feedback``."""
    errors = torch.empty_like(targets)
    for column, target in enumerate(targets):
        coded = (rates[column] > 0).repeat_interleave(ROWS)
        square = (target / columns.size)[coded].double().square()
        middle = (16 * square.mean().sqrt().log2()).round() if square.any() else torch.tensor(float(LOWEST))
        least = torch.inf
        for offset in offsets:
            scale = torch.exp2((middle.double() + offset).clamp(LOWEST, HIGHEST) / 16).float()
            codes, values = encode_column(target, columns.size * scale, rates[column])
            cost = float((target - values).double().square().sum())
            if cost < least:
                least, columns.scales[column] = cost, scale
                columns.codes[column], columns.values[column] = codes, values
        errors[column] = (target - columns.values[column]) / factor[column, column]
        targets[column + 1 :] -= torch.outer(factor[column, column + 1 :], errors[column])
    return errors


def sweep(columns: "Columns", slopes: Tensor, curvature: Tensor, rates: Tensor) -> tuple[Tensor, Tensor, int]:
    """Compute ``encoder.sweep``."""
    moves, gains, changed = torch.zeros_like(slopes), torch.zeros(rates.shape[1], dtype=torch.float64), 0
    for column in range(len(slopes)):
        codes, reply = _reply(columns, slopes, curvature, column, rates[column])
        step = reply - columns.values[column]
        gain = (step * (slopes[column] - curvature[column, column] / 2 * step)).double()
        by_sequence = gain.view(-1, STEPS, LANES).sum(1)
        better = by_sequence > 0
        rows = better[:, None].expand(-1, STEPS, -1).flatten()
        gains += (by_sequence * better).sum(1)
        changed += int(better.sum())
        columns.codes[column] = torch.where(rows, codes, columns.codes[column])
        step = step * rows
        columns.values[column] = torch.where(rows, reply, columns.values[column])
        moves[column] += step
        slopes -= torch.outer(curvature[column], step)
    return moves, gains, changed


def deviate(
    columns: "Columns", slopes: Tensor, curvature: Tensor, masks: Tensor, adopted: bool
) -> tuple[Tensor, Tensor]:
    """Compute ``encoder.deviations`` or, if they are ``adopted``, ``encoder.adopt``."""
    changes, moves = torch.zeros(len(masks), INT8 + 1, dtype=torch.float64), torch.zeros_like(slopes)
    for rate in range(INT8 + 1):
        takes = (masks >> rate & 1).bool()
        if not takes.any():
            continue
        rows = takes.repeat_interleave(ROWS)
        left = slopes.clone()
        for column in range(len(slopes)):
            codes, reply = _reply(columns, left, curvature, column, torch.full(masks.shape, rate, dtype=torch.uint8))
            step = (reply - columns.values[column]) * rows
            change = step * (curvature[column, column] / 2 * step - left[column])
            changes[:, rate] += change.double().view(-1, ROWS).sum(1)
            left -= torch.outer(curvature[column], step)
            if adopted:
                columns.codes[column] = torch.where(rows, codes, columns.codes[column])
                columns.values[column] = torch.where(rows, reply, columns.values[column])
                moves[column] += step
    return moves, changes


def _reply(columns: "Columns", slopes: Tensor, curvature: Tensor, column: int, rates: Tensor) -> tuple[Tensor, Tensor]:
    """Return the best codes of a column while all others stay, and their values."""
    target = columns.values[column] + slopes[column] / curvature[column, column]
    return encode_column(target, columns.size * columns.scales[column], rates)
