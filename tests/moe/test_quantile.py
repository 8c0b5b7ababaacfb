"""Quantile balancing against the linear programme, and against the prices of the congestion game."""

import itertools

import numpy as np
import pytest
import torch
from scipy.optimize import linprog
from torch import Tensor

from nashswarm.moe import load
from nashswarm.moe.router.equilibrium import equilibrium
from nashswarm.moe.router.quantile import QuantileBalance, dual_prices
from nashswarm.moe.routing import regrets
from tests.moe.cases import EXPERTS, K, router_of

INSTANCES = [(24, 4, 1, 0), (40, 4, 2, 1), (64, 8, 2, 2), (30, 6, 4, 3)]  # tokens, experts, k, seed


def affinities_of(tokens: int, experts: int, seed: int) -> Tensor:
    """Return affinities at which some experts are liked by all."""
    rng = np.random.default_rng(seed)
    return torch.from_numpy(rng.normal(size=(tokens, experts)) + rng.normal(size=experts))


def best_assignment(affinities: Tensor, k: int) -> tuple[float, Tensor]:
    """Solve the assignment at even load with scipy; return the largest total affinity and who uses whom."""
    tokens, experts = affinities.shape
    ones = np.kron(np.eye(tokens), np.ones(experts)), np.kron(np.ones(tokens), np.eye(experts))
    sums = [float(k)] * tokens + [tokens * k / experts] * experts
    solved = linprog(-affinities.numpy().ravel(), A_eq=np.vstack(ones), b_eq=sums, bounds=(0, 1))
    return -solved.fun, torch.from_numpy(solved.x.reshape(tokens, experts))


def dual_value(affinities: Tensor, k: int, price: Tensor) -> float:
    """Return the dual objective at these prices and the best levels, token by token."""
    share, value = len(affinities) * k / affinities.shape[1], 0.0
    for row in (affinities - price).tolist():
        level = sorted(row)[-k]
        value += k * level + sum(max(utility - level, 0) for utility in row)
    return value + share * float(price.sum())


@pytest.mark.parametrize("tokens, experts, k, seed", INSTANCES)
@pytest.mark.parametrize("solve", [dual_prices, lambda s, k, p, r: equilibrium(s, k, p, 3 * r)], ids=["dual", "game"])
def test_prices_support_the_assignment_that_linprog_finds(
    solve: object, tokens: int, experts: int, k: int, seed: int
) -> None:
    """Both rules: of themselves, tokens take what the linear programme gives them, and nobody regrets it."""
    affinities = affinities_of(tokens, experts, seed)
    price = solve(affinities, k, torch.zeros(experts, dtype=torch.float64), 100)  # type: ignore[operator]
    chosen = (affinities - price).topk(k).indices
    most, used = best_assignment(affinities, k)
    assert torch.equal(torch.zeros_like(used).scatter(1, chosen, 1.0), used.round())
    assert float(affinities.gather(1, chosen).sum()) == pytest.approx(most)
    assert dual_value(affinities, k, price) == pytest.approx(most)
    assert float(regrets(affinities, used.topk(k).indices, price).max()) < 1e-9


@pytest.mark.parametrize("tokens, experts, k, seed", [*INSTANCES, (20, 6, 2, 4), (3, 8, 1, 5)])
def test_dual_never_rises_nor_passes_the_optimum(tokens: int, experts: int, k: int, seed: int) -> None:
    """Also where an even share is no whole number of tokens."""
    affinities = affinities_of(tokens, experts, seed)
    price, most = torch.zeros(experts, dtype=torch.float64), best_assignment(affinities, k)[0]
    values = [dual_value(affinities, k, price)]
    for _ in range(20):
        price = dual_prices(affinities, k, price, 1)
        values.append(dual_value(affinities, k, price))
    assert all(after <= before + 1e-9 for before, after in itertools.pairwise(values))
    assert most - 1e-9 <= values[-1] < values[0]


def test_dual_prices_all_experts_used_are_zero() -> None:
    assert not dual_prices(affinities_of(12, 4, 0), 4, torch.ones(4, dtype=torch.float64), 3).any()


def test_settle_takes_one_round_of_the_batch_and_evens_it(x: Tensor) -> None:
    router = router_of(QuantileBalance()).train()
    before, routing = router.price.clone(), router(x)
    router.settle(routing)
    scores = (x @ router.weight.T).sigmoid().detach()
    utility = scores - before
    level = utility.sort(1, descending=True).values[:, K - 1 : K + 1].mean(1)
    share = len(x) * K // EXPERTS
    by_hand = torch.stack(
        [(column - level).sort(descending=True).values[share - 1 : share + 1].mean() for column in scores.T]
    )
    assert torch.allclose(router.price, by_hand - by_hand.mean(), atol=1e-6)
    for _ in range(50):
        router.settle(router(x))
    assert load.max_violation(router(x).loads().double().numpy()) < 0.2 * load.max_violation(
        routing.loads().double().numpy()
    )


def test_rounds_below_one_are_named() -> None:
    with pytest.raises(ValueError, match=r"method\.rounds=0 must be at least 1"):
        QuantileBalance(rounds=0)
