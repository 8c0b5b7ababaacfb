"""Compression of one unit: an embedding, a decoder block, or the head.

A block is calibrated on its inputs as the compressed blocks before it compute them: H = E[x xᵀ] of every matrix.
Without gradients every output has the same weight (f = 1), so that the damage is the squared error of a matrix's
outputs, ``½ Σ_o e_oᵀ H e_o``, and the codes are those of ``quantize_layer``.  The head is treated as the last matrix;
an embedding is rounded to nearest.
"""

import dataclasses
from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRMSNorm, LlamaRotaryEmbedding

from nashswarm.methods.streaming.layout import FLOAT_BITS
from nashswarm.methods.streaming.settings import ByLayer
from nashswarm.methods.streaming.shards import EMBEDDING, NORM, Source
from nashswarm.packed import file_format
from nashswarm.quant.coordinate_descent import quantize_layer
from nashswarm.quant.curvature import TINY, Curvature, inverse_cholesky
from nashswarm.quant.error_feedback import row_chunks
from nashswarm.quant.grid import QuantizedTensor, quantize, row_blocks
from nashswarm.quant.pack import pack

SHARED_INPUTS = (  # matrices of a block that read the same input
    ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    ("self_attn.o_proj",),
    ("mlp.gate_proj", "mlp.up_proj"),
    ("mlp.down_proj",),
)
HiddenStates = Float[Tensor, "windows length hidden"]


@dataclasses.dataclass(frozen=True)
class CompressedUnit:
    """The stored ``tensors`` of a unit by name, and the hidden states that it computes with them (None for the head).

    ``error``: of a decoder block, the squared distance of its outputs from those of the full block on the same inputs,
    relative to the square of what the full block adds to its inputs.
    """

    tensors: dict[str, Tensor]
    outputs: HiddenStates | None = None
    error: float | None = None


@torch.no_grad()
def compress_unit(
    source: Source,
    unit: tuple[str, ...],
    inputs: HiddenStates | None,
    windows: Int[Tensor, "windows length"],
    settings: ByLayer,
) -> CompressedUnit:
    """Compress the modules of ``unit``.  ``inputs``: hidden states that it reads, None for an embedding."""
    if inputs is None:
        return _embedding(source, windows, settings)
    if NORM in unit:
        return _head(source, unit[1], inputs, settings)
    return _decoder_block(source, unit[0], inputs, settings)


def _embedding(source: Source, windows: Int[Tensor, "windows length"], settings: ByLayer) -> CompressedUnit:
    weight = source.shards[f"{EMBEDDING}.weight"]
    bits = settings.width(EMBEDDING)
    tensor = _concatenate([quantize(weight[rows].float(), bits, settings.scheme) for rows in row_chunks(weight)])
    ids, positions = windows.unique(return_inverse=True)
    return CompressedUnit({f"{EMBEDDING}.weight": _packed(tensor)}, _select_rows(tensor, ids).dequantize()[positions])


def _head(source: Source, name: str, inputs: HiddenStates, settings: ByLayer) -> CompressedUnit:
    norm = LlamaRMSNorm(source.config.hidden_size, source.config.rms_norm_eps)
    gain = source.shards[f"{NORM}.weight"].float()
    norm.weight.copy_(gain)
    moment = torch.zeros(inputs.shape[-1], inputs.shape[-1])
    for window in inputs:
        _add_products(moment, norm(window))
    moment.div_(len(inputs) * inputs.shape[1])
    factor = _inverse_cholesky(moment, settings)
    tensor = _quantize(source.shards[f"{name}.weight"], settings.width(name), moment, factor, settings)
    norms = file_format.to_stored_floats({f"{NORM}.weight": gain}, FLOAT_BITS)
    return CompressedUnit({f"{name}.weight": _packed(tensor)} | norms)


def _decoder_block(source: Source, name: str, inputs: HiddenStates, settings: ByLayer) -> CompressedUnit:
    with torch.device("meta"):
        block = LlamaDecoderLayer(source.config, int(name.rpartition(".")[2])).eval()
    weights = {part: source.shards[f"{name}.{part}"].float() for part in block.state_dict()}
    block.load_state_dict(weights, assign=True)
    full_outputs, moments = _calibrate(source, block, inputs)
    matrices = {f"{part}.weight" for group in SHARED_INPUTS for part in group}
    others = {f"{name}.{part}": weight for part, weight in weights.items() if part not in matrices}
    tensors = file_format.to_stored_floats(others, FLOAT_BITS)
    for group in SHARED_INPUTS:
        moment = moments.pop(group)
        factor = _inverse_cholesky(moment, settings)
        for part in group:
            weight = weights[f"{part}.weight"]
            tensor = _quantize(weight, settings.bits, moment, factor, settings)
            for rows in row_chunks(weight):
                weight[rows] = _select_rows(tensor, rows).dequantize()
            tensors[f"{name}.{part}.weight"] = _packed(tensor)
    outputs = _run(source, block, inputs)
    error, added = (
        (later - earlier).double().square().sum()
        for later, earlier in ((outputs, full_outputs), (full_outputs, inputs))
    )
    return CompressedUnit(tensors, outputs, float(error / added.clamp(min=TINY)))


def _calibrate(
    source: Source, block: nn.Module, inputs: HiddenStates
) -> tuple[HiddenStates, dict[tuple[str, ...], Float[Tensor, "in in"]]]:
    """Return the outputs of the full block, and E[x xᵀ] of the inputs of every group of matrices that share one."""
    moments: dict[tuple[str, ...], Tensor] = {}
    handles = []
    for group in SHARED_INPUTS:
        columns = block.get_parameter(f"{group[0]}.weight").shape[1]
        moment = moments[group] = torch.zeros(columns, columns)
        handles.append(
            block.get_submodule(group[0]).register_forward_pre_hook(
                lambda _, arguments, moment=moment: _add_products(moment, arguments[0])
            )
        )
    outputs = _run(source, block, inputs)
    for handle in handles:
        handle.remove()
    for moment in moments.values():
        moment.div_(len(inputs) * inputs.shape[1])
    return outputs, moments


def _run(source: Source, block: nn.Module, inputs: HiddenStates) -> HiddenStates:
    """Return the outputs of ``block``, computed window by window."""
    positions = torch.arange(inputs.shape[1]).unsqueeze(0)
    rotation = LlamaRotaryEmbedding(source.config)(inputs[:1], positions)
    outputs = torch.empty_like(inputs)
    for number, window in enumerate(inputs):
        outputs[number] = block(window.unsqueeze(0), position_ids=positions, position_embeddings=rotation)[0]
    return outputs


def _add_products(moment: Float[Tensor, "in in"], inputs: Float[Tensor, "*positions in"]) -> None:
    """Add Σ x xᵀ over all positions to ``moment``."""
    flat = inputs.flatten(0, -2)
    moment.addmm_(flat.T, flat)


def _inverse_cholesky(moment: Float[Tensor, "in in"], settings: ByLayer) -> Float[Tensor, "in in"]:
    damped = Curvature(torch.ones(1), moment, None).damped(settings.damping).inputs
    assert damped is not None
    return inverse_cholesky(damped)


def _quantize(
    weight: Float[Tensor, "out in"],
    bits: int,
    moment: Float[Tensor, "in in"],
    factor: Float[Tensor, "in in"],
    settings: ByLayer,
) -> QuantizedTensor:
    """Quantize ``weight`` some rows at a time, which bounds the memory for temporary values."""
    parts = []
    for rows in row_chunks(weight):
        chunk = weight[rows].float()
        curvature = Curvature(torch.ones(len(chunk)), moment, None)
        parts.append(
            quantize_layer(chunk, bits, settings.scheme, curvature, settings.sweeps, settings.damping, factor=factor)
        )
    return _concatenate(parts)


def _concatenate(parts: Sequence[QuantizedTensor]) -> QuantizedTensor:
    """Return the rows of all ``parts``, one after another."""
    fields = ("codes", "scale", "zero_point", "bits")
    codes, scale, zero_point, bits = (torch.cat([getattr(part, name) for part in parts]) for name in fields)
    return QuantizedTensor(codes, scale, zero_point, bits, parts[0].scheme)


def _select_rows(tensor: QuantizedTensor, rows: Tensor | slice) -> QuantizedTensor:
    """Return some rows of a matrix whose tiles all have one width."""
    codes, scale, zero_point = tensor.codes[rows], tensor.scale[rows], tensor.zero_point[rows]
    return QuantizedTensor(codes, scale, zero_point, tensor.bits[: row_blocks(len(codes))], tensor.scheme)


def _packed(tensor: QuantizedTensor) -> Tensor:
    return torch.from_numpy(pack(tensor).copy())
