"""GPTQ: error feedback at one width (Frantar et al. 2023)."""

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np

from nashswarm.calibration.context import CalibrationContext
from nashswarm.errors import Unsupported
from nashswarm.layers import Layer, Moments, curvature
from nashswarm.methods.bit_allocation.blocks import check_divisible
from nashswarm.methods.method import Compressed, store_groups
from nashswarm.quant.coordinate_descent import quantize_layer
from nashswarm.quant.curvature import DAMPING
from nashswarm.quant.grid import GRID_WIDTHS, QuantizedTensor, Scheme


@dataclasses.dataclass(frozen=True)
class Gptq:
    """``bits`` everywhere with error feedback, one scale a group (Frantar et al. 2023), the best range of every group.

    ``act_order``: columns of large inputs first, on grids fixed beforehand.  ``sweeps``: best replies after the pass, 0
    for GPTQ itself.  ``coded``: entropy-coded storage.  ``sequential``: layers see what the compressed ones before them
    give out, depth by depth, as GPTQ's authors have it.
    """

    bits: int = 3
    group_size: int = 64
    damping: float = DAMPING
    act_order: bool = False
    sweeps: int = 0
    coded: bool = True
    sequential: bool = False

    def __post_init__(self) -> None:
        if self.bits not in GRID_WIDTHS:
            raise Unsupported(f"method.bits={self.bits}: gptq knows {', '.join(map(str, GRID_WIDTHS))} bits")
        if self.damping <= 0 or self.sweeps < 0:
            raise ValueError(
                f"method.damping={self.damping} must be positive, method.sweeps={self.sweeps} not negative"
            )

    def compress(self, context: CalibrationContext, rng: np.random.Generator) -> Compressed:
        scheme = Scheme(self.group_size, search=True)
        check_divisible(context.layers, self.group_size)
        moments = dict(context.moments())
        tensors: dict[str, QuantizedTensor] = {}
        damage, bits = {}, {}
        depth = context.layers[0].depth
        for layer in context.track(sorted(context.layers, key=lambda layer: layer.depth), "replying"):
            if self.sequential and layer.depth > depth:
                depth = layer.depth
                moments |= _after(
                    tensors, [other for other in context.layers if other.depth == depth], moments, context
                )
            curved = curvature(layer, moments)
            found = quantize_layer(layer.weight, self.bits, scheme, curved, self.sweeps, self.damping, self.act_order)
            tensors[layer.name], bits[layer.name] = found, found.bits.numpy()
            damage[layer.name] = float(curved.damage_by_row(layer.weight - found.dequantize()).double().sum())
        in_order = {layer.name: tensors[layer.name] for layer in context.layers}
        return store_groups(bits, in_order, damage, coded=self.coded)


def _after(
    tensors: Mapping[str, QuantizedTensor],
    layers: Sequence[Layer],
    moments: Mapping[str, Moments],
    context: CalibrationContext,
) -> dict[str, Moments]:
    """The moments of ``layers`` with the inputs that they meet behind compressed ones."""
    if context.inputs_after is None:
        raise ValueError("method.sequential needs a model to run, which this oracle has not; set it to false")
    names = [name for layer in layers for name in layer.modules if not moments[name].lookup]
    seen = context.inputs_after({name: tensor.dequantize() for name, tensor in tensors.items()}, names)
    return {name: dataclasses.replace(moments[name], inputs=inputs) for name, inputs in seen.items()}
