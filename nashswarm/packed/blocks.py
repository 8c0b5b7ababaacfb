"""Describe the blocks of a model of transformers to the native pass, or say what it does not know about them.

Known are the models of ``KINDS``: blocks of the LLaMA kind (rotations, gated layers, what Gemma, Phi-3 and OLMo add to
them) and of the GPT-2 kind (layer norms, embeddings of positions).  All matrices must be trellis-coded.
"""

import ctypes
from collections.abc import Callable, Mapping
from typing import Any

import torch
from jaxtyping import Float32
from torch import Tensor, nn

from nashswarm.kernels import decoder
from nashswarm.packed.matrix import TrellisMatrix
from nashswarm.packed.modules import QuantizedEmbedding, QuantizedLinear
from nashswarm.packed.watch import Link, Watch

ROPES = ("default", "linear", "llama3", "yarn")  # whose angles do not depend on the length of the text
ATTENTION = ("sdpa", "eager")  # all compute the same
ACTIVATIONS = {  # the modules of transformers that compute them
    "SiLU": "silu",
    "SiLUActivation": "silu",
    "NewGELUActivation": "gelu_tanh",
    "GELUTanh": "gelu_tanh",
    "GELUActivation": "gelu",
}
SCALED = ("GemmaTextScaledWordEmbedding", "Gemma2TextScaledWordEmbedding")  # multiply rows by their embed_scale
OLMO_EPSILON = 1e-5  # which OLMo's layer norms, without weights, do not name


class UnknownPart(Exception):
    """A part of a model that the native pass does not know, in words."""


class Description:
    """A model as the native pass reads it.

    ``struct``: for the library; its addresses are valid as long as ``unchanged``.  ``windows``: by block, 0 for none.
    ``activations``: the ways in which its matrices round their inputs.
    """

    def __init__(self, model: Any) -> None:
        """Raises UnknownPart."""
        self.linears: list[QuantizedLinear] = []
        self.kept: list[Any] = []  # keeps what has an address alive
        self.links: list[Link] = []
        self.weights: list[Tensor] = []
        kind = type(model).__name__
        if kind not in KINDS or not type(model).__module__.startswith("transformers."):
            raise UnknownPart(f"{kind} has no native pass")
        if model.dtype != torch.float32:
            raise UnknownPart(f"the model computes in {model.dtype}: load it with dtype=torch.float32")
        if model.config._attn_implementation not in ATTENTION:
            raise UnknownPart(f"attention is computed by {model.config._attn_implementation}")
        self.struct = decoder.Model(embedding_scale=1.0)
        self.struct.vocabulary = model.config.vocab_size
        blocks = KINDS[kind](self, model)
        self.windows = [int(block.window) for block in blocks]
        array = (decoder.Block * len(blocks))(*blocks)
        self.kept.append(array)
        self.struct.blocks, self.struct.block = len(blocks), ctypes.addressof(array)
        self.rotary = getattr(model.base_model, "rotary_emb", None)
        if self.rotary is not None and self.rotary.rope_type not in ROPES:
            raise UnknownPart(f"rotations of the type {self.rotary.rope_type} depend on the length of the text")
        self.turns = self.turns_of(1)
        self.struct.rotated = 0 if self.turns is None else 2 * self.turns[0].shape[1]
        if patched := [type(module).__name__ for module in model.modules() if "forward" in module.__dict__]:
            raise UnknownPart(f"the forward of {patched[0]} was replaced")
        self.watch = Watch(model, self.links, self.weights)
        self.activations = self._activations()

    def unchanged(self) -> bool:
        """Check that every module, and every tensor, is still where it was."""
        changed = self.watch.count_changes()
        if changed:
            self.activations = self._activations()
        return self.watch.unmoved(packed=changed)

    def _activations(self) -> set[str]:
        return {linear.activations for linear in self.linears}

    def turns_of(
        self, positions: int
    ) -> tuple[Float32[Tensor, "positions half"], Float32[Tensor, "positions half"]] | None:
        """Return cosines and sines of the rotations, at least for so many positions; None for a model without."""
        if self.rotary is None:
            return None
        known = getattr(self, "turns", None)
        if known is None or len(known[0]) < positions:
            longer = max(positions, 2 * len(known[0]) if known else 0)
            cosines, sines = self.rotary(torch.zeros(1), torch.arange(longer)[None])
            half = cosines.shape[2] // 2
            self.turns = cosines[0, :, :half].contiguous(), sines[0, :, :half].contiguous()
        return self.turns

    def matrix(self, parent: nn.Module, name: str, *shape: int) -> decoder.Matrix:
        """Describe a linear module whose matrix has the shape (out, in)."""
        module = parent.get_submodule(name)
        if type(module) is not QuantizedLinear or not isinstance(module.matrix, TrellisMatrix):
            raise UnknownPart(f"{name} is a {type(module).__name__} that is not in trellis tiles")
        if module.matrix.shape != shape:
            raise UnknownPart(f"{name} has the shape {module.matrix.shape} instead of {shape}")
        self.linears.append(module)
        return self._coded(module.matrix, self._tensor(module, "bias"))

    def table(self, parent: nn.Module, name: str, columns: int) -> decoder.Table:
        """Describe an embedding."""
        module: Any = parent.get_submodule(name)
        packed = isinstance(module, QuantizedEmbedding)
        kind: Any = type(module).__bases__[0] if packed and type(module) is not QuantizedEmbedding else type(module)
        if kind.__name__ in SCALED:
            self.links.append((module._buffers, "embed_scale", scale := module._buffers["embed_scale"]))
            self.struct.embedding_scale = float(scale)
        elif kind not in (QuantizedEmbedding, nn.Embedding):
            raise UnknownPart(f"{name} is a {type(module).__name__}, which has no native form")
        if isinstance(module, QuantizedEmbedding) and isinstance(module.matrix, TrellisMatrix):
            rows, held = module.matrix.shape
            table = decoder.Table(matrix=self._coded(module.matrix, 0), rows=rows)
        elif not packed:
            rows, held = module.weight.shape
            table = decoder.Table(rows=rows, floats=self._tensor(module, "weight"))
        else:
            raise UnknownPart(f"{name} is a {type(module).__name__} that is not in trellis tiles")
        if held != columns:
            raise UnknownPart(f"{name} has {held} columns instead of {columns}")
        return table

    def norm(self, parent: nn.Module, name: str, size: int) -> decoder.Norm:
        """Describe a norm."""
        module = parent._modules[name]
        assert module is not None
        kind = type(module).__name__
        if kind == "OlmoLayerNorm":
            self.kept.append(ones := torch.ones(size))
            return decoder.Norm(ones.data_ptr())
        if not isinstance(weight := getattr(module, "weight", None), Tensor) or weight.shape != (size,):
            raise UnknownPart(f"{name} is a {kind} without a weight for each of {size} columns")
        offset = 1.0 if kind.startswith("Gemma") else 0.0
        return decoder.Norm(self._tensor(module, "weight"), self._tensor(module, "bias"), offset)

    def _coded(self, matrix: TrellisMatrix, bias: int) -> decoder.Matrix:
        tiles = matrix.tiles
        if not tiles.content.is_cpu:
            raise UnknownPart(f"the weights are on {tiles.content.device}, not on the CPU")
        self.kept.append((tiles.content, tiles.starts))
        return decoder.Matrix(tiles.content.data_ptr(), tiles.starts.data_ptr(), bias)

    def _tensor(self, module: nn.Module, name: str) -> int:
        """Return the address of a parameter in float32, or 0 if there is none."""
        weight = module._parameters.get(name)
        if weight is None:
            return 0
        if weight.dtype != torch.float32 or not weight.is_contiguous() or not weight.is_cpu:
            raise UnknownPart(f"a {name} of {type(module).__name__} is in {weight.dtype} on {weight.device}")
        self.kept.append(weight.detach())
        self.links.append((module._parameters, name, weight))
        self.weights.append(weight)
        return weight.data_ptr()

    def activation(self, module: nn.Module) -> int:
        """Return the number of an activation function."""
        name = ACTIVATIONS.get(type(module).__name__)
        if name is None:
            raise UnknownPart(f"the activation {type(module).__name__} has no native form")
        return decoder.ACTIVATIONS[name]


def _llama(description: Description, model: Any) -> list[decoder.Block]:
    """Describe models of the LLaMA kind: LLaMA, Mistral, Qwen2, Qwen3, Gemma, Gemma 2, Phi-3, OLMo, OLMo 2."""
    struct, config, body, kind = description.struct, model.config, model.model, type(model).__name__
    first = body.layers[0]
    hidden, size = config.hidden_size, first.self_attn.head_dim
    heads, key_heads, inner = config.num_attention_heads, config.num_key_value_heads, config.intermediate_size
    struct.hidden, struct.heads, struct.key_heads, struct.head_size = hidden, heads, key_heads, size
    struct.inner, struct.gated = inner, 1
    struct.layer_norm, struct.joint_norms = kind == "OlmoForCausalLM", kind == "Olmo2ForCausalLM"
    struct.epsilon = struct.head_epsilon = OLMO_EPSILON if struct.layer_norm else config.rms_norm_eps
    struct.activation = description.activation(first.mlp._modules.get("act_fn") or first.mlp.activation_fn)
    struct.clip = getattr(config, "clip_qkv", None) or 0.0
    struct.score_cap, struct.logit_cap = (
        getattr(config, f"{part}_logit_softcapping", None) or 0.0 for part in ("attn", "final")
    )
    if struct.score_cap and config._attn_implementation != "eager":
        raise UnknownPart(f"{config._attn_implementation} caps no scores: load the model with attention eager")
    if getattr(config, "use_bidirectional_attention", False):
        raise UnknownPart("attention to later tokens has no native form")
    struct.tokens = description.table(body, "embed_tokens", hidden)
    struct.norm = description.norm(body, "norm", hidden)
    struct.head = description.matrix(model, "lm_head", struct.vocabulary, hidden)
    return [_llama_block(description, model, layer) for layer in body.layers[: config.num_hidden_layers]]


def _llama_block(description: Description, model: Any, layer: Any) -> decoder.Block:
    struct, attention, mlp = description.struct, layer.self_attn, layer.mlp
    hidden, size, heads, key_heads = struct.hidden, struct.head_size, struct.heads, struct.key_heads
    block = decoder.Block(scale=attention.scaling)
    if "qkv_proj" in attention._modules:
        block.attention[0] = description.matrix(attention, "qkv_proj", (heads + 2 * key_heads) * size, hidden)
    else:
        for place, (name, count) in enumerate((("q", heads), ("k", key_heads), ("v", key_heads))):
            block.attention[place] = description.matrix(attention, f"{name}_proj", count * size, hidden)
    block.output = description.matrix(attention, "o_proj", hidden, heads * size)
    if "gate_up_proj" in mlp._modules:
        block.inner[0] = description.matrix(mlp, "gate_up_proj", 2 * struct.inner, hidden)
    else:
        for place, name in enumerate(("gate_proj", "up_proj")):
            block.inner[place] = description.matrix(mlp, name, struct.inner, hidden)
    block.down = description.matrix(mlp, "down_proj", hidden, struct.inner)
    after = "post_feedforward_layernorm" in layer._modules  # the outputs have norms too, or (OLMo 2) nothing else
    names = {"before_attention": "input_layernorm", "before_inner": "post_attention_layernorm"}
    if after:
        names |= {"after_attention": "post_attention_layernorm", "before_inner": "pre_feedforward_layernorm"}
        names["after_inner"] = "post_feedforward_layernorm"
    for norm, name in names.items():
        if not after or name in layer._modules:
            setattr(block, norm, description.norm(layer, name, hidden))
    if "q_norm" in attention._modules:
        sizes = (heads * size, key_heads * size) if struct.joint_norms else (size, size)
        block.query, block.key = (
            description.norm(attention, name, own) for name, own in zip(("q_norm", "k_norm"), sizes, strict=True)
        )
    of_model = type(model).__name__.startswith(("Mistral", "Phi3"))
    block.window = getattr(model.config if of_model else attention, "sliding_window", None) or 0
    return block


def _gpt2(description: Description, model: Any) -> list[decoder.Block]:
    """Describe models of the GPT-2 kind."""
    struct, config, body = description.struct, model.config, model.transformer
    hidden, heads = config.hidden_size, config.num_attention_heads
    inner = 4 * hidden if config.n_inner is None else config.n_inner
    if config.add_cross_attention or (config.reorder_and_upcast_attn and config._attn_implementation == "eager"):
        raise UnknownPart("attention to another text, or of another precision, has no native form")
    struct.hidden, struct.heads, struct.key_heads, struct.head_size = hidden, heads, heads, hidden // heads
    struct.inner, struct.layer_norm, struct.epsilon = inner, 1, config.layer_norm_epsilon
    struct.activation = description.activation(body.h[0].mlp.act)
    struct.tokens = description.table(body, "wte", hidden)
    struct.places = description.table(body, "wpe", hidden)
    struct.norm = description.norm(body, "ln_f", hidden)
    struct.head = description.matrix(model, "lm_head", struct.vocabulary, hidden)
    blocks = []
    for layer in body.h:
        attention, mlp = layer.attn, layer.mlp
        block = decoder.Block(scale=attention.scaling)
        block.attention[0] = description.matrix(attention, "c_attn", 3 * hidden, hidden)
        block.output = description.matrix(attention, "c_proj", hidden, hidden)
        block.inner[0] = description.matrix(mlp, "c_fc", inner, hidden)
        block.down = description.matrix(mlp, "c_proj", hidden, inner)
        block.before_attention, block.before_inner = (
            description.norm(layer, name, hidden) for name in ("ln_1", "ln_2")
        )
        blocks.append(block)
    return blocks


KINDS: Mapping[str, Callable[[Description, Any], list[decoder.Block]]] = {
    "LlamaForCausalLM": _llama,
    "MistralForCausalLM": _llama,
    "Qwen2ForCausalLM": _llama,
    "Qwen3ForCausalLM": _llama,
    "GemmaForCausalLM": _llama,
    "Gemma2ForCausalLM": _llama,
    "Phi3ForCausalLM": _llama,
    "OlmoForCausalLM": _llama,
    "Olmo2ForCausalLM": _llama,
    "GPT2LMHeadModel": _gpt2,
}
