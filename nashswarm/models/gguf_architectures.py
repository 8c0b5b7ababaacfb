"""What llama.cpp's own converter makes of each architecture: names of tensors, hyperparameters, and what it implies.

A file names an architecture, and llama.cpp computes what that one does: an activation, a scale, a kind of rotation.  A
model whose config asks for anything else is refused.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float, Shaped
from torch import Tensor
from transformers.pytorch_utils import Conv1D

INTERLEAVED = ("q_proj", "k_proj")  # their rows are reordered in architectures that rotate neighbours
STATIC_ROPE = ("default", "linear", "llama3")  # frequencies that do not depend on the length of the text
SUFFIXES = (".weight", ".bias")
GELU = ("gelu_pytorch_tanh", "gelu_new")


@dataclasses.dataclass(frozen=True)
class Architecture:
    """An architecture of llama.cpp, by its ``name``.

    ``rotates_neighbours``: neighbouring rows of a head, not halves.  ``activations``: those that it implies.
    ``raised_norms``: its norms multiply by one more than their weight, and the file holds the sum.  ``rope``: the kinds
    of frequencies that a file can hold.
    """

    name: str
    rotates_neighbours: bool = False
    activations: tuple[str, ...] = ("silu",)
    raised_norms: bool = False
    rope: tuple[str, ...] = ("default",)


ARCHITECTURES: Mapping[str, Architecture] = {  # by the model_type of transformers
    "llama": Architecture("llama", True, rope=STATIC_ROPE),
    "mistral": Architecture("llama", True, rope=STATIC_ROPE),
    "qwen2": Architecture("qwen2"),
    "qwen3": Architecture("qwen3"),
    "gemma": Architecture("gemma", activations=GELU, raised_norms=True),
    "gemma2": Architecture("gemma2", activations=GELU, raised_norms=True),
    "gemma3_text": Architecture("gemma3", activations=GELU, raised_norms=True),
    "phi3": Architecture("phi3"),
    "gpt2": Architecture("gpt2", activations=GELU),
}


@dataclasses.dataclass(frozen=True)
class Layout:
    """Where the parameters of a model lie in its GGUF file, and how they are stored there.

    ``names``: parameter → tensor of the file.  ``heads``: parameter whose rows are reordered → its number of heads.
    ``transposed``: matrices that the model stores as (in, out).  ``raised``: norms that are stored with one added.
    """

    names: Mapping[str, str]
    heads: Mapping[str, int]
    transposed: frozenset[str] = frozenset()
    raised: frozenset[str] = frozenset()

    def to_file(self, name: str, values: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        """Return the values of a parameter as the file holds them."""
        values = values.T if name in self.transposed else values
        values = values + 1 if name in self.raised else values
        return neighbours(values, self.heads.get(name))

    def to_model(self, name: str, values: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        """Return the values of a tensor as layers hold them: matrices as (out, in)."""
        return halves(values - 1 if name in self.raised else values, self.heads.get(name))


def check_writable(model: Any) -> None:
    """Raise ValueError in one sentence if the model cannot be written as a GGUF file, before any work."""
    config, kind = model.config, model.config.model_type
    if kind not in ARCHITECTURES or model.get_output_embeddings() is None:
        raise ValueError(
            f"{type(model).__name__} cannot be written as GGUF: only language models of {', '.join(ARCHITECTURES)}"
        )
    architecture = ARCHITECTURES[kind]
    activation = next(
        value
        for name in ("hidden_activation", "hidden_act", "activation_function")
        if (value := getattr(config, name, None)) is not None
    )
    if activation not in architecture.activations:
        raise ValueError(
            f"GGUF files of {kind} imply the activation {architecture.activations[0]}, and this model has {activation}"
        )
    for rope in _ropes(config):
        scaling = rope.get("rope_type", "default")
        if scaling not in architecture.rope or rope.get("partial_rotary_factor", 1.0) != 1.0:
            raise ValueError(
                f"rotary embeddings of {scaling} cannot be written as GGUF for {kind}: only "
                f"{', '.join(architecture.rope)}"
            )
    if implied := _unlike_implied(config):
        raise ValueError(f"GGUF files of {kind} imply {implied}")


def _unlike_implied(config: Any) -> str | None:
    """Return what llama.cpp implies and the config does not have, if anything."""
    scalar = getattr(config, "query_pre_attn_scalar", None)
    if scalar is not None and scalar != head_width(config):
        return f"queries scaled by the width of a head, {head_width(config)}, and this model scales by {scalar}"
    pattern = {"gemma2": 2, "gemma3_text": 6}.get(config.model_type)
    if pattern is not None:
        expected = ["sliding" if (place + 1) % pattern else "full" for place in range(config.num_hidden_layers)]
        if [kind.removesuffix("_attention") for kind in config.layer_types] != expected:
            return f"full attention in every layer whose number is a multiple of {pattern}, which this model has not"
    if config.model_type == "gpt2" and not (config.scale_attn_weights and not config.scale_attn_by_inverse_layer_idx):
        return "attention that is scaled by the width of a head alone, which this model's is not"
    return None


def layout(model: Any) -> Layout:
    """Return where the parameters of a model lie in its file.  Raises ValueError for one that the file cannot hold."""
    import gguf

    config, architecture = model.config, ARCHITECTURES[model.config.model_type]
    kind = next(kind for kind, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture.name)
    table = gguf.get_tensor_name_map(kind, config.num_hidden_layers)
    names = {name: table.get_name(name, SUFFIXES) for name, _ in model.named_parameters()}
    if unknown := [name for name, tensor in names.items() if tensor is None]:
        raise ValueError(f"GGUF files of {architecture.name} have no place for {', '.join(unknown)}")
    roles = {name: name.split(".")[-2] for name in names}
    heads = {}
    if architecture.rotates_neighbours:
        counts = dict(zip(INTERLEAVED, (config.num_attention_heads, config.num_key_value_heads), strict=True))
        heads = {name: counts[role] for name, role in roles.items() if role in counts}
    transposed = {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, Conv1D)}
    norms = {name for name in names if architecture.raised_norms and name.endswith("norm.weight")}
    return Layout(names, heads, frozenset(transposed), frozenset(norms))


def neighbours(rows: Shaped[Tensor, "rows ..."], heads: int | None) -> Shaped[Tensor, "rows ..."]:
    """Order the rows of each head as llama.cpp rotates them: both halves by turns.  No ``heads``: rows as they are."""
    return rows if heads is None else rows.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)


def halves(rows: Float[Tensor, "rows ..."], heads: int | None) -> Float[Tensor, "rows ..."]:
    """Order the rows of each head as transformers rotates them; undoes ``neighbours``."""
    return rows if heads is None else rows.unflatten(0, (heads, -1, 2)).transpose(1, 2).flatten(0, 2)


def add_hyperparameters(writer: Any, model: Any) -> None:
    """Add what llama.cpp reads of the config to a ``GGUFWriter``."""
    config = model.config
    writer.add_vocab_size(len(model.get_input_embeddings().weight))
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_head_count(config.num_attention_heads)
    if config.model_type == "gpt2":
        writer.add_feed_forward_length(config.n_inner or 4 * config.hidden_size)
        writer.add_layer_norm_eps(config.layer_norm_epsilon)
        return
    width = head_width(config)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(width)
    writer.add_value_length(width)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(width)
    writer.add_rope_freq_base(_rope_base(config))
    if config.model_type == "gemma3_text":
        writer.add_rope_freq_base_swa(float(_ropes(config)[0]["rope_theta"]))
    if config.model_type == "phi3":
        writer.add_rope_scaling_orig_ctx_len(config.original_max_position_embeddings)
        writer.add_sliding_window(config.sliding_window or 0)
    if config.model_type in ("gemma2", "gemma3_text"):
        writer.add_sliding_window(config.sliding_window)
        if config.attn_logit_softcapping is not None:
            writer.add_attn_logit_softcapping(config.attn_logit_softcapping)
        if config.final_logit_softcapping is not None:
            writer.add_final_logit_softcapping(config.final_logit_softcapping)


def frequency_factors(model: Any) -> Float[Tensor, " half"] | None:
    """Return by how much the model's rotary frequencies are below those of its base, None if they are the same."""
    rotary = getattr(model.base_model, "rotary_emb", None)
    if rotary is None or not hasattr(rotary, "inv_freq"):
        return None
    width, actual = head_width(model.config), rotary.inv_freq.float().cpu()
    base = _rope_base(model.config) ** -(torch.arange(0, width, 2).double() / width)
    factors = (base / actual.double()).float()
    return None if torch.allclose(factors, torch.ones_like(factors), rtol=1e-5) else factors


def head_width(config: Any) -> int:
    """Return the width of a head of attention."""
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def _ropes(config: Any) -> list[Mapping[str, Any]]:
    """Return the parameters of rotary embeddings, of every kind of layer that has its own."""
    parameters = getattr(config, "rope_parameters", None) or {}
    return list(parameters.values()) if all(isinstance(part, Mapping) for part in parameters.values()) else [parameters]


def _rope_base(config: Any) -> float:
    return float(_ropes(config)[-1].get("rope_theta", 10000.0))
