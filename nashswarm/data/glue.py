"""Read the tasks of GLUE: examples, labels, and the windows of tokens that models read (Wang et al. 2019, Table 1)."""

import dataclasses
import json
import logging
import pathlib
from collections.abc import Mapping
from typing import Any, Literal, get_args

import numpy as np
from jaxtyping import Float, Int
from torch import Tensor

from nashswarm.data import corpus

HUB = "nyu-mll/glue"
Precision = Literal["bfloat16", "float32"]
Labels = Float[np.ndarray, " examples"]
log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Task:
    """A task of GLUE.

    ``columns``: the sentence or the pair of sentences of an example.  ``metrics``: the official ones.  ``classes``: 1
    for a regression task.
    """

    columns: tuple[str, ...]
    metrics: tuple[str, ...] = ("accuracy",)
    classes: int = 2


TASKS: Mapping[str, Task] = {
    "cola": Task(("sentence",), ("matthews",)),
    "sst2": Task(("sentence",)),
    "mrpc": Task(("sentence1", "sentence2"), ("f1", "accuracy")),
    "qqp": Task(("question1", "question2"), ("f1", "accuracy")),
    "stsb": Task(("sentence1", "sentence2"), ("pearson", "spearman"), classes=1),
    "mnli": Task(("premise", "hypothesis"), classes=3),
    "qnli": Task(("question", "sentence")),
    "rte": Task(("sentence1", "sentence2")),
    "wnli": Task(("sentence1", "sentence2")),
}


@dataclasses.dataclass(frozen=True)
class Truth:
    """The labels of a task's test examples, and the ``metrics`` to score predictions with."""

    labels: Labels
    metrics: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Training:
    """Settings of fine-tuning: AdamW, a linear warm-up over a twentieth of the steps, then a linear decay.

    ``examples``: how many to draw from the training split with ``seed``; None takes all.  ``precision``: of matrix
    products; weights and their updates are float32.
    """

    epochs: float = 3.0
    batch_size: int = 32
    learning_rate: float = 1e-4
    weight_decay: float = 0.01
    examples: int | None = None
    precision: Precision = "float32"
    seed: int = 0

    def __post_init__(self) -> None:
        if self.precision not in get_args(Precision):
            raise ValueError(
                f"unknown dataset.training.precision {self.precision!r}: choose {', '.join(get_args(Precision))}"
            )
        if min(self.epochs, self.batch_size, self.learning_rate) <= 0 or self.weight_decay < 0:
            raise ValueError(f"dataset.training {self} must have positive epochs, batch_size and learning_rate")
        if self.examples is not None and self.examples < 1:
            raise ValueError(f"dataset.training.examples={self.examples} must be at least 1")


@dataclasses.dataclass(frozen=True)
class Glue:
    """A task of GLUE from the hub or from a local folder with its splits.

    The training split fine-tunes and calibrates, ``test_split`` tests.  ``sequence_length``: tokens of a window; longer
    examples are cut.
    """

    path: str = HUB
    task: str = "sst2"
    test_split: str = "validation"
    calibration_windows: int = 256
    holdout_windows: int = 64
    test_windows: int | None = None
    sequence_length: int | None = 64
    training: Training = dataclasses.field(default_factory=Training)

    def __post_init__(self) -> None:
        if self.task not in TASKS:
            raise ValueError(f"unknown dataset.task {self.task!r}: choose {', '.join(TASKS)}")

    @property
    def label(self) -> str:
        """Return the name of the task.  For MRPC from a local folder it warns that the split may not be GLUE's own."""
        return f"{self.task} (not GLUE's own draw)" if self.task == "mrpc" and self.local else self.task

    @property
    def local(self) -> bool:
        return pathlib.Path(self.path).is_dir()

    def text(self, purpose: corpus.Purpose) -> str:
        """Read the examples as lines of JSON: the sentences of an example, then its label."""
        columns = TASKS[self.task].columns
        split = "train" if purpose == "calibration" else self.test_split
        rows = corpus.read_rows(self.path, self.task, split, (*columns, "label"), columns)
        if not rows or any(label < 0 for *_, label in rows):
            raise ValueError(f"the split {split!r} of {self.path} has no labels; set dataset.test_split to another one")
        return "\n".join(json.dumps(row, ensure_ascii=False) for row in rows)

    def truth(self, text: str) -> Truth:
        """Return the labels of the test examples and the metrics to score with."""
        return Truth(read_labels(text)[: self.test_windows], TASKS[self.task].metrics)


def example_windows(text: str, tokenizer: Any, length: int, purpose: str) -> Int[Tensor, "examples length"]:
    """Turn every example of ``text`` into a window of ``length`` tokens, cut or padded at its end.

    ``purpose`` names the text in the log.
    """
    columns = [list(column) for column in zip(*(json.loads(line)[:-1] for line in text.split("\n")), strict=True)]
    if tokenizer.sep_token is None:
        columns = [["\n".join(row) for row in zip(*columns, strict=True)]]
    options = {"padding": "max_length", "truncation": True, "max_length": length, "padding_side": "right"}
    windows = tokenizer(*columns, return_tensors="pt", verbose=False, **options)["input_ids"]
    lengths = (windows != tokenizer.pad_token_id).sum(1)
    mean, full = lengths.float().mean(), (lengths == length).sum()
    log.debug("%d %s examples of %.1f tokens, %d cut", len(windows), purpose, mean, full)
    return windows


def read_labels(text: str) -> Labels:
    """Return the label of every example."""
    return np.array([json.loads(line)[-1] for line in text.split("\n")], float)
