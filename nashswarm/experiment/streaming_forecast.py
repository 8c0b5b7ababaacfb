"""Forecast what compression by layer at one price takes, from shapes alone: ``--plan --by-layer``.

Seconds follow from multiply-adds and from weights, by rates that are measured on this machine with the code that
compresses; memory from what each step holds.  The time to read the checkpoint from the disk comes on top.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch

from nashswarm import memory
from nashswarm.calibration.moments import bfloat16_products
from nashswarm.experiment.forecast import (
    ACTIVATIONS,
    COLUMNS,
    GAME_BYTES,
    LOGIT_BYTES,
    interpolated,
    sample_matrices,
)
from nashswarm.kernels.trellis import groups_of, tiles_across
from nashswarm.layers import Layer, Moments
from nashswarm.methods.streaming import tiles
from nashswarm.methods.streaming.budget import parameters_of
from nashswarm.methods.streaming.forecast import (
    FACTOR_BYTES,
    columns_of,
    is_expert,
    least_seconds,
    numel_of,
    share_of_tokens,
    unlike_units,
)
from nashswarm.methods.streaming.gradients import split_into_passes
from nashswarm.methods.streaming.priced import BACKWARD, ENCODE, FORWARD
from nashswarm.methods.streaming.settings import ByPrice
from nashswarm.methods.streaming.skeleton import BLOCK, Unit, structure_of, tensors_of

RATE = 3  # of the tiles of the samples
SAMPLE = (512, 1536, 1536)  # rows and columns of the factors of the product that is timed


@dataclasses.dataclass(frozen=True)
class Rates:
    """Seconds that elementary steps take on this machine, on all threads.

    ``product``: a multiply-add in a product of matrices.  ``weighing`` and ``encoding``: a weight of a matrix, by its
    columns; to compute what its tiles expect to lose, and to code it.
    """

    product: float
    weighing: Mapping[int, float]
    encoding: Mapping[int, float]


@dataclasses.dataclass
class _Work:
    """What a unit takes: multiply-adds forward and for moments, how often the latter are gathered, and bytes."""

    forward: float
    grams: float
    passes: int
    peak: float


def rates(settings: ByPrice) -> Rates:
    """Measure the rates, which takes seconds."""
    rows, inner, columns = SAMPLE
    left, right = torch.randn(rows, inner), torch.randn(inner, columns)
    with bfloat16_products():
        product = least_seconds(lambda: torch.nn.functional.linear(left, right)) / (rows * inner * columns)
    weighing, encoding = {}, {}
    for number in COLUMNS:
        matrices, moments = sample_matrices(number, torch.get_num_threads())
        weights = sum(layer.parameters for layer in matrices)
        weighing[number] = least_seconds(partial(_weigh, matrices, moments, settings)) / weights
        encoding[number] = least_seconds(partial(_encode, matrices, moments, settings)) / weights
    return Rates(product, weighing, encoding)


def forecast(model: Any, settings: ByPrice, windows: int, length: int, rates: Rates) -> dict[str, Any]:
    """Return the bytes, seconds and memory of compressing a model without memory by so many windows of text.

    ``length``: tokens of a window.
    """
    parameters, width = parameters_of(model), structure_of(model).width
    tokens, states = windows * length, 4 * windows * length * width
    seconds, peak = dict.fromkeys((FORWARD, BACKWARD, ENCODE), 0.0), 0.0
    for unit, count in unlike_units(model):
        work = (_of_block if unit.kind == BLOCK else _of_outer)(model, unit, tokens, length)
        once = rates.product * (2 * work.forward * work.passes + work.grams)  # forward, and back to the inputs
        if unit.kind == BLOCK:
            seconds[FORWARD] += count * rates.product * work.forward
            seconds[ENCODE] += count * once
        seconds[BACKWARD] += count * once
        for name in (name for group in unit.matrices for name in group):
            columns, weights = columns_of(model, name), numel_of(model, name)
            seconds[BACKWARD] += count * weights * interpolated(columns, rates.weighing)
            seconds[ENCODE] += count * weights * interpolated(columns, rates.encoding)
        peak = max(peak, work.peak + (3 if unit.kind == BLOCK else 2) * states)
    return {
        "parameters": parameters,
        "bytes_file": int(settings.bits * parameters / 8),
        "bytes_states": states * (len(structure_of(model).blocks) + 2),
        "seconds": {stage: round(value, 1) for stage, value in seconds.items()},
        "minutes": round(sum(seconds.values()) / 60, 1),
        "slowest": max(seconds, key=lambda stage: seconds[stage]),
        "peak_bytes": int(memory.peak_bytes() + peak),
    }


def _of_block(model: Any, unit: Unit, tokens: int, length: int) -> _Work:
    """Return what a decoder block takes, if every expert reads its share of tokens."""
    groups = unit.matrices
    share = {group: share_of_tokens(model, group[0]) for group in groups}
    columns = {group: columns_of(model, group[0]) for group in groups}
    names = [name for group in groups for name in group]
    forward = sum(tokens * share[group] * numel_of(model, name) for group in groups for name in group)
    forward += 2 * tokens * length * model.config.get_text_config().hidden_size  # attention
    grams = sum(tokens * share[group] * _halves(group, columns[group]) for group in groups)
    prefix = f"{unit.modules[0]}."
    relative = [tuple(name.removeprefix(prefix) for name in group) for group in groups]
    passes = split_into_passes(model.get_submodule(unit.modules[0]), relative)
    group_of = {name: group for group in groups for name in group}
    moments = max(
        4 * sum(_halves(group, columns[group]) for group in {group_of[f"{prefix}{name}"] for name in listed})
        for listed in passes
    )
    kept = ACTIVATIONS * 4 * length * sum(share[group] * columns[group] for group in groups)
    at_once = torch.get_num_threads()
    working = at_once * (
        GAME_BYTES * max(numel_of(model, name) for name in names) + FACTOR_BYTES * max(columns.values()) ** 2
    )
    weights = 4 * sum(tensors_of(model)[name].numel() for name in unit.tensors)
    experts = 4 * sum(numel_of(model, name) for name in names if is_expert(model, name))
    return _Work(forward, grams, len(passes), weights + max(experts, moments + max(kept, working)))


def _of_outer(model: Any, unit: Unit, tokens: int, length: int) -> _Work:
    """Return what an embedding or a head takes; a tied one is both."""
    (name,) = (name for group in unit.matrices for name in group)
    weights, columns = numel_of(model, name), columns_of(model, name)
    structure = structure_of(model)
    working = GAME_BYTES * weights
    if name != structure.head and not structure.tied:
        return _Work(0.0, 0.0, 1, working)
    logits = 4 * weights + LOGIT_BYTES * length * (weights // columns)
    return _Work(tokens * weights, tokens * columns**2, 1, max(working, logits))


def _halves(group: Sequence[str], columns: int) -> float:
    """Return the entries of halves of moments: of what a group reads, and of what each of its matrices does with it."""
    return (1 + len(group)) * columns**2 / 2


def _weigh(matrices: Sequence[Layer], moments: Mapping[str, Moments], settings: ByPrice) -> None:
    for _ in tiles.energies_of(matrices, moments, settings):
        pass


def _encode(matrices: Sequence[Layer], moments: Mapping[str, Moments], settings: ByPrice) -> None:
    shapes = [layer.weight.shape for layer in matrices]
    rates = [torch.full((groups_of(rows), tiles_across(columns)), RATE, dtype=torch.uint8) for rows, columns in shapes]
    for _ in tiles.encoded(matrices, moments, rates, settings):
        pass
