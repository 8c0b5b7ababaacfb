"""What compression by layer at one width will take.

Bytes are exact and come from shapes alone; seconds and memory come from the rates at which this machine computes a
small sample.  The time to read the checkpoint from the disk comes on top.
"""

import dataclasses
import time
from collections.abc import Callable
from typing import Any

import torch

from nashswarm import memory
from nashswarm.methods.streaming.layout import descriptions, file_bytes, layout
from nashswarm.methods.streaming.moments import Job, jobs, passes
from nashswarm.methods.streaming.settings import ByLayer
from nashswarm.methods.streaming.skeleton import BLOCK, EMBEDDING, Unit, shape_of, structure_of, tensors_of, units
from nashswarm.quant.coordinate_descent import quantize_layer
from nashswarm.quant.curvature import Curvature, inverse_cholesky
from nashswarm.quant.error_feedback import CHUNK_WEIGHTS
from nashswarm.quant.grid import quantize
from nashswarm.quant.pack import pack

SAMPLE_COLUMNS = 1536
SAMPLE_ROWS = 1024
REPEATS = 3
PRODUCTS_PER_WEIGHT = 2.5  # multiply-adds per weight and column of a matrix: two damages and half a product in the pass
FACTOR_BYTES = 3 * 8  # per entry of H while it is factored in double precision
CHUNK_BYTES = 20 * 4  # per weight of a chunk of rows that is quantized together
CHOSEN = ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_top_k", "top_k_experts")  # in configs
CODE_BYTES = 6  # per code of a matrix while it is packed


@dataclasses.dataclass(frozen=True)
class Rates:
    """Seconds that elementary steps take on this machine.

    ``product``: one multiply-add in a product of float32 matrices.  ``factor``: factoring H, divided by its columns
    cubed.  ``reply``: quantizing one weight, without the products that it takes.  ``rounding``: rounding one weight to
    nearest.  The last two include packing.
    """

    product: float
    factor: float
    reply: float
    rounding: float


@dataclasses.dataclass(frozen=True)
class Forecast:
    """What a run will take.

    ``bytes_file``: of the compressed checkpoint, exact.  ``peak_bytes``: the largest resident set, without mapped
    files.  ``bytes_states``: of the hidden states, on the disk while the run lasts.
    """

    parameters: int
    bytes_file: int
    bits_per_weight_model: float
    bytes_states: int
    seconds: float
    peak_bytes: int


def rates(settings: ByLayer) -> Rates:
    """Measure the rates on a sample, which takes seconds."""
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(2 * SAMPLE_COLUMNS, SAMPLE_COLUMNS, generator=generator)
    weight = torch.randn(SAMPLE_ROWS, SAMPLE_COLUMNS, generator=generator)
    curvature = Curvature(torch.ones(SAMPLE_ROWS), inputs.T @ inputs / len(inputs), None).damped(settings.damping)
    assert curvature.inputs is not None
    hessian, factor = curvature.inputs, inverse_cholesky(curvature.inputs)
    product = least_seconds(lambda: weight @ hessian) / (SAMPLE_ROWS * SAMPLE_COLUMNS**2)
    bits, scheme = settings.bits, settings.scheme
    quantizing = least_seconds(
        lambda: pack(quantize_layer(weight, bits, scheme, curvature, settings.sweeps, factor=factor))
    )
    return Rates(
        product=product,
        factor=least_seconds(lambda: inverse_cholesky(hessian)) / SAMPLE_COLUMNS**3,
        reply=max(quantizing / weight.numel() - PRODUCTS_PER_WEIGHT * SAMPLE_COLUMNS * product, 0.0),
        rounding=least_seconds(lambda: pack(quantize(weight, bits, scheme))) / weight.numel(),
    )


def forecast(model: Any, settings: ByLayer, windows: int, length: int, rates: Rates) -> Forecast:
    """Return the forecast for a model without memory and ``windows`` calibration windows of ``length`` tokens."""
    size = file_bytes_of(model, settings)
    parameters = sum(part.numel() for part in tensors_of(model).values())
    state_bytes = 4 * windows * length * structure_of(model).width
    seconds = sum(
        count * _seconds_of(model, unit, windows * length, length, rates) for unit, count in unlike_units(model)
    )
    peak = memory.peak_bytes() + working_bytes(model, windows, length)
    return Forecast(parameters, size, 8 * size / parameters, 2 * state_bytes, seconds, peak)


def file_bytes_of(model: Any, settings: ByLayer) -> int:
    """Return the bytes of the compressed checkpoint, exact, from shapes alone."""
    files = layout(model, settings)
    described = descriptions(model, files, checksum="00000000")
    return sum(map(file_bytes, files.values())) + sum(map(len, described.values()))


def working_bytes(model: Any, windows: int, length: int) -> int:
    """Return the bytes of memory that compression adds to those of the process, from shapes alone."""
    state_bytes = 4 * windows * length * structure_of(model).width
    return max(_memory_of(model, unit, state_bytes) for unit, _ in unlike_units(model))


def unlike_units(model: Any) -> list[tuple[Unit, int]]:
    """Return one unit of every kind and shape, and how many there are like it."""
    tensors = tensors_of(model)
    alike: dict[Any, list[Unit]] = {}
    for unit in units(model):
        shapes = tuple((name.removeprefix(unit.modules[0]), tensors[name].shape) for name in unit.tensors)
        alike.setdefault((unit.kind, shapes), []).append(unit)
    return [(found[0], len(found)) for found in alike.values()]


def _seconds_of(model: Any, unit: Unit, tokens: int, length: int, rates: Rates) -> float:
    if unit.kind == EMBEDDING:
        return rates.rounding * numel_of(model, unit.matrices[0][0])
    seconds, forward = 0.0, 0.0
    for group in unit.matrices:
        columns = columns_of(model, group[0])
        read = tokens * share_of_tokens(model, group[0])
        seconds += rates.factor * columns**3 + rates.product * read * columns**2
        for name in group:
            seconds += (rates.reply + PRODUCTS_PER_WEIGHT * columns * rates.product) * numel_of(model, name)
            forward += rates.product * read * numel_of(model, name)
    if unit.kind == BLOCK:
        forward += rates.product * 2 * tokens * length * model.config.get_text_config().hidden_size
        seconds += forward * (2 + len(_passes(model, unit)))
    return seconds


def _memory_of(model: Any, unit: Unit, state_bytes: int) -> int:
    """Return the bytes of memory that the unit adds to those of the process."""
    if unit.kind == EMBEDDING:
        weights = numel_of(model, unit.matrices[0][0])
        return max(CODE_BYTES * weights, CHUNK_BYTES * CHUNK_WEIGHTS) + state_bytes
    tensors = tensors_of(model)
    block, most = 0, 0
    if unit.kind == BLOCK:
        block = 4 * sum(tensors[name].numel() for name in unit.tensors)
        experts = 4 * sum(numel_of(model, name) for group in unit.matrices for name in group if is_expert(model, name))
        most = experts  # while the fused experts are split
    for listed in _passes(model, unit):
        for number, job in enumerate(listed):
            columns = columns_of(model, job.matrices[0])
            moments = 4 * sum(columns_of(model, other.matrices[0]) ** 2 for other in listed[number:])
            codes = max(numel_of(model, name) for name in job.matrices)
            factoring = (4 + FACTOR_BYTES) * columns**2
            quantizing = 4 * columns**2 + CHUNK_BYTES * CHUNK_WEIGHTS + 2 * codes
            packing = 4 * columns**2 + CODE_BYTES * codes
            most = max(most, moments + max(factoring, quantizing, packing))
    return block + 3 * state_bytes + most


def _passes(model: Any, unit: Unit) -> list[list[Job]]:
    """Return the passes in which the moments of a unit are gathered, if every expert is reached."""
    if unit.kind != BLOCK:
        return [[Job(group, group) for group in unit.matrices]]
    name = f"{unit.modules[0]}."
    groups = [tuple(matrix.removeprefix(name) for matrix in group) for group in unit.matrices]
    rows = {matrix: 1 for group in groups for matrix in group}
    return [
        [Job(*(tuple(f"{name}{matrix}" for matrix in part) for part in (job.matrices, job.readers))) for job in listed]
        for listed in passes(model.get_submodule(unit.modules[0]), jobs(groups, rows))
    ]


def is_expert(model: Any, name: str) -> bool:
    """Whether a matrix belongs to an expert that tokens are routed to."""
    return bool(getattr(model.get_submodule(name), "routed", False))


def share_of_tokens(model: Any, name: str) -> float:
    """Return the share of all tokens that a matrix reads, if experts are used equally."""
    if not is_expert(model, name):
        return 1.0
    experts = len(model.get_submodule(name.rpartition(".")[0].rpartition(".")[0]))
    config = model.config.get_text_config()
    chosen = next((getattr(config, key) for key in CHOSEN if isinstance(getattr(config, key, None), int)), experts)
    return float(min(chosen / experts, 1.0))


def numel_of(model: Any, name: str) -> int:
    """Return the number of weights of a matrix."""
    return int(model.get_submodule(name).weight.numel())


def columns_of(model: Any, name: str) -> int:
    """Return the number of columns of a matrix."""
    return shape_of(model.get_submodule(name))[1]


def least_seconds(call: Callable[[], Any]) -> float:
    """Return the least processor seconds per thread of a few calls."""
    measured = []
    for _ in range(REPEATS):
        started = time.process_time()
        call()
        measured.append((time.process_time() - started) / torch.get_num_threads())
    return min(measured)
