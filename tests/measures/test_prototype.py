"""What is wrong with the published protocol, each flaw shown once."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from nashswarm.measures import prototype
from nashswarm.measures.measure import EvaluationTarget, Measure
from nashswarm.measures.prototype import Published, padded, padded_loss, quantized, random_replies
from nashswarm.models import evaluation
from nashswarm.progress import no_track

SMALL = Published(paragraphs=4, tokens=64, draws=2, samples=2, experts=4, routed_tokens=8)


@pytest.fixture
def text(text_file: Any) -> str:
    return text_file.read_text()


def test_untrained_model_has_the_published_loss() -> None:
    """Equal logits for every token: ln V, however the model is called; fresh weights add a little luck."""
    losses = [prototype.untrained_loss(seed, 8, 16) for seed in range(3)]
    assert losses == pytest.approx([math.log(1000)] * 3, abs=0.15)
    assert max(losses) != min(losses)


def test_padded_loss_scores_the_padding(model: Any, tokenizer: Any) -> None:
    """A model that says nothing but the end token has a low loss wherever there is little text."""
    ids, mask = padded("one player .\n\n" * 6, tokenizer, 6, 48, 1)[0]
    assert (ids[mask == 0] == tokenizer.eos_token_id).all() and mask.float().mean() < 0.3
    model.transformer.ln_f.weight.data.zero_()
    model.transformer.ln_f.bias.data.zero_()
    assert padded_loss(model, ids, mask) == pytest.approx(math.log(512), rel=1e-5)  # it knows nothing: ln V
    model.transformer.ln_f.bias.data.copy_(20 * model.lm_head.weight[tokenizer.eos_token_id].detach())
    by_hand = -model(input_ids=ids).logits.log_softmax(-1)[:, :-1].gather(2, ids[:, 1:, None]).squeeze(2)
    assert padded_loss(model, ids, mask) == pytest.approx(by_hand.mean().item(), rel=1e-4)
    assert by_hand.mean().item() < 0.7 * math.log(512) < by_hand[mask[:, 1:] == 1].mean().item()


def test_padded_takes_the_first_paragraphs_that_are_not_empty(tokenizer: Any) -> None:
    sets = padded("one\n \n\ntwo old\n\nplayer", tokenizer, 1, 4, 3)
    assert [int(mask.sum()) for _, mask in sets] == [
        len(tokenizer(part)["input_ids"]) for part in ("one\n ", "two old", "player")
    ]
    with pytest.raises(ValueError, match="the test text has 3 paragraphs, fewer than 2 sets of 2"):
        padded("one\n\ntwo\n\nthree", tokenizer, 2, 4, 2)


def test_quantized_rounds_linear_layers_alone_and_keeps_floats(model: Any, random_model: Any) -> None:
    changed = quantized(model, prototype.one_grid)
    differing = {name for name, own in model.state_dict().items() if not torch.equal(own, changed.state_dict()[name])}
    assert differing == {"lm_head.weight", "transformer.wte.weight"}  # tied; the Conv1D blocks are as they were
    assert all(parameter.dtype == torch.float32 for parameter in changed.parameters())
    llama = quantized(random_model("llama"), prototype.one_grid)
    linear = [name for name, module in llama.named_modules() if isinstance(module, nn.Linear)]
    assert len(linear) == 2 * 7 + 1


@pytest.mark.parametrize("bits", prototype.WIDTHS)
def test_round_to_grid_rows_lie_on_their_grids(bits: int) -> None:
    rows = torch.randn(5, 40, generator=torch.Generator().manual_seed(0))
    rounded = prototype.round_to_grid(rows, bits)
    low, high = rows.min(1, keepdim=True).values, rows.max(1, keepdim=True).values
    assert ((rounded - rows).abs() <= 0.501 * (high - low) / (2**bits - 1)).all()
    assert all(len(row.unique()) <= 2**bits for row in rounded)
    assert torch.equal(prototype.round_to_grid(torch.ones(2, 3), bits), torch.ones(2, 3))


@pytest.mark.parametrize("scale", [0.0, 1.0, -1e6])
def test_random_replies_any_payoffs_converge_in_66_iterations(scale: float) -> None:
    payoffs = scale * np.arange(400.0).reshape(100, 4)
    profile, iterations = random_replies(payoffs, np.random.default_rng(3))
    assert iterations == 66
    assert np.array_equal(profile, random_replies(0 * payoffs, np.random.default_rng(3))[0])
    assert len(set(profile.tolist())) == 4  # the same action is best for everybody, and they disagree


def test_random_replies_end_where_most_players_regret(tiny: Any) -> None:
    metrics = prototype.replies(tiny.lm_head.weight.detach())
    assert 0.1 < metrics["best_reply_share"] < 0.45
    assert metrics["reply_regret"] > 0.5
    assert metrics["solved_regret"] == 0 and metrics["solved_sweeps"] == 1


def test_width_costs_equal_those_by_hand() -> None:
    """An error and a price for every bit: the price is the same for all, and leaves the choice open."""
    weight = torch.randn(6, 32, generator=torch.Generator().manual_seed(1))
    costs = prototype.width_costs(weight)
    prices = [
        (costs[row, place] - float((weight[row] - prototype.round_to_grid(weight[row : row + 1], bits)).square().sum()))
        / bits
        for row in range(6)
        for place, bits in enumerate(prototype.WIDTHS)
    ]
    assert prices == pytest.approx([prices[0]] * len(prices), rel=1e-4)
    assert len(set(costs.argmin(1).tolist())) > 1


def test_route_loop_and_vectorised_agree() -> None:
    generator = torch.Generator().manual_seed(2)
    tokens, centroids = torch.randn(30, 16, generator=generator), torch.randn(5, 16, generator=generator)
    assert torch.equal(prototype.route(tokens, centroids), prototype.route_by_loops(tokens, centroids))


def test_published_measure_reports_both_protocols(tiny: Any, tokenizer: Any, text: str, token_windows: Tensor) -> None:
    assert isinstance(SMALL, Measure)
    reference = evaluation.compute_reference(tiny, token_windows, 8)
    target = EvaluationTarget(
        tiny, None, lambda: None, token_windows, lambda size: reference, no_track, tokenizer=tokenizer, text=text
    )
    metrics, series = SMALL.measure(target)
    assert all(math.isfinite(value) for value in metrics.values())
    assert metrics["loss_adaptive"] / metrics["loss_full"] - 1 == pytest.approx(series["loss_change_adaptive"][0])
    assert len(series["loss_change_uniform4"]) == len(series["latency_ms_full"]) == 2
    assert metrics["kl_adaptive_low"] <= metrics["kl_adaptive"] <= metrics["kl_adaptive_high"]
    assert 0 < metrics["padding_share"] < 1
    assert metrics["router_microseconds_loops"] > metrics["router_microseconds_top_k"]
