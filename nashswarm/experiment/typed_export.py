"""Compress a model to a given size for another runtime: ``--to gguf`` and ``--to compressed-tensors``.

A GGUF file has the tokenizer, its chat template and the hyperparameters as llama.cpp's own converter writes them.  A
folder of compressed-tensors is one of transformers.  Both hold the game of their tensors, from which
``nashswarm inspect`` computes their regret again.
"""

import argparse
import collections
import logging
import pathlib
import time
from collections.abc import Sequence
from typing import Any

from omegaconf import DictConfig

from nashswarm.errors import require
from nashswarm.experiment import compression, plan
from nashswarm.methods import compressed_tensors
from nashswarm.methods.gguf_types import certificate, settings
from nashswarm.methods.type_game import TypeGame
from nashswarm.models import compressed_tensors_folder, gguf_architectures, gguf_file
from nashswarm.packed import model_folder

SUFFIX = ".gguf"
GGUF, FOLDER = "gguf", compressed_tensors_folder.PACKAGE
KINDS = (FOLDER, GGUF)
SLACK = 0.003  # share of the size asked for, below which nobody is told that bytes are left
UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
log = logging.getLogger(__name__)


def parse_size(text: str) -> int:
    """Return the bytes that a text like 4.2GB, 350 MiB or 1000000 names.  Raises ValueError for any other text.

    >>> parse_size("4.2GB"), parse_size("1.5 KiB"), parse_size("77")
    (4200000000, 1536, 77)
    """
    number = text.rstrip("BbGgIiKkMm ")
    unit = text[len(number) :].strip().upper()
    if unit not in UNITS or not number.strip().replace(".", "", 1).isdigit():
        raise ValueError(f"{text!r} is no size: write a number of bytes, or one of KB, MB, GB, KiB, MiB or GiB")
    return int(float(number) * UNITS[unit])


def size(text: str) -> int:
    """Return the bytes that an option names.  Raises ArgumentTypeError, of which argparse prints the message."""
    try:
        return parse_size(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def check_out(kind: str, out: pathlib.Path | None) -> None:
    """Raise ValueError if a file or folder of this kind cannot be written to ``out``, or if there is no path."""
    if kind == FOLDER:
        require(f"--to {kind}", ["compressed-tensors"], "vllm")
        if out is None:
            raise ValueError("--out: name a new folder")
        model_folder.check_free(out)
        return
    require("--to gguf", ["gguf"], "models")
    if out is None or out.suffix != SUFFIX:
        raise ValueError(f"--out {out or ''}: name a file that ends in {SUFFIX}")
    if out.exists():
        raise ValueError(f"--out {out} exists; name another file or delete it")


def method_of(kind: str, types: Sequence[str] | None) -> settings.GgufTypes | compressed_tensors.CompressedTensors:
    """Return the method that writes files of this kind.  Raises ValueError for a type that they do not have."""
    if kind == GGUF:
        return settings.GgufTypes(types=types or certificate.ALL_TYPES)
    return compressed_tensors.CompressedTensors(types=types or compressed_tensors.TYPES)


def compress(
    config: DictConfig, out: pathlib.Path, target_bytes: int | None, target_bits: float | None
) -> dict[str, Any]:
    """Write the model of ``config`` to ``out`` in at most so many bytes or bits per parameter; return what was done.

    The method of ``config`` says what is written.  Raises ValueError in one sentence for a model or a tokenizer that
    cannot be written so, before calibrating, and for a size below that of the smallest types.
    """
    if (target_bytes is None) == (target_bits is None):
        raise ValueError("say how large the result is to be, with either --target-size or --target-bits")
    started, planned = time.monotonic(), plan.plan(config)
    method = planned.method
    loaded = compression.load(config, planned)
    total = int(target_bits * loaded.session.parameters / 8) if target_bits is not None else target_bytes
    assert total is not None
    if isinstance(method, settings.GgufTypes):
        game, types, damage = _write_gguf(method, loaded, planned.source.label, total, out)
        size = out.stat().st_size
    else:
        assert isinstance(method, compressed_tensors.CompressedTensors)
        game, types, damage = _write_folder(method, loaded, planned.source.label, total, out)
        size = sum((out / name).stat().st_size for name in (compressed_tensors_folder.WEIGHTS, "config.json"))
    if size < (1 - SLACK) * total:
        log.warning(
            "%s is %.1f %% smaller than asked: no tensor has a better type that fits", out, 100 - 100 * size / total
        )
    return {
        "file" if out.is_file() else "folder": str(out),
        "bytes_file": size,
        "bytes_asked": total,
        "bits_per_weight_model": 8 * size / loaded.session.parameters,
        "tensors": dict(sorted(collections.Counter(types).items())),
        "damage": sum(damage.values()),
        **game.metrics(),
        "seconds": round(time.monotonic() - started, 1),
    }


Written = tuple[TypeGame, list[str], dict[str, float]]  # the game, the type of each matrix, and their damages


def _write_gguf(
    method: settings.GgufTypes, loaded: compression.LoadedRun, name: str, total: int, out: pathlib.Path
) -> Written:
    session, tokenizer = loaded.session, loaded.tokenizer
    gguf_architectures.check_writable(session.full)
    others = settings.other_bytes(session.full, session.layers, method.actions, tokenizer, name)
    rounded = method.round(session.context(), total, others)
    packed = {f"{layer}.weight": tensor for layer, tensor in rounded.packed.items()}
    keys = certificate.certificate(rounded.game, session.full)
    gguf_file.write(session.full, out, "float16", tokenizer, name, packed, keys)
    return rounded.game, [tensor.type for tensor in rounded.packed.values()], rounded.damage


def _write_folder(
    method: compressed_tensors.CompressedTensors, loaded: compression.LoadedRun, name: str, total: int,
    out: pathlib.Path,
) -> Written:  # fmt: skip
    context = loaded.session.context()
    rounded = method.round(context, total, method.other_bytes(context))
    files = {compressed_tensors.GAME: compressed_tensors.certificate(rounded.game)}
    compressed_tensors_folder.write(loaded.session.full, out, rounded.packed, loaded.tokenizer, name, files)
    return rounded.game, list(compressed_tensors.named(rounded.packed).values()), rounded.damage
