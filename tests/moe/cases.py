"""Small routers and models that the tests of mixtures of experts share."""

from typing import Any

import torch

from nashswarm.moe.model import MoeForCausalLM, MoeSource
from nashswarm.moe.router.dense import Dense
from nashswarm.moe.router.expert_choice import ExpertChoice
from nashswarm.moe.router.loss_free import LossFree
from nashswarm.moe.router.nash_swarm import NashSwarmRouter
from nashswarm.moe.router.quantile import QuantileBalance
from nashswarm.moe.router.router import Router
from nashswarm.moe.router.top_k import TopK

WIDTH, EXPERTS, K, VOCABULARY = 64, 8, 2, 96
LEADERS = NashSwarmRouter(prices="sign", search="leaders", flock=4)
CAUSAL = [Dense(), TopK(), LossFree(), NashSwarmRouter(), NashSwarmRouter(flock=3), LEADERS, QuantileBalance()]
ROUTERS = [*CAUSAL, ExpertChoice()]
NAMES = ["dense", "top_k", "loss_free", "nash_swarm", "flock_of_3", "leaders", "quantile", "expert_choice"]


def router_of(kind: Any, experts: int = EXPERTS, k: int = K, seed: int = 0) -> Router:
    """Return a router with random prices, so that they matter."""
    torch.manual_seed(seed)
    router: Router = kind.build(WIDTH, experts, k)
    router.price.normal_(std=0.3)
    router.entry.normal_(std=0.3)
    router.centre.normal_(std=0.1)
    return router


def model_of(kind: Any, **sizes: int) -> MoeForCausalLM:
    """Return a small model with random prices and centroids that choose clearly."""
    torch.manual_seed(0)
    shape = {"width": WIDTH, "layers": 2, "experts": EXPERTS, "expert_width": 64, "context": 32} | sizes
    model = MoeSource(**shape).build(kind, VOCABULARY, 0)
    for router in model.routers():
        torch.nn.init.normal_(router.weight, std=0.3)
        router.price.normal_(std=0.3)
        router.entry.normal_(std=0.3)
    return model
