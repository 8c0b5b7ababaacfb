"""A measure of your own: how sure a model is of its next token."""

import dataclasses
from typing import Any

import numpy as np
import torch

from nashswarm.measures.measure import EvaluationTarget, MeasureResult
from nashswarm.records import statistics


@dataclasses.dataclass(frozen=True)
class Confidence:
    """The probability of the most probable next token, averaged over the test windows.

    ``confidence`` is the compressed model's, ``confidence_full`` the full model's, ``confidence_delta`` their paired
    difference, with its 95 % interval.
    """

    batch_size: int = 8

    def measure(self, target: EvaluationTarget) -> MeasureResult:
        compressed, full = (self.by_window(model, target) for model in (target.compressed, target.full))
        deltas = np.subtract(compressed, full).tolist()
        low, high = statistics.interval(deltas)
        metrics = {
            "confidence": float(np.mean(compressed)),
            "confidence_full": float(np.mean(full)),
            "confidence_delta": float(np.mean(deltas)),
            "confidence_delta_low": low,
            "confidence_delta_high": high,
        }
        return metrics, {"confidence": compressed, "confidence_full": full}

    @torch.no_grad()
    def by_window(self, model: Any, target: EvaluationTarget) -> list[float]:
        """Return the mean probability of every window."""
        means: list[float] = []
        for batch in target.track(target.windows.split(self.batch_size), "confidence"):
            chances = model(input_ids=batch).logits.float().softmax(-1)
            means += chances.amax(-1).double().mean(1).tolist()
        return means
