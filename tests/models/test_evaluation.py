"""Quality of a model on windows, against a reference loop of ten lines."""

import math
import types
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from nashswarm.models import evaluation
from tests.models.tiny_configs import tiny_model


def slow(model: Any, windows: Tensor) -> list[float]:
    """The library's own loss, window by window."""
    with torch.no_grad():
        return [model(input_ids=window[None], labels=window[None]).loss.item() for window in windows]


@pytest.fixture
def moved(model: Any) -> Any:
    """The tiny model, slightly perturbed."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator))
    return model


def test_evaluate_nll_equals_transformers_loss(tiny: Any, token_windows: Tensor) -> None:
    values = evaluation.evaluate(tiny, token_windows, 2)
    assert set(values) == {"nll", "tokens"}
    assert values["nll"] == pytest.approx(slow(tiny, token_windows), abs=1e-6)
    assert values["tokens"] == [23] * 5
    assert evaluation.summarise(values) == {"nll": pytest.approx(np.mean(slow(tiny, token_windows))), "tokens": 115}


def test_evaluate_uniform_logits_perplexity_is_vocabulary(model: Any, token_windows: Tensor) -> None:
    with torch.no_grad():
        model.lm_head.weight.zero_()
    values = evaluation.evaluate(model, token_windows, 8, evaluation.compute_reference(model, token_windows, 8))
    assert math.exp(evaluation.summarise(values)["nll"]) == pytest.approx(512)


@pytest.mark.parametrize("batch_size", [1, 3, 5, 64])
def test_evaluate_any_batch_size_same_values(tiny: Any, moved: Any, token_windows: Tensor, batch_size: int) -> None:
    expected = evaluation.evaluate(moved, token_windows, 2, evaluation.compute_reference(tiny, token_windows, 2))
    full = evaluation.compute_reference(tiny, token_windows, batch_size)
    values = evaluation.evaluate(moved, token_windows, batch_size, full)
    for name in expected:
        assert values[name] == pytest.approx(expected[name], abs=1e-6), name


def test_evaluate_against_itself_kl_is_zero(tiny: Any, token_windows: Tensor) -> None:
    values = evaluation.evaluate(tiny, token_windows, 2, evaluation.compute_reference(tiny, token_windows, 2))
    assert values["kl"] == pytest.approx([0] * 5, abs=1e-9) and values["top1_agreement"] == [1] * 5
    assert values["nll_full"] == pytest.approx(values["nll"], abs=1e-6)
    assert evaluation.summarise(values)["nll_delta"] == pytest.approx(0, abs=1e-6)


def test_evaluate_kl_and_agreement_match_formula(tiny: Any, moved: Any, token_windows: Tensor) -> None:
    values = evaluation.evaluate(moved, token_windows, 2, evaluation.compute_reference(tiny, token_windows, 2))
    for number, window in enumerate(token_windows):
        with torch.no_grad():
            p, q = (np.exp(model(input_ids=window[None]).logits[0, :-1].double().numpy()) for model in (tiny, moved))
        p, q = p / p.sum(1, keepdims=True), q / q.sum(1, keepdims=True)
        assert values["kl"][number] == pytest.approx((p * np.log(p / q)).sum(1).mean(), abs=1e-6)
        assert values["top1_agreement"][number] == pytest.approx((p.argmax(1) == q.argmax(1)).mean())
    assert values["nll"] == pytest.approx(slow(moved, token_windows), abs=1e-6)
    assert values["nll_full"] == pytest.approx(slow(tiny, token_windows), abs=1e-6)
    assert min(values["kl"]) > 1e-4


def test_compute_reference_reproduces_logits(tiny: Any, token_windows: Tensor) -> None:
    full = evaluation.compute_reference(tiny, token_windows, 2)
    with torch.no_grad():
        for number, window in enumerate(token_windows):
            torch.testing.assert_close(full.logits(number, slice(None)), tiny(input_ids=window[None]).logits[0])
    assert not tiny.lm_head._forward_pre_hooks


class TwoHeads(nn.Module):
    """Its logits are the sum of two heads, so they do not follow from what the first one reads."""

    device = torch.device("cpu")

    def __init__(self) -> None:
        super().__init__()
        self.table, self.head, self.other = nn.Embedding(512, 8), nn.Linear(8, 512), nn.Linear(8, 512)

    def get_output_embeddings(self) -> nn.Module:
        return self.head

    def forward(self, input_ids: Tensor, **options: Any) -> types.SimpleNamespace:
        states = self.table(input_ids)
        return types.SimpleNamespace(logits=self.head(states) + self.other(states))


MODELS = {  # whose logits are not the output of their heads
    "soft cap": lambda: tiny_model("gemma2", final_logit_softcapping=0.5),
    "scale": lambda: tiny_model("cohere", logit_scale=0.3),
    "divisor": lambda: tiny_model("granite", logits_scaling=3.0),
    "another head": TwoHeads,
}


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_reference_of_other_heads_gives_the_models_logits(name: str, token_windows: Tensor) -> None:
    torch.manual_seed(0)
    model = MODELS[name]()
    full = evaluation.compute_reference(model, token_windows, 2)
    logits = model(input_ids=token_windows).logits
    for window in range(len(token_windows)):
        for positions in (slice(0, 24), slice(5, 9)):
            assert torch.allclose(full.logits(window, positions), logits[window, positions], atol=1e-5)
    assert torch.allclose(full.with_cached_logits(3).logits(1, slice(4)), logits[1, :4], atol=1e-5)
    assert max(evaluation.evaluate(model, token_windows, 4, full)["kl"]) < 1e-6


def test_summarise_weighs_windows_by_tokens() -> None:
    windows = {"nll": [2.0, 5.0], "nll_full": [1.0, 2.0], "kl": [0.0, 3.0], "tokens": [10, 20]}
    assert evaluation.summarise(windows) == pytest.approx({"nll": 4.0, "kl": 2.0, "nll_delta": 4 - 5 / 3, "tokens": 30})


def test_evaluate_reports_progress_per_batch(tiny: Any, token_windows: Tensor) -> None:
    steps: list[tuple[str, int]] = []

    def track(items: Any, description: str) -> Any:
        steps.append((description, len(items)))
        return items

    full = evaluation.compute_reference(tiny, token_windows, 2, track)
    evaluation.evaluate(tiny, token_windows, 2, full, track)
    assert steps == [("full model", 3), ("evaluating", 3)]
