"""Loading models: from where, with which window, and what is refused."""

import json
import pathlib
import shutil
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor

from nashswarm.models.architecture import FALLBACK
from nashswarm.models.matrices import find_layers
from nashswarm.models.sources import LoadedModel, ModelSource, content_digest, load
from tests.models.tiny_configs import tiny_model


def test_load_folder_returns_model_and_tokenizer(model_folder: pathlib.Path, tiny: Any, token_windows: Tensor) -> None:
    source = ModelSource(str(model_folder))
    loaded = load(source, "cpu", torch.float32)
    with torch.no_grad():
        logits, expected = (model(input_ids=token_windows).logits for model in (loaded.model, tiny))
    assert torch.equal(logits, expected)
    assert not loaded.model.training and loaded.window_length(None) == 64 and source.label == "tiny"
    assert loaded.tokenizer.decode(loaded.tokenizer("the quiet flock\n")["input_ids"]) == "the quiet flock\n"


def test_window_length_is_maximum_capped_at_2048(model: Any) -> None:
    loaded = LoadedModel(model, None)
    model.config.n_positions = 4096
    assert loaded.window_length(None) == 2048 and loaded.window_length(4096) == 4096
    with pytest.raises(ValueError, match="maximum of 4096"):
        loaded.window_length(4097)
    recurrent = LoadedModel(tiny_model("mamba2"), None)  # has no maximum
    assert recurrent.window_length(None) == FALLBACK and recurrent.window_length(4097) == 4097


def test_load_without_path_returns_embedded_model() -> None:
    loaded = load(ModelSource(), "cpu", torch.float32)
    assert ModelSource().label == "default"
    assert find_layers(loaded.model) and loaded.tokenizer("a line of text")["input_ids"]


def test_content_digest_depends_on_files_not_folder(model_folder: pathlib.Path, tmp_path: pathlib.Path) -> None:
    shutil.copytree(model_folder, tmp_path / "elsewhere")
    same, source = ModelSource(str(tmp_path / "elsewhere")), ModelSource(str(model_folder))
    assert content_digest(same) == content_digest(source)
    with (tmp_path / "elsewhere" / "model.safetensors").open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"\x7f")
    assert content_digest(same) != content_digest(source)
    assert content_digest(ModelSource("owner/name", "v1")) == "owner/name@v1"
    assert content_digest(ModelSource("owner/name")) == "owner/name@main"


def broken(model_folder: pathlib.Path, folder: pathlib.Path, how: str) -> pathlib.Path:
    """A copy of the model with something wrong."""
    if how == "missing":
        return folder / "nowhere"
    shutil.copytree(model_folder, folder, dirs_exist_ok=True)
    weights, config = folder / "model.safetensors", folder / "config.json"
    if how == "no config":
        config.unlink()
    elif how == "config is not JSON":
        config.write_text("{")
    elif how == "unknown architecture":
        config.write_text(json.dumps({"model_type": "abacus"}))
    elif how == "not a language model":
        config.write_text(json.dumps({"model_type": "vit"}))
    elif how == "no weights":
        weights.unlink()
    elif how == "weights cut short":
        weights.write_bytes(weights.read_bytes()[:-1000])
    elif how == "weights are not safetensors":
        weights.write_bytes(b"\x00" * 64)
    elif how == "weights are empty":
        weights.write_bytes(b"")
    elif how == "no tokenizer":
        for path in folder.glob("*token*"):
            path.unlink()
    elif how == "tokenizer is not JSON":
        (folder / "tokenizer.json").write_text("{")
    else:
        tensors = safetensors.torch.load_file(weights)
        if how == "a matrix is missing":
            del tensors["transformer.h.0.mlp.c_fc.weight"]
        elif how == "a matrix has another shape":
            tensors["transformer.h.0.mlp.c_fc.weight"] = torch.zeros(64, 128)
        safetensors.torch.save_file(tensors, weights, {"format": "pt"})
    return folder


@pytest.mark.parametrize(
    "how",
    [
        "missing",
        "no config",
        "config is not JSON",
        "unknown architecture",
        "not a language model",
        "no weights",
        "weights cut short",
        "weights are not safetensors",
        "weights are empty",
        "no tokenizer",
        "tokenizer is not JSON",
        "a matrix is missing",
        "a matrix has another shape",
    ],
)
def test_load_broken_checkpoint_refused(how: str, model_folder: pathlib.Path, tmp_path: pathlib.Path) -> None:
    folder = broken(model_folder, tmp_path, how)
    with pytest.raises(ValueError) as caught:
        load(ModelSource(str(folder)), "cpu", torch.float32)
    assert str(folder) in str(caught.value) and "\n" not in str(caught.value)


def test_load_unreachable_name_refused() -> None:
    with pytest.raises(ValueError) as caught:
        load(ModelSource("nobody/nothing"), "cpu", torch.float32)
    message = str(caught.value)
    assert message.startswith("the model nobody/nothing cannot be fetched") and "\n" not in message
