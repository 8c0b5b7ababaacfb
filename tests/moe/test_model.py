"""The language model: its layers, its causality, saving, decoding and compiling."""

import copy
import pathlib
import subprocess
import sys
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from nashswarm.models.experts import Experts
from nashswarm.moe.model import FeedForward, Mixture, MoeForCausalLM, MoeSource
from nashswarm.moe.router.dense import Dense
from nashswarm.moe.router.expert_choice import ExpertChoice
from nashswarm.moe.router.loss_free import LossFree
from nashswarm.moe.router.nash_swarm import NashSwarmRouter
from nashswarm.moe.router.router import Router
from nashswarm.moe.router.top_k import TopK
from nashswarm.moe.routing import Routing
from tests.moe.cases import CAUSAL, EXPERTS, NAMES, ROUTERS, VOCABULARY, WIDTH, K, model_of, router_of


def by_hand(x: Tensor, routing: Routing, experts: Experts) -> Tensor:
    """One token and one of its experts at a time."""
    out = torch.zeros_like(x)
    owners = range(len(x)) if routing.tokens is None else routing.tokens.tolist()
    for token, row, gates in zip(owners, routing.experts.tolist(), routing.gates, strict=True):
        for expert, gate in zip(row, gates, strict=True):
            hidden = Experts.act_fn(experts.up_proj[expert] @ x[token])
            out[token] += gate * (experts.down_proj[expert] @ hidden)
    return out


@pytest.mark.parametrize("kind", [kind for kind in ROUTERS if kind != Dense()], ids=NAMES[1:])
def test_mixture_output_equals_gated_sum_by_hand(kind: Any, x: Tensor) -> None:
    config = MoeSource(width=WIDTH, layers=1, experts=EXPERTS, expert_width=32).build(kind, VOCABULARY, 0).config
    layer = Mixture(config, kind.build(WIDTH, EXPERTS, K))
    layer.router.load_state_dict(router_of(kind).state_dict())
    out, routing = layer(x[None])
    assert torch.allclose(out[0], by_hand(x, routing, layer.experts), atol=1e-5)
    few, few_routing = layer(x[None, :3])
    with torch.no_grad():  # few assignments take another way
        if kind != ExpertChoice():
            assert torch.allclose(layer(x[None, :3])[0], few, atol=1e-5)
    assert torch.allclose(few[0], by_hand(x[:3], few_routing, layer.experts), atol=1e-5)


@pytest.mark.parametrize("kind", CAUSAL, ids=NAMES[:7])
def test_model_later_token_changes_no_earlier_logits(kind: Any, tokens: Tensor) -> None:
    model = model_of(kind)
    changed = tokens.clone()
    changed[:, 12:] = (changed[:, 12:] + 1) % VOCABULARY
    for mode in (True, False):
        model.train(mode)
        with torch.no_grad():
            before, after = (model(input_ids=ids).logits for ids in (tokens, changed))
        assert torch.allclose(before[:, :12], after[:, :12], atol=1e-5)
        assert not torch.allclose(before[:, 12:], after[:, 12:], atol=1e-2)


def test_expert_choice_later_tokens_change_earlier_logits(tokens: Tensor) -> None:
    model = model_of(ExpertChoice())
    changed = tokens.clone()
    changed[:, 12:] = 5
    with torch.no_grad():
        before, after = (model(input_ids=ids).logits for ids in (tokens, changed))
    assert not torch.allclose(before[:, :12], after[:, :12], atol=1e-3)
    assert ExpertChoice.looks_ahead and not any(kind.looks_ahead for kind in CAUSAL)


def test_model_settle_moves_prices_and_forward_does_not(tokens: Tensor) -> None:
    model = model_of(NashSwarmRouter()).train()
    before = [router.price.clone() for router in model.routers()]
    routings = model(input_ids=tokens).routings
    assert all(torch.equal(router.price, price) for router, price in zip(model.routers(), before, strict=True))
    model.settle(routings)
    assert not any(torch.equal(router.price, price) for router, price in zip(model.routers(), before, strict=True))


@pytest.mark.parametrize("kind", [TopK(), LossFree(), NashSwarmRouter(flock=5), ExpertChoice()])
def test_model_permuted_experts_give_same_logits(kind: Any, tokens: Tensor) -> None:
    model = model_of(kind)
    renamed = copy.deepcopy(model)
    order = torch.tensor([3, 0, 7, 1, 5, 2, 6, 4])
    with torch.no_grad():
        for module in renamed.modules():
            if isinstance(module, Experts):
                module.up_proj.copy_(module.up_proj[order])
                module.down_proj.copy_(module.down_proj[order])
            elif isinstance(module, Router):
                module.weight.copy_(module.weight[order])
                module.price.copy_(module.price[order])
                module.entry.copy_(module.entry[order])
        output, permuted = model(input_ids=tokens), renamed(input_ids=tokens)
    assert torch.allclose(output.logits, permuted.logits, atol=1e-5)
    for one, two in zip(output.routings, permuted.routings, strict=True):
        assert torch.equal(one.loads()[order], two.loads())


@pytest.mark.parametrize("kind", CAUSAL[1:], ids=NAMES[1:7])
def test_mixture_equal_experts_equal_a_dense_layer(kind: Any, x: Tensor) -> None:
    config = MoeSource(width=WIDTH, layers=1, experts=EXPERTS, expert_width=32).build(kind, VOCABULARY, 0).config
    layer = Mixture(config, kind.build(WIDTH, EXPERTS, K))
    with torch.no_grad():
        for part in layer.experts.parameters():
            part.copy_(part[:1].expand_as(part))
    dense = Experts.act_fn(x @ layer.experts.up_proj[0].T) @ layer.experts.down_proj[0].T
    assert torch.allclose(layer(x[None])[0][0], dense, atol=1e-5)


def test_model_every_parameter_gets_a_gradient(tokens: Tensor) -> None:
    model = model_of(NashSwarmRouter()).train()
    model(input_ids=tokens, labels=tokens).loss.backward()
    assert all(part.grad is not None and part.grad.abs().sum() > 0 for part in model.parameters())


@pytest.mark.parametrize("kind", ROUTERS, ids=NAMES)
def test_saved_model_opens_with_same_settings_and_logits(kind: Any, tokens: Tensor, tmp_path: pathlib.Path) -> None:
    model = model_of(kind).train()
    model.settle(model(input_ids=tokens).routings)
    model.eval().save_pretrained(tmp_path)
    opened = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert isinstance(opened, MoeForCausalLM) and opened.config.settings() == kind
    for name, part in model.state_dict().items():
        assert torch.equal(part, opened.state_dict()[name]), name
    with torch.no_grad():
        assert torch.allclose(model(input_ids=tokens).logits, opened(input_ids=tokens).logits, atol=1e-6)


def test_model_decoding_with_cache_gives_same_logits(tokens: Tensor) -> None:
    model = model_of(NashSwarmRouter()).eval()
    with torch.no_grad():
        whole = model(input_ids=tokens).logits
        first = model(input_ids=tokens[:, :10], use_cache=True)
        rest = model(input_ids=tokens[:, 10:], past_key_values=first.past_key_values, use_cache=True)
    assert torch.allclose(torch.cat([first.logits, rest.logits], 1), whole, atol=1e-5)
    assert model.generate(tokens[:1, :5], max_new_tokens=4, do_sample=False, pad_token_id=0).shape == (1, 9)


def test_model_padded_text_is_refused(tokens: Tensor) -> None:
    model = model_of(NashSwarmRouter()).eval()
    seen = torch.ones_like(tokens)
    with torch.no_grad():
        assert torch.equal(model(input_ids=tokens, attention_mask=seen).logits, model(input_ids=tokens).logits)
        seen[0, 0] = 0
        with pytest.raises(ValueError, match="this model reads no padding: give it texts of one length"):
            model(input_ids=tokens, attention_mask=seen)


def test_dense_model_has_equal_active_size() -> None:
    dense, mixture = (MoeSource().build(kind, 512, 0) for kind in (Dense(), TopK()))
    centroids = sum(router.weight.numel() for router in mixture.routers())
    assert (
        mixture.active_parameters - centroids == dense.active_parameters == sum(p.numel() for p in dense.parameters())
    )
    assert isinstance(dense.blocks[0].mixture, FeedForward)


COMPILED = """
import torch
from nashswarm.moe.model import Mixture, MoeSource
from nashswarm.moe.router.loss_free import LossFree
from nashswarm.moe.router.nash_swarm import NashSwarmRouter
from nashswarm.moe.router.top_k import TopK

for kind in (TopK(), LossFree(), NashSwarmRouter(), NashSwarmRouter(prices="sign", search="leaders", flock=4)):
    layer = Mixture(MoeSource(width=64, layers=1, expert_width=64).build(kind, 64, 0).config, kind.build(64, 8, 2))
    torch.compiler.reset()  # every kind counts as one more version of the same code
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for x in (torch.randn(1, 48, 64), torch.randn(1, 1, 64)):
        torch.testing.assert_close(compiled(x)[0], layer(x)[0])
        with torch.no_grad():
            torch.testing.assert_close(compiled(x)[0], layer(x)[0])
"""


@pytest.mark.slow
def test_mixture_compiles_whole() -> None:
    """In another process: the functions of this one check their types, which compilers cannot trace."""
    subprocess.run([sys.executable, "-c", COMPILED], check=True, cwd=pathlib.Path(__file__).parents[2])
