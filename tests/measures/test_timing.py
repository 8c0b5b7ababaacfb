"""The timer of all measures."""

import pytest
import torch
from torch import Tensor

from nashswarm.measures import timing
from nashswarm.measures.measure import EvaluationTarget


def test_generation_with_cache_reads_greedy_tokens(target: EvaluationTarget, monkeypatch: pytest.MonkeyPatch) -> None:
    """The cached path reads the tokens that generating without a cache would."""
    read: list[Tensor] = []
    forward = target.compressed.forward
    monkeypatch.setattr(target.compressed, "forward", lambda **kw: (read.append(kw["input_ids"]), forward(**kw))[1])
    prompt = target.windows[:1, :8]
    prefill, decode = timing.generation(target.compressed, prompt, 5)
    assert prefill > 0 and decode > 0
    tokens = prompt
    with torch.no_grad():
        for _ in range(5):
            tokens = torch.cat([tokens, forward(input_ids=tokens).logits[:, -1:].argmax(-1)], 1)
    assert torch.equal(torch.cat(read, 1), tokens)
