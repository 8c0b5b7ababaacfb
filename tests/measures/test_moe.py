"""Measures of mixtures of experts: on the device of the model, timed until it has finished, and with valid sizes."""

import pathlib
from typing import Any

import pytest
import torch

from nashswarm.measures.moe import routing_time
from nashswarm.measures.moe.quick_validation import QuickValidation
from nashswarm.measures.moe.routed import Routed
from nashswarm.measures.moe.routing_time import RoutingTime
from nashswarm.measures.moe.target import MoeTarget
from nashswarm.models import experts as moe_experts
from nashswarm.moe import store
from nashswarm.moe.model import MoeForCausalLM, MoeSource
from nashswarm.moe.router import nash_swarm
from nashswarm.moe.router.nash_swarm import NashSwarmRouter
from nashswarm.moe.training import Trained
from nashswarm.progress import no_track

LAYER = "blocks.0.mixture.experts"
META = torch.device("meta")  # tensors without values: they mix with none that lie elsewhere


@pytest.fixture
def model() -> MoeForCausalLM:
    torch.manual_seed(0)
    return MoeSource(width=32, layers=1, experts=4, expert_width=32, context=16).build(NashSwarmRouter(), 64, 0).eval()


def target_of(model: MoeForCausalLM) -> MoeTarget:
    windows = torch.zeros(4, 16, dtype=torch.int64, device=model.device)
    return MoeTarget(Trained(model, None, {}, ""), windows, windows, no_track)


def test_routing_time_runs_on_the_device_of_the_model(model: MoeForCausalLM, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[torch.device] = []

    def once(contestants: Any, repeats: int, device: torch.device) -> dict[str, float]:
        for contestant in contestants.values():
            contestant()
        seen.append(device)
        return dict.fromkeys(contestants, 1.0)

    for module in (moe_experts, nash_swarm):  # torch's knows no float32 without values
        monkeypatch.setattr(module, "grouped", lambda x, weights, ends: x @ weights[0])
    monkeypatch.setattr(routing_time, "medians", once)
    monkeypatch.setattr(routing_time, "first_version", lambda x, router: x @ router.weight.T)
    metrics, _ = RoutingTime(tokens=8, experts=[8]).measure(target_of(model.to(META)))
    assert metrics["route_plain_8"] == 1e6 / 8 and set(seen) == {META}


def test_store_holds_experts_on_its_device(model: MoeForCausalLM, tmp_path: pathlib.Path) -> None:
    store.save(model, tmp_path / "experts")
    assert {part.device for part in store.ExpertStore(tmp_path / "experts", 1 << 20, META).fetch(LAYER, 0)} == {META}
    own = store.ExpertStore(tmp_path / "experts", 1 << 20).fetch(LAYER, 0)
    assert torch.equal(own[0], model.get_submodule(LAYER).up_proj[0])  # type: ignore[index]


@pytest.mark.parametrize(
    "build, message",
    [
        (lambda: Routed(batch_size=0), "measure.batch_size=0 must be at least 1"),
        (lambda: Routed(repeats=0, served_tokens=-3), "measure.repeats=0, measure.served_tokens=-3 must be at least 1"),
        (lambda: Routed(windows=0), "measure.windows=0 must be at least 1"),
        (lambda: Routed(resident=0.0), "measure.resident=0.0 must be above 0 and at most 1"),
        (lambda: Routed(resident=1.5), "measure.resident=1.5 must be above 0 and at most 1"),
        (lambda: QuickValidation(batches=-1), "measure.batches=-1 must be at least 1"),
        (lambda: QuickValidation(length=1), "measure.length=1 must be at least 2"),
        (lambda: QuickValidation(bits=0.0), "measure.bits=0.0 must be positive"),
        (lambda: RoutingTime(tokens=0), "measure.tokens=0 must be at least 1"),
        (lambda: RoutingTime(experts=[8, 0]), r"measure.experts=\[8,0\] must be numbers of at least 1"),
        (lambda: RoutingTime(experts=[]), r"measure.experts=\[\] must be numbers of at least 1"),
    ],
)
def test_measure_sizes_below_one_are_named(build: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build()


@pytest.mark.slow
def test_quick_validation_one_batch_is_timed_after_warm_up(model: MoeForCausalLM) -> None:
    metrics, _ = QuickValidation(batch_size=2, length=16, batches=1, bits=4.0).measure(target_of(model))
    assert 0 < metrics["latency_ms"] < float("inf") and 0 < metrics["tokens_per_second_quantized"] < float("inf")
