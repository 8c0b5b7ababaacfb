"""The method ``gptq`` against GPTQModel, on the same layers, the same calibration and the same grids.

GPTQModel pins newer packages than it needs here.  In an environment of its own, ``pip install --no-deps gptqmodel
tokenicer logbar device-smi defuser pypcre`` after nashswarm lets it run on a CPU.
"""

from pydoc_data import topics
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from nashswarm.calibration.context import CalibrationContext
from nashswarm.layers import Layer, Moments
from nashswarm.methods.gptq import Gptq
from nashswarm.models import matrices, sources

LAYERS = ("h.0.attn.c_attn", "h.1.mlp.c_fc", "h.2.attn.c_proj", "h.3.mlp.c_proj")
GROUP, DAMPING, WINDOWS, LENGTH = 64, 0.01, 16, 256
NATURAL = {"sym": False, "act_group_aware": False, "mse": 2.0}  # the range of least squares, as nashswarm searches it
ORDERED = NATURAL | {"desc_act": True, "static_groups": True}


@pytest.fixture(scope="module")
def gptqmodel_pass() -> Any:
    """GPTQModel on one layer: (layer, inputs, bits, settings) → decoded weights."""
    gptq = pytest.importorskip("gptqmodel.quantization.gptq", reason="GPTQModel is not installed")
    from gptqmodel.quantization.config import QuantizeConfig

    def run(layer: Layer, inputs: Tensor, bits: int, settings: dict[str, Any]) -> Tensor:
        module = nn.Linear(*reversed(layer.weight.shape), bias=False)
        module.weight = nn.Parameter(layer.weight.clone(), requires_grad=False)
        quantizer = gptq.GPTQ(module, QuantizeConfig(bits=bits, group_size=GROUP, damp_percent=DAMPING, **settings))
        quantizer.quantizer.configure(perchannel=True)
        quantizer.add_batch(inputs[None], None)
        return quantizer.quantize()[0].float()

    return run


@pytest.fixture(scope="module")
def calibrated(gptqmodel_pass: Any) -> list[tuple[Layer, Tensor]]:
    """Layers of the embedded model, and their inputs on a text."""
    loaded = sources.load(sources.ModelSource(), "cpu", torch.float32)
    text = "\n".join(topics.topics.values())
    tokens = torch.tensor(loaded.tokenizer(text)["input_ids"][: WINDOWS * LENGTH]).view(WINDOWS, LENGTH)
    layers = [layer for layer in matrices.find_layers(loaded.model) if layer.name.endswith(LAYERS)]
    inputs: dict[str, Tensor] = {}
    for layer in layers:
        loaded.model.get_submodule(layer.name).register_forward_pre_hook(
            lambda _, arguments, name=layer.name: inputs.update({name: arguments[0].flatten(0, -2)})
        )
    with torch.no_grad():
        loaded.model(input_ids=tokens)
    return [(layer, inputs[layer.name]) for layer in layers]


def nashswarm_pass(layer: Layer, inputs: Tensor, bits: int, act_order: bool) -> Tensor:
    """Return the weights of ``method=gptq`` when all rows have the same weight and only H is known."""
    h, ones = inputs.T @ inputs / len(inputs), torch.ones(len(layer.weight))
    moments = {layer.name: Moments(h, ones, ones, h)}

    def never(*_: Any) -> Any:
        raise AssertionError("gptq asked for more than moments")

    context = CalibrationContext((layer,), 0, 1, lambda: moments, never, never)
    method = Gptq(bits, GROUP, damping=DAMPING, act_order=act_order)
    return method.compress(context, np.random.default_rng(0)).weights[layer.name]


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize(
    "settings, act_order, tolerance",
    [
        pytest.param({}, False, 1.0, id="as it comes"),
        pytest.param(NATURAL, False, 1.02, id="natural order"),
        pytest.param(ORDERED, True, 1.08, id="act-order"),
    ],
)
def test_gptq_output_error_is_no_larger_than_gptqmodels(
    settings: dict[str, Any], act_order: bool, tolerance: float, bits: int, gptqmodel_pass: Any, calibrated: Any
) -> None:
    """‖(W − Ŵ) X‖² of every layer is at most ``tolerance`` times that of GPTQModel."""
    assert len(calibrated) == len(LAYERS)
    for layer, inputs in calibrated:
        decoded = nashswarm_pass(layer, inputs, bits, act_order), gptqmodel_pass(layer, inputs, bits, settings)
        error, reference = (float(((layer.weight - weight) @ inputs.T).double().square().sum()) for weight in decoded)
        assert 0 < error <= tolerance * reference, f"{layer.name}: {error / reference:.3f} times GPTQModel's"
