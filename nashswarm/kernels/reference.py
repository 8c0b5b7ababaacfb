"""Reference implementations of all kernels in plain torch: slow, and what the others are tested against.

With int8 activations, a row of x is multiplied by the column scales and split into the groups of the tiles.  In each
group, with ``a = max |x| / 127``::

    q = round(x / a), half away from zero        y = row_scale · (Σ over groups  a Σ scale · (code − zero_point) · q)

Escapes are multiplied by the scaled x itself, which is not rounded.
"""

import torch
from jaxtyping import Float, Integer
from torch import Tensor

from nashswarm.kernels import tiles as layout
from nashswarm.kernels.tiles import Tiles

LEVELS = 127
SMALLEST_MAXIMUM = 1e-30  # of the activations of a group: keeps its inverse finite


def matmul(x: Float[Tensor, "batch columns"], tiles: Tiles, activations: str) -> Float[Tensor, "batch rows"]:
    """Compute x Wᵀ for x of float32."""
    if activations == "float32":
        return x @ layout.dequantize(tiles).T
    if tiles.column_scale.numel():
        x = x * tiles.column_scale.float()
    return apply_row_terms(round_activations(x, tiles.group_size) @ layout.grid_values(tiles).T, x, tiles)


def apply_row_terms(
    product: Float[Tensor, "batch rows"], x: Float[Tensor, "batch columns"], tiles: Tiles
) -> Float[Tensor, "batch rows"]:
    """Add the escapes to the product of the codes, and multiply by the row scales.

    ``x`` has been multiplied by the column scales.
    """
    rows, columns = layout.escape_positions(tiles)
    product.index_add_(1, rows, x[:, columns] * tiles.escape_codes.float())
    return product * tiles.row_scale.float() if tiles.row_scale.numel() else product


def round_activations(x: Float[Tensor, "batch columns"], group_size: int) -> Float[Tensor, "batch columns"]:
    """Round x as the int8 path does: to multiples of 1/127 of the largest magnitude of each group.

    A group with an infinity becomes nan.
    """
    groups = torch.nn.functional.pad(x, (0, -x.shape[1] % group_size)).unflatten(1, (-1, group_size))
    largest = groups.abs().amax(2, keepdim=True).clamp(min=SMALLEST_MAXIMUM)
    scaled = groups * torch.div(torch.tensor(float(LEVELS)), largest)
    steps = (scaled + scaled.sign() / 2).trunc()
    return (steps * (largest / LEVELS)).flatten(1)[:, : x.shape[1]]


def rows_of(tiles: Tiles, ids: Integer[Tensor, " count"]) -> Float[Tensor, "count columns"]:
    """Return the rows ``ids`` of the dequantized matrix, unpacking only their row blocks.

    Raises IndexError for a row that does not exist, if ``ids`` are on the CPU.
    """
    if ids.is_cpu and ((ids < 0) | (ids >= tiles.rows)).any():
        raise layout.missing_row(tiles.rows, int(ids[(ids < 0) | (ids >= tiles.rows)][0]))
    blocks, places = (ids.long() // layout.TILE_ROWS).unique(return_inverse=True)
    return layout.dequantize(layout.select_row_blocks(tiles, blocks))[
        places * layout.TILE_ROWS + ids % layout.TILE_ROWS
    ]


def group(numbers: Integer[Tensor, " count"], size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Compute ``kernels.group``."""
    ordered, order = numbers.sort(stable=True)
    places = torch.empty_like(order).index_copy(0, order, torch.arange(len(order), device=order.device))
    ends = torch.searchsorted(ordered, torch.arange(size, device=order.device), right=True, out_int32=True)
    return order, places, ends


def route(
    scores: Float[Tensor, "rows size"],
    entry: Float[Tensor, " size"],
    cost: Float[Tensor, " size"],
    price: Float[Tensor, " size"],
    flock: int,
    k: int,
) -> tuple[Integer[Tensor, "rows k"], Float[Tensor, "rows k"]]:
    """Compute ``kernels.route``."""
    candidates = (scores - entry).topk(flock, sorted=False).indices
    chosen = candidates.gather(1, (scores.gather(1, candidates) - cost[candidates]).topk(k).indices)
    logits = scores - price
    return chosen, logits.gather(1, chosen).softmax(1) if k > 1 else logits.softmax(1).gather(1, chosen)
