"""What a mixture of experts is trained on:  L = CE + λ1 · L_balance − λ2 · R_cache − λ3 · R_swarm + λ4 · L_nash.

Each term is a mean over the layers that route.  With P the softmax of the affinities and f the shares of assignments:

- ``balance``: N Σ_e f_e P_e over the mean P of the batch (Fedus et al. 2022, eq. 4); k at even load, as in Mixtral;
- ``cache``: the expected share of routed bytes that were in memory, Σ_e P_te · resident_e;
- ``swarm``: the mean agreement Σ_e P_te · P_(t−1)e of neighbouring tokens, between 0 and 1;
- ``nash``: the mean regret of tokens over all experts at the prices that the loads imply which really occurred, the
  posted prices plus ``congestion`` for each time that an expert's load exceeds the mean.

A router that does not score all experts has no P: its terms are zero.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

TERMS = ("balance", "cache", "swarm", "nash")
SIGNS = {"balance": 1, "cache": -1, "swarm": -1, "nash": 1}


@dataclasses.dataclass(frozen=True)
class LossWeights:
    """λ1 to λ4; a weight of 0 switches its term off.  ``congestion``: the slope of implied prices, in affinity."""

    balance: float = 0.0
    cache: float = 0.0
    swarm: float = 0.0
    nash: float = 0.0
    congestion: float = 1.0

    def __post_init__(self) -> None:
        if negative := [name for name in (*TERMS, "congestion") if getattr(self, name) < 0]:
            raise ValueError(f"method.loss.{negative[0]}={getattr(self, negative[0])} must not be negative")


def balance(logits: Float[Tensor, "tokens experts"], routing: Any) -> Float[Tensor, ""]:
    shares = routing.loads() / len(logits)  # they sum to k
    return logits.shape[1] * (shares * logits.softmax(1).mean(0)).sum()


def cache(logits: Float[Tensor, "tokens experts"], routing: Any) -> Float[Tensor, ""]:
    return (logits.softmax(1) * routing.resident).sum(1).mean()


def swarm(logits: Float[Tensor, "tokens experts"], length: int) -> Float[Tensor, ""]:
    """``length``: tokens of a window, the last of which has no neighbour in the next window."""
    chances = logits.softmax(1).unflatten(0, (-1, length))
    if length < 2:
        return chances.sum() * 0
    return (chances[:, 1:] * chances[:, :-1]).sum(-1).mean()


def implied_prices(routing: Any, congestion: float) -> Float[Tensor, " experts"]:
    """The posted prices and what the crowds that came add to them."""
    loads = routing.loads()
    return routing.prices + congestion * (loads / loads.mean() - 1)


def nash(logits: Float[Tensor, "tokens experts"], routing: Any, congestion: float) -> Float[Tensor, ""]:
    """Zero where the experts choose: nobody there deviates."""
    if routing.tokens is not None:
        return logits.sum() * 0
    utility = logits - implied_prices(routing, congestion)
    best = utility.topk(routing.experts.shape[1]).values.sum(1)
    return (best - utility.gather(1, routing.experts).sum(1)).clamp(min=0).mean()


def terms(routings: Sequence[Any], length: int, congestion: float) -> dict[str, Tensor]:
    """Every term of the loss but CE, by its name: means over layers."""
    scored = [(routing.logits, routing) for routing in routings if routing.logits is not None]
    if not scored:
        return {name: torch.zeros(()) for name in TERMS}
    found = {
        "balance": [balance(logits, routing) for logits, routing in scored],
        "cache": [cache(logits, routing) for logits, routing in scored],
        "swarm": [swarm(logits, length) for logits, routing in scored],
        "nash": [nash(logits, routing, congestion) for logits, routing in scored],
    }
    return {name: torch.stack(parts).mean() for name, parts in found.items()}


def total(cross_entropy: Tensor, parts: dict[str, Tensor], weights: LossWeights) -> Float[Tensor, ""]:
    """L: terms of weight 0 take no part."""
    for name, part in parts.items():
        if getattr(weights, name):
            cross_entropy = cross_entropy + SIGNS[name] * getattr(weights, name) * part
    return cross_entropy
