"""Perplexities that others published, found again by this code.

They need GPT-2, OPT and WikiText-2, from the Hugging Face hub or from folders that NASHSWARM_GPT2,
NASHSWARM_GPT2_LARGE, NASHSWARM_OPT_125M and NASHSWARM_WIKITEXT2_RAW name; without them they are skipped and say what is
missing.
"""

import math
from collections.abc import Callable, Iterator
from typing import Any

import datasets
import huggingface_hub.constants
import numpy as np
import pytest
import torch
from hydra.utils import instantiate
from torch import Tensor

from experiments.config import compose
from nashswarm.data import corpus, hub
from nashswarm.layers import Layer
from nashswarm.models import evaluation, matrices, sources
from nashswarm.models.sources import LoadedModel
from nashswarm.quant.coordinate_descent import quantize_layer
from nashswarm.quant.curvature import Curvature
from nashswarm.quant.grid import Scheme, quantize

GPT2_LARGE = "hub model.path=${oc.env:NASHSWARM_GPT2_LARGE,openai-community/gpt2-large}"
CALIBRATION_WINDOWS = 32


def perplexity(model: Any, windows: Tensor) -> float:
    return math.exp(evaluation.summarise(evaluation.evaluate(model, windows, 1))["nll"])


def in_blocks(model: Any) -> list[Layer]:
    """The matrices that GPTQ's authors quantize: those of the blocks, neither embeddings nor the head."""
    return [layer for layer in matrices.find_layers(model) if ".layers." in layer.name]


def round_to_nearest(model: Any) -> None:
    """4 bits, one grid from minimum to maximum a row, in place."""
    for layer in in_blocks(model):
        rounded = quantize(layer.weight, 4, Scheme(layer.weight.shape[1]))
        matrices.set_weights(model, {layer.name: rounded.dequantize()})


@torch.no_grad()
def gptq(model: Any, windows: Tensor) -> None:
    """The same grids with error feedback, every matrix on the inputs that the full model gives it, in place."""
    layers = in_blocks(model)
    inputs = {layer.name: torch.zeros(layer.weight.shape[1], layer.weight.shape[1]) for layer in layers}

    def watch(name: str) -> Callable[..., None]:
        def see(module: Any, given: tuple[Tensor, ...]) -> None:
            x = given[0].flatten(0, -2)
            inputs[name] += x.T @ x / windows.numel()

        return see

    hooks = [model.get_submodule(layer.name).register_forward_pre_hook(watch(layer.name)) for layer in layers]
    for window in windows:
        model(input_ids=window[None])
    for hook in hooks:
        hook.remove()
    for layer in layers:
        rows, columns = layer.weight.shape
        curved = Curvature(torch.ones(rows), inputs[layer.name], None)
        matrices.set_weights(
            model, {layer.name: quantize_layer(layer.weight, 4, Scheme(columns), curved, 0).dequantize()}
        )


def test_recipes_quantize_what_their_authors_do(random_model: Callable[[str], Any]) -> None:
    """On a model of random weights, so that they are run everywhere: feedback brings the logits nearer."""
    windows = torch.randint(512, (12, 64), generator=torch.Generator().manual_seed(0))
    full = random_model("opt")
    reference = evaluation.compute_reference(full, windows[8:], 4)
    nearest, fed_back = random_model("opt"), random_model("opt")
    round_to_nearest(nearest)
    gptq(fed_back, windows[:8])
    kl = [
        evaluation.summarise(evaluation.evaluate(m, windows[8:], 4, reference))["kl"] for m in (full, fed_back, nearest)
    ]
    assert kl[0] == pytest.approx(0, abs=1e-6) and 1e-6 < kl[1] < kl[2]
    for name, embedding in full.named_parameters():
        if "embed" in name:
            assert torch.equal(embedding, dict(nearest.named_parameters())[name])


@pytest.fixture
def fetch(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., tuple[LoadedModel, Tensor, Tensor]]]:
    """Model name and window length → the model, its test windows and calibration windows; a skip without them."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)  # the other tests stay offline
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    hub.use_cache_if_unreachable.cache_clear()

    def found(name: str, length: int) -> tuple[LoadedModel, Tensor, Tensor]:
        config = compose(*f"model={name}".split(), "dataset=wikitext2_raw")
        try:
            source = instantiate(config.model, _convert_="object")
            text = instantiate(config.dataset, _convert_="object")
            loaded = sources.load(source, "cpu", torch.float32)
            parts = [
                corpus.cut_windows(text.text(purpose), loaded.tokenizer, length, purpose)
                for purpose in ("test", "calibration")
            ]
        except ValueError as error:
            pytest.skip(str(error))
        drawn = np.random.default_rng(0).permutation(len(parts[1]))[:CALIBRATION_WINDOWS]
        return loaded, parts[0], parts[1][torch.from_numpy(drawn)]

    yield found
    hub.use_cache_if_unreachable.cache_clear()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "length", "published", "within"),
    [("gpt2", 1024, 29.9, 0.1), (GPT2_LARGE, 1024, 19.44, 0.05), ("opt_125m", 2048, 27.65, 0.05)],
)
def test_full_precision_perplexity_is_the_published_one(
    fetch: Callable[..., Any], name: str, length: int, published: float, within: float
) -> None:
    """The usual numbers of windows that do not overlap (GPTQ, table 3, for OPT; transformers' page on perplexity)."""
    loaded, test, _ = fetch(name, length)
    assert perplexity(loaded.model, test) == pytest.approx(published, abs=within)


@pytest.mark.slow
def test_opt_rounded_to_nearest_perplexity_is_the_published_one(fetch: Callable[..., Any]) -> None:
    """37.28 (GPTQ, Frantar et al. 2023, table 3); our scales are 16-bit floats, theirs were not."""
    loaded, test, _ = fetch("opt_125m", 2048)
    round_to_nearest(loaded.model)
    assert perplexity(loaded.model, test) == pytest.approx(37.28, abs=0.4)


@pytest.mark.slow
def test_opt_by_gptq_perplexity_is_the_published_one(fetch: Callable[..., Any]) -> None:
    """31.1 (the same table), calibrated there on C4 and block after block, here on WikiText-2 and all at once."""
    loaded, test, calibration = fetch("opt_125m", 2048)
    gptq(loaded.model, calibration)
    assert perplexity(loaded.model, test) == pytest.approx(31.1, abs=1.5)
