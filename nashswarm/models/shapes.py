"""Count the parameters and bytes of well-known models from their shapes alone.

Models are built on the meta device, without memory, so that 175B parameters take seconds.  The bytes that the earlier
prototype's scheme (``quant.prototype``) stores are counted exactly: it quantizes ``nn.Linear`` alone, everything else
stays at 32 bits.  The blocks of GPT-2 consist of ``Conv1D``, so that scheme quantizes only its tied head.
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


SHAPES: Mapping[str, Mapping[str, Any]] = {  # as in the config.json of their checkpoints; names as in conf/model/
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
class ParameterCounts:
    """The number of parameters of a model, tied ones once, and the number of weights of each ``nn.Linear``."""

    parameters: int
    linear: tuple[int, ...]

    @property
    def bytes_full(self) -> int:
        """Return the bytes of all parameters as 32-bit floats."""
        return FLOAT_BYTES * self.parameters

    @property
    def share(self) -> float:
        """Return the share of parameters that the prototype's scheme quantizes."""
        return sum(self.linear) / self.parameters

    @property
    def code_bytes(self) -> int:
        """Return the bytes of the codes in the prototype's scheme: all that its authors counted."""
        return sum(sum(map(_whole_bytes, _class_counts(count), CLASS_WIDTHS)) for count in self.linear)

    @property
    def uniform_bytes(self) -> int:
        """Return the bytes of the same matrices at 4 bits: what the prototype's comparison counted for uniform."""
        return sum(_whole_bytes(count, 4) for count in self.linear)

    @property
    def compression_counted(self) -> float:
        """Return the compression by the prototype's protocol: 1 − codes / floats that they replace."""
        return 1 - self.code_bytes / (FLOAT_BYTES * sum(self.linear))

    def bytes_prototype(self, class_bits: float) -> float:
        """Return the bytes of the whole model in the prototype's scheme, with ``class_bits`` bits for each class."""
        floats = FLOAT_BYTES * (self.parameters - sum(self.linear))
        headers = (len(KIND) + 8 + 8 * len(CLASS_WIDTHS)) * len(self.linear)
        if class_bits == CLASS_BITS:
            return floats + headers + self.code_bytes + sum(_whole_bytes(count, CLASS_BITS) for count in self.linear)
        return floats + headers + self.code_bytes + class_bits * sum(self.linear) / 8

    def compression(self, class_bits: float) -> float:
        """Return the share of the whole model's bytes that the prototype's scheme saves."""
        return 1 - self.bytes_prototype(class_bits) / self.bytes_full

    def bytes_at(self, bits: float) -> float:
        """Return the bytes of the whole model at ``bits`` stored bits per parameter: the budget of a method."""
        return bits * self.parameters / 8


def count_from_config(config: Mapping[str, Any]) -> ParameterCounts:
    """Count the parameters of a causal language model from its config."""
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(**config))
    return count_parameters(model)


def count_parameters(model: nn.Module) -> ParameterCounts:
    """Count the parameters of a model, which may be on the meta device."""
    linear = {id(module.weight): module.weight.numel() for module in model.modules() if isinstance(module, nn.Linear)}
    return ParameterCounts(sum(parameter.numel() for parameter in model.parameters()), tuple(linear.values()))


def class_entropy() -> float:
    """Return the entropy in bits of the class of a weight: classes hold one, two and seven tenths of the weights.

    >>> round(class_entropy(), 3)
    1.157
    """
    shares = (1 - QUANTILES[0], QUANTILES[0] - QUANTILES[1], QUANTILES[1])
    return -sum(share * math.log2(share) for share in shares)


def _class_counts(count: int) -> tuple[int, int, int]:
    """Count how many of ``count`` different magnitudes reach the 0.9 quantile, only the 0.7 quantile, and neither.

    >>> _class_counts(30)
    (3, 6, 21)
    """
    reach = [count - -(-tenths * (count - 1) // 10) for tenths in (9, 7)]
    return reach[0], reach[1] - reach[0], count - reach[1]


def _whole_bytes(count: int, bits: int) -> int:
    return -(-count * bits // 8)
