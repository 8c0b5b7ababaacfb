"""Experts in parts and shared experts: sizes, and outputs against a loop over tokens and parts; dense baselines."""

from typing import Any

import pytest
import torch
from torch import Tensor

from nashswarm.models.experts import Experts
from nashswarm.moe.fine_grained import FineMoeSource
from nashswarm.moe.model import FeedForward, Mixture, MoeForCausalLM, MoeSource
from nashswarm.moe.router.dense import Dense, DenseTotal
from nashswarm.moe.router.nash_swarm import NashSwarmRouter
from nashswarm.moe.router.top_k import TopK
from tests.moe.cases import VOCABULARY, WIDTH

SHAPE: dict[str, int] = {"width": WIDTH, "layers": 2, "heads": 2, "experts": 8, "expert_width": 32, "context": 32}


def built(source: MoeSource, kind: Any) -> MoeForCausalLM:
    torch.manual_seed(0)
    return source.build(kind, VOCABULARY, 0).eval()


def sizes(model: MoeForCausalLM) -> tuple[int, int]:
    """Weights beside centroids: of the model, and of those that take part in one token."""
    centroids = sum(router.weight.numel() for router in model.routers())
    return sum(part.numel() for part in model.parameters()) - centroids, model.active_parameters - centroids


@pytest.mark.parametrize(("parts", "shared"), [(1, 0), (1, 1), (2, 1), (4, 3)])
def test_parts_and_shared_experts_change_no_size(parts: int, shared: int) -> None:
    plain = built(MoeSource(**SHAPE), TopK())
    source = FineMoeSource(**SHAPE, parts=parts, shared=shared)
    model = built(source, TopK())
    assert sizes(model) == sizes(plain)
    assert len(model.routers()[0].weight) == parts * 8 - shared
    assert source.label == f"moe_8x32_top2_parts{parts}_shared{shared}"


def test_a_layer_is_the_gated_sum_of_chosen_parts_and_the_sum_of_shared_ones(x: Tensor) -> None:
    model = built(FineMoeSource(**SHAPE, parts=4, shared=2), NashSwarmRouter())
    layer = model.blocks[0].mixture
    assert isinstance(layer, Mixture) and layer.shared is not None
    torch.nn.init.normal_(layer.router.weight, std=0.3)
    with torch.no_grad():
        out, routing = layer(x[None])
        assert routing is not None and routing.experts.shape[1] == 4 * 2 - 2
        width = 32 // 4
        for token in range(len(x)):
            total = torch.zeros(WIDTH)
            for expert, gate in zip(routing.experts[token], routing.gates[token], strict=True):
                hidden = Experts.act_fn(layer.experts.up_proj[expert] @ x[token])
                total += gate * (layer.experts.down_proj[expert] @ hidden)
            for part in range(2):
                rows = slice(part * width, (part + 1) * width)
                total += layer.shared.down.weight[:, rows] @ Experts.act_fn(layer.shared.up.weight[rows] @ x[token])
            torch.testing.assert_close(out[0, token], total, rtol=1e-4, atol=1e-6)


def test_dense_baselines_are_as_wide_as_what_is_active_and_as_everything() -> None:
    for source in (MoeSource(**SHAPE), FineMoeSource(**SHAPE, parts=2, shared=1)):
        mixture, active, total = (built(source, kind) for kind in (TopK(), Dense(), DenseTotal()))
        assert sizes(active)[0] == sizes(mixture)[1]
        assert sizes(total)[0] == sizes(mixture)[0] == total.active_parameters
        assert all(isinstance(block.mixture, FeedForward) for block in total.blocks)


def test_saved_model_of_parts_opens_as_it_was(tmp_path: Any, tokens: Tensor) -> None:
    model = built(FineMoeSource(**SHAPE, parts=2, shared=1), NashSwarmRouter())
    model.save_pretrained(tmp_path)
    again = MoeForCausalLM.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        assert torch.equal(again(input_ids=tokens).logits, model(input_ids=tokens).logits)


@pytest.mark.parametrize(
    ("changed", "message"),
    [({"parts": 3}, "model.parts=3"), ({"parts": 0}, "model.parts=0"), ({"shared": 4}, "model.shared=4")],
)
def test_parts_that_do_not_fit_are_refused(changed: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FineMoeSource(**SHAPE | changed)
