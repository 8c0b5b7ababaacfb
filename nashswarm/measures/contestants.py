"""Other runtimes that the Speed measure times against the packed model.

Each contestant is a function that takes a full model and returns a model that computes in another way.  The runtimes
are optional and are imported only when a measure asks for them.
"""

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

from nashswarm.methods.peers import bitsandbytes, onnxruntime

GROUP_SIZE = 64  # columns that share a scale in 4-bit weights
NF4_ROWS = 32  # the kernel of bitsandbytes takes whole blocks of rows


def bfloat16(model: Any) -> Any:
    """Return a copy of the model with weights and activations of 16 bits."""
    return copy.deepcopy(model).bfloat16()


def compiled(model: Any) -> Any:
    """Return the model under ``torch.compile``: one graph for the prompt, one for the first step, one for the rest."""
    return torch.compile(model, dynamic=True)


def onnxruntime4(model: Any) -> Any:
    """Return a copy of the model whose products run in onnxruntime, with 4-bit weights and activations at 8 bits.

    Raises MissingPackage without onnxruntime.
    """
    onnxruntime.LIBRARY.require("measure.against=onnxruntime")
    return replace_products(model, OnnxLinear)


def nf4(model: Any) -> Any:
    """Return a copy of the model whose products run in bitsandbytes, with NF4 weights.

    Raises MissingPackage without bitsandbytes.
    """
    bitsandbytes.LIBRARY.require("measure.against=bitsandbytes")
    return replace_products(model, _nf4_linear)


CONTESTANTS: Mapping[str, Callable[[Any], Any]] = {
    "bfloat16": bfloat16,
    "compile": compiled,
    "onnxruntime": onnxruntime4,
    "bitsandbytes": nf4,
}


def replace_products(model: Any, product: Callable[[Tensor, Tensor | None], nn.Module]) -> Any:
    """Return a float32 copy of the model in which ``product(weight, bias)`` stands for every Linear and Conv1D.

    A tied head becomes a module of its own; the embedding stays.
    """
    replaced = copy.deepcopy(model).float()
    products: dict[int, nn.Module] = {}
    for name, module in list(replaced.named_modules(remove_duplicate=False)):
        if isinstance(module, (nn.Linear, Conv1D)):
            weight = module.weight.T if isinstance(module, Conv1D) else module.weight
            if id(module) not in products:
                products[id(module)] = product(weight.detach().contiguous(), module.bias)
            replaced.set_submodule(name, products[id(module)])
    missed = [
        name for name, module in replaced.named_modules() if isinstance(module, Conv1D) or type(module) is nn.Linear
    ]
    assert products and not missed, f"not replaced: {missed}"
    return replaced


class OnnxLinear(nn.Module):
    """y = x Wᵀ + b in an onnxruntime session that holds W at 4 bits.

    ``weight_bytes``: bytes of all tensors in the session, which torch does not see.
    """

    def __init__(self, weight: Float[Tensor, "out in"], bias: Float[Tensor, " out"] | None) -> None:
        super().__init__()
        self.session, parts = onnxruntime.product_session(weight, bias, 4, GROUP_SIZE, accuracy_level=4, symmetric=True)
        self.weight_bytes = sum(part.nbytes for part in parts)

    def forward(self, x: Float[Tensor, "*batch in"]) -> Float[Tensor, "*batch out"]:
        (rows,) = self.session.run(None, {"x": x.reshape(-1, x.shape[-1]).numpy()})
        return torch.from_numpy(rows).view(*x.shape[:-1], -1)


def _nf4_linear(weight: Float[Tensor, "out in"], bias: Float[Tensor, " out"] | None) -> nn.Module:
    """Return bitsandbytes' Linear4bit; its ``weight_bytes`` are those of the scales, which are no parameters."""
    import bitsandbytes

    rows, columns = weight.shape
    padding = -rows % NF4_ROWS
    weight = functional.pad(weight, (0, 0, 0, padding))
    layer = bitsandbytes.nn.Linear4bit(columns, rows + padding, bias is not None, torch.bfloat16, False, "nf4").eval()
    packed = bitsandbytes.nn.Params4bit(weight, False, None, GROUP_SIZE, compress_statistics=False, quant_type="nf4")
    layer.weight = packed.to("cpu")
    layer.bias = None if bias is None else nn.Parameter(functional.pad(bias.detach(), (0, padding)), False)
    if padding:
        layer.register_forward_hook(lambda module, arguments, output: output[..., :rows])
    with torch.no_grad():
        layer(torch.zeros(1, columns))  # the first call lays the weights out for the kernel
    layer.weight_bytes = layer.weight.quant_state.absmax.nbytes
    return layer
