"""Expert choice (Zhou et al. 2022): experts choose tokens."""

import dataclasses
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from nashswarm.moe.loss import LossWeights
from nashswarm.moe.router.router import Router
from nashswarm.moe.routing import Routing


@dataclasses.dataclass(frozen=True)
class ExpertChoice:
    """Every expert takes its even share of the batch, the tokens of the largest affinity.

    Whether a token is taken depends on later tokens, so the NLL is not that of a causal model.
    """

    looks_ahead: ClassVar[bool] = True
    loss: LossWeights = dataclasses.field(default_factory=LossWeights)

    def build(self, width: int, experts: int, k: int) -> "ExpertChoiceRouter":
        return ExpertChoiceRouter(width, experts, k)


class ExpertChoiceRouter(Router):
    """Routes to every expert the ``tokens · k / experts`` tokens whose softmax affinity for it is largest."""

    def forward(self, x: Float[Tensor, "tokens width"]) -> Routing:
        logits = functional.linear(x, self.weight)
        share = max(len(x) * self.k // len(self.weight), 1)
        gates, tokens = logits.softmax(1).T.topk(share)  # experts, share
        experts = torch.arange(len(self.weight), device=x.device)[:, None].expand_as(tokens)
        return Routing(
            experts.reshape(-1, 1), gates.reshape(-1, 1), logits, self.price, self.resident, 0, None, tokens.flatten()
        )
