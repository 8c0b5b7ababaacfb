"""Routers against slow second implementations, and the prices that even their load."""

import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from transformers.models.mixtral import modeling_mixtral as mixtral

from nashswarm.measures.moe.routing_time import first_version
from nashswarm.moe import load, loss
from nashswarm.moe.model import MoeSource
from nashswarm.moe.router.equilibrium import equilibrium
from nashswarm.moe.router.expert_choice import ExpertChoice
from nashswarm.moe.router.loss_free import LossFree
from nashswarm.moe.router.nash_swarm import NashSwarmRouter
from nashswarm.moe.router.top_k import TopK
from nashswarm.moe.routing import regrets
from tests.moe.cases import CAUSAL, EXPERTS, LEADERS, NAMES, WIDTH, K, router_of


@pytest.mark.parametrize("flock", [None, 3, 7, 8])
def test_congestion_router_equals_first_version(flock: int | None, x: Tensor) -> None:
    router = router_of(NashSwarmRouter(flock=flock))
    routing = router(x)
    experts, gates = first_version(x, router)
    assert torch.equal(routing.experts, experts)
    assert torch.allclose(routing.gates, gates.float(), atol=1e-5)


def test_leader_router_chooses_in_best_group_of_token(x: Tensor) -> None:
    router = router_of(LEADERS, experts=10)  # the last group is filled up from the first experts
    routing = router(x)
    groups = [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 0, 1]]
    for token, experts, gates in zip(x, routing.experts.tolist(), routing.gates, strict=True):
        utility = router.weight.detach() @ (token - router.centre) - router.price
        best = max(groups, key=lambda group: float(utility[group].mean()))
        assert experts == sorted(best, key=lambda expert: -float(utility[expert]))[:K]
        assert torch.allclose(gates, utility[experts].softmax(0), atol=1e-5)


@pytest.mark.parametrize("kind", CAUSAL[1:], ids=NAMES[1:7])
def test_router_gates_of_a_token_sum_to_one(kind: Any, x: Tensor) -> None:
    gates = router_of(kind)(x).gates
    assert torch.allclose(gates.sum(1), torch.ones(len(x))) and bool((gates >= 0).all())


def test_expert_choice_takes_best_tokens_of_every_expert(x: Tensor) -> None:
    router = router_of(ExpertChoice())
    routing = router(x)
    chances = (x @ router.weight.T).softmax(1)
    assert routing.loads().tolist() == [len(x) * K // EXPERTS] * EXPERTS
    for expert in range(EXPERTS):
        taken = routing.tokens[routing.experts[:, 0] == expert].tolist()
        assert sorted(taken) == sorted(chances[:, expert].argsort(descending=True)[: len(taken)].tolist())


def test_loss_free_prices_and_gates_equal_rule_by_hand(x: Tensor) -> None:
    router = router_of(LossFree(rate=0.01))
    before, routing = router.price.tolist(), router(x)
    counts = np.bincount(routing.experts.flatten().numpy(), minlength=EXPERTS)
    router.settle(routing)
    for expert, price in enumerate(before):
        assert router.price[expert].item() == pytest.approx(price + 0.01 * np.sign(counts[expert] - counts.mean()))
    scores = (x @ router.weight.T).sigmoid()
    chosen = scores.gather(1, routing.experts)
    assert torch.allclose(routing.gates, chosen / chosen.sum(1, keepdim=True), atol=1e-6)


def test_top_k_router_and_loss_equal_mixtral(x: Tensor) -> None:
    config = transformers.MixtralConfig(
        hidden_size=WIDTH, intermediate_size=32, num_local_experts=EXPERTS, num_experts_per_tok=K
    )
    theirs = mixtral.MixtralTopKRouter(config)
    ours = router_of(TopK())
    ours.price.zero_()  # as training leaves it
    theirs.weight.data.copy_(ours.weight)
    logits, gates, experts = theirs(x)
    routing = ours(x)
    assert torch.equal(routing.experts, experts) and torch.allclose(routing.gates, gates, atol=1e-6)
    assert torch.allclose(routing.logits, logits)
    wanted = mixtral.load_balancing_loss_func((logits,), EXPERTS, K)
    assert loss.balance(routing.logits, routing).item() == pytest.approx(float(wanted), rel=1e-5)


def test_congestion_router_without_prices_chooses_by_affinity(x: Tensor) -> None:
    router = router_of(NashSwarmRouter(prices="none", flock=None)).train()
    router.price.zero_(), router.centre.zero_()
    router.settle(router(x + 1))
    with torch.no_grad():
        router.weight += torch.randn(router.weight.shape, generator=torch.Generator().manual_seed(5))
    assert not router.price.any() and not router.centre.any()
    assert torch.equal(router(x).experts, (x @ router.weight.T).topk(K).indices)


@pytest.mark.parametrize("seed", range(3))
def test_equilibrium_one_expert_a_token_equals_best_assignment(seed: int) -> None:
    """With one expert a token, places enough for all and prices at equilibrium, what tokens take of themselves is the
    assignment of largest total affinity, which the Hungarian algorithm finds."""
    rng = np.random.default_rng(seed)
    wanted = torch.from_numpy(rng.normal(size=(40, 4)) + rng.normal(size=4))
    price = equilibrium(wanted, 1, torch.zeros(4, dtype=torch.float64), 300)
    chosen = (wanted - price).argmax(1).numpy()
    rows, places = linear_sum_assignment(-np.repeat(wanted.numpy(), 10, axis=1))
    assert np.bincount(chosen, minlength=4).tolist() == [10] * 4
    assert wanted.numpy()[rows, chosen].sum() == pytest.approx(wanted.numpy()[rows, places // 10].sum())


def test_equilibrium_k_experts_or_flock_evens_load() -> None:
    generator = torch.Generator().manual_seed(0)
    wanted = torch.randn(512, 8, generator=generator) + torch.randn(8, generator=generator)
    nearest = wanted.topk(7).indices
    open_to = torch.zeros_like(wanted, dtype=torch.bool).scatter(1, nearest, True)
    for utility in (wanted, wanted.where(open_to, -torch.inf)):
        price = equilibrium(utility, 2, torch.zeros(8), 100)
        loads = torch.bincount((utility - price).topk(2).indices.flatten(), minlength=8).double().numpy()
        assert load.max_violation(loads) < 0.02 and price.isfinite().all()


def test_settle_far_expert_belongs_to_as_many_flocks() -> None:
    """However unevenly the centroids lie: a far one, in no flock by distance alone, is in as many as the others."""
    generator = torch.Generator().manual_seed(0)
    router = router_of(NashSwarmRouter(flock=3), experts=12)
    with torch.no_grad():
        router.weight[5] *= 0.01
    x = torch.randn(600, WIDTH, generator=generator) + 2 * router.weight.detach().mean(0)
    for step in range(60):
        router.settle(router(x), 1 / (step + 1) ** 0.5)
    members = (router.affinities(x) - router.entry).topk(3).indices
    assert load.max_violation(torch.bincount(members.flatten(), minlength=12).double().numpy()) < 0.1
    assert load.max_violation(router(x).loads().double().numpy()) < 0.1


@pytest.mark.parametrize("kind", [NashSwarmRouter(flock=3, follow=2.0), LossFree(rate=0.02)])
def test_follow_another_text_evens_load(kind: Any) -> None:
    generator = torch.Generator().manual_seed(0)
    router, shift = router_of(kind).eval(), torch.randn(WIDTH, generator=generator)
    batches = [torch.randn(96, WIDTH, generator=generator) + shift for _ in range(200)]
    frozen = sum(router(x).loads() for x in batches)
    following = torch.zeros(EXPERTS)
    for x in batches:
        routing = router(x)
        following += routing.loads()
        router.follow(routing)
    violations = [load.max_violation(loads.double().numpy()) for loads in (frozen, following)]
    assert violations[1] < 0.1 * violations[0]


def test_regrets_equal_enumeration(x: Tensor) -> None:
    logits, prices = x[:, :4], torch.tensor([0.5, -0.2, 0.0, 0.1])
    experts = torch.randint(4, (len(x), 1), generator=torch.Generator().manual_seed(1))
    for regret, row, (chosen,) in zip(regrets(logits, experts, prices), logits - prices, experts.tolist(), strict=True):
        assert regret.item() == pytest.approx(max(float(row[other] - row[chosen]) for other in range(4)), abs=1e-6)
    router = router_of(NashSwarmRouter(flock=None))
    routing = router(x)
    assert regrets(routing.logits, routing.experts, router.price).max() < 1e-5  # at its own prices nobody regrets


@pytest.mark.parametrize("kind", [TopK(), LossFree(), NashSwarmRouter()], ids=["top", "free", "nash"])
def test_router_gradients_equal_differences(kind: Any) -> None:
    """The choice is constant almost everywhere; what moves with a centroid are the gates."""
    router = router_of(kind).double()
    x = torch.randn(5, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(0), requires_grad=True)
    mix = torch.randn(5, K, dtype=torch.float64, generator=torch.Generator().manual_seed(1))

    def value(tokens: Tensor, weight: Tensor) -> Tensor:
        return (torch.func.functional_call(router, {"weight": weight}, (tokens,)).gates * mix).sum()

    weight = router.weight.detach().clone().requires_grad_()
    assert torch.autograd.gradcheck(value, (x, weight), eps=1e-6, atol=1e-6)


@pytest.mark.parametrize("kind", [TopK(capacity=1.0), NashSwarmRouter(capacity=0.5)])
def test_dispatch_over_capacity_drops_later_tokens(kind: Any, x: Tensor) -> None:
    routing, free = router_of(kind)(x), router_of(type(kind)())(x)
    room, taken, dropped = math.ceil(kind.capacity * len(x) * K / EXPERTS), [0] * EXPERTS, 0
    for row, (experts, gates) in enumerate(zip(free.experts.tolist(), free.gates, strict=True)):
        for place, expert in enumerate(experts):
            taken[expert] += 1
            dropped += taken[expert] > room
            assert routing.gates[row, place] == (gates[place] if taken[expert] <= room else 0)
    assert int(routing.dropped) == dropped > 0 and int(free.dropped) == 0
    assert routing.loads().sum() == len(x) * K - dropped


def test_recent_many_tokens_equals_lru_token_by_token() -> None:
    """Token by token with a list against all at once."""
    router = router_of(NashSwarmRouter())
    generator, held = torch.Generator().manual_seed(0), []
    for _ in range(6):
        experts = torch.randint(EXPERTS, (3, K), generator=generator)
        for expert in experts.flatten().tolist():
            held = [*[other for other in held if other != expert][-3:], expert]
        assert torch.nonzero(router.recent(experts, 4)).flatten().tolist() == sorted(held)


@pytest.mark.parametrize(
    "build, message",
    [
        (  # the types that tests check would refuse it before the class can
            lambda: NashSwarmRouter.__post_init__(SimpleNamespace(**vars(NashSwarmRouter()) | {"prices": "free"})),
            "unknown method.prices 'free'",
        ),
        (lambda: NashSwarmRouter(search="leaders"), "method.search=leaders needs"),
        (lambda: NashSwarmRouter(resident=0), "method.resident=0"),
        (lambda: TopK(capacity=0), "method.capacity=0 must be positive"),
        (lambda: NashSwarmRouter(flock=1).build(4, 4, 2), "method.flock=1 is smaller than model.top_k=2"),
        (lambda: MoeSource(experts=2, top_k=3), "model.top_k=3 is not between 1 and model.experts=2"),
        (lambda: MoeSource(width=10, heads=4), "model.width=10 a multiple of model.heads=4"),
    ],
)
def test_settings_that_do_not_fit_are_named(build: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build()
