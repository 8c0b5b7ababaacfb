"""NNCF, the compressor of OpenVINO: symmetric integers at 2 and 3 bits, zero points at 4 bits and, per row, at 8."""

import contextlib
import io
import logging
import os
import pathlib
import tempfile

import numpy as np
import torch
from torch import Tensor

from nashswarm.methods.peers.library import GROUP_SIZES, Library, Packed

MODES = {2: "INT2_SYM", 3: "INT3_SYM", 4: "INT4_ASYM", 8: "INT8_ASYM"}


def pack(weight: Tensor, bits: int, group_size: int | None) -> Packed:
    """Pack ``weight`` by NNCF without calibration data; the bytes are those of the weights file that OpenVINO saves."""
    os.environ.setdefault("NNCF_CI", "1")  # otherwise NNCF sends usage statistics over the network
    import nncf
    import openvino
    from openvino import opset13

    nncf.set_log_level(logging.ERROR)
    grouping = {} if group_size is None else {"group_size": group_size, "ratio": 1.0, "all_layers": True}
    x = opset13.parameter([-1, weight.shape[1]], np.float32, name="x")
    product = opset13.matmul(x, opset13.constant(weight.numpy()), transpose_a=False, transpose_b=True)
    with contextlib.redirect_stdout(io.StringIO()), tempfile.TemporaryDirectory() as folder:
        model = nncf.compress_weights(
            openvino.Model([opset13.result(product)], [x]), mode=nncf.CompressWeightsMode[MODES[bits]], **grouping
        )
        openvino.save_model(model, pathlib.Path(folder) / "layer.xml")
        content = np.fromfile(pathlib.Path(folder) / "layer.bin", np.uint8)
    exact = {"INFERENCE_PRECISION_HINT": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": "0"}
    columns = openvino.compile_model(model, "CPU", exact)(np.eye(weight.shape[1], dtype=np.float32))[0]
    return content, torch.from_numpy(columns.T.copy())


LIBRARY = Library(pack, {2: GROUP_SIZES, 3: GROUP_SIZES, 4: GROUP_SIZES, 8: (None,)}, ("nncf", "openvino"))
