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
    """``bits`` for every weight by error feedback, with the range of least error for every group.

    ``group_size``: columns that share a scale.  ``damping``: share of the mean diagonal of H added to it.
    ``act_order``: columns of large inputs first, on grids fixed beforehand.  ``sweeps``: sweeps of coordinate descent
    after the pass, 0 for GPTQ itself.  ``coded``: entropy-coded storage.  ``sequential``: calibrate each layer on the
    outputs of the compressed layers before it, depth by depth, as GPTQ's authors do.
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
        """Quantize the layers in the order of their depth.

        Raises ValueError if ``group_size`` does not divide the columns of a layer, or if ``sequential`` is set and the
        context has no model to run.
        """
        scheme = Scheme(self.group_size, search=True)
        check_divisible(context.layers, self.group_size)
        moments, after = context.moments(), dict[str, Moments]()
        tensors: dict[str, QuantizedTensor] = {}
        damage, bits = {}, {}
        depth = context.layers[0].depth
        for layer in context.track(sorted(context.layers, key=lambda layer: layer.depth), "quantizing"):
            if self.sequential and layer.depth > depth:
                depth = layer.depth
                same_depth = [other for other in context.layers if other.depth == depth]
                after = _moments_after(tensors, same_depth, moments, context)
            own = {name: after[name] if name in after else moments[name] for name in layer.modules}
            layer_curvature = curvature(layer, own)
            tensor = quantize_layer(
                layer.weight, self.bits, scheme, layer_curvature, self.sweeps, self.damping, self.act_order
            )
            tensors[layer.name], bits[layer.name] = tensor, tensor.bits.numpy()
            error = layer.weight - tensor.dequantize()
            damage[layer.name] = float(layer_curvature.damage_by_row(error).double().sum())
        in_order = {layer.name: tensors[layer.name] for layer in context.layers}
        return store_groups(bits, in_order, damage, coded=self.coded)


def _moments_after(
    tensors: Mapping[str, QuantizedTensor],
    layers: Sequence[Layer],
    moments: Mapping[str, Moments],
    context: CalibrationContext,
) -> dict[str, Moments]:
    """Return the moments of ``layers`` with the inputs that reach them through the compressed ``tensors``."""
    if context.inputs_after is None:
        raise ValueError("method.sequential needs a model to run, which this context does not have; set it to false")
    names = [name for layer in layers for name in layer.modules if not moments[name].lookup]
    inputs_by_module = context.inputs_after({name: tensor.dequantize() for name, tensor in tensors.items()}, names)
    return {name: dataclasses.replace(moments[name], inputs=inputs) for name, inputs in inputs_by_module.items()}
