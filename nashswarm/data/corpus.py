"""Read text, from the embedded corpus, the Hugging Face hub, a local folder or a file, and cut it into windows.

A window is a row of consecutive tokens that a model reads at once.
"""

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
from nashswarm.data.text_file import read_file

Purpose = Literal["train", "calibration", "test"]
CALIBRATION_WINDOWS = 64  # the most to draw by default, held-out ones included
TRAIN_SPLIT = "train"  # of task=train_moe
FILE_CALIBRATION_SHARE = 0.2  # the beginning of a single text file calibrates, the rest tests


@runtime_checkable
class Dataset(Protocol):
    """A source of text with the numbers of windows to take from it.

    ``test_windows``: None means all.  ``calibration_windows`` and ``holdout_windows``: None means as many as
    ``draw_windows`` takes by default.  ``sequence_length``: tokens of a window, None means the model's maximum.
    """

    calibration_windows: int | None
    holdout_windows: int | None
    test_windows: int | None
    sequence_length: int | None

    @property
    def label(self) -> str: ...

    def text(self, purpose: Purpose) -> str: ...


@dataclasses.dataclass(frozen=True)
class StdlibDocs:
    """The prose in CPython's own source files: nothing has to be downloaded."""

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
    """A dataset on the Hugging Face hub, a local folder with the same splits, or a local text file.

    ``name``: the configuration on the hub; a local folder has none.  ``columns``: joined by a space within a row.
    ``separator``: put between rows, each of which ends in a newline unless it is empty, as in the GPTQ protocol; None
    joins the lines as the file has them.
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
        """Read the text of the split for ``purpose``.

        Raises ValueError in one sentence for a missing path, split or column and for a hub out of reach.
        """
        split = {"train": TRAIN_SPLIT, "calibration": self.calibration_split, "test": self.test_split}[purpose]
        local = pathlib.Path(self.path)
        if local.is_file():
            return _part_of_file(local, purpose)
        rows = [" ".join(row) for row in read_rows(self.path, self.name, split, self.columns, self.columns)]
        if self.separator is None:
            return "\n".join(row.removesuffix("\n") for row in rows)
        return self.separator.join(row if not row or row.endswith("\n") else row + "\n" for row in rows)


def read_rows(
    path: str, name: str | None, split: str, columns: Sequence[str], texts: Sequence[str]
) -> list[tuple[Any, ...]]:
    """Read ``columns`` of every row of a split, from the hub or a local folder; the columns in ``texts`` must be text.

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
        place = "the folder" if local else "the Hugging Face hub (no network, or no such name)"
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ValueError(
            f"the dataset {path} cannot be read from {place}; point dataset.path at a local folder: {reason}"
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
    content = read_file(path)
    cut = int(len(content) * FILE_CALIBRATION_SHARE)
    return content[:cut] if purpose == "calibration" else content[cut:]


def sha256(text: str) -> str:
    """Return the sha256 of a text in hexadecimal digits."""
    return hashlib.sha256(text.encode()).hexdigest()


def cut_windows(text: str, tokenizer: Any, length: int, purpose: str) -> Int[Tensor, "windows length"]:
    """Tokenize ``text`` once and cut it into consecutive windows of ``length`` tokens; an incomplete tail is dropped.

    If the tokenizer puts a sentence between two special tokens, each window starts and ends with them.  Raises
    ValueError if the text is too short for one window; ``purpose`` names the text in the message.
    """
    special = [getattr(tokenizer, name, None) for name in ("cls_token_id", "sep_token_id")]
    enclosed = None not in special
    options = {"add_special_tokens": False} if enclosed else {}
    tokens = torch.tensor(tokenizer(text, verbose=False, **options)["input_ids"], dtype=torch.long)
    windows = _rows(tokens, length - 2 if enclosed else length, length, purpose)
    if not enclosed:
        return windows
    return functional.pad(functional.pad(windows, (1, 0), value=special[0]), (0, 1), value=special[1])


def begun_windows(text: str, tokenizer: Any, length: int, purpose: str) -> Int[Tensor, "windows length"]:
    """Cut ``text`` as ``cut_windows`` does, but begin every window as the tokenizer begins a text.

    A model whose texts begin with the token BOS (beginning of sequence) is used to it at the first position, which
    attention treats unlike all others.  Raises ValueError as ``cut_windows`` does.
    """
    if not begins_with_bos(tokenizer):
        return cut_windows(text, tokenizer, length, purpose)
    tokens = torch.tensor(tokenizer(text, verbose=False, add_special_tokens=False)["input_ids"], dtype=torch.long)
    return functional.pad(_rows(tokens, length - 1, length, purpose), (1, 0), value=tokenizer.bos_token_id)


def begins_with_bos(tokenizer: Any) -> bool:
    """Check whether ``tokenizer`` begins a text with the token BOS and does not end it with another special token."""
    bos = getattr(tokenizer, "bos_token_id", None)
    return bos is not None and tokenizer("a")["input_ids"] == [
        bos,
        *tokenizer("a", add_special_tokens=False)["input_ids"],
    ]


def _rows(tokens: Int[Tensor, " tokens"], inner: int, length: int, purpose: str) -> Int[Tensor, "windows inner"]:
    """Rows of ``inner`` tokens; an incomplete tail is dropped.  Raises ValueError if there are none."""
    if len(tokens) < inner:
        raise ValueError(
            f"the {purpose} text has {len(tokens)} tokens, too short for one window of {length}; "
            "give more text or a smaller dataset.sequence_length"
        )
    return tokens[: len(tokens) // inner * inner].view(-1, inner)


def first_windows(
    windows: Int[Tensor, "windows length"], count: int | None, purpose: str
) -> Int[Tensor, "count length"]:
    """Return the first ``count`` windows, or all of them for None.

    Raises ValueError if there are fewer; ``purpose`` names the text in the message.
    """
    if count is not None and count < 1:
        raise ValueError(f"dataset.test_windows={count} must be at least 1, or null for all there are")
    if count is not None and len(windows) < count:
        raise ValueError(f"the {purpose} text has {len(windows)} windows, fewer than dataset.test_windows={count}")
    return windows[:count]


def most_windows(method: Any) -> int:
    """Return how many windows ``draw_windows`` is to draw by default for a compression method."""
    return CALIBRATION_WINDOWS * getattr(method, "windows_factor", 1)


def draw_windows(
    windows: Int[Tensor, "windows length"],
    calibration: int | None,
    holdout: int | None,
    rng: np.random.Generator,
    most: int = CALIBRATION_WINDOWS,
) -> tuple[Int[Tensor, "calibration length"], Int[Tensor, "holdout length"]]:
    """Draw two disjoint random sets of windows: one to calibrate on and one to hold out.

    By default (None) all windows are drawn, ``most`` at most, and a quarter of them is held out.  Raises ValueError if
    there are not enough.
    """
    most = min(len(windows), most)
    if None in (calibration, holdout) and most < 2:
        raise ValueError(f"the calibration text fills only {most} window of {windows.shape[1]} tokens: give more text")
    holdout = max(most // 4, 1) if holdout is None else holdout
    calibration = most - holdout if calibration is None else calibration
    if calibration < 1 or holdout < 1:
        raise ValueError("dataset.calibration_windows and dataset.holdout_windows must be at least 1")
    if len(windows) < calibration + holdout:
        raise ValueError(
            f"the calibration text has {len(windows)} windows, fewer than the {calibration} + {holdout} asked for; "
            "give more text, or lower dataset.calibration_windows or dataset.sequence_length"
        )
    order = torch.from_numpy(rng.permutation(len(windows)))
    return windows[order[:calibration]], windows[order[calibration : calibration + holdout]]
