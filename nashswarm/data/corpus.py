"""Text: the embedded one, sets of the Hugging Face hub, any local folder or file; and the windows cut from it."""

import dataclasses
import hashlib
import pathlib
from collections.abc import Iterable, Sequence
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor
from torch.nn import functional

from nashswarm.data import hub, stdlib_docs

Purpose = Literal["train", "calibration", "test"]
WINDOWS = 64  # of calibration text, held-out ones among them, where nobody says how many
TRAIN_SPLIT = "train"  # what task=train_moe learns from
FILE_CALIBRATION_SHARE = 0.2  # of a single text file: its beginning calibrates, the rest tests


@runtime_checkable
class Dataset(Protocol):
    """What the runner asks of a dataset; ``None`` of test windows means all there are, of the
    others as many as ``draw`` takes."""

    calibration_windows: int | None
    holdout_windows: int | None
    test_windows: int | None
    sequence_length: int | None

    @property
    def label(self) -> str: ...

    def text(self, purpose: Purpose) -> str: ...


@dataclasses.dataclass(frozen=True)
class StdlibDocs:
    """The prose that ships with CPython: nothing to download."""

    calibration_windows: int | None = 48
    holdout_windows: int | None = 16
    test_windows: int | None = None
    sequence_length: int | None = None

    @property
    def label(self) -> str:
        return "stdlib_docs"

    def text(self, purpose: Purpose) -> str:
        return stdlib_docs.text(purpose)


@dataclasses.dataclass(frozen=True)
class HubText:
    """A set of the Hugging Face hub, a local folder that stands in for it, or a local text file.

    ``name``: the configuration on the hub (a local folder has none).  ``columns``: joined by a space within a row.
    ``separator``: put between rows, which end as on the hub (in a newline unless empty), as in the GPTQ protocol; None
    gives the lines back as the file has them.
    """

    path: str
    name: str | None = None
    columns: Sequence[str] = ("text",)
    separator: str | None = None
    calibration_split: str = "validation"
    test_split: str = "test"
    calibration_windows: int | None = 64
    holdout_windows: int | None = 16
    test_windows: int | None = None
    sequence_length: int | None = None

    @property
    def label(self) -> str:
        return pathlib.Path(self.path).name if self.name is None else self.name

    def text(self, purpose: Purpose) -> str:
        """The text of the split that serves ``purpose``.

        Raises ValueError in one sentence for a missing path, split or column and for a hub out of reach.
        """
        split = {"train": TRAIN_SPLIT, "calibration": self.calibration_split, "test": self.test_split}[purpose]
        local = pathlib.Path(self.path)
        if local.is_file():
            return _part_of_file(local, purpose)
        rows = [" ".join(row) for row in rows_of(self.path, self.name, split, self.columns, self.columns)]
        if self.separator is None:
            return "\n".join(row.removesuffix("\n") for row in rows)
        return self.separator.join(row if not row or row.endswith("\n") else row + "\n" for row in rows)


def rows_of(
    path: str, name: str | None, split: str, columns: Sequence[str], texts: Sequence[str]
) -> list[tuple[Any, ...]]:
    """The ``columns`` of every row of a split, of a set on the hub or of a local folder; those in ``texts`` are text.

    Raises ValueError in one sentence for a missing path, split or column and for a hub out of reach.
    """
    import datasets

    datasets.disable_progress_bars()
    local = pathlib.Path(path).is_dir()
    if not local and (path.startswith((".", "/", "~")) or path.count("/") > 1):
        raise ValueError(f"the dataset {path} does not exist; set dataset.path to a text file or a folder of splits")
    if not local:
        hub.use_cache_if_unreachable()
    try:
        splits = datasets.load_dataset(path, None if local else name)
    except Exception as error:  # the hub client's errors share no base class
        where = "the folder" if local else "the Hugging Face hub (no network, or no such name)"
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ValueError(
            f"the dataset {path} cannot be read from {where}; point dataset.path at a local folder: {first}"
        ) from error
    if split not in splits:
        raise ValueError(
            f"the dataset {path} has no split {split!r}, only {', '.join(splits)}; "
            "set dataset.calibration_split or dataset.test_split"
        )
    table = splits[split]
    if missing := [column for column in columns if column not in table.column_names]:
        raise ValueError(
            f"the dataset {path} has no column {', '.join(missing)}, only {', '.join(table.column_names)}; "
            "set dataset.columns"
        )
    contents: list[Iterable[Any]] = [table[column] for column in columns]
    rows = list(zip(*contents, strict=True))
    for column, value in zip(columns, rows[0] if rows else (), strict=bool(rows)):
        if column in texts and not isinstance(value, str):
            raise ValueError(f"the column {column} of {path} holds {type(value).__name__}, not text")
    return rows


def _part_of_file(path: pathlib.Path, purpose: Purpose) -> str:
    try:
        content = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text ({error}); convert it first") from error
    cut = int(len(content) * FILE_CALIBRATION_SHARE)
    return content[:cut] if purpose == "calibration" else content[cut:]


def sha256(text: str) -> str:
    """The hexadecimal sha256 of a text."""
    return hashlib.sha256(text.encode()).hexdigest()


def windows(text: str, tokenizer: Any, length: int, what: str) -> Int[Tensor, "windows length"]:
    """``text``, tokenized once, as consecutive windows of ``length`` tokens; the tail is dropped.  Where a tokenizer
    puts sentences between two special tokens, so is every window.

    Raises ValueError if not even one window comes out; ``what`` says in the message which text it was.
    """
    ends = [getattr(tokenizer, name, None) for name in ("cls_token_id", "sep_token_id")]
    between = None not in ends
    options = {"add_special_tokens": False} if between else {}
    tokens = torch.tensor(tokenizer(text, verbose=False, **options)["input_ids"], dtype=torch.long)
    own = length - 2 if between else length
    if len(tokens) < own:
        raise ValueError(
            f"the {what} text has {len(tokens)} tokens, too short for one window of {length}; "
            "give more text or a smaller dataset.sequence_length"
        )
    found = tokens[: len(tokens) // own * own].view(-1, own)
    if not between:
        return found
    return functional.pad(functional.pad(found, (1, 0), value=ends[0]), (0, 1), value=ends[1])


def first(pool: Int[Tensor, "windows length"], asked: int | None, what: str) -> Int[Tensor, "asked length"]:
    """The first windows of the text that judges, or without a wish all of them.

    Raises ValueError if there are not as many; ``what`` says in the message which text it was.
    """
    if asked is not None and asked < 1:
        raise ValueError(f"dataset.test_windows={asked} must be at least 1, or null for all there are")
    if asked is not None and len(pool) < asked:
        raise ValueError(f"the {what} text has {len(pool)} windows, fewer than dataset.test_windows={asked}")
    return pool[:asked]


def draw(
    pool: Int[Tensor, "windows length"], calibration: int | None, holdout: int | None, rng: np.random.Generator
) -> tuple[Int[Tensor, "calibration length"], Int[Tensor, "holdout length"]]:
    """Two disjoint random sets of windows; without a wish all there are, ``WINDOWS`` at most, a quarter of them held
    out.  Raises ValueError if there are not enough."""
    most = min(len(pool), WINDOWS)
    if None in (calibration, holdout) and most < 2:
        raise ValueError(f"the calibration text fills only {most} window of {pool.shape[1]} tokens: give more text")
    holdout = max(most // 4, 1) if holdout is None else holdout
    calibration = most - holdout if calibration is None else calibration
    if calibration < 1 or holdout < 1:
        raise ValueError("dataset.calibration_windows and dataset.holdout_windows must be at least 1")
    if len(pool) < calibration + holdout:
        raise ValueError(
            f"the calibration text has {len(pool)} windows, fewer than the {calibration} + {holdout} asked for; lower "
            "dataset.calibration_windows, dataset.holdout_windows or dataset.sequence_length, or leave the first two "
            "null for as many as there are (of the command nashswarm: --windows, --length)"
        )
    order = torch.from_numpy(rng.permutation(len(pool)))
    return pool[order[:calibration]], pool[order[calibration : calibration + holdout]]
