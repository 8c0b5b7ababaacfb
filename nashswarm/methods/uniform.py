"""Rounding to nearest at one width for all weights, or plain floats."""

import dataclasses

import numpy as np

from nashswarm.calibration.context import CalibrationContext
from nashswarm.errors import Unsupported
from nashswarm.methods.bit_allocation.blocks import PLAYED_WIDTHS, check_divisible, grid_shape, quantize_layers
from nashswarm.methods.bit_allocation.damages import block_damages, regret_metrics
from nashswarm.methods.method import Compressed, store_groups
from nashswarm.quant.grid import FLOATS, GRID_WIDTHS, Scheme


@dataclasses.dataclass(frozen=True)
class Uniform:
    """``bits`` for every weight: rounding to nearest at 2, 3, 4 or 8 bits, plain floats at 16 and 32 (the baseline).

    ``group_size``: columns that share a scale.  ``search``: the range of least error for every group instead of
    minimum and maximum.  ``coded``: entropy-coded storage.
    """

    bits: int = 4
    group_size: int = 64
    search: bool = False
    coded: bool = False

    def __post_init__(self) -> None:
        if self.bits not in (*GRID_WIDTHS, *FLOATS):
            raise Unsupported(
                f"method.bits={self.bits}: a uniform width is one of {', '.join(map(str, (*GRID_WIDTHS, *FLOATS)))}"
            )
        if self.coded and self.bits in FLOATS:
            raise ValueError(
                f"method.coded compresses codes and method.bits={self.bits} stores floats; set it to false"
            )

    def compress(self, context: CalibrationContext, rng: np.random.Generator) -> Compressed:
        """Round all layers and report the regret that their players have in the bit game, by estimated damages.

        Raises ValueError if ``group_size`` does not divide the columns of a layer.
        """
        scheme = Scheme(self.group_size, self.search)
        check_divisible(context.layers, self.group_size)
        bits = {layer.name: np.full(grid_shape(layer, scheme), self.bits, np.uint8) for layer in context.layers}
        if self.bits in FLOATS:
            return store_groups(bits, quantize_layers(context.layers, bits, scheme), float_bits=self.bits)
        blocks = block_damages(context, context.moments(), PLAYED_WIDTHS, scheme, code_game=False, probed=False)
        profile = np.full(len(blocks.damage), PLAYED_WIDTHS.index(self.bits))
        tensors = quantize_layers(context.layers, bits, scheme)
        damage, metrics = blocks.damage_by_layer(profile), regret_metrics(blocks, profile)
        return store_groups(bits, tensors, damage, metrics, coded=self.coded)
