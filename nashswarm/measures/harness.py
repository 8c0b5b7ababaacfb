"""What the evaluators of others say of a model: sacrebleu, and the lm-evaluation-harness."""

import functools
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Int

from nashswarm.records.statistics import interval_of


def bleu_counts(written: Sequence[str], references: Sequence[str]) -> Int[np.ndarray, "windows counts"]:
    """Of each text: n-grams found in its reference and n-grams in all, of one to four words, its words, and the
    reference's."""
    from sacrebleu.metrics import BLEU

    scorer = BLEU()
    scores = [scorer.corpus_score([own], [[other]]) for own, other in zip(written, references, strict=True)]
    return np.array([[*score.counts, *score.totals, score.sys_len, score.ref_len] for score in scores])


def bleu(counts: Int[np.ndarray, " counts"]) -> float:
    """BLEU of a corpus (Papineni et al. 2002) from its counts, smoothed as sacrebleu does."""
    from sacrebleu.metrics import BLEU

    correct, total, (own, other) = (part.tolist() for part in np.split(counts, [4, 8]))
    return float(BLEU.compute_bleu(correct, total, own, other, smooth_method="exp").score)


def bleu_compared(
    own: Sequence[str], full: Sequence[str], true: Sequence[str]
) -> tuple[dict[str, float], dict[str, list[float]]]:
    """BLEU of what two models wrote, with intervals over windows: ``bleu``, the first against the second; ``bleu_text``
    and ``bleu_text_full``, each against the true text; ``bleu_text_delta``, their paired difference.  Series: the same
    of each window alone."""
    pairs = {"bleu": (own, full), "bleu_text": (own, true), "bleu_text_full": (full, true)}
    counted = {name: bleu_counts(*pair) for name, pair in pairs.items()}

    def score(name: str, drawn: Int[np.ndarray, " drawn"]) -> float:
        return bleu(counted[name][drawn].sum(0))

    def delta(drawn: Int[np.ndarray, " drawn"]) -> float:
        return score("bleu_text", drawn) - score("bleu_text_full", drawn)

    statistics = {name: functools.partial(score, name) for name in pairs} | {"bleu_text_delta": delta}
    found = {name: statistic(np.arange(len(own))) for name, statistic in statistics.items()}
    for name, statistic in statistics.items():
        found[f"{name}_low"], found[f"{name}_high"] = interval_of(statistic, len(own))
    return found, {name: [bleu(counts) for counts in counted[name]] for name in pairs}


def harness(
    model: Any, tokenizer: Any, tasks: Sequence[str], folder: str | None, limit: int | None, batch_size: int
) -> Any:
    """The harness's own report.  Raises ValueError for a task that it does not know or that has no accuracy."""
    import lm_eval
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=folder, include_defaults=folder is None)
    if unknown := [task for task in tasks if task not in manager.all_tasks]:
        raise ValueError(f"measure.tasks: there is no {', '.join(unknown)}; set measure.folder to its files")
    found = lm_eval.simple_evaluate(
        HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size),
        tasks=list(tasks),
        task_manager=manager,
        limit=limit,
        log_samples=True,
        verbosity="ERROR",
    )
    if without := [task for task in tasks if "acc,none" not in found["results"].get(task, {})]:
        raise ValueError(f"measure.tasks: {', '.join(without)} measure no accuracy (acc)")
    return found
