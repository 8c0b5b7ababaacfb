"""Damage of every matrix when it alone is compressed."""

import copy
import dataclasses

from jaxtyping import Int
from torch import Tensor

from nashswarm.measures.measure import EvaluationTarget, MeasureResult, check_number
from nashswarm.models import evaluation, matrices
from nashswarm.models.evaluation import BATCH
from nashswarm.records import statistics


@dataclasses.dataclass(frozen=True)
class Layers:
    """KL and change of NLL, in nats per token, when one matrix alone is compressed, on the first test ``windows``.

    Series, in the order of the record's layers: ``layer_kl`` with its interval over windows, and ``layer_nll_delta``.
    ``layer_kl_sum`` against ``kl_together``, of all matrices at once, shows how far damages add up.
    ``damage_pearson``, ``damage_spearman``: correlation of the layers' KL with the damage that the method predicted, if
    it predicted any and both differ between layers.  ``forward_passes``: batches of 8 windows that were run,
    (layers + 2) · ⌈windows / 8⌉.
    """

    windows: int = 16

    def check(self, windows: Int[Tensor, "windows length"]) -> None:
        """Check the windows.  Raises ValueError if they are too few."""
        check_number(self.windows, windows)

    def measure(self, target: EvaluationTarget) -> MeasureResult:
        self.check(target.windows)
        windows = target.windows[: self.windows]
        full = evaluation.compute_reference(target.full, windows, BATCH)
        together = evaluation.evaluate(target.compressed, windows, BATCH, full)
        candidate = copy.deepcopy(target.full)
        series: dict[str, list[float]] = {f"layer_{name}": [] for name in ("kl", "kl_low", "kl_high", "nll_delta")}
        for layer in target.track(target.layers, "one layer after the other"):
            matrices.set_weights(candidate, {layer.name: target.weights[layer.name]})
            by_window = evaluation.evaluate(candidate, windows, BATCH, full)
            matrices.set_weights(candidate, {layer.name: layer.weight})
            alone = evaluation.summarise(by_window)
            alone["kl_low"], alone["kl_high"] = statistics.interval(by_window["kl"])
            for name, values in series.items():
                values.append(alone[name.removeprefix("layer_")])
        measured = series["layer_kl"]
        batches = -(-self.windows // BATCH)
        metrics = {
            "layer_kl_sum": sum(measured),
            "kl_together": evaluation.summarise(together)["kl"],
            "forward_passes": (len(target.layers) + 2) * batches,
        }
        predicted = [target.damage[layer.name] for layer in target.layers if layer.name in target.damage]
        if len(predicted) == len(measured) and min(len(set(predicted)), len(set(measured))) > 1:
            metrics["damage_pearson"], metrics["damage_spearman"] = statistics.correlations(predicted, measured)
        return metrics, series
