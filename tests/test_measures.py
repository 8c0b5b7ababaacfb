"""Every measure keeps its promises on the tiny model."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from nashswarm import metrics
from nashswarm.measures import Load, Measure, Quality, Size, Speed, Subject
from nashswarm.quant.calibration import no_track


@pytest.fixture
def subject(tiny: Any, model: Any, token_windows: Tensor) -> Subject:
    """The tiny model and a copy with coarser weights."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_((parameter * 16).round() / 16)
    return Subject(tiny, model, token_windows, lambda size: metrics.reference(tiny, token_windows, size), no_track)


def test_every_measure_is_one() -> None:
    assert all(isinstance(measure, Measure) for measure in (Quality(), Size(), Speed(), Load()))


def test_size_runs_nothing(token_windows: Tensor) -> None:
    def never(batch_size: int) -> metrics.Reference:
        raise AssertionError

    assert Size().measure(Subject(None, None, token_windows, never, no_track)) == ({}, {})


def test_quality(subject: Subject) -> None:
    found, series = Quality(batch_size=2).measure(subject)
    assert set(found) == {
        "nll", "tokens", "nll_delta", "nll_delta_low", "nll_delta_high", "kl", "kl_low", "kl_high", "top1_agreement",
    }  # fmt: skip
    assert set(series) == {"nll", "tokens", "nll_full", "kl", "top1_agreement"}
    assert all(len(values) == len(subject.windows) for values in series.values())
    assert found["tokens"] == subject.windows.numel() - len(subject.windows)
    assert 0 < found["kl_low"] <= found["kl"] <= found["kl_high"]
    assert found["nll_delta_low"] <= found["nll_delta"] <= found["nll_delta_high"]
    assert 0 < found["top1_agreement"] < 1
    own = metrics.evaluate(subject.compressed, subject.windows, 2)
    assert found["nll"] == pytest.approx(metrics.summarise(own)["nll"])


def test_quality_refuses_logits_that_are_not_finite(subject: Subject) -> None:
    with torch.no_grad():
        subject.compressed.transformer.ln_f.weight.fill_(math.inf)
    with pytest.raises(ValueError, match=r"not finite on the test text; raise method\.bits"):
        Quality(batch_size=2).measure(subject)


def test_speed(subject: Subject) -> None:
    found, series = Speed(prompt_tokens=8, new_tokens=4, repeats=5).measure(subject)
    assert set(found) == {
        "decode_ms", "decode_full_ms", "prefill_tokens_per_second", "prefill_tokens_per_second_full",
        "decode_ratio", "decode_ratio_low", "decode_ratio_high",
    }  # fmt: skip
    assert {name: len(values) for name, values in series.items()} == {"decode_ms": 5, "decode_ms_full": 5}
    assert all(value > 0 for value in found.values())
    assert 0.05 < found["decode_ratio"] < 20  # the same kernels
    assert min(series["decode_ms"]) <= found["decode_ms"] <= max(series["decode_ms"])


def test_load(subject: Subject) -> None:
    found, series = Load(requests=6, concurrency=2, prompt_tokens=8, new_tokens=3).measure(subject)
    assert set(found) == {"latency_p50_ms", "latency_p95_ms", "latency_p99_ms", "tokens_per_second", "error_rate"}
    assert len(series["latency_ms"]) == 6 and found["error_rate"] == 0 and found["tokens_per_second"] > 0
    assert 0 < found["latency_p50_ms"] <= found["latency_p95_ms"] <= found["latency_p99_ms"]


def test_load_counts_requests_that_fail(subject: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(**_: Any) -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(subject.compressed, "forward", broken)
    found, _ = Load(requests=4, concurrency=2, prompt_tokens=8, new_tokens=2).measure(subject)
    assert found["error_rate"] == 1 and found["tokens_per_second"] == 0


@pytest.mark.parametrize(
    "measure",
    [Speed(prompt_tokens=20, new_tokens=5), Speed(new_tokens=13), Load(prompt_tokens=20, new_tokens=5), Load()],
)
def test_prompts_longer_than_the_window_are_refused(subject: Subject, measure: Speed | Load) -> None:
    with pytest.raises(ValueError, match=r"measure\.prompt_tokens.* exceed the window of 24"):
        measure.measure(subject)


def test_decoding_is_greedy_and_counts_the_tokens(subject: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    """The cached path reads the tokens that generating without a cache would."""
    read: list[Tensor] = []
    forward = subject.compressed.forward
    monkeypatch.setattr(subject.compressed, "forward", lambda **kw: (read.append(kw["input_ids"]), forward(**kw))[1])
    from nashswarm.measures import _generate

    prompt = subject.windows[:1, :8]
    prefill, decode = _generate(subject.compressed, prompt, 5)
    assert prefill > 0 and decode > 0
    tokens = prompt
    with torch.no_grad():
        for _ in range(5):
            tokens = torch.cat([tokens, forward(input_ids=tokens).logits[:, -1:].argmax(-1)], 1)
    assert torch.equal(torch.cat(read, 1), tokens)
