"""The timer of all measures."""

import functools

import pytest
import torch
from torch import Tensor

from nashswarm.measures import timing
from nashswarm.measures.measure import EvaluationTarget
from nashswarm.measures.timing import WARM_UP, interleaved, medians


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_medians_wait_for_the_device(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Earlier work of an accelerator does not count, and all work of the contestant does."""
    happened: list[str] = []
    monkeypatch.setattr(torch.accelerator, "synchronize", lambda where: happened.append(f"waited for {where}"))
    contestants = {name: functools.partial(happened.append, name) for name in ("one", "other")}
    medians(contestants, 2, torch.device(device))
    around = [] if device == "cpu" else [f"waited for {device}"]
    assert happened == [*around, "one", *around, *around, "other", *around] * (2 + WARM_UP)


def test_interleaved_contestants_take_turns_and_warm_up_is_dropped() -> None:
    turns: list[str] = []

    def turn(name: str) -> int:
        turns.append(name)
        return len(turns)

    contestants = {name: functools.partial(turn, name) for name in ("one", "other")}
    assert interleaved(contestants, rounds=2, warm_up=1) == {"one": [3, 5], "other": [4, 6]}
    assert turns == ["one", "other"] * 3


def test_generation_with_cache_reads_greedy_tokens(target: EvaluationTarget, monkeypatch: pytest.MonkeyPatch) -> None:
    """The cached path reads the tokens that generating without a cache would."""
    read: list[Tensor] = []
    forward = target.compressed.forward
    monkeypatch.setattr(target.compressed, "forward", lambda **kw: (read.append(kw["input_ids"]), forward(**kw))[1])
    prompt = target.windows[:1, :8]
    prefill, decode = timing.generation(target.compressed, prompt, 5)
    assert prefill > 0 and decode > 0
    tokens = prompt
    with torch.no_grad():
        for _ in range(5):
            tokens = torch.cat([tokens, forward(input_ids=tokens).logits[:, -1:].argmax(-1)], 1)
    assert torch.equal(torch.cat(read, 1), tokens)
