"""What every kernel computes, in plain torch: slow, and what the others are tested against.

Activations of type int8: a row of x, times the scales of the columns, is cut into the groups of the tiles; in each,
with a = max |x| / 127,

    q = round(x / a),  half away from zero        y = row_scale · (Σ over groups  a Σ scale · (code − zero_point) · q)

Escapes are multiplied with the scaled x itself.
"""

import torch
from jaxtyping import Float, Integer
from torch import Tensor

from nashswarm.kernels import tiles as layout
from nashswarm.kernels.tiles import Tiles

LEVELS = 127
LEAST = 1e-30  # of the largest activation of a group: keeps its inverse finite


def matmul(x: Float[Tensor, "batch columns"], tiles: Tiles, activations: str) -> Float[Tensor, "batch rows"]:
    """x Wᵀ for x of float32."""
    if activations == "float32":
        return x @ layout.dequantize(tiles).T
    if tiles.column_scale.numel():
        x = x * tiles.column_scale.float()
    return apply_row_terms(round_activations(x, tiles.group_size) @ layout.grid_values(tiles).T, x, tiles)


def apply_row_terms(
    answer: Float[Tensor, "batch rows"], x: Float[Tensor, "batch columns"], tiles: Tiles
) -> Float[Tensor, "batch rows"]:
    """What the codes gave, and the escapes, times the scales of the rows; x times those of the columns is given."""
    rows, columns = layout.escape_positions(tiles)
    answer.index_add_(1, rows, x[:, columns] * tiles.escape_codes.float())
    return answer * tiles.row_scale.float() if tiles.row_scale.numel() else answer


def round_activations(x: Float[Tensor, "batch columns"], group_size: int) -> Float[Tensor, "batch columns"]:
    """x as the int8 path sees it: in every group multiples of 1/127 of the largest; a group with an infinity is nan."""
    groups = torch.nn.functional.pad(x, (0, -x.shape[1] % group_size)).unflatten(1, (-1, group_size))
    largest = groups.abs().amax(2, keepdim=True).clamp(min=LEAST)
    scaled = groups * torch.div(torch.tensor(float(LEVELS)), largest)
    steps = (scaled + scaled.sign() / 2).trunc()
    return (steps * (largest / LEVELS)).flatten(1)[:, : x.shape[1]]


def rows_of(tiles: Tiles, ids: Integer[Tensor, " count"]) -> Float[Tensor, "count columns"]:
    """The rows of the dequantized matrix that ``ids`` name; only their row blocks are unpacked."""
    if ids.is_cpu and ((ids < 0) | (ids >= tiles.rows)).any():
        raise layout.missing_row(tiles, int(ids[(ids < 0) | (ids >= tiles.rows)][0]))
    blocks, places = (ids.long() // layout.TILE_ROWS).unique(return_inverse=True)
    return layout.dequantize(layout.select_row_blocks(tiles, blocks))[
        places * layout.TILE_ROWS + ids % layout.TILE_ROWS
    ]


def group(numbers: Integer[Tensor, " count"], size: int) -> tuple[Tensor, Tensor, Tensor]:
    """The order that sorts numbers below ``size``, the place of each in it, and where those of each number end."""
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
    """Of each row the k places of largest score − cost among the ``flock`` of largest score − entry, largest first, and
    their softmax of score − price; of a single one its share of all places."""
    near = (scores - entry).topk(flock, sorted=False).indices
    chosen = near.gather(1, (scores.gather(1, near) - cost[near]).topk(k).indices)
    paid = scores - price
    return chosen, paid.gather(1, chosen).softmax(1) if k > 1 else paid.softmax(1).gather(1, chosen)
