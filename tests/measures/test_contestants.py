"""The runtimes that the Speed measure races against: what they compute with and how many bytes they hold."""

import importlib.metadata
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from nashswarm.errors import MissingPackage
from nashswarm.measures.contestants import CONTESTANTS, replace_products
from nashswarm.measures.size import resident_bytes
from nashswarm.methods.peers.peer import LIBRARIES


def skip_without(library: str) -> None:
    """Skip the test if the library is not installed."""
    try:
        LIBRARIES[library].require("this test")
    except MissingPackage as missing:
        pytest.skip(str(missing))


@pytest.fixture
def bare(monkeypatch: pytest.MonkeyPatch) -> None:
    """An environment in which no library is installed."""

    def version(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", version)


@pytest.mark.parametrize("name", ["onnxruntime", "bitsandbytes"])
def test_contestant_not_installed_names_the_extra(name: str, tiny: Any, bare: None) -> None:
    with pytest.raises(ValueError, match=rf"measure\.against={name} needs .*{name}: pip install 'nashswarm\[peers\]'"):
        CONTESTANTS[name](tiny)


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
@pytest.mark.parametrize("name", ["onnxruntime", "bitsandbytes"])
@torch.no_grad()
def test_contestant_products_are_replaced_and_count_4_bit_bytes(
    name: str, kind: str, random_model: Callable[[str], Any], token_windows: Tensor
) -> None:
    skip_without(name)
    model = random_model(kind)
    before = {key: part.clone() for key, part in model.state_dict().items()}
    contestant = CONTESTANTS[name](model)
    assert all(torch.equal(part, before[key]) for key, part in model.state_dict().items())
    products = [module for module in model.modules() if isinstance(module, nn.Linear | Conv1D)]
    replaced: list[Any] = [module for module in contestant.modules() if hasattr(module, "weight_bytes")]
    assert len(replaced) == len(products)
    assert not any(isinstance(module, Conv1D) or type(module) is nn.Linear for module in contestant.modules())
    if name == "bitsandbytes":
        assert all(part.weight.dtype == torch.uint8 for part in replaced)
        assert all(part.weight.quant_state.quant_type == "nf4" for part in replaced)

    weights = sum(module.weight.numel() for module in products)
    biases = sum(module.bias.numel() for module in products if module.bias is not None)
    head = model.get_output_embeddings().weight
    tied = head.numel() if head is model.get_input_embeddings().weight else 0  # the embedding stays
    product_bytes = resident_bytes(contestant) - (resident_bytes(model) - 4 * (weights - tied + biases))
    scale_bytes, bias_bytes = (4, 4) if name == "onnxruntime" else (2 if has_bfloat16() else 4, 2)
    assert product_bytes == weights // 2 + scale_bytes * weights // 64 + bias_bytes * biases

    for product, ours in zip(products, replaced, strict=True):
        x = torch.randn(2, 5, product.weight.shape[isinstance(product, nn.Linear)])
        full = product(x)
        error = (full - ours(x)).square().sum() / full.square().sum()
        assert 1e-3 < error < 0.02
    output = contestant(input_ids=token_windows[:1], use_cache=True)
    again = contestant(input_ids=token_windows[:1, -1:], past_key_values=output.past_key_values, use_cache=True)
    assert again.logits.isfinite().all()


@torch.no_grad()
def test_nf4_odd_number_of_rows_is_padded(random_model: Callable[[str], Any]) -> None:
    skip_without("bitsandbytes")
    model = random_model("gpt2")
    odd = model.resize_token_embeddings(model.config.vocab_size + 5).num_embeddings
    ids, full = torch.tensor([[odd - 1, 3]]), model.get_output_embeddings()
    head = CONTESTANTS["bitsandbytes"](model).get_output_embeddings()
    x = model.transformer(ids).last_hidden_state
    assert head(x).shape == (1, 2, odd)
    assert (full(x) - head(x)).square().sum() < 0.02 * full(x).square().sum()


def has_bfloat16() -> bool:
    """Return whether bitsandbytes lays weights and scales out for the processor's bfloat16 instructions."""
    from bitsandbytes.functional import has_avx512bf16

    return bool(has_avx512bf16())


def test_replace_products_with_linear_raises(tiny: Any) -> None:
    with pytest.raises(AssertionError, match="not replaced"):
        replace_products(tiny, lambda weight, bias: nn.Linear(*weight.T.shape))


@pytest.mark.slow
@torch.no_grad()
def test_compiled_prompt_and_steps_take_three_graphs(tiny: Any, token_windows: Tensor) -> None:
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    counters.clear()
    contestant = CONTESTANTS["compile"](tiny)
    tokens = token_windows[:1, :16]
    output = contestant(input_ids=tokens, use_cache=True)
    assert torch.allclose(output.logits, tiny(input_ids=tokens).logits, atol=1e-4)
    for _ in range(8):
        token = output.logits[:, -1:].argmax(-1)
        output = contestant(input_ids=token, past_key_values=output.past_key_values, use_cache=True)
    assert counters["stats"]["unique_graphs"] == 3
    assert resident_bytes(contestant) == resident_bytes(tiny)
