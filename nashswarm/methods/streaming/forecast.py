"""What compression by layer will take.

Bytes are exact and come from shapes alone; seconds and memory come from the rates at which this machine computes a
small sample.  The time to read the checkpoint from the disk comes on top.
"""

import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from nashswarm import memory
from nashswarm.methods.streaming.block import SHARED_INPUTS
from nashswarm.methods.streaming.layout import descriptions, file_bytes, layout
from nashswarm.methods.streaming.settings import ByLayer
from nashswarm.methods.streaming.shards import EMBEDDING, NORM, tensors_of, units
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
    product = _seconds(lambda: weight @ hessian) / (SAMPLE_ROWS * SAMPLE_COLUMNS**2)
    bits, scheme = settings.bits, settings.scheme
    quantizing = _seconds(lambda: pack(quantize_layer(weight, bits, scheme, curvature, settings.sweeps, factor=factor)))
    return Rates(
        product=product,
        factor=_seconds(lambda: inverse_cholesky(hessian)) / SAMPLE_COLUMNS**3,
        reply=max(quantizing / weight.numel() - PRODUCTS_PER_WEIGHT * SAMPLE_COLUMNS * product, 0.0),
        rounding=_seconds(lambda: pack(quantize(weight, bits, scheme))) / weight.numel(),
    )


def forecast(model: Any, settings: ByLayer, windows: int, length: int, rates: Rates) -> Forecast:
    """Return the forecast for a model without memory and ``windows`` calibration windows of ``length`` tokens."""
    size = file_bytes_of(model, settings)
    parameters = sum(part.numel() for part in tensors_of(model).values())
    state_bytes = 4 * windows * length * model.config.hidden_size
    unit_by_kind = _unit_by_kind(model)
    count = {kind: sum(unit[0].startswith(kind) for unit in units(model.config)) for kind in unit_by_kind}
    seconds = sum(
        count[kind] * _seconds_of(model, unit, windows * length, length, rates) for kind, unit in unit_by_kind.items()
    )
    peak = memory.peak_bytes() + working_bytes(model, windows, length)
    return Forecast(parameters, size, 8 * size / parameters, 2 * state_bytes, seconds, peak)


def file_bytes_of(model: Any, settings: ByLayer) -> int:
    """Return the bytes of the compressed checkpoint, exact, from shapes alone."""
    files = layout(model, settings)
    described = descriptions(model.config, files, checksum="00000000")
    return sum(map(file_bytes, files.values())) + sum(map(len, described.values()))


def working_bytes(model: Any, windows: int, length: int) -> int:
    """Return the bytes of memory that compression adds to those of the process, from shapes alone."""
    state_bytes = 4 * windows * length * model.config.hidden_size
    return max(_memory_of(model, unit, state_bytes) for unit in _unit_by_kind(model).values())


def _unit_by_kind(model: Any) -> dict[str, tuple[str, ...]]:
    """Return one unit of every kind; all decoder blocks are alike."""
    return {unit[0].rstrip("0123456789"): unit for unit in units(model.config)}


def _seconds_of(model: Any, unit: Sequence[str], tokens: int, length: int, rates: Rates) -> float:
    if unit[0] == EMBEDDING:
        return rates.rounding * _numel(model, EMBEDDING)
    seconds = 0.0
    for group in _groups(unit):
        columns = _columns(model, group[0])
        seconds += rates.factor * columns**3 + rates.product * tokens * columns**2
        for name in group:
            seconds += (rates.reply + PRODUCTS_PER_WEIGHT * columns * rates.product) * _numel(model, name)
            if unit[0] != NORM:  # a forward pass through the full block and one through the compressed block
                seconds += 2 * rates.product * tokens * _numel(model, name)
    if unit[0] != NORM:
        seconds += 2 * rates.product * 2 * tokens * length * model.config.hidden_size
    return seconds


def _memory_of(model: Any, unit: Sequence[str], state_bytes: int) -> int:
    """Return the bytes of memory that the unit adds to those of the process."""
    if unit[0] == EMBEDDING:
        return max(CODE_BYTES * _numel(model, EMBEDDING), CHUNK_BYTES * CHUNK_WEIGHTS) + state_bytes
    groups = list(_groups(unit))
    block = 0 if unit[0] == NORM else 4 * sum(_numel(model, name) for group in groups for name in group)
    most = 0
    for number, group in enumerate(groups):
        columns = _columns(model, group[0])
        moments = 4 * sum(_columns(model, other[0]) ** 2 for other in groups[number:])
        codes = max(_numel(model, name) for name in group)
        factoring = (4 + FACTOR_BYTES) * columns**2
        quantizing = 4 * columns**2 + CHUNK_BYTES * CHUNK_WEIGHTS + 2 * codes
        packing = 4 * columns**2 + CODE_BYTES * codes
        most = max(most, moments + max(factoring, quantizing, packing))
    return block + 3 * state_bytes + most


def _groups(unit: Sequence[str]) -> Iterator[tuple[str, ...]]:
    """Yield the matrices of a unit that are compressed with one H."""
    if unit[0] == NORM:
        yield (unit[1],)
        return
    for group in SHARED_INPUTS:
        yield tuple(f"{unit[0]}.{part}" for part in group)


def _numel(model: Any, name: str) -> int:
    return int(model.get_submodule(name).weight.numel())


def _columns(model: Any, name: str) -> int:
    return int(model.get_submodule(name).weight.shape[1])


def _seconds(call: Callable[[], Any]) -> float:
    """Return the least processor seconds per thread of a few calls."""
    measured = []
    for _ in range(REPEATS):
        started = time.process_time()
        call()
        measured.append((time.process_time() - started) / torch.get_num_threads())
    return min(measured)
