"""GGUF: the k-quants of llama.cpp, computed by the ggml library that pywhispercpp ships.

A super-block of 256 columns holds scales for each 16 or 32 columns, which are themselves quantized.  8 bits are Q8_0.
"""

import ctypes
import importlib.metadata

import numpy as np
import torch
from torch import Tensor

from nashswarm.methods.peers.library import Library, Packed

KINDS = {2: "Q2_K", 3: "Q3_K", 4: "Q4_K", 5: "Q5_K", 6: "Q6_K", 8: "Q8_0"}


def pack(weight: Tensor, bits: int, group_size: int | None) -> Packed:
    """Pack ``weight`` as blocks of the GGUF type with this many bits."""
    import gguf

    kind = gguf.GGMLQuantizationType[KINDS[bits]]
    files = importlib.metadata.files("pywhispercpp") or []
    ggml = ctypes.CDLL(str(next(file.locate() for file in files if file.name.startswith("libggml-base"))))
    ggml.ggml_quantize_chunk.restype = ctypes.c_size_t
    ggml.ggml_quantize_chunk.argtypes = [ctypes.c_int, *2 * [ctypes.c_void_p], *3 * [ctypes.c_int64], ctypes.c_void_p]
    values = np.ascontiguousarray(weight.numpy())
    content = np.empty(gguf.quant_shape_to_byte_shape(values.shape, kind), np.uint8)
    written = ggml.ggml_quantize_chunk(int(kind), values.ctypes.data, content.ctypes.data, 0, *values.shape, None)
    assert written == content.nbytes
    return content.ravel(), torch.from_numpy(gguf.dequantize(content, kind))


LIBRARY = Library(pack, dict.fromkeys((2, 3, 4, 5, 6), (256,)) | {8: (32,)}, ("gguf", "pywhispercpp"))
