"""The training loss against sums by hand."""

import numpy as np
import pytest
import torch
from torch import Tensor

from nashswarm.moe import loss
from nashswarm.moe.router.nash_swarm import NashSwarmRouter
from nashswarm.moe.routing import regrets
from tests.moe.cases import EXPERTS, router_of


def test_loss_terms_equal_sums_by_hand(x: Tensor) -> None:
    router = router_of(NashSwarmRouter(flock=3))
    router.resident[:4] = True
    routing = router(x)
    chances = routing.logits.softmax(1).tolist()
    counts = np.bincount(routing.experts.flatten().numpy(), minlength=EXPERTS)
    terms = loss.terms([routing], 12, 2.0)
    shares = [counts[e] / len(x) * sum(row[e] for row in chances) / len(x) for e in range(EXPERTS)]
    assert terms["balance"].item() == pytest.approx(EXPERTS * sum(shares), rel=1e-5)
    assert terms["cache"].item() == pytest.approx(sum(sum(row[:4]) for row in chances) / len(x), rel=1e-5)
    agreements = [sum(chances[t][e] * chances[t - 1][e] for e in range(EXPERTS)) for t in range(len(x)) if t % 12 > 0]
    assert terms["swarm"].item() == pytest.approx(np.mean(agreements), rel=1e-5)
    prices = router.price + 2.0 * torch.from_numpy(counts / counts.mean() - 1).float()
    assert terms["nash"].item() == pytest.approx(
        regrets(routing.logits, routing.experts, prices).mean().item(), rel=1e-5
    )
    weights = loss.LossWeights(balance=0.1, cache=0.2, swarm=0.3, nash=0.4)
    parts = {name: value.item() for name, value in terms.items()}
    wanted = 5 + 0.1 * parts["balance"] - 0.2 * parts["cache"] - 0.3 * parts["swarm"] + 0.4 * parts["nash"]
    assert loss.total(torch.tensor(5.0), terms, weights).item() == pytest.approx(wanted)


@pytest.mark.parametrize("name", loss.TERMS)
def test_loss_term_of_weight_zero_takes_no_part(name: str) -> None:
    part = torch.tensor(3.0, requires_grad=True)
    parts = {other: part if other == name else torch.zeros(()) for other in loss.TERMS}
    off, on = (loss.total(torch.tensor(1.0), parts, loss.LossWeights(**{name: value})) for value in (0.0, 0.5))
    assert off.item() == 1 and not off.requires_grad
    assert on.item() == 1 + loss.SIGNS[name] * 1.5
    with pytest.raises(ValueError, match=f"method.loss.{name}=-1.0 must not be negative"):
        loss.LossWeights(**{name: -1.0})
