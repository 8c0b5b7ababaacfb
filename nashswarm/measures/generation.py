"""Quality of generated text, and accuracy on tasks of the lm-evaluation-harness."""

import dataclasses
from collections.abc import Sequence
from typing import ClassVar

import numpy as np
from jaxtyping import Int
from torch import Tensor

from nashswarm.measures import harness
from nashswarm.measures.measure import EvaluationTarget, MeasureResult, check_length, check_number
from nashswarm.models import evaluation
from nashswarm.models.evaluation import BATCH
from nashswarm.records import statistics


@dataclasses.dataclass(frozen=True)
class Bleu:
    """BLEU (sacrebleu, 0 to 100) of greedy continuations of the first test ``windows``, with intervals over windows.

    ``bleu``: of the compressed model's text against the full model's.  ``bleu_text``, ``bleu_text_full``: of each
    model's text against the true text.  ``bleu_text_delta``: their paired difference.  Series: the first three for each
    window alone.  ``packed``: whether the model runs on its packed weights, or on the floats that they decode to.
    """

    NEEDS: ClassVar = ("sacrebleu",)
    prompt_tokens: int = 64
    new_tokens: int = 64
    windows: int = 64
    packed: bool = True

    def check(self, windows: Int[Tensor, "windows length"]) -> None:
        """Check the windows.  Raises ValueError if they are too few or too short."""
        check_number(self.windows, windows)
        check_length(self.prompt_tokens + self.new_tokens, windows)

    def measure(self, target: EvaluationTarget) -> MeasureResult:
        self.check(target.windows)
        windows, length = target.windows[: self.windows], self.prompt_tokens + self.new_tokens
        prompts, truth = windows[:, : self.prompt_tokens], windows[:, self.prompt_tokens : length]
        compressed, full = (
            evaluation.continue_greedily(model, prompts, self.new_tokens, BATCH, target.track)
            for model in (target.packed() if self.packed else target.compressed, target.full)
        )
        texts = [
            target.tokenizer.batch_decode(tokens, skip_special_tokens=True) for tokens in (compressed, full, truth)
        ]
        return harness.compare_bleu(*texts)


@dataclasses.dataclass(frozen=True)
class LmEval:
    """Accuracy on ``tasks`` of the lm-evaluation-harness.

    ``accuracy_<task>`` and its ``_stderr`` are those of the compressed model, with ``_full`` of the full one, and
    ``_delta`` is compressed minus full, with a paired interval over examples.  Series: 1 for a right answer and 0 for a
    wrong one, by example.  ``folder``: task files (YAML) to use in place of the harness's own, whose examples come from
    the hub.  ``limit``: examples per task; None: all.  The compressed model runs on decompressed weights, as the
    harness accepts no modules but torch's own.
    """

    NEEDS: ClassVar = ("lm-eval",)
    tasks: Sequence[str] = ("lambada_openai",)
    folder: str | None = None
    limit: int | None = None

    def measure(self, target: EvaluationTarget) -> MeasureResult:
        models = {"": target.compressed, "_full": target.full}
        metrics: dict[str, float] = {}
        series: dict[str, list[float]] = {}
        for suffix, model in models.items():
            report = harness.run_harness(model, target.tokenizer, self.tasks, self.folder, self.limit, BATCH)
            for task in self.tasks:
                name = f"accuracy_{task}{suffix}"
                metrics[name], metrics[f"{name}_stderr"] = (
                    float(report["results"][task][key]) for key in ("acc,none", "acc_stderr,none")
                )
                answers = sorted(report["samples"][task], key=lambda sample: sample["doc_id"])
                series[name] = [float(sample["acc"]) for sample in answers]
        for task in self.tasks:
            compressed, full = (np.array(series[f"accuracy_{task}{suffix}"]) for suffix in models)
            name = f"accuracy_{task}_delta"
            metrics[name] = float((compressed - full).mean())
            metrics[f"{name}_low"], metrics[f"{name}_high"] = statistics.interval((compressed - full).tolist())
        return metrics, series
