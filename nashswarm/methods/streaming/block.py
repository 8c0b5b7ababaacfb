"""Compression of one unit: an embedding, a decoder block, or the head with everything else outside of blocks.

A block is calibrated on its inputs as the compressed blocks before it compute them: H = E[x xᵀ] of every matrix.
Without gradients every output has the same weight (f = 1), so that the damage is the squared error of a matrix's
outputs, ``½ Σ_o e_oᵀ H e_o``, and the codes are those of ``quantize_layer``.  The head is treated as the last matrix;
an embedding is rounded to nearest.  What is outside of blocks and no embedding or head is kept at 16 bits.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from nashswarm.methods.streaming.layout import FLOAT_BITS
from nashswarm.methods.streaming.moments import add_products, block_outputs, calibrate, counted_rows, jobs, passes
from nashswarm.methods.streaming.settings import ByLayer
from nashswarm.methods.streaming.shards import Source
from nashswarm.methods.streaming.skeleton import BLOCK, EMBEDDING, Unit, structure_of, weight_of
from nashswarm.methods.streaming.surroundings import Surroundings
from nashswarm.models.matrices import set_weights
from nashswarm.packed import file_format
from nashswarm.quant.coordinate_descent import quantize_layer
from nashswarm.quant.curvature import TINY, Curvature, inverse_cholesky
from nashswarm.quant.error_feedback import row_chunks
from nashswarm.quant.grid import QuantizedTensor, quantize, row_blocks
from nashswarm.quant.pack import pack, unpack

HiddenStates = Float[Tensor, "windows length *width"]
Windows = Int[Tensor, "windows length"]


@dataclasses.dataclass(frozen=True)
class States:
    """What is passed from unit to unit: hidden states, and the ``rows`` of the embedding for the tokens that occur.

    The rows are those of the compressed embedding, unless that is the head and compressed last.
    """

    hidden: HiddenStates
    rows: Float[Tensor, "tokens hidden"]


@dataclasses.dataclass(frozen=True)
class CompressedUnit:
    """The stored ``tensors`` of a unit by name, and the states that it computes with them (None for the head).

    ``error``: of a decoder block, the squared distance of its outputs from those of the full block on the same inputs,
    relative to the square of what the full block adds to its inputs.
    """

    tensors: dict[str, Tensor]
    outputs: States | None = None
    error: float | None = None


@torch.no_grad()
def compress_unit(
    source: Source, unit: Unit, inputs: States | None, windows: Windows, settings: ByLayer
) -> CompressedUnit:
    """Compress ``unit``.  ``inputs``: the states that it reads, None for an embedding."""
    if unit.kind == EMBEDDING:
        return _embedding(source, unit, windows, settings)
    assert inputs is not None
    if unit.kind == BLOCK:
        return _decoder_block(source, unit, inputs, windows, settings)
    return _head(source, unit, inputs, windows, settings)


@torch.no_grad()
def first_states(source: Source, windows: Windows) -> States:
    """Return the states that the first block reads where the embedding is not compressed before it."""
    ids = windows.unique()
    rows = source.mapped(f"{structure_of(source.model).embedding}.weight")[ids].float()
    surroundings = source.surroundings(ids, rows)
    return States(torch.cat([surroundings.call(window, 0).hidden for window in windows]), rows)


def _embedding(source: Source, unit: Unit, windows: Windows, settings: ByLayer) -> CompressedUnit:
    name = unit.matrices[0][0]
    weight, bits = source.mapped(f"{name}.weight"), settings.outer_bits
    tensor = _concatenate([quantize(weight[rows].float(), bits, settings.scheme) for rows in row_chunks(weight)])
    ids = windows.unique()
    rows = _select_rows(tensor, ids).dequantize()
    surroundings = source.surroundings(ids, rows)
    outputs = States(torch.cat([surroundings.call(window, 0).hidden for window in windows]), rows)
    others = _outside(surroundings, [part for part in unit.tensors if part != f"{name}.weight"])
    return CompressedUnit({f"{name}.weight": _packed(tensor)} | others, outputs)


def _head(source: Source, unit: Unit, inputs: States, windows: Windows, settings: ByLayer) -> CompressedUnit:
    name = unit.matrices[0][0]
    weight = source.mapped(f"{name}.weight")
    surroundings = source.surroundings(windows.unique(), inputs.rows)
    moment = torch.zeros(weight.shape[1], weight.shape[1])
    for window, states in zip(windows, inputs.hidden, strict=True):
        add_products(moment, surroundings.head_inputs(window, states))
    moment.div_(windows.numel())
    others = _outside(surroundings, [part for part in unit.tensors if part != f"{name}.weight"])
    del surroundings
    tensor = _quantize(weight, settings.outer_bits, moment, _inverse_cholesky(moment, settings), settings)
    return CompressedUnit({f"{name}.weight": _packed(tensor)} | others)


def _outside(surroundings: Surroundings, names: Sequence[str]) -> dict[str, Tensor]:
    tensors = surroundings.model.state_dict()
    return file_format.to_stored_floats({name: tensors[name] for name in names}, FLOAT_BITS)


def _decoder_block(source: Source, unit: Unit, inputs: States, windows: Windows, settings: ByLayer) -> CompressedUnit:
    name = unit.modules[0]
    surroundings = source.surroundings(windows.unique(), inputs.rows)
    number = structure_of(source.model).blocks.index(name)
    calls = [surroundings.call(window, number) for window in windows]
    del surroundings
    block: Any = source.block(name)
    matrices = [tuple(matrix.removeprefix(f"{name}.") for matrix in group) for group in unit.matrices]
    compressed = {f"{matrix}.weight" for group in matrices for matrix in group}
    others = {f"{name}.{part}": weight for part, weight in block.state_dict().items() if part not in compressed}
    tensors = file_format.to_stored_floats(others, FLOAT_BITS)
    with counted_rows(block, [matrix for group in matrices for matrix in group]) as rows:
        full_outputs = block_outputs(block, calls, inputs.hidden)
    for listed in passes(block, jobs(matrices, rows)):
        moments = calibrate(block, calls, inputs.hidden, listed)
        while moments:
            job, moment = moments.pop(0)
            factor = _inverse_cholesky(moment, settings)
            for part in job.matrices:
                tensor = _quantize(weight_of(block.get_submodule(part)), settings.bits, moment, factor, settings)
                tensors[f"{name}.{part}.weight"] = _packed(tensor)
                del tensor
            del moment, factor
    for part in rows:
        set_weights(block, {part: unpack(tensors[f"{name}.{part}.weight"].numpy()).dequantize()})
    outputs = block_outputs(block, calls, inputs.hidden)
    error, added = (
        (later - earlier).double().square().sum()
        for later, earlier in ((outputs, full_outputs), (full_outputs, inputs.hidden))
    )
    return CompressedUnit(tensors, States(outputs, inputs.rows), float(error / added.clamp(min=TINY)))


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
