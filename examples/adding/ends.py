"""A method of your own: the layers at both ends of a model get more bits than those between."""

import dataclasses

import numpy as np

from nashswarm.calibration.context import CalibrationContext
from nashswarm.errors import Unsupported
from nashswarm.layers import Layer
from nashswarm.methods.bit_allocation import blocks
from nashswarm.methods.method import Compressed
from nashswarm.quant.entropy import encode_groups
from nashswarm.quant.grid import GRID_WIDTHS, Scheme


@dataclasses.dataclass(frozen=True)
class Ends:
    """``ends`` bits for the matrices of the smallest and the largest depth, ``bits`` for all others.

    Codes are chosen by error feedback.
    """

    bits: int = 3
    ends: int = 8
    group_size: int = 64

    def __post_init__(self) -> None:
        if unknown := {self.bits, self.ends} - set(GRID_WIDTHS):
            raise Unsupported(f"method=ends knows {', '.join(map(str, GRID_WIDTHS))} bits, not {min(unknown)}")

    def compress(self, context: CalibrationContext, rng: np.random.Generator) -> Compressed:
        blocks.check_divisible(context.layers, self.group_size)
        scheme = Scheme(self.group_size, search=True)
        widths = {layer.name: self.width(layer, context.layers) for layer in context.layers}
        bits = {
            layer.name: np.full(blocks.grid_shape(layer, scheme), widths[layer.name], np.uint8)
            for layer in context.layers
        }
        tensors = blocks.quantize_layers(context.layers, bits, scheme, context.moments())
        return Compressed(
            packed={name: encode_groups(tensor) for name, tensor in tensors.items()},
            weights={name: tensor.dequantize() for name, tensor in tensors.items()},
            allocation=blocks.describe_widths(bits),
            code_bits=sum(widths[layer.name] * layer.parameters for layer in context.layers),
        )

    def width(self, layer: Layer, layers: tuple[Layer, ...]) -> int:
        depths = [other.depth for other in layers]
        return self.ends if layer.depth in (min(depths), max(depths)) else self.bits
