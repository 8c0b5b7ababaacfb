"""Damage of every matrix when it alone is compressed."""

import copy
import dataclasses

from jaxtyping import Int
from torch import Tensor

from nashswarm.measures.measure import BATCH, EvaluationTarget, MeasureResult, check_number
from nashswarm.models import evaluation, matrices
from nashswarm.records import statistics


@dataclasses.dataclass(frozen=True)
class Layers:
    """What each matrix costs when it alone is compressed, on the first test ``windows``: KL and ΔNLL, nats per token.

    ``layer_kl``, with its interval over windows, and ``layer_nll_delta``: series in the order of the record's layers.
    ``damage_pearson`` and ``damage_spearman`` correlate that KL with the predicted damage, where one was predicted and
    differs between layers.  ``layer_kl_sum`` beside ``kl_together``, of all matrices at once, says how far damages add
    up.  ``forward_passes``: batches of 8 windows that were run, (layers + 2) · ⌈windows / 8⌉.
    """

    windows: int = 16

    def check(self, windows: Int[Tensor, "windows length"]) -> None:
        """Raises ValueError if the windows are too few."""
        check_number(self.windows, windows)

    def measure(self, subject: EvaluationTarget) -> MeasureResult:
        self.check(subject.windows)
        windows = subject.windows[: self.windows]
        full = evaluation.compute_reference(subject.full, windows, BATCH)
        together = evaluation.evaluate(subject.compressed, windows, BATCH, full)
        trial = copy.deepcopy(subject.full)
        series: dict[str, list[float]] = {f"layer_{name}": [] for name in ("kl", "kl_low", "kl_high", "nll_delta")}
        for layer in subject.track(subject.layers, "one layer after the other"):
            matrices.set_weights(trial, {layer.name: subject.weights[layer.name]})
            found = evaluation.evaluate(trial, windows, BATCH, full)
            matrices.set_weights(trial, {layer.name: layer.weight})
            alone = evaluation.summarise(found)
            alone["kl_low"], alone["kl_high"] = statistics.interval(found["kl"])
            for name, values in series.items():
                values.append(alone[name.removeprefix("layer_")])
        measured = series["layer_kl"]
        batches = -(-self.windows // BATCH)
        metric = {
            "layer_kl_sum": sum(measured),
            "kl_together": evaluation.summarise(together)["kl"],
            "forward_passes": (len(subject.layers) + 2) * batches,
        }
        predicted = [subject.damage[layer.name] for layer in subject.layers if layer.name in subject.damage]
        if len(predicted) == len(measured) and min(len(set(predicted)), len(set(measured))) > 1:
            metric["damage_pearson"], metric["damage_spearman"] = statistics.correlations(predicted, measured)
        return metric, series
