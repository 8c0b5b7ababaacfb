"""Who got which bits: weight matrices, their blocks (the players), and what an allocation costs in bytes.

A block is a tile of 16 rows × ``group_size`` columns.  A layer's damage is the second-order estimate, in nats per
token: ``½ Σ_o f_o · e_oᵀ H e_o`` (f coupled over positions, H half so) for its products and ``½ Σ_v p_v Σ_o f_o e_vo²``
for its lookups; a tied matrix carries both.  A block's share of it is in proportion to what the diagonals alone say.
"""

import dataclasses
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
TINY = 1e-30  # what the logarithm of a vanishing moment is taken of


@dataclasses.dataclass(frozen=True)
class Blocks:
    """All players of a model, layer by layer, row-major inside a layer.

    ``damage``: nats per token at each width of ``widths``; ``log_sensitivity``: log of the block's mean s;
    ``features``: what the flock compares.
    """

    layers: tuple[Layer, ...]
    scheme: Scheme
    widths: tuple[int, ...]
    damage: Float[np.ndarray, "blocks widths"]
    log_sensitivity: Float[np.ndarray, " blocks"]
    features: Float[np.ndarray, "blocks features"]

    def bits(self, profile: Integer[np.ndarray, " blocks"]) -> dict[str, Integer[np.ndarray, "row_blocks groups"]]:
        """Layer → the width of each of its tiles."""
        parts = self._split(np.array(self.widths, np.uint8)[profile])
        return {
            layer.name: part.reshape(grid_shape(layer, self.scheme))
            for layer, part in zip(self.layers, parts, strict=True)
        }

    def packed_bytes(self, profile: Integer[np.ndarray, " blocks"]) -> int:
        """Bytes of all packed layers at ``profile``."""
        return sum(packed_bytes(bits.ravel(), self.scheme) for bits in self.bits(profile).values())

    def damage_by_layer(self, profile: Integer[np.ndarray, " blocks"]) -> dict[str, float]:
        """Layer → its predicted damage at ``profile``, in nats per token."""
        chosen = self.damage[np.arange(len(profile)), profile]
        return {layer.name: float(part.sum()) for layer, part in zip(self.layers, self._split(chosen), strict=True)}

    def storage_chain(self) -> sparse.csr_array:
        """Consecutive tiles of one layer are neighbours: a run of equal tags ends where two of them differ."""
        linked = np.ones(len(self.damage) - 1)
        linked[self._ends() - 1] = 0
        chain = sparse.diags_array([linked, linked], offsets=[-1, 1], shape=(len(self.damage),) * 2).tocsr()
        chain.eliminate_zeros()
        return chain

    def _ends(self) -> Integer[np.ndarray, " layers_but_one"]:
        """The index of the first block after every layer but the last."""
        counts = [int(np.prod(grid_shape(layer, self.scheme))) for layer in self.layers]
        return np.cumsum(counts)[:-1]

    def _split(self, values: Shaped[np.ndarray, " blocks"]) -> list[Shaped[np.ndarray, " part"]]:
        return np.split(values, self._ends())


def grid_shape(layer: Layer, scheme: Scheme) -> tuple[int, int]:
    """(row blocks, column groups) of a layer."""
    return row_blocks(layer.weight.shape[0]), layer.weight.shape[1] // scheme.group_size


def check_divisible(layers: Sequence[Layer], group_size: int) -> None:
    """Raises ValueError that names every layer whose columns ``group_size`` does not divide."""
    odd = [f"{layer.name} ({layer.weight.shape[1]})" for layer in layers if layer.weight.shape[1] % group_size]
    if odd:
        raise ValueError(
            f"the columns of {len(odd)} layers are not divisible by group_size {group_size}: {', '.join(odd)}; "
            "choose another method.group_size or name them in model.exclude"
        )


def damage(
    layer: Layer, quantized: Float[Tensor, "out in"], curved: Curvature, scheme: Scheme
) -> Float[Tensor, " blocks"]:
    """Each block's second-order damage, in nats per token, when its layer becomes ``quantized``."""
    error = layer.weight - quantized
    by_diagonal = tile_sums(curved.diagonal() * error.square(), scheme.group_size).flatten() / 2
    whole = curved.damage_by_row(error).double().sum()
    on_diagonal = by_diagonal.sum()
    return by_diagonal * (whole / on_diagonal) if on_diagonal > 0 else by_diagonal


def log_sensitivity(
    layers: Sequence[Layer], moments: Mapping[str, Moments], group_size: int
) -> Float[np.ndarray, " blocks"]:
    """The log of the mean s of every block of 16 rows × ``group_size`` columns."""
    means = [block_means(curvature(layer, moments).diagonal(), group_size) for layer in layers]
    return torch.cat([mean.clamp(min=TINY).log().flatten() for mean in means]).numpy()


def features(
    layers: Sequence[Layer], moments: Mapping[str, Moments], group_size: int | None
) -> Float[np.ndarray, "blocks features"]:
    """What the flock compares, of every block of 16 rows × ``group_size`` columns; None: of 16 whole rows."""
    roles = sorted({layer.role for layer in layers})
    found = []
    for layer in layers:
        own = block_features(layer, moments, group_size or layer.weight.shape[1])
        shared = np.append(np.eye(len(roles))[roles.index(layer.role)], layer.depth)
        found.append(np.hstack([np.tile(shared, (len(own), 1)), own]))
    return np.concatenate(found)


def block_means(values: Float[Tensor, "out in"], group_size: int) -> Float[Tensor, "row_blocks groups"]:
    """The mean of ``values`` over each tile, ragged tiles included."""
    return tile_sums(values, group_size) / tile_sums(torch.ones_like(values), group_size)


def block_features(layer: Layer, moments: Mapping[str, Moments], size: int) -> Float[np.ndarray, "blocks 4"]:
    """Log weight variance, kurtosis, log trace of the inputs' H and log mean f of the rows, of every block of 16 rows ×
    ``size`` columns."""
    first = moments[next((name for name in layer.modules if not moments[name].lookup), layer.modules[0])]
    by_row, by_column = (first.inputs, first.outputs) if first.lookup else (first.outputs, first.inputs.diagonal())
    found = []
    for rows in row_chunks(layer.weight):
        weight = layer.weight[rows]
        mean = block_means(weight, size)
        deviation = weight.double() - mean.repeat_interleave(TILE_ROWS, 0)[: len(weight)].repeat_interleave(size, 1)
        variance = block_means(deviation.square(), size).clamp(min=TINY)
        kurtosis = block_means(deviation**4, size) / variance.square()
        trace = by_column.double().view(-1, size).sum(1).expand_as(mean)
        fisher = block_means(by_row[rows].unsqueeze(1).expand(-1, size), size).expand_as(mean)
        parts = (variance.log(), kurtosis, trace.clamp(min=TINY).log(), fisher.clamp(min=TINY).log())
        found.append(torch.stack([part.flatten() for part in parts], 1))
    return torch.cat(found).numpy()


def quantize_layers(
    layers: Sequence[Layer], bits: Bits, scheme: Scheme, moments: Mapping[str, Moments] | None = None
) -> dict[str, QuantizedTensor]:
    """Every layer at the widths of its tiles: with ``moments`` by its best reply, without by plain rounding."""
    tensors = {}
    for layer in layers:
        tiles = torch.from_numpy(bits[layer.name])
        if moments is None:
            tensors[layer.name] = quantize(layer.weight, tiles, scheme)
        else:
            tensors[layer.name] = quantize_layer(layer.weight, tiles, scheme, curvature(layer, moments))
    return tensors


def text(bits: Bits) -> str:
    """One line per layer: its name, its grid of tiles, and the run-length coded widths.

    >>> text({"h.0": np.array([[3, 3], [2, 3]])})
    'h.0 2x2 3*2 2*1 3*1\\n'
    """
    lines = []
    for name, tiles in bits.items():
        runs = " ".join(
            f"{width}*{length}" for width, length in zip(*run_lengths(tiles.ravel().astype(int)), strict=True)
        )
        lines.append(f"{name} {tiles.shape[0]}x{tiles.shape[1]} {runs}\n")
    return "".join(lines)


PLAYED_WIDTHS = (0, *GRID_WIDTHS)
