"""Compress a model into a GGUF file of a given size, for llama.cpp: ``--to gguf``.

The file has the tokenizer, its chat template and the hyperparameters as llama.cpp's own converter writes them, and the
game of its tensors, from which ``nashswarm inspect`` computes their regret again.
"""

import collections
import logging
import pathlib
import time
from typing import Any

from omegaconf import DictConfig

from nashswarm.errors import require
from nashswarm.experiment import compression, plan
from nashswarm.methods.gguf_types import settings
from nashswarm.methods.gguf_types.type_game import certificate
from nashswarm.models import gguf_architectures, gguf_file

SUFFIX = ".gguf"
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


def check_out(out: pathlib.Path | None) -> pathlib.Path:
    """Return the path of a GGUF file to write.  Raises ValueError if there is none, or if it cannot be a new file."""
    require("--to gguf", ["gguf"], "models")
    if out is None or out.suffix != SUFFIX:
        raise ValueError(f"--out {out or ''}: name a file that ends in {SUFFIX}")
    if out.exists():
        raise ValueError(f"--out {out} exists; name another file or delete it")
    return out


def compress(
    config: DictConfig, out: pathlib.Path, target_bytes: int | None, target_bits: float | None
) -> dict[str, Any]:
    """Write the model of ``config`` to ``out`` in at most so many bytes or bits per parameter; return what was done.

    Raises ValueError in one sentence for a model or a tokenizer that cannot be written as GGUF, before calibrating, and
    for a size below that of the smallest types.
    """
    if (target_bytes is None) == (target_bits is None):
        raise ValueError("--to gguf: say how large the file is to be, with either --target-size or --target-bits")
    started, planned = time.monotonic(), plan.plan(config)
    method = planned.method
    assert isinstance(method, settings.GgufTypes)
    loaded = compression.load(config, planned)
    session, tokenizer, name = loaded.session, loaded.tokenizer, planned.source.label
    gguf_architectures.check_writable(session.full)
    total = int(target_bits * session.parameters / 8) if target_bits is not None else target_bytes
    assert total is not None
    others = settings.other_bytes(session.full, session.layers, method.actions, tokenizer, name)
    rounded = method.round(session.context(), total, others)
    packed = {f"{layer}.weight": tensor for layer, tensor in rounded.packed.items()}
    keys = certificate(rounded.game, session.full)
    gguf_file.write(session.full, out, "float16", tokenizer, name, packed, keys)
    size = out.stat().st_size
    if size < (1 - SLACK) * total:
        log.warning(
            "%s is %.1f %% smaller than asked: no tensor has a better type that fits", out, 100 - 100 * size / total
        )
    types = collections.Counter(tensor.type for tensor in rounded.packed.values())
    return {
        "file": str(out),
        "bytes_file": size,
        "bytes_asked": total,
        "bits_per_weight_model": 8 * size / session.parameters,
        "tensors": dict(sorted(types.items())),
        "damage": sum(rounded.damage.values()),
        **rounded.game.metrics(),
        "seconds": round(time.monotonic() - started, 1),
    }
