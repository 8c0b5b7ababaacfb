"""Scores by the evaluators of others: sacrebleu, and the lm-evaluation-harness."""

import functools
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Int

from nashswarm.records.statistics import interval_of


def bleu_counts(texts: Sequence[str], references: Sequence[str]) -> Int[np.ndarray, "windows counts"]:
    """Return ten counts for each text: n-grams that are in its reference for n of 1 to 4, n-grams in all for n of 1 to
    4, its words, and its reference's words."""
    from sacrebleu.metrics import BLEU

    scorer = BLEU()
    scores = [scorer.corpus_score([text], [[reference]]) for text, reference in zip(texts, references, strict=True)]
    return np.array([[*score.counts, *score.totals, score.sys_len, score.ref_len] for score in scores])


def bleu(counts: Int[np.ndarray, " counts"]) -> float:
    """Return the BLEU of a corpus, 0 to 100 (Papineni et al. 2002), from the sum of its counts, smoothed as in
    sacrebleu."""
    from sacrebleu.metrics import BLEU

    correct, total, (words, reference_words) = (part.tolist() for part in np.split(counts, [4, 8]))
    return float(BLEU.compute_bleu(correct, total, words, reference_words, smooth_method="exp").score)


def compare_bleu(
    compressed: Sequence[str], full: Sequence[str], truth: Sequence[str]
) -> tuple[dict[str, float], dict[str, list[float]]]:
    """Return the metrics and series of the measure ``Bleu`` from the texts of both models and the true text, by
    window."""
    pairs = {"bleu": (compressed, full), "bleu_text": (compressed, truth), "bleu_text_full": (full, truth)}
    counts = {name: bleu_counts(*pair) for name, pair in pairs.items()}

    def score(name: str, drawn: Int[np.ndarray, " drawn"]) -> float:
        return bleu(counts[name][drawn].sum(0))

    def delta(drawn: Int[np.ndarray, " drawn"]) -> float:
        return score("bleu_text", drawn) - score("bleu_text_full", drawn)

    scores = {name: functools.partial(score, name) for name in pairs} | {"bleu_text_delta": delta}
    metrics = {name: statistic(np.arange(len(compressed))) for name, statistic in scores.items()}
    for name, statistic in scores.items():
        metrics[f"{name}_low"], metrics[f"{name}_high"] = interval_of(statistic, len(compressed))
    return metrics, {name: [bleu(window) for window in counts[name]] for name in pairs}


def run_harness(
    model: Any, tokenizer: Any, tasks: Sequence[str], folder: str | None, limit: int | None, batch_size: int
) -> Any:
    """Return the report of the lm-evaluation-harness.

    Raises ValueError for a task that it does not know or that has no accuracy.
    """
    import lm_eval
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=folder, include_defaults=folder is None)
    if unknown := [task for task in tasks if task not in manager.all_tasks]:
        raise ValueError(f"measure.tasks: there is no {', '.join(unknown)}; set measure.folder to its files")
    report = lm_eval.simple_evaluate(
        HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size),
        tasks=list(tasks),
        task_manager=manager,
        limit=limit,
        log_samples=True,
        verbosity="ERROR",
    )
    if without := [task for task in tasks if "acc,none" not in report["results"].get(task, {})]:
        raise ValueError(f"measure.tasks: {', '.join(without)} measure no accuracy (acc)")
    return report
