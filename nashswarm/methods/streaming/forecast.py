"""What compressing by layer will take: bytes to the last one, from shapes alone; seconds and memory, from the rates at
which this machine does a small part of it.  Reading the checkpoint from the disk comes on top."""

import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from nashswarm import memory
from nashswarm.methods.streaming.compress import SHARED_INPUTS, ByLayer, descriptions, layout
from nashswarm.methods.streaming.shards import EMBEDDING, NORM, file_bytes, tensors_of, units
from nashswarm.quant.coordinate_descent import quantize_layer
from nashswarm.quant.curvature import Curvature, inverse_cholesky
from nashswarm.quant.error_feedback import CHUNK_WEIGHTS
from nashswarm.quant.grid import quantize
from nashswarm.quant.pack import pack

SIZE = 1536  # columns of the sample
ROWS = 1024  # of the sample
ROUNDS = 3
REPLY_PRODUCTS = 2.5  # in units of out · in²: two damages, and half a product in the pass
PIVOTS = 3 * 8  # bytes for every entry of H while it is factored, in double precision
PIECE = 20 * 4  # bytes for every weight that replies together
CODES = 6  # bytes for every code of a matrix while it is packed


@dataclasses.dataclass(frozen=True)
class Rates:
    """Seconds of this machine: of a multiply-add in products of 32-bit floats, of factoring H divided by its columns
    cubed, of a weight's reply beside the products in it, and of a weight's plain rounding; both with packing."""

    product: float
    factor: float
    reply: float
    rounding: float


@dataclasses.dataclass(frozen=True)
class Forecast:
    """``bytes_file``: of the compressed checkpoint, exact.  ``peak_bytes``: the largest resident set, without what is
    mapped.  ``bytes_states``: of what the windows have become, on the disk while it runs."""

    parameters: int
    bytes_file: int
    bits_per_weight_model: float
    bytes_states: int
    seconds: float
    peak_bytes: int


def rates(settings: ByLayer) -> Rates:
    """The rates, from a sample that takes seconds."""
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(2 * SIZE, SIZE, generator=generator)
    weight = torch.randn(ROWS, SIZE, generator=generator)
    curved = Curvature(torch.ones(ROWS), inputs.T @ inputs / len(inputs), None).damped(settings.damping)
    assert curved.inputs is not None
    hessian, factor = curved.inputs, inverse_cholesky(curved.inputs)
    product = _seconds(lambda: weight @ hessian) / (ROWS * SIZE**2)
    bits, scheme = settings.bits, settings.scheme
    whole = _seconds(lambda: pack(quantize_layer(weight, bits, scheme, curved, settings.sweeps, factor=factor)))
    return Rates(
        product=product,
        factor=_seconds(lambda: inverse_cholesky(hessian)) / SIZE**3,
        reply=max(whole / (ROWS * SIZE) - REPLY_PRODUCTS * SIZE * product, 0.0),
        rounding=_seconds(lambda: pack(quantize(weight, bits, scheme))) / (ROWS * SIZE),
    )


def forecast(model: Any, settings: ByLayer, windows: int, length: int, rates: Rates) -> Forecast:
    """Of a model without memory, compressed with so many windows."""
    size = file_bytes_of(model, settings)
    parameters = sum(part.numel() for part in tensors_of(model).values())
    states = 4 * windows * length * model.config.hidden_size
    kinds = _kinds(model)
    count = {kind: sum(unit[0].startswith(kind) for unit in units(model.config)) for kind in kinds}
    seconds = sum(
        count[kind] * _seconds_of(model, unit, windows * length, length, rates) for kind, unit in kinds.items()
    )
    peak = memory.peak_bytes() + working_bytes(model, windows, length)
    return Forecast(parameters, size, 8 * size / parameters, 2 * states, seconds, peak)


def file_bytes_of(model: Any, settings: ByLayer) -> int:
    """Of the compressed checkpoint, exact, from shapes alone."""
    files = layout(model, settings)
    return sum(map(file_bytes, files)) + sum(map(len, descriptions(model.config, files, "00000000").values()))


def working_bytes(model: Any, windows: int, length: int) -> int:
    """Memory beside what the process has anyway, from shapes alone."""
    states = 4 * windows * length * model.config.hidden_size
    return max(_memory_of(model, unit, states) for unit in _kinds(model).values())


def _kinds(model: Any) -> dict[str, tuple[str, ...]]:
    """One unit of every kind: decoder blocks are all alike."""
    return {unit[0].rstrip("0123456789"): unit for unit in units(model.config)}


def _seconds_of(model: Any, unit: Sequence[str], tokens: int, length: int, rates: Rates) -> float:
    if unit[0] == EMBEDDING:
        return rates.rounding * _numel(model, EMBEDDING)
    seconds = 0.0
    for shared in _groups(unit):
        columns = _columns(model, shared[0])
        seconds += rates.factor * columns**3 + rates.product * tokens * columns**2
        for name in shared:
            seconds += (rates.reply + REPLY_PRODUCTS * columns * rates.product) * _numel(model, name)
            if unit[0] != NORM:  # through the block, before and after
                seconds += 2 * rates.product * tokens * _numel(model, name)
    if unit[0] != NORM:
        seconds += 2 * rates.product * 2 * tokens * length * model.config.hidden_size
    return seconds


def _memory_of(model: Any, unit: Sequence[str], states: int) -> int:
    """Beside what the process has anyway, in bytes."""
    if unit[0] == EMBEDDING:
        return max(CODES * _numel(model, EMBEDDING), PIECE * CHUNK_WEIGHTS) + states
    block = 0 if unit[0] == NORM else 4 * sum(_numel(model, name) for shared in _groups(unit) for name in shared)
    most = 0
    groups = list(_groups(unit))
    for number, shared in enumerate(groups):
        columns = _columns(model, shared[0])
        moments = 4 * sum(_columns(model, other[0]) ** 2 for other in groups[number:])
        factoring = (4 + PIVOTS) * columns**2
        codes = max(_numel(model, name) for name in shared)
        replying = 4 * columns**2 + PIECE * CHUNK_WEIGHTS + 2 * codes
        packing = 4 * columns**2 + CODES * codes
        most = max(most, moments + max(factoring, replying, packing))
    return block + 3 * states + most


def _groups(unit: Sequence[str]) -> Iterator[tuple[str, ...]]:
    """The matrices of a unit that are compressed with one H."""
    if unit[0] == NORM:
        yield (unit[1],)
        return
    for shared in SHARED_INPUTS:
        yield tuple(f"{unit[0]}.{part}" for part in shared)


def _numel(model: Any, name: str) -> int:
    return int(model.get_submodule(name).weight.numel())


def _columns(model: Any, name: str) -> int:
    return int(model.get_submodule(name).weight.shape[1])


def _seconds(call: Callable[[], Any]) -> float:
    """The least of a few."""
    found = []
    for _ in range(ROUNDS):
        started = time.process_time()
        call()
        found.append((time.process_time() - started) / torch.get_num_threads())
    return min(found)
