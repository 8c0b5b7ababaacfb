"""The quantizer of the earlier prototype, as it was published."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from nashswarm.calibration.context import CalibrationContext
from nashswarm.methods.bit_allocation.blocks import grid_shape, quantize_layers
from nashswarm.methods.method import Compressed, store_groups
from nashswarm.quant.grid import Scheme
from nashswarm.quant.prototype import CLASS_WIDTHS, QUANTILES, quantize_by_magnitude


@dataclasses.dataclass(frozen=True)
class AsPublished:
    """The prototype's quantizer: it compresses only ``nn.Linear``, in three classes of weights by magnitude.

    ``quantiles``: of the magnitudes, descending; they separate the classes of 8, 4 and 2 bits.  All bytes that decoding
    needs are counted, also those that the prototype did not count.
    """

    quantiles: Sequence[float] = QUANTILES

    def __post_init__(self) -> None:
        if len(self.quantiles) != 2 or not 1 > self.quantiles[0] > self.quantiles[1] > 0:
            raise ValueError(
                f"method.quantiles {list(self.quantiles)} must be two numbers, descending, between 0 and 1"
            )

    def compress(self, context: CalibrationContext, rng: np.random.Generator) -> Compressed:
        """Quantize the Linear layers; all others become 16-bit floats."""
        scheme = Scheme(group_size=1)
        others = [layer for layer in context.layers if "Linear" not in layer.kinds]
        bits = {layer.name: np.full(grid_shape(layer, scheme), 16, np.uint8) for layer in others}
        floats = store_groups(bits, quantize_layers(others, bits, scheme))
        classed = {
            layer.name: quantize_by_magnitude(layer.weight, self.quantiles)
            for layer in context.layers
            if "Linear" in layer.kinds
        }
        widths = np.array(CLASS_WIDTHS)
        return Compressed(
            packed=dict(floats.packed) | {name: tensor.pack() for name, tensor in classed.items()},
            weights=dict(floats.weights) | {name: tensor.dequantize() for name, tensor in classed.items()},
            allocation="".join(
                f"{layer.name} {'mixed' if layer.name in classed else 16}\n" for layer in context.layers
            ),
            code_bits=floats.code_bits + sum(int(widths[tensor.classes].sum()) for tensor in classed.values()),
        )
