"""Write a language model as a GGUF file, as llama.cpp's own converter does, and read such a file back.

``gguf_architectures`` says where its tensors lie and which hyperparameters it has, ``gguf_tokenizer`` adds the
tokenizer.  A head that is tied to the embedding is stored once: llama.cpp then multiplies by the embedding.
"""

import collections
import dataclasses
import logging
import pathlib
import tempfile
from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from nashswarm.errors import require
from nashswarm.models import gguf_tokenizer
from nashswarm.models.gguf_architectures import (
    ARCHITECTURES,
    Layout,
    add_hyperparameters,
    check_writable,
    frequency_factors,
    layout,
    neighbours,
)
from nashswarm.records.files import write_by

ALIGNMENT = 32  # bytes to whose multiples tensors are padded
FILE_TYPES: Mapping[str, str] = {  # a type of ggml → the file type of llama.cpp whose tensors mostly have it
    "Q2_K": "MOSTLY_Q2_K", "Q3_K": "MOSTLY_Q3_K_M", "Q4_K": "MOSTLY_Q4_K_M", "Q5_K": "MOSTLY_Q5_K_M",
    "Q6_K": "MOSTLY_Q6_K", "Q8_0": "MOSTLY_Q8_0", "Q4_0": "MOSTLY_Q4_0", "Q4_1": "MOSTLY_Q4_1", "Q5_0": "MOSTLY_Q5_0",
    "Q5_1": "MOSTLY_Q5_1", "IQ4_NL": "MOSTLY_IQ4_NL", "IQ4_XS": "MOSTLY_IQ4_XS", "F16": "MOSTLY_F16",
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class PackedTensor:
    """A matrix in a type of ggml, ``F16`` or a type of blocks: the bytes of its rows, in the order of the model."""

    type: str
    content: UInt8[np.ndarray, "rows bytes"]


@dataclasses.dataclass(frozen=True)
class StoredTensor:
    """A tensor of a GGUF file: its type in ggml, its bytes, and the values they decode to, rows as in the model."""

    type: str
    content: UInt8[np.ndarray, " bytes"]
    values: Float[Tensor, "..."]


def write(
    model: Any,
    out: pathlib.Path,
    dtype: Literal["float16", "float32"] = "float16",
    tokenizer: Any = None,
    name: str | None = None,
    packed: Mapping[str, PackedTensor] | None = None,
    metadata: Mapping[str, Any] | None = None,
) -> None:
    """Write the model to ``out``, its matrices in ``dtype`` and all other tensors in 32 bits.

    Without a ``tokenizer`` the file holds what a checkpoint holds, weights and hyperparameters, and llama.cpp reads and
    writes token ids alone.  ``name``: of the model, for people.  ``packed``: parameters that are written as they are
    packed.  ``metadata``: further keys, each with a string, a number or a list of these.  Raises ValueError in one
    sentence for an architecture or a tokenizer that is not known, or for a weight that 16-bit floats cannot hold; then
    no file is written.
    """
    require("a GGUF file", ["gguf"], "models")
    check_writable(model)
    contents = _Contents(model, dtype, tokenizer, name, packed or {}, metadata or {})
    write_by(out, lambda path: (_write(contents, True, path), None)[1])


def file_bytes(
    model: Any, tokenizer: Any, name: str | None, packed: Mapping[str, PackedTensor], metadata: Mapping[str, Any]
) -> int:
    """Return the bytes of the file that ``write`` would write with these arguments and 16-bit floats."""
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder) / "header.gguf"
        sizes = _write(_Contents(model, "float16", tokenizer, name, packed, metadata), False, path)
        return padded(path.stat().st_size) + sum(map(padded, sizes))


def padded(size: int) -> int:
    """Return the bytes that a tensor of ``size`` bytes takes in a file.

    >>> padded(32), padded(33)
    (32, 64)
    """
    return -(-size // ALIGNMENT) * ALIGNMENT


def read(path: pathlib.Path, layout: Layout) -> dict[str, StoredTensor]:
    """Read the tensors of a GGUF file, by the names of the model's parameters."""
    import gguf

    stored = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    tensors = {}
    for name, tensor_name in layout.names.items():
        tensor = stored[tensor_name]
        values = torch.from_numpy(np.array(gguf.dequantize(tensor.data, tensor.tensor_type), np.float32))
        content = np.frombuffer(tensor.data.tobytes(), np.uint8)
        tensors[name] = StoredTensor(tensor.tensor_type.name, content, layout.to_model(name, values))
    return tensors


@dataclasses.dataclass(frozen=True)
class _Contents:
    """All that a file is made of; see ``write``."""

    model: Any
    dtype: str
    tokenizer: Any
    name: str | None
    packed: Mapping[str, PackedTensor]
    metadata: Mapping[str, Any]


def _write(contents: _Contents, tensors: bool, path: pathlib.Path) -> list[int]:
    """Write a file, or without ``tensors`` its header alone; return the bytes of all tensors."""
    import gguf

    logging.getLogger("gguf").setLevel(logging.WARNING)  # it logs every file
    model = contents.model
    where = layout(model)
    writer = gguf.GGUFWriter(path, ARCHITECTURES[model.config.model_type].name)
    try:
        if contents.name is not None:
            writer.add_name(contents.name)
        writer.add_type("model")
        add_hyperparameters(writer, model)
        _add_types(writer, contents)
        for key, value in contents.metadata.items():
            _add_value(writer, key, value)
        if contents.tokenizer is None:
            writer.add_tokenizer_model("none")
        else:
            gguf_tokenizer.add_tokenizer(writer, contents.tokenizer, len(model.get_input_embeddings().weight))
        factors = frequency_factors(model)
        if factors is not None:
            writer.add_tensor("rope_freqs.weight", factors.numpy())
        for name, parameter in model.named_parameters():
            content, kind = _stored(name, parameter, contents, where, tensors)
            writer.add_tensor(where.names[name], content, raw_dtype=kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        sizes = [tensor.nbytes for tensor in writer.tensors[0].values()]
        (writer.write_tensors_to_file if tensors else writer.write_ti_data_to_file)()
        return sizes
    finally:
        writer.close()


def _stored(name: str, parameter: Tensor, contents: _Contents, where: Layout, ordered: bool) -> tuple[np.ndarray, Any]:
    """Return what is written of a parameter, and its type where that is not a float's.

    ``ordered``: whether the rows of packed tensors are put in llama.cpp's order, which takes memory.
    """
    import gguf

    if name in contents.packed:
        packed = contents.packed[name]
        heads, rows = where.heads.get(name), packed.content
        if ordered and heads is not None:
            rows = neighbours(torch.from_numpy(rows), heads).contiguous().numpy()
        return rows, gguf.GGMLQuantizationType[packed.type]
    values = where.to_file(name, parameter.detach().float().cpu())
    if values.ndim > 1 and contents.dtype == "float16":
        values = values.half()
        if not values.isfinite().all():
            raise ValueError(f"{name} does not fit 16-bit floats: write the file in float32")
    return values.contiguous().numpy(), None


def _add_types(writer: Any, contents: _Contents) -> None:
    """Add the file's type, that of most weights, which llama.cpp shows to people."""
    import gguf

    weights: collections.Counter[str] = collections.Counter()
    for packed in contents.packed.values():
        weights[packed.type] += packed.content.nbytes
    kind = (
        FILE_TYPES[weights.most_common(1)[0][0]]
        if weights
        else {"float32": "ALL_F32"}.get(contents.dtype, "MOSTLY_F16")
    )
    writer.add_file_type(gguf.LlamaFileType[kind])
    if weights:
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)


def _add_value(writer: Any, key: str, value: Any) -> None:
    kinds = {str: writer.add_string, float: writer.add_float64, int: writer.add_uint64, list: writer.add_array}
    kinds[type(value)](key, value)
