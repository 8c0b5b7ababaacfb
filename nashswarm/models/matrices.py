"""The weight matrices of a model: find them, put others in their place, and list what is stored beside them."""

import fnmatch
import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from nashswarm.layers import Layer
from nashswarm.models.experts import ExpertLinear

MATRICES = (nn.Linear, Conv1D, nn.Embedding)


def find_layers(model: Any, exclude: Sequence[str] = ()) -> tuple[Layer, ...]:
    """Every Linear, Conv1D and Embedding matrix, a tied one once, in the order of the model.

    Raises ValueError for a pattern of ``exclude`` that matches nothing and for a model without matrices.
    """
    sharing: dict[int, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, MATRICES):
            sharing.setdefault(module.weight.data_ptr(), []).append(name)
    if unmatched := [p for p in exclude if not any(fnmatch.fnmatch(n, p) for names in sharing.values() for n in names)]:
        raise ValueError(f"model.exclude names no matrix of this model: {', '.join(unmatched)}")
    kept = [names for names in sharing.values() if not any(fnmatch.fnmatch(n, p) for n in names for p in exclude)]
    if not kept:
        raise ValueError("nothing to compress: the model has no Linear, Conv1D or Embedding matrix left")
    indices = [int(found) for names in kept for found in re.findall(r"\.(\d+)\.", names[0])[:1]]
    deepest = max(indices, default=0) + 1
    head = model.get_output_embeddings()
    layers = []
    for names in kept:
        modules = [model.get_submodule(name) for name in names]
        number = re.search(r"\.(\d+)\.", names[0])
        if number:
            depth = (int(number[1]) + 1) / (deepest + 1)
        else:
            depth = 1.0 if len(names) == 1 and modules[0] is head else 0.0
        layers.append(
            Layer(
                name=names[0],
                role=names[0].rpartition(".")[2],
                depth=depth,
                modules=tuple(names),
                kinds=tuple(_kind(module) for module in modules),
                weight=_matrix(modules[0]).detach().float().cpu().contiguous(),
            )
        )
    return tuple(layers)


def set_weights(model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Copy weights (layer → (out, in)) into the model, in place."""
    with torch.no_grad():
        for name, weight in weights.items():
            _matrix(model.get_submodule(name)).copy_(weight)


def gradient(model: nn.Module, name: str) -> Tensor:
    """The gradient in the weight of a layer, as (out, in); zeros if the loss does not depend on it."""
    module = model.get_submodule(name)
    weight = module.weight
    assert isinstance(weight, Tensor)
    found = torch.zeros_like(weight) if weight.grad is None else weight.grad
    return found.T if isinstance(module, Conv1D) else found


def uncompressed_tensors(model: nn.Module, layers: Sequence[Layer]) -> dict[str, Tensor]:
    """Everything a checkpoint stores beside the layers: norms, biases, excluded matrices, persistent buffers."""
    taken = {_matrix(model.get_submodule(layer.name)).data_ptr() for layer in layers}
    others: dict[str, Tensor] = {}
    for name, tensor in model.state_dict().items():
        if tensor.data_ptr() not in taken:
            taken.add(tensor.data_ptr())
            others[name] = tensor
    return others


def round_to_stored(others: Mapping[str, Tensor], float_bits: int) -> None:
    """Give the tensors beside the layers the precision they are stored in, in place."""
    if float_bits == 16:
        for name, tensor in others.items():
            if tensor.is_floating_point():
                rounded = tensor.half()
                if not rounded.isfinite().all():
                    raise ValueError(f"{name} does not fit 16-bit floats; use method.bits=32")
                tensor.copy_(rounded)


def _kind(module: nn.Module) -> str:
    """The class of a module of which matrices are taken, whatever is derived from it."""
    if isinstance(module, nn.Embedding | ExpertLinear):
        return "Embedding" if isinstance(module, nn.Embedding) else "Linear"
    return type(module).__name__


def _matrix(module: nn.Module) -> Tensor:
    """The weight of a module as (out, in)."""
    weight = module.weight
    assert isinstance(weight, Tensor)
    return weight.T if isinstance(module, Conv1D) else weight
