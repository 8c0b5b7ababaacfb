"""GPTQ: error feedback at one width (Frantar et al. 2023)."""

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np

from nashswarm.calibration.context import Oracle
from nashswarm.errors import NotOffered
from nashswarm.layers import Layer, Moments, curvature
from nashswarm.methods.bit_allocation.blocks import check_divisible
from nashswarm.methods.method import Compressed, _store
from nashswarm.quant.coordinate_descent import reply
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
            raise NotOffered(f"method.bits={self.bits}: gptq knows {', '.join(map(str, GRID_WIDTHS))} bits")
        if self.damping <= 0 or self.sweeps < 0:
            raise ValueError(
                f"method.damping={self.damping} must be positive, method.sweeps={self.sweeps} not negative"
            )

    def compress(self, oracle: Oracle, rng: np.random.Generator) -> Compressed:
        scheme = Scheme(self.group_size, search=True)
        check_divisible(oracle.layers, self.group_size)
        moments = dict(oracle.moments())
        tensors: dict[str, QuantizedTensor] = {}
        damage, bits = {}, {}
        depth = oracle.layers[0].depth
        for layer in oracle.track(sorted(oracle.layers, key=lambda layer: layer.depth), "replying"):
            if self.sequential and layer.depth > depth:
                depth = layer.depth
                moments |= _after(tensors, [other for other in oracle.layers if other.depth == depth], moments, oracle)
            curved = curvature(layer, moments)
            found = reply(layer.weight, self.bits, scheme, curved, self.sweeps, self.damping, self.act_order)
            tensors[layer.name], bits[layer.name] = found, found.bits.numpy()
            damage[layer.name] = float(curved.damage_by_row(layer.weight - found.dequantize()).double().sum())
        in_order = {layer.name: tensors[layer.name] for layer in oracle.layers}
        return _store(bits, in_order, damage, coded=self.coded)


def _after(
    tensors: Mapping[str, QuantizedTensor], layers: Sequence[Layer], moments: Mapping[str, Moments], oracle: Oracle
) -> dict[str, Moments]:
    """The moments of ``layers`` with the inputs that they meet behind compressed ones."""
    if oracle.inputs_after is None:
        raise ValueError("method.sequential needs a model to run, which this oracle has not; set it to false")
    names = [name for layer in layers for name in layer.modules if not moments[name].lookup]
    seen = oracle.inputs_after({name: tensor.dequantize() for name, tensor in tensors.items()}, names)
    return {name: dataclasses.replace(moments[name], inputs=inputs) for name, inputs in seen.items()}
