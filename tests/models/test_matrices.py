"""Which matrices a model has, and what it costs to store them."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from nashswarm.models.matrices import find_layers, round_to_stored, set_weights, uncompressed_tensors

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


def test_round_to_stored_rounds_what_16_bits_can_hold(model: Any) -> None:
    others = uncompressed_tensors(model, find_layers(model))
    before = {name: tensor.clone() for name, tensor in others.items()}
    round_to_stored(others, 32)
    assert all(torch.equal(tensor, before[name]) for name, tensor in others.items())
    round_to_stored(others, 16)
    assert all(torch.equal(tensor, before[name].half().float()) for name, tensor in others.items())
    assert torch.equal(model.transformer.ln_f.weight, before["transformer.ln_f.weight"].half().float())
    others["transformer.ln_f.bias"].fill_(1e6)
    round_to_stored(others, 16)
    assert (model.transformer.ln_f.bias == 1e6).all()  # 16 bits cannot hold it
