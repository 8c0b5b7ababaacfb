"""Write a model of the LLaMA family as a GGUF file, as llama.cpp's own converter does, and read such a file back.

Tensors get the names of llama.cpp.  Rows of queries and keys are reordered where llama.cpp rotates neighbours instead
of halves.  A head that is tied to the embedding is stored once: llama.cpp then multiplies by the embedding.
``gguf_tokenizer`` adds the tokenizer.
"""

import dataclasses
import functools
import pathlib
from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from nashswarm.errors import require
from nashswarm.models import gguf_tokenizer
from nashswarm.records.files import write_by

INTERLEAVED = ("q_proj", "k_proj")  # their rows are reordered in architectures that rotate neighbours
STATIC_ROPE = ("default", "linear", "llama3")  # frequencies that do not depend on the length of the text
SUFFIXES = (".weight", ".bias")


@dataclasses.dataclass(frozen=True)
class Architecture:
    """An architecture of llama.cpp: its ``name``, and whether it rotates neighbouring rows of a head, not halves."""

    name: str
    rotates_neighbours: bool


ARCHITECTURES: Mapping[str, Architecture] = {  # by the model_type of transformers
    "llama": Architecture("llama", True),
    "mistral": Architecture("llama", True),
    "qwen2": Architecture("qwen2", False),
    "qwen3": Architecture("qwen3", False),
}


@dataclasses.dataclass(frozen=True)
class Layout:
    """Where the parameters of a model lie in its GGUF file.

    ``names``: parameter → tensor of the file.  ``heads``: parameter whose rows are reordered → its number of heads.
    """

    names: Mapping[str, str]
    heads: Mapping[str, int]


@dataclasses.dataclass(frozen=True)
class StoredTensor:
    """A tensor of a GGUF file: its type in ggml, its bytes, and the values they decode to, rows as in the model."""

    type: str
    content: UInt8[np.ndarray, " bytes"]
    values: Float[Tensor, "..."]


def check_writable(model: Any) -> None:
    """Raise ValueError in one sentence if the model cannot be written as a GGUF file, before any work."""
    config, kind = model.config, model.config.model_type
    if kind not in ARCHITECTURES or model.get_output_embeddings() is None:
        raise ValueError(
            f"{type(model).__name__} cannot be written as GGUF: only language models of {', '.join(ARCHITECTURES)}"
        )
    if config.hidden_act != "silu":
        raise ValueError(f"GGUF files of {kind} imply the activation silu, and this model has {config.hidden_act}")
    rope = _rope_parameters(config)
    scaling = rope.get("rope_type", "default")
    scaled = STATIC_ROPE if ARCHITECTURES[kind].name == "llama" else STATIC_ROPE[:1]
    if scaling not in scaled or rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise ValueError(
            f"rotary embeddings of {scaling} cannot be written as GGUF for {kind}: only {', '.join(scaled)}"
        )


def layout(model: Any) -> Layout:
    """Return where the parameters of a model lie in its file.  Raises ValueError for one that the file cannot hold."""
    import gguf

    config, architecture = model.config, ARCHITECTURES[model.config.model_type]
    kind = next(kind for kind, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture.name)
    table = gguf.get_tensor_name_map(kind, config.num_hidden_layers)
    names = {name: table.get_name(name, SUFFIXES) for name, _ in model.named_parameters()}
    if unknown := [name for name, tensor in names.items() if tensor is None]:
        raise ValueError(f"GGUF files of {architecture.name} have no place for {', '.join(unknown)}")
    counts = dict(zip(INTERLEAVED, (config.num_attention_heads, config.num_key_value_heads), strict=True))
    roles = {name: name.split(".")[-2] for name in names}
    heads = {name: counts[role] for name, role in roles.items() if role in counts and architecture.rotates_neighbours}
    return Layout(names, heads)


def write(
    model: Any,
    out: pathlib.Path,
    dtype: Literal["float16", "float32"] = "float16",
    tokenizer: Any = None,
    name: str | None = None,
) -> None:
    """Write the model to ``out``, its matrices in ``dtype`` and all other tensors in 32 bits.

    Without a ``tokenizer`` the file holds what a checkpoint holds, weights and hyperparameters, and llama.cpp reads and
    writes token ids alone.  ``name``: of the model, for people.  Raises ValueError in one sentence for an architecture
    or a tokenizer that is not known, or for a weight that 16-bit floats cannot hold; then no file is written.
    """
    require("a GGUF file", ["gguf"], "models")
    check_writable(model)
    write_by(out, functools.partial(_write, model, dtype, tokenizer, name))


def read(path: pathlib.Path, layout: Layout) -> dict[str, StoredTensor]:
    """Read the tensors of a GGUF file, by the names of the model's parameters."""
    import gguf

    stored = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    tensors = {}
    for name, tensor_name in layout.names.items():
        tensor = stored[tensor_name]
        values = torch.from_numpy(np.array(gguf.dequantize(tensor.data, tensor.tensor_type), np.float32))
        content = np.frombuffer(tensor.data.tobytes(), np.uint8)
        tensors[name] = StoredTensor(tensor.tensor_type.name, content, halves(values, layout.heads.get(name)))
    return tensors


def neighbours(rows: Float[Tensor, "rows ..."], heads: int | None) -> Float[Tensor, "rows ..."]:
    """Order the rows of each head as llama.cpp rotates them: both halves by turns.  No ``heads``: rows as they are."""
    return rows if heads is None else rows.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)


def halves(rows: Float[Tensor, "rows ..."], heads: int | None) -> Float[Tensor, "rows ..."]:
    """Order the rows of each head as transformers rotates them; undoes ``neighbours``."""
    return rows if heads is None else rows.unflatten(0, (heads, -1, 2)).transpose(1, 2).flatten(0, 2)


def _write(model: Any, dtype: str, tokenizer: Any, name: str | None, path: pathlib.Path) -> None:
    import gguf

    config, where = model.config, layout(model)
    writer = gguf.GGUFWriter(path, ARCHITECTURES[config.model_type].name)
    try:
        _add_hyperparameters(writer, model, dtype, name)
        if tokenizer is None:
            writer.add_tokenizer_model("none")
        else:
            gguf_tokenizer.add_tokenizer(writer, tokenizer, len(model.get_input_embeddings().weight))
        factors = _frequency_factors(model)
        if factors is not None:
            writer.add_tensor("rope_freqs.weight", factors.numpy())
        for parameter_name, parameter in model.named_parameters():
            values = neighbours(parameter.detach().float().cpu(), where.heads.get(parameter_name))
            if values.ndim > 1 and dtype == "float16":
                values = values.half()
                if not values.isfinite().all():
                    raise ValueError(f"{parameter_name} does not fit 16-bit floats: write the file in float32")
            writer.add_tensor(where.names[parameter_name], values.contiguous().numpy())
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    finally:
        writer.close()


def _add_hyperparameters(writer: Any, model: Any, dtype: str, name: str | None) -> None:
    """Add what llama.cpp reads of the config, with the file's type."""
    import gguf

    config = model.config
    width = _head_width(config)
    if name is not None:
        writer.add_name(name)
    writer.add_type("model")
    writer.add_file_type({"float32": gguf.LlamaFileType.ALL_F32, "float16": gguf.LlamaFileType.MOSTLY_F16}[dtype])
    writer.add_vocab_size(len(model.get_input_embeddings().weight))
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(width)
    writer.add_value_length(width)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(width)
    writer.add_rope_freq_base(float(_rope_parameters(config).get("rope_theta", 10000.0)))


def _frequency_factors(model: Any) -> Float[Tensor, " half"] | None:
    """Return by how much the model's rotary frequencies are below those of its base, None if they are the same."""
    config, actual = model.config, model.base_model.rotary_emb.inv_freq.float().cpu()
    exponents = torch.arange(0, _head_width(config), 2).double() / _head_width(config)
    base = float(_rope_parameters(config).get("rope_theta", 10000.0)) ** -exponents
    factors = (base / actual.double()).float()
    return None if torch.allclose(factors, torch.ones_like(factors), rtol=1e-5) else factors


def _head_width(config: Any) -> int:
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def _rope_parameters(config: Any) -> Mapping[str, Any]:
    return getattr(config, "rope_parameters", None) or {}
