"""Weight matrices of a model, calibration statistics of their modules, and the curvature of the loss in them."""

import dataclasses

from jaxtyping import Float
from torch import Tensor


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
