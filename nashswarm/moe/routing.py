"""The decision of a router about a batch of tokens, and the regret of that decision."""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


class Routing(NamedTuple):
    """Which experts compute which tokens of a batch, and with what weights.

    ``experts``, ``gates``: the k experts of each token and their weights in its output.  Where ``tokens`` is given
    (experts that choose tokens), each row is one assignment of that token instead.  ``logits``: affinities of all
    tokens to all experts; None if the router did not score all of them.  ``prices``, ``resident``: price of each expert
    and whether it is in memory, both fixed before the batch.  ``dropped``: number of assignments over an expert's
    capacity; their gates are zero.  ``mean``: mean of the tokens, in training mode only.
    """

    experts: Int[Tensor, "rows k"]
    gates: Float[Tensor, "rows k"]
    logits: Float[Tensor, "tokens experts"] | None
    prices: Float[Tensor, " experts"]
    resident: Bool[Tensor, " experts"]
    dropped: Int[Tensor, ""] | int
    mean: Float[Tensor, " width"] | None = None
    tokens: Int[Tensor, " rows"] | None = None

    def loads(self) -> Float[Tensor, " experts"]:
        """Count the assignments of each expert; dropped ones do not count."""
        counts = torch.zeros_like(self.prices)
        return counts.index_add(0, self.experts.flatten(), (self.gates.detach() != 0).flatten().to(counts.dtype))


def regrets(
    logits: Float[Tensor, "tokens experts"], experts: Int[Tensor, "tokens k"], prices: Float[Tensor, " experts"]
) -> Float[Tensor, " tokens"]:
    """Return how much each token could gain by choosing other experts at these prices, in units of affinity (≥ 0)."""
    utility = logits - prices
    best = utility.topk(experts.shape[1]).values.sum(1)
    return (best - utility.gather(1, experts).sum(1)).clamp(min=0)
