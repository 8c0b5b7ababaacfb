"""Calibration statistics against plain autograd, position by position."""

import dataclasses
import functools
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from nashswarm.calibration import moments as calibration
from nashswarm.calibration.moments import Expected, calibrate
from nashswarm.calibration.moments_table import MomentsTable
from nashswarm.calibration.nll import sample_tokens
from nashswarm.experiment.decoded_costs import make_quadratic
from nashswarm.layers import Layer, curvature
from nashswarm.models.matrices import find_layers

KINDS = ("gpt2", "opt", "llama", "gpt_neox")


def module_names(model: Any) -> list[str]:
    return [name for layer in find_layers(model) for name in layer.modules]


def moments(model: Any, windows: Tensor, expected: Expected = "even", names: list[str] | None = None) -> MomentsTable:
    """The moments with the labels of the text."""
    names = names or module_names(model)
    return calibrate(model, names, windows, torch.Generator(), labels="text", expected=expected)


def summed_nll(model: Any, window: Tensor) -> Tensor:
    """Σ −log p of every token but the first."""
    log_p = model(input_ids=window[None]).logits[0].double().log_softmax(-1)
    return -sum(log_p[position, window[position + 1]] for position in range(len(window) - 1))


def inputs_and_gradients(
    model: Any, name: str, window: Tensor, score: Callable[[Any, Tensor], Tensor] = summed_nll
) -> tuple[Tensor, Tensor]:
    """Inputs of one module and gradients of its output, by position."""
    tensors: dict[str, Tensor] = {}

    def record(module: nn.Module, arguments: tuple[Any, ...], output: Tensor) -> None:
        output.retain_grad()
        tensors.update(input=arguments[0], output=output)

    handle = model.get_submodule(name).register_forward_hook(record)
    score(model, window).backward()
    handle.remove()
    return tensors["input"][0].detach(), tensors["output"].grad[0].double()


def test_calibrate_matches_autograd_by_position(model: Any, token_windows: Tensor) -> None:
    by_module = moments(model, token_windows)
    assert set(by_module) == set(module_names(model)) >= {"transformer.wte", "transformer.wpe", "lm_head"}
    positions = token_windows.numel()
    for name in by_module:
        products, squared = 0, torch.zeros(len(by_module[name].outputs), dtype=torch.float64)
        for window in token_windows:
            inputs, gradients = inputs_and_gradients(model, name, window)
            for x, gradient in zip(inputs, gradients, strict=True):
                products = products + (torch.outer(x, x).double() if x.ndim else 0)
                squared += gradient**2
        if name != "lm_head":
            torch.testing.assert_close(by_module[name].outputs.double(), squared / positions, rtol=1e-4, atol=1e-12)
        if not by_module[name].lookup:
            torch.testing.assert_close(by_module[name].inputs.double(), products / positions, rtol=1e-4, atol=1e-5)
        else:
            assert name in ("transformer.wte", "transformer.wpe")


@pytest.mark.parametrize("kind", KINDS)
def test_coupled_equals_squared_gradients_of_weight_rows(
    kind: str, random_model: Callable[[str], Any], token_windows: Tensor
) -> None:
    model = random_model(kind)
    by_module = moments(model, token_windows)
    head = model.get_output_embeddings()
    layers = [layer for layer in find_layers(model) if len(layer.modules) == 1 and "Embedding" not in layer.kinds]
    total = {layer.name: torch.zeros(len(layer.weight), dtype=torch.float64) for layer in layers}
    for window in token_windows:
        model.zero_grad()
        summed_nll(model, window).backward()
        for layer in layers:
            gradient = model.get_submodule(layer.name).weight.grad.double()
            total[layer.name] += (gradient.T if layer.kinds == ("Conv1D",) else gradient).square().sum(1)
    assert len(layers) >= 8
    for name, rows in total.items():
        part = by_module[name]
        if model.get_submodule(name) is head:
            assert torch.equal(part.coupled, part.outputs)
        else:
            expected = rows / token_windows.numel() / part.inputs.double().trace()
            torch.testing.assert_close(part.coupled.double(), expected, rtol=1e-3, atol=1e-12)


def zipf(rank: int, ranks: int) -> float:
    """The share of one of so many tokens, by Zipf's law with the shift that the calibration has."""
    return 1 / (rank + 50) / sum(1 / (other + 50) for other in range(ranks))


@pytest.mark.parametrize("expected", ["even", "zipf"])
def test_calibrate_smooths_counts_of_embeddings(expected: Expected, model: Any, token_windows: Tensor) -> None:
    by_module = moments(model, token_windows, expected)
    positions = token_windows.numel()
    counts = [(token_windows == token).sum().item() for token in range(512)]
    others = [512 * zipf(token, 512) if expected == "zipf" else 1 for token in range(512)]
    smoothed = [(counts[token] + others[token]) / (positions + 512) for token in range(512)]
    torch.testing.assert_close(by_module["transformer.wte"].inputs, torch.tensor(smoothed))
    used = [len(token_windows) if position < token_windows.shape[1] else 0 for position in range(64)]
    smoothed = [(used[position] + 1) / (positions + 64) for position in range(64)]
    torch.testing.assert_close(by_module["transformer.wpe"].inputs, torch.tensor(smoothed))
    assert by_module["transformer.wte"].inputs.sum().item() == pytest.approx(1)
    assert torch.equal(by_module["transformer.wte"].coupled, by_module["transformer.wte"].outputs)


@pytest.mark.parametrize("expected", ["even", "zipf"])
def test_calibrate_smooths_gradients_of_head(expected: Expected, model: Any, token_windows: Tensor) -> None:
    squared = torch.zeros(512, dtype=torch.float64)
    for window in token_windows:
        chances = model(input_ids=window[None]).logits[0, :-1].double().softmax(-1)
        chances[torch.arange(len(window) - 1), window[1:]] -= 1  # the gradient of −log p with respect to the logits
        squared += chances.square().sum(0).detach()
    share = squared.sum() / token_windows.numel()
    others = [512 * zipf(token, 512) * share if expected == "zipf" else 1 for token in range(512)]
    smoothed = (squared + torch.tensor(others)) / (token_windows.numel() + 512)
    outputs = moments(model, token_windows, expected)["lm_head"].outputs.double()
    torch.testing.assert_close(outputs, smoothed, rtol=1e-4, atol=0)


def test_calibrate_tied_head_and_embedding_get_moments_each(model: Any, token_windows: Tensor) -> None:
    assert model.lm_head.weight is model.transformer.wte.weight
    by_module = moments(model, token_windows)
    assert by_module["transformer.wte"].inputs.shape == (512,) and by_module["transformer.wte"].outputs.shape == (64,)
    assert by_module["lm_head"].inputs.shape == (64, 64) and by_module["lm_head"].outputs.shape == (512,)


def test_calibrate_with_sampled_labels_follows_generator(model: Any, token_windows: Tensor) -> None:
    def head_outputs(seed: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        return calibrate(model, ["transformer.wte", "lm_head"], token_windows, generator)["lm_head"].outputs

    assert torch.equal(head_outputs(0), head_outputs(0))
    assert not torch.equal(head_outputs(0), head_outputs(1))


def test_sample_tokens_inverts_cumulative_distribution() -> None:
    logits = torch.randn(300, 7, generator=torch.Generator().manual_seed(0)) * 3
    tokens = sample_tokens(logits, torch.Generator().manual_seed(1))
    uniform = torch.rand(300, 1, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    for row, number, token in zip(logits.double().softmax(-1), uniform, tokens, strict=True):
        assert row[:token].sum() <= number < row[: token + 1].sum()


def test_sample_tokens_matches_probabilities() -> None:
    logits = torch.tensor([0.1, 0.0, 0.6, 0.3]).log().expand(40_000, 4)
    counts = torch.bincount(sample_tokens(logits, torch.Generator().manual_seed(0)), minlength=4)
    torch.testing.assert_close(counts / 40_000, torch.tensor([0.1, 0.0, 0.6, 0.3]), atol=0.01, rtol=0)
    assert counts[1] == 0


def test_calibrate_with_sampled_labels_estimates_true_fisher(model: Any) -> None:
    with torch.no_grad():
        model.lm_head.weight.mul_(3)  # far from uniform
    windows = torch.randint(512, (40, 48), generator=torch.Generator().manual_seed(2))
    by_module = calibrate(model, ["transformer.wte", "lm_head"], windows, torch.Generator().manual_seed(3))
    total = by_module["lm_head"].outputs.double() * (windows.numel() + 512) - 1  # without the smoothing
    with torch.no_grad():
        chances = model(input_ids=windows).logits[:, :-1].double().softmax(-1)
    expected = (chances * (1 - chances)).sum((0, 1))  # the variance of an indicator
    assert total.sum().item() == pytest.approx(expected.sum().item(), rel=0.03)
    often = expected.argsort(descending=True)[:20]
    torch.testing.assert_close(total[often].sum(), expected[often].sum(), rtol=0.15, atol=0)


def test_calibrate_with_repeated_text_gives_same_moments(model: Any, token_windows: Tensor) -> None:
    once, twice = moments(model, token_windows), moments(model, token_windows.repeat(2, 1))
    for name in ("transformer.h.0.attn.c_attn", "transformer.h.1.mlp.c_proj"):
        for part in ("inputs", "outputs", "coupled"):
            torch.testing.assert_close(getattr(once[name], part), getattr(twice[name], part))


@pytest.mark.parametrize("fails", [False, True])
def test_calibrate_leaves_model_unchanged(model: Any, token_windows: Tensor, fails: bool) -> None:
    model.transformer.wpe.weight.requires_grad_(False)
    before = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    if fails:
        with pytest.raises(IndexError):
            moments(model, torch.full((1, 8), 512))
    else:
        moments(model, token_windows)
    assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == before
    assert not any(module._forward_hooks for module in model.modules())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_calibrate_with_rounded_factors_gives_nearly_the_same_moments(model: Any, token_windows: Tensor) -> None:
    names = module_names(model)
    exact = calibrate(model, names, token_windows, torch.Generator(), labels="text")
    rounded = calibrate(model, names, token_windows, torch.Generator(), labels="text", rounded=True)
    assert torch.get_float32_matmul_precision() == "highest"
    for name in names:
        for field in ("inputs", "outputs", "coupled", "coupled_inputs"):
            one, other = getattr(exact[name], field), getattr(rounded[name], field)
            assert (one - other).norm() <= 0.03 * one.norm(), (name, field)


@pytest.mark.parametrize("rounded", [False, True])
def test_calibrate_with_another_number_of_threads_gives_the_same_moments(
    rounded: bool, model: Any, token_windows: Tensor
) -> None:
    before, names, tables = torch.get_num_threads(), module_names(model), []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            tables.append(calibrate(model, names, token_windows, torch.Generator().manual_seed(0), rounded=rounded))
    finally:
        torch.set_num_threads(before)
    one, two = (table.tensors() for table in tables)
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_calibrate_with_unused_module_raises(model: Any, token_windows: Tensor) -> None:
    model.spare, model.spare_table = nn.Linear(4, 4), nn.Embedding(4, 4)
    with pytest.raises(ValueError, match=re.escape("never uses spare, spare_table")):
        moments(model, token_windows, names=[*module_names(model)])


def test_calibrate_position_table_with_own_indices_is_uniform(
    random_model: Callable[[str], Any], token_windows: Tensor
) -> None:
    model = random_model("opt")
    name = "model.decoder.embed_positions"
    table = moments(model, token_windows)[name]
    rows, positions = model.get_submodule(name).weight.shape[0], token_windows.numel()
    torch.testing.assert_close(table.inputs, torch.full((rows,), 1 / rows))
    squared = sum(inputs_and_gradients(model, name, window)[1].square().sum(0) for window in token_windows)
    torch.testing.assert_close(table.outputs.double(), squared / positions, rtol=1e-4, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_calibrate_without_embeddings_gives_same_moments(
    kind: str, random_model: Callable[[str], Any], token_windows: Tensor
) -> None:
    """Leaving embeddings out, as ``model.exclude`` does, does not change the moments of the other matrices."""
    model = random_model(kind)
    full = moments(model, token_windows)
    names = [name for name in module_names(model) if not isinstance(model.get_submodule(name), nn.Embedding)]
    partial = moments(model, token_windows, names=names)
    for name in names:
        torch.testing.assert_close(partial[name].outputs, full[name].outputs)


def test_calibrate_frozen_model_gives_same_moments(model: Any, token_windows: Tensor) -> None:
    expected = moments(model, token_windows)
    frozen = model.requires_grad_(False)
    by_module = moments(frozen, token_windows)
    assert all(torch.equal(by_module[name].outputs, expected[name].outputs) for name in expected)
    assert not any(parameter.requires_grad for parameter in frozen.parameters())


@pytest.mark.parametrize("labels", ["model", "text"])
def test_calibrate_with_nll_as_score_equals_labels(model: Any, token_windows: Tensor, labels: Any) -> None:
    names = module_names(model)
    by_labels = calibrate(model, names, token_windows, torch.Generator().manual_seed(4), labels)
    score = functools.partial(calibration.summed_nll, labels=labels)
    by_score = calibrate(model, names, token_windows, torch.Generator().manual_seed(4), score=score)
    for name in names:
        for part in ("inputs", "outputs", "coupled"):
            assert torch.equal(getattr(by_score[name], part), getattr(by_labels[name], part))


def pooled(model: Any, window: Tensor) -> Tensor:
    """A sentence embedding of unit length."""
    return nn.functional.normalize(model(input_ids=window[None]).last_hidden_state[0].mean(0), dim=0)


def test_calibrate_encoder_with_projection_score_matches_autograd(token_windows: Tensor) -> None:
    torch.manual_seed(0)
    shared = {"vocab_size": 512, "hidden_size": 64, "intermediate_size": 128, "max_position_embeddings": 64}
    config = transformers.BertConfig(num_hidden_layers=2, num_attention_heads=4, initializer_range=0.1, **shared)
    encoder = transformers.BertModel(config).eval()
    assert encoder.get_output_embeddings() is None
    layers = find_layers(encoder, ["embeddings.*", "pooler.*"])
    generator = torch.Generator().manual_seed(6)
    by_module = calibrate(
        encoder,
        [layer.name for layer in layers],
        token_windows,
        generator,
        score=lambda model, window, generator: torch.randn(64, generator=generator) @ pooled(model, window),
    )
    directions = torch.randn(len(token_windows), 64, generator=generator.manual_seed(6))
    assert len(layers) == 12
    for layer in layers:
        squared, by_row = torch.zeros(2, len(layer.weight), dtype=torch.float64)
        for window, direction in zip(token_windows, directions, strict=True):
            inputs, gradients = inputs_and_gradients(
                encoder, layer.name, window, lambda model, window, v=direction: v @ pooled(model, window)
            )
            squared += gradients.square().sum(0)
            by_row += (gradients.T @ inputs.double()).square().sum(1)
        part = by_module[layer.name]
        torch.testing.assert_close(part.outputs.double(), squared / token_windows.numel(), rtol=1e-3, atol=1e-9)
        coupled = by_row / token_windows.numel() / part.inputs.double().trace()
        torch.testing.assert_close(part.coupled.double(), coupled, rtol=1e-3, atol=1e-9)


class MeanOfProducts(nn.Module):
    """An encoder without attention: its embedding is the mean over positions of W x."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.product = nn.Embedding(16, 6), nn.Linear(6, 4, bias=False)

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.product(self.table(input_ids)).mean(1)

    def get_input_embeddings(self) -> nn.Module:
        return self.table

    def get_output_embeddings(self) -> None:
        return None


def test_coupled_predicts_damage_of_error_at_all_positions() -> None:
    """½‖Δz‖² exactly: one token repeated in each window, signs v_o² = 1, and √T to turn positions into windows."""
    torch.manual_seed(0)
    encoder, length = MeanOfProducts(), 5
    windows = torch.arange(16)[:, None].repeat(1, length)

    def project(model: Any, window: Tensor, generator: torch.Generator) -> Tensor:
        signs = torch.randint(2, (4,), generator=generator) * 2.0 - 1
        return length**0.5 * signs @ model(window[None])[0]

    product = calibrate(encoder, ["product"], windows, torch.Generator().manual_seed(0), score=project)["product"]
    error = torch.randn(4, 6)
    by_row = ((error @ product.inputs) * error).sum(1)
    with torch.no_grad():
        moved = encoder.table(windows).mean(1) @ error.T
    torch.testing.assert_close(product.coupled @ by_row / 2, moved.square().sum(1).mean() / 2)
    torch.testing.assert_close(product.outputs, product.coupled / length)  # as if positions could cancel


class Twice(nn.Module):
    """Applies one layer twice, and another matrix of equal weight once: Zamba's and ALBERT's ways of sharing."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.table, self.shared, self.alias = nn.Embedding(16, 6), nn.Linear(6, 6), nn.Linear(6, 6)
        self.alias.weight = self.shared.weight

    def get_input_embeddings(self) -> nn.Module:
        return self.table

    def get_output_embeddings(self) -> None:
        return None

    def forward(self, window: Tensor) -> Tensor:
        states = self.table(window)
        for module in (self.shared, self.alias, self.shared):
            states = torch.tanh(module(states))
        return states


def test_calibrate_layer_called_twice_adds_up_gradients_and_inputs() -> None:
    model, windows = Twice(), torch.randint(16, (4, 5), generator=torch.Generator().manual_seed(0))

    def score(model: Any, window: Tensor, generator: torch.Generator) -> Tensor:
        return model(window).square().sum()

    table = calibrate(model, ["shared", "alias"], windows, torch.Generator(), score=score)
    rows, inputs = torch.zeros(6), torch.zeros(6, 6)
    for window in windows:
        x = [model.table(window)]
        for module in (model.shared, model.alias, model.shared):
            x.append(torch.tanh(module(x[-1])))
        copies = [model.shared.weight.detach().clone().requires_grad_() for _ in range(3)]
        states = x[0].detach()
        biases = (model.shared.bias, model.alias.bias, model.shared.bias)
        for weight, bias in zip(copies, biases, strict=True):
            states = torch.tanh(states @ weight.T + bias.detach())
        first, _, last = torch.autograd.grad(states.square().sum(), copies)
        rows += (first + last).square().sum(1)
        inputs += (x[0].T @ x[0] + x[2].T @ x[2]).detach()
    torch.testing.assert_close(table["shared"].inputs, inputs / windows.numel())
    assert torch.allclose(table["shared"].coupled * inputs.trace(), rows, rtol=1e-4)


def test_curvature_of_two_products_keeps_sums_over_rows_and_columns() -> None:
    model, windows = Twice(), torch.randint(16, (4, 5), generator=torch.Generator().manual_seed(0))
    score = lambda model, window, generator: model(window).square().sum()  # noqa: E731
    table = calibrate(model, ["shared", "alias"], windows, torch.Generator(), score=score)
    layer = Layer("shared", "shared", 0.0, ("shared", "alias"), ("Linear", "Linear"), model.shared.weight.detach())
    both = curvature(layer, table)
    parts = [curvature(dataclasses.replace(layer, modules=(name,)), table) for name in layer.modules]
    torch.testing.assert_close(both.diagonal().sum(1), sum(part.diagonal().sum(1) for part in parts))
    torch.testing.assert_close(both.diagonal().sum(0), sum(part.diagonal().sum(0) for part in parts))
    second = make_quadratic(layer, table, {"damping": 0.0})
    torch.testing.assert_close(both.rows.double(), torch.from_numpy(second.rows), rtol=1e-5, atol=0)
    torch.testing.assert_close(both.inputs.double(), torch.from_numpy(second.inputs), rtol=1e-5, atol=1e-12)
