"""Mixtures of experts: routers against slow second implementations, loads, the loss, the store, the model."""

import copy
import dataclasses
import math
import pathlib
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from torch.nn import functional
from transformers.models.mixtral import modeling_mixtral as mixtral

import nashswarm
from nashswarm.measures.moe.routed import one_by_one
from nashswarm.measures.moe.routing_time import first_version
from nashswarm.models.experts import Experts, SplitExperts, unfuse
from nashswarm.moe import load, loss, store
from nashswarm.moe.model import FeedForward, Mixture, MoeForCausalLM, MoeSource
from nashswarm.moe.router.dense import Dense
from nashswarm.moe.router.equilibrium import equilibrium
from nashswarm.moe.router.expert_choice import ExpertChoice
from nashswarm.moe.router.loss_free import LossFree
from nashswarm.moe.router.nash_swarm import NashSwarmRouter
from nashswarm.moe.router.router import Router
from nashswarm.moe.router.top_k import TopK
from nashswarm.moe.routing import Routing, regrets
from nashswarm.runtime.machine import Machine

WIDTH, EXPERTS, K, VOCABULARY = 64, 8, 2, 96
LEADERS = NashSwarmRouter(prices="sign", search="leaders", flock=4)
CAUSAL = [Dense(), TopK(), LossFree(), NashSwarmRouter(), NashSwarmRouter(flock=3), LEADERS]
ROUTERS = [*CAUSAL, ExpertChoice()]
NAMES = ["dense", "top_k", "loss_free", "nash_swarm", "flock_of_3", "leaders", "expert_choice"]


def router_of(kind: Any, experts: int = EXPERTS, k: int = K, seed: int = 0) -> Router:
    """A router with prices, so that they matter."""
    torch.manual_seed(seed)
    found: Router = kind.build(WIDTH, experts, k)
    found.price.normal_(std=0.3)
    found.entry.normal_(std=0.3)
    found.centre.normal_(std=0.1)
    return found


def model_of(kind: Any, **sizes: int) -> MoeForCausalLM:
    torch.manual_seed(0)
    shape = {"width": WIDTH, "layers": 2, "experts": EXPERTS, "expert_width": 64, "context": 32} | sizes
    model = MoeSource(**shape).build(kind, VOCABULARY, 0)
    for router in model.routers():
        torch.nn.init.normal_(router.weight, std=0.3)
        router.price.normal_(std=0.3)
        router.entry.normal_(std=0.3)
    return model


@pytest.fixture
def x() -> Tensor:
    return torch.randn(48, WIDTH, generator=torch.Generator().manual_seed(3))


@pytest.fixture
def tokens() -> Tensor:
    return torch.randint(VOCABULARY, (4, 24), generator=torch.Generator().manual_seed(4))


def by_hand(x: Tensor, routing: Routing, experts: Experts) -> Tensor:
    """One token and one of its experts at a time."""
    out = torch.zeros_like(x)
    owners = range(len(x)) if routing.tokens is None else routing.tokens.tolist()
    for token, row, gates in zip(owners, routing.experts.tolist(), routing.gates, strict=True):
        for expert, gate in zip(row, gates, strict=True):
            hidden = Experts.act_fn(experts.up_proj[expert] @ x[token])
            out[token] += gate * (experts.down_proj[expert] @ hidden)
    return out


@pytest.mark.parametrize("kind", [kind for kind in ROUTERS if kind != Dense()], ids=NAMES[1:])
def test_a_layer_is_the_gated_sum_of_what_single_experts_make(kind: Any, x: Tensor) -> None:
    config = MoeSource(width=WIDTH, layers=1, experts=EXPERTS, expert_width=32).build(kind, VOCABULARY, 0).config
    layer = Mixture(config, kind.build(WIDTH, EXPERTS, K))
    layer.router.load_state_dict(router_of(kind).state_dict())
    out, routing = layer(x[None])
    assert torch.allclose(out[0], by_hand(x, routing, layer.experts), atol=1e-5)
    few, few_routing = layer(x[None, :3])
    with torch.no_grad():  # few assignments take another way
        if kind != ExpertChoice():
            assert torch.allclose(layer(x[None, :3])[0], few, atol=1e-5)
    assert torch.allclose(few[0], by_hand(x[:3], few_routing, layer.experts), atol=1e-5)


@pytest.mark.parametrize("flock", [None, 3, 7, 8])
def test_the_router_equals_its_first_version(flock: int | None, x: Tensor) -> None:
    router = router_of(NashSwarmRouter(flock=flock))
    routing = router(x)
    experts, gates = first_version(x, router)
    assert torch.equal(routing.experts, experts)
    assert torch.allclose(routing.gates, gates.float(), atol=1e-5)


def test_leaders_choose_in_the_group_that_is_dearest_to_the_token(x: Tensor) -> None:
    router = router_of(LEADERS, experts=10)  # the last group is filled up from the first experts
    routing = router(x)
    groups = [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 0, 1]]
    for token, experts, gates in zip(x, routing.experts.tolist(), routing.gates, strict=True):
        utility = router.weight @ (token - router.centre) - router.price
        best = max(groups, key=lambda group: float(utility[group].detach().mean()))
        assert experts == sorted(best, key=lambda expert: -float(utility[expert]))[:K]
        assert torch.allclose(gates, utility[experts].softmax(0), atol=1e-5)


@pytest.mark.parametrize("kind", CAUSAL[1:], ids=NAMES[1:6])
def test_gates_of_a_token_sum_to_one(kind: Any, x: Tensor) -> None:
    gates = router_of(kind)(x).gates
    assert torch.allclose(gates.sum(1), torch.ones(len(x))) and bool((gates >= 0).all())


@pytest.mark.parametrize("kind", CAUSAL, ids=NAMES[:6])
def test_a_later_token_changes_no_earlier_logits(kind: Any, tokens: Tensor) -> None:
    model = model_of(kind)
    changed = tokens.clone()
    changed[:, 12:] = (changed[:, 12:] + 1) % VOCABULARY
    for mode in (True, False):
        model.train(mode)
        with torch.no_grad():
            before, after = (model(input_ids=ids).logits for ids in (tokens, changed))
        assert torch.allclose(before[:, :12], after[:, :12], atol=1e-5)
        assert not torch.allclose(before[:, 12:], after[:, 12:], atol=1e-2)


def test_expert_choice_looks_ahead_and_says_so(tokens: Tensor) -> None:
    model = model_of(ExpertChoice())
    changed = tokens.clone()
    changed[:, 12:] = 5
    with torch.no_grad():
        before, after = (model(input_ids=ids).logits for ids in (tokens, changed))
    assert not torch.allclose(before[:, :12], after[:, :12], atol=1e-3)
    assert ExpertChoice.looks_ahead and not any(kind.looks_ahead for kind in CAUSAL)


def test_routing_leaves_the_prices_as_they_are_and_settling_moves_them(tokens: Tensor) -> None:
    model = model_of(NashSwarmRouter()).train()
    before = [router.price.clone() for router in model.routers()]
    routings = model(input_ids=tokens).routings
    assert all(torch.equal(router.price, price) for router, price in zip(model.routers(), before, strict=True))
    model.settle(routings)
    assert not any(torch.equal(router.price, price) for router, price in zip(model.routers(), before, strict=True))


def test_expert_choice_takes_the_best_tokens_of_every_expert(x: Tensor) -> None:
    router = router_of(ExpertChoice())
    routing = router(x)
    chances = (x @ router.weight.T).softmax(1)
    assert routing.loads().tolist() == [len(x) * K // EXPERTS] * EXPERTS
    for expert in range(EXPERTS):
        own = routing.tokens[routing.experts[:, 0] == expert].tolist()
        assert sorted(own) == sorted(chances[:, expert].argsort(descending=True)[: len(own)].tolist())


def test_the_loss_free_rule_by_hand(x: Tensor) -> None:
    router = router_of(LossFree(rate=0.01))
    before, routing = router.price.tolist(), router(x)
    counts = np.bincount(routing.experts.flatten().numpy(), minlength=EXPERTS)
    router.settle(routing)
    for expert, price in enumerate(before):
        assert router.price[expert].item() == pytest.approx(price + 0.01 * np.sign(counts[expert] - counts.mean()))
    scores = (x @ router.weight.T).sigmoid()
    chosen = scores.gather(1, routing.experts)
    assert torch.allclose(routing.gates, chosen / chosen.sum(1, keepdim=True), atol=1e-6)


def test_top_k_equals_mixtral_with_its_loss(x: Tensor) -> None:
    config = transformers.MixtralConfig(
        hidden_size=WIDTH, intermediate_size=32, num_local_experts=EXPERTS, num_experts_per_tok=K
    )
    theirs = mixtral.MixtralTopKRouter(config)
    ours = router_of(TopK())
    theirs.weight.data.copy_(ours.weight)
    logits, gates, experts = theirs(x)
    routing = ours(x)
    assert torch.equal(routing.experts, experts) and torch.allclose(routing.gates, gates, atol=1e-6)
    assert torch.allclose(routing.logits, logits)
    wanted = mixtral.load_balancing_loss_func((logits,), EXPERTS, K)
    assert loss.balance(routing.logits, routing).item() == pytest.approx(float(wanted), rel=1e-5)


def test_without_prices_affinities_alone_choose_after_training_too(x: Tensor) -> None:
    router = router_of(NashSwarmRouter(prices="none", flock=None)).train()
    router.price.zero_(), router.centre.zero_()
    router.settle(router(x + 1))
    with torch.no_grad():
        router.weight += torch.randn(router.weight.shape, generator=torch.Generator().manual_seed(5))
    assert not router.price.any() and not router.centre.any()
    assert torch.equal(router(x).experts, (x @ router.weight.T).topk(K).indices)


@pytest.mark.parametrize("seed", range(3))
def test_equilibrium_prices_are_those_of_the_best_assignment(seed: int) -> None:
    """With one expert a token, places enough for all and prices at equilibrium, what tokens take of themselves is the
    assignment of largest total affinity, which the Hungarian algorithm finds."""
    rng = np.random.default_rng(seed)
    wanted = torch.from_numpy(rng.normal(size=(40, 4)) + rng.normal(size=4))
    price = equilibrium(wanted, 1, torch.zeros(4, dtype=torch.float64), 300)
    chosen = (wanted - price).argmax(1).numpy()
    rows, places = linear_sum_assignment(-np.repeat(wanted.numpy(), 10, axis=1))
    assert np.bincount(chosen, minlength=4).tolist() == [10] * 4
    assert wanted.numpy()[rows, chosen].sum() == pytest.approx(wanted.numpy()[rows, places // 10].sum())


def test_equilibrium_prices_even_the_load_of_k_experts_and_of_a_flock() -> None:
    generator = torch.Generator().manual_seed(0)
    wanted = torch.randn(512, 8, generator=generator) + torch.randn(8, generator=generator)
    nearest = wanted.topk(7).indices
    open_to = torch.zeros_like(wanted, dtype=torch.bool).scatter(1, nearest, True)
    for utility in (wanted, wanted.where(open_to, -torch.inf)):
        price = equilibrium(utility, 2, torch.zeros(8), 100)
        loads = torch.bincount((utility - price).topk(2).indices.flatten(), minlength=8).double().numpy()
        assert load.max_violation(loads) < 0.02 and price.isfinite().all()


def test_every_expert_belongs_to_equally_many_flocks() -> None:
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
def test_prices_that_follow_even_the_load_of_another_text(kind: Any) -> None:
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


def test_regret_by_enumeration(x: Tensor) -> None:
    logits, prices = x[:, :4], torch.tensor([0.5, -0.2, 0.0, 0.1])
    experts = torch.randint(4, (len(x), 1), generator=torch.Generator().manual_seed(1))
    for regret, row, (own,) in zip(regrets(logits, experts, prices), logits - prices, experts.tolist(), strict=True):
        assert regret.item() == pytest.approx(max(float(row[other] - row[own]) for other in range(4)), abs=1e-6)
    router = router_of(NashSwarmRouter(flock=None))
    routing = router(x)
    assert regrets(routing.logits, routing.experts, router.price).max() < 1e-5  # at its own prices nobody regrets


@pytest.mark.parametrize("kind", [TopK(), LossFree(), NashSwarmRouter(flock=5), ExpertChoice()])
def test_renaming_experts_changes_nothing(kind: Any, tokens: Tensor) -> None:
    model = model_of(kind)
    renamed = copy.deepcopy(model)
    order = torch.tensor([3, 0, 7, 1, 5, 2, 6, 4])
    with torch.no_grad():
        for module in renamed.modules():
            if isinstance(module, Experts):
                module.up_proj.copy_(module.up_proj[order])
                module.down_proj.copy_(module.down_proj[order])
            elif isinstance(module, Router):
                module.weight.copy_(module.weight[order])
                module.price.copy_(module.price[order])
                module.entry.copy_(module.entry[order])
        own, other = model(input_ids=tokens), renamed(input_ids=tokens)
    assert torch.allclose(own.logits, other.logits, atol=1e-5)
    for one, two in zip(own.routings, other.routings, strict=True):
        assert torch.equal(one.loads()[order], two.loads())


@pytest.mark.parametrize("kind", CAUSAL[1:], ids=NAMES[1:6])
def test_equal_experts_make_a_dense_layer(kind: Any, x: Tensor) -> None:
    config = MoeSource(width=WIDTH, layers=1, experts=EXPERTS, expert_width=32).build(kind, VOCABULARY, 0).config
    layer = Mixture(config, kind.build(WIDTH, EXPERTS, K))
    with torch.no_grad():
        for part in layer.experts.parameters():
            part.copy_(part[:1].expand_as(part))
    dense = Experts.act_fn(x @ layer.experts.up_proj[0].T) @ layer.experts.down_proj[0].T
    assert torch.allclose(layer(x[None])[0][0], dense, atol=1e-5)


@pytest.mark.parametrize("kind", [TopK(), LossFree(), NashSwarmRouter()], ids=["top", "free", "nash"])
def test_gradients_of_the_router_by_differences(kind: Any) -> None:
    """The choice is constant almost everywhere; what moves with a centroid are the gates."""
    router = router_of(kind).double()
    x = torch.randn(5, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(0), requires_grad=True)
    mix = torch.randn(5, K, dtype=torch.float64, generator=torch.Generator().manual_seed(1))

    def value(tokens: Tensor, weight: Tensor) -> Tensor:
        return (torch.func.functional_call(router, {"weight": weight}, (tokens,)).gates * mix).sum()

    weight = router.weight.detach().clone().requires_grad_()
    assert torch.autograd.gradcheck(value, (x, weight), eps=1e-6, atol=1e-6)


def test_every_part_learns(tokens: Tensor) -> None:
    model = model_of(NashSwarmRouter()).train()
    model(input_ids=tokens, labels=tokens).loss.backward()
    assert all(part.grad is not None and part.grad.abs().sum() > 0 for part in model.parameters())


@pytest.mark.parametrize("kind", [TopK(capacity=1.0), NashSwarmRouter(capacity=0.5)])
def test_an_expert_that_is_full_drops_later_tokens(kind: Any, x: Tensor) -> None:
    routing, free = router_of(kind)(x), router_of(type(kind)())(x)
    room, taken, dropped = math.ceil(kind.capacity * len(x) * K / EXPERTS), [0] * EXPERTS, 0
    for row, (experts, gates) in enumerate(zip(free.experts.tolist(), free.gates, strict=True)):
        for place, expert in enumerate(experts):
            taken[expert] += 1
            dropped += taken[expert] > room
            assert routing.gates[row, place] == (gates[place] if taken[expert] <= room else 0)
    assert int(routing.dropped) == dropped > 0 and int(free.dropped) == 0
    assert routing.loads().sum() == len(x) * K - dropped


def test_the_terms_of_the_loss_by_hand(x: Tensor) -> None:
    router = router_of(NashSwarmRouter(flock=3))
    router.resident[:4] = True
    routing = router(x)
    chances = routing.logits.softmax(1).tolist()
    counts = np.bincount(routing.experts.flatten().numpy(), minlength=EXPERTS)
    found = loss.terms([routing], 12, 2.0)
    shares = [counts[e] / len(x) * sum(row[e] for row in chances) / len(x) for e in range(EXPERTS)]
    assert found["balance"].item() == pytest.approx(EXPERTS * sum(shares), rel=1e-5)
    assert found["cache"].item() == pytest.approx(sum(sum(row[:4]) for row in chances) / len(x), rel=1e-5)
    agreements = [sum(chances[t][e] * chances[t - 1][e] for e in range(EXPERTS)) for t in range(len(x)) if t % 12 > 0]
    assert found["swarm"].item() == pytest.approx(np.mean(agreements), rel=1e-5)
    prices = router.price + 2.0 * torch.from_numpy(counts / counts.mean() - 1).float()
    assert found["nash"].item() == pytest.approx(
        regrets(routing.logits, routing.experts, prices).mean().item(), rel=1e-5
    )
    weights = loss.LossWeights(balance=0.1, cache=0.2, swarm=0.3, nash=0.4)
    parts = {name: value.item() for name, value in found.items()}
    wanted = 5 + 0.1 * parts["balance"] - 0.2 * parts["cache"] - 0.3 * parts["swarm"] + 0.4 * parts["nash"]
    assert loss.total(torch.tensor(5.0), found, weights).item() == pytest.approx(wanted)


@pytest.mark.parametrize("name", loss.TERMS)
def test_a_term_of_weight_zero_takes_no_part(name: str) -> None:
    part = torch.tensor(3.0, requires_grad=True)
    parts = {other: part if other == name else torch.zeros(()) for other in loss.TERMS}
    off, on = (loss.total(torch.tensor(1.0), parts, loss.LossWeights(**{name: value})) for value in (0.0, 0.5))
    assert off.item() == 1 and not off.requires_grad
    assert on.item() == 1 + loss.SIGNS[name] * 1.5
    with pytest.raises(ValueError, match=f"method.loss.{name}=-1.0 must not be negative"):
        loss.LossWeights(**{name: -1.0})


def test_what_an_lru_holds_after_many_tokens() -> None:
    """Token by token with a list against all at once."""
    router = router_of(NashSwarmRouter())
    generator, held = torch.Generator().manual_seed(0), []
    for _ in range(6):
        experts = torch.randint(EXPERTS, (3, K), generator=generator)
        for expert in experts.flatten().tolist():
            held = [*[other for other in held if other != expert][-3:], expert]
        assert torch.nonzero(router.recent(experts, 4)).flatten().tolist() == sorted(held)


@pytest.mark.parametrize("metric", [load.gini, load.variation, load.max_violation])
@given(loads=st.lists(st.floats(0.1, 100), min_size=2, max_size=12))
def test_load_metrics_against_their_definitions(metric: Any, loads: list[float]) -> None:
    values = np.array(loads)
    mean = sum(loads) / len(loads)
    apart = sum(abs(one - other) for one in loads for other in loads)
    wanted = {
        "gini": apart / (2 * len(loads) ** 2 * mean),
        "variation": math.sqrt(sum((one - mean) ** 2 for one in loads) / len(loads)) / mean,
        "max_violation": max(loads) / mean - 1,
    }
    assert metric(values) == pytest.approx(wanted[metric.__name__], abs=1e-9)


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> tuple[MoeForCausalLM, pathlib.Path]:
    model = model_of(NashSwarmRouter()).eval()
    path = tmp_path_factory.mktemp("store") / "experts.safetensors"
    store.save(model, path)
    return model, path


@settings(max_examples=30, deadline=None)
@given(
    asked=st.lists(st.tuples(st.integers(0, 1), st.integers(0, EXPERTS - 1)), max_size=60),
    room=st.integers(1, 2 * EXPERTS),
)
def test_a_store_is_never_over_budget_and_never_loses_an_expert(
    stored: Any, asked: list[tuple[int, int]], room: int
) -> None:
    model, path = stored
    size = sum(part[0].nbytes for part in model.blocks[0].mixture.experts.parameters())
    held = store.ExpertStore(path, room * size + 7)
    memory: list[tuple[int, int]] = []
    hits = 0
    for layer, expert in asked:
        hits += (layer, expert) in memory
        memory = ([other for other in memory if other != (layer, expert)] + [(layer, expert)])[-room:]
        up, down = held.fetch(f"blocks.{layer}.mixture.experts", expert)
        own = model.blocks[layer].mixture.experts
        assert torch.equal(up, own.up_proj[expert]) and torch.equal(down, own.down_proj[expert])
        assert held.held_bytes == len(memory) * size <= held.budget_bytes
        resident = held.resident(f"blocks.{layer}.mixture.experts")
        assert torch.nonzero(resident).flatten().tolist() == sorted(e for at, e in memory if at == layer)
    assert (held.hits, held.misses) == (hits, len(asked) - hits)
    assert held.evictions == held.misses - len(memory) and held.bytes_read == held.misses * size


def test_a_budget_below_one_expert_is_refused(stored: Any) -> None:
    with pytest.raises(ValueError, match=r"a budget of 100 bytes holds no expert of 32,768 bytes"):
        store.ExpertStore(stored[1], 100)


def test_the_budget_by_default_is_the_last_cache_that_the_system_names(
    stored: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = Machine("", 1, {1: 1 << 15, 2: 1 << 20}, {1: 1, 2: 1}, ())
    monkeypatch.setattr(store, "machine", lambda: here)
    assert store.ExpertStore(stored[1]).budget_bytes == 1 << 20
    monkeypatch.setattr(store, "machine", lambda: dataclasses.replace(here, assumed=(1, 2)))
    with pytest.raises(ValueError, match="does not tell the size of its caches: give budget_bytes"):
        store.ExpertStore(stored[1])


def test_a_served_model_says_the_same_and_residency_brings_hits(stored: Any, tokens: Tensor) -> None:
    model, path = stored
    hits, nlls = [], []
    for residency in (0.0, 5.0):
        own = copy.deepcopy(model)
        for router in own.routers():
            router.residency = residency
        held = store.ExpertStore(path, 8 * 32768)
        store.serve(own, held)
        nlls.append([nll for window in tokens[:2] for nll in one_by_one(own, window, 40)])
        hits.append(held.hits / (held.hits + held.misses))
    with torch.no_grad():
        wanted = functional.cross_entropy(
            model(input_ids=tokens).logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten(), reduction="none"
        )
    assert nlls[0] == pytest.approx(wanted[: len(nlls[0])].tolist(), abs=1e-4)
    assert hits[1] > hits[0]


@pytest.mark.parametrize("kind", ROUTERS, ids=NAMES)
def test_a_saved_model_comes_back(kind: Any, tokens: Tensor, tmp_path: pathlib.Path) -> None:
    model = model_of(kind).train()
    model.settle(model(input_ids=tokens).routings)
    model.eval().save_pretrained(tmp_path)
    found = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert isinstance(found, MoeForCausalLM) and found.config.settings() == kind
    for name, part in model.state_dict().items():
        assert torch.equal(part, found.state_dict()[name]), name
    with torch.no_grad():
        assert torch.allclose(model(input_ids=tokens).logits, found(input_ids=tokens).logits, atol=1e-6)


def test_decoding_with_a_cache_says_the_same(tokens: Tensor) -> None:
    model = model_of(NashSwarmRouter()).eval()
    with torch.no_grad():
        whole = model(input_ids=tokens).logits
        first = model(input_ids=tokens[:, :10], use_cache=True)
        rest = model(input_ids=tokens[:, 10:], past_key_values=first.past_key_values, use_cache=True)
    assert torch.allclose(torch.cat([first.logits, rest.logits], 1), whole, atol=1e-5)
    assert model.generate(tokens[:1, :5], max_new_tokens=4, do_sample=False, pad_token_id=0).shape == (1, 9)


def test_padding_is_refused_not_read(tokens: Tensor) -> None:
    model = model_of(NashSwarmRouter()).eval()
    seen = torch.ones_like(tokens)
    with torch.no_grad():
        assert torch.equal(model(input_ids=tokens, attention_mask=seen).logits, model(input_ids=tokens).logits)
        seen[0, 0] = 0
        with pytest.raises(ValueError, match="this model reads no padding: give it texts of one length"):
            model(input_ids=tokens, attention_mask=seen)


def test_the_dense_model_is_of_equal_active_size() -> None:
    dense, mixture = (MoeSource().build(kind, 512, 0) for kind in (Dense(), TopK()))
    centroids = sum(router.weight.numel() for router in mixture.routers())
    assert (
        mixture.active_parameters - centroids == dense.active_parameters == sum(p.numel() for p in dense.parameters())
    )
    assert isinstance(dense.blocks[0].mixture, FeedForward)


COMPILED = """
import torch
from nashswarm.moe.model import Mixture, MoeSource
from nashswarm.moe.router.loss_free import LossFree
from nashswarm.moe.router.nash_swarm import NashSwarmRouter
from nashswarm.moe.router.top_k import TopK

for kind in (TopK(), LossFree(), NashSwarmRouter(), NashSwarmRouter(prices="sign", search="leaders", flock=4)):
    layer = Mixture(MoeSource(width=64, layers=1, expert_width=64).build(kind, 64, 0).config, kind.build(64, 8, 2))
    torch.compiler.reset()  # every kind counts as one more version of the same code
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for x in (torch.randn(1, 48, 64), torch.randn(1, 1, 64)):
        torch.testing.assert_close(compiled(x)[0], layer(x)[0])
        with torch.no_grad():
            torch.testing.assert_close(compiled(x)[0], layer(x)[0])
"""


def test_layers_compile_whole() -> None:
    """In a process of its own: here every function carries checks of its types, which are not for compilers."""
    subprocess.run([sys.executable, "-c", COMPILED], check=True, cwd=pathlib.Path(__file__).parents[2])


def fused_models() -> dict[str, Any]:
    shared = {"vocab_size": VOCABULARY, "hidden_size": WIDTH, "intermediate_size": 64, "num_attention_heads": 4}
    shared |= {"max_position_embeddings": 32, "num_experts_per_tok": K}
    deep = {"q_lora_rank": 64, "kv_lora_rank": 64, "qk_rope_head_dim": 16, "qk_nope_head_dim": 16, "v_head_dim": 16}
    deep |= {"n_routed_experts": 4, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1, "num_hidden_layers": 2}
    return {
        "own": lambda: model_of(NashSwarmRouter(), layers=1, experts=4),
        "mixtral": lambda: transformers.MixtralForCausalLM(
            transformers.MixtralConfig(num_hidden_layers=1, num_key_value_heads=2, num_local_experts=4, **shared)
        ),
        "deepseek": lambda: transformers.DeepseekV3ForCausalLM(
            transformers.DeepseekV3Config(moe_intermediate_size=64, num_key_value_heads=4, **deep, **shared)
        ),
    }


@pytest.mark.parametrize("name", ["own", "mixtral", "deepseek"])
def test_fused_experts_are_found_compressed_and_come_back(name: str, tokens: Tensor, tmp_path: pathlib.Path) -> None:
    torch.manual_seed(0)
    model = fused_models()[name]().eval()
    split = copy.deepcopy(model)
    assert len(unfuse(split)) == 1 and not unfuse(split)
    with torch.no_grad():
        assert torch.allclose(split(input_ids=tokens).logits, model(input_ids=tokens).logits, atol=1e-5)
    compressed, report = nashswarm.compress(model, method="gptq", calibration=tokens.repeat(4, 1), bits=4)
    assert sum(".expert_" in line for line in report.allocation.splitlines()) == 8
    assert any(isinstance(module, SplitExperts) for module in compressed.modules())
    compressed.save_pretrained(tmp_path)
    found = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        assert torch.equal(found(input_ids=tokens).logits, compressed(input_ids=tokens).logits)


def test_experts_that_cannot_be_taken_apart_are_named() -> None:
    layer = torch.nn.Module()
    layer.experts = Experts(2, 4, 4)
    layer.experts.has_bias = True
    with pytest.raises(ValueError, match="the experts of experts are fused"):
        unfuse(layer)


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
def test_bad_settings_are_named(build: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build()
