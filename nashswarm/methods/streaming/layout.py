"""What every file of a compressed checkpoint will hold, from shapes alone."""

import json
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from nashswarm.methods.streaming.settings import ByLayer
from nashswarm.methods.streaming.shards import INDEX, file_names, first_names, tensors_of, units
from nashswarm.models.sources import CONFIG
from nashswarm.packed import file_format
from nashswarm.quant.grid import row_blocks
from nashswarm.quant.pack import packed_bytes

ARCHITECTURE = "LlamaForCausalLM"
FLOAT_BITS = 16  # of norms and biases
DTYPES = {torch.uint8: "U8", torch.float16: "F16"}  # names in the header of a safetensors file

Layout = dict[str, dict[str, Tensor]]  # file name → tensor name → tensor without memory


def layout(model: Any, settings: ByLayer) -> Layout:
    """Return the tensors that each file will hold, one file per unit, named as on the Hugging Face hub.

    Raises ValueError that names the matrices whose columns the group size does not divide.
    """
    tensors = tensors_of(model)
    indivisible: list[str] = []

    def stored(name: str) -> Tensor:
        module, shape = name.removesuffix(".weight"), tensors[name].shape
        if not isinstance(model.get_submodule(name.rpartition(".")[0]), (nn.Linear, nn.Embedding)) or len(shape) != 2:
            return torch.empty(shape, dtype=torch.float16, device="meta")
        if shape[1] % settings.group_size:
            indivisible.append(f"{module} ({shape[1]})")
            return tensors[name]
        widths = np.full(row_blocks(shape[0]) * (shape[1] // settings.group_size), settings.width(module))
        return torch.empty(packed_bytes(widths, settings.scheme), dtype=torch.uint8, device="meta")

    units_of_model = units(model.config)
    files = {}
    for file_name, unit in zip(file_names(len(units_of_model)), units_of_model, strict=True):
        prefixes = tuple(f"{module}." for module in unit)
        files[file_name] = {name: stored(name) for name in tensors if name.startswith(prefixes)}
    if indivisible:
        raise ValueError(
            f"the columns of {len(indivisible)} matrices are not divisible by {settings.group_size}: "
            f"{first_names(indivisible)}"
        )
    return files


def descriptions(config: Any, files: Layout, checksum: str) -> dict[str, bytes]:
    """Return the contents of the index and of the config, by file name; the config comes last."""
    total = sum(part.nbytes for tensors in files.values() for part in tensors.values())
    weight_map = {name: file_name for file_name, tensors in files.items() for name in sorted(tensors)}
    index = json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}, indent=2) + "\n"
    text = file_format.config_json(config, ARCHITECTURE, torch.float32, checksum, FLOAT_BITS)
    return {INDEX: index.encode(), CONFIG: text}


def file_bytes(tensors: Mapping[str, Tensor]) -> int:
    """Return the length in bytes of a safetensors file with these tensors."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, part in sorted(tensors.items(), key=lambda item: (-item[1].element_size(), item[0])):
        start, end = end, end + part.nbytes
        header[name] = {"dtype": DTYPES[part.dtype], "shape": list(part.shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    return 8 + -(-len(text) // 8) * 8 + end
