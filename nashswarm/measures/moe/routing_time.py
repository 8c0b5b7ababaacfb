"""How long routing takes, against plain top-k and against the first version, and which part of it takes how long."""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional

from nashswarm.measures.measure import MeasureResult
from nashswarm.measures.moe.target import MoeMeasure, MoeTarget, check_sizes
from nashswarm.measures.timing import medians
from nashswarm.moe.model import FeedForward, Mixture, MoeConfig, MoeSource
from nashswarm.moe.router.nash_swarm import CongestionRouter, NashSwarmRouter

LOOP_REPEATS = 3  # of the first version, which loops over a sixteenth of the tokens


@dataclasses.dataclass(frozen=True)
class RoutingTime(MoeMeasure):
    """Median times of routing random tokens of the trained model's width, with fresh routers, by number of experts.

    ``route_<version>_<experts>``: microseconds per token of ``plain`` softmax and top-k, of the ``flock`` with prices,
    of its ``leaders``, and of the ``first`` version, which loops over tokens.  ``share_<component>_<experts>``: shares
    of the flock's time, of ``scores`` and of the ``choice`` with its gates.  ``layer_ratio_batch_<tokens>_<experts>``:
    time of a whole layer over that of the dense layer of equal active size, for one token and for all.
    """

    tokens: int = 2048
    experts: Sequence[int] = (8, 64, 256, 1024)
    repeats: int = 30

    def __post_init__(self) -> None:
        check_sizes(self, "tokens", "repeats")
        if min(self.experts, default=0) < 1:
            raise ValueError(f"measure.experts=[{','.join(map(str, self.experts))}] must be numbers of at least 1")

    def measure(self, target: MoeTarget) -> MeasureResult:
        config, device = target.model.config, target.model.device
        width, k = config.hidden_size, config.num_experts_per_tok
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(self.tokens, width, generator=generator).to(device)
        metrics: dict[str, float] = {}
        for count in target.track(list(self.experts), "timing"):
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)
                flock = NashSwarmRouter().build(width, count, k)
                leaders = NashSwarmRouter(prices="sign", search="leaders").build(width, count, k)
            flock.price.normal_(generator=generator)
            flock, leaders = flock.to(device), leaders.to(device)
            versions: dict[str, Callable[[], Any]] = {
                "plain": functools.partial(plain_top_k, x, flock.weight, k),
                "flock": functools.partial(flock, x),
                "leaders": functools.partial(leaders, x),
            }
            few = x[: max(self.tokens // 16, 1)]
            loops = {"first": functools.partial(first_version, few, flock)}
            per_token = {name: time / len(x) for name, time in medians(versions, self.repeats, device).items()}
            per_token |= {name: time / len(few) for name, time in medians(loops, LOOP_REPEATS, device).items()}
            metrics |= {f"route_{name}_{count}": 1e6 * seconds for name, seconds in per_token.items()}
            metrics |= {f"{name}_{count}": share for name, share in shares(flock, x, self.repeats).items()}
            metrics |= {f"{name}_{count}": ratio for name, ratio in self.layer(config, count, x).items()}
        return metrics, {}

    def layer(self, config: MoeConfig, count: int, x: Float[Tensor, "tokens width"]) -> dict[str, float]:
        """Return the time of a mixture of ``count`` experts over that of the dense layer, for one token and for all."""
        source = MoeSource(
            width=config.hidden_size, layers=1, experts=count, top_k=config.num_experts_per_tok,
            expert_width=config.moe_intermediate_size,
        )  # fmt: skip
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            small = source.build(NashSwarmRouter(), 8, 0).config
            router = NashSwarmRouter().build(small.hidden_size, count, small.num_experts_per_tok)
            mixture, dense = Mixture(small, router).eval().to(x.device), FeedForward(small).eval().to(x.device)
        ratios = {}
        for batch in (1, len(x)):
            layers = {
                "mixture": functools.partial(mixture, x[None, :batch]),
                "dense": functools.partial(dense, x[None, :batch]),
            }
            times = medians(layers, self.repeats, x.device)
            ratios[f"layer_ratio_batch_{batch}"] = times["mixture"] / times["dense"]
        return ratios


def shares(router: CongestionRouter, x: Float[Tensor, "tokens width"], repeats: int) -> dict[str, float]:
    """Return the share of the router's time that each of its components takes, each run by itself."""
    logits = router.affinities(x)
    components: Mapping[str, Callable[[], Any]] = {
        "scores": lambda: router.affinities(x),
        "choice": lambda: router.cheapest(logits),
    }
    times = medians(components, repeats, x.device)
    return {f"share_{name}": seconds / sum(times.values()) for name, seconds in times.items()}


def plain_top_k(
    x: Float[Tensor, "tokens width"], weight: Float[Tensor, "experts width"], k: int
) -> tuple[Int[Tensor, "tokens k"], Float[Tensor, "tokens k"]]:
    """Return the experts and gates of the usual router: softmax over all experts, the k largest rescaled to sum to
    one."""
    gates, experts = functional.linear(x, weight).softmax(1).topk(k)
    return experts, gates / gates.sum(1, keepdim=True)


def first_version(
    x: Float[Tensor, "tokens width"], router: CongestionRouter
) -> tuple[Int[Tensor, "tokens k"], Float[Tensor, "tokens k"]]:
    """Return the experts and gates of ``router``, computed by loops over tokens and experts as its first version did.

    Tests compare the router with it.
    """
    prices, entry = router.price.tolist(), router.entry.tolist()
    chosen, gates = [], []
    for token in x:
        deviation = token - router.centre
        affinity = [float(deviation @ centroid) for centroid in router.weight.detach()]
        flock = sorted(range(len(affinity)), key=lambda expert: entry[expert] - affinity[expert])[: router.flock]
        best = sorted(flock, key=lambda expert: prices[expert] - affinity[expert])[: router.k]
        utility = [affinity[expert] - prices[expert] for expert in best]
        weights = np.exp(np.array(utility) - max(utility))
        chosen.append(best)
        gates.append((weights / weights.sum()).tolist())
    return torch.tensor(chosen), torch.tensor(gates)
