"""What all routers share: the protocol of their settings, and the state and the capacity of their modules."""

import abc
import dataclasses
import math
from typing import Any, ClassVar, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional

from nashswarm.moe.loss import LossWeights
from nashswarm.moe.routing import Routing


@runtime_checkable
class RouterSettings(Protocol):
    """The settings of a router: a frozen dataclass that a config names.

    ``looks_ahead``: whether the experts of a token depend on later tokens; the NLL of such a model is not that of a
    causal model.  ``loss``: weights of the terms that the model is trained on.
    """

    __dataclass_fields__: ClassVar[dict[str, dataclasses.Field[Any]]]
    looks_ahead: ClassVar[bool]

    @property
    def loss(self) -> LossWeights: ...

    def build(self, width: int, experts: int, k: int) -> "Router | None":
        """Return a router of tokens of ``width`` to ``k`` of ``experts``, or None for a layer without routing.

        Centroids are drawn from torch's random numbers.  Raises ValueError if the sizes do not fit the settings.
        """
        ...


class Router(nn.Module, abc.ABC):
    """A centroid (``weight``, experts × width) and a price for every expert; called with tokens, it routes them.

    Prices are in units of affinity and fixed while a batch is routed, so that no token sees a later one; ``settle``
    moves them after a batch of training, ``follow`` after a batch of evaluation.  All routers hold the same buffers,
    so that saved models have one format.

    ``settles``: whether ``settle`` does more than count batches.  ``follows``: whether ``follow`` moves prices.
    ``solves``: whether ``solve`` does.
    ``residency``: how much cheaper an expert in memory is while ``serving`` from a store, in units of affinity.
    """

    settles = False
    follows = False
    solves = False
    residency = 0.0
    price: Tensor
    entry: Tensor
    centre: Tensor
    resident: Tensor
    last_use: Tensor
    settled: Tensor

    def __init__(self, width: int, experts: int, k: int, capacity: float | None = None) -> None:
        super().__init__()
        if not 1 <= k <= experts:
            raise ValueError(f"model.top_k={k} is not between 1 and model.experts={experts}")
        self.k, self.capacity, self.serving = k, capacity, False
        self.weight = nn.Parameter(torch.randn(experts, width) / math.sqrt(width))
        self.register_buffer("price", torch.zeros(experts))
        self.register_buffer("entry", torch.zeros(experts))  # price of belonging to a token's flock
        self.register_buffer("centre", torch.zeros(width))  # running mean of the tokens
        self.register_buffer("resident", torch.zeros(experts, dtype=torch.bool))
        self.register_buffer("last_use", torch.full((experts,), -1, dtype=torch.int64))
        self.register_buffer("settled", torch.zeros((), dtype=torch.int64))  # batches

    def reset(self) -> None:
        """Draw the centroids from a normal distribution of deviation 0.02 and clear all buffers."""
        nn.init.normal_(self.weight, std=0.02)
        nn.init.zeros_(self.price)
        nn.init.zeros_(self.entry)
        nn.init.zeros_(self.centre)
        nn.init.zeros_(self.settled)
        nn.init.constant_(self.resident, False)
        nn.init.constant_(self.last_use, -1)

    @abc.abstractmethod
    def forward(self, x: Float[Tensor, "tokens width"]) -> Routing:
        """Assign every token to experts."""

    def dispatch(
        self,
        experts: Int[Tensor, "tokens k"],
        gates: Float[Tensor, "tokens k"],
        logits: Float[Tensor, "tokens experts"] | None,
        x: Float[Tensor, "tokens width"],
    ) -> Routing:
        """Return the routing of tokens to these experts; assignments over the capacity are dropped, first come, first
        served."""
        dropped: Tensor | int = 0
        if self.capacity is not None:
            room = math.ceil(self.capacity * experts.numel() / len(self.price))
            taken = functional.one_hot(experts.flatten(), len(self.price)).cumsum(0)
            place = taken.gather(1, experts.flatten()[:, None]).view_as(experts)
            gates, dropped = gates * (place <= room), (place > room).sum()
        mean = x.detach().mean(0) if self.training else None
        return Routing(experts, gates, logits, self.price, self.resident, dropped, mean)

    @torch.no_grad()
    def settle(self, routing: Routing, step: float | None = None) -> None:
        """Move prices toward equal load after a batch of training; the next batch sees them.

        ``step``: fraction of the way to the solved prices; by default the router's own schedule.
        """
        self.settled += 1

    @torch.no_grad()
    def solve(self, affinities: Float[Tensor, "tokens experts"], share: float) -> None:
        """Move prices by ``share`` of the way to those at which these tokens use all experts equally often, where the
        router ``solves``.

        ``affinities``: as ``Routing.logits`` has them.
        """

    @torch.no_grad()
    def follow(self, routing: Routing) -> None:
        """Move prices toward equal load after a batch that was evaluated, where the router ``follows``.

        A text whose tokens differ from those of training then still uses all experts equally in the long run.
        """


class SigmoidRouter(Router):
    """Routes by sigmoid affinities minus prices; gates are the affinities, rescaled to sum to one."""

    def forward(self, x: Float[Tensor, "tokens width"]) -> Routing:
        logits = functional.linear(x, self.weight)
        scores = logits.sigmoid()
        experts = (scores - self.price).topk(self.k).indices
        return self.dispatch(experts, sigmoid_gates(scores, experts), logits, x)


def softmax_gates(
    logits: Float[Tensor, "tokens experts"], experts: Int[Tensor, "tokens k"]
) -> Float[Tensor, "tokens k"]:
    """Return the softmax over all experts, rescaled to sum to one over the chosen k; for k = 1 it is not rescaled, as a
    constant gate would pass no gradient to the router."""
    chosen = logits.gather(1, experts)
    return chosen.softmax(1) if experts.shape[1] > 1 else (chosen - logits.logsumexp(1, keepdim=True)).exp()


def sigmoid_gates(
    scores: Float[Tensor, "tokens experts"], experts: Int[Tensor, "tokens k"]
) -> Float[Tensor, "tokens k"]:
    """Return the sigmoid affinities of the chosen experts, rescaled to sum to one (Wang et al. 2024)."""
    chosen = scores.gather(1, experts)
    return chosen / chosen.sum(1, keepdim=True)


def check_capacity(capacity: float | None) -> None:
    """Raise ValueError unless the capacity is positive, or None for no limit."""
    if capacity is not None and capacity <= 0:
        raise ValueError(f"method.capacity={capacity} must be positive, or null for no limit")
