"""Each matrix compressed alone, against copies made by hand."""

import copy
import dataclasses
from typing import Any

import numpy as np
import pytest
import torch

from nashswarm.measures.generation import Bleu
from nashswarm.measures.layers import Layers
from nashswarm.measures.measure import EvaluationTarget
from nashswarm.models import evaluation
from nashswarm.records import statistics


def test_layers_equal_copies_with_one_matrix_compressed(target: EvaluationTarget, tiny: Any) -> None:
    """By hand: a fresh copy of the full model per matrix, one window at a time."""
    metrics, series = Layers(windows=3).measure(target)
    windows, full = target.windows[:3], evaluation.compute_reference(tiny, target.windows[:3], 1)
    floats = dict(target.compressed.named_parameters())
    for place, layer in enumerate(target.layers):
        alone = copy.deepcopy(tiny)
        with torch.no_grad():
            name = f"{layer.name}.weight"
            dict(alone.named_parameters())[name].copy_(floats[name])
        expected = evaluation.summarise(evaluation.evaluate(alone, windows, 1, full))
        assert series["layer_kl"][place] == pytest.approx(expected["kl"], rel=1e-3)
        assert series["layer_nll_delta"][place] == pytest.approx(expected["nll_delta"], abs=1e-6)
        assert series["layer_kl_low"][place] <= series["layer_kl"][place] <= series["layer_kl_high"][place]
    assert set(series) == {"layer_kl", "layer_kl_low", "layer_kl_high", "layer_nll_delta"}
    assert all(len(values) == len(target.layers) for values in series.values())
    assert metrics["layer_kl_sum"] == pytest.approx(sum(series["layer_kl"]))
    whole = evaluation.summarise(evaluation.evaluate(target.compressed, windows, 3, full))
    assert metrics["kl_together"] == pytest.approx(whole["kl"], rel=1e-3)
    predicted = [target.damage[layer.name] for layer in target.layers]
    correlations = statistics.correlations(predicted, series["layer_kl"])
    assert (metrics["damage_pearson"], metrics["damage_spearman"]) == correlations
    assert metrics["damage_pearson"] == pytest.approx(np.corrcoef(predicted, series["layer_kl"])[0, 1])


def test_layers_runs_the_reported_forward_passes(target: EvaluationTarget, monkeypatch: pytest.MonkeyPatch) -> None:
    passes = 0
    forward = type(target.full).forward

    def counted(*given: Any, **named: Any) -> Any:
        nonlocal passes
        passes += 1
        return forward(*given, **named)

    monkeypatch.setattr(type(target.full), "forward", counted)
    metrics, _ = Layers(windows=5).measure(target)
    assert metrics["forward_passes"] == passes == len(target.layers) + 2


def test_layers_without_predictions_have_no_correlation(target: EvaluationTarget) -> None:
    metrics, _ = Layers(windows=2).measure(dataclasses.replace(target, damage={}))
    assert set(metrics) == {"layer_kl_sum", "kl_together", "forward_passes"}


@pytest.mark.parametrize("measure", [Layers(windows=6), Bleu(windows=6), Bleu(windows=0)])
def test_measure_more_windows_than_there_are_is_refused(target: EvaluationTarget, measure: Layers | Bleu) -> None:
    with pytest.raises(
        ValueError, match=rf"measure\.windows={measure.windows} must be between 1 and the 5 test windows"
    ):
        measure.measure(target)
