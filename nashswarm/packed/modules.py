"""Modules that compute on packed weights: a linear layer and an embedding around a ``PackedMatrix``.

An output head that is tied to the embedding holds the same ``PackedMatrix``.
"""

import copy
from typing import Any, Literal, get_args

import torch
from jaxtyping import Float, Integer
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from nashswarm import kernels
from nashswarm.packed.matrix import Counted, PackedMatrix

Activations = Literal["int8", "float32"]


class QuantizedLinear(nn.Linear, Counted):
    """y = x Wᵀ + b with a packed W.

    ``activations``: the type that x is rounded to inside the product.  ``transposed``: whether the layer replaced a
    Conv1D, which keeps Wᵀ.
    """

    matrix: PackedMatrix
    activations: Activations = "int8"
    transposed: bool = False

    @property
    def weight(self) -> Float[Tensor, "out in"]:  # type: ignore[override]
        """Return W as floats, computed at every call.

        Changing the result in place is an error, because the change would be lost.
        """
        return _read_only(self.matrix)

    def forward(self, x: Float[Tensor, "*batch in"]) -> Float[Tensor, "*batch out"]:
        return kernels.matmul(x, self.matrix.tiles, self.activations, self.bias)


class QuantizedEmbedding(nn.Embedding, Counted):
    """An embedding that dequantizes the rows of a packed matrix as they are looked up.

    ``like``: an empty tensor of the dtype that rows are returned in; it follows the model to another dtype.
    """

    matrix: PackedMatrix
    like: Float[Tensor, "0"]

    @property
    def weight(self) -> Float[Tensor, "out in"]:  # type: ignore[override]
        """Return all rows as floats, computed at every call; changing them in place is an error."""
        return _read_only(self.matrix)

    def forward(self, ids: Integer[Tensor, "*batch"]) -> Float[Tensor, "*batch in"]:
        return kernels.rows_of(self.matrix.tiles, ids).to(self.like.dtype)


QUANTIZED = (QuantizedLinear, QuantizedEmbedding)


def quantized(module: nn.Module, matrix: PackedMatrix, dtype: torch.dtype) -> QuantizedLinear | QuantizedEmbedding:
    """Return the packed module that replaces a Linear, a Conv1D, an Embedding or an instance of a derived class.

    ``dtype``: of the rows that an embedding returns.  A derived class keeps its own ``forward``: OPT's positional
    embedding adds an offset there.
    """
    if isinstance(module, Conv1D):
        linear = nn.Linear(module.nx, module.nf, bias=False, device="meta")
        linear.bias = module.bias
        replacement = quantized(linear, matrix, dtype)
        replacement.transposed = True
        return replacement
    kind, packed = type(module), QuantizedEmbedding if isinstance(module, nn.Embedding) else QuantizedLinear
    replacement = _shallow_copy(module)
    del replacement._parameters["weight"]
    derived = kind not in packed.__bases__
    replacement.__class__ = type(f"Quantized{kind.__name__}", (kind, packed), {}) if derived else packed
    replacement.matrix = matrix
    if isinstance(replacement, QuantizedEmbedding):
        replacement.register_buffer("like", torch.zeros(0, dtype=dtype), persistent=False)
    return replacement


def dequantized(module: QuantizedLinear | QuantizedEmbedding, weight: nn.Parameter) -> nn.Module:
    """Return the module that ``quantized`` replaced, with this weight of shape (out, in)."""
    if getattr(module, "transposed", False):
        plain: Any = Conv1D(*module.matrix.shape)
        plain.weight, plain.bias = nn.Parameter(weight.T.contiguous()), module.bias
        return plain
    plain = _shallow_copy(module)
    del plain._modules["matrix"]
    plain._buffers.pop("like", None)
    plain.__class__ = type(module).__bases__[0]
    plain.weight = weight
    return plain


def _shallow_copy(module: nn.Module) -> Any:
    """Copy a module: the copy shares its tensors, but not the dictionaries that name them."""
    twin = copy.copy(module)
    twin.__dict__ |= {name: dict(module.__dict__[name]) for name in ("_parameters", "_buffers", "_modules")}
    return twin


def set_activations(model: nn.Module, activations: Activations) -> None:
    """Set the type that every packed linear layer of ``model`` rounds its inputs to inside the product.

    ``int8`` is fast; ``float32`` does not round and is slower.  Raises ValueError for anything else.
    """
    if activations not in get_args(Activations):
        raise ValueError(f"unknown activations {activations!r}: choose {', '.join(get_args(Activations))}")
    for module in model.modules():
        if isinstance(module, QuantizedLinear):
            module.activations = activations


class _ReadOnly(Tensor):
    """A tensor that refuses changes in place; results of operations on it are ordinary tensors."""

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @property
    def data(self) -> Tensor:  # type: ignore[override]
        """Refuse the detached view, which would allow changes: adapters use it when they are merged."""
        raise RuntimeError("packed weights cannot be changed: call the model's dequantize() first")


def _read_only(matrix: PackedMatrix) -> Tensor:
    with torch.inference_mode():  # a tensor made here refuses changes in place
        return matrix.dequantize().as_subclass(_ReadOnly)
