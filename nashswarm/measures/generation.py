"""Quality of generated text and accuracy on tasks of other evaluators."""

import dataclasses
from collections.abc import Sequence
from typing import ClassVar

import numpy as np
from jaxtyping import Int
from torch import Tensor

from nashswarm.measures import harness
from nashswarm.measures.measure import BATCH, EvaluationTarget, MeasureResult, check_length, check_number
from nashswarm.models import evaluation
from nashswarm.records import statistics


@dataclasses.dataclass(frozen=True)
class Bleu:
    """BLEU (sacrebleu, 0 to 100) of greedy continuations of the first test ``windows``, with intervals over windows.

    ``bleu``: the compressed model's against the full model's.  ``bleu_text``: against the true text, and
    ``bleu_text_full``: the full model's against it; ``bleu_text_delta``: their paired difference.  Series: the same of
    each window alone.  ``packed``: the model runs on its packed weights; false: on the floats that they stand for.
    """

    NEEDS: ClassVar = ("sacrebleu",)
    prompt_tokens: int = 64
    new_tokens: int = 64
    windows: int = 64
    packed: bool = True

    def check(self, windows: Int[Tensor, "windows length"]) -> None:
        """Raises ValueError if the windows are too few or too short."""
        check_number(self.windows, windows)
        check_length(self.prompt_tokens + self.new_tokens, windows)

    def measure(self, subject: EvaluationTarget) -> MeasureResult:
        self.check(subject.windows)
        windows, length = subject.windows[: self.windows], self.prompt_tokens + self.new_tokens
        prompts, rest = windows[:, : self.prompt_tokens], windows[:, self.prompt_tokens : length]
        own, full = (
            evaluation.continue_greedily(model, prompts, self.new_tokens, BATCH, subject.track)
            for model in (subject.packed() if self.packed else subject.compressed, subject.full)
        )
        texts = [subject.tokenizer.batch_decode(tokens, skip_special_tokens=True) for tokens in (own, full, rest)]
        return harness.bleu_compared(*texts)


@dataclasses.dataclass(frozen=True)
class LmEval:
    """Accuracy on tasks of the lm-evaluation-harness, of the compressed model and of the full one.

    ``accuracy_<task>`` with its ``_stderr``, the same with ``_full``, and ``_delta``, compressed minus full, with its
    paired interval over examples; series: right or wrong, example by example.  ``folder``: task files (YAML) of one's
    own instead of the harness's, whose examples come from the hub.  ``limit``: so many examples of each; null: all.
    The weights are the floats that the packed ones stand for: the harness takes no other module than torch's own.
    """

    NEEDS: ClassVar = ("lm-eval",)
    tasks: Sequence[str] = ("lambada_openai",)
    folder: str | None = None
    limit: int | None = None

    def measure(self, subject: EvaluationTarget) -> MeasureResult:
        models = {"": subject.compressed, "_full": subject.full}
        metric: dict[str, float] = {}
        series: dict[str, list[float]] = {}
        for suffix, model in models.items():
            found = harness.harness(model, subject.tokenizer, self.tasks, self.folder, self.limit, BATCH)
            for task in self.tasks:
                name = f"accuracy_{task}{suffix}"
                metric[name], metric[f"{name}_stderr"] = (
                    float(found["results"][task][key]) for key in ("acc,none", "acc_stderr,none")
                )
                answered = sorted(found["samples"][task], key=lambda sample: sample["doc_id"])
                series[name] = [float(sample["acc"]) for sample in answered]
        for task in self.tasks:
            own, full = (np.array(series[f"accuracy_{task}{suffix}"]) for suffix in models)
            name = f"accuracy_{task}_delta"
            metric[name] = float((own - full).mean())
            metric[f"{name}_low"], metric[f"{name}_high"] = statistics.interval((own - full).tolist())
        return metric, series
