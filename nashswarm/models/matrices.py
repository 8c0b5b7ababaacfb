"""Find the weight matrices of a model, replace them, and list the tensors that are stored beside them."""

import fnmatch
import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from nashswarm.layers import Layer
from nashswarm.models.split_experts import ExpertLinear

MATRICES = (nn.Linear, Conv1D, nn.Embedding)
ROUTER = re.compile(r"(^|\.)(router|router_mlp|shared_expert_gate)(\.|$)")
FLOATS = {16: torch.float16, 32: torch.float32}


def is_router(name: str) -> bool:
    """Check whether a module chooses or weighs experts: it is small, and an error in it moves tokens to other experts.

    >>> is_router("layers.0.mlp.router.gate"), is_router("layers.0.mlp.gate_proj")
    (True, False)
    """
    return bool(ROUTER.search(name))


def find_layers(model: Any, exclude: Sequence[str] = ()) -> tuple[Layer, ...]:
    """Find every Linear, Conv1D and Embedding matrix but routers, in the order of the model; tied ones are listed once.

    Raises ValueError for a pattern of ``exclude`` that matches nothing and for a model without matrices.
    """
    sharing: dict[int, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, MATRICES) and module.weight.numel():
            sharing.setdefault(module.weight.data_ptr(), []).append(name)
    if unmatched := [p for p in exclude if not any(fnmatch.fnmatch(n, p) for names in sharing.values() for n in names)]:
        raise ValueError(f"model.exclude names no matrix of this model: {', '.join(unmatched)}")
    included = [
        names
        for names in sharing.values()
        if not any(fnmatch.fnmatch(n, p) for n in names for p in exclude) and not any(map(is_router, names))
    ]
    if not included:
        raise ValueError("nothing to compress: the model has no Linear, Conv1D or Embedding matrix left")
    indices = [int(number) for names in included for number in re.findall(r"\.(\d+)\.", names[0])[:1]]
    deepest = max(indices, default=0) + 1
    head = model.get_output_embeddings()
    layers = []
    for names in included:
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
    """Copy weights into the model in place: the name of a layer → its matrix (out, in)."""
    with torch.no_grad():
        for name, weight in weights.items():
            _matrix(model.get_submodule(name)).copy_(weight)


def weight_gradient(model: nn.Module, name: str) -> Tensor:
    """Return the gradient of a layer's weight as (out, in); zeros if the loss does not depend on it."""
    module = model.get_submodule(name)
    weight = module.weight
    assert isinstance(weight, Tensor)
    gradient = torch.zeros_like(weight) if weight.grad is None else weight.grad
    return gradient.T if isinstance(module, Conv1D) else gradient


def uncompressed_tensors(model: nn.Module, layers: Sequence[Layer]) -> dict[str, Tensor]:
    """Return every other tensor of a checkpoint: norms, biases, excluded matrices, buffers; shared ones once."""
    listed = {_matrix(model.get_submodule(layer.name)).data_ptr() for layer in layers}
    others: dict[str, Tensor] = {}
    for name, tensor in model.state_dict().items():
        if tensor.data_ptr() not in listed:
            listed.add(tensor.data_ptr())
            others[name] = tensor
    return others


def round_to_stored(others: Mapping[str, Tensor], float_bits: int) -> None:
    """Round the tensors beside the layers in place to the precision that they are stored in (``as_stored``)."""
    for tensor in others.values():
        tensor.copy_(as_stored(tensor, float_bits))


def as_stored(tensor: Tensor, float_bits: int) -> Tensor:
    """Return a tensor as a checkpoint stores it: floats of ``float_bits``, of 32 bits where those of 16 cannot hold it.

    Integers stay as they are.
    """
    if not tensor.is_floating_point():
        return tensor
    rounded = tensor.to(FLOATS[float_bits])
    lost = rounded.isinf() & tensor.isfinite()
    return tensor.float() if lost.any() else rounded


def _kind(module: nn.Module) -> str:
    """Return the name of the base class of a module with a matrix: Linear, Conv1D or Embedding."""
    if isinstance(module, nn.Embedding | ExpertLinear):
        return "Embedding" if isinstance(module, nn.Embedding) else "Linear"
    return type(module).__name__


def _matrix(module: nn.Module) -> Tensor:
    """Return the weight of a module as (out, in)."""
    weight = module.weight
    assert isinstance(weight, Tensor)
    return weight.T if isinstance(module, Conv1D) else weight
