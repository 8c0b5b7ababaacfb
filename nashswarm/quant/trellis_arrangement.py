"""How a matrix is arranged before it is cut into trellis tiles: weighted, grouped, rotated, and sized.

Rows are multiplied by the square root of their sensitivity, so that an error costs the same in every row.  Rows of like
weight form groups of 64, columns of like weight tiles of 16: this is the flock, which decides who shares a rate and a
rotation.  A Hadamard rotation over the rows of a group makes their weights nearly normal, and leaves H, which couples
columns, as it is (QuaRot, Ashkboos et al. 2024, rotates columns instead).
"""

import dataclasses
import functools
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float, Float64, Integer, UInt8
from torch import Tensor

from nashswarm.kernels.trellis import (
    MIDDLE,
    ROW_STEPS,
    SIZE_STEPS,
    groups_of,
    hadamard,
    tiles_across,
)
from nashswarm.kernels.trellis_codes import COLUMNS, ROWS
from nashswarm.quant.curvature import Curvature, inverse_cholesky

Grouping = Literal["weight", "features", "stored", "random"]
SMALLEST = 1e-30
LARGEST_SCALE = 254  # code of a row, below the largest byte


@dataclasses.dataclass(frozen=True)
class Layout:
    """Where the rows and columns of a matrix are stored, and how they are scaled: all that the file says but its codes.

    ``encoding_order``: the columns from the largest curvature to the smallest, which is the order of encoding.
    ``places``: where each of them is stored.  ``row_order``, ``column_order``: the row or column at each place; None
    for the order of the matrix.  ``root``: the square root of the sensitivity of each stored row, as the file can hold
    it.  ``row_scale``, ``row_size``: codes of the file, and ``scale`` its common factor.  ``size``: of each stored row,
    once weighted and rotated.
    """

    rows: int
    columns: int
    rotated: bool
    encoding_order: Integer[Tensor, " columns"]
    places: Integer[Tensor, " columns"]
    row_order: Integer[Tensor, " rows"] | None
    column_order: Integer[Tensor, " columns"] | None
    root: Float[Tensor, " rows"]
    scale: float
    row_scale: UInt8[Tensor, " rows"]
    row_size: UInt8[Tensor, " stored_rows"]
    size: Float[Tensor, " stored_rows"]

    @property
    def shape(self) -> tuple[int, int]:
        """Return the number of groups of rows and of tiles across the columns."""
        return groups_of(self.rows), tiles_across(self.columns)

    @functools.cached_property
    def tiles(self) -> Integer[Tensor, " columns"]:
        """Return the number of the tile that each column belongs to, in the order of encoding."""
        return self.places // COLUMNS


@dataclasses.dataclass(frozen=True)
class Arrangement:
    """A matrix as its tiles are cut, columns in the order of encoding.

    ``weights``: weighted, grouped and rotated; transposed: a row of the tensor is a column of the matrix,
    ``stored_rows`` long.  ``inputs``: the damped H.
    """

    layout: Layout
    weights: Float[Tensor, "columns stored_rows"]
    inputs: Float[Tensor, "columns columns"]

    def energies(self, factor: Float[Tensor, "columns columns"]) -> Float64[Tensor, "groups tiles 2"]:
        """Return the damage of each tile at rate 0, if later columns compensate for it as the ``factor`` of H says.

        Beside it, the damage if none does, all other weights being exact.
        """
        pivots = 1 / factor.diagonal().double().square()
        energies = torch.zeros(*self.layout.shape, 2, dtype=torch.float64)
        for tile in range(self.layout.shape[1]):
            chosen = (self.layout.tiles == tile).nonzero()[:, 0]
            weights = self.weights[chosen]
            slopes = self.inputs[chosen[:, None], chosen] @ weights
            squares = weights.square().view(len(chosen), -1, ROWS).sum(2, dtype=torch.float64)
            energies[:, tile, 0] = (squares * pivots[chosen, None]).sum(0) / 2
            energies[:, tile, 1] = (weights * slopes).view(len(chosen), -1, ROWS).sum((0, 2), dtype=torch.float64) / 2
        return energies


def arrange(
    weight: Float[Tensor, "out in"],
    curvature: Curvature,
    grouping: Grouping = "weight",
    rotated: bool = True,
    seed: int = 0,
) -> tuple[Arrangement, Float[Tensor, "in in"]]:
    """Arrange a matrix; also return the factor of its H for error feedback, in the order of encoding.

    ``grouping``: who forms a group of rows or a tile of columns: those of like ``weight``, of like ``features``
    (weight, kurtosis, and direction), neighbours as ``stored``, or a ``random`` choice, which ``seed`` decides.
    """
    rows, columns = weight.shape
    sensitivity, inputs = _one_curvature(curvature.damped())
    del curvature  # whose lookups are as large as the weights
    encoding_order = inputs.diagonal().argsort(descending=True, stable=True)
    inputs = inputs[encoding_order[:, None], encoding_order].contiguous()
    factor = inverse_cholesky(inputs)
    pivots = 1 / factor.diagonal().square()
    row_codes, scale = _row_codes(sensitivity)
    root = 1 / (scale * _row_factors(row_codes))
    weighted = weight[:, encoding_order].float().mul_(root[:, None])
    generator = torch.Generator().manual_seed(seed)
    row_order = _order(weighted.square() @ pivots, weighted, grouping, generator)
    if row_order is not None:
        weighted, row_codes, root = weighted[row_order], row_codes[row_order], root[row_order]
    weighted = _rotate(weighted, rotated)
    size, row_size, octaves = _sizes(((weighted.square() @ pivots) / columns).sqrt())
    row_scale = row_codes.long() + octaves.repeat_interleave(ROWS)[:rows]
    # The common factor makes room for the largest; what is clamped then is 2^31 times smaller.
    shift = -((LARGEST_SCALE - int(row_scale.max())) // ROW_STEPS)
    scale, row_scale = scale * 2.0**shift, (row_scale - ROW_STEPS * shift).clamp(min=0)
    unit = weighted / size[:, None]
    members = unit.T.clone() if grouping == "features" else unit.T
    column_order = _order(pivots * unit.square_().mean(0), members, grouping, generator)
    del unit, members
    places = torch.empty(columns, dtype=torch.int64)
    if column_order is None:
        places[:] = encoding_order
    else:
        places[column_order] = torch.arange(columns)
        column_order = encoding_order[column_order]
    layout = Layout(
        rows, columns, rotated, encoding_order, places, row_order, column_order, root,
        scale, row_scale.to(torch.uint8), row_size, size,
    )  # fmt: skip
    return Arrangement(layout, weighted.T.contiguous(), inputs), factor


def arrange_again(weight: Float[Tensor, "out in"], curvature: Curvature, layout: Layout) -> Arrangement:
    """Arrange a matrix by the layout that it had before."""
    order = layout.encoding_order
    _, inputs = _one_curvature(curvature.damped())
    del curvature
    weighted = weight[:, order] if layout.row_order is None else weight[layout.row_order[:, None], order]
    weighted = _rotate(weighted.mul_(layout.root[:, None]), layout.rotated)
    return Arrangement(layout, weighted.T.contiguous(), inputs[order[:, None], order].contiguous())


def _rotate(weighted: Float[Tensor, "rows columns"], rotated: bool) -> Float[Tensor, "stored_rows columns"]:
    """Fill the last group up with rows of zeros, and rotate every group."""
    rows, columns = weighted.shape
    stored = groups_of(rows) * ROWS
    if stored > rows:
        weighted = torch.nn.functional.pad(weighted, (0, 0, 0, stored - rows))
    return (hadamard() @ weighted.view(-1, ROWS, columns)).view(stored, columns) if rotated else weighted


def _one_curvature(curvature: Curvature) -> tuple[Float[Tensor, " out"], Float[Tensor, "in in"]]:
    """Return row sensitivities and one H for all rows; for a matrix that is only looked up, H is diagonal."""
    if curvature.inputs is not None:
        return curvature.mean_row_curvature()
    diagonal = curvature.diagonal()
    columns = diagonal.mean(0).clamp(min=SMALLEST)
    return diagonal.mean(1) / columns.mean(), torch.diag(columns)


def _order(
    weights: Float[Tensor, " n"], members: Float[Tensor, "n others"], grouping: Grouping, generator: torch.Generator
) -> Integer[Tensor, " n"] | None:
    """Return the order in which rows or columns are stored; None for the order that they have."""
    if grouping == "stored" or len(weights) <= COLUMNS:
        return None
    if grouping == "random":
        return torch.randperm(len(weights), generator=generator)
    if grouping == "weight":
        return weights.argsort(descending=True, stable=True)
    with torch.random.fork_rng(devices=[]):  # a matrix is arranged more than once, and must be arranged alike
        torch.manual_seed(generator.initial_seed())
        return _feature_order(weights, members)


def _feature_order(weights: Float[Tensor, " n"], members: Float[Tensor, "n others"]) -> Integer[Tensor, " n"]:
    """Return an order in which neighbours are alike in weight, kurtosis and direction.

    The standardised features are the logarithms of the weight, which counts twice, and of the kurtosis, and the
    projections on two principal components.  The order is that along the first principal axis of the features.
    """
    unit = members / members.square().mean(1).clamp(min=SMALLEST).sqrt()[:, None]
    kurtosis = unit.square().square().mean(1).clamp(min=1)  # no vector has less, but for zeros
    with torch.random.fork_rng(devices=[]):  # the same order at every call
        torch.manual_seed(0)
        directions = torch.pca_lowrank(unit, q=min(2, *unit.shape), niter=4)[0]
    features = torch.column_stack(
        [2 * _standard(weights.clamp(min=SMALLEST).log()), _standard(kurtosis.log()), directions]
    )
    features[:, 2:] = torch.column_stack([_standard(part) for part in features[:, 2:].T])
    _, _, axes = torch.linalg.svd(features - features.mean(0), full_matrices=False)
    return (features @ axes[0] * axes[0, 0].sign()).argsort(descending=True, stable=True)


def _standard(feature: Float[Tensor, " n"]) -> Float[Tensor, " n"]:
    return (feature - feature.mean()) / feature.std().clamp(min=SMALLEST)


def _row_codes(sensitivity: Float[Tensor, " out"]) -> tuple[UInt8[Tensor, " out"], float]:
    """Return codes of 1 / √sensitivity, and the power of two that their scales are multiplied by."""
    octaves = -sensitivity.double().clamp(min=SMALLEST).log2() / 2
    scale = float(2.0 ** np.round(float(octaves.median())))
    codes = (ROW_STEPS * (octaves - np.log2(scale))).round() + MIDDLE
    return codes.clamp(0, 255).to(torch.uint8), scale


def _row_factors(codes: UInt8[Tensor, " n"]) -> Float[Tensor, " n"]:
    return torch.exp2((codes.double() - MIDDLE) / ROW_STEPS).float()


def _sizes(
    size: Float[Tensor, " stored_rows"],
) -> tuple[Float[Tensor, " stored_rows"], UInt8[Tensor, " stored_rows"], Integer[Tensor, " groups"]]:
    """Round the sizes of rows: the largest of a group to a step of ``row_scale``, the others to steps below it.

    Returns the rounded sizes, their codes, and by how many steps the scale of the group rises.
    """
    by_group = size.double().clamp(min=SMALLEST).log2().view(-1, ROWS)
    largest = (ROW_STEPS * by_group.max(1).values).round().clamp(-MIDDLE, MIDDLE - 1)
    codes = (SIZE_STEPS * (largest[:, None] / ROW_STEPS - by_group)).round().clamp(0, 15)
    rounded = torch.exp2(largest[:, None] / ROW_STEPS - codes / SIZE_STEPS)
    return rounded.flatten().float(), codes.flatten().to(torch.uint8), largest.long()
