"""Tiny configs of every architecture of transformers, made from the config classes themselves.

Sizes are known by their names, which most configs share; ``SPECIAL`` has what a name does not tell.
"""

import functools
import inspect
import warnings
from collections.abc import Mapping
from typing import Any

import torch
import transformers

VOCABULARY, WIDTH, HIDDEN, HEADS, HEAD, EXPERTS, CONTEXT = 512, 64, 128, 4, 16, 4, 64
SIZES = (
    (VOCABULARY, "vocab_size vocab_size_per_layer_input unpadded_vocab_size decoder_vocab_size audio_vocab_size"),
    (
        WIDTH,
        "hidden_size d_model n_embd dim emb_dim embed_dim embedding_size embedding_dim word_embed_proj_dim "
        "pooler_hidden_size lru_width attention_hidden_size prediction_head_size cross_attention_hidden_size "
        "hidden_size_global input_embedding_size output_embedding_size d_latents out_hidden_size "
        "backbone_hidden_size true_hidden_size adapter_out_dim adapter_in_dim projector_input_dim "
        "projector_output_dim vision_output_dim router_hidden_size sliding_window window_size "
        "attention_window_size local_attention sliding_window_size keep_window_size attention_chunk_size "
        "prompt_mid_dim nemo_conv_channels ext_pw_out_channel "
        "depthwise_separable_out_channel classifier_proj_size max_source_positions max_target_positions mamba_d_ssm "
        "local_attention_window_len feed_forward_size",
    ),
    (
        HIDDEN,
        "intermediate_size ffn_dim encoder_ffn_dim decoder_ffn_dim d_ff dff dim_ff hidden_dim ffn_hidden_size "
        "intermediate_size_mlp dense_intermediate_size d_inner mlp_dim shared_intermediate_size n_inner",
    ),
    (
        WIDTH // 2,
        "moe_intermediate_size shared_expert_intermediate_size moe_shared_expert_intermediate_size "
        "kv_lora_rank expert_ffn_hidden_size shared_experts_intermediate_size q_lora_rank o_lora_rank "
        "kv_channels index_head_dim entity_emb_size intra_bottleneck_size mamba_dt_rank time_step_rank "
        "shape_embed_dim pronunciation_embed_dim embedding_rank hc_lowrank ple_embed_dim mamba_headdim",
    ),
    (
        CONTEXT,
        "max_position_embeddings n_positions n_ctx max_seq_len context_length model_max_length rel_extent "
        "relative_attention_max_distance bias_max_distance max_2d_position_embeddings "
        "original_max_position_embeddings position_bias_max_distance",
    ),
    (
        HEADS,
        "num_attention_heads n_head n_heads num_heads encoder_attention_heads decoder_attention_heads "
        "attention_heads num_encoder_attention_heads num_decoder_attention_heads num_self_attention_heads "
        "swa_num_attention_heads linear_num_value_heads linear_num_heads mamba_n_heads mamba_num_heads "
        "conf_num_attention_heads num_key_value_heads_full ngram_vocab_size_base_heads",
    ),
    (
        HEADS // 2,
        "num_key_value_heads num_kv_heads kv_n_heads swa_num_key_value_heads linear_num_key_heads "
        "index_n_heads num_query_groups num_experts_per_tok num_experts_per_token moe_topk moe_top_k moe_k "
        "n_groups num_shared_experts n_shared_experts",
    ),
    (
        HEAD,
        "head_dim attention_head_size d_kv d_head dim_head rotary_dim v_head_dim qk_nope_head_dim qk_head_dim "
        "linear_key_head_dim linear_value_head_dim linear_head_dim swa_head_dim attention_head_dim "
        "mamba_d_head mamba_head_dim mamba_d_state ssm_state_size state_size chunk_size mamba_chunk_size "
        "adapter_rank laurel_rank num_latents hidden_size_per_layer_input d_rel global_head_dim",
    ),
    (HEAD // 2, "qk_rope_head_dim index_topk"),
    (EXPERTS, "num_experts num_local_experts n_routed_experts moe_num_experts zero_expert_num"),
    (
        1,
        "n_group topk_group first_k_dense_replace moe_layer_start_index num_dense_layers "
        "moe_num_shared_experts num_self_attends_per_block mamba_n_groups num_expert_group",
    ),
)
LAYERS = (
    "num_hidden_layers n_layer n_layers num_layers encoder_layers decoder_layers depth num_blocks num_encoder_layers "
    "num_decoder_layers conf_num_hidden_layers num_global_layers"
)
SMALL = {name: size for size, names in SIZES for name in names.split()}
GAIN = 0.7  # of a matrix, about
TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")
MAMBA = {"mamba_n_heads": 4, "mamba_d_head": 32}  # which fill twice the width
FEW = {"num_experts": EXPERTS, "num_experts_per_tok": 2, "num_expert_group": 2}
HYBRID = ["linear_attention", "full_attention", "linear_attention", "full_attention"]
VISION = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
}
SPECIAL: Mapping[str, Mapping[str, Any]] = {  # what the names of sizes do not tell
    "bailing_hybrid": {"layer_group_size": 2} | FEW,
    "blt": {"encoder_hash_byte_group_vocab": VOCABULARY},
    "bamba": MAMBA | {"attn_layer_indices": [1, 3]},
    "cohere_compass_text": {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e4}}},
    "dbrx": {
        "ffn_config": {"ffn_hidden_size": HIDDEN, "hidden_size": WIDTH, "moe_top_k": 2},
        "attn_config": {"kv_n_heads": 2},
    },
    "dots3_note_text": {"num_key_value_heads": HEADS, "swa_kv_lora_rank": 32, "swa_q_lora_rank": 32},
    "esmc": {"num_key_value_heads": HEADS},
    "falcon_h1": {"mamba_d_head": HEAD},
    "fuyu": {"patch_size": HEADS},
    "gemma3n_text": {"num_kv_shared_layers": 0},
    "gemma4_text": {"num_kv_shared_layers": 0},
    "gemma4_unified_text": {"num_kv_shared_layers": 0},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "granitemoehybrid": MAMBA | {"layer_types": HYBRID},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1},
    "kimi_linear": {"layer_types": HYBRID} | FEW,
    "layoutlmv3": {"coordinate_size": 11, "shape_size": 10, "input_size": 32},
    "kolibri1": {"num_experts": EXPERTS},
    "lilt": {"channel_shrink_ratio": 4, "max_2d_position_embeddings": CONTEXT, "hidden_size": 96},
    "luke": {"entity_vocab_size": VOCABULARY},
    "minimax": {"block_size": HEAD},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "longcat_flash": {"qk_head_dim": 24, "head_dim": 8},
    "mamba2": {"num_heads": 8, "head_dim": HEAD},
    "mobilebert": {"normalization_type": "layer_norm"},  # without norms random weights give numbers without bounds
    "nemotron_h": {"layers_block_type": ["linear_attention", "moe", "full_attention", "mlp"]},
    "qwen4_exp_text": {"indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": HEAD, "indexer_budget": 16}
    | {"indexer_compress_ratio": 4, "ngram_vocab_size_base": VOCABULARY},
    "recurrent_gemma": {"num_hidden_layers": 3},
    "reformer": {"is_decoder": True, "axial_pos_shape": [8, 8], "axial_pos_embds_dim": [16, 48]},
    "rwkv": {"rescale_every": 0},
    "xlstm": {"chunk_size": 8, "qk_dim_factor": 1.0},
    "xmod": {"default_language": "en_XX"},
    "zamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "num_hidden_layers": 5}
    | {"attention_hidden_size": 2 * WIDTH, "attention_head_dim": 2 * HEAD},
    "zamba2": {"layers_block_type": ["linear_attention", "hybrid", "linear_attention", "hybrid"]},
    "zaya": {"num_experts_per_tok": 1},
}


def tiny_config(kind: str, **wanted: Any) -> Any:
    """Return a config of the architecture ``kind`` with two layers, or four where layers differ."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        cls = transformers.CONFIG_MAPPING[kind]
        return cls(**_fields(cls, kind) | wanted)


def _fields(cls: Any, kind: str) -> dict[str, Any]:
    """Return the small values of those fields that a config class has."""
    given = dict(SPECIAL.get(kind, {}))
    names = _names(cls)
    layers = 4 if "layer_types" in names or "layers_block_type" in names else 2
    sizes = SMALL | dict.fromkeys(LAYERS.split(), layers) | dict.fromkeys(TOKENS, 0)
    if "kv_lora_rank" in names:  # latent attention has no groups of heads
        sizes["num_key_value_heads"] = HEADS
    if "image_size" in names or "in_channels" in names:
        sizes |= VISION
    renamed = {inner: outer for outer, inner in cls.attribute_map.items()}
    fields = {
        name: size
        for name, size in sizes.items()
        if name in names and cls.attribute_map.get(name) not in names and renamed.get(name) not in given
    }
    for name in cls.sub_configs:
        sub = getattr(_default(cls), name, None)
        if name not in given and isinstance(sub, transformers.PreTrainedConfig):
            fields[name] = {"model_type": sub.model_type} | _fields(type(sub), sub.model_type)
    return fields | given


@functools.cache
def _default(cls: Any) -> Any:
    try:
        return cls()
    except (ValueError, TypeError):  # there is no config by default
        return None


def _names(cls: Any) -> set[str]:
    return {name for base in cls.__mro__ for name in inspect.get_annotations(base)} | set(
        inspect.signature(cls.__init__).parameters
    )


def tiny_model(kind: str, auto: Any = transformers.AutoModelForCausalLM, **wanted: Any) -> Any:
    """Return a model with random weights, which are large enough for every matrix to matter."""
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)
        model = auto.from_config(tiny_config(kind, **wanted)).eval()
        for parameter in model.parameters():
            if parameter.ndim < 2:
                parameter.add_(0.1 * torch.randn(parameter.shape))
            elif 1e-6 < parameter.std() < GAIN / WIDTH**0.5:
                parameter.mul_(GAIN / WIDTH**0.5 / parameter.std())
    return model
