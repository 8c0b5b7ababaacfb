"""Quantile balancing (Su 2026): prices are the dual variables of the assignment of most affinity at even load."""

import dataclasses
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from nashswarm.moe.loss import LossWeights
from nashswarm.moe.router.router import SigmoidRouter, check_capacity
from nashswarm.moe.routing import Routing


@dataclasses.dataclass(frozen=True)
class QuantileBalance:
    """A token uses the k experts of the largest sigmoid affinity minus price, and ``dual_prices`` sets the prices.

    After each batch prices become those of ``rounds`` rounds on this batch; there is no step size.  ``capacity``: as in
    ``TopK``.
    """

    looks_ahead: ClassVar[bool] = False
    rounds: int = 1
    capacity: float | None = None
    loss: LossWeights = dataclasses.field(default_factory=LossWeights)

    def __post_init__(self) -> None:
        check_capacity(self.capacity)
        if self.rounds < 1:
            raise ValueError(f"method.rounds={self.rounds} must be at least 1")

    def build(self, width: int, experts: int, k: int) -> "QuantileRouter":
        return QuantileRouter(self, width, experts, k)


class QuantileRouter(SigmoidRouter):
    """Routes at prices that are solved on each batch."""

    settles = True
    solves = True

    def __init__(self, settings: QuantileBalance, width: int, experts: int, k: int) -> None:
        super().__init__(width, experts, k, settings.capacity)
        self.settings = settings

    @torch.no_grad()
    def settle(self, routing: Routing, step: float | None = None) -> None:
        """Move prices by ``step`` of the way to those of this batch; by default all the way, as published."""
        assert routing.logits is not None
        self.solve(routing.logits, 1.0 if step is None else step)
        super().settle(routing, step)

    @torch.no_grad()
    def solve(self, affinities: Float[Tensor, "tokens experts"], share: float) -> None:
        solved = dual_prices(affinities.sigmoid(), self.k, self.price, self.settings.rounds)
        self.price += share * (solved - self.price)


def dual_prices(
    affinities: Float[Tensor, "tokens experts"], k: int, start: Float[Tensor, " experts"], rounds: int
) -> Float[Tensor, " experts"]:
    """Return the prices of experts after ``rounds`` rounds of descent from ``start``, in units of affinity.

    The linear programme gives every token k experts and every expert its even share of tokens, at the largest total
    affinity.  Its dual is k Σ α_t + share Σ β_e + Σ max(s_te − α_t − β_e, 0) over levels α of tokens and prices β of
    experts.  A round minimizes it over all levels, then over all prices; both minima are quantiles, and the dual never
    rises.  A level lies between the k-th and the next largest of s_te − β_e, a price between the share-th and the next
    largest of s_te − α_t.  Prices are relative: their mean is zero.
    """
    tokens, experts = affinities.shape
    if k == experts:
        return torch.zeros_like(start)
    share, rest = divmod(tokens * k, experts)
    places = slice(share, share + 1) if rest or share == 0 else slice(share - 1, share + 1)  # of the share-th and next
    price = start
    for _ in range(rounds):
        level = (affinities - price).topk(k + 1).values[:, -2:].mean(1, keepdim=True)
        price = (affinities - level).topk(share + 1, dim=0).values[places].mean(0)
        price = price - price.mean()
    return price
