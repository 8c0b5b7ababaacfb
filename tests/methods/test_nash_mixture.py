"""Mixtures compressed as one game, on a tiny model: traffic and prices against slow second implementations."""

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from nashswarm.calibration import expert_traffic
from nashswarm.calibration.cache import Cache
from nashswarm.calibration.session import CalibrationSession
from nashswarm.methods import nash_mixture
from nashswarm.methods.nash_mixture import STEPS, NashMixture
from nashswarm.methods.nash_swarm.settings import NashSwarm
from nashswarm.models import matrices
from nashswarm.models.split_experts import unfuse
from nashswarm.moe.router.nash_swarm import NashSwarmRouter
from nashswarm.moe.router.top_k import TopK
from tests.moe.cases import EXPERTS, VOCABULARY, K, model_of

SMALL = NashMixture(bits=8.0, rates=(2, 4, 6), sweeps=0, rounds=1, replies=1)
PRICE = "blocks.0.mixture.router.price"


def session_of(kind: Any = TopK()) -> CalibrationSession:  # noqa: B008  frozen
    model = model_of(kind, layers=1, width=64, expert_width=16).eval()
    unfuse(model)
    windows = torch.randint(VOCABULARY, (6, 24), generator=torch.Generator().manual_seed(4))
    layers = matrices.find_layers(model)
    return CalibrationSession(model, layers, windows[:4], windows[4:], 0, Cache(None, {}))


@pytest.fixture(scope="module")
def session() -> CalibrationSession:
    return session_of()


def chosen(session: CalibrationSession) -> Tensor:
    """The experts of every calibration token, as the model itself reports them."""
    with torch.no_grad():
        return session.full(input_ids=session.calibration).routings[0].experts


def test_traffic_is_the_share_of_tokens_that_routing_reports(session: CalibrationSession) -> None:
    experts = session.context().experts
    assert experts is not None
    for prices in (experts.prices, {PRICE: torch.linspace(-1, 1, EXPERTS)}):
        with expert_traffic.at_prices(session.full, prices):
            rows = chosen(session).tolist()
        traffic = experts.traffic(prices)
        for expert in range(EXPERTS):
            seen = sum(expert in row for row in rows)
            for role in ("up", "down"):
                name = f"blocks.0.mixture.experts.{expert}.expert_{role}"
                assert traffic[name] == pytest.approx(max(seen, 1) / len(rows))
    assert len(traffic) == 2 * EXPERTS
    assert sum(traffic.values()) >= 2 * K - 1e-9


def test_without_traffic_inputs_are_means_over_the_tokens_of_an_expert(session: CalibrationSession) -> None:
    context = session.context()
    assert context.experts is not None
    traffic = context.experts.traffic(context.experts.prices)
    blind = expert_traffic.without_traffic(context.zipf_moments(), traffic)
    seen: dict[str, list[Tensor]] = {}
    name = "blocks.0.mixture.experts.{}.expert_up"
    hooks = [
        session.full.get_submodule(name.format(expert)).register_forward_pre_hook(
            lambda module, arguments, expert=expert: seen.setdefault(name.format(expert), []).append(arguments[0])
        )
        for expert in range(EXPERTS)
    ]
    with torch.no_grad():
        session.full(input_ids=session.calibration)
    for hook in hooks:
        hook.remove()
    mean = np.mean([traffic[name.format(expert)] for expert in range(EXPERTS)])
    for module, parts in seen.items():
        x = torch.cat(parts)
        torch.testing.assert_close(blind[module].inputs, mean * (x.T @ x) / len(x), rtol=2e-2, atol=2e-3)
    other = "blocks.0.attention.qkv"
    assert torch.equal(blind[other].inputs, context.zipf_moments()[other].inputs)


def test_weight_is_nash_swarm_and_blind_is_not(session: CalibrationSession) -> None:
    own = NashSwarm(bits=8.0, rates=(2, 4, 6), sweeps=0, rounds=1).compress(session.context(), np.random.default_rng(0))
    by_traffic = {
        name: dataclasses.replace(SMALL, traffic=name).compress(session.context(), np.random.default_rng(0))
        for name in ("weight", "blind")
    }
    assert by_traffic["weight"].allocation == own.allocation != by_traffic["blind"].allocation
    assert not by_traffic["weight"].prices


@pytest.mark.slow
def test_joint_lowers_the_divergence_that_it_reports_and_stores_its_prices(monkeypatch: pytest.MonkeyPatch) -> None:
    session = session_of(NashSwarmRouter())
    context = session.context()
    assert context.experts is not None
    weighed = dataclasses.replace(SMALL, traffic="weight").compress(context, np.random.default_rng(0))
    before = context.experts.heldout_kl(weighed.weights, context.experts.prices)
    result = SMALL.compress(context, np.random.default_rng(0))
    history = result.series["heldout_kl_of_reply"]
    assert history[0] == pytest.approx(before) and history == sorted(history, reverse=True)
    monkeypatch.setattr(nash_mixture, "STEPS", (-1.0, 0.0))  # an answer that is sure to be at least as good
    answered = SMALL.compress(context, np.random.default_rng(0))
    moved = {PRICE: answered.prices[PRICE] + 0.25}  # what all experts pay changes no routing
    session.store(answered.packed, answered.weights, answered.float_bits, prices=moved)
    stored = expert_traffic.prices_of(session.candidate_model)[PRICE]
    torch.testing.assert_close(stored, moved[PRICE].half().float())
    assert torch.equal(expert_traffic.prices_of(session.full)[PRICE], context.experts.prices[PRICE])


def test_best_prices_are_those_of_the_best_of_all_steps(session: CalibrationSession) -> None:
    experts = session.context().experts
    assert experts is not None
    generator = torch.Generator().manual_seed(1)
    weights = {
        layer.name: layer.weight + 0.2 * layer.weight.std() * torch.randn(layer.weight.shape, generator=generator)
        for layer in session.layers
    }
    damage = {layer.name: float(number) for number, layer in enumerate(session.layers)}
    traffic = experts.traffic(experts.prices)
    costs = nash_mixture.token_costs(damage, traffic, experts.prices)
    expected = [0.0] * EXPERTS
    for module, share in traffic.items():
        expected[int(module.split("experts.")[1].split(".")[0])] += damage[module] / share
    torch.testing.assert_close(costs[PRICE], torch.tensor(expected))
    answer, divergence = nash_mixture.best_prices(experts, weights, experts.prices, costs)
    tried = {}
    for step in STEPS:
        price = [step * (cost / np.mean(expected) - 1) for cost in expected]
        tried[step] = experts.heldout_kl(weights, {PRICE: experts.prices[PRICE] + torch.tensor(price)})
    assert divergence == pytest.approx(min(tried.values()))
    best = min(tried, key=lambda step: tried[step])
    relative = torch.tensor(expected) / np.mean(expected) - 1
    torch.testing.assert_close(answer[PRICE], experts.prices[PRICE] + best * relative)


def test_costs_of_an_expert_without_damage_move_no_price() -> None:
    assert nash_mixture.relative(torch.zeros(3)).tolist() == [0.0, 0.0, 0.0]
    assert nash_mixture.relative(torch.tensor([1.0, 3.0])).tolist() == [-0.5, 0.5]


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"replies": 0}, "method.replies=0"),
        ({"effort": "quick"}, "method.effort"),
        ({"gradients_at": "compressed"}, "method.gradients_at"),
    ],
)
def test_settings_without_a_meaning_are_refused(changed: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(SMALL, **changed)


def test_an_unknown_treatment_of_traffic_names_the_known_ones() -> None:
    settings = dataclasses.replace(SMALL)
    object.__setattr__(settings, "traffic", "none")
    with pytest.raises(ValueError, match=r"unknown method\.traffic 'none': choose blind, weight, joint"):
        settings.__post_init__()


def test_models_without_experts_or_prices_are_refused(session: CalibrationSession) -> None:
    context = session.context()
    assert context.experts is not None
    dense = dataclasses.replace(context, experts=dataclasses.replace(context.experts, traffic=lambda prices: {}))
    with pytest.raises(ValueError, match="no routed experts"):
        SMALL.compress(dense, np.random.default_rng(0))
    bare = dataclasses.replace(context, experts=dataclasses.replace(context.experts, prices={}))
    with pytest.raises(ValueError, match="keep no prices"):
        SMALL.compress(bare, np.random.default_rng(0))
