"""Which class of transformers opens a checkpoint, and which models can be compressed at all."""

from collections.abc import Mapping
from typing import Any

import transformers
from torch import nn
from transformers.models.auto import modeling_auto

FALLBACK = 512  # tokens in a window of a model whose config names no maximum
LENGTHS = ("n_positions", "max_position_embeddings", "n_ctx", "max_seq_len", "context_length", "model_max_length")
TEXT = "input_ids"
AUTO: dict[str, Mapping[str, Any]] = {
    "AutoModelForCausalLM": modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    "AutoModelForSequenceClassification": modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
    "AutoModelForMaskedLM": modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    "AutoModel": modeling_auto.MODEL_MAPPING_NAMES,
}


def class_of(config: Any) -> Any:
    """Return the class that a checkpoint's config names; without a name, the one that predicts the next token.

    A multimodal model thus stays one, and a masked language model does not become a decoder.  Raises ValueError as
    ``check`` does.
    """
    for name in config.architectures or ():
        named = getattr(transformers, name, None)
        if named is not None and issubclass(named, transformers.PreTrainedModel):
            check(named, config)
            return named
    return transformers.AutoModelForCausalLM


def auto_class(architecture: str) -> str:
    """Return the name of the class of transformers that opens models of the class ``architecture``.

    >>> auto_class("LlamaForCausalLM"), auto_class("BertForMaskedLM"), auto_class("BertModel")
    ('AutoModelForCausalLM', 'AutoModelForMaskedLM', 'AutoModel')
    """
    for name, mapping in AUTO.items():
        if any(architecture in ((known,) if isinstance(known, str) else known) for known in mapping.values()):
            return name
    return architecture


def check(kind: Any, config: Any) -> None:
    """Raise ValueError in one sentence for a class of models that calibration text cannot be run through."""
    if getattr(config, "is_encoder_decoder", False) and not kind.__name__.endswith("ForCausalLM"):
        raise ValueError(
            f"a {kind.__name__} is an encoder with a decoder, which nashswarm does not compress: choose a decoder, an "
            "encoder or a classifier of text"
        )
    if kind.main_input_name != TEXT:
        raise ValueError(
            f"a {kind.__name__} reads {kind.main_input_name} and no text, which nashswarm cannot calibrate it with"
        )


def check_embedding(model: Any) -> None:
    """Raise ValueError in one sentence for a model without a table of token embeddings."""
    try:
        if isinstance(model.get_input_embeddings(), nn.Embedding):
            return
    except (NotImplementedError, AttributeError):
        pass
    raise ValueError(f"a {type(model).__name__} has no table of token embeddings, so nashswarm cannot calibrate it")


def max_tokens(config: Any) -> int | None:
    """Return how many tokens a model of this config reads at once, or None if the config does not say.

    Of a multimodal model, the part that reads text counts.
    """
    for part in (config, config.get_text_config()):
        for name in LENGTHS:
            if isinstance(tokens := getattr(part, name, None), int) and tokens > 0:
                return tokens
    return None


def max_window(model: Any) -> int | None:
    """Return how many tokens a model reads at once, or None if its config does not say.

    Some models number positions from behind that of padding, and so read fewer tokens than they have positions.
    """
    longest = max_tokens(model.config)
    for name, module in model.named_modules():
        positions = isinstance(module, nn.Embedding) and "position" in name and module.num_embeddings == longest
        if positions and longest is not None and module.padding_idx is not None:
            return longest - int(module.padding_idx) - 1
    return longest
