"""Blocks that compute their activations again: the same statistics to the last bit, and fewer tensors kept."""

import contextlib
import copy
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from transformers.modeling_layers import GradientCheckpointingLayer

from nashswarm.calibration import moments
from nashswarm.calibration.moments import calibrate
from nashswarm.calibration.recomputation import recomputed_blocks
from nashswarm.models.matrices import find_layers

SMALL: dict[str, Any] = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3}
HEADS: dict[str, Any] = {"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 32}
MODELS = {
    "llama": transformers.LlamaConfig(**SMALL, **HEADS),
    "gemma2": transformers.Gemma2Config(**SMALL, **HEADS, head_dim=8),
    "mixtral": transformers.MixtralConfig(**SMALL, **HEADS, num_local_experts=3),
    "opt": transformers.OPTConfig(
        vocab_size=64, hidden_size=16, ffn_dim=24, num_hidden_layers=3, num_attention_heads=2, word_embed_proj_dim=16
    ),  # its blocks drop activations as long as they themselves are in training
    "deberta-v2": transformers.DebertaV2Config(
        vocab_size=64,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=3,
        num_attention_heads=2,
        relative_attention=True,
        pos_att_type=["c2p", "p2c"],
        max_position_embeddings=32,
        share_att_key=False,
    ),  # matrices inside its blocks multiply positions, which no gradient reaches
}


@pytest.fixture(params=MODELS)
def model(request: pytest.FixtureRequest) -> Any:
    torch.manual_seed(0)
    auto = transformers.AutoModelForMaskedLM if "deberta" in request.param else transformers.AutoModelForCausalLM
    return auto.from_config(copy.deepcopy(MODELS[request.param])).eval()


@pytest.fixture
def windows() -> Tensor:
    return torch.randint(0, 64, (3, 12), generator=torch.Generator().manual_seed(1))


def test_statistics_are_those_of_blocks_that_keep_their_activations(
    model: Any, windows: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = [name for layer in find_layers(model) for name in layer.modules if "rel_embeddings" not in name]

    def statistics() -> dict[str, Tensor]:
        return calibrate(model, names, windows, torch.Generator().manual_seed(5)).tensors()

    recomputed = statistics()
    monkeypatch.setattr(moments, "recomputed_blocks", lambda model: contextlib.nullcontext(lambda: False))
    kept = statistics()
    assert recomputed.keys() == kept.keys()
    assert all(torch.equal(recomputed[name], kept[name]) for name in kept)


def test_blocks_keep_little_more_than_their_inputs_and_are_restored(model: Any, windows: Tensor) -> None:
    def kept_bytes() -> int:
        sizes: dict[int, int] = {}

        def pack(tensor: Tensor) -> Tensor:
            sizes[tensor.data_ptr()] = tensor.nbytes
            return tensor

        embedded = model.get_input_embeddings().register_forward_hook(lambda *call: call[-1].detach().requires_grad_())
        try:
            with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
                model(input_ids=windows)
        finally:
            embedded.remove()
        return sum(sizes.values())

    model.requires_grad_(False)
    before = kept_bytes()
    with recomputed_blocks(model):
        assert kept_bytes() < 0.5 * before
    blocks = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    assert len(blocks) >= 3 and not any("forward" in vars(block) for block in blocks)
    assert kept_bytes() == before


def test_a_forward_of_a_block_that_someone_else_replaced_is_restored(model: Any) -> None:
    block = next(module for module in model.modules() if isinstance(module, GradientCheckpointingLayer))
    block.forward = own = block.forward
    with recomputed_blocks(model):
        assert block.forward is not own
    assert block.forward is own
