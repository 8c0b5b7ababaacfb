"""No router: the dense models that mixtures of experts are compared with."""

import dataclasses
from typing import ClassVar

from nashswarm.moe.loss import LossWeights


@dataclasses.dataclass(frozen=True)
class Dense:
    """No routing: every layer has one feed-forward network as wide as the k experts that a token would use."""

    looks_ahead: ClassVar[bool] = False
    loss: LossWeights = dataclasses.field(default_factory=LossWeights)

    def build(self, width: int, experts: int, k: int) -> None:
        """Return None: the layer is dense."""


@dataclasses.dataclass(frozen=True)
class DenseTotal(Dense):
    """No routing: every layer has one feed-forward network as wide as all experts together, which every token uses."""
