"""The NLL in blocks of positions, against all of its logits at a time."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from nashswarm.calibration import nll
from nashswarm.calibration.moments import calibrate
from nashswarm.calibration.nll import sample_tokens, summed_nll


def nll_of_all_logits(model: Any, window: Tensor, generator: torch.Generator) -> Tensor:
    """The NLL of sampled labels, from the model's own logits."""
    logits = model(input_ids=window[None]).logits[0, :-1]
    return functional.cross_entropy(logits, sample_tokens(logits.detach(), generator), reduction="sum")


@pytest.mark.parametrize("size", [1, 7, 1000])
@pytest.mark.parametrize("kind", ["gpt2", "opt", "llama", "gpt_neox"])
def test_summed_nll_in_blocks_gives_moments_of_all_logits(
    kind: str, size: int, random_model: Callable[[str], Any], token_windows: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = random_model(kind)
    head = model.get_output_embeddings()
    monkeypatch.setattr(nll, "LOGITS_AT_ONCE", size * len(head.weight))
    names = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)][:4]
    names += [name for name, module in model.named_modules() if module is head]
    in_blocks, expected = (
        calibrate(model, list(dict.fromkeys(names)), token_windows, torch.Generator().manual_seed(0), score=score)
        for score in (None, nll_of_all_logits)
    )
    assert model.get_output_embeddings() is head
    for name in in_blocks:
        for field in ("inputs", "outputs", "coupled", "coupled_inputs"):
            computed, exact = getattr(in_blocks[name], field), getattr(expected[name], field)
            torch.testing.assert_close(computed, exact, rtol=1e-4, atol=1e-5 * float(exact.abs().max()))


def test_summed_nll_is_that_of_labels_in_text(model: Any, token_windows: Tensor) -> None:
    window = token_windows[0]
    logits = model(input_ids=window[None]).logits[0, :-1]
    expected = functional.cross_entropy(logits, window[1:], reduction="sum")
    torch.testing.assert_close(summed_nll(model, window, torch.Generator(), "text"), expected)


def test_summed_nll_of_scaled_logits_runs_the_whole_model(model: Any, token_windows: Tensor) -> None:
    """A model that scales its logits, as some do: they are not the output of its head."""
    window, head = token_windows[0], model.get_output_embeddings()
    handle = model.register_forward_hook(lambda module, arguments, output: scaled(output))
    try:
        logits = model(input_ids=window[None]).logits[0, :-1]
        computed = summed_nll(model, window, torch.Generator(), "text")
    finally:
        handle.remove()
    torch.testing.assert_close(computed, functional.cross_entropy(logits, window[1:], reduction="sum"))
    assert model.get_output_embeddings() is head


def scaled(output: Any) -> Any:
    output.logits = output.logits / 3
    return output


def test_sample_tokens_of_large_vocabulary_inverts_cumulative_distribution() -> None:
    logits = torch.randn(40, 3 * nll.TOKENS_AT_ONCE + 11, generator=torch.Generator().manual_seed(0)) * 3
    tokens = sample_tokens(logits, torch.Generator().manual_seed(1))
    uniform = torch.rand(40, 1, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    for row, number, token in zip(logits.double().softmax(-1), uniform, tokens, strict=True):
        assert row[:token].sum() <= number < row[: token + 1].sum()
