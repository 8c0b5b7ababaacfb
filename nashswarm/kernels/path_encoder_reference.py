"""The encoder of lattice paths in torch: slow, for machines without the C++ library, which is tested against it."""

import torch
from jaxtyping import Float, Int, Int32
from torch import Tensor

from nashswarm.kernels.path_form import STATES, STEPS, WINDOW_PARITIES, WINDOW_SETS, Columns, Rows

FAR = 1e30
LARGEST = 2.0**28  # magnitude of a code
LOWEST, HIGHEST, ESCAPE = -12, 5, 48  # of levels and symbols, as in quant/entropy.py


def feedback(
    targets: Float[Tensor, "columns out"],
    rows: Rows,
    columns: Columns,
    factor: Float[Tensor, "columns columns"],
    prices: Float[Tensor, "2 tables symbols"],
    bit_price: float,
) -> tuple[Int32[Tensor, "columns out"], Float[Tensor, "columns out"]]:
    """Compute ``path_encoder.feedback``."""
    codes, errors = torch.zeros(targets.shape, dtype=torch.int32), torch.zeros_like(targets)
    for column, target in enumerate(targets):
        steps = rows.steps * columns.steps[column]
        weights = rows.sensitivities / factor[column, column].square() * steps.square() / 2
        scaled = torch.where(steps > 0, target / steps, 0.0).clamp(-LARGEST, LARGEST)
        scales, sizes = (part.int() for part in (rows.scale, rows.size))
        levels = sizes + columns.size[column] - (scales + columns.scale[column] >> 1)
        numbers, costs = cheapest(scaled.abs(), weights, levels, prices, bit_price)
        best = best_paths(numbers, costs)
        codes[column] = torch.where(scaled < 0, -best, best)
        errors[column] = (target - codes[column] * steps) / factor[column, column]
        targets[column + 1 :] -= torch.outer(factor[column, column + 1 :], errors[column])
    return codes, errors


def cheapest(
    targets: Float[Tensor, " out"],
    weights: Float[Tensor, " out"],
    levels: Int[Tensor, " out"],
    prices: Float[Tensor, "2 tables symbols"],
    bit_price: float,
) -> tuple[Int[Tensor, "out 4"], Float[Tensor, "out 4"]]:
    """Return the cheapest number of each set and parity (2 · set + parity) for every weight, and what it costs.

    ``targets``: magnitudes in steps.  ``weights``: the damage of a squared error of one step.  Three numbers are tried:
    the nearest one of the parity, the next one toward zero, and the least.
    """
    shift = ((levels.long() - HIGHEST + 1) >> 1).clamp(min=0)
    table = (levels - 2 * shift).clamp(min=LOWEST) - LOWEST
    numbers, costs = torch.zeros(len(targets), 4, dtype=torch.int64), torch.full((len(targets), 4), FAR)
    for kind in range(4):
        chosen, odd = divmod(kind, 2)
        nearest = 2 * (((targets + chosen) * 0.5 - odd) * 0.5).round().long() + odd
        for tried in (nearest, nearest - 2, torch.full_like(nearest, odd)):
            number = tried.clamp(min=odd)
            some = number > 0
            error = targets - (2 * number - chosen * some)
            symbol = (number >> shift).clamp(max=ESCAPE)
            cost = prices[chosen, table, symbol] + bit_price * (some & (symbol == 0)) + weights * error * error
            better = cost < costs[:, kind]
            costs[:, kind] = torch.where(better, cost, costs[:, kind])
            numbers[:, kind] = torch.where(better, number, numbers[:, kind])
    return numbers, costs


def best_paths(numbers: Int[Tensor, "out 4"], costs: Float[Tensor, "out 4"]) -> Int32[Tensor, " out"]:
    """Return the magnitudes of the codes on the cheapest paths, by Viterbi's algorithm (Forney 1973)."""
    windows = torch.arange(2 * STATES).view(2, STATES)
    kinds = 2 * torch.from_numpy(WINDOW_SETS)[windows] + torch.from_numpy(WINDOW_PARITIES)[windows]
    codes = torch.zeros(len(numbers), dtype=torch.int32)
    for start in range(0, len(numbers), STEPS):
        total, choices = torch.full((STATES,), FAR), []
        total[0] = 0
        for cost in costs[start : start + STEPS]:
            total, oldest = (total[windows >> 1] + cost[kinds]).min(0)
            choices.append(oldest)
        at = int(total.argmin())
        for row in reversed(range(start, start + len(choices))):
            window = at + STATES * int(choices[row - start][at])
            kind = int(kinds.view(-1)[window])
            number = int(numbers[row, kind])
            codes[row], at = 2 * number - (kind >= 2 and number > 0), window >> 1
    return codes
