"""The training loss of a mixture of experts:  L = CE + λ1 · balance − λ2 · cache − λ3 · swarm + λ4 · nash.

Each term is a mean over the layers that route.  P are the softmaxes of the affinities, f the assignments per token:

- ``balance``: N Σ_e f_e P_e over the mean P of the batch (Fedus et al. 2022, eq. 4); k at even load, as in Mixtral;
- ``cache``: the expected share of a token's experts that were in memory, Σ_e P_te · resident_e;
- ``swarm``: the mean agreement Σ_e P_te · P_(t−1)e of neighbouring tokens, between 0 and 1;
- ``nash``: the mean regret of tokens over all experts at the prices that the loads of this batch imply: the posted
  prices plus ``congestion`` for each multiple of the mean by which an expert's load exceeds it.

A router that does not score all experts has no P; its terms are zero.
"""

import dataclasses
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from nashswarm.moe.routing import Routing, regrets

TERMS = ("balance", "cache", "swarm", "nash")
SIGNS = {"balance": 1, "cache": -1, "swarm": -1, "nash": 1}


@dataclasses.dataclass(frozen=True)
class LossWeights:
    """The weights λ1 to λ4, where 0 switches a term off; ``congestion``: slope of the implied prices, in affinity."""

    balance: float = 0.0
    cache: float = 0.0
    swarm: float = 0.0
    nash: float = 0.0
    congestion: float = 1.0

    def __post_init__(self) -> None:
        if negative := [name for name, weight in vars(self).items() if weight < 0]:
            raise ValueError(f"method.loss.{negative[0]}={vars(self)[negative[0]]} must not be negative")

    def of_terms(self) -> dict[str, float]:
        """Return the weight of each term that is switched on, by name, with its sign in the loss."""
        return {name: SIGNS[name] * vars(self)[name] for name in TERMS if vars(self)[name]}


def balance(logits: Float[Tensor, "tokens experts"], routing: Routing) -> Float[Tensor, ""]:
    """Return the load balancing loss of Switch Transformer."""
    shares = routing.loads() / len(logits)  # they sum to k
    return logits.shape[1] * (shares * logits.softmax(1).mean(0)).sum()


def cache(logits: Float[Tensor, "tokens experts"], routing: Routing) -> Float[Tensor, ""]:
    """Return the mean probability of experts in memory."""
    return (logits.softmax(1) * routing.resident).sum(1).mean()


def swarm(logits: Float[Tensor, "tokens experts"], length: int) -> Float[Tensor, ""]:
    """Return the mean agreement of neighbouring tokens in windows of ``length`` tokens; no pair spans two windows."""
    chances = logits.softmax(1).unflatten(0, (-1, length))
    if length < 2:
        return chances.sum() * 0
    return (chances[:, 1:] * chances[:, :-1]).sum(-1).mean()


def implied_prices(routing: Routing, congestion: float) -> Float[Tensor, " experts"]:
    """Return the posted prices plus ``congestion`` times the relative excess load of each expert in this batch."""
    loads = routing.loads()
    return routing.prices + congestion * (loads / loads.mean() - 1)


def nash(logits: Float[Tensor, "tokens experts"], routing: Routing, congestion: float) -> Float[Tensor, ""]:
    """Return the mean regret of tokens at the implied prices, in units of affinity; 0 where experts choose tokens."""
    if routing.tokens is not None:
        return logits.sum() * 0
    return regrets(logits, routing.experts, implied_prices(routing, congestion)).mean()


def terms(routings: Sequence[Routing], length: int, congestion: float) -> dict[str, Tensor]:
    """Return every term of the loss but the cross-entropy, by name, as a mean over layers.

    ``length``: tokens per window of the batch.
    """
    scored = [(routing.logits, routing) for routing in routings if routing.logits is not None]
    if not scored:
        return {name: torch.zeros(()) for name in TERMS}
    by_layer = {
        "balance": [balance(logits, routing) for logits, routing in scored],
        "cache": [cache(logits, routing) for logits, routing in scored],
        "swarm": [swarm(logits, length) for logits, routing in scored],
        "nash": [nash(logits, routing, congestion) for logits, routing in scored],
    }
    return {name: torch.stack(layers).mean() for name, layers in by_layer.items()}


def total(cross_entropy: Float[Tensor, ""], parts: dict[str, Tensor], weights: LossWeights) -> Float[Tensor, ""]:
    """Return L in nats per token; terms of weight 0 add nothing to the graph."""
    for name, weight in weights.of_terms().items():
        cross_entropy = cross_entropy + weight * parts[name]
    return cross_entropy
