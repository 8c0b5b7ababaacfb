"""What every file of a compressed checkpoint will hold, from shapes alone."""

import itertools
import json
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nashswarm.kernels import trellis
from nashswarm.methods.streaming.settings import ByLayer
from nashswarm.methods.streaming.shards import INDEX, file_names, first_names
from nashswarm.methods.streaming.skeleton import BLOCK, shape_of, tensors_of, units
from nashswarm.models.sources import CONFIG
from nashswarm.packed import file_format
from nashswarm.quant.grid import row_blocks
from nashswarm.quant.pack import packed_bytes

FLOAT_BITS = 16  # of norms and biases
DTYPES = {  # names in the header of a safetensors file
    torch.uint8: "U8", torch.float16: "F16", torch.float32: "F32", torch.int64: "I64", torch.int32: "I32",
    torch.int16: "I16", torch.int8: "I8", torch.bool: "BOOL",
}  # fmt: skip

Layout = dict[str, dict[str, Tensor]]  # file name → tensor name → tensor without memory


def layout(model: Any, settings: ByLayer) -> Layout:
    """Return the tensors that each file will hold, one file per unit, named as on the Hugging Face hub.

    Raises ValueError that names the matrices whose columns the group size does not divide.
    """
    tensors = tensors_of(model)
    units_of_model = units(model)
    indivisible: list[str] = []
    files: Layout = {}
    for file_name, unit in zip(file_names(len(units_of_model)), units_of_model, strict=True):
        files[file_name] = {name: _as_float16(tensors[name]) for name in unit.tensors}
        bits = settings.bits if unit.kind == BLOCK else settings.outer_bits
        for module in itertools.chain.from_iterable(unit.matrices):
            rows, columns = shape_of(model.get_submodule(module))
            if columns % settings.group_size:
                indivisible.append(f"{module} ({columns})")
                continue
            widths = np.full(row_blocks(rows) * (columns // settings.group_size), bits)
            size = packed_bytes(widths, settings.scheme)
            files[file_name][f"{module}.weight"] = torch.empty(size, dtype=torch.uint8, device="meta")
    if indivisible:
        raise ValueError(
            f"the columns of {len(indivisible)} matrices are not divisible by {settings.group_size}: "
            f"{first_names(indivisible)}"
        )
    return files


def tiled_layout(model: Any, sizes: Mapping[str, int]) -> Layout:
    """Return the tensors that each file will hold, where matrices take ``sizes`` bytes and all others 16 bits."""
    tensors, units_of_model = tensors_of(model), units(model)
    files: Layout = {}
    for file_name, unit in zip(file_names(len(units_of_model)), units_of_model, strict=True):
        files[file_name] = {name: _as_float16(tensors[name]) for name in unit.tensors}
        for module in itertools.chain.from_iterable(unit.matrices):
            if module in sizes:
                files[file_name][f"{module}.weight"] = torch.empty(sizes[module], dtype=torch.uint8, device="meta")
    return files


def _as_float16(tensor: Tensor) -> Tensor:
    dtype = torch.float16 if tensor.is_floating_point() else tensor.dtype
    return torch.empty(tensor.shape, dtype=dtype, device="meta")


def descriptions(model: Any, files: Layout, checksum: str) -> dict[str, bytes]:
    """Return the contents of the index and of the config of ``model``, by file name; the config comes last."""
    total = sum(part.nbytes for tensors in files.values() for part in tensors.values())
    weight_map = {name: file_name for file_name, tensors in files.items() for name in sorted(tensors)}
    index = json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}, indent=2) + "\n"
    text = file_format.config_json(model.config, type(model).__name__, torch.float32, checksum, FLOAT_BITS)
    return {INDEX: index.encode(), CONFIG: text}


def file_bytes(tensors: Mapping[str, Tensor], on_lines: bool = False) -> int:
    """Return the length in bytes of a safetensors file with these tensors, its matrices ``on_lines`` or not."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, part in sorted(tensors.items(), key=lambda item: (-item[1].element_size(), item[0])):
        start, end = end, end + part.nbytes
        header[name] = {"dtype": DTYPES[part.dtype], "shape": list(part.shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    start = 8 + -(-len(text) // 8) * 8
    return start + (_spaces(header, start) if on_lines else 0) + end


def on_lines(content: bytes) -> bytes:
    """Return a safetensors file whose matrices begin on cache lines where it is mapped: blanks follow its header.

    All trellis-coded matrices are whole lines long, so it is enough that the first one begins on a line.
    """
    start = 8 + int.from_bytes(content[:8], "little")
    spaces = _spaces(json.loads(content[8:start]), start)
    return (start - 8 + spaces).to_bytes(8, "little") + content[8:start] + b" " * spaces + content[start:]


def _spaces(header: Mapping[str, Any], start: int) -> int:
    """Return how many blanks put the first row of bytes on a cache line; ``start``: of the tensors in the file."""
    rows = [part["data_offsets"][0] for part in header.values() if part.get("dtype") == DTYPES[torch.uint8]]
    return -(start + min(rows)) % trellis.LINE if rows else 0
