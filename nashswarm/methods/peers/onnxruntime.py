"""onnxruntime: MatMulNBits, the weight-only quantized product of its contributed operators."""

import logging
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from nashswarm.methods.peers.library import GROUP_SIZES, Library, Packed, concatenate_bytes

ONNX_OPSET, ONNX_FORMAT = 21, 10


def pack(weight: Tensor, bits: int, group_size: int | None) -> Packed:
    """Pack ``weight`` for MatMulNBits in 16-bit floats.

    2 bits are symmetric, other widths have zero points: each width uses the variant of smaller error.
    """
    session, parts = product_session(weight.half(), None, bits, group_size, accuracy_level=0, symmetric=bits == 2)
    (columns,) = session.run(None, {"x": np.eye(weight.shape[1], dtype=np.float16)})
    return concatenate_bytes(*parts), torch.from_numpy(columns.T.astype(np.float32))


def product_session(
    weight: Float[Tensor, "out in"],
    bias: Float[Tensor, " out"] | None,
    bits: int,
    group_size: int | None,
    accuracy_level: int,
    symmetric: bool,
) -> tuple[Any, list[np.ndarray]]:
    """Return a session that computes x Wᵀ + b with quantized W, and the tensors that it holds.

    ``accuracy_level``: 4 rounds x to 8 bits, 0 leaves x as it is.
    """
    import onnx
    import onnxruntime
    from onnx import helper, numpy_helper
    from onnxruntime.quantization import matmul_nbits_quantizer as nbits

    nbits.logger.setLevel(logging.WARNING)
    kind = helper.np_dtype_to_tensor_dtype(weight.numpy().dtype)
    tensors = [numpy_helper.from_array(weight.T.contiguous().numpy(), "w")]
    nodes = [helper.make_node("MatMul", ["x", "w"], ["y" if bias is None else "product"], "product")]
    if bias is not None:
        tensors.append(numpy_helper.from_array(bias.detach().numpy(), "b"))
        nodes.append(helper.make_node("Add", ["product", "b"], ["y"], "sum"))
    rows, columns = weight.shape
    ends = [[helper.make_tensor_value_info(name, kind, ["n", size])] for name, size in (("x", columns), ("y", rows))]
    graph = helper.make_graph(nodes, "product", *ends, tensors)
    opset = helper.make_opsetid("", ONNX_OPSET)
    settings = nbits.DefaultWeightOnlyQuantConfig(group_size, symmetric, accuracy_level, bits=bits)
    quantizer = nbits.MatMulNBitsQuantizer(
        helper.make_model(graph, opset_imports=[opset], ir_version=ONNX_FORMAT), algo_config=settings
    )
    quantizer.process()
    model: onnx.ModelProto = quantizer.model.model
    assert any(node.op_type == "MatMulNBits" for node in model.graph.node)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, ["CPUExecutionProvider"])
    return session, [numpy_helper.to_array(tensor) for tensor in model.graph.initializer]


LIBRARY = Library(pack, dict.fromkeys((2, 4, 8), GROUP_SIZES), ("onnx", "onnx-ir", "onnxruntime"))
