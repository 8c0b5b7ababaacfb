"""GLUE: models fine-tuned to judge sentences, and the official metric of every task (Wang et al. 2019, Table 1).

A model is fine-tuned once, by transformers' Trainer, and kept under everything that made it; every method then
compresses the same one.  Examples are windows of one length, padded; who runs them masks the padding.  The two
sentences of a pair stand in one window; the tokenizer's separator, or a new line, alone tells them apart.
"""

import dataclasses
import functools
import json
import logging
import pathlib
import shutil
import warnings
from collections.abc import Callable, Mapping
from typing import Any, Literal, get_args

import numpy as np
import torch
import transformers
from jaxtyping import Float, Int
from scipy import stats
from scipy.special import rel_entr, softmax
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef
from torch import Tensor

from nashswarm import data, metrics, models
from nashswarm.progress import Track
from nashswarm.records import statistics as compare
from nashswarm.records.files import claim, write_folder
from nashswarm.records.record import fingerprint
from nashswarm.records.statistics import RESAMPLES

HUB = "nyu-mll/glue"
SAVED_EVERY = 100  # steps of training, from where it goes on if it is interrupted
CHECKPOINTS = "checkpoints"

Precision = Literal["bfloat16", "float32"]
Scores = Float[np.ndarray, "examples classes"]
Labels = Float[np.ndarray, " examples"]

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Task:
    """``columns``: the sentence, or the pair of them.  ``metrics``: the official ones.  ``classes``: 1 where labels are
    numbers to be predicted."""

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
METRICS: Mapping[str, Callable[[Labels, Labels], float]] = {  # of labels and predictions
    "accuracy": accuracy_score,
    "f1": f1_score,
    "matthews": matthews_corrcoef,
    "pearson": lambda labels, predicted: stats.pearsonr(labels, predicted).statistic,
    "spearman": lambda labels, predicted: stats.spearmanr(labels, predicted).statistic,
}


@dataclasses.dataclass(frozen=True)
class Truth:
    """The labels of a task's test examples, and the ``metrics`` that judge predictions by them."""

    labels: Labels
    metrics: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Training:
    """How a model is fine-tuned: AdamW, a linear warm-up over a twentieth of the steps and a linear decay.

    ``examples``: so many of the training split, drawn by ``seed``; None: all of it.  ``precision``: of the products,
    ``bfloat16`` or ``float32``; weights and their updates are float32.
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
    """A task of GLUE, from the hub or a local folder of its splits: training sentences fine-tune and calibrate, those
    of ``test_split`` test.  ``sequence_length``: tokens of a window, longer examples are cut."""

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
        """Its name; of an MRPC that a local folder holds it says that nobody knows whose draw of the corpus it is."""
        return f"{self.task} (not GLUE's own draw)" if self.task == "mrpc" and self.local else self.task

    @property
    def local(self) -> bool:
        return pathlib.Path(self.path).is_dir()

    def text(self, purpose: data.Purpose) -> str:
        """One line of JSON per example: its sentences, then its label."""
        columns = TASKS[self.task].columns
        split = "train" if purpose == "calibration" else self.test_split
        rows = data.rows_of(self.path, self.task, split, (*columns, "label"), columns)
        if not rows or any(label < 0 for *_, label in rows):
            raise ValueError(f"the split {split!r} of {self.path} has no labels; set dataset.test_split to another one")
        return "\n".join(json.dumps(row, ensure_ascii=False) for row in rows)

    def truth(self, text: str) -> Truth:
        """What is right of the examples that are tested."""
        return Truth(labels(text)[: self.test_windows], TASKS[self.task].metrics)


def windows(text: str, tokenizer: Any, length: int, what: str) -> Int[Tensor, "examples length"]:
    """Every example of ``text`` as a window of ``length`` tokens: cut, or padded at its end."""
    columns = [list(column) for column in zip(*(json.loads(line)[:-1] for line in text.split("\n")), strict=True)]
    if tokenizer.sep_token is None:
        columns = [["\n".join(row) for row in zip(*columns, strict=True)]]
    options = {"padding": "max_length", "truncation": True, "max_length": length, "padding_side": "right"}
    found = tokenizer(*columns, return_tensors="pt", verbose=False, **options)["input_ids"]
    real = (found != tokenizer.pad_token_id).sum(1)
    log.debug("%d %s examples of %.1f tokens, %d cut", len(found), what, real.float().mean(), (real == length).sum())
    return found


def labels(text: str) -> Labels:
    """The label of every example."""
    return np.array([json.loads(line)[-1] for line in text.split("\n")], float)


@torch.no_grad()
def scores(model: Any, windows: Int[Tensor, "examples length"], batch_size: int, track: Track) -> Scores:
    """The logits of every example."""
    batches = track(windows.split(batch_size), "judging")
    return torch.cat([metrics.classify(model, batch).logits for batch in batches]).double().cpu().numpy()


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


def fine_tuned(
    dataset: Glue, source: models.Source, text: str, device: str, dtype: torch.dtype, cache: pathlib.Path
) -> models.LoadedModel:
    """The model of ``source``, fine-tuned on the training examples in ``text``: read from ``cache``, or made and put
    there.  Training that was interrupted goes on.

    Raises ValueError for what cannot be loaded.
    """
    made_of = {
        "model": models.content_of(source),
        "task": dataset.task,
        "training_sha256": data.sha256(text),
        "training": dataclasses.asdict(dataset.training),
        "sequence_length": dataset.sequence_length,
        "device": device,
        "dtype": str(dtype),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    folder = cache / f"{dataset.task}-{fingerprint(made_of)}"
    classes = TASKS[dataset.task].classes
    with claim(folder):  # workers of one sweep want the same model
        if not folder.is_dir():
            loaded = models.load(source, device, dtype, classes)
            _train(loaded, dataset, text, folder.with_name(f"{folder.name}-{CHECKPOINTS}"), device)

            def fill(partial: pathlib.Path) -> None:
                loaded.model.save_pretrained(partial)
                loaded.tokenizer.save_pretrained(partial)

            write_folder(folder, {"training.json": (json.dumps(made_of, indent=1) + "\n").encode()}, fill)
            shutil.rmtree(folder.with_name(f"{folder.name}-{CHECKPOINTS}"), ignore_errors=True)
    return models.load(models.ModelSource(str(folder)), device, dtype, classes)


def _train(loaded: models.LoadedModel, dataset: Glue, text: str, checkpoints: pathlib.Path, device: str) -> None:
    """Fine-tune in place; batches hold examples of like length, so that little of them is padding."""
    settings = dataset.training
    length = loaded.window_length(dataset.sequence_length)
    tokens, targets = windows(text, loaded.tokenizer, length, "training"), labels(text)
    order = np.random.default_rng(settings.seed).permutation(len(tokens))[: settings.examples]
    pad = loaded.tokenizer.pad_token_id
    kind = float if TASKS[dataset.task].classes == 1 else int
    examples = [{"input_ids": tokens[one][tokens[one] != pad].tolist(), "label": kind(targets[one])} for one in order]
    steps = int(-(-len(examples) // settings.batch_size) * settings.epochs)
    log.info("fine-tuning on %d examples of %s, %d steps", len(examples), dataset.task, steps)
    arguments = transformers.TrainingArguments(
        output_dir=str(checkpoints),
        num_train_epochs=settings.epochs,
        per_device_train_batch_size=settings.batch_size,
        learning_rate=settings.learning_rate,
        weight_decay=settings.weight_decay,
        warmup_steps=steps // 20,
        train_sampling_strategy="group_by_length",
        seed=settings.seed,
        bf16=settings.precision == "bfloat16",
        optim="adamw_torch_fused",
        use_cpu=device == "cpu",
        save_steps=SAVED_EVERY,
        save_total_limit=1,
        logging_steps=SAVED_EVERY,
        report_to="none",
        disable_tqdm=True,
    )
    trainer = transformers.Trainer(
        model=loaded.model,
        args=arguments,
        train_dataset=examples,
        data_collator=transformers.DataCollatorWithPadding(loaded.tokenizer),
    )
    trainer.train(resume_from_checkpoint=any(checkpoints.glob("checkpoint-*")))
    loaded.model.eval()
