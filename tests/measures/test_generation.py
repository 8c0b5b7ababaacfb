"""Generated text and tasks, against sacrebleu and likelihoods by hand."""

import dataclasses
import json
import math
import pathlib
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from nashswarm.measures.generation import Bleu, LmEval
from nashswarm.measures.measure import EvaluationTarget
from nashswarm.models import evaluation


def test_continue_greedily_equals_generate(tiny: Any, token_windows: Tensor) -> None:
    continued = evaluation.continue_greedily(tiny, token_windows[:, :8], 6, batch_size=2)
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    assert torch.equal(continued, tiny.generate(token_windows[:, :8], **options)[:, 8:])


def test_bleu_equals_sacrebleu(target: EvaluationTarget) -> None:
    sacrebleu = pytest.importorskip("sacrebleu", reason="the extra eval is not installed")
    metrics, series = Bleu(prompt_tokens=8, new_tokens=16, windows=5).measure(target)
    names = ("bleu", "bleu_text", "bleu_text_full")
    assert set(metrics) == {f"{name}{end}" for name in (*names, "bleu_text_delta") for end in ("", "_low", "_high")}
    assert set(series) == set(names) and all(len(series[name]) == 5 for name in names)
    prompts = target.windows[:, :8]
    packed, full = (evaluation.continue_greedily(model, prompts, 16, 5) for model in (target.packed(), target.full))
    texts = [
        target.tokenizer.batch_decode(tokens, skip_special_tokens=True)
        for tokens in (packed, full, target.windows[:, 8:])
    ]
    for name, one, other in (("bleu", 0, 1), ("bleu_text", 0, 2), ("bleu_text_full", 1, 2)):
        assert metrics[name] == pytest.approx(sacrebleu.corpus_bleu(texts[one], [texts[other]]).score)
        alone = [sacrebleu.corpus_bleu([a], [[b]]).score for a, b in zip(texts[one], texts[other], strict=True)]
        assert series[name] == pytest.approx(alone)
        assert metrics[f"{name}_low"] <= metrics[name] <= metrics[f"{name}_high"]
    assert metrics["bleu_text_delta"] == pytest.approx(metrics["bleu_text"] - metrics["bleu_text_full"])


def test_bleu_same_model_is_100(target: EvaluationTarget) -> None:
    pytest.importorskip("sacrebleu", reason="the extra eval is not installed")
    same = dataclasses.replace(target, compressed=target.full)
    metrics, _ = Bleu(prompt_tokens=4, new_tokens=20, windows=4, packed=False).measure(same)
    assert metrics["bleu"] == pytest.approx(100)
    assert metrics["bleu_text"] == metrics["bleu_text_full"] and metrics["bleu_text_delta"] == 0
    with pytest.raises(ValueError, match=r"measure\.new_tokens exceed the window of 24"):
        Bleu(prompt_tokens=20, new_tokens=5, windows=4).measure(same)


TASK = """task: {name}
dataset_path: json
dataset_kwargs:
  data_files:
    test: {path}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{text}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: label
metric_list:
  - metric: {metric}
    aggregation: mean
    higher_is_better: true
"""


QUESTIONS = [("the quiet", [" starling", " price of"], 0), ("every old", [" and or", " flock"], 1)] * 4


@pytest.fixture
def task_folder(tmp_path: pathlib.Path) -> pathlib.Path:
    """Two tasks of eight questions with two choices each; the second measures no accuracy."""
    path = tmp_path / "questions.json"
    rows = [{"text": text, "choices": choices, "label": label} for text, choices, label in QUESTIONS]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "tasks").mkdir()
    for name, metric in (("small_questions", "acc"), ("no_questions", "acc_norm")):
        (tmp_path / f"tasks/{name}.yaml").write_text(TASK.format(name=name, path=path, metric=metric))
    return tmp_path / "tasks"


def test_lm_eval_accuracy_equals_likelier_choice_by_hand(target: EvaluationTarget, task_folder: pathlib.Path) -> None:
    """By hand: the choice whose tokens are likelier after the text."""
    pytest.importorskip("lm_eval", reason="the extra eval is not installed")
    metrics, series = LmEval(["small_questions"], str(task_folder)).measure(target)
    name = "accuracy_small_questions"
    for suffix, model in (("", target.compressed), ("_full", target.full)):
        right = []
        for text, choices, label in QUESTIONS:
            scores = []
            for choice in choices:
                start = len(target.tokenizer(text)["input_ids"])
                tokens = torch.tensor(target.tokenizer(text + choice)["input_ids"])
                with torch.no_grad():
                    log_p = model(input_ids=tokens[None]).logits[0].log_softmax(-1)
                scores.append(sum(log_p[place - 1, tokens[place]].item() for place in range(start, len(tokens))))
            right.append(float(int(np.argmax(scores)) == label))
        assert series[name + suffix] == right
        assert metrics[name + suffix] == np.mean(right)
        assert metrics[f"{name}{suffix}_stderr"] == pytest.approx(np.std(right, ddof=1) / math.sqrt(8))
    assert metrics[f"{name}_delta"] == metrics[name] - metrics[f"{name}_full"]
    assert metrics[f"{name}_delta_low"] <= metrics[f"{name}_delta"] <= metrics[f"{name}_delta_high"]


def test_lm_eval_limit_is_kept(target: EvaluationTarget, task_folder: pathlib.Path) -> None:
    pytest.importorskip("lm_eval", reason="the extra eval is not installed")
    _, series = LmEval(["small_questions"], str(task_folder), limit=3).measure(target)
    assert all(len(values) == 3 for values in series.values())


@pytest.mark.parametrize(
    ("task", "message"), [("riddles", "there is no riddles"), ("no_questions", "no_questions measure no accuracy")]
)
def test_lm_eval_task_without_accuracy_is_named(
    task: str, message: str, target: EvaluationTarget, task_folder: pathlib.Path
) -> None:
    pytest.importorskip("lm_eval", reason="the extra eval is not installed")
    with pytest.raises(ValueError, match=message):
        LmEval([task], str(task_folder)).measure(target)
