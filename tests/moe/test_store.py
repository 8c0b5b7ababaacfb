"""Experts from a file: budget, eviction, and a model that is served from it."""

import copy
import dataclasses
import pathlib
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional

from nashswarm.measures.moe.routed import one_by_one
from nashswarm.moe import store
from nashswarm.moe.model import MoeForCausalLM
from nashswarm.moe.router.nash_swarm import NashSwarmRouter
from nashswarm.runtime.machine import Machine
from tests.moe.cases import EXPERTS, model_of


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
def test_store_any_requests_stay_in_budget_and_lose_no_expert(
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
        experts = model.blocks[layer].mixture.experts
        assert torch.equal(up, experts.up_proj[expert]) and torch.equal(down, experts.down_proj[expert])
        assert held.held_bytes == len(memory) * size <= held.budget_bytes
        resident = held.resident(f"blocks.{layer}.mixture.experts")
        assert torch.nonzero(resident).flatten().tolist() == sorted(e for at, e in memory if at == layer)
    assert (held.hits, held.misses) == (hits, len(asked) - hits)
    assert held.evictions == held.misses - len(memory) and held.bytes_read == held.misses * size


def test_direct_reads_give_the_same_experts(stored: Any) -> None:
    model, path = stored
    direct = store.ExpertStore(path, 1 << 20, direct=True)
    for number in range(EXPERTS):
        for layer in range(2):
            experts = model.blocks[layer].mixture.experts
            up, down = direct.fetch(f"blocks.{layer}.mixture.experts", number)
            assert torch.equal(up, experts.up_proj[number]) and torch.equal(down, experts.down_proj[number])
    assert direct.misses == 2 * EXPERTS and direct.read_seconds > 0


def test_direct_reads_where_there_are_none_are_refused(stored: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Any, flags: int) -> int:
        raise OSError(22, "Invalid argument")

    monkeypatch.setattr(store.os, "open", refuse)
    with pytest.raises(ValueError, match=r"has no direct reads .*Invalid argument.*choose a folder on a disk"):
        store.DirectFile(stored[1])


def test_store_budget_below_one_expert_is_refused(stored: Any) -> None:
    with pytest.raises(ValueError, match=r"a budget of 100 bytes holds no expert of 32,768 bytes"):
        store.ExpertStore(stored[1], 100)


def test_store_default_budget_is_last_level_cache(stored: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    here = Machine("", 1, {1: 1 << 15, 2: 1 << 20}, {1: 1, 2: 1}, ())
    monkeypatch.setattr(store, "read_machine", lambda: here)
    assert store.ExpertStore(stored[1]).budget_bytes == 1 << 20
    monkeypatch.setattr(store, "read_machine", lambda: dataclasses.replace(here, assumed=(1, 2)))
    with pytest.raises(ValueError, match="does not tell the size of its caches: give budget_bytes"):
        store.ExpertStore(stored[1])


def test_served_model_same_nll_and_residency_brings_hits(stored: Any, tokens: Tensor) -> None:
    model, path = stored
    hits, nlls = [], []
    for residency in (0.0, 5.0):
        served = copy.deepcopy(model)
        for router in served.routers():
            router.residency = residency
        held = store.ExpertStore(path, 8 * 32768)
        store.serve(served, held)
        nlls.append([nll for window in tokens[:2] for nll in one_by_one(served, window, 40)])
        hits.append(held.hits / (held.hits + held.misses))
    with torch.no_grad():
        wanted = functional.cross_entropy(
            model(input_ids=tokens).logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten(), reduction="none"
        )
    assert nlls[0] == pytest.approx(wanted[: len(nlls[0])].tolist(), abs=1e-4)
    assert hits[1] > hits[0]
