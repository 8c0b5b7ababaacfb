"""Sizes of well-known models from their shapes alone: built without memory, so that 175B parameters take seconds.

What the scheme of the earlier prototype (``quant.published``) stores of them is counted to the byte: only ``nn.Linear``
is quantized, everything else stays at 32 bits.  In GPT-2 the blocks are ``Conv1D``, so that the tied head is all there
is to quantize.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import torch
import transformers
from torch import nn

from nashswarm.quant.prototype import CLASS_BITS, CLASS_WIDTHS, KIND, QUANTILES

FLOAT_BYTES = 4


def _gpt2(width: int, layers: int, heads: int, **others: Any) -> Mapping[str, Any]:
    return {"model_type": "gpt2", "n_embd": width, "n_layer": layers, "n_head": heads, **others}


def _opt(width: int, layers: int, heads: int, **others: Any) -> Mapping[str, Any]:
    sizes = {"hidden_size": width, "ffn_dim": 4 * width, "num_hidden_layers": layers, "num_attention_heads": heads}
    return {"model_type": "opt", "word_embed_proj_dim": width, **sizes, **others}


def _llama(width: int, hidden: int, layers: int, heads: int, **others: Any) -> Mapping[str, Any]:
    sizes = {"hidden_size": width, "intermediate_size": hidden, "num_hidden_layers": layers}
    return {"model_type": "llama", "num_attention_heads": heads, **sizes, **others}


SHAPES: Mapping[str, Mapping[str, Any]] = {  # as in the config.json of their checkpoints; the names are those of conf/
    "gpt2": _gpt2(768, 12, 12),
    "gpt2_medium": _gpt2(1024, 24, 16),
    "gpt2_large": _gpt2(1280, 36, 20),
    "gpt2_xl": _gpt2(1600, 48, 25),
    "opt_125m": _opt(768, 12, 12),
    "opt_350m": _opt(1024, 24, 16, word_embed_proj_dim=512, do_layer_norm_before=False),
    "opt_1_3b": _opt(2048, 24, 32),
    "tinyllama": _llama(2048, 5632, 22, 32, num_key_value_heads=4),
    "llama2_7b": _llama(4096, 11008, 32, 32),
    "llama2_13b": _llama(5120, 13824, 40, 40),
    "deepseek_67b": _llama(8192, 22016, 95, 64, num_key_value_heads=8, vocab_size=102400),
    "gpt3_175b": _gpt2(12288, 96, 96, n_positions=2048),  # the shape of Brown et al. 2020, table 2.1
}
LARGE: Mapping[str, Mapping[str, Any]] = {  # the last has the width and the depth of GPT-3
    **{name: SHAPES[name] for name in ("llama2_7b", "llama2_13b", "deepseek_67b")},
    "llama_175b": _llama(12288, 32768, 96, 96, vocab_size=50257),
}


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Parameters of a model, tied ones once, and the numbers of weights of its ``nn.Linear`` matrices."""

    parameters: int
    linear: tuple[int, ...]

    @property
    def bytes_full(self) -> int:
        """Of all parameters as 32-bit floats."""
        return FLOAT_BYTES * self.parameters

    @property
    def share(self) -> float:
        """The share of parameters that the published scheme touches."""
        return sum(self.linear) / self.parameters

    @property
    def code_bytes(self) -> int:
        """Of the codes that the published scheme stores: all that its authors counted."""
        return sum(sum(map(_whole_bytes, _class_counts(count), CLASS_WIDTHS)) for count in self.linear)

    @property
    def uniform_bytes(self) -> int:
        """Of the same matrices at 4 bits: what the published comparison counted for the uniform scheme."""
        return sum(_whole_bytes(count, 4) for count in self.linear)

    @property
    def compression_counted(self) -> float:
        """What the published protocol calls compression: codes against the floats that they replace."""
        return 1 - self.code_bytes / (FLOAT_BYTES * sum(self.linear))

    def bytes_published(self, class_bits: float) -> float:
        """Of the whole model under the published scheme, ``class_bits`` for the class of each quantized weight."""
        kept = FLOAT_BYTES * (self.parameters - sum(self.linear))
        headers = (len(KIND) + 8 + 8 * len(CLASS_WIDTHS)) * len(self.linear)
        if class_bits == CLASS_BITS:
            return kept + headers + self.code_bytes + sum(_whole_bytes(count, CLASS_BITS) for count in self.linear)
        return kept + headers + self.code_bytes + class_bits * sum(self.linear) / 8

    def compression(self, class_bits: float) -> float:
        """What the published scheme saves of the whole model."""
        return 1 - self.bytes_published(class_bits) / self.bytes_full

    def bytes_at(self, bits: float) -> float:
        """Of the whole model at ``bits`` stored bits per parameter, everything counted: a method's budget."""
        return bits * self.parameters / 8


def sizes(config: Mapping[str, Any]) -> Sizes:
    """The sizes of a causal language model, from its config."""
    described = transformers.AutoConfig.for_model(**config)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(described)
    return sizes_of(model)


def sizes_of(model: nn.Module) -> Sizes:
    """The sizes of a model that is there, or is on the meta device."""
    linear = {id(module.weight): module.weight.numel() for module in model.modules() if isinstance(module, nn.Linear)}
    return Sizes(sum(parameter.numel() for parameter in model.parameters()), tuple(linear.values()))


def class_entropy() -> float:
    """Bits that the class of a weight costs at least: the entropy of one, two and seven tenths.

    >>> round(class_entropy(), 3)
    1.157
    """
    shares = (1 - QUANTILES[0], QUANTILES[0] - QUANTILES[1], QUANTILES[1])
    return -sum(share * math.log2(share) for share in shares)


def _class_counts(count: int) -> tuple[int, int, int]:
    """How many of ``count`` different magnitudes reach the 0.9 quantile, the 0.7 quantile, and neither.

    >>> _class_counts(30)
    (3, 6, 21)
    """
    reach = [count - -(-tenths * (count - 1) // 10) for tenths in (9, 7)]
    return reach[0], reach[1] - reach[0], count - reach[1]


def _whole_bytes(count: int, bits: int) -> int:
    return -(-count * bits // 8)
