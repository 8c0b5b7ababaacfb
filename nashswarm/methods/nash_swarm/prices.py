"""The price of a byte: every tile takes the rate of least damage plus bytes times price.

An allocation that is best for every tile at one price has the least damage of all that take as many bytes (Everett
1963; Shoham & Gersho 1988).  ``damage`` is always given as one array per layer, of shape (groups, tiles, 9): the damage
of a tile at each rate, in nats per token, up to a constant per tile; infinite at rates that nobody tried.
"""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Integer

from nashswarm.kernels.trellis_codes import COLUMNS, ROWS

BYTES_PER_BIT = ROWS * COLUMNS // 8  # of one more bit for every weight of a tile
HALVINGS = 80  # of the interval of the price, on a logarithmic scale

Damage = Float[np.ndarray, "_groups _tiles 9"]
Rates = Integer[np.ndarray, "_groups _tiles"]


def best_rates(damage: Damage, price: float, allowed: Sequence[int]) -> Rates:
    """Return the rate of least damage plus bytes times ``price`` for every tile, the lowest among equal ones."""
    cost = damage[..., list(allowed)] + price * BYTES_PER_BIT * np.array(allowed)
    return np.array(allowed)[cost.argmin(-1)]


def tile_bytes(rates: Sequence[Rates]) -> int:
    """Return the bytes of all tiles."""
    return sum(int(part.sum()) for part in rates) * BYTES_PER_BIT


def price_for(damage: Sequence[Damage], budget: int, allowed: Sequence[int]) -> float:
    """Return the lowest price, in nats per byte, at which all tiles take at most ``budget`` bytes."""
    low, high = -120.0, 60.0  # logarithms to base 2
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        if tile_bytes([best_rates(part, 2.0**middle, allowed) for part in damage]) > budget:
            low = middle
        else:
            high = middle
    return 2.0**high


def close(damage: Sequence[Damage], rates: Sequence[Rates], budget: int, allowed: Sequence[int]) -> list[Rates]:
    """Return rates that take at most ``budget`` bytes and leave no byte that another bit in a tile could use well.

    Tiles lower their rate at the least damage per byte until the budget is met; then tiles raise theirs at the best
    gain per byte as long as it fits.
    """
    shapes, choices = [part.shape for part in rates], np.array(allowed)
    flat = np.concatenate([part.reshape(-1, part.shape[-1]) for part in damage])
    own = np.concatenate([part.ravel() for part in rates])
    for down in (True, False):
        left = budget - BYTES_PER_BIT * int(own.sum())
        if down and left >= 0:
            continue
        change = flat[:, choices] - np.take_along_axis(flat, own[:, None], 1)
        steps = choices - own[:, None]
        usable = steps < 0 if down else (steps > 0) & (change < 0)
        slope = np.where(usable, change / np.where(steps == 0, 1, np.abs(steps)), np.inf)
        best = slope.argmin(1)
        chosen = np.take_along_axis(slope, best[:, None], 1)[:, 0]
        for tile in np.argsort(chosen, kind="stable"):
            if not np.isfinite(chosen[tile]) or (down and left >= 0) or (not down and left < BYTES_PER_BIT):
                break
            step = int(steps[tile, best[tile]])
            if down or step * BYTES_PER_BIT <= left:
                own[tile] += step
                left -= step * BYTES_PER_BIT
    return _split(own, shapes)


def spread(shapes: Sequence[tuple[int, int]], budget: int, allowed: Sequence[int]) -> list[Rates]:
    """Return one rate everywhere, or two neighbouring ones dealt evenly over the tiles, which use up the budget."""
    count = sum(groups * tiles for groups, tiles in shapes)
    units = min(budget // BYTES_PER_BIT, count * max(allowed))
    low = max(rate for rate in allowed if rate * count <= units)
    high = min((rate for rate in allowed if rate > low), default=low)
    raised = (units - low * count) // (high - low) if high > low else 0
    dealt = np.floor(np.arange(1, count + 1) * raised / count).astype(int)
    rates = low + (high - low) * np.diff(dealt, prepend=0)
    return _split(rates, shapes)


def _split(rates: Integer[np.ndarray, " tiles"], shapes: Sequence[tuple[int, ...]]) -> list[Rates]:
    """Return the rates of all tiles as one array for each layer."""
    ends = np.cumsum([int(np.prod(shape)) for shape in shapes])
    return [part.reshape(shape) for part, shape in zip(np.split(rates, ends[:-1]), shapes, strict=True)]
