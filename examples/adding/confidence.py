"""A measure of one's own: how sure a model is of its next token."""

import dataclasses
from typing import Any

import numpy as np
import torch

from nashswarm.measures.measure import EvaluationTarget, MeasureResult
from nashswarm.records import statistics


@dataclasses.dataclass(frozen=True)
class Confidence:
    """The probability of the most probable next token, mean over the test windows: ``confidence``, of the full model
    ``confidence_full``, and of their paired difference ``confidence_delta`` with its interval."""

    batch_size: int = 8

    def measure(self, target: EvaluationTarget) -> MeasureResult:
        own, full = (self.by_window(model, target) for model in (target.compressed, target.full))
        deltas = np.subtract(own, full).tolist()
        low, high = statistics.interval(deltas)
        found = {
            "confidence": float(np.mean(own)),
            "confidence_full": float(np.mean(full)),
            "confidence_delta": float(np.mean(deltas)),
            "confidence_delta_low": low,
            "confidence_delta_high": high,
        }
        return found, {"confidence": own, "confidence_full": full}

    @torch.no_grad()
    def by_window(self, model: Any, target: EvaluationTarget) -> list[float]:
        found: list[float] = []
        for batch in target.track(target.windows.split(self.batch_size), "confidence"):
            chances = model(input_ids=batch).logits.float().softmax(-1)
            found += chances.amax(-1).double().mean(1).tolist()
        return found
