"""llama.cpp: a whole model quantized by its own ``llama_model_quantize``, mixed types, importance matrix and all.

The model goes to llama.cpp as a GGUF file in 32 bits and comes back as the file that llama.cpp would map into memory.
Its bytes are the size, on disk as in memory; its tensors, decoded by the package ``gguf``, are the weights.  The file
holds weights and hyperparameters but no tokenizer, as the checkpoints that it is compared with.

The library is the one that ``llama-cpp-python`` builds: its bindings and its llama.cpp are always of one version.
"""

import ctypes
import dataclasses
import functools
import logging
import pathlib
import re
import tempfile
from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from nashswarm.calibration.context import CalibrationContext
from nashswarm.errors import Unsupported, require
from nashswarm.layers import Layer, Moments
from nashswarm.methods.method import Compressed
from nashswarm.models import gguf_architectures, gguf_file

TYPES: Mapping[str, str] = {  # a file type of llama.cpp → the type of most of its tensors
    "IQ1_S": "IQ1_S", "IQ1_M": "IQ1_M", "IQ2_XXS": "IQ2_XXS", "IQ2_XS": "IQ2_XS", "IQ2_S": "IQ2_XS", "IQ2_M": "IQ2_S",
    "IQ3_XXS": "IQ3_XXS", "IQ3_XS": "IQ3_S", "IQ3_S": "IQ3_S", "IQ3_M": "IQ3_S", "IQ4_XS": "IQ4_XS", "IQ4_NL": "IQ4_NL",
    "Q2_K_S": "Q2_K", "Q2_K": "Q2_K", "Q3_K_S": "Q3_K", "Q3_K_M": "Q3_K", "Q3_K_L": "Q3_K", "Q4_K_S": "Q4_K",
    "Q4_K_M": "Q4_K", "Q5_K_S": "Q5_K", "Q5_K_M": "Q5_K", "Q6_K": "Q6_K",
    "Q4_0": "Q4_0", "Q4_1": "Q4_1", "Q5_0": "Q5_0", "Q5_1": "Q5_1", "Q8_0": "Q8_0",
}  # fmt: skip
IMATRIX_ONLY = ("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ2_M", "IQ3_XXS", "IQ3_XS", "Q2_K_S")
EMBEDDINGS = ("default", "same")
EMBEDDING_TENSORS = ("token_embd.weight", "output.weight")
log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class LlamaCpp:
    """The file type ``type`` of llama.cpp, whose rules choose a type of ggml for every tensor.

    ``imatrix``: weigh the errors of columns by an importance matrix, E[x²] of each input on the calibration windows.
    ``embedding``: ``default`` lets llama.cpp choose a larger type for the token embedding and the output head, ``same``
    stores them in the type of most tensors.  Where a row is no multiple of a type's block, llama.cpp takes a larger
    type; the allocation names the type of every tensor.
    """

    library: ClassVar[str] = "llama.cpp"
    type: str = "Q4_K_M"
    imatrix: bool = True
    embedding: str = "default"

    def __post_init__(self) -> None:
        if self.type not in TYPES:
            raise ValueError(f"unknown method.type {self.type!r}: choose among {', '.join(TYPES)}")
        if self.embedding not in EMBEDDINGS:
            raise ValueError(f"unknown method.embedding {self.embedding!r}: choose among {', '.join(EMBEDDINGS)}")
        if self.type in IMATRIX_ONLY and not self.imatrix:
            raise Unsupported(f"method.type={self.type}: llama.cpp refuses it without method.imatrix=true")

    def compress(self, context: CalibrationContext, rng: np.random.Generator) -> Compressed:
        """Quantize the model by llama.cpp; matrices beside the layers of the context stay in 32 bits.

        Raises MissingPackage if the library is not installed, ValueError for a model that cannot be written as GGUF or
        that llama.cpp refuses.
        """
        require(f"method.type={self.type}", ["gguf", "llama-cpp-python"], "llamacpp")
        assert context.calibration is not None
        model, _ = context.calibration
        gguf_architectures.check_writable(model)
        layout = gguf_architectures.layout(model)
        names = {layer.name: layout.names[f"{layer.name}.weight"] for layer in context.layers}
        matrices = [layout.names[name] for name, parameter in model.named_parameters() if parameter.ndim > 1]
        types = {name: "F32" for name in matrices if name not in names.values()}
        if self.embedding == "same":
            types |= {name: TYPES[self.type] for name in EMBEDDING_TENSORS if name in names.values()}
        importance: dict[str, Tensor] = {}
        if self.imatrix:
            moments = context.moments()
            importance = {names[layer.name]: column_importance(layer, moments) for layer in context.layers}
        with tempfile.TemporaryDirectory() as folder:
            full, small = pathlib.Path(folder) / "full.gguf", pathlib.Path(folder) / "small.gguf"
            gguf_file.write(model, full, "float32")
            for _ in context.track(range(1), "quantizing by llama.cpp"):
                quantize_file(full, small, self.type, importance, types)
            file_bytes = small.stat().st_size
            stored = gguf_file.read(small, layout)
        tensors = {layer.name: stored[f"{layer.name}.weight"] for layer in context.layers}
        weights = sum(layer.parameters for layer in context.layers)
        stored_bits = 8 * sum(tensor.content.nbytes for tensor in tensors.values())
        return Compressed(
            packed={name: tensor.content for name, tensor in tensors.items()},
            weights={name: tensor.values for name, tensor in tensors.items()},
            allocation="".join(f"{name} {tensor.type}\n" for name, tensor in tensors.items()),
            code_bits=sum(code_width(tensors[layer.name].type) * layer.parameters for layer in context.layers),
            metrics={"bits_per_weight_resident": stored_bits / weights},
            float_bits=32,
            foreign=self.library,
            file_bytes=file_bytes,
        )


def column_importance(layer: Layer, moments: Mapping[str, Moments]) -> Float[Tensor, " in"]:
    """Return E[x²] of each input column of a matrix, as llama.cpp's imatrix has it; ones if it is only looked up."""
    for module in layer.modules:
        if not moments[module].lookup:
            return moments[module].inputs.diagonal().float().cpu().contiguous()
    return torch.ones(layer.weight.shape[1])


def code_width(kind: str) -> int:
    """Return the bits of a code in a type of ggml, scales and other side information not counted.

    >>> code_width("Q4_0"), code_width("IQ2_XXS"), code_width("F32")
    (4, 2, 32)
    """
    return int(re.findall(r"\d+", kind)[0])


def quantize_file(
    full: pathlib.Path,
    small: pathlib.Path,
    file_type: str,
    importance: Mapping[str, Float[Tensor, " in"]],
    types: Mapping[str, str],
) -> None:
    """Let llama.cpp quantize the GGUF file ``full`` to ``small``, with as many threads as torch has.

    ``importance``: the importance matrix, tensor of the file → E[x²] by column; empty for none.  ``types``: tensors
    whose type is given; llama.cpp still replaces it where a row is no multiple of its block.  Raises ValueError with
    llama.cpp's own message if it refuses.
    """
    import gguf

    library, errors, _ = _library()
    parameters = library.llama_model_quantize_default_params()
    parameters.nthread = torch.get_num_threads()
    parameters.ftype = int(gguf.LlamaFileType[f"MOSTLY_{file_type}"])
    values = {name: value.numpy() for name, value in importance.items()}
    pointers = [
        library.llama_model_imatrix_data(name.encode(), part.ctypes.data_as(ctypes.POINTER(ctypes.c_float)), part.size)
        for name, part in values.items()
    ]
    matrix = (library.llama_model_imatrix_data * (len(pointers) + 1))(*pointers)
    if pointers:
        parameters.imatrix = matrix
    overrides = [
        library.llama_model_tensor_override(f"^{re.escape(name)}$".encode(), int(gguf.GGMLQuantizationType[kind]))
        for name, kind in types.items()
    ]
    patterns = (library.llama_model_tensor_override * (len(overrides) + 1))(*overrides)
    if overrides:
        parameters.tt_overrides = patterns
    errors.clear()
    if library.llama_model_quantize(str(full).encode(), str(small).encode(), ctypes.byref(parameters)):
        reason = " ".join(line.strip() for line in errors if line.strip("= \n")) or "no reason given"
        raise ValueError(f"llama.cpp could not quantize to {file_type}: {reason}")


@functools.cache
def _library() -> tuple[Any, list[str], Any]:
    """Return the bindings of llama.cpp, the list to which its errors are appended, and the callback that does it.

    The callback must live as long as the library.  All messages go to the log at level DEBUG.
    """
    import llama_cpp

    errors: list[str] = []
    error_level = 4  # GGML_LOG_LEVEL_ERROR

    def receive(level: int, text: bytes, _: Any) -> None:
        line = text.decode(errors="replace")
        if level == error_level:
            errors.append(line)
        log.debug("%s", line.rstrip())

    callback = llama_cpp.llama_log_callback(receive)
    llama_cpp.llama_backend_init()
    llama_cpp.llama_log_set(callback, ctypes.c_void_p(0))
    return llama_cpp, errors, callback
