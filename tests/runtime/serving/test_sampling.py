"""Tokens are drawn as often as they are probable."""

import math

import pytest
import torch

from nashswarm.runtime.serving import sampling

LOGITS = torch.tensor([2.0, -1.0, 0.5, 1.5, -3.0])


def drawn(temperature: float, top_p: float, count: int = 4000) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    tokens = [sampling.sample(LOGITS, temperature, top_p, generator) for _ in range(count)]
    return torch.bincount(torch.tensor(tokens), minlength=5) / count


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_sample_draws_by_softmax(temperature: float) -> None:
    torch.testing.assert_close(drawn(temperature, 1.0), (LOGITS / temperature).softmax(0), rtol=0, atol=0.03)


@pytest.mark.parametrize("few", [1, 2, 256])
def test_sample_top_p_keeps_fewest_that_reach_it(few: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sampling, "FEW", few)
    probabilities = LOGITS.softmax(0)
    assert probabilities[0] < 0.7 < probabilities[0] + probabilities[3]
    kept = torch.tensor([True, False, False, True, False])
    expected = torch.where(kept, probabilities, 0) / probabilities[kept].sum()
    torch.testing.assert_close(drawn(1.0, 0.7), expected, rtol=0, atol=0.03)
    assert drawn(1.0, 0.4, 50)[0] == 1


@pytest.mark.parametrize(("temperature", "top_p"), [(0.0, 1.0), (1e-40, 1.0), (1e-6, 0.5), (2.0, 0.0)])
def test_sample_cold_takes_most_probable(temperature: float, top_p: float) -> None:
    assert drawn(temperature, top_p, 20)[0] == 1


def test_score_is_log_of_softmax() -> None:
    scored = sampling.score(LOGITS, 2, 2)
    assert math.exp(scored.logprob or 0) == pytest.approx(float(LOGITS.softmax(0)[2]))
    assert [token for token, _ in scored.alternatives] == [0, 3]
    assert scored.alternatives[0][1] == pytest.approx(float(LOGITS.log_softmax(0)[0]))
    assert len(sampling.score(LOGITS, 2, 9).alternatives) == 5
