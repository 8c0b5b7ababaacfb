"""Layers, moments and a context made by hand, without a model."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from nashswarm.calibration.context import CalibrationContext, Quantize
from nashswarm.layers import Layer, Moments, curvature

FIXED_BYTES = 100
SHAPES = {"wte": (500, 16), "h.0.up": (600, 16), "h.0.down": (330, 24)}  # columns take time, rows do not


def matrices(shapes: Mapping[str, tuple[int, int]] = SHAPES) -> tuple[Layer, ...]:
    layers = []
    for number, (name, shape) in enumerate(shapes.items()):
        generator = torch.Generator().manual_seed(number)
        modules, kinds = (("wte", "head"), ("Embedding", "Linear")) if name == "wte" else ((name,), ("Linear",))
        weight = 0.1 * (number + 1) * torch.randn(shape, generator=generator)
        layers.append(Layer(name, name.split(".")[-1], number / len(shapes), modules, kinds, weight))
    return tuple(layers)


def moments_of(layers: tuple[Layer, ...], correlated: bool = True) -> dict[str, Moments]:
    """Inputs that correlate and differ in size, outputs of very unequal sensitivity; one matrix is looked up too."""
    moments_by_module = {}
    for number, layer in enumerate(layers):
        generator = torch.Generator().manual_seed(100 + number)
        rows, columns = layer.weight.shape
        mixing = torch.randn(columns, columns, generator=generator) / columns**0.5 + torch.eye(columns)
        sizes = torch.randn(columns, generator=generator).exp()
        inputs = torch.randn(2, 4 * columns, columns, generator=generator) @ (
            mixing if correlated else torch.eye(columns)
        )
        seen, met = ((part * sizes).T @ (part * sizes) / len(part) for part in inputs)
        if not correlated:
            seen = met = torch.diag(sizes.square())
        outputs, coupled = 1e-4 * torch.randn(2, rows, generator=generator).exp()
        moments_by_module[layer.modules[-1]] = Moments(seen, outputs, coupled, met)
        if len(layer.modules) > 1:
            share = torch.rand(rows, generator=generator).softmax(0)
            sizes = 1e-3 * torch.rand(columns, generator=generator)
            moments_by_module[layer.modules[0]] = Moments(share, sizes, sizes, share)
    return moments_by_module


def context_of(
    layers: tuple[Layer, ...],
    moments: Mapping[str, Moments],
    truth: Callable[[Layer, Tensor], float] | None = None,
    store: dict[str, Any] | None = None,
) -> CalibrationContext:
    """The KL is the sum of ``truth`` over the layers: the damage that the moments predict, unless told otherwise."""
    store = {} if store is None else store

    def predicted(layer: Layer, error: Tensor) -> float:
        return float(curvature(layer, moments).damage_by_row(error).sum())

    def heldout_kl(weights: Mapping[str, Tensor], tokens: int | None) -> float:
        by_name = {layer.name: layer for layer in layers}
        return sum(
            (truth or predicted)(by_name[name], by_name[name].weight - weight) for name, weight in weights.items()
        )

    def cached(kind: str, key: Mapping[str, Any], compute: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
        name = f"{kind} {sorted(key.items())}"
        if name not in store:
            store[name] = compute()
        return {part: tensor.clone() for part, tensor in store[name].items()}

    parameters = sum(layer.parameters for layer in layers)

    def zipf_moments(share: int = 1) -> Mapping[str, Moments]:
        return moments

    def moments_after(quantize: Quantize, key: Mapping[str, Any]) -> Mapping[str, Moments]:
        quantize(moments)
        return moments  # which do not depend on the weights

    return CalibrationContext(
        layers,
        FIXED_BYTES,
        parameters,
        lambda: moments,
        heldout_kl,
        cached,
        zipf_moments=zipf_moments,
        moments_after=moments_after,
    )
