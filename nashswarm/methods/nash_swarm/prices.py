"""The price of a byte: every tile takes the rate of least damage plus bytes times price.

An allocation that is best for every tile at one price has the least damage of all that take as many bytes (Everett
1963; Shoham & Gersho 1988).  ``damage`` is always given as one array per layer, of shape (groups, tiles, 9): the damage
of a tile at each rate, in nats per token, up to a constant per tile; infinite at rates that nobody tried.
"""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Integer

from nashswarm.kernels.trellis_codes import COLUMNS, ROWS, distortions

BYTES_PER_BIT = ROWS * COLUMNS // 8  # of one more bit for every weight of a tile
HALVINGS = 80  # of the interval of the price, on a logarithmic scale

Damage = Float[np.ndarray, "_groups _tiles 9"]
Rates = Integer[np.ndarray, "_groups _tiles"]


def expected_damage(energies: Float[np.ndarray, "_groups _tiles 2"]) -> Damage:
    """Return the damage to expect of each tile at each rate, as if its weights were normal.

    ``energies``: of ``Arrangement``.  Other columns make up for most of an error.  That of an erased tile counts in
    full, since its neighbours may be erased as well: where inputs are much alike, that costs a thousand times more.
    """
    damage = energies[..., :1] * np.array(distortions())
    damage[..., 0] = energies[..., 1]
    return damage


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
    """Return rates that take at most ``budget`` bytes, and at which no tile gains by more bits that still fit.

    Tiles lower their rate at the least damage per byte until the budget is met; then tiles raise theirs at the best
    gain per byte as long as it fits.
    """
    shapes, choices = [part.shape for part in rates], np.array(allowed)
    flat = np.concatenate([part.reshape(-1, part.shape[-1]) for part in damage])[:, choices]
    own = np.concatenate([np.searchsorted(choices, part.ravel()) for part in rates])
    for down in (True, False):
        while _closer(flat, own, choices, budget, down):
            pass
    return _split(choices[own], shapes)


def _closer(
    damage: Float[np.ndarray, "all_tiles choices"],
    own: Integer[np.ndarray, " all_tiles"],
    choices: Integer[np.ndarray, " choices"],
    budget: int,
    down: bool,
) -> bool:
    """Let every tile change its choice at most once toward the budget, the best first; return whether one did."""
    left = budget - BYTES_PER_BIT * int(choices[own].sum())
    if down == (left >= 0):
        return False
    change = damage - np.take_along_axis(damage, own[:, None], 1)
    added = BYTES_PER_BIT * (choices - choices[own][:, None])
    usable = added < 0 if down else (added > 0) & (added <= left) & (change < 0)
    slope = np.where(usable, change / np.where(added == 0, 1, np.abs(added)), np.inf)
    best = slope.argmin(1)
    chosen = np.take_along_axis(slope, best[:, None], 1)[:, 0]
    moved = False
    for tile in np.argsort(chosen, kind="stable"):
        if not np.isfinite(chosen[tile]) or (down and left >= 0) or (not down and left < BYTES_PER_BIT):
            break
        step = int(added[tile, best[tile]])
        if down or step <= left:
            own[tile], left, moved = best[tile], left - step, True
    return moved


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
