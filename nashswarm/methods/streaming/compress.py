"""The loop over the units of a checkpoint, and how an interrupted run is resumed.

Weights are read from mapped files, and the hidden states of a few calibration windows are passed from unit to unit.

Until the run is finished its folder is called ``FOLDER.unfinished``.  Each finished unit is a file in it, written
whole, and a run that was killed resumes after the last of them, to the same bytes.
"""

import contextlib
import dataclasses
import datetime
import hashlib
import json
import pathlib
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import safetensors.torch
import torch
from jaxtyping import Int
from torch import Tensor

from nashswarm import memory
from nashswarm.methods.streaming.block import States, compress_unit, first_states
from nashswarm.methods.streaming.layout import Layout, descriptions, file_bytes, layout, on_lines
from nashswarm.methods.streaming.settings import ByLayer
from nashswarm.methods.streaming.shards import Shards, Source
from nashswarm.methods.streaming.skeleton import Unit, structure_of, tensors_of, units
from nashswarm.packed import file_format, model_folder
from nashswarm.packed.card import card
from nashswarm.progress import Track, no_track
from nashswarm.records.files import claim, write_whole
from nashswarm.records.provenance import code_digest, provenance

STATES = "states"  # name of the files of hidden states


def compress(
    source: Source,
    tokenizer: Any,
    windows: Int[Tensor, "windows length"],
    out: pathlib.Path,
    settings: ByLayer,
    track: Track = no_track,
) -> dict[str, Any]:
    """Write the compressed model to ``out``, and return its bytes and what the run cost.

    The costs are wall-clock and processor seconds of all runs together, and the largest resident set in bytes.  A run
    with the same settings that was killed is resumed; one that finished is not repeated.

    Raises ValueError if the folder belongs to another run, and OSError if the disk has no room, both before any slow
    work.
    """
    files = layout(source.model, settings)
    state_bytes = 4 * windows.numel() * structure_of(source.model).width

    def left(work: pathlib.Path, about: Mapping[str, Any]) -> int:
        return sum(map(file_bytes, list(files.values())[len(about["units"]) :])) + 4 * state_bytes

    def fill(work: pathlib.Path, about: dict[str, Any]) -> Layout:
        for unit in track(units(source.model)[len(about["units"]) :], "compressing block by block"):
            _compress_next(work, about, source, unit, windows, settings, files)
        return files

    key = run_key(source, windows, dataclasses.asdict(settings))
    return into_folder(out, key, left, fill, source, tokenizer, "gptq, block by block")


def into_folder(
    out: pathlib.Path,
    key: Mapping[str, Any],
    left: Callable[[pathlib.Path, Mapping[str, Any]], int],
    fill: Callable[[pathlib.Path, dict[str, Any]], Layout],
    source: Source,
    tokenizer: Any,
    method: str,
) -> dict[str, Any]:
    """Let ``fill`` write the files of weights, complete the folder, and return the metrics of all runs of this ``key``.

    ``fill`` goes on where ``about["units"]`` ends, to which it adds by ``accounted``.  ``left``: the bytes on the disk
    that it still needs.  ``method``: its name on the card.

    Raises ValueError and OSError as ``compress`` does.
    """
    out = out.resolve()
    work = out.with_name(f"{out.name}.unfinished")
    with claim(out):
        if (out / model_folder.ABOUT).is_file() and _read_about(out).get("key") == key:
            return dict(_read_about(out)["record"]["metrics"])
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise ValueError(f"{out} is not an empty folder; name another one or delete it")
        about = _start_or_resume(work, key)
        _check_free_space(out, left(work, about))
        _write_about(work, about)
        files = fill(work, about)
        _complete(work, about, source, tokenizer, files, method)
        for path in work.glob(f".{STATES}*"):
            path.unlink()
        work.replace(out)
    return dict(about["record"]["metrics"])


def run_key(source: Source, windows: Int[Tensor, "windows length"], settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return everything that decides the bytes of a run; only a run with the same key can be resumed."""
    digest = hashlib.sha256(windows.numpy().tobytes()).hexdigest()
    return {
        "source": source.key(),
        "settings": dict(settings),
        "windows": [*windows.shape, digest],
        "code": code_digest(),
        "torch": torch.__version__,
    }


def _compress_next(
    work: pathlib.Path,
    about: dict[str, Any],
    source: Source,
    unit: Unit,
    windows: Int[Tensor, "windows length"],
    settings: ByLayer,
    files: Layout,
) -> None:
    """Compress ``unit``, write its tensors and its outputs, and add its costs to ``about``."""
    number = len(about["units"])
    with accounted(work, about, unit.modules) as facts:
        inputs = _read_inputs(work, number, source, windows)
        compressed = compress_unit(source, unit, inputs, windows, settings)
        if compressed.outputs is not None:
            write_tensors(work / _states_name(number + 1), vars(compressed.outputs))
        write_tensors(work / list(files)[number], compressed.tensors)
        facts["error"] = compressed.error
        del inputs, compressed
    (work / _states_name(number)).unlink(missing_ok=True)


@contextlib.contextmanager
def accounted(work: pathlib.Path, about: dict[str, Any], modules: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Add to ``about``, after the context, that its step is done and what it cost, and write it.

    Yields what else is to be said of the step.
    """
    started, processor_started = time.monotonic(), time.process_time()
    memory.reset_peak()
    facts: dict[str, Any] = {}
    yield facts
    memory.trim_heap()
    about["units"].append(
        {
            "modules": modules,
            "seconds": time.monotonic() - started,
            **facts,
            "cpu_seconds": time.process_time() - processor_started,
            "peak_bytes": memory.peak_bytes(),
        }
    )
    _write_about(work, about)


def _start_or_resume(work: pathlib.Path, key: Mapping[str, Any]) -> dict[str, Any]:
    """Return what is known of the run in ``work``, or of a new one.

    Raises ValueError if ``work`` holds something else or a run with another key.
    """
    if not work.exists():
        return {
            "schema": model_folder.SCHEMA,
            "by_layer": True,
            "key": key,
            "provenance": provenance(datetime.datetime.now(datetime.UTC)),
            "starts": 1,
            "units": [],
        }
    if (work / model_folder.ABOUT).is_file():
        about = _read_about(work)
    elif all(path.name.endswith(".partial") for path in work.iterdir()):  # killed before the first write of about
        about = {}
    else:
        raise ValueError(f"{work} is not the folder of an unfinished run; delete it or name another --out")
    if differing := [name for name, value in key.items() if about.get("key", key).get(name) != value]:
        raise ValueError(
            f"{work} holds the unfinished run of another {' and another '.join(differing)}; "
            "delete it, name another --out, or ask for the same again"
        )
    for partial in work.glob(".*.partial"):
        partial.unlink()
    if not about:
        work.rmdir()
        return _start_or_resume(work, key)
    return about | {"starts": about["starts"] + 1}


def _complete(
    work: pathlib.Path, about: dict[str, Any], source: Source, tokenizer: Any, files: Layout, method: str
) -> None:
    """Add index, config, tokenizer, model card and record to the finished files of weights."""
    paths = {name: work / file_name for file_name, tensors in files.items() for name in tensors}
    described = descriptions(source.model, files, file_format.checksum(Shards(paths)))
    for file_name, content in described.items():
        write_whole(work / file_name, content)
    tokenizer.save_pretrained(work)
    if (source.folder / "generation_config.json").is_file():
        shutil.copy(source.folder / "generation_config.json", work)
    size = sum((work / file_name).stat().st_size for file_name in (*files, *described))
    labels = {"model": source.folder.resolve().name, "method": method}
    about["record"] = {"labels": labels, "metrics": _metrics(about, source, files, size)}
    about["config"] = {"model": {"path": str(source.folder.resolve())}, "dataset": {}}
    write_whole(work / model_folder.CARD, card(about).encode())
    _write_about(work, about)


def _metrics(about: Mapping[str, Any], source: Source, files: Layout, size: int) -> dict[str, float]:
    packed = {name: part for tensors in files.values() for name, part in tensors.items() if part.dtype == torch.uint8}
    tensors = tensors_of(source.model)
    parameters = sum(part.numel() for part in tensors.values())
    seconds, processor_seconds = (sum(unit[name] for unit in about["units"]) for name in ("seconds", "cpu_seconds"))
    sizes = file_format.sizes_of(
        file_bytes=size,
        packed_bytes=sum(part.nbytes for part in packed.values()),
        packed_weights=sum(tensors[name].numel() for name in packed),
        parameters=parameters,
    )
    return sizes | {
        "parameters": parameters,
        "seconds": seconds,
        "cpu_seconds": processor_seconds,
        "peak_bytes": max(unit["peak_bytes"] for unit in about["units"]),
        "starts": about["starts"],
    }


def _read_inputs(
    work: pathlib.Path, number: int, source: Source, windows: Int[Tensor, "windows length"]
) -> States | None:
    """Return the states that unit ``number`` reads; None for an embedding, which reads the windows."""
    if (path := work / _states_name(number)).is_file():
        return States(**safetensors.torch.load_file(path))
    if number:
        raise ValueError(f"{work} lacks {path.name}, from which the run resumes; delete the folder and start again")
    return first_states(source, windows) if structure_of(source.model).tied else None


def _states_name(number: int) -> str:
    return f".{STATES}-{number:05d}.safetensors"


def _read_about(folder: pathlib.Path) -> dict[str, Any]:
    try:
        return dict(json.loads((folder / model_folder.ABOUT).read_text()))
    except ValueError as error:
        raise ValueError(f"{folder / model_folder.ABOUT} is damaged ({error}); delete {folder}") from error


def _write_about(work: pathlib.Path, about: Mapping[str, Any]) -> None:
    text = json.dumps(about, indent=1, ensure_ascii=False, allow_nan=False)
    write_whole(work / model_folder.ABOUT, f"{text}\n".encode())


def write_tensors(path: pathlib.Path, tensors: dict[str, Tensor], as_lines: bool = False) -> None:
    """Write a safetensors file in one step; ``as_lines``: with its matrices on cache lines."""
    content = safetensors.torch.save(tensors, {"format": "pt"})
    write_whole(path, on_lines(content) if as_lines else content)


def _check_free_space(out: pathlib.Path, needed: int) -> None:
    free = shutil.disk_usage(next(path for path in out.parents if path.exists())).free
    if free < needed:
        raise OSError(f"{out} needs {needed:,} bytes and the disk has {free:,} left; make room or name another --out")
