"""A server under load."""

from typing import Any

import pytest

from nashswarm.measures.load import Load
from nashswarm.measures.measure import EvaluationTarget


def test_load_has_latency_and_throughput_of_both_models(target: EvaluationTarget) -> None:
    pytest.importorskip("fastapi", reason="not installed")
    metrics, series = Load(requests=6, concurrency=2, prompt_tokens=8, new_tokens=3).measure(target)
    names = ("latency_p50_ms", "latency_p95_ms", "latency_p99_ms", "tokens_per_second", "shed_rate", "error_rate")
    every = {f"{name}{end}" for name in (*names, "resident_spread") for end in ("", "_full")}
    assert set(metrics) == every | {"latency_p95_ratio"}
    for end in ("", "_full"):
        held = series[f"resident_mb{end}"]
        assert min(held) > 100 and metrics[f"resident_spread{end}"] == pytest.approx(1 - min(held) / max(held))
        assert len(series[f"latency_ms{end}"]) == 6
        assert metrics[f"error_rate{end}"] == 0 < metrics[f"tokens_per_second{end}"]
        assert 0 < metrics[f"latency_p50_ms{end}"] <= metrics[f"latency_p95_ms{end}"] <= metrics[f"latency_p99_ms{end}"]
    assert metrics["latency_p95_ratio"] == metrics["latency_p95_ms_full"] / metrics["latency_p95_ms"]


def test_load_failing_model_counts_errors(target: EvaluationTarget, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("fastapi", reason="not installed")

    def broken(**_: Any) -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(target.packed(), "forward", broken)
    metrics, _ = Load(requests=4, concurrency=2, prompt_tokens=8, new_tokens=2).measure(target)
    assert metrics["error_rate"] == 1 and metrics["tokens_per_second"] == 0 == metrics["error_rate_full"]
