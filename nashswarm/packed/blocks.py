"""Describe the blocks of a model of transformers to the native pass, or say what it does not know about them.

Known are the models of ``KINDS``: blocks of the LLaMA kind (root mean squares, rotations, gated layers) and of the
GPT-2 kind (layer norms, embeddings of positions).  All matrices must be trellis-coded.
"""

import ctypes
import operator
from collections.abc import Callable, Mapping
from typing import Any

import torch
from jaxtyping import Float32
from torch import Tensor, nn

from nashswarm.kernels import decoder
from nashswarm.packed.matrix import TrellisMatrix
from nashswarm.packed.modules import QuantizedEmbedding, QuantizedLinear

ROPES = ("default", "linear", "llama3", "yarn")  # whose angles do not depend on the length of the text
ATTENTION = ("sdpa", "eager")  # all compute the same
ACTIVATIONS = {  # the modules of transformers that compute them
    "SiLU": "silu",
    "SiLUActivation": "silu",
    "NewGELUActivation": "gelu_tanh",
    "GELUTanh": "gelu_tanh",
    "GELUActivation": "gelu",
}


class UnknownPart(Exception):
    """A part of a model that the native pass does not know, in words."""


class Description:
    """A model as the native pass reads it.

    ``struct``: for the library; its addresses are valid as long as ``unchanged``.  ``windows``: by block, 0 for none.
    """

    def __init__(self, model: Any) -> None:
        """Raises UnknownPart."""
        self.linears: list[QuantizedLinear] = []
        self.kept: list[Any] = []  # keeps what has an address alive
        self.links: list[tuple[dict[str, Any], str, Any]] = []
        self.weights: list[Tensor] = []
        kind = type(model).__name__
        if kind not in KINDS or not type(model).__module__.startswith("transformers."):
            raise UnknownPart(f"{kind} has no native pass")
        if model.dtype != torch.float32:
            raise UnknownPart(f"the model computes in {model.dtype}: load it with dtype=torch.float32")
        if model.config._attn_implementation not in ATTENTION:
            raise UnknownPart(f"attention is computed by {model.config._attn_implementation}")
        self.struct = decoder.Model()
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
        modules = list(model.modules())
        self.links += [(parent._modules, *child) for parent in modules for child in parent._modules.items()]
        self.hooks = [hooks for module in modules for hooks in (module._forward_hooks, module._forward_pre_hooks)]
        if patched := [type(module).__name__ for module in modules if "forward" in module.__dict__]:
            raise UnknownPart(f"the forward of {patched[0]} was replaced")
        self.pointers = [weight.data_ptr() for weight in self.weights]
        self.dicts, self.keys, self.objects = (list(part) for part in zip(*self.links, strict=True))

    def unchanged(self) -> bool:
        """Check that every module, and every tensor, is still where it was."""
        return all(map(operator.is_, map(dict.get, self.dicts, self.keys), self.objects)) and self.pointers == [
            weight.data_ptr() for weight in self.weights
        ]

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
        module = parent.get_submodule(name)
        if type(module) is QuantizedEmbedding and isinstance(module.matrix, TrellisMatrix):
            rows, held = module.matrix.shape
            table = decoder.Table(matrix=self._coded(module.matrix, 0), rows=rows)
        elif type(module) is nn.Embedding:
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
        if not isinstance(weight := module.weight, Tensor) or weight.shape != (size,):
            raise UnknownPart(f"{name} is a {type(module).__name__} without a weight for each of {size} columns")
        return decoder.Norm(self._tensor(module, "weight"), self._tensor(module, "bias"))

    def _coded(self, matrix: TrellisMatrix, bias: int) -> decoder.Matrix:
        tiles = matrix.tiles
        if not tiles.content.is_cpu:
            raise UnknownPart(f"the weights are on {tiles.content.device}, not on the CPU")
        self.kept.append((tiles.content, tiles.starts))
        self.links.append((matrix._buffers, "content", matrix._buffers["content"]))
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
    """Describe models of the LLaMA kind: LLaMA, Mistral, Qwen2, Qwen3."""
    struct, config, body = description.struct, model.config, model.model
    attention = body.layers[0].self_attn
    hidden, size = config.hidden_size, attention.head_dim
    heads, key_heads, inner = config.num_attention_heads, config.num_key_value_heads, config.intermediate_size
    struct.hidden, struct.heads, struct.key_heads, struct.head_size = hidden, heads, key_heads, size
    struct.inner, struct.gated = inner, 1
    struct.epsilon = struct.head_epsilon = config.rms_norm_eps
    struct.activation = description.activation(body.layers[0].mlp.act_fn)
    struct.tokens = description.table(body, "embed_tokens", hidden)
    struct.norm = description.norm(body, "norm", hidden)
    struct.head = description.matrix(model, "lm_head", struct.vocabulary, hidden)
    blocks = []
    for layer in body.layers[: config.num_hidden_layers]:
        attention, mlp = layer.self_attn, layer.mlp
        block = decoder.Block(scale=attention.scaling)
        for place, (name, count) in enumerate((("q", heads), ("k", key_heads), ("v", key_heads))):
            block.attention[place] = description.matrix(attention, f"{name}_proj", count * size, hidden)
        block.output = description.matrix(attention, "o_proj", hidden, heads * size)
        for place, name in enumerate(("gate_proj", "up_proj")):
            block.inner[place] = description.matrix(mlp, name, inner, hidden)
        block.down = description.matrix(mlp, "down_proj", hidden, inner)
        block.before_attention = description.norm(layer, "input_layernorm", hidden)
        block.before_inner = description.norm(layer, "post_attention_layernorm", hidden)
        if "q_norm" in attention._modules:
            block.query, block.key = (description.norm(attention, name, size) for name in ("q_norm", "k_norm"))
        window = getattr(attention, "sliding_window", None)
        if type(model).__name__.startswith("Mistral"):
            window = getattr(config, "sliding_window", None)
        block.window = window or 0
        blocks.append(block)
    return blocks


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
    "GPT2LMHeadModel": _gpt2,
}
