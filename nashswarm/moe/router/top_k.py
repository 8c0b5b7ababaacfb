"""Softmax and top-k: the router of Switch Transformer (Fedus et al. 2022), with the gates of Mixtral."""

import dataclasses
from typing import ClassVar

from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from nashswarm.moe.loss import LossWeights
from nashswarm.moe.router.router import Router, check_capacity, softmax_gates
from nashswarm.moe.routing import Routing


@dataclasses.dataclass(frozen=True)
class TopK:
    """A token uses the k experts of the largest affinity; only the loss balances the load.

    Prices are zero in training; compression may set them (``nashswarm.methods.nash_mixture``).

    ``capacity``: the largest load of an expert, as a multiple of its even share; later tokens are dropped.  None: no
    limit.
    """

    looks_ahead: ClassVar[bool] = False
    capacity: float | None = None
    loss: LossWeights = dataclasses.field(default_factory=lambda: LossWeights(balance=0.01))

    def __post_init__(self) -> None:
        check_capacity(self.capacity)

    def build(self, width: int, experts: int, k: int) -> "TopKRouter":
        return TopKRouter(width, experts, k, self.capacity)


class TopKRouter(Router):
    """Routes each token to the k experts of the largest affinity."""

    def forward(self, x: Float[Tensor, "tokens width"]) -> Routing:
        logits = functional.linear(x, self.weight)
        experts = (logits - self.price).topk(self.k).indices
        return self.dispatch(experts, softmax_gates(logits, experts), logits, x)
