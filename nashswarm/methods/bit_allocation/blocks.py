"""Blocks, the players of the bit game: their damages, features, widths and packed bytes.

A block is a tile of 16 rows × ``group_size`` columns of a weight matrix.  The damage of a layer is a second-order
estimate in nats per token: ``½ Σ_o f_o · e_oᵀ H e_o`` for its products (f coupled over positions, H half coupled) plus
``½ Σ_v p_v Σ_o f_o e_vo²`` for its lookups; a tied matrix has both terms.  It is shared out among the layer's blocks in
proportion to the estimate from the diagonals alone.
"""

import dataclasses
import functools
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from jaxtyping import Float, Integer, Shaped
from scipy import sparse
from torch import Tensor

from nashswarm.layers import Layer, Moments, curvature
from nashswarm.quant.coordinate_descent import quantize_layer
from nashswarm.quant.curvature import Curvature
from nashswarm.quant.error_feedback import row_chunks
from nashswarm.quant.grid import (
    GRID_WIDTHS,
    TILE_ROWS,
    QuantizedTensor,
    Scheme,
    quantize,
    row_blocks,
    tile_sums,
)
from nashswarm.quant.pack import packed_bytes, run_lengths

Bits = Mapping[str, Integer[np.ndarray, "row_blocks groups"]]
PLAYED_WIDTHS = (0, *GRID_WIDTHS)
TINY = 1e-30  # lower bound of moments, so that their logarithm exists


@dataclasses.dataclass(frozen=True)
class Blocks:
    """All blocks of a model, layer by layer, row-major inside a layer.

    ``widths``: bits per weight that a block can choose.  ``damage``: nats per token of each block at each of these
    widths.  ``log_sensitivity``: log of the mean second derivative of the loss in a block's weights.  ``features``: the
    vectors whose distance decides which blocks are neighbours in the flock.

    A profile holds one index into ``widths`` per block.
    """

    layers: tuple[Layer, ...]
    scheme: Scheme
    widths: tuple[int, ...]
    damage: Float[np.ndarray, "blocks widths"]
    log_sensitivity: Float[np.ndarray, " blocks"]
    features: Float[np.ndarray, "blocks features"]

    def bits(self, profile: Integer[np.ndarray, " blocks"]) -> dict[str, Integer[np.ndarray, "row_blocks groups"]]:
        """Return layer → the width in bits of each of its tiles at ``profile``."""
        parts = self._split(np.array(self.widths, np.uint8)[profile])
        return {
            layer.name: part.reshape(grid_shape(layer, self.scheme))
            for layer, part in zip(self.layers, parts, strict=True)
        }

    def packed_bytes(self, profile: Integer[np.ndarray, " blocks"]) -> int:
        """Return the bytes of all packed layers at ``profile``."""
        widths = np.array(self.widths, np.uint8)[profile]
        return sum(packed_bytes(part, self.scheme) for part in self._split(widths))

    def damage_by_layer(self, profile: Integer[np.ndarray, " blocks"]) -> dict[str, float]:
        """Return layer → predicted damage at ``profile``, in nats per token."""
        chosen = self.damage[np.arange(len(profile)), profile]
        return {layer.name: float(part.sum()) for layer, part in zip(self.layers, self._split(chosen), strict=True)}

    def storage_chain(self) -> sparse.csr_array:
        """Return the graph that links consecutive tiles of each layer.

        Tiles store their widths as run-length tags, and a run ends where two linked tiles differ.
        """
        linked = np.ones(len(self.damage) - 1)
        linked[self._ends - 1] = 0
        chain = sparse.diags_array([linked, linked], offsets=[-1, 1], shape=(len(self.damage),) * 2).tocsr()
        chain.eliminate_zeros()
        return chain

    @functools.cached_property
    def _ends(self) -> Integer[np.ndarray, " layers_but_one"]:
        """Return the index of the first block after every layer but the last."""
        counts = [int(np.prod(grid_shape(layer, self.scheme))) for layer in self.layers]
        return np.cumsum(counts)[:-1]

    def _split(self, values: Shaped[np.ndarray, " blocks"]) -> list[Shaped[np.ndarray, " part"]]:
        return np.split(values, self._ends)


def grid_shape(layer: Layer, scheme: Scheme) -> tuple[int, int]:
    """Return the numbers of row blocks and of column groups of a layer."""
    return row_blocks(layer.weight.shape[0]), layer.weight.shape[1] // scheme.group_size


def check_divisible(layers: Sequence[Layer], group_size: int) -> None:
    """Check that ``group_size`` divides the columns of every layer.  Raises ValueError that names those it does not."""
    columns = {layer.name: layer.weight.shape[1] for layer in layers}
    indivisible = [f"{name} ({count})" for name, count in columns.items() if count % group_size]
    if indivisible:
        raise ValueError(
            f"the columns of {len(indivisible)} layers are not divisible by group_size {group_size}: "
            f"{', '.join(indivisible)}; leave them out by model.exclude"
        )


def damage(
    layer: Layer, quantized: Float[Tensor, "out in"], layer_curvature: Curvature, scheme: Scheme
) -> Float[Tensor, " blocks"]:
    """Return the second-order damage of each block, in nats per token, when its layer becomes ``quantized``."""
    error = layer.weight - quantized
    diagonal_damage = tile_sums(layer_curvature.diagonal() * error.square(), scheme.group_size).flatten() / 2
    layer_damage = layer_curvature.damage_by_row(error).double().sum()
    diagonal_total = diagonal_damage.sum()
    return diagonal_damage * (layer_damage / diagonal_total) if diagonal_total > 0 else diagonal_damage


def log_sensitivity(
    layers: Sequence[Layer], moments: Mapping[str, Moments], group_size: int
) -> Float[np.ndarray, " blocks"]:
    """Return the log of the mean second derivative of the loss in every block of 16 rows × ``group_size`` columns."""
    means = [block_means(curvature(layer, moments).diagonal(), group_size) for layer in layers]
    return torch.cat([mean.clamp(min=TINY).log().flatten() for mean in means]).numpy()


def features(
    layers: Sequence[Layer], moments: Mapping[str, Moments], group_size: int | None
) -> Float[np.ndarray, "blocks features"]:
    """Return the feature vector of every block of 16 rows × ``group_size`` columns (None: of 16 whole rows).

    The role of the block's layer, one-hot, and its depth come first, then ``block_features``.
    """
    roles = sorted({layer.role for layer in layers})
    features_by_layer = []
    for layer in layers:
        statistics = block_features(layer, moments, group_size or layer.weight.shape[1])
        role_and_depth = np.append(np.eye(len(roles))[roles.index(layer.role)], layer.depth)
        features_by_layer.append(np.hstack([np.tile(role_and_depth, (len(statistics), 1)), statistics]))
    return np.concatenate(features_by_layer)


def block_means(values: Float[Tensor, "out in"], group_size: int) -> Float[Tensor, "row_blocks groups"]:
    """Return the mean of ``values`` over each tile; a ragged tile averages over the rows that it has."""
    return tile_sums(values, group_size) / tile_sums(torch.ones_like(values), group_size)


def block_features(layer: Layer, moments: Mapping[str, Moments], size: int) -> Float[np.ndarray, "blocks 4"]:
    """Return four features of every block of 16 rows × ``size`` columns.

    They are the log variance of the weights, their kurtosis, the log trace of the inputs' H, and the log mean of the
    rows' f.  A tied matrix uses the moments of the module that multiplies.
    """
    first = moments[next((name for name in layer.modules if not moments[name].lookup), layer.modules[0])]
    by_row, by_column = (first.inputs, first.outputs) if first.lookup else (first.outputs, first.inputs.diagonal())
    features_by_chunk = []
    for rows in row_chunks(layer.weight):
        weight = layer.weight[rows]
        mean = block_means(weight, size)
        deviation = weight.double() - mean.repeat_interleave(TILE_ROWS, 0)[: len(weight)].repeat_interleave(size, 1)
        variance = block_means(deviation.square(), size).clamp(min=TINY)
        kurtosis = block_means(deviation**4, size) / variance.square()
        trace = by_column.double().view(-1, size).sum(1).expand_as(mean)
        fisher = block_means(by_row[rows].unsqueeze(1).expand(-1, size), size).expand_as(mean)
        parts = (variance.log(), kurtosis, trace.clamp(min=TINY).log(), fisher.clamp(min=TINY).log())
        features_by_chunk.append(torch.stack([part.flatten() for part in parts], 1))
    return torch.cat(features_by_chunk).numpy()


def quantize_layers(
    layers: Sequence[Layer], bits: Bits, scheme: Scheme, moments: Mapping[str, Moments] | None = None
) -> dict[str, QuantizedTensor]:
    """Quantize every layer at the widths of its tiles.

    With ``moments`` by error feedback, which lowers the damage; without them by rounding to nearest.
    """
    tensors = {}
    for layer in layers:
        tiles = torch.from_numpy(bits[layer.name])
        if moments is None:
            tensors[layer.name] = quantize(layer.weight, tiles, scheme)
        else:
            tensors[layer.name] = quantize_layer(layer.weight, tiles, scheme, curvature(layer, moments))
    return tensors


def describe_widths(bits: Bits) -> str:
    """Return one line per layer: its name, its grid of tiles, and the run-length coded widths.

    >>> describe_widths({"h.0": np.array([[3, 3], [2, 3]])})
    'h.0 2x2 3*2 2*1 3*1\\n'
    """
    lines = []
    for name, tiles in bits.items():
        runs = " ".join(
            f"{width}*{length}" for width, length in zip(*run_lengths(tiles.ravel().astype(int)), strict=True)
        )
        lines.append(f"{name} {tiles.shape[0]}x{tiles.shape[1]} {runs}\n")
    return "".join(lines)
