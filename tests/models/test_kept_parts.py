"""What is no matrix stays as it was: end tokens, chat template, special tokens, and norms that 16 bits cannot hold."""

import pathlib
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

import nashswarm
from nashswarm.cli import main
from nashswarm.models.matrices import as_stored
from tests.conftest import sentences
from tests.models.architectures import padded_tokenizer
from tests.models.tiny_configs import tiny_model

TEMPLATE = "{% for message in messages %}<|user|>{{ message['content'] }}<|end|>{% endfor %}"
OPTIONS = ["--windows", "2", "--length", "16", "--bits", "4", "--method", "gptq", "--quiet"]


@pytest.mark.parametrize(
    "door",
    [pytest.param(["--no-verify"], marks=pytest.mark.slow, id="whole"), pytest.param(["--by-layer"], id="by-layer")],
)
def test_compress_keeps_end_tokens_template_and_special_tokens(door: list[str], tmp_path: pathlib.Path) -> None:
    words = padded_tokenizer(sentences(120, 0))
    words.add_special_tokens({"additional_special_tokens": ["<|user|>", "<|end|>"]})
    words.chat_template = TEMPLATE
    model = tiny_model("llama")
    ends = [words.eos_token_id, words.convert_tokens_to_ids("<|end|>")]
    model.generation_config = transformers.GenerationConfig(
        eos_token_id=ends, pad_token_id=0, do_sample=True, temperature=0.6, repetition_penalty=1.05
    )
    model.save_pretrained(tmp_path / "full")
    words.save_pretrained(tmp_path / "full")
    (tmp_path / "text.txt").write_text(sentences(60, 3))
    where = ["--calibration", str(tmp_path / "text.txt"), "--out", str(tmp_path / "small")]
    cache = [] if "--by-layer" in door else ["--cache", str(tmp_path / "cache")]
    assert main(["compress", str(tmp_path / "full"), *where, *cache, *OPTIONS, *door]) == 0
    small = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "small")
    kept: Any = transformers.AutoTokenizer.from_pretrained(tmp_path / "small")
    assert small.generation_config.to_diff_dict() == model.generation_config.to_diff_dict()
    assert small.generation_config.eos_token_id == ends
    assert kept.chat_template == TEMPLATE
    assert kept("<|user|>a<|end|>")["input_ids"] == words("<|user|>a<|end|>")["input_ids"]


@pytest.mark.parametrize("method", ["gptq", pytest.param("nash_swarm", marks=pytest.mark.slow)])
def test_compress_dead_neurons_and_zero_matrix_keeps_logits_finite(method: str, token_windows: Tensor) -> None:
    model = tiny_model("llama")
    with torch.no_grad():
        block = model.model.layers[0]
        block.mlp.up_proj.weight[10:40] = 0  # these inputs of down_proj are always zero
        block.self_attn.v_proj.weight.zero_()  # all inputs of o_proj are zero
        small, _ = nashswarm.compress(model, calibration=token_windows, method=method, bits=4)
        assert small(input_ids=token_windows).logits.isfinite().all()


def test_norm_beyond_16_bits_is_stored_exactly_in_32(token_windows: Tensor, tmp_path: pathlib.Path) -> None:
    """Every finite number of a checkpoint is usable: what float16 cannot hold takes two bytes more, and is no error."""
    model = tiny_model("llama")
    with torch.no_grad():
        model.model.norm.weight[0] = 7e4
    small, report = nashswarm.compress(model, calibration=token_windows, method="gptq", bits=4)
    small.save_pretrained(tmp_path)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(again.model.norm.weight, model.model.norm.weight)
    with torch.no_grad():
        logits = again(input_ids=token_windows).logits
        assert logits.isfinite().all() and torch.equal(logits, small(input_ids=token_windows).logits)
    size = sum((tmp_path / name).stat().st_size for name in ("model.safetensors", "config.json"))
    assert report.bytes_file == size


def test_as_stored_takes_32_bits_only_where_16_overflow() -> None:
    assert as_stored(torch.tensor([65504.0]), 16).dtype == torch.float16
    assert as_stored(torch.tensor([7e4]), 16).dtype == torch.float32
    assert as_stored(torch.tensor([float("inf")]), 16).dtype == torch.float16
    assert as_stored(torch.tensor([2**40]), 16).dtype == torch.int64
