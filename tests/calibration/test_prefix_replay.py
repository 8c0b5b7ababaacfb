"""Replayed passes give the same bits as full passes, and compute only the blocks that may have changed."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from nashswarm.calibration.cache import Cache
from nashswarm.calibration.prefix_replay import PrefixReplay
from nashswarm.calibration.session import CalibrationSession
from nashswarm.models import evaluation, matrices


@pytest.mark.parametrize("kind", ["gpt2", "opt", "llama", "bert", "bert_encoder", "neox"])
def test_heldout_kl_of_subset_equals_full_passes(kind: str, random_model: Callable[[str], Any]) -> None:
    model = random_model(kind)
    layers = matrices.find_layers(model)
    windows = torch.randint(0, model.config.vocab_size, (3, 16), generator=torch.Generator().manual_seed(0))
    session = CalibrationSession(model, layers, windows, windows, 0, Cache(None, {}))
    for layer in layers:
        weights = {layer.name: layer.weight * 0.9}
        changed = copy.deepcopy(model)
        matrices.set_weights(changed, weights)
        if session.causal:
            metrics = evaluation.evaluate(
                changed, windows, evaluation.BATCH, evaluation.compute_reference(model, windows, evaluation.BATCH)
            )
            by_hand = evaluation.summarise(metrics)["kl"]
        else:
            by_hand = evaluation.embedding_distance(
                *(evaluation.embed_all(each, windows, evaluation.BATCH) for each in (model, changed))
            )
        assert session.heldout_kl(weights, windows.numel()) == by_hand == session.heldout_kl(weights, None)
        assert by_hand > 0 or "pooler" in layer.name


class Stack(nn.Module):
    """A model of four blocks, the first called ``repeats`` times in each pass, behind one matrix."""

    def __init__(self, repeats: int = 1) -> None:
        super().__init__()
        self.start = nn.Linear(4, 4)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(4, 4), nn.Tanh()) for _ in range(4))
        self.repeats = repeats

    def forward(self, x: Tensor) -> Tensor:
        x = self.start(x)
        for _ in range(self.repeats):
            x = self.blocks[0](x)
        for block in list(self.blocks)[1:]:
            x = block(x)
        return x


@pytest.mark.parametrize(
    ("names", "repeats", "computed"),
    [
        (["blocks.3.0"], 1, 1),
        (["blocks.2.0", "blocks.3.0"], 1, 2),
        (["blocks.0.0"], 1, 4),
        (["blocks.3.0", "start"], 1, 4),
        (["blocks.3.0"], 2, 5),
    ],
)
def test_skip_prefix_computes_only_changed_blocks(names: list[str], repeats: int, computed: int) -> None:
    model, texts = Stack(repeats), [torch.ones(2, 4), torch.zeros(2, 4)]
    computed_blocks: list[nn.Module] = []
    for block in model.blocks:
        block[0].register_forward_hook(lambda module, *call: computed_blocks.append(module))
    replay = PrefixReplay(model, lambda: [model(text) for text in texts])
    computed_blocks.clear()
    with torch.no_grad():
        for name in names:
            model.get_submodule(name).weight.mul_(0.5)
    with replay.skip_prefix(names):
        outputs = [model(text) for text in texts]
    assert len(computed_blocks) == computed * len(texts)
    for text, output in zip(texts, outputs, strict=True):
        assert torch.equal(output, model(text))


def test_skip_prefix_replays_copies() -> None:
    model, text = Stack(), torch.ones(2, 4)
    replay = PrefixReplay(model, lambda: model(text))
    for _ in range(2):
        with replay.skip_prefix(["blocks.1.0"]):
            output = model.blocks[0](text)
        assert torch.equal(output, model.blocks[0](model.start(text)))
        output.data.zero_()
