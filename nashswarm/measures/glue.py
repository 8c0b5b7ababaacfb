"""The official metrics of the tasks of GLUE (Wang et al. 2019, Table 1)."""

import functools
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from scipy import stats
from scipy.special import rel_entr, softmax
from torch import Tensor

from nashswarm.data.glue import Labels, Truth
from nashswarm.models import evaluation
from nashswarm.progress import Track
from nashswarm.records import statistics
from nashswarm.records.statistics import RESAMPLES

Scores = Float[np.ndarray, "examples classes"]


def _of_scikit_learn(name: str) -> Callable[[Labels, Labels], float]:
    """Return a metric of a package that takes a second and 100 MB to import: when it is called."""

    def metric(labels: Labels, predicted: Labels) -> float:
        from sklearn import metrics

        return float(getattr(metrics, name)(labels, predicted))

    return metric


METRICS: Mapping[str, Callable[[Labels, Labels], float]] = {  # of labels and predictions
    "accuracy": _of_scikit_learn("accuracy_score"),
    "f1": _of_scikit_learn("f1_score"),
    "matthews": _of_scikit_learn("matthews_corrcoef"),
    "pearson": lambda labels, predicted: stats.pearsonr(labels, predicted).statistic,
    "spearman": lambda labels, predicted: stats.spearmanr(labels, predicted).statistic,
}


@torch.no_grad()
def scores(model: Any, windows: Int[Tensor, "examples length"], batch_size: int, track: Track) -> Scores:
    """Return the logits of every example."""
    batches = track(windows.split(batch_size), "judging")
    return torch.cat([evaluation.classify(model, batch).logits for batch in batches]).double().cpu().numpy()


def predictions(scores: Scores) -> Labels:
    """Return the most probable class of every example, or the predicted number of a regression task."""
    return scores[:, 0] if scores.shape[1] == 1 else scores.argmax(1).astype(float)


def interval(
    statistic: Callable[[Int[np.ndarray, " drawn"]], float], examples: int, seed: int = 0
) -> tuple[float, float]:
    """Return the 95 % bootstrap interval of a statistic of the numbers of some examples.

    It is made of percentiles, as a resample that holds one class alone may have no such metric.
    """
    rng = np.random.default_rng(seed)
    values = []
    with warnings.catch_warnings(action="ignore"):  # of resamples that hold one class alone
        for _ in range(RESAMPLES):
            values.append(statistic(rng.integers(examples, size=examples)))
    low, high = np.nanquantile(values, (0.025, 0.975))
    return float(low), float(high)


def compare(truth: Truth, compressed: Scores, full: Scores) -> tuple[dict[str, float], dict[str, list[float]]]:
    """Return the metrics of the measure ``Official`` from the logits of both models.

    Series: labels and predictions, and ``kl`` of a classifier, by example.
    """
    examples = len(compressed)
    metrics: dict[str, float] = {"examples": examples}
    predicted = {"": predictions(compressed), "_full": predictions(full)}
    series = {"label": truth.labels.tolist()}
    series |= {f"prediction{suffix}": labels.tolist() for suffix, labels in predicted.items()}
    for name in truth.metrics:

        def score(suffix: str, drawn: Int[np.ndarray, " drawn"], name: str = name) -> float:
            return float(METRICS[name](truth.labels[drawn], predicted[suffix][drawn]))

        def delta(drawn: Int[np.ndarray, " drawn"], score: Callable[..., float] = score) -> float:
            return score("", drawn) - score("_full", drawn)

        by_suffix = {suffix: functools.partial(score, suffix) for suffix in predicted} | {"_delta": delta}
        for suffix, statistic in by_suffix.items():
            metrics[f"{name}{suffix}"] = statistic(np.arange(examples))
            metrics[f"{name}{suffix}_low"], metrics[f"{name}{suffix}_high"] = interval(statistic, examples)
    if compressed.shape[1] > 1:
        series["kl"] = rel_entr(softmax(full, 1), softmax(compressed, 1)).sum(1).tolist()
        metrics["kl"] = float(np.mean(series["kl"]))
        metrics["kl_low"], metrics["kl_high"] = statistics.interval(series["kl"])
        metrics["top1_agreement"] = float((full.argmax(1) == compressed.argmax(1)).mean())
    return metrics, series
