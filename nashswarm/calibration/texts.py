"""Choose the text to calibrate on: what comes with Python, what the model samples itself, the hub's, or the user's.

A compressed model is good on text like that which it was calibrated on.  No single source is like every text, so the
default mixes several.
"""

import copy
import dataclasses
import functools
import logging
import os
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import torch
from jaxtyping import Integer
from torch import Tensor

from nashswarm.calibration.cache import Cache
from nashswarm.data import corpus, stdlib_docs, stdlib_source
from nashswarm.data.text_file import read_file
from nashswarm.models import sources
from nashswarm.models.sampled_text import sample_text
from nashswarm.progress import Track, show_progress
from nashswarm.records.provenance import code_digest

log = logging.getLogger(__name__)
AUTO, OWN = "auto", "own"
ONLINE, OFFLINE, WITHOUT_MODEL = "hub+embedded", "own+embedded", "embedded"  # what AUTO stands for
CHARACTERS = 160_000  # of a mixture, about 40,000 tokens
CHARACTERS_OF_TOKEN = 4  # of English text
PIECE = 2_000  # characters of a text that are taken together
FILE_BYTES = 2_000_000  # of one file that are read, unless windows need more
BYTES_OF_TOKEN = 8  # at most, in most languages
COLUMN = "::"  # between a file and the column of it that calibrates
HUB_DATASET = "Salesforce/wikitext"
HUB_VARIABLE = "NASHSWARM_WIKITEXT2_RAW"  # names a local folder that stands in for the hub's text
DESCRIPTIONS = {
    "embedded": "Python's documentation",
    "code": "source code of Python's standard library",
    OWN: "text that the model samples itself",
    "hub": "Wikipedia (WikiText-2 of the hub)",
}
KNOWN = (AUTO, *DESCRIPTIONS)
OwnText = Callable[[int], str]  # tokens -> text


@dataclasses.dataclass(frozen=True)
class CalibrationText:
    """A text to calibrate on, and another to test on.

    ``source``: ``auto``, the hub's text in a mixture if it can be reached and text of the model's own if not;
    ``embedded``, ``code``, ``own`` or ``hub``; a text file, a table or a folder, with ``::COLUMN`` for a column of it;
    or several of these joined by ``+``, in equal shares.  ``test``: the dataset whose test text measures; None takes
    the embedded one.  Windows begin as the tokenizer begins a text.  Other fields are those of ``corpus.Dataset``.
    """

    source: str = AUTO
    test: Any = None
    calibration_windows: int | None = 48
    holdout_windows: int | None = 16
    test_windows: int | None = None
    sequence_length: int | None = None

    @property
    def label(self) -> str:
        return named(self.source)

    def text(self, purpose: corpus.Purpose) -> str:
        """Return the text for ``purpose``.

        Raises ValueError for text of the model's own, which ``read`` samples.
        """
        if purpose == "calibration":
            return read(self.source, None)
        return stdlib_docs.text(purpose) if self.test is None else str(self.test.text(purpose))


def parts_of(source: str) -> list[str]:
    """Return the parts of a mixture; a path that exists is one part, whatever its name."""
    path, column = _path_and_column(source)
    return [source] if os.path.exists(path) and "+" not in (column or "") else source.split("+")


def _path_and_column(part: str) -> tuple[str, str | None]:
    """Return the path of a file or folder, and the column of it that is given behind ``::``, if any."""
    path, mark, column = part.rpartition(COLUMN)
    return (path, column) if mark and column and not os.path.exists(part) else (part, None)


def bytes_for(windows: int, length: int) -> int:
    """Return how many bytes of a file to read for so many windows of ``length`` tokens."""
    return max(FILE_BYTES, BYTES_OF_TOKEN * windows * length)


def named(source: str) -> str:
    """Return ``source`` with the names of files and folders in place of their paths."""
    given = [_path_and_column(part) for part in parts_of(source)]
    return "+".join(pathlib.Path(path).name + (COLUMN + column if column else "") for path, column in given)


def checked(source: str, door: str) -> str:
    """Return ``source`` with absolute paths; it was given as ``door`` (``--calibration ``, ``dataset.source=``).

    Raises ValueError in one sentence if a part of it is neither a file, nor a folder, nor a known source.
    """
    found = []
    for part in parts_of(source):
        path, column = _path_and_column(part)
        if part not in KNOWN and not os.path.exists(path):
            raise ValueError(
                f"{door}{part} is not a file, a folder or a source of text; choose a text file, {', '.join(KNOWN)}, or "
                "several joined by +"
            )
        given = "" if column is None else COLUMN + column
        found.append(part if part in KNOWN else f"{pathlib.Path(path).resolve()}{given}")
    return "+".join(found)


def resolve(source: str, own: bool = True) -> str:
    """Return what ``auto`` stands for here and now; any other source stays as it is.

    ``own``: whether the model can sample text.
    """
    if source != AUTO:
        return source
    try:
        hub_text()
    except ValueError as error:
        log.debug("the hub's text is out of reach: %s", error)
        return OFFLINE if own else WITHOUT_MODEL
    return ONLINE


def read(source: str, own: OwnText | None, most: int = FILE_BYTES) -> str:
    """Return the text of ``source``; a mixture has equal shares of its parts.

    ``own``: samples text from the model, None if it cannot.  ``most``: about how many bytes of one file to read; larger
    ones are read in pieces that are spread evenly over them.  Raises ValueError in one sentence for an unknown source,
    a file or folder without text, a hub out of reach, and for text of its own from a model that cannot sample.
    """
    parts = parts_of(resolve(checked(source, "dataset.source="), own is not None))
    characters = CHARACTERS // len(parts)
    texts = [_read_part(part, own, characters, most) for part in parts]
    return texts[0] if len(texts) == 1 else "\n\n".join(excerpt(text, characters) for text in texts)


def _read_part(part: str, own: OwnText | None, characters: int, most: int) -> str:
    if part == OWN:
        if own is None:
            raise ValueError("this model cannot sample a calibration text of its own: name another source or a file")
        return own(characters // CHARACTERS_OF_TOKEN)
    if part == "hub":
        return hub_text()
    if part == "embedded":
        return stdlib_docs.text("calibration")
    if part == "code":
        return stdlib_source.text("calibration")
    name, column = _path_and_column(part)
    path = pathlib.Path(name)
    if path.is_file():
        return read_file(path, column, most)
    columns = corpus.HubText.columns if column is None else (column,)
    return corpus.HubText(name, columns=columns, calibration_split=_split_of(path)).text("calibration")


def _split_of(folder: pathlib.Path) -> str:
    """Return the split of a folder to calibrate on: the training text if it has any, else the validation text."""
    return "train" if any(path.name.startswith("train") for path in folder.rglob("*")) else "validation"


def hub_text() -> str:
    """Return the training text of WikiText-2, from the hub, its cache, or the folder that stands in for it.

    Raises ValueError if it is out of reach.
    """
    return _hub_text(os.environ.get(HUB_VARIABLE, HUB_DATASET))


@functools.cache
def _hub_text(path: str) -> str:
    return corpus.HubText(path, "wikitext-2-raw-v1", separator="\n\n", calibration_split="train").text("calibration")


def excerpt(text: str, characters: int) -> str:
    """Return about so many characters of ``text``: pieces of whole lines, spread evenly over it."""
    if len(text) <= characters:
        return text
    count = max(characters // PIECE, 1)
    pieces = []
    for number in range(count):
        first = text.find("\n", number * len(text) // count) + 1
        piece = text[first : first + characters // count]
        pieces.append(piece[: piece.rfind("\n") + 1] or piece)
    return "\n\n".join(pieces)


def own_of(model: Any, tokenizer: Any, track: Track = show_progress) -> OwnText:
    """Return a function that samples text from ``model``, in float32."""

    def own(tokens: int) -> str:
        full = model if model.dtype == torch.float32 else copy.deepcopy(model).float()
        training = full.training
        text = sample_text(full.eval(), tokenizer, tokens, track=track)
        full.train(training)
        return text

    return own


def cached_own(source: sources.Source, cache: pathlib.Path, track: Track = show_progress) -> OwnText:
    """Return a function that samples text from a model, or reads it from the cache, where the model's hash names it."""

    def own(tokens: int) -> str:
        key = {"model": sources.content_digest(source), "tokens": tokens}
        key |= {"torch": torch.__version__, "code": code_digest()}

        def compute() -> dict[str, Tensor]:
            loaded = sources.load(source, "cpu", torch.float32)
            content = own_of(loaded.model, loaded.tokenizer, track)(tokens).encode()
            return {"text": torch.frombuffer(bytearray(content), dtype=torch.uint8)}

        return bytes(Cache(cache, key)("own_text", {}, compute)["text"].numpy()).decode()

    return own


def describe(source: str) -> str:
    """Say in a few words what ``source`` is.

    >>> describe("own+embedded")
    "text that the model samples itself, Python's documentation"
    """
    return ", ".join(DESCRIPTIONS.get(part, part) for part in parts_of(source))


def announce(source: str, asked: str, better: str) -> None:
    """Log in one line what calibrates; ``better`` says how to give another text, in the words of the caller's door.

    It is a warning if nobody ``asked`` for this source and the hub was out of reach.
    """
    fallback = asked == AUTO and source != ONLINE
    why = " (the hub's text is out of reach)" if fallback else ""
    log.log(
        logging.WARNING if fallback else logging.INFO,
        "calibrating on %s%s; give text like that which the model will meet by %s", describe(source), why, better,
    )  # fmt: skip


def about(source: str, text: str, calibration: Integer[Tensor, "windows length"]) -> Mapping[str, Any]:
    """Return what a saved model's config says of its calibration: source, sha256 of the text, positions."""
    return {"source": named(source), "sha256": corpus.sha256(text), "positions": calibration.numel()}
