"""Account for every tensor of a compressed model: compressed, kept as floats and why, or tied to another one."""

import dataclasses
import io
import json
from collections.abc import Iterable, Mapping
from typing import Any, Literal

from nashswarm.models import kept
from nashswarm.packed.file_format import EMPTY, PADDING, TABLES
from nashswarm.packed.matrix import PackedMatrix
from nashswarm.packed.modules import QUANTIZED

State = Literal["compressed", "kept", "tied", "format"]
PACKED = "U8"  # how safetensors names the type of bytes


@dataclasses.dataclass(frozen=True)
class TensorEntry:
    """What became of one tensor.

    ``state``: ``compressed``; ``kept`` as floats for a ``reason``; ``tied`` to the tensor named by ``reason``, whose
    parameters and bytes are counted there; or ``format``, bytes of the file that are no part of the model.
    ``parameters``: 0 for buffers.  ``nbytes``: in the file.
    """

    name: str
    state: State
    reason: str
    parameters: int
    nbytes: int


def stored_sizes(file: io.BufferedIOBase) -> dict[str, tuple[str, int]]:
    """Return type and bytes of every tensor of a safetensors file, from its header."""
    header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    header.pop("__metadata__", None)
    return {name: (part["dtype"], part["data_offsets"][1] - part["data_offsets"][0]) for name, part in header.items()}


def sizes_in(content: bytes) -> dict[str, tuple[str, int]]:
    """Return ``stored_sizes`` of the content of a safetensors file."""
    return stored_sizes(io.BytesIO(content))


def account(model: Any, sizes: Mapping[str, tuple[str, int]], file_bytes: int) -> tuple[TensorEntry, ...]:
    """Account for the tensors of a packed model whose files hold tensors of these ``sizes``.

    Parameters add up to those of the full model, bytes to ``file_bytes``, those of weights and config.
    """
    entries, counted, inside = [], dict[Any, str](), list[str]()
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, QUANTIZED):
            entries.append(_matrix(f"{name}.weight", module.matrix, counted, sizes))
            inside.append(f"{name}.matrix.")
    for name, tensor in model.state_dict().items():
        if name.startswith(tuple(inside)) or name == EMPTY:
            continue
        if first := counted.get(tensor.data_ptr() if tensor.numel() else None):
            entries.append(TensorEntry(name, "tied", first, 0, 0))
            continue
        counted[tensor.data_ptr()] = name
        number = tensor.numel() if name in parameters else 0
        kind, nbytes = sizes.get(name, ("", 0))
        if kind == PACKED and name in parameters:  # kernels cannot read it, so it is floats in memory alone
            entries.append(TensorEntry(name, "compressed", "", number, nbytes))
        else:
            entries.append(TensorEntry(name, "kept", kept.reason(model, name, tensor), number, nbytes))
    tables = (("code tables", TABLES), ("alignment", PADDING))
    entries += [TensorEntry(key, "format", what, 0, sizes[key][1]) for what, key in tables if key in sizes]
    rest = file_bytes - sum(entry.nbytes for entry in entries)
    return (*entries, TensorEntry("headers and config.json", "format", "headers and config.json", 0, rest))


def _matrix(
    name: str, matrix: PackedMatrix, counted: dict[Any, str], sizes: Mapping[str, tuple[str, int]]
) -> TensorEntry:
    if first := counted.get(matrix):
        return TensorEntry(name, "tied", first, 0, sizes.get(name, ("", 0))[1])
    counted[matrix] = name
    return TensorEntry(name, "compressed", "", matrix.shape[0] * matrix.shape[1], sizes.get(name, ("", 0))[1])


def by_reason(entries: Iterable[TensorEntry]) -> list[dict[str, Any]]:
    """Sum entries by state and reason: ``state``, ``reason``, ``tensors``, ``parameters``, ``bytes``; largest first.

    Tied tensors are one row.
    """
    rows: dict[tuple[str, str], dict[str, Any]] = {}
    for entry in entries:
        why = "" if entry.state == "tied" else entry.reason
        new = {"state": entry.state, "reason": why, "tensors": 0, "parameters": 0, "bytes": 0}
        row = rows.setdefault((entry.state, why), new)
        row["tensors"] += 1
        row["parameters"] += entry.parameters
        row["bytes"] += entry.nbytes
    return sorted(rows.values(), key=lambda row: (-row["bytes"], row["state"], row["reason"]))
