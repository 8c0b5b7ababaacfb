"""Prices that are solved on a causal window: what they depend on, that they even another text, and the curve."""

from typing import Any

import pytest
import torch
from torch import Tensor

from nashswarm.measures.moe.balance_curve import BalanceCurve
from nashswarm.measures.moe.target import MoeTarget
from nashswarm.moe import load
from nashswarm.moe.price_window import PriceWindow
from nashswarm.moe.router.equilibrium import equilibrium
from nashswarm.moe.router.nash_swarm import NashSwarmRouter
from nashswarm.moe.router.quantile import QuantileBalance
from nashswarm.moe.router.router import Router
from nashswarm.moe.router.top_k import TopK
from nashswarm.moe.training import Trained
from nashswarm.progress import no_track
from tests.moe.cases import EXPERTS, VOCABULARY, WIDTH, K, model_of, router_of

SOLVE = [NashSwarmRouter(flock=3), NashSwarmRouter(flock=None), QuantileBalance(rounds=3)]


def read(router: Router, window: PriceWindow, batches: list[Tensor]) -> Tensor:
    """Route the batches one after another, each at the prices of those before, and return the loads of all."""
    loads = torch.zeros(EXPERTS)
    for x in batches:
        routing = router(x)
        loads += routing.loads()
        window.follow(routing)
    return loads


def other_text(batches: int, tokens: int = 48) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    shift = torch.randn(WIDTH, generator=generator)
    return [torch.randn(tokens, WIDTH, generator=generator) + shift for _ in range(batches)]


@pytest.mark.parametrize("kind", SOLVE, ids=["flock_of_3", "nash_swarm", "quantile"])
def test_window_evens_the_load_of_another_text(kind: Any) -> None:
    router, batches = router_of(kind).eval(), other_text(40)
    with torch.no_grad():
        frozen = load.max_violation(sum(router(x).loads() for x in batches[10:]).double().numpy())  # type: ignore[union-attr]
        window = PriceWindow(router, 480)
        read(router, window, batches[:10])
        following = load.max_violation(read(router, window, batches[10:]).double().numpy())
    assert following < 0.2 * frozen


@torch.no_grad()
def test_prices_equal_solutions_by_hand() -> None:
    """On the last tokens; a part full window moves prices by that part of the way from those of training."""
    kind, batches = NashSwarmRouter(flock=None), other_text(6)
    router = router_of(kind)
    trained, affinities = router.price.clone(), [router(x).logits for x in batches]
    window, solved = PriceWindow(router, 100), trained
    for number, x in enumerate(batches):
        window.follow(router(x))
        last = torch.cat(affinities[: number + 1])[-100:]
        solved = equilibrium(last, K, solved, kind.sweeps)
        assert torch.allclose(router.price, trained + len(last) / 100 * (solved - trained), atol=1e-6)


@torch.no_grad()
def test_batch_is_routed_at_prices_of_earlier_tokens() -> None:
    router, (before, batch) = router_of(NashSwarmRouter()), other_text(2)
    window = PriceWindow(router, 64)
    window.follow(router(before))
    routing, changed = router(batch), batch.clone()
    changed[20:] += 3
    assert torch.equal(router(changed).experts[:20], routing.experts[:20])


@pytest.mark.parametrize(
    "kind, tokens, message",
    [
        (TopK(), 8, "a TopKRouter with these settings does not solve for prices"),
        (NashSwarmRouter(prices="sign"), 8, "a CongestionRouter with these settings does not solve"),
        (QuantileBalance(), 0, "a window of 0 tokens is empty"),
    ],
)
def test_window_that_cannot_be_is_named(kind: Any, tokens: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PriceWindow(router_of(kind), tokens)


@pytest.mark.parametrize(
    "kind", [NashSwarmRouter(flock=None), QuantileBalance(), TopK()], ids=["nash", "quantile", "top"]
)
def test_balance_curve_has_the_points_that_a_router_can_follow(kind: Any) -> None:
    model = model_of(kind, layers=1).eval()
    windows = torch.randint(VOCABULARY, (12, 16), generator=torch.Generator().manual_seed(1))
    before = {name: part.clone() for name, part in model.state_dict().items()}
    measure = BalanceCurve(rates=[0.1], price_windows=[64])
    metrics, series = measure.measure(MoeTarget(Trained(model, None, {}, ""), windows, windows, no_track))
    points = {name.removeprefix("nll") for name in metrics if name.startswith("nll_")}
    followed = {"_rate_0.1"} if isinstance(kind, NashSwarmRouter) else set()
    assert points - {"_low", "_high"} == (followed | {"_window_64"} if model.routers()[0].solves else set())
    assert all(torch.equal(part, before[name]) for name, part in model.state_dict().items())
    assert len(series["nll"]) == 12
    for point in points & {"_window_64"}:
        assert metrics["max_violation_window_64"] < metrics["max_violation"], point


def test_points_that_cannot_be_are_named() -> None:
    with pytest.raises(ValueError, match=r"measure\.price_windows=\[0\] must be at least 1"):
        BalanceCurve(price_windows=[0])
