"""Write and read the folder of a compressed model, with all that is needed to certify it.

``model.safetensors`` (packed matrices, code tables, all other tensors) and ``config.json`` are the model: transformers
loads them, and the sum of their lengths is the model's size in bytes.  The tokenizer's files and ``README.md``, the
model card, go with it.  ``nashswarm.json`` holds the config that made the model, its record and checksums;
``game.safetensors`` holds the inputs of the game, if there was one.  These two serve to check the model; no decoder
needs them, and they do not count.
"""

import dataclasses
import hashlib
import json
import pathlib
import tempfile
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import safetensors
import safetensors.numpy

from nashswarm.packed.card import card
from nashswarm.records.files import write_folder
from nashswarm.records.record import Record, fingerprint

WEIGHTS, ABOUT, GAME, CARD = "model.safetensors", "nashswarm.json", "game.safetensors", "README.md"
SCHEMA = 1


@dataclasses.dataclass(frozen=True)
class SavedModel:
    """The contents of a folder: ``about`` (``config`` and ``record``), the stored ``tensors`` and those of ``game``."""

    about: dict[str, Any]
    tensors: dict[str, np.ndarray]
    game: dict[str, np.ndarray]


def check_free(folder: pathlib.Path) -> None:
    """Raise ValueError if ``folder`` exists and is not an empty folder, OSError if it cannot be written."""
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise ValueError(f"save={folder} is not an empty folder; name another one or delete it")
    above = next(path for path in folder.absolute().parents if path.exists())
    try:
        tempfile.TemporaryDirectory(prefix=".nashswarm-", dir=above).cleanup()
    except OSError as error:
        raise OSError(error.errno, f"cannot write {folder}: {error.strerror}") from error


def holds(folder: pathlib.Path, name: str) -> bool:
    """Check whether ``folder`` holds the model of the run with the fingerprint ``name``."""
    return (folder / ABOUT).is_file() and fingerprint(_about(folder)["record"]["config"]) == name


def record_in(folder: pathlib.Path) -> Record:
    """Return the record of the run that saved its model in ``folder``."""
    return Record(**_about(folder)["record"])


def write(
    folder: pathlib.Path,
    files: Mapping[str, bytes],
    about: Mapping[str, Any],
    game: Mapping[str, np.ndarray],
    tokenizer: Any = None,
    check: Callable[[pathlib.Path], object] = lambda folder: None,
) -> None:
    """Write a compressed model to ``folder`` in one step.

    ``files``: weights and config.  ``about``: the config that made the model, its record, and what its card says
    beside.  ``game``: the tensors to certify it with, which may be empty.  ``check`` sees all files before the folder
    gets its name, and may raise.  Raises OSError with the path in its message; then nothing is left behind.
    """
    contents = dict(files)
    if game:
        contents[GAME] = safetensors.numpy.save({name: np.ascontiguousarray(part) for name, part in game.items()})
    sums = {name: hashlib.sha256(content).hexdigest() for name, content in contents.items()}
    text = json.dumps({"schema": SCHEMA, "sha256": sums, **about}, indent=1, ensure_ascii=False, allow_nan=False)
    texts = {ABOUT: f"{text}\n".encode(), CARD: card(about).encode()}
    fill = tokenizer.save_pretrained if tokenizer else lambda folder: None
    write_folder(folder, contents | texts, fill, check)


def write_model(folder: pathlib.Path, model: Any, tokenizer: Any, about: Mapping[str, Any]) -> None:
    """Write a trained model, its tokenizer, its config and its record to ``folder`` in one step."""

    def fill(partial: pathlib.Path) -> None:
        model.save_pretrained(partial)
        tokenizer.save_pretrained(partial)

    text = json.dumps({"schema": SCHEMA, "sha256": {}, **about}, indent=1, ensure_ascii=False, allow_nan=False)
    write_folder(folder, {ABOUT: f"{text}\n".encode()}, fill)


def read(folder: pathlib.Path) -> SavedModel:
    """Read what ``write`` wrote.  Raises ValueError if a file is missing or changed."""
    about = _about(folder)
    if "by_layer" in about:
        raise ValueError(f"{folder} was compressed by layer: no game was kept that could be certified or played again")
    contents = {}
    for name, digest in about["sha256"].items():
        if not (folder / name).is_file():
            raise ValueError(f"{folder} lacks {name}; copy the whole folder again")
        contents[name] = (folder / name).read_bytes()
        if hashlib.sha256(contents[name]).hexdigest() != digest:
            raise ValueError(f"the checksum of {folder / name} is wrong: the file is damaged; copy it again")
    tensors, game = (safetensors.numpy.load(contents[name]) if name in contents else {} for name in (WEIGHTS, GAME))
    return SavedModel(about, tensors, game)


def training_text(folder: pathlib.Path) -> str | None:
    """Return the sha256 of the text that ``task=train_moe`` trained the model on; None for any other model."""
    if not (folder / ABOUT).is_file():
        return None
    dataset = _about(folder).get("record", {}).get("config", {}).get("dataset", {})
    sha256: str | None = dataset.get("train_sha256")
    return sha256


def _about(folder: pathlib.Path) -> dict[str, Any]:
    try:
        about = json.loads((folder / ABOUT).read_text())
        if about["schema"] == SCHEMA:
            return dict(about)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{folder} holds no compressed model: {ABOUT} cannot be read ({error})") from error
    raise ValueError(f"{folder / ABOUT} has schema {about['schema']}, this version reads schema {SCHEMA}")
