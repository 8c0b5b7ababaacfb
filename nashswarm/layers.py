"""Weight matrices of a model, the calibration statistics of their modules, and the curvature of the loss."""

import dataclasses
import functools
from collections.abc import Mapping

import torch
from jaxtyping import Float
from torch import Tensor

from nashswarm.quant.curvature import Curvature


@dataclasses.dataclass(frozen=True)
class Moments:
    """Second moments of the inputs of one module, and of the gradients of its outputs.

    ``inputs`` is E[x xᵀ], of shape (in, in), for a module that multiplies, and the share of positions that look up each
    row, of shape (rows,), for an embedding.  ``outputs`` is f = E[g²], of shape (out,), in (nats per unit of output)².
    ``coupled`` and ``coupled_inputs`` replace f and E[x xᵀ] by values that account for gradients at different positions
    of a window not being independent (see ``calibration.moments``); the output head and embeddings repeat the former.
    """

    inputs: Float[Tensor, "..."]
    outputs: Float[Tensor, " out"]
    coupled: Float[Tensor, " out"]
    coupled_inputs: Float[Tensor, "..."]

    @property
    def lookup(self) -> bool:
        """Whether the module is an embedding."""
        return self.inputs.ndim == 1


@dataclasses.dataclass(frozen=True)
class Layer:
    """One weight matrix of a model.

    ``weight`` is of shape (out, in), also if the model stores it transposed, and float32; one that is mapped from a
    checkpoint has its precision.  ``modules`` are the names of the modules that share it, and ``kinds`` their classes
    (Linear, Conv1D, Embedding).  ``role`` is the last part of its name.  ``depth`` runs from 0 at the input of the
    model to 1 at the output.
    """

    name: str
    role: str
    depth: float
    modules: tuple[str, ...]
    kinds: tuple[str, ...]
    weight: Float[Tensor, "out in"]

    @property
    def parameters(self) -> int:
        """Number of weights."""
        return self.weight.numel()


def curvature(layer: Layer, moments: Mapping[str, Moments], floor: float = 0.0) -> Curvature:
    """Return the second derivatives of the loss in the weights of a layer, summed over the modules that share it.

    ``moments`` are by module name.  Where several modules multiply by the matrix, the sum of their f ⊗ H is replaced by
    the one product of an f and an H with the same sums over rows and over columns.  ``floor``: the share of the layer's
    mean row sensitivity that every row gets on top of its own (see ``Curvature.with_row_floor``).
    """
    parts = [moments[module] for module in layer.modules]
    lookups = [torch.outer(part.inputs, part.outputs) for part in parts if part.lookup]
    products = [(part.coupled, (part.inputs + part.coupled_inputs) / 2) for part in parts if not part.lookup]
    rows, inputs = (torch.zeros(len(layer.weight)), None) if not products else products[0]
    if len(products) > 1:
        rows = functools.reduce(torch.add, [f * h.trace() for f, h in products])
        inputs = functools.reduce(torch.add, [f.sum() * h for f, h in products])
        total = rows.sum()
        inputs = inputs / total if total > 0 else products[0][1]
    return Curvature(
        rows=rows, inputs=inputs, lookups=functools.reduce(torch.add, lookups) if lookups else None
    ).with_row_floor(floor)
