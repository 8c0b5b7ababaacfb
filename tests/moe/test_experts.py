"""Fused experts of this package's and other models, taken apart and compressed."""

import copy
import pathlib
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

import nashswarm
from nashswarm.models.split_experts import SplitExperts, unfuse
from nashswarm.moe.router.nash_swarm import NashSwarmRouter
from tests.moe.cases import VOCABULARY, WIDTH, K, model_of


def fused_models() -> dict[str, Any]:
    shared = {"vocab_size": VOCABULARY, "hidden_size": WIDTH, "intermediate_size": 64, "num_attention_heads": 4}
    shared |= {"max_position_embeddings": 32, "num_experts_per_tok": K}
    deep = {"q_lora_rank": 64, "kv_lora_rank": 64, "qk_rope_head_dim": 16, "qk_nope_head_dim": 16, "v_head_dim": 16}
    deep |= {"n_routed_experts": 4, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1, "num_hidden_layers": 2}
    return {
        "own": lambda: model_of(NashSwarmRouter(), layers=1, experts=4),
        "mixtral": lambda: transformers.MixtralForCausalLM(
            transformers.MixtralConfig(num_hidden_layers=1, num_key_value_heads=2, num_local_experts=4, **shared)
        ),
        "deepseek": lambda: transformers.DeepseekV3ForCausalLM(
            transformers.DeepseekV3Config(moe_intermediate_size=64, num_key_value_heads=4, **deep, **shared)
        ),
    }


@pytest.mark.parametrize("name", ["own", "mixtral", "deepseek"])
def test_fused_experts_compressed_model_opens_the_same(name: str, tokens: Tensor, tmp_path: pathlib.Path) -> None:
    torch.manual_seed(0)
    model = fused_models()[name]().eval()
    split = copy.deepcopy(model)
    assert len(unfuse(split)) == 1 and not unfuse(split)
    with torch.no_grad():
        assert torch.allclose(split(input_ids=tokens).logits, model(input_ids=tokens).logits, atol=1e-5)
    compressed, report = nashswarm.compress(model, method="gptq", calibration=tokens.repeat(4, 1), bits=4)
    assert sum(".expert_" in line for line in report.allocation.splitlines()) == 8
    assert any(isinstance(module, SplitExperts) for module in compressed.modules())
    compressed.save_pretrained(tmp_path)
    opened = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        assert torch.equal(opened(input_ids=tokens).logits, compressed(input_ids=tokens).logits)


def test_unfuse_unknown_layout_stays() -> None:
    layer = torch.nn.Module()
    layer.experts = torch.nn.Module()
    layer.experts.weights = torch.nn.Parameter(torch.zeros(2, 4, 4))
    assert unfuse(layer) == [] and layer.experts.weights.shape == (2, 4, 4)
