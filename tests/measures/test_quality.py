"""Distance from the full model, on the tiny model."""

import dataclasses
import math

import numpy as np
import pytest
import torch

from nashswarm.measures.measure import EvaluationTarget
from nashswarm.measures.quality import Quality
from nashswarm.models import evaluation


def test_quality_metrics_have_intervals(target: EvaluationTarget) -> None:
    metrics, series = Quality(batch_size=2).measure(target)
    assert set(metrics) == {
        "nll", "tokens", "nll_delta", "nll_delta_low", "nll_delta_high", "kl", "kl_low", "kl_high", "top1_agreement",
        "kl_median", "kl_p99",
    }  # fmt: skip
    assert set(series) == {"nll", "tokens", "nll_full", "kl", "top1_agreement"}
    assert all(len(values) == len(target.windows) for values in series.values())
    assert metrics["tokens"] == target.windows.numel() - len(target.windows)
    assert 0 < metrics["kl_low"] <= metrics["kl"] <= metrics["kl_high"]
    assert metrics["nll_delta_low"] <= metrics["nll_delta"] <= metrics["nll_delta_high"]
    assert 0 < metrics["top1_agreement"] < 1
    own = evaluation.evaluate(target.compressed, target.windows, 2)
    assert metrics["nll"] == pytest.approx(evaluation.summarise(own)["nll"])


def test_quality_tells_how_kl_is_spread_over_tokens(target: EvaluationTarget) -> None:
    seen = target.windows[:1]  # of five windows of 24 tokens, of 512
    metrics, series = Quality(batch_size=2).measure(dataclasses.replace(target, calibration=seen))
    full, kl, unseen = target.reference(2), [], []
    for number, window in enumerate(target.windows):
        with torch.no_grad():
            q = target.compressed(input_ids=window[None]).logits[0].double().log_softmax(-1)
        p = full.logits(number, slice(None)).double().log_softmax(-1)
        for place in range(len(window) - 1):
            kl.append(float((p[place].exp() * (p[place] - q[place])).sum().detach()))
            unseen.append(not {int(window[place]), int(window[place + 1])} <= set(seen[0].tolist()))
    assert metrics["kl_median"] == pytest.approx(sorted(kl)[(len(kl) - 1) // 2], abs=1e-6)
    assert metrics["kl_p99"] == pytest.approx(sorted(kl)[math.ceil(0.99 * len(kl)) - 1], abs=1e-6)
    assert metrics["kl_unseen"] == pytest.approx(np.mean(np.array(kl)[unseen]), abs=1e-6)
    assert metrics["unseen_tokens"] == sum(unseen) and 0 < sum(unseen) < len(unseen)
    assert "kl_unseen" not in evaluation.distribution(torch.tensor([kl]), seen, seen)
    assert series.keys() >= {"kl"}


def test_quality_infinite_logits_are_refused(target: EvaluationTarget) -> None:
    with torch.no_grad():
        target.compressed.transformer.ln_f.weight.fill_(math.inf)
    with pytest.raises(ValueError, match=r"not finite on the test text; raise method\.bits"):
        Quality(batch_size=2).measure(target)
