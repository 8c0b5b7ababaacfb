"""GGUF files: read back here, by transformers' own reader, and, where it is installed, by a real llama.cpp."""

import copy
import json
import pathlib
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import tokenizers
import torch
import transformers
from torch import Tensor

from nashswarm.models import gguf_architectures, gguf_file, sources
from tests.models.gguf_file import interleave

gguf = pytest.importorskip("gguf", reason="the package gguf is not installed")
TEXT = "the old starling reads 1234 prices;  it doesn't\tmind\n\n …and a naïve flock leaves 7 bytes"
SHARED = {
    "vocab_size": 512, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "initializer_range": 0.1, "bos_token_id": 0,
    "eos_token_id": 0,
}  # fmt: skip
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 500.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}  # fmt: skip
CONFIGS: dict[str, Callable[[], Any]] = {
    "llama": lambda: transformers.LlamaConfig(**SHARED, tie_word_embeddings=False),
    "llama_tied": lambda: transformers.LlamaConfig(**SHARED, tie_word_embeddings=True),
    "llama_biased": lambda: transformers.LlamaConfig(**SHARED, attention_bias=True, mlp_bias=True),
    "llama_wide_heads": lambda: transformers.LlamaConfig(**SHARED, head_dim=24),
    "llama3_rope": lambda: transformers.LlamaConfig(**SHARED, rope_parameters=dict(LLAMA3)),
    "linear_rope": lambda: transformers.LlamaConfig(
        **SHARED, rope_parameters={"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}
    ),
    "mistral": lambda: transformers.MistralConfig(**SHARED),
    "qwen2": lambda: transformers.Qwen2Config(**SHARED, tie_word_embeddings=True),
    "qwen3": lambda: transformers.Qwen3Config(**SHARED, head_dim=16),
    "gemma": lambda: transformers.GemmaConfig(**SHARED, head_dim=24, pad_token_id=0),
    "gemma2": lambda: transformers.Gemma2Config(
        **SHARED, head_dim=16, query_pre_attn_scalar=16, sliding_window=20, attn_logit_softcapping=1.0, pad_token_id=0
    ),
    "gemma3": lambda: transformers.Gemma3TextConfig(
        **SHARED | {"num_hidden_layers": 6},
        head_dim=16,
        query_pre_attn_scalar=16,
        sliding_window=20,
        pad_token_id=0,
        rope_parameters={
            f"{kind}_attention": {"rope_type": "default", "rope_theta": theta}
            for kind, theta in (("sliding", 500.0), ("full", 20000.0))
        },
    ),
    "phi3": lambda: transformers.Phi3Config(**SHARED, pad_token_id=0, original_max_position_embeddings=64),
    "gpt2": lambda: transformers.GPT2Config(
        vocab_size=512, n_embd=64, n_layer=2, n_head=4, n_positions=64, initializer_range=0.1
    ),
}


def build(config: Any) -> Any:
    """Return a model of random weights, of which no norm is one and no bias zero."""
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.1 * torch.randn(parameter.shape))
    return model


@pytest.fixture(params=CONFIGS)
def model(request: pytest.FixtureRequest) -> Any:
    """A tiny model of every kind that can be written."""
    return build(CONFIGS[request.param]())


def llama_cpp_log_probabilities(path: pathlib.Path, tokens: Tensor) -> Tensor:
    """Return the log-probabilities of a real llama.cpp at every position of a text, (tokens, vocabulary).

    Its cache is in 32 bits, and it multiplies by the rows of the file as they are stored.
    """
    library = pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")
    library.llama_backend_init()
    loading = library.llama_model_default_params()
    loading.use_extra_bufts = False
    model = library.llama_model_load_from_file(str(path).encode(), loading)
    running = library.llama_context_default_params()
    running.n_ctx = running.n_batch = 64
    running.n_threads = running.n_threads_batch = 1
    running.type_k = running.type_v = int(gguf.GGMLQuantizationType.F32)
    running.flash_attn_type = 0  # off
    context = library.llama_init_from_model(model, running)
    batch = library.llama_batch_init(len(tokens), 0, 1)
    batch.n_tokens = len(tokens)
    for place, token in enumerate(tokens.tolist()):
        batch.token[place], batch.pos[place], batch.logits[place] = token, place, True
        batch.n_seq_id[place], batch.seq_id[place][0] = 1, 0
    assert library.llama_decode(context, batch) == 0
    rows = next(int(tensor.shape[1]) for tensor in gguf.GGUFReader(path).tensors if tensor.name == "token_embd.weight")
    logits = np.ctypeslib.as_array(library.llama_get_logits(context), (len(tokens) * rows,)).copy()
    library.llama_batch_free(batch)
    library.llama_free(context)
    library.llama_model_free(model)
    return torch.from_numpy(logits).view(len(tokens), rows).log_softmax(-1)


@torch.no_grad()
def log_probabilities(model: Any, tokens: Tensor) -> Tensor:
    return model(input_ids=tokens[None]).logits[0].float().log_softmax(-1)


def divergence(full: Tensor, other: Tensor) -> float:
    """Return KL(full ‖ other) in nats per token."""
    return float((full.exp() * (full - other)).sum(-1).mean())


def as_layers_have(model: Any, name: str, parameter: Tensor) -> Tensor:
    """Return a parameter as it is read back: matrices as (out, in), norms of Gemma rounded with one added."""
    kind, values = model.config.model_type, parameter.detach()
    if kind.startswith("gemma") and name.endswith("norm.weight"):
        return (values + 1) - 1
    return values.T if kind == "gpt2" and ".h." in name and values.ndim > 1 else values


def test_write_in_32_bits_reads_back_every_parameter(model: Any, tmp_path: pathlib.Path) -> None:
    gguf_file.write(model, tmp_path / "model.gguf", "float32")
    stored = gguf_file.read(tmp_path / "model.gguf", gguf_architectures.layout(model))
    parameters = dict(model.named_parameters())
    assert list(stored) == list(parameters)
    for name, parameter in parameters.items():
        assert stored[name].type == "F32" and torch.equal(stored[name].values, as_layers_have(model, name, parameter))
        assert stored[name].content.nbytes == 4 * parameter.numel()


def test_write_in_16_bits_rounds_matrices_alone(model: Any, tmp_path: pathlib.Path) -> None:
    gguf_file.write(model, tmp_path / "model.gguf")
    stored = gguf_file.read(tmp_path / "model.gguf", gguf_architectures.layout(model))
    for name, parameter in model.named_parameters():
        values = as_layers_have(model, name, parameter)
        assert stored[name].type == ("F16" if parameter.ndim > 1 else "F32")
        assert torch.equal(stored[name].values, values.half().float() if parameter.ndim > 1 else values)


def test_write_llama_puts_both_halves_of_a_head_by_turns(tmp_path: pathlib.Path) -> None:
    model = build(CONFIGS["llama"]())
    gguf_file.write(model, tmp_path / "model.gguf", "float32")
    tensors = {tensor.name: tensor.data for tensor in gguf.GGUFReader(tmp_path / "model.gguf").tensors}
    attention = model.model.layers[1].self_attn
    for name, module, heads in (("attn_q", attention.q_proj, 4), ("attn_k", attention.k_proj, 2)):
        assert np.array_equal(tensors[f"blk.1.{name}.weight"], interleave(module.weight.detach().numpy(), heads))
    assert np.array_equal(tensors["blk.1.attn_v.weight"], attention.v_proj.weight.detach().numpy())


def test_write_tied_head_is_stored_once(tmp_path: pathlib.Path) -> None:
    for kind, heads in (("llama_tied", 0), ("llama", 1)):
        gguf_file.write(build(CONFIGS[kind]()), tmp_path / kind)
        names = [tensor.name for tensor in gguf.GGUFReader(tmp_path / kind).tensors]
        assert names.count("token_embd.weight") == 1 and names.count("output.weight") == heads


@pytest.mark.parametrize("kind", ["llama", "llama_tied", "qwen2"])
def test_write_loads_in_transformers_with_the_same_logits(kind: str, tmp_path: pathlib.Path, tokenizer: Any) -> None:
    model, tokens = build(CONFIGS[kind]()), torch.arange(20)
    gguf_file.write(model, tmp_path / "model.gguf", "float32", tokenizer)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="model.gguf").eval()
    assert torch.allclose(log_probabilities(loaded, tokens), log_probabilities(model, tokens), atol=1e-5)
    reader = transformers.AutoTokenizer.from_pretrained(tmp_path, gguf_file="model.gguf")
    assert reader(TEXT)["input_ids"] == tokenizer(TEXT)["input_ids"]


def test_write_loads_in_llama_cpp_with_the_same_logits(model: Any, tmp_path: pathlib.Path) -> None:
    gguf_file.write(model, tmp_path / "model.gguf", "float32")
    tokens = torch.randint(512, (48,), generator=torch.Generator().manual_seed(0))
    expected = log_probabilities(model, tokens)
    found = llama_cpp_log_probabilities(tmp_path / "model.gguf", tokens)
    assert (found - expected).abs().max() < 4e-3  # its exponentials are rounded
    assert abs(divergence(expected, found)) < 1e-6
    wrong = log_probabilities(build(model.config), tokens.flip(0))
    assert divergence(expected, wrong) > 1e-2


def sentencepiece_like(text: str) -> Any:
    """Train a tokenizer as LLaMA 2 has it: blanks are ▁, unknown characters become bytes."""
    bytes_first = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trained = tokenizers.Tokenizer(tokenizers.models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    trained.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    trained.decoder = tokenizers.decoders.Metaspace()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=500, special_tokens=bytes_first, show_progress=False)
    words = [[f"▁{word}" for word in line.split()] for line in text.splitlines()]
    trained.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace(prepend_scheme="always", split=True)
    trained.train_from_iterator([" ".join(line).replace("▁", "") for line in words], trainer)
    trained.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    described = json.loads(trained.to_str())
    described["added_tokens"] = [token for token in described["added_tokens"] if not token["content"].startswith("<0x")]
    described["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}},
    }
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizers.Tokenizer.from_str(json.dumps(described)),
        bos_token="<s>", eos_token="</s>", unk_token="<unk>",
    )  # fmt: skip


def with_digits(tokenizer: Any) -> Any:
    """Return the byte-level tokenizer with every digit apart, as SmolLM has it."""
    parts = tokenizers.pre_tokenizers
    described = tokenizers.Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    described.pre_tokenizer = parts.Sequence([parts.Digits(True), parts.ByteLevel(add_prefix_space=False)])
    return transformers.PreTrainedTokenizerFast(tokenizer_object=described, eos_token="<|endoftext|>")


@pytest.mark.parametrize("kind", ["byte-level", "digits apart", "embedded", "sentencepiece"])
def test_write_tokenizer_cuts_text_in_llama_cpp_as_before(
    kind: str, tmp_path: pathlib.Path, tokenizer: Any, text_folder: pathlib.Path
) -> None:
    library = pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")
    if kind == "sentencepiece":
        tokenizer = sentencepiece_like((text_folder / "train.txt").read_text())
    elif kind == "digits apart":
        tokenizer = with_digits(tokenizer)
    elif kind == "embedded":
        tokenizer = transformers.AutoTokenizer.from_pretrained(sources.EMBEDDED)
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = "{{ messages[0].content }}"
    model = build(transformers.LlamaConfig(**SHARED | {"vocab_size": len(tokenizer) + 3}))
    gguf_file.write(model, tmp_path / "model.gguf", "float32", tokenizer)
    loaded = library.Llama(str(tmp_path / "model.gguf"), vocab_only=True, verbose=False)
    tokens = loaded.tokenize(TEXT.encode(), add_bos=True)
    assert tokens == tokenizer(TEXT)["input_ids"] and len(set(tokens)) > 20
    assert loaded.metadata["tokenizer.chat_template"] == tokenizer.chat_template
    assert loaded.token_eos() == tokenizer.eos_token_id
    loaded.close()


def test_write_other_architecture_raises_before_any_file(random_model: Any, tmp_path: pathlib.Path) -> None:
    with pytest.raises(ValueError, match="OPTForCausalLM cannot be written as GGUF: only language models of llama, "):
        gguf_file.write(random_model("opt"), tmp_path / "model.gguf")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "options, message",
    [
        ({"hidden_act": "gelu"}, "imply the activation silu, and this model has gelu"),
        (
            {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}},
            "rotary embeddings of dynamic",
        ),
    ],
)
def test_write_settings_that_the_file_lacks_raise(options: Any, message: str, tmp_path: pathlib.Path) -> None:
    with pytest.raises(ValueError, match=message):
        gguf_file.write(build(transformers.LlamaConfig(**SHARED | options)), tmp_path / "model.gguf")


def test_write_weight_too_large_for_16_bits_raises(tmp_path: pathlib.Path) -> None:
    model = build(CONFIGS["llama"]())
    with torch.no_grad():
        model.lm_head.weight[0, 0] = 1e5
    with pytest.raises(ValueError, match=r"lm_head\.weight does not fit 16-bit floats"):
        gguf_file.write(model, tmp_path / "model.gguf")
    assert not list(tmp_path.iterdir())


def test_write_tokenizer_of_another_kind_raises(tmp_path: pathlib.Path) -> None:
    word_level = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0}, unk_token="a"))
    unknown_rule = tokenizers.Tokenizer(tokenizers.models.BPE({"a": 0}, []))
    unknown_rule.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    model = build(CONFIGS["llama"]())
    for backend, message in ((word_level, "kind WordLevel"), (unknown_rule, "a rule that GGUF has no name for")):
        with pytest.raises(ValueError, match=message):
            tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=backend)
            gguf_file.write(model, tmp_path / "model.gguf", tokenizer=tokenizer)
