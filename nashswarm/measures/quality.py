"""Distance from the full model on test text, and scores of tasks."""

import dataclasses

import numpy as np

from nashswarm.measures import glue
from nashswarm.measures.measure import BATCH, EvaluationTarget, Measure, MeasureResult, parts_of
from nashswarm.models import evaluation
from nashswarm.records import statistics


@dataclasses.dataclass(frozen=True)
class Quality:
    """NLL, KL and top-1 agreement on the test windows, with bootstrap intervals over windows."""

    batch_size: int = BATCH

    def measure(self, subject: EvaluationTarget) -> MeasureResult:
        full = subject.reference(self.batch_size)
        windows = evaluation.evaluate(subject.compressed, subject.windows, self.batch_size, full, subject.track)
        if not np.isfinite(windows["kl"]).all():
            raise ValueError("the compressed model's logits are not finite on the test text; raise method.bits")
        found = evaluation.summarise(windows)
        deltas = [own - full for own, full in zip(windows["nll"], windows["nll_full"], strict=True)]
        for name, values in (("kl", windows["kl"]), ("nll_delta", deltas)):
            found[f"{name}_low"], found[f"{name}_high"] = statistics.interval(values)
        return found, windows


@dataclasses.dataclass(frozen=True)
class Official:
    """The official metrics of a task of GLUE, of the compressed model and, with ``_full``, of the full one, and with
    ``_delta`` their paired difference, with bootstrap intervals over ``examples``; of a classifier also ``kl``, in nats
    per example, and ``top1_agreement``."""

    batch_size: int = 32

    def measure(self, subject: EvaluationTarget) -> MeasureResult:
        truth = subject.truth
        assert truth is not None, "the windows have no labels"
        full, own = (
            glue.scores(model, subject.windows, self.batch_size, subject.track)
            for model in (subject.full, subject.compressed)
        )
        if not np.isfinite(own).all():
            raise ValueError("the compressed model's logits are not finite on the test examples; raise method.bits")
        return glue.compared(truth, own, full)


def of_quality(measure: Measure) -> list[Measure]:
    """What in a measure judges answers by the text or the task alone: how good a model was before it was trained."""
    return [part for part in parts_of(measure) if isinstance(part, Quality | Official)]
