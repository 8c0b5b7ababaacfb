"""Distance from the full model on test text, and official scores of tasks."""

import dataclasses

import numpy as np

from nashswarm.measures import glue
from nashswarm.measures.measure import EvaluationTarget, Measure, MeasureResult, parts_of
from nashswarm.models import evaluation
from nashswarm.models.evaluation import BATCH
from nashswarm.records import statistics


@dataclasses.dataclass(frozen=True)
class Quality:
    """NLL and KL in nats per token and top-1 agreement on the test windows, with bootstrap intervals over windows.

    KL also as median and 99th percentile over tokens, and as mean over those that calibration never saw.
    """

    batch_size: int = BATCH

    def measure(self, target: EvaluationTarget) -> MeasureResult:
        full = target.reference(self.batch_size)
        positions = evaluation.evaluate_positions(
            target.compressed, target.windows, self.batch_size, full, target.track
        )
        windows = evaluation.window_means(positions)
        if not np.isfinite(windows["kl"]).all():
            raise ValueError("the compressed model's logits are not finite on the test text; raise method.bits")
        metrics = evaluation.summarise(windows)
        metrics |= evaluation.distribution(positions["kl"], target.windows, target.calibration)
        deltas = [nll - nll_full for nll, nll_full in zip(windows["nll"], windows["nll_full"], strict=True)]
        for name, values in (("kl", windows["kl"]), ("nll_delta", deltas)):
            metrics[f"{name}_low"], metrics[f"{name}_high"] = statistics.interval(values)
        return metrics, windows


@dataclasses.dataclass(frozen=True)
class Official:
    """The official metrics of a task of GLUE, with bootstrap intervals over ``examples``.

    They are those of the compressed model, with ``_full`` of the full one, and with ``_delta`` of their paired
    difference.  A classifier also has ``kl``, in nats per example, and ``top1_agreement``.
    """

    batch_size: int = 32

    def measure(self, target: EvaluationTarget) -> MeasureResult:
        truth = target.truth
        assert truth is not None, "the windows have no labels"
        full, compressed = (
            glue.scores(model, target.windows, self.batch_size, target.track)
            for model in (target.full, target.compressed)
        )
        if not np.isfinite(compressed).all():
            raise ValueError("the compressed model's logits are not finite on the test examples; raise method.bits")
        return glue.compare(truth, compressed, full)


def of_quality(measure: Measure) -> list[Measure]:
    """Return the parts of a measure that need only a model and its test text or task; they also judge a compressed
    model before it is finetuned."""
    return [part for part in parts_of(measure) if isinstance(part, Quality | Official)]
