"""Times of the packed model against contestants."""

import dataclasses

import pytest

from nashswarm.measures.load import Load
from nashswarm.measures.measure import EvaluationTarget
from nashswarm.measures.size import resident_bytes
from nashswarm.measures.speed import Speed
from nashswarm.methods.peers import onnxruntime
from nashswarm.models import evaluation


def test_speed_contestants_have_times_ratios_and_bytes(target: EvaluationTarget) -> None:
    measure = Speed(prompt_tokens=8, context_tokens=3, new_tokens=4, repeats=5, against=["bfloat16"], quality_windows=3)
    metrics, series = measure.measure(target)
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
    assert set(metrics) == expected | {"kl_int8", "kl_float32"}
    names = ("full", "int8", "float32", "bfloat16")
    assert {name: len(values) for name, values in series.items()} == {f"decode_ms_{name}": 5 for name in names}
    assert all(value > 0 for value in metrics.values())
    for suffix in suffixes:
        assert 0.05 < metrics[f"decode_ratio{suffix}"] < 20
        low, ratio, high = (metrics[f"decode_ratio{suffix}{end}"] for end in ("_low", "", "_high"))
        assert low <= ratio <= high
    assert min(series["decode_ms_int8"]) <= metrics["decode_ms"] <= max(series["decode_ms_int8"])
    assert metrics["bytes_resident"] == metrics["bytes_resident_float32"] == resident_bytes(target.packed())
    assert metrics["bytes_resident_bfloat16"] == metrics["bytes_resident_full"] / 2


def test_speed_rounded_activations_cost_kl(target: EvaluationTarget) -> None:
    metrics, _ = Speed(prompt_tokens=8, new_tokens=1, repeats=1, quality_windows=3).measure(target)
    windows = target.windows[:3]
    floats = evaluation.evaluate(target.compressed, windows, 1, target.reference(1))
    assert metrics["kl_float32"] == pytest.approx(evaluation.summarise(floats)["kl"], rel=1e-3)
    assert metrics["kl_int8"] != metrics["kl_float32"]
    assert metrics["kl_int8"] == pytest.approx(metrics["kl_float32"], rel=0.2)


def test_speed_unknown_contestant_is_refused() -> None:
    with pytest.raises(ValueError, match=r"unknown measure\.against 'onxruntime': choose among bfloat16"):
        Speed(against=["bfloat16", "onxruntime"])


def test_speed_contestant_not_installed_is_not_timed(
    target: EvaluationTarget, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    absent = dataclasses.replace(onnxruntime.LIBRARY, needs=("no-such-package",))
    monkeypatch.setattr(onnxruntime, "LIBRARY", absent)
    metrics, _ = Speed(prompt_tokens=4, new_tokens=1, repeats=1, against=["onnxruntime"], quality_windows=1).measure(
        target
    )
    assert "decode_ms" in metrics and "decode_ms_onnxruntime" not in metrics
    assert "not timed: measure.against=onnxruntime needs no-such-package" in caplog.text


@pytest.mark.parametrize(
    "measure",
    [Speed(prompt_tokens=20, new_tokens=5), Speed(new_tokens=13), Load(prompt_tokens=20, new_tokens=5), Load()],
)
def test_prompt_longer_than_window_is_refused(target: EvaluationTarget, measure: Speed | Load) -> None:
    with pytest.raises(ValueError, match=r"measure\.prompt_tokens.* exceed the window of 24"):
        measure.measure(target)
