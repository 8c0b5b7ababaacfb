"""optimum-quanto: min-max rounding with float shifts; 8 bits are symmetric, with one scale per row."""

import torch
from torch import Tensor

from nashswarm.methods.peers.library import GROUP_SIZES, Library, Packed, concatenate_bytes


def pack(weight: Tensor, bits: int, group_size: int | None) -> Packed:
    """Pack ``weight`` as one of quanto's integer tensors."""
    from optimum.quanto import AbsmaxOptimizer, MaxOptimizer, qint2, qint4, qint8, quantize_weight

    weight = weight.half()
    if bits == 8:
        tensor = quantize_weight(weight, qint8, 0, AbsmaxOptimizer()(weight, qint8, 0), optimized=False)
        return concatenate_bytes(tensor._data, tensor._scale), tensor.dequantize().float()
    kind = {2: qint2, 4: qint4}[bits]
    scale, shift = MaxOptimizer()(weight, kind, 0, group_size)
    tensor = quantize_weight(weight, kind, 0, scale, shift, group_size, optimized=False)
    codes = tensor._data._data
    # To unpack the codes, quanto would first compile C++ for minutes.  Dequantizing the unpacked codes gives the same.
    tensor._data = torch.ops.quanto.quantize_affine(weight, bits, 0, group_size, scale, shift)
    return concatenate_bytes(codes, scale, shift), tensor.dequantize().float()


LIBRARY = Library(pack, {2: GROUP_SIZES, 4: GROUP_SIZES, 8: (None,)}, ("optimum-quanto",))
