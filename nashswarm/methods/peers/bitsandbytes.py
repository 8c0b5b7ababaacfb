"""bitsandbytes: NF4 with quantized scales (Dettmers et al. 2023), or int8 with one scale per row (LLM.int8, 2022)."""

from torch import Tensor

from nashswarm.methods.peers.library import Library, Packed, concatenate_bytes


def pack(weight: Tensor, bits: int, group_size: int | None) -> Packed:
    """Pack ``weight`` as int8 at 8 bits, else as NF4."""
    from bitsandbytes import functional

    if bits == 8:
        codes, scale, _ = functional.int8_vectorwise_quant(weight.half())
        return concatenate_bytes(codes, scale), functional.int8_vectorwise_dequant(codes, scale).float()
    codes, state = functional.quantize_4bit(weight, blocksize=group_size, quant_type="nf4", compress_statistics=True)
    content = concatenate_bytes(codes, state.absmax, state.state2.absmax, state.offset)
    return content, functional.dequantize_4bit(codes, state)


LIBRARY = Library(pack, {4: (64, 128, 256), 8: (None,)}, ("bitsandbytes",))
