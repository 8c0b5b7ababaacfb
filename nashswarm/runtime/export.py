"""Export a compressed model as one file for other runtimes: ONNX, or a program of torch.export.

The exported model takes token ids and a cache, of any batch size and length, and returns logits and the longer cache;
all rows of a batch have the same length.  Weights stay packed in the file (``portable``).  Tensors that are not
quantized are stored in 32 or 16 bits and cast to float32 where they are used.  An exported file is kept only if its
logits on real text agree with the model's; with 16 bits they are compared with a model that is rounded in the same way.

``onnx-qdq`` stores every matrix in standard operators alone, INT4 or INT8 with DequantizeLinear, for TensorRT and other
runtimes that read them.  Its weights take at least 4 bits, so the file may be larger than the packed checkpoint, and
onnxruntime dequantizes them at every call.
"""

import copy
import io
import logging
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicLayer

from nashswarm import errors
from nashswarm.packed.matrix import PackedMatrix
from nashswarm.packed.modules import set_activations
from nashswarm.records.files import write_by
from nashswarm.runtime.portable import Grouped, Planes, for_onnx, for_torch, in_tiles, portable
from nashswarm.runtime.qdq import OPSET, Digits

TARGETS = {"onnx": ".onnx", "onnx-qdq": ".onnx", "torch-export": ".pt2"}
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
ARCHITECTURES = ("gpt2", "llama")
GROWING_ROPE = ("dynamic", "longrope")  # their frequencies depend on the length of the text
PACKAGES = ("onnx", "onnxruntime", "onnxscript")
LARGEST = 2**31  # bytes of an ONNX file
PARITY = 1e-4  # tolerance: the largest difference of logits, relative to the largest logit
PROMPT, DECODED = 24, 8  # tokens of the text on which logits are compared
Run = Callable[[Tensor, Sequence[Tensor]], tuple[Tensor, Sequence[Tensor]]]


class Step(nn.Module):
    """One step of a model as a function of tensors: ids and a cache → logits and the longer cache.

    The cache lists keys and values of every layer in turn.  Parameters are cast to float32 where they are used.
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, past: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
        seen, new = past[0].shape[2], input_ids.shape[1]
        places = torch.arange(new) + seen
        hidden = torch.arange(seen + new) > places.unsqueeze(1)
        mask = hidden.float() * torch.finfo(torch.float32).min
        layers = [_layer(key, value) for key, value in zip(past[::2], past[1::2], strict=True)]
        inputs = {
            "input_ids": input_ids,
            "position_ids": places.unsqueeze(0),
            "attention_mask": mask[None, None],
            "past_key_values": Cache(layers=list(layers)),
            "use_cache": True,
        }
        floats = {name: part.float() for name, part in self.model.named_parameters()}
        output = torch.func.functional_call(self.model, floats, kwargs=inputs)
        longer = [part for layer in layers for part in (layer.keys, layer.values) if part is not None]
        return output.logits, longer


def check_exportable(model: Any, target: str, out: pathlib.Path, activations: str = "float32") -> None:
    """Raise ValueError if the model cannot be exported to ``target``, or not to the path ``out``."""
    kind = model.config.model_type
    if kind not in ARCHITECTURES or not model.can_generate():
        raise ValueError(
            f"{type(model).__name__} cannot be exported: only language models of {' and '.join(ARCHITECTURES)}"
        )
    rope = (getattr(model.config, "rope_parameters", None) or {}).get("rope_type")
    if rope in GROWING_ROPE:
        raise ValueError(f"rope_type={rope} depends on the length of the text, which no exported graph can follow")
    if out.suffix != TARGETS[target]:
        raise ValueError(f"--out {out}: name a file that ends in {TARGETS[target]}")
    if out.exists():
        raise ValueError(f"--out {out} exists; name another file or delete it")
    if target == "onnx-qdq" and activations != "float32":
        raise ValueError(f"--to onnx-qdq leaves inputs of products as they are: take --to onnx for {activations}")
    if target != "torch-export":
        for module in model.modules():
            if isinstance(module, PackedMatrix):
                in_tiles(module)
        errors.require(f"--to {target}", PACKAGES, "onnx")


def export(
    model: Any,
    target: str,
    out: pathlib.Path,
    tokens: Int[Tensor, "1 length"],
    activations: str,
    dtype: str = "float32",
) -> dict[str, float]:
    """Write the model to ``out``, and return its bytes, the number of matrices per layout, and its parity.

    ``parity`` is the largest difference of logits on ``tokens``, relative to the largest logit.  ``activations``: int8
    or float32, as in products of the model itself; in ONNX, MatMulNBits alone rounds to int8, and the file is compared
    with the model at float32.  ``dtype``: float32, float16 or bfloat16, for tensors that are not quantized;
    ``parity_rounded`` compares with a model whose tensors are rounded in the same way.  Raises ValueError if the logits
    of the file differ by more than the tolerance; then no file is written.
    """
    check_exportable(model, target, out, activations)
    layouts: dict[str, Callable[[PackedMatrix, str], nn.Module]]
    layouts = {
        "onnx": for_onnx,
        "onnx-qdq": lambda matrix, kind: Digits(in_tiles(matrix), kind),
        "torch-export": for_torch,
    }
    exported = _cast_parameters(portable(model, activations, layouts[target]), DTYPES[dtype]).eval()
    exported.set_attn_implementation("eager")
    metrics = _count_layouts(exported, target)
    program = trace(exported)
    native = target == "torch-export"

    def write(path: pathlib.Path) -> None:
        (_write_program if native else _write_onnx)(program, path, len(empty_cache(model)))
        run = torch.export.load(io.BytesIO(path.read_bytes())).module() if native else load_onnx(path)
        set_activations(model, activations if native else "float32")  # type: ignore[arg-type]
        difference = metrics["parity"] = compare_logits(model, run, tokens)
        if dtype != "float32":
            rounded = _cast_parameters(copy.deepcopy(model), DTYPES[dtype])
            rounded = _cast_parameters(rounded, torch.float32)
            difference = metrics["parity_rounded"] = compare_logits(rounded, run, tokens)
        if not difference <= PARITY and not (target == "onnx" and activations == "int8"):
            raise ValueError(f"the exported model's logits differ by {difference:.1e} of the largest: not written")

    write_by(out, write)
    return {"bytes_file": out.stat().st_size} | metrics


@torch.no_grad()
def trace(model: Any) -> torch.export.ExportedProgram:
    """Trace one step of the model to a graph, for any batch size, number of tokens and length of the cache."""
    batch, tokens, past = (torch.export.Dim(name) for name in ("batch", "tokens", "past"))
    cache = [part.new_zeros(2, part.shape[1], 5, part.shape[3]) for part in empty_cache(model)]
    ids = torch.zeros(2, 3, dtype=torch.long)
    shapes = {"input_ids": {0: batch, 1: tokens}, "past": [{0: batch, 2: past} for _ in cache]}
    return torch.export.export(Step(model), (ids, cache), dynamic_shapes=shapes, strict=False)


@torch.no_grad()
def compare_logits(model: Any, run: Run, tokens: Int[Tensor, "1 length"]) -> float:
    """Return the largest difference between the logits of a model and of a run, relative to the largest logit.

    Both process a prompt at once and then token by token, each with its own cache.  Raises ValueError if the text is
    too short.
    """
    if tokens.shape[1] < PROMPT + DECODED:
        raise ValueError(f"the text has {tokens.shape[1]} tokens, parity is checked on {PROMPT + DECODED}: give more")
    model_cache, run_cache, largest, difference = None, list(empty_cache(model)), 0.0, 0.0
    for part in (tokens[:, :PROMPT], *tokens[:, PROMPT : PROMPT + DECODED].split(1, 1)):
        output = model(input_ids=part, past_key_values=model_cache, use_cache=True)
        model_cache = output.past_key_values
        logits, longer = run(part, run_cache)
        run_cache = list(longer)
        largest = max(largest, float(output.logits.abs().max()))
        step = (logits - output.logits).abs().max()
        difference = max(difference, float(step) if step.isfinite() else float("inf"))
    return difference / largest


@torch.no_grad()
def _cast_parameters(model: Any, dtype: torch.dtype) -> Any:
    """Cast the parameters of the model in place.  Raises ValueError if a number does not fit the type."""
    for name, part in model.named_parameters():
        part.data = part.data.to(dtype)
        if not part.isfinite().all():
            raise ValueError(
                f"{name} holds numbers that {str(dtype).removeprefix('torch.')} cannot: take another --dtype"
            )
    return model


def _count_layouts(model: Any, target: str) -> dict[str, float]:
    """Count the matrices in each layout of the target."""
    modules = set(model.modules())
    if target == "onnx-qdq":
        widths = [module.bits for module in modules if isinstance(module, Digits)]
        return {f"matrices_int{bits}": widths.count(bits) for bits in (4, 8)}
    layouts = {"matrices_matmulnbits": Grouped, "matrices_unpacked_when_run": Planes} if target == "onnx" else {}
    return {name: sum(isinstance(module, kind) for module in modules) for name, kind in layouts.items()}


def empty_cache(model: Any) -> list[Tensor]:
    """Return the cache before the first token."""
    config = model.config
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return [torch.zeros(1, heads, 0, width) for _ in range(2 * config.num_hidden_layers)]


def _layer(key: Tensor, value: Tensor) -> DynamicLayer:
    layer = DynamicLayer()
    layer.keys, layer.values, layer.dtype, layer.device = key, value, key.dtype, key.device
    layer.is_initialized = True
    return layer


def _names(parts: int) -> tuple[list[str], list[str]]:
    """Name inputs and outputs as other exports of transformers' models do."""
    sides = [f"{layer}.{side}" for layer in range(parts // 2) for side in ("key", "value")]
    inputs, outputs = ([f"{name}.{side}" for side in sides] for name in ("past_key_values", "present"))
    return ["input_ids", *inputs], ["logits", *outputs]


def _write_onnx(program: torch.export.ExportedProgram, path: pathlib.Path, parts: int) -> None:
    from onnx_ir.passes.common import ClearMetadataAndDocStringPass, DeduplicateInitializersPass

    for name in ("onnx_ir", "torch.onnx"):  # they log every step
        logging.getLogger(name).setLevel(logging.ERROR)

    inputs, outputs = _names(parts)
    onnx_program = torch.onnx.export(
        program, input_names=inputs, output_names=outputs, opset_version=OPSET, verbose=False, optimize=False
    )
    assert onnx_program is not None
    model = onnx_program.model
    DeduplicateInitializersPass(size_limit=LARGEST)(model)  # a head that is tied to the embedding
    ClearMetadataAndDocStringPass()(model)  # the source location of every node
    _to_int4(model)
    size = sum(tensor.const_value.nbytes for tensor in model.graph.initializers.values())
    if size >= LARGEST:
        raise ValueError(f"{size:,} bytes of weights do not fit an ONNX file of 2 GiB: take --to torch-export")
    onnx_program.save(path, external_data=False)


def _to_int4(model: Any) -> None:
    """Narrow the codes of blocks from int8 to INT4, a type that torch does not have."""
    import onnx_ir

    for node in model.graph:
        if node.op_type == "DequantizeLinear" and "block_size" in node.attributes:
            codes = node.inputs[0]
            codes.const_value = onnx_ir.tensor(codes.const_value.numpy(), onnx_ir.DataType.INT4, name=codes.name)
            codes.type = onnx_ir.TensorType(onnx_ir.DataType.INT4)


def _write_program(program: torch.export.ExportedProgram, path: pathlib.Path, parts: int) -> None:
    with path.open("wb") as file:
        torch.export.save(program, file)


def load_onnx(path: pathlib.Path, providers: Sequence[str] = ("CPUExecutionProvider",)) -> Run:
    """Load a model into onnxruntime with its default options."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(str(path), options, list(providers))

    def run(ids: Tensor, cache: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
        names, _ = _names(len(cache))
        inputs = dict(zip(names, (part.numpy() for part in (ids, *cache)), strict=True))
        logits, *longer = (torch.from_numpy(part) for part in session.run(None, inputs))
        return logits, longer

    return run
