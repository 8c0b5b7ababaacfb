"""HQQ: half-quadratic quantization (Badri and Shaji 2023)."""

import torch
from torch import Tensor

from nashswarm.methods.peers.library import GROUP_SIZES, Library, Packed, concatenate_bytes


def pack(weight: Tensor, bits: int, group_size: int | None) -> Packed:
    """Pack ``weight`` by HQQ, with scales and zero points as 16-bit floats."""
    from hqq.core.quantize import BaseQuantizeConfig, HQQLinear

    config = BaseQuantizeConfig(nbits=bits, group_size=group_size, axis=1)
    linear = HQQLinear.from_weights(weight, None, config, compute_dtype=torch.float16, device="cpu")
    content = concatenate_bytes(linear.W_q, linear.meta["scale"], linear.meta["zero"])
    return content, linear.dequantize().float()


LIBRARY = Library(pack, dict.fromkeys((2, 3, 4, 8), GROUP_SIZES), ("hqq",), groups_per_word=4)
