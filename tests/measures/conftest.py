"""The tiny model, packed, as the tests of measures evaluate it."""

import copy
import functools
from typing import Any

import pytest
from torch import Tensor

from nashswarm.measures.measure import EvaluationTarget
from nashswarm.models import evaluation
from nashswarm.models.matrices import find_layers
from nashswarm.packed import checkpoint
from nashswarm.progress import no_track
from nashswarm.quant.grid import Scheme, quantize
from nashswarm.quant.pack import pack


@pytest.fixture(scope="session")
def packed_model(tiny: Any) -> Any:
    """The tiny model at 4 bits, in groups; not to be changed."""
    model = copy.deepcopy(tiny)
    layers = find_layers(model)
    checkpoint.adopt(model, layers, {layer.name: pack(quantize(layer.weight, 4, Scheme(64))) for layer in layers})
    return model


@pytest.fixture
def target(tiny: Any, packed_model: Any, token_windows: Tensor, tokenizer: Any) -> EvaluationTarget:
    """The tiny model, its packed copy, that copy's weights as floats, and damages as if a method had predicted them."""
    packed, floats = copy.deepcopy(packed_model), copy.deepcopy(packed_model)
    floats.dequantize()
    reference = functools.partial(evaluation.compute_reference, tiny, token_windows)
    layers, weights = find_layers(tiny), {layer.name: layer.weight for layer in find_layers(floats)}
    damage = {layer.name: float(number % 3) for number, layer in enumerate(layers)}
    return EvaluationTarget(
        tiny, floats, lambda: packed, token_windows, lambda size: reference(size), no_track, tokenizer,
        layers, weights, damage,
    )  # fmt: skip
