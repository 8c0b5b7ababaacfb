"""The official metric of every task of GLUE (Wang et al. 2019, Table 1)."""

import functools
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from scipy import stats
from scipy.special import rel_entr, softmax
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef
from torch import Tensor

from nashswarm.data.glue import Labels, Truth
from nashswarm.models import evaluation
from nashswarm.progress import Track
from nashswarm.records import statistics as compare
from nashswarm.records.statistics import RESAMPLES

Scores = Float[np.ndarray, "examples classes"]
METRICS: Mapping[str, Callable[[Labels, Labels], float]] = {  # of labels and predictions
    "accuracy": accuracy_score,
    "f1": f1_score,
    "matthews": matthews_corrcoef,
    "pearson": lambda labels, predicted: stats.pearsonr(labels, predicted).statistic,
    "spearman": lambda labels, predicted: stats.spearmanr(labels, predicted).statistic,
}


@torch.no_grad()
def scores(model: Any, windows: Int[Tensor, "examples length"], batch_size: int, track: Track) -> Scores:
    """The logits of every example."""
    batches = track(windows.split(batch_size), "judging")
    return torch.cat([evaluation.classify(model, batch).logits for batch in batches]).double().cpu().numpy()


def predictions(scores: Scores) -> Labels:
    """The likeliest class of every example, or the number that the model answers with."""
    return scores[:, 0] if scores.shape[1] == 1 else scores.argmax(1).astype(float)


def interval(
    statistic: Callable[[Int[np.ndarray, " drawn"]], float], examples: int, seed: int = 0
) -> tuple[float, float]:
    """95 % bootstrap interval (percentiles, for a resample may have no such metric) of what ``statistic`` makes of the
    numbers of some examples."""
    rng = np.random.default_rng(seed)
    found = []
    with warnings.catch_warnings(action="ignore"):  # a resample may hold one class alone
        for _ in range(RESAMPLES):
            found.append(statistic(rng.integers(examples, size=examples)))
    low, high = np.nanquantile(found, (0.025, 0.975))
    return float(low), float(high)


def compared(truth: Truth, own: Scores, full: Scores) -> tuple[dict[str, float], dict[str, list[float]]]:
    """The official metrics of a model's answers, of the full model's with ``_full``, and with ``_delta`` their paired
    difference, all with bootstrap intervals over ``examples``; of a classifier also ``kl``, in nats per example, and
    ``top1_agreement``.  Series: labels and predictions, and ``kl``, by example."""
    found: dict[str, float] = {"examples": len(own)}
    predicted = {"": predictions(own), "_full": predictions(full)}
    series = {"label": truth.labels.tolist()}
    series |= {f"prediction{suffix}": answers.tolist() for suffix, answers in predicted.items()}
    for name in truth.metrics:

        def score(suffix: str, drawn: Int[np.ndarray, " drawn"], name: str = name) -> float:
            return float(METRICS[name](truth.labels[drawn], predicted[suffix][drawn]))

        def delta(drawn: Int[np.ndarray, " drawn"], score: Callable[..., float] = score) -> float:
            return score("", drawn) - score("_full", drawn)

        statistics = {suffix: functools.partial(score, suffix) for suffix in predicted} | {"_delta": delta}
        for suffix, statistic in statistics.items():
            found[f"{name}{suffix}"] = statistic(np.arange(len(own)))
            found[f"{name}{suffix}_low"], found[f"{name}{suffix}_high"] = interval(statistic, len(own))
    if own.shape[1] > 1:
        series["kl"] = rel_entr(softmax(full, 1), softmax(own, 1)).sum(1).tolist()
        found["kl"] = float(np.mean(series["kl"]))
        found["kl_low"], found["kl_high"] = compare.interval(series["kl"])
        found["top1_agreement"] = float((full.argmax(1) == own.argmax(1)).mean())
    return found, series
