"""Balancing without a loss (Wang et al. 2024): a bias per expert follows its load."""

import dataclasses
from typing import ClassVar

import torch

from nashswarm.moe.loss import LossWeights
from nashswarm.moe.router.router import SigmoidRouter, check_capacity
from nashswarm.moe.routing import Routing


@dataclasses.dataclass(frozen=True)
class LossFree:
    """A token uses the k experts of the largest sigmoid affinity minus price.

    After each batch a price rises by ``rate`` if its expert's load was above the mean, and falls by ``rate`` if it was
    below (Wang et al. 2024, eq. 3; the price is the negative of their bias).  ``capacity``: as in ``TopK``.
    """

    looks_ahead: ClassVar[bool] = False
    rate: float = 0.001
    capacity: float | None = None
    loss: LossWeights = dataclasses.field(default_factory=LossWeights)

    def __post_init__(self) -> None:
        check_capacity(self.capacity)

    def build(self, width: int, experts: int, k: int) -> "LossFreeRouter":
        return LossFreeRouter(self, width, experts, k)


class LossFreeRouter(SigmoidRouter):
    """Routes at prices that each batch moves by one step."""

    settles = True
    follows = True

    def __init__(self, settings: LossFree, width: int, experts: int, k: int) -> None:
        super().__init__(width, experts, k, settings.capacity)
        self.settings = settings

    @torch.no_grad()
    def settle(self, routing: Routing, step: float | None = None) -> None:
        loads = routing.loads()
        self.price += self.settings.rate * (loads - loads.mean()).sign()
        super().settle(routing, step)

    @torch.no_grad()
    def follow(self, routing: Routing) -> None:
        self.settle(routing)
