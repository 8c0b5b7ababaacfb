"""A mixture of experts as one game: rates answer to the traffic of experts, and routing to what their errors cost.

Both sides lower one potential, the KL from the full model on held-out calibration text at a given number of bytes.  An
expert's rates are best replies to its measured traffic, which is a factor of its moments.  Routers answer by prices: an
expert whose errors cost a token more becomes dearer, so that tokens avoid it.  Moments are then taken again at these
prices, and rates reply again, until a reply no longer lowers the potential.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor

from nashswarm.calibration.context import CalibrationContext
from nashswarm.calibration.expert_traffic import Prices, RoutedExperts, without_traffic
from nashswarm.calibration.missing_moments import mixture_of
from nashswarm.layers import Moments
from nashswarm.methods.method import Compressed
from nashswarm.methods.nash_swarm.settings import NashSwarm

Traffic = Literal["blind", "weight", "joint"]
STEPS = (0.003, 0.01, 0.03, 0.1, 0.3)  # of prices, in affinity, for an expert whose errors cost twice the mean


@dataclasses.dataclass(frozen=True)
class NashMixture(NashSwarm):
    """``nash_swarm`` on a mixture of experts, with three ways to treat the traffic of an expert.

    ``traffic``: ``blind`` gives every expert the mean traffic of its mixture, as a control; ``weight`` counts an
    expert as often as calibration tokens used it, as ``nash_swarm`` does; ``joint`` also lets prices of experts
    answer.  ``replies``: of routing and then of rates, at most.  All other fields are those of ``NashSwarm``.

    Raises ValueError for a setting without a meaning.
    """

    traffic: Traffic = "joint"
    replies: int = 3

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.traffic not in get_args(Traffic):
            raise ValueError(f"unknown method.traffic {self.traffic!r}: choose {', '.join(get_args(Traffic))}")
        if self.replies < 1:
            raise ValueError(f"method.replies={self.replies} must be at least 1")
        if self.gradients_at != "full" or self.effort == "quick":
            raise ValueError("this method takes its own sensitivities: leave method.gradients_at and method.effort out")

    def compress(self, context: CalibrationContext, rng: np.random.Generator) -> Compressed:
        """Return the model compressed to ``bits`` per parameter, and the prices of its experts where they changed.

        Raises ValueError for a model without routed experts, and for prices where its routers keep none.
        """
        experts = context.experts
        traffic = {} if experts is None else experts.traffic(experts.prices)
        if experts is None or not traffic:
            raise ValueError("this model has no routed experts: choose method=nash_swarm")
        if self.traffic == "joint" and not experts.prices:
            raise ValueError("the routers of this model keep no prices: choose method.traffic=weight")
        seed = int(rng.integers(2**31))

        def at_rates(moments: Mapping[str, Moments]) -> Compressed:
            seen = dataclasses.replace(context, zipf_moments=lambda share=1: moments)
            return super(NashMixture, self).compress(seen, np.random.default_rng(seed))

        moments = context.zipf_moments()
        if self.traffic != "joint":
            return at_rates(without_traffic(moments, traffic) if self.traffic == "blind" else moments)
        return self._joint(experts, at_rates(moments), at_rates)

    def _joint(
        self,
        experts: RoutedExperts,
        result: Compressed,
        at_rates: Callable[[Mapping[str, Moments]], Compressed],
    ) -> Compressed:
        """Let prices and rates reply in turn, from ``result`` on, as long as that lowers the potential."""
        prices, potential = experts.prices, experts.heldout_kl(result.weights, experts.prices)
        history = [potential]
        for _ in range(self.replies):
            costs = token_costs(result.damage, experts.traffic(prices), prices)
            answer, lower = best_prices(experts, result.weights, prices, costs)
            if not lower < potential:
                break
            prices, potential = answer, lower
            history.append(potential)
            again = at_rates(experts.moments(prices))
            replied = experts.heldout_kl(again.weights, prices)
            if replied < potential:
                result, potential = again, replied
            history.append(potential)
        moved = max(float((prices[name] - price).abs().max()) for name, price in experts.prices.items())
        return dataclasses.replace(
            result,
            prices=prices,
            metrics={**result.metrics, "replies": len(history) // 2, "price_moved": moved},
            series={**result.series, "heldout_kl_of_reply": history},
        )


def token_costs(damage: Mapping[str, float], traffic: Mapping[str, float], prices: Prices) -> dict[str, Tensor]:
    """Return what the errors of each expert cost a token that it computes, in nats, by the name of its price.

    ``damage``: of every matrix, in nats per token of the text.  ``traffic``: share of the tokens that an expert sees.
    """
    costs = {name: torch.zeros_like(price) for name, price in prices.items()}
    for module, share in traffic.items():
        name = f"{mixture_of(module).rpartition('.')[0]}.router.price"
        if name in costs:
            costs[name][int(module.split(".")[-2])] += damage.get(module, 0.0) / share
    return costs


def best_prices(
    experts: RoutedExperts, weights: Mapping[str, Tensor], prices: Prices, costs: Prices
) -> tuple[dict[str, Tensor], float]:
    """Return the prices of least divergence along the costs of tokens, and this divergence.

    The price of an expert rises by a step for each time that its cost exceeds the mean of its layer.
    """
    tried = []
    for step in STEPS:
        answer = {name: price + step * relative(costs[name]) for name, price in prices.items()}
        tried.append((experts.heldout_kl(weights, answer), answer))
    divergence, answer = min(tried, key=lambda pair: pair[0])
    return answer, divergence


def relative(costs: Tensor) -> Tensor:
    """Return by how many times its mean each cost exceeds the mean; zeros where nothing costs."""
    mean = costs.mean()
    return costs / mean - 1 if mean > 0 else torch.zeros_like(costs)
