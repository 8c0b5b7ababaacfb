"""Compress a LLaMA that is larger than memory, one decoder block after the other.

Weights are read from mapped files; what the blocks before have made of a few calibration windows is carried on.  A
block sees its inputs as the compressed blocks before it give them out, H = E[x xᵀ] of every matrix is taken of those,
and without gradients every output counts alike (f = 1): the damage is the squared error of a matrix's outputs,
``½ Σ_o e_oᵀ H e_o``, and the codes are those of ``quant.reply``.  The head is the last of these matrices; an embedding
is rounded plainly.

Until all is done the folder is called ``FOLDER.unfinished``.  A finished block is a file there, written whole, and a
run that was killed goes on after the last of them: to the same bytes.
"""

import dataclasses
import datetime
import hashlib
import json
import pathlib
import shutil
import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import safetensors.torch
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRMSNorm, LlamaRotaryEmbedding

from nashswarm import memory
from nashswarm.methods.streaming.shards import (
    EMBEDDING,
    HEAD,
    INDEX,
    NORM,
    Shards,
    Source,
    file_bytes,
    names,
    some,
    tensors_of,
    units,
)
from nashswarm.models.sources import CONFIG
from nashswarm.packed import file_format, model_folder
from nashswarm.progress import Track, no_track
from nashswarm.quant.coordinate_descent import quantize_layer
from nashswarm.quant.curvature import DAMPING, TINY, Curvature, inverse_cholesky
from nashswarm.quant.error_feedback import row_chunks
from nashswarm.quant.grid import GRID_WIDTHS, QuantizedTensor, Scheme, quantize, row_blocks
from nashswarm.quant.pack import pack, packed_bytes
from nashswarm.records.files import claim, write_whole
from nashswarm.records.provenance import code_digest, provenance

ARCHITECTURE = "LlamaForCausalLM"
SHARED_INPUTS = (  # matrices of a block that read the same input
    ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    ("self_attn.o_proj",),
    ("mlp.gate_proj", "mlp.up_proj"),
    ("mlp.down_proj",),
)
FLOAT_BITS = 16  # of norms and biases
STATES = "states"
States = Float[Tensor, "windows length hidden"]


@dataclasses.dataclass(frozen=True)
class ByLayer:
    """``bits`` of every weight of a block; ``head_bits`` of embedding and head, None: ``bits``, but at least 4.
    ``sweeps`` of best replies after the pass; ``damping`` of the mean diagonal of H."""

    bits: int = 3
    head_bits: int | None = None
    group_size: int = 64
    sweeps: int = 0
    damping: float = DAMPING

    def __post_init__(self) -> None:
        if self.bits not in GRID_WIDTHS or self.outer_bits not in GRID_WIDTHS:
            raise ValueError(f"compress by layer knows {', '.join(map(str, GRID_WIDTHS))} bits, not {self._asked()}")
        if self.sweeps < 0 or self.damping <= 0:
            raise ValueError(f"sweeps={self.sweeps} must not be negative, damping={self.damping} above 0")

    def _asked(self) -> str:
        return f"{self.bits}" if self.head_bits is None else f"{self.bits} and {self.head_bits}"

    @property
    def outer_bits(self) -> int:
        return max(self.bits, 4) if self.head_bits is None else self.head_bits

    @property
    def scheme(self) -> Scheme:
        return Scheme(self.group_size, search=True)

    def width(self, name: str) -> int:
        """Bits of the codes of a matrix."""
        return self.outer_bits if name in (EMBEDDING, HEAD) else self.bits


def layout(model: Any, settings: ByLayer) -> list[dict[str, Tensor]]:
    """What every file will hold: tensors without memory, by name.

    Raises ValueError that names the matrices whose columns no group divides.
    """
    tensors = tensors_of(model)
    odd: list[str] = []

    def stored(name: str) -> Tensor:
        module, shape = name.removesuffix(".weight"), tensors[name].shape
        if not isinstance(model.get_submodule(name.rpartition(".")[0]), (nn.Linear, nn.Embedding)) or len(shape) != 2:
            return torch.empty(shape, dtype=torch.float16, device="meta")
        if shape[1] % settings.group_size:
            odd.append(f"{module} ({shape[1]})")
            return tensors[name]
        widths = np.full(row_blocks(shape[0]) * (shape[1] // settings.group_size), settings.width(module))
        return torch.empty(packed_bytes(widths, settings.scheme), dtype=torch.uint8, device="meta")

    files = [
        {name: stored(name) for name in tensors if name.startswith(tuple(f"{prefix}." for prefix in unit))}
        for unit in units(model.config)
    ]
    if odd:
        raise ValueError(f"the columns of {len(odd)} matrices are not divisible by {settings.group_size}: {some(odd)}")
    return files


def descriptions(config: Any, files: Sequence[Mapping[str, Tensor]], checksum: str) -> dict[str, bytes]:
    """What stands beside the files of weights: the index, and last the config."""
    total = sum(part.nbytes for tensors in files for part in tensors.values())
    weight_map = {name: path for path, tensors in zip(names(files), files, strict=True) for name in sorted(tensors)}
    index = json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}, indent=2) + "\n"
    text = file_format.config_json(config, ARCHITECTURE, torch.float32, checksum, FLOAT_BITS)
    return {INDEX: index.encode(), CONFIG: text}


def compress(
    source: Source,
    tokenizer: Any,
    windows: Int[Tensor, "windows length"],
    out: pathlib.Path,
    settings: ByLayer,
    track: Track = no_track,
) -> dict[str, Any]:
    """Put the compressed model at ``out``, going on where an earlier run with the same settings was killed; what it
    cost: bytes, seconds of all runs together and those of processors, the largest resident set.

    Raises ValueError for a folder of another run and OSError for a disk without room, both before anything slow.
    """
    out = out.resolve()
    files = layout(source.model, settings)
    seen = hashlib.sha256(windows.numpy().tobytes()).hexdigest()
    key = {"source": source.key(), "settings": dataclasses.asdict(settings), "windows": [*windows.shape, seen]}
    key |= {"code": code_digest(), "torch": torch.__version__}
    work = out.with_name(f"{out.name}.unfinished")
    with claim(out):
        if (out / model_folder.ABOUT).is_file() and _about(out).get("key") == key:
            return dict(_about(out)["record"]["metrics"])
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise ValueError(f"{out} is not an empty folder; name another one or delete it")
        about = _begin(work, key)
        done = len(about["units"])
        todo = units(source.config)[done:]
        _check_room(out, sum(map(file_bytes, files[done:])) + 8 * windows.numel() * source.config.hidden_size)
        _note(work, about)
        for unit in track(todo, "compressing block by block"):
            started, busy = time.monotonic(), time.process_time()
            memory.reset_peak()
            number = len(about["units"])
            before = _states(work, number, source, windows)
            tensors, after, error = _compressed(source, unit, before, windows, settings)
            if after is not None:
                _write(work / _states_name(number + 1), {STATES: after})
            _write(work / names(files)[number], tensors)
            del before, after, tensors
            memory.trim_heap()
            about["units"].append(
                {"modules": unit, "seconds": time.monotonic() - started, "error": error}
                | {"cpu_seconds": time.process_time() - busy, "peak_bytes": memory.peak_bytes()}
            )
            _note(work, about)
            (work / _states_name(number)).unlink(missing_ok=True)
        _finish(work, about, source, tokenizer, files)
        for path in work.glob(f".{STATES}*"):
            path.unlink()
        work.replace(out)
    return dict(about["record"]["metrics"])


def _begin(work: pathlib.Path, key: Mapping[str, Any]) -> dict[str, Any]:
    """What is known of the run in ``work``, an earlier one or a new one.  Raises ValueError for one of another key."""
    if not work.exists():
        origin = provenance(datetime.datetime.now(datetime.UTC))
        return {
            "schema": model_folder.SCHEMA,
            "by_layer": True,
            "key": key,
            "provenance": origin,
            "starts": 1,
            "units": [],
        }
    if (work / model_folder.ABOUT).is_file():
        about = _about(work)
    elif all(path.name.endswith(".partial") for path in work.iterdir()):  # killed before its first note
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
        return _begin(work, key)
    return about | {"starts": about["starts"] + 1}


def _about(folder: pathlib.Path) -> dict[str, Any]:
    try:
        return dict(json.loads((folder / model_folder.ABOUT).read_text()))
    except ValueError as error:
        raise ValueError(f"{folder / model_folder.ABOUT} is damaged ({error}); delete {folder}") from error


def _note(work: pathlib.Path, about: Mapping[str, Any]) -> None:
    text = json.dumps(about, indent=1, ensure_ascii=False, allow_nan=False)
    write_whole(work / model_folder.ABOUT, f"{text}\n".encode())


def _check_room(out: pathlib.Path, needed: int) -> None:
    free = shutil.disk_usage(next(path for path in out.parents if path.exists())).free
    if free < needed:
        raise OSError(f"{out} needs {needed:,} bytes and the disk has {free:,} left; make room or name another --out")


def _write(path: pathlib.Path, tensors: dict[str, Tensor]) -> None:
    write_whole(path, safetensors.torch.save(tensors, {"format": "pt"}))


def _states_name(number: int) -> str:
    return f".{STATES}-{number:05d}.safetensors"


def _states(work: pathlib.Path, number: int, source: Source, windows: Int[Tensor, "windows length"]) -> States | None:
    """What unit ``number`` reads; None for an embedding, which reads the windows themselves."""
    if (path := work / _states_name(number)).is_file():
        return Shards({STATES: path})[STATES]
    if number:
        raise ValueError(f"{work} lacks {path.name}, which a run goes on from; delete the folder and start again")
    return source.shards[f"{EMBEDDING}.weight"][windows].float() if source.config.tie_word_embeddings else None


@torch.no_grad()
def _compressed(
    source: Source,
    unit: tuple[str, ...],
    states: States | None,
    windows: Int[Tensor, "windows length"],
    settings: ByLayer,
) -> tuple[dict[str, Tensor], States | None, float | None]:
    """The tensors of a unit as they are stored, what it gives out when it is compressed, and for a block how far that
    is from what it would have given, relative to what it adds (squared)."""
    if states is None:
        weight = source.shards[f"{EMBEDDING}.weight"]
        bits = settings.width(EMBEDDING)
        found = _joined([quantize(weight[rows].float(), bits, settings.scheme) for rows in row_chunks(weight)])
        ids, places = windows.unique(return_inverse=True)
        return {f"{EMBEDDING}.weight": _packed(found)}, _of_rows(found, ids).dequantize()[places], None
    if NORM in unit:
        return _head(source, unit[1], states, settings), None, None
    return _block(source, unit[0], states, settings)


def _head(source: Source, name: str, states: States, settings: ByLayer) -> dict[str, Tensor]:
    norm = LlamaRMSNorm(source.config.hidden_size, source.config.rms_norm_eps)
    gain = source.shards[f"{NORM}.weight"].float()
    norm.weight.copy_(gain)
    inputs = _none(states.shape[-1])
    for window in states:
        _add(inputs, norm(window))
    weight = source.shards[f"{name}.weight"]
    inputs = inputs.div_(len(states) * states.shape[1])
    found = _answer(weight, settings.width(name), inputs, _factor(inputs, settings), settings)
    return {f"{name}.weight": _packed(found)} | file_format.to_stored_floats({f"{NORM}.weight": gain}, FLOAT_BITS)


def _block(source: Source, name: str, states: States, settings: ByLayer) -> tuple[dict[str, Tensor], States, float]:
    with torch.device("meta"):
        block = LlamaDecoderLayer(source.config, int(name.rpartition(".")[2])).eval()
    weights = {part: source.shards[f"{name}.{part}"].float() for part in block.state_dict()}
    block.load_state_dict(weights, assign=True)
    moments = {shared: _none(weights[f"{shared[0]}.weight"].shape[1]) for shared in SHARED_INPUTS}
    handles = [
        block.get_submodule(shared[0]).register_forward_pre_hook(lambda _, given, total=total: _add(total, given[0]))
        for shared, total in moments.items()
    ]
    full = _through(source, block, states)
    for handle in handles:
        handle.remove()
    matrices = {f"{part}.weight" for shared in SHARED_INPUTS for part in shared}
    others = {f"{name}.{part}": weight for part, weight in weights.items() if part not in matrices}
    tensors = file_format.to_stored_floats(others, FLOAT_BITS)
    for shared in SHARED_INPUTS:
        inputs = moments.pop(shared).div_(len(states) * states.shape[1])
        factor = _factor(inputs, settings)
        for part in shared:
            weight = weights[f"{part}.weight"]
            found = _answer(weight, settings.bits, inputs, factor, settings)
            for rows in row_chunks(weight):
                weight[rows] = _of_rows(found, rows).dequantize()
            tensors[f"{name}.{part}.weight"] = _packed(found)
    after = _through(source, block, states)
    error, added = ((one - other).double().square().sum() for one, other in ((after, full), (full, states)))
    return tensors, after, float(error / added.clamp(min=TINY))


def _through(source: Source, block: nn.Module, states: States) -> States:
    """What a block makes of the windows, one after the other."""
    positions = torch.arange(states.shape[1]).unsqueeze(0)
    turned = LlamaRotaryEmbedding(source.config)(states[:1], positions)
    found = torch.empty_like(states)
    for number, window in enumerate(states):
        found[number] = block(window.unsqueeze(0), position_ids=positions, position_embeddings=turned)[0]
    return found


def _none(columns: int) -> Float[Tensor, "in in"]:
    return torch.zeros(columns, columns)


def _add(total: Float[Tensor, "in in"], inputs: Float[Tensor, "*positions in"]) -> None:
    flat = inputs.flatten(0, -2)
    total.addmm_(flat.T, flat)


def _factor(inputs: Float[Tensor, "in in"], settings: ByLayer) -> Float[Tensor, "in in"]:
    damped = Curvature(torch.ones(1), inputs, None).damped(settings.damping).inputs
    assert damped is not None
    return inverse_cholesky(damped)


def _answer(
    weight: Float[Tensor, "out in"],
    bits: int,
    inputs: Float[Tensor, "in in"],
    factor: Float[Tensor, "in in"],
    settings: ByLayer,
) -> QuantizedTensor:
    """The reply to ``weight``, some rows at a time."""
    parts = []
    for rows in row_chunks(weight):
        own = weight[rows].float()
        curved = Curvature(torch.ones(len(own)), inputs, None)
        parts.append(
            quantize_layer(own, bits, settings.scheme, curved, settings.sweeps, settings.damping, factor=factor)
        )
    return _joined(parts)


def _joined(parts: Sequence[QuantizedTensor]) -> QuantizedTensor:
    """The rows of all ``parts``, one after the other."""
    fields = ("codes", "scale", "zero_point", "bits")
    codes, scale, zero_point, bits = (torch.cat([getattr(part, name) for part in parts]) for name in fields)
    return QuantizedTensor(codes, scale, zero_point, bits, parts[0].scheme)


def _of_rows(tensor: QuantizedTensor, rows: Tensor | slice) -> QuantizedTensor:
    """Some rows of a matrix of one width."""
    codes, scale, zero_point = tensor.codes[rows], tensor.scale[rows], tensor.zero_point[rows]
    return QuantizedTensor(codes, scale, zero_point, tensor.bits[: row_blocks(len(codes))], tensor.scheme)


def _packed(tensor: QuantizedTensor) -> Tensor:
    return torch.from_numpy(pack(tensor).copy())


def _finish(
    work: pathlib.Path, about: dict[str, Any], source: Source, tokenizer: Any, files: Sequence[Mapping[str, Tensor]]
) -> None:
    """Add to the finished files what makes them a checkpoint."""
    places = {name: work / path for path, tensors in zip(names(files), files, strict=True) for name in tensors}
    described = descriptions(source.config, files, file_format.checksum(Shards(places)))
    for name, content in described.items():
        write_whole(work / name, content)
    tokenizer.save_pretrained(work)
    if (source.folder / "generation_config.json").is_file():
        shutil.copy(source.folder / "generation_config.json", work)
    size = sum((work / name).stat().st_size for name in (*names(files), *described))
    packed = {name: part for file in files for name, part in file.items() if part.dtype == torch.uint8}
    tensors = tensors_of(source.model)
    parameters = sum(part.numel() for part in tensors.values())
    seconds, busy = (sum(unit[name] for unit in about["units"]) for name in ("seconds", "cpu_seconds"))
    metrics = {
        "bytes_file": size,
        "compression": 1 - size / (4 * parameters),
        "bits_per_weight_model": 8 * size / parameters,
        "bits_per_weight": 8 * sum(part.nbytes for part in packed.values())
        / sum(tensors[name].numel() for name in packed),
        "parameters": parameters,
        "seconds": seconds,
        "cpu_seconds": busy,
        "peak_bytes": max(unit["peak_bytes"] for unit in about["units"]),
        "starts": about["starts"],
    }  # fmt: skip
    labels = {"model": source.folder.resolve().name, "method": "gptq, block by block"}
    about["record"] = {"labels": labels, "metrics": metrics}
    about["config"] = {"model": {"path": str(source.folder.resolve())}, "dataset": {}}
    write_whole(work / model_folder.CARD, model_folder.card(about).encode())
    _note(work, about)
