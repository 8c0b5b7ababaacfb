"""The libraries that are compared with, each through its own code and in its own packed form.

``Peer`` is a method: a library packs every matrix, the bytes are those of its packed tensors, scales and zero points,
and the weights are what the library itself makes of them again.  ``CONTESTANTS`` race against the packed model: a full
model goes in, one that runs the library's way comes out.  The libraries are optional and imported when they are needed.
"""

import contextlib
import copy
import ctypes
import dataclasses
import importlib.metadata
import io
import logging
import os
import pathlib
import tempfile
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

from nashswarm.calibration.context import CalibrationContext
from nashswarm.errors import Unsupported, require
from nashswarm.layers import Layer
from nashswarm.methods.method import Compressed
from nashswarm.methods.peers import auto_round
from nashswarm.quant.grid import Scheme, quantize
from nashswarm.quant.pack import pack

Packed = tuple[UInt8[np.ndarray, " bytes"], Float[Tensor, "out in"]]  # the bytes, and the weights that they stand for
SHARED = (32, 64, 128, 256)  # columns that may share a scale in most formats
BLOCK = 64  # columns that share a scale in the contestants' 4-bit weights
NF4_ROWS = 32  # bitsandbytes' kernel takes whole blocks of rows
ONNX_OPSET, ONNX_FORMAT = 21, 10
ONNX_PACKAGES = ("onnx", "onnx-ir", "onnxruntime")
log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Library:
    """What a library can do.

    ``pack``: a matrix at so many bits and columns to a scale; None if it takes a whole model and its calibration text,
    to ``tune`` it.  ``formats``: bits → the group sizes it knows; None: one scale a row.  ``needs``: the packages to
    install, ``extra``: the extra of this one that installs them.  ``together``: how many groups it packs into one word,
    so that a matrix must have a multiple of them, ``rows``: how many rows, if it does not fill up a table.
    """

    pack: Callable[[Tensor, int, int | None], Packed] | None
    formats: Mapping[int, Sequence[int | None]]
    needs: tuple[str, ...]
    extra: str = "peers"
    together: int = 1
    rows: int = 1
    tune: Callable[[Any, Tensor, Sequence[Layer], int, int, int], auto_round.Found] | None = None

    def require(self, setting: str) -> None:
        """Raises MissingPackage if a package is absent."""
        require(setting, self.needs, self.extra)

    def fits(self, layer: Layer, group_size: int | None) -> bool:
        rows, columns = layer.weight.shape
        size = group_size or columns
        whole = rows % self.rows == 0 or "Embedding" in layer.kinds
        return whole and columns % size == 0 and layer.parameters // size % self.together == 0


@dataclasses.dataclass(frozen=True)
class Peer:
    """``bits`` everywhere by another library; only one that tunes looks at calibration text.

    ``group_size``: columns that share a scale; None where the library has one scale a row.  A layer whose shape the
    library cannot pack stays at 16 bits and is named so in the allocation and in the log.
    """

    library: str = "hqq"
    bits: int = 4
    group_size: int | None = 64

    def __post_init__(self) -> None:
        if self.library not in LIBRARIES:
            raise ValueError(f"unknown method.library {self.library!r}: choose among {', '.join(LIBRARIES)}")
        formats = LIBRARIES[self.library].formats
        if self.bits not in formats:
            raise Unsupported(f"method.bits={self.bits}: {self.library} knows {_listed(formats)} bits")
        if self.group_size not in formats[self.bits]:
            raise ValueError(
                f"method.group_size={self.group_size}: {self.library} at {self.bits} bits knows "
                f"{_listed('null' if size is None else size for size in formats[self.bits])}"
            )

    def compress(self, context: CalibrationContext, rng: np.random.Generator) -> Compressed:
        library = LIBRARIES[self.library]
        library.require(f"method.library={self.library}")
        if library.tune and (context.calibration is None or context.calibration[0].get_output_embeddings() is None):
            raise Unsupported(f"method.library={self.library} tunes models that predict text, which this one does not")
        kept = [layer.name for layer in context.layers if not library.fits(layer, self.group_size)]
        if len(kept) == len(context.layers):
            raise ValueError(f"{self.library} cannot pack any layer in groups of method.group_size={self.group_size}")
        if kept:
            log.warning("%s cannot pack %d layers, kept at 16 bits: %s", self.library, len(kept), ", ".join(kept))
        chosen = [layer for layer in context.layers if layer.name not in kept]
        packed = {layer.name: _floats(layer.weight) for layer in context.layers if layer.name in kept}
        packed |= self._packed(library, context, chosen, rng)
        found = {layer.name: packed[layer.name] for layer in context.layers}
        bits = {layer.name: 16 if layer.name in kept else self.bits for layer in context.layers}
        return Compressed(
            packed={name: packed for name, (packed, _) in found.items()},
            weights={name: weight for name, (_, weight) in found.items()},
            allocation="".join(f"{name} {width}\n" for name, width in bits.items()),
            code_bits=sum(bits[layer.name] * layer.parameters for layer in context.layers),
            metrics={"layers_at_16_bits": len(kept)},
            foreign=self.library,
        )

    def _packed(
        self, library: Library, context: CalibrationContext, layers: Sequence[Layer], rng: np.random.Generator
    ) -> dict[str, Packed]:
        """Layer → its bytes and the weights that they stand for."""
        if library.pack is not None:
            track = context.track(layers, f"packing by {self.library}")
            return {layer.name: library.pack(layer.weight.clone(), self.bits, self.group_size) for layer in track}
        assert library.tune is not None and context.calibration is not None and self.group_size is not None
        found = library.tune(*context.calibration, layers, self.bits, self.group_size, int(rng.integers(2**31)))
        return {name: (_bytes(*parts), weight) for name, (parts, weight) in found.items()}


def _hqq(weight: Tensor, bits: int, group_size: int | None) -> Packed:
    """Half-quadratic quantization (Badri and Shaji 2023); scales and zero points are 16-bit floats."""
    from hqq.core.quantize import BaseQuantizeConfig, HQQLinear

    config = BaseQuantizeConfig(nbits=bits, group_size=group_size, axis=1)
    layer = HQQLinear.from_weights(weight, None, config, compute_dtype=torch.float16, device="cpu")
    return _bytes(layer.W_q, layer.meta["scale"], layer.meta["zero"]), layer.dequantize().float()


def _bitsandbytes(weight: Tensor, bits: int, group_size: int | None) -> Packed:
    """NF4 with quantized scales (Dettmers et al. 2023), or int8 with one scale a row (LLM.int8, 2022)."""
    import bitsandbytes.functional as bnb

    if bits == 8:
        codes, scale, _ = bnb.int8_vectorwise_quant(weight.half())
        return _bytes(codes, scale), bnb.int8_vectorwise_dequant(codes, scale).float()
    codes, state = bnb.quantize_4bit(weight, blocksize=group_size, quant_type="nf4", compress_statistics=True)
    return _bytes(codes, state.absmax, state.state2.absmax, state.offset), bnb.dequantize_4bit(codes, state)


def _quanto(weight: Tensor, bits: int, group_size: int | None) -> Packed:
    """Min-max rounding with float shifts; 8 bits are symmetric, one scale a row."""
    from optimum.quanto import AbsmaxOptimizer, MaxOptimizer, qint2, qint4, qint8, quantize_weight

    weight = weight.half()
    if bits == 8:
        found = quantize_weight(weight, qint8, 0, AbsmaxOptimizer()(weight, qint8, 0), optimized=False)
        return _bytes(found._data, found._scale), found.dequantize().float()
    kind = {2: qint2, 4: qint4}[bits]
    scale, shift = MaxOptimizer()(weight, kind, 0, group_size)
    found = quantize_weight(weight, kind, 0, scale, shift, group_size, optimized=False)
    packed = found._data._data
    # The codes as they were before they were packed: to unpack them it would compile C++ first, for minutes.
    found._data = torch.ops.quanto.quantize_affine(weight, bits, 0, group_size, scale, shift)
    return _bytes(packed, scale, shift), found.dequantize().float()


def _torchao(weight: Tensor, bits: int, group_size: int | None) -> Packed:
    """4 bits are packed for its CPU kernel; all other widths are stored as it has them on a CPU: a byte a weight."""
    from torchao.prototype.quantization.int4 import Int4OpaqueTensor
    from torchao.quantization import IntxUnpackedToInt8Tensor

    block = (1, group_size)
    if bits == 4:
        found = Int4OpaqueTensor.from_hp(weight.bfloat16(), list(block))
        rows = nn.functional.linear(torch.eye(weight.shape[1], dtype=torch.bfloat16), found)
        return _bytes(found.qdata, found.scale_and_zero), rows.T.float().contiguous()
    found = IntxUnpackedToInt8Tensor.from_hp(weight.half(), block, getattr(torch, f"int{bits}"))
    return _bytes(found.qdata, found.scale, found.zero_point), found.dequantize().float()


def _onnxruntime(weight: Tensor, bits: int, group_size: int | None) -> Packed:
    """MatMulNBits in 16-bit floats: symmetric at 2 bits, with zero points otherwise, the better one at each width."""
    session, parts = _onnx_product(weight.half(), None, bits, group_size, accuracy_level=0, symmetric=bits == 2)
    (rows,) = session.run(None, {"x": np.eye(weight.shape[1], dtype=np.float16)})
    return _bytes(*parts), torch.from_numpy(rows.T.astype(np.float32))


def _nncf(weight: Tensor, bits: int, group_size: int | None) -> Packed:
    """OpenVINO's integers, without data: symmetric at 2 and 3 bits, with zero points at 4 and, by row, 8.  The bytes
    are those of the file of weights that OpenVINO writes."""
    os.environ.setdefault("NNCF_CI", "1")  # without it NNCF reports every use to its makers over the network
    import nncf
    import openvino
    from openvino import opset13

    nncf.set_log_level(logging.ERROR)
    modes = {2: "INT2_SYM", 3: "INT3_SYM", 4: "INT4_ASYM", 8: "INT8_ASYM"}
    grouped = {} if group_size is None else {"group_size": group_size, "ratio": 1.0, "all_layers": True}
    x = opset13.parameter([-1, weight.shape[1]], np.float32, name="x")
    product = opset13.matmul(x, opset13.constant(weight.numpy()), transpose_a=False, transpose_b=True)
    with contextlib.redirect_stdout(io.StringIO()), tempfile.TemporaryDirectory() as folder:
        model = nncf.compress_weights(
            openvino.Model([opset13.result(product)], [x]), mode=nncf.CompressWeightsMode[modes[bits]], **grouped
        )
        openvino.save_model(model, pathlib.Path(folder) / "layer.xml")
        packed = np.fromfile(pathlib.Path(folder) / "layer.bin", np.uint8)
    exact = {"INFERENCE_PRECISION_HINT": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": "0"}
    rows = openvino.compile_model(model, "CPU", exact)(np.eye(weight.shape[1], dtype=np.float32))[0]
    return packed, torch.from_numpy(rows.T.copy())


def _gguf(weight: Tensor, bits: int, group_size: int | None) -> Packed:
    """The k-quants of llama.cpp by the ggml that pywhispercpp ships; scales of 16 or 32 columns are themselves
    quantized, in super-blocks of 256.  8 bits are Q8_0."""
    import gguf

    kind = gguf.GGMLQuantizationType[{2: "Q2_K", 3: "Q3_K", 4: "Q4_K", 5: "Q5_K", 6: "Q6_K", 8: "Q8_0"}[bits]]
    files = importlib.metadata.files("pywhispercpp") or []
    ggml = ctypes.CDLL(str(next(file.locate() for file in files if file.name.startswith("libggml-base"))))
    ggml.ggml_quantize_chunk.restype = ctypes.c_size_t
    ggml.ggml_quantize_chunk.argtypes = [ctypes.c_int, *2 * [ctypes.c_void_p], *3 * [ctypes.c_int64], ctypes.c_void_p]
    values = np.ascontiguousarray(weight.numpy())
    packed = np.empty(gguf.quant_shape_to_byte_shape(values.shape, kind), np.uint8)
    written = ggml.ggml_quantize_chunk(int(kind), values.ctypes.data, packed.ctypes.data, 0, *values.shape, None)
    assert written == packed.nbytes
    return packed.ravel(), torch.from_numpy(gguf.dequantize(packed, kind))


LIBRARIES: Mapping[str, Library] = {
    "hqq": Library(_hqq, dict.fromkeys((2, 3, 4, 8), SHARED), ("hqq",), together=4),
    "bitsandbytes": Library(_bitsandbytes, {4: (64, 128, 256), 8: (None,)}, ("bitsandbytes",)),
    "quanto": Library(_quanto, {2: SHARED, 4: SHARED, 8: (None,)}, ("optimum-quanto",)),
    "torchao": Library(_torchao, dict.fromkeys((2, 3, 8), SHARED) | {4: SHARED[:-1]}, ("torchao",), extra="torchao"),
    "onnxruntime": Library(_onnxruntime, dict.fromkeys((2, 4, 8), SHARED), ONNX_PACKAGES),
    "nncf": Library(_nncf, {2: SHARED, 3: SHARED, 4: SHARED, 8: (None,)}, ("nncf", "openvino")),
    "auto_round": Library(
        None, dict.fromkeys((2, 3, 4), SHARED), ("auto-round",), rows=auto_round.ROWS, tune=auto_round.auto_round
    ),
    "gguf": Library(_gguf, dict.fromkeys((2, 3, 4, 5, 6), (256,)) | {8: (32,)}, ("gguf", "pywhispercpp")),
}


def bfloat16(model: Any) -> Any:
    """The model with weights and activations of 16 bits."""
    return copy.deepcopy(model).bfloat16()


def compiled(model: Any) -> Any:
    """The model by ``torch.compile``: three graphs, for the prompt, the first step and all others."""
    return torch.compile(model, dynamic=True)


def onnxruntime4(model: Any) -> Any:
    """The model with its products in onnxruntime, weights at 4 bits and activations rounded to 8."""
    require("measure.against=onnxruntime", ONNX_PACKAGES)
    return _with_products(model, OnnxLinear)


def nf4(model: Any) -> Any:
    """The model with its products in bitsandbytes, weights as NF4."""
    require("measure.against=bitsandbytes", ("bitsandbytes",))
    return _with_products(model, _nf4_linear)


CONTESTANTS: Mapping[str, Callable[[Any], Any]] = {
    "bfloat16": bfloat16,
    "compile": compiled,
    "onnxruntime": onnxruntime4,
    "bitsandbytes": nf4,
}


class OnnxLinear(nn.Module):
    """y = x Wᵀ + b by an onnxruntime session that holds W at 4 bits; ``weight_bytes``: what it holds."""

    def __init__(self, weight: Float[Tensor, "out in"], bias: Float[Tensor, " out"] | None) -> None:
        super().__init__()
        self.session, parts = _onnx_product(weight, bias, 4, BLOCK, accuracy_level=4, symmetric=True)
        self.weight_bytes = sum(part.nbytes for part in parts)

    def forward(self, x: Float[Tensor, "*batch in"]) -> Float[Tensor, "*batch out"]:
        (rows,) = self.session.run(None, {"x": x.reshape(-1, x.shape[-1]).numpy()})
        return torch.from_numpy(rows).view(*x.shape[:-1], -1)


def _nf4_linear(weight: Float[Tensor, "out in"], bias: Float[Tensor, " out"] | None) -> nn.Module:
    """A product that bitsandbytes computes; ``weight_bytes``: its scales, which are no parameters of it."""
    import bitsandbytes

    rows, columns = weight.shape
    missing = -rows % NF4_ROWS
    weight = functional.pad(weight, (0, 0, 0, missing))
    layer = bitsandbytes.nn.Linear4bit(columns, rows + missing, bias is not None, torch.bfloat16, False, "nf4").eval()
    packed = bitsandbytes.nn.Params4bit(weight, False, None, BLOCK, compress_statistics=False, quant_type="nf4")
    layer.weight = packed.to("cpu")
    layer.bias = None if bias is None else nn.Parameter(functional.pad(bias.detach(), (0, missing)), False)
    if missing:
        layer.register_forward_hook(lambda module, arguments, output: output[..., :rows])
    with torch.no_grad():
        layer(torch.zeros(1, columns))  # it lays the weights out for its kernel when it is first called
    layer.weight_bytes = layer.weight.quant_state.absmax.nbytes
    return layer


def _with_products(model: Any, product: Callable[[Tensor, Tensor | None], nn.Module]) -> Any:
    """A copy of the model, in float32, with another module in the place of every Linear and Conv1D; a tied head becomes
    one of its own, beside the embedding."""
    found = copy.deepcopy(model).float()
    made: dict[int, nn.Module] = {}
    for name, module in list(found.named_modules(remove_duplicate=False)):
        if isinstance(module, (nn.Linear, Conv1D)):
            weight = module.weight.T if isinstance(module, Conv1D) else module.weight
            if id(module) not in made:
                made[id(module)] = product(weight.detach().contiguous(), module.bias)
            found.set_submodule(name, made[id(module)])
    left = [name for name, module in found.named_modules() if isinstance(module, Conv1D) or type(module) is nn.Linear]
    assert made and not left, f"not replaced: {left}"
    return found


def _onnx_product(
    weight: Float[Tensor, "out in"],
    bias: Float[Tensor, " out"] | None,
    bits: int,
    group_size: int | None,
    accuracy_level: int,
    symmetric: bool,
) -> tuple[Any, list[np.ndarray]]:
    """A session that computes x Wᵀ + b with quantized W, and the tensors that it holds.  ``accuracy_level``: 4 rounds
    x to 8 bits, 0 leaves it alone."""
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


def _floats(weight: Tensor) -> Packed:
    tensor = quantize(weight, 16, Scheme(group_size=1))
    return pack(tensor), tensor.dequantize()


def _bytes(*parts: Tensor | np.ndarray) -> UInt8[np.ndarray, " bytes"]:
    """The contents of tensors and arrays, one after another."""
    tensors = (torch.from_numpy(part.copy()) if isinstance(part, np.ndarray) else part for part in parts)
    return torch.cat([tensor.detach().contiguous().flatten().view(torch.uint8) for tensor in tensors]).numpy()


def _listed(choices: Any) -> str:
    return ", ".join(map(str, choices))
