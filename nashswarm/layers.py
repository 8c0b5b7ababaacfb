"""Weight matrices of a model, calibration statistics of their modules, and the curvature of the loss in them."""

import dataclasses
from collections.abc import Mapping

import torch
from jaxtyping import Float
from torch import Tensor

from nashswarm.quant.curvature import Curvature


@dataclasses.dataclass(frozen=True)
class Moments:
    """Second moments of one module's inputs and of the gradients of its outputs.

    ``inputs``: E[x xᵀ], shape (in, in), of a module that multiplies; the share of positions that look up each row,
    shape (rows,), of an embedding.  ``outputs``: f = E[g²], shape (out,), in (nats per unit of output)².  ``coupled``
    and ``coupled_inputs``: the same two with the positions of a window taken together (of the head and of embeddings:
    themselves).
    """

    inputs: Float[Tensor, "..."]
    outputs: Float[Tensor, " out"]
    coupled: Float[Tensor, " out"]
    coupled_inputs: Float[Tensor, "..."]

    @property
    def lookup(self) -> bool:
        return self.inputs.ndim == 1


@dataclasses.dataclass(frozen=True)
class Layer:
    """One weight matrix, whoever uses it.

    ``weight``: float32, shape (out, in), also where the model stores it transposed.  ``modules``: the modules that
    share it, ``kinds`` their classes (Linear, Conv1D, Embedding).  ``role``: the last part of its name.  ``depth``: 0
    (input) to 1 (output).
    """

    name: str
    role: str
    depth: float
    modules: tuple[str, ...]
    kinds: tuple[str, ...]
    weight: Float[Tensor, "out in"]

    @property
    def parameters(self) -> int:
        return self.weight.numel()


def curvature(layer: Layer, moments: Mapping[str, Moments]) -> Curvature:
    """Second derivatives of the loss in the layer's weights, summed over the modules that share it."""
    products = [moments[module] for module in layer.modules if not moments[module].lookup]
    lookups = [
        torch.outer(found.inputs, found.outputs)
        for found in (moments[module] for module in layer.modules)
        if found.lookup
    ]
    if len(products) > 1:
        raise ValueError(
            f"{' and '.join(layer.modules)} share a matrix and both multiply: leave it out by model.exclude"
        )
    return Curvature(
        rows=products[0].coupled if products else torch.zeros(len(layer.weight)),
        inputs=(products[0].inputs + products[0].coupled_inputs) / 2 if products else None,
        lookups=torch.stack(lookups).sum(0) if lookups else None,
    )
