"""Which matrices a model has, and what it costs to store them."""

import json
import pathlib
import shutil
import types
from collections.abc import Callable
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor

from nashswarm.models.matrices import find_layers, round_to_stored, set_weights, uncompressed_tensors
from nashswarm.models.sources import LoadedModel, ModelSource, content_digest, load

KINDS = ("gpt2", "opt", "llama", "gpt_neox")


def logits(model: Any, windows: Tensor) -> Tensor:
    with torch.no_grad():
        return model(input_ids=windows).logits


def test_find_layers_of_gpt2_lists_every_matrix(model: Any) -> None:
    block = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    layers = find_layers(model)
    expected = [
        "transformer.wte",
        "transformer.wpe",
        *(f"transformer.h.{i}.{name}" for i in range(2) for name in block),
    ]
    assert [layer.name for layer in layers] == expected
    assert layers[0].modules == ("transformer.wte", "lm_head") and layers[0].kinds == ("Embedding", "Linear")
    assert {layer.kinds for layer in layers[2:]} == {("Conv1D",)}
    assert {layer.role for layer in layers} == {"wte", "wpe", "c_attn", "c_proj", "c_fc"}
    depths = [layer.depth for layer in layers]
    assert depths == sorted(depths) and depths[0] == 0 and 0 < depths[2] < depths[-1] < 1


def test_find_layers_conv1d_is_transposed(model: Any) -> None:
    layer = next(layer for layer in find_layers(model) if layer.role == "c_fc")
    module = model.get_submodule(layer.name)
    x = torch.randn(3, 64)
    assert layer.weight.shape == (256, 64) == tuple(reversed(module.weight.shape))
    torch.testing.assert_close(x @ layer.weight.T + module.bias, module(x))


@pytest.mark.parametrize(
    "kind, count, head",
    [
        ("opt", 2 + 2 * 6, ("model.decoder.embed_tokens", "lm_head")),
        ("llama", 2 + 2 * 7, ("lm_head",)),
        ("gpt_neox", 2 + 2 * 4, ("lm_head",)),
    ],
)
def test_find_layers_of_architecture_lists_every_matrix(
    kind: str, count: int, head: tuple[str, ...], random_model: Callable[[str], Any]
) -> None:
    model = random_model(kind)
    layers = find_layers(model)
    assert len(layers) == count
    layer_of_head = next(layer for layer in layers if head[-1] in layer.modules)
    assert layer_of_head.modules == head
    assert layer_of_head.depth == (1.0 if len(head) == 1 else 0.0)
    for layer in layers:
        assert torch.equal(layer.weight, model.get_submodule(layer.name).weight)
    if kind == "llama":
        shapes = {layer.role: tuple(layer.weight.shape) for layer in layers}
        assert shapes["q_proj"] == (64, 64) and shapes["k_proj"] == shapes["v_proj"] == (32, 64)


def test_find_layers_with_exclude_omits_matches(model: Any) -> None:
    everything = {layer.name for layer in find_layers(model)}
    left = {layer.name for layer in find_layers(model, ["lm_head", "*.mlp.*"])}
    assert everything - left == {name for name in everything if ".mlp." in name} | {"transformer.wte"}
    with pytest.raises(ValueError, match=r"names no matrix of this model: \*\.mpl\.\*, nothing$"):
        find_layers(model, ["*.mpl.*", "lm_head", "nothing"])
    with pytest.raises(ValueError, match="nothing to compress"):
        find_layers(model, ["*"])


@pytest.mark.parametrize("kind", KINDS)
def test_set_weights_of_originals_restores_every_bit(
    kind: str, random_model: Callable[[str], Any], token_windows: Tensor
) -> None:
    model = random_model(kind)
    before, layers = logits(model, token_windows), find_layers(model)
    originals = {layer.name: layer.weight.clone() for layer in layers}
    for layer in layers:
        set_weights(model, {layer.name: layer.weight + 0.1 * torch.randn(layer.weight.shape)})
        assert not torch.equal(logits(model, token_windows), before), layer.name
        set_weights(model, {layer.name: originals[layer.name]})
        assert torch.equal(logits(model, token_windows), before), layer.name


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("exclude", [(), ("*.0.*",)])
def test_uncompressed_tensors_and_layers_cover_parameters_once(
    kind: str, exclude: tuple[str, ...], random_model: Callable[[str], Any]
) -> None:
    model = random_model(kind)
    layers = find_layers(model, exclude)
    others = uncompressed_tensors(model, layers)
    pointers = [model.get_submodule(layer.name).weight.data_ptr() for layer in layers]
    pointers += [tensor.data_ptr() for tensor in others.values()]
    assert len(set(pointers)) == len(pointers)
    assert set(pointers) >= {parameter.data_ptr() for parameter in model.parameters()}
    state = model.state_dict()
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    counted = sum(layer.parameters for layer in layers) + sum(
        state[name].numel() for name in others if name in parameters
    )
    assert counted == sum(parameter.numel() for parameter in model.parameters())


def test_round_to_stored_rounds_or_refuses(model: Any) -> None:
    others = uncompressed_tensors(model, find_layers(model))
    before = {name: tensor.clone() for name, tensor in others.items()}
    round_to_stored(others, 32)
    assert all(torch.equal(tensor, before[name]) for name, tensor in others.items())
    round_to_stored(others, 16)
    assert all(torch.equal(tensor, before[name].half().float()) for name, tensor in others.items())
    assert torch.equal(model.transformer.ln_f.weight, before["transformer.ln_f.weight"].half().float())
    others["transformer.ln_f.bias"].fill_(1e6)
    with pytest.raises(ValueError, match=r"transformer\.ln_f\.bias does not fit 16-bit floats"):
        round_to_stored(others, 16)


def test_load_folder_returns_model_and_tokenizer(model_folder: pathlib.Path, tiny: Any, token_windows: Tensor) -> None:
    source = ModelSource(str(model_folder))
    loaded = load(source, "cpu", torch.float32)
    assert torch.equal(logits(loaded.model, token_windows), logits(tiny, token_windows))
    assert not loaded.model.training and loaded.window_length(None) == 64 and source.label == "tiny"
    assert loaded.tokenizer.decode(loaded.tokenizer("the quiet flock\n")["input_ids"]) == "the quiet flock\n"


def test_window_length_is_maximum_capped_at_2048(model: Any) -> None:
    loaded = LoadedModel(model, None)
    model.config.n_positions = 4096
    assert loaded.window_length(None) == 2048 and loaded.window_length(4096) == 4096
    with pytest.raises(ValueError, match="maximum of 4096"):
        loaded.window_length(4097)
    silent = LoadedModel(types.SimpleNamespace(config=object()), None)
    with pytest.raises(ValueError, match=r"set dataset\.sequence_length"):
        silent.window_length(None)


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
