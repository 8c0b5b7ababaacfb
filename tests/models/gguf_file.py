"""A Python package that carries a tiny LLaMA in a GGUF file: as llama.cpp would write it, the blocks packed by hand."""

import json
import pathlib
from typing import Any

import numpy as np
import torch
from torch import Tensor

PACKAGE, FILE = "tiny-gguf", "Tiny.Q4_1.gguf"
GROUP = 32
NAMES = {  # of transformers → of llama.cpp
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


def write_package(folder: pathlib.Path, model: Any, tokenizer: Any) -> dict[str, Tensor]:
    """Write the package with the model in it and return the weights that are stored, by the names of transformers.

    Matrices are in Q4_1, the tied embedding in Q8_0, norms in F32.
    """
    import gguf

    config = model.config
    inside = folder / "tiny_gguf"
    inside.mkdir()
    (inside / "__init__.py").write_text("raise RuntimeError('imported')\n")  # nobody needs its runtime
    about = folder / "tiny_gguf-1.0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {PACKAGE}\nVersion: 1.0\n")

    writer = gguf.GGUFWriter(inside / FILE, "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_dimension_count(config.hidden_size // config.num_attention_heads)
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    known = len(tokenizer)
    tokens = tokenizer.convert_ids_to_tokens(range(known)) + [f"[unused{n}]" for n in range(known, config.vocab_size)]
    writer.add_token_list(tokens)
    merges = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
    writer.add_token_merges([" ".join(pair) for pair in merges])
    writer.add_token_types([3 if token == 0 else 1 for token in range(config.vocab_size)])  # control, normal
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(0)

    stored = {}
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    for number, (name, parameter) in enumerate(model.named_parameters()):
        values = parameter.detach().numpy()
        if values.ndim == 1:
            stored[name], kind, content = values, gguf.GGMLQuantizationType.F32, values
        elif "embed_tokens" in name:
            stored[name], content = q8_0(values)
            kind = gguf.GGMLQuantizationType.Q8_0
        else:
            stored[name], content = q4_1(values.shape, number)
            kind = gguf.GGMLQuantizationType.Q4_1
            role = name.split(".")[-2]
            if role in heads:
                content = interleave(content, heads[role])
        writer.add_tensor(_name(name), content, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return {name: torch.from_numpy(np.array(values)) for name, values in stored.items()}


def q4_1(shape: tuple[int, ...], seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Draw a matrix on the grid of Q4_1: its values, and its bytes of shape (rows, bytes of a row).

    A block of 32 weights is a step and a minimum in 16 bits each, then two codes of 4 bits a byte: those of the first
    16 weights are the low halves.
    """
    rng = np.random.default_rng(seed)
    values, content = np.zeros(shape, np.float32), []
    for row in range(shape[0]):
        for first in range(0, shape[1], GROUP):
            step, lowest = np.float16(rng.uniform(0.01, 0.03)), np.float16(rng.uniform(-0.3, -0.1))
            codes = rng.integers(0, 16, GROUP)
            for place, code in enumerate(codes):
                values[row, first + place] = np.float32(step) * np.float32(code) + np.float32(lowest)
            content.append(step.tobytes() + lowest.tobytes() + bytes((codes[:16] | codes[16:] << 4).tolist()))
    return values, np.frombuffer(b"".join(content), np.uint8).reshape(shape[0], -1)


def q8_0(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Round a matrix to the grid of Q8_0: blocks of 32 weights, a step in 16 bits and a code of 8 bits a weight."""
    rounded, content = np.zeros_like(values), []
    for row in range(len(values)):
        for first in range(0, values.shape[1], GROUP):
            block = values[row, first : first + GROUP]
            step = np.float16(np.abs(block).max() / 127)
            codes = np.clip(np.round(block / (np.float32(step) or 1)), -127, 127).astype(np.int8)
            rounded[row, first : first + GROUP] = np.float32(step) * codes
            content.append(step.tobytes() + codes.tobytes())
    return rounded, np.frombuffer(b"".join(content), np.uint8).reshape(len(values), -1)


def interleave(rows: np.ndarray, heads: int) -> np.ndarray:
    """Order the rows of queries or keys as llama.cpp rotates them: both halves of a head by turns."""
    size = len(rows) // heads
    order = [
        head * size + half * size // 2 + place for head in range(heads) for place in range(size // 2) for half in (0, 1)
    ]
    return rows[order]


def _name(name: str) -> str:
    module = name.removesuffix(".weight")
    if module in NAMES:
        return f"{NAMES[module]}.weight"
    _, _, block, role = module.split(".", 3)
    return f"blk.{block}.{NAMES[role]}.weight"
