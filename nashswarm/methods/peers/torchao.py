"""torchao: 4 bits in the layout of its CPU kernel; all other widths take one byte per weight, as on every CPU."""

import torch
from torch import Tensor
from torch.nn import functional

from nashswarm.methods.peers.library import GROUP_SIZES, Library, Packed, concatenate_bytes


def pack(weight: Tensor, bits: int, group_size: int | None) -> Packed:
    """Pack ``weight`` as a tensor subclass of torchao."""
    from torchao.prototype.quantization.int4 import Int4OpaqueTensor
    from torchao.quantization import IntxUnpackedToInt8Tensor

    block = (1, group_size)
    if bits == 4:
        opaque = Int4OpaqueTensor.from_hp(weight.bfloat16(), list(block))
        columns = functional.linear(torch.eye(weight.shape[1], dtype=torch.bfloat16), opaque)
        return concatenate_bytes(opaque.qdata, opaque.scale_and_zero), columns.T.float().contiguous()
    tensor = IntxUnpackedToInt8Tensor.from_hp(weight.half(), block, getattr(torch, f"int{bits}"))
    return concatenate_bytes(tensor.qdata, tensor.scale, tensor.zero_point), tensor.dequantize().float()


LIBRARY = Library(pack, dict.fromkeys((2, 3, 8), GROUP_SIZES) | {4: GROUP_SIZES[:-1]}, ("torchao",), extra="torchao")
