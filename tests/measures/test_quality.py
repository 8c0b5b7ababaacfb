"""Distance from the full model, on the tiny model."""

import math

import pytest
import torch

from nashswarm.measures.measure import EvaluationTarget
from nashswarm.measures.quality import Quality
from nashswarm.models import evaluation


def test_quality_metrics_have_intervals(target: EvaluationTarget) -> None:
    metrics, series = Quality(batch_size=2).measure(target)
    assert set(metrics) == {
        "nll", "tokens", "nll_delta", "nll_delta_low", "nll_delta_high", "kl", "kl_low", "kl_high", "top1_agreement",
    }  # fmt: skip
    assert set(series) == {"nll", "tokens", "nll_full", "kl", "top1_agreement"}
    assert all(len(values) == len(target.windows) for values in series.values())
    assert metrics["tokens"] == target.windows.numel() - len(target.windows)
    assert 0 < metrics["kl_low"] <= metrics["kl"] <= metrics["kl_high"]
    assert metrics["nll_delta_low"] <= metrics["nll_delta"] <= metrics["nll_delta_high"]
    assert 0 < metrics["top1_agreement"] < 1
    own = evaluation.evaluate(target.compressed, target.windows, 2)
    assert metrics["nll"] == pytest.approx(evaluation.summarise(own)["nll"])


def test_quality_infinite_logits_are_refused(target: EvaluationTarget) -> None:
    with torch.no_grad():
        target.compressed.transformer.ln_f.weight.fill_(math.inf)
    with pytest.raises(ValueError, match=r"not finite on the test text; raise method\.bits"):
        Quality(batch_size=2).measure(target)
