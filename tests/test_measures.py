"""Every measure keeps its promises on the tiny model."""

import copy
import functools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from nashswarm import checkpoint, metrics, peers
from nashswarm.linear import PackedMatrix
from nashswarm.measures import Load, Measure, Quality, Several, Size, Speed, Subject, resident_bytes
from nashswarm.models import find_layers
from nashswarm.quant.calibration import no_track
from nashswarm.quant.grid import Scheme, quantize
from nashswarm.quant.pack import pack


@pytest.fixture(scope="module")
def packed_model(tiny: Any) -> Any:
    """At 4 bits, in groups."""
    model = copy.deepcopy(tiny)
    layers = find_layers(model)
    checkpoint.adopt(model, layers, {layer.name: pack(quantize(layer.weight, 4, Scheme(64))) for layer in layers})
    return model


@pytest.fixture
def subject(tiny: Any, packed_model: Any, token_windows: Tensor) -> Subject:
    """The tiny model, its packed copy, and that copy's weights as floats."""
    own, floats = copy.deepcopy(packed_model), copy.deepcopy(packed_model)
    floats.dequantize()
    reference = functools.partial(metrics.reference, tiny, token_windows)
    return Subject(tiny, floats, lambda: own, token_windows, lambda size: reference(size), no_track)


def test_every_measure_is_one() -> None:
    assert all(isinstance(measure, Measure) for measure in (Quality(), Size(), Speed(), Load()))


@pytest.mark.parametrize("form", ["groups", "lattice"])
def test_size_runs_nothing_and_counts_what_is_loaded(
    form: str, tiny: Any, model: Any, packed: Callable[..., dict[str, np.ndarray]], token_windows: Tensor
) -> None:
    """By hand: a tied matrix once, the rest as floats; of a packed matrix its tiles and the order they are read in."""
    checkpoint.adopt(model, find_layers(model), packed(model, form))

    def never(batch_size: int) -> metrics.Reference:
        raise AssertionError

    found, series = Size().measure(Subject(tiny, None, lambda: model, token_windows, never, no_track))
    assert series == {} and set(found) == {"bytes_resident", "bytes_resident_full"}
    assert found["bytes_resident_full"] == 4 * sum(part.numel() for part in tiny.parameters())
    matrices = {module for module in model.modules() if isinstance(module, PackedMatrix)}
    others = 4 * sum(part.numel() for part in model.parameters())
    assert len(matrices) == 2 + 2 * 4
    assert found["bytes_resident"] == others + sum(matrix.tiles.nbytes for matrix in matrices)
    assert found["bytes_resident"] < found["bytes_resident_full"] / 2


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
    measure = Speed(prompt_tokens=8, context_tokens=3, new_tokens=4, repeats=5, against=["bfloat16"], quality_windows=3)
    found, series = measure.measure(subject)
    ratios = {f"{phase}_ratio{end}" for phase in ("decode", "decode_long", "prefill") for end in ("", "_low", "_high")}
    suffixes = ("", "_float32", "_bfloat16")
    expected = {name.replace("ratio", f"ratio{suffix}") for name in ratios for suffix in suffixes}
    for suffix in (*suffixes, "_full"):
        expected |= {
            f"decode_ms{suffix}",
            f"decode_long_ms{suffix}",
            f"prefill_tokens_per_second{suffix}",
            f"bytes_resident{suffix}",
        }
    assert set(found) == expected | {"kl_int8", "kl_float32"}
    names = ("full", "int8", "float32", "bfloat16")
    assert {name: len(values) for name, values in series.items()} == {f"decode_ms_{name}": 5 for name in names}
    assert all(value > 0 for value in found.values())
    for suffix in suffixes:
        assert 0.05 < found[f"decode_ratio{suffix}"] < 20
        assert (
            found[f"decode_ratio{suffix}_low"] <= found[f"decode_ratio{suffix}"] <= found[f"decode_ratio{suffix}_high"]
        )
    assert min(series["decode_ms_int8"]) <= found["decode_ms"] <= max(series["decode_ms_int8"])
    assert found["bytes_resident"] == found["bytes_resident_float32"] == resident_bytes(subject.packed())
    assert found["bytes_resident_bfloat16"] == found["bytes_resident_full"] / 2


def test_speed_tells_what_rounded_activations_cost(subject: Subject) -> None:
    found, _ = Speed(prompt_tokens=8, new_tokens=1, repeats=1, quality_windows=3).measure(subject)
    windows = subject.windows[:3]
    floats = metrics.evaluate(subject.compressed, windows, 1, subject.reference(1))
    assert found["kl_float32"] == pytest.approx(metrics.summarise(floats)["kl"], rel=1e-3)
    assert found["kl_int8"] != found["kl_float32"] and found["kl_int8"] == pytest.approx(found["kl_float32"], rel=0.2)


def test_an_unknown_contestant_is_refused() -> None:
    with pytest.raises(ValueError, match=r"unknown measure\.against 'onxruntime': choose among bfloat16"):
        Speed(against=["bfloat16", "onxruntime"])


def test_a_contestant_that_is_not_installed_is_not_timed(
    subject: Subject, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(peers, "ONNX_PACKAGES", ("no-such-package",))
    found, _ = Speed(prompt_tokens=4, new_tokens=1, repeats=1, against=["onnxruntime"], quality_windows=1).measure(
        subject
    )
    assert "decode_ms" in found and "decode_ms_onnxruntime" not in found
    assert "not timed: measure.against=onnxruntime needs no-such-package" in caplog.text


def test_load(subject: Subject) -> None:
    found, series = Load(requests=6, concurrency=2, prompt_tokens=8, new_tokens=3).measure(subject)
    assert set(found) == {"latency_p50_ms", "latency_p95_ms", "latency_p99_ms", "tokens_per_second", "error_rate"}
    assert len(series["latency_ms"]) == 6 and found["error_rate"] == 0 and found["tokens_per_second"] > 0
    assert 0 < found["latency_p50_ms"] <= found["latency_p95_ms"] <= found["latency_p99_ms"]


def test_load_counts_requests_that_fail(subject: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(**_: Any) -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(subject.packed(), "forward", broken)
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


def test_several_measures_are_taken_one_after_the_other(subject: Subject) -> None:
    parts = [Size(), Quality(batch_size=2)]
    found, series = Several(parts).measure(subject)
    alone = [part.measure(subject) for part in parts]
    assert found == alone[0][0] | alone[1][0] and series == alone[1][1]
