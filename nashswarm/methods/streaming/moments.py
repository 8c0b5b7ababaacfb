"""E[x xᵀ] of what the matrices of a decoder block read.

The statistics of a mixture's experts can take more memory than their weights, so they are gathered in several passes,
each of which holds no more numbers than the block has weights.  Experts that no token of the calibration reaches get
the moments of all tokens that were routed to the other experts of their layer.  A matrix that the block does not call
at all gets the identity: it is rounded to nearest.
"""

import contextlib
import dataclasses
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from nashswarm.methods.streaming.skeleton import shape_of
from nashswarm.methods.streaming.surroundings import Call

States = Float[Tensor, "windows length *width"]


@dataclasses.dataclass
class Job:
    """Matrices of one H.

    ``matrices``: what is quantized with it.  ``readers``: the modules whose inputs it is summed over; an input that
    several of them read in turn counts once.
    """

    matrices: tuple[str, ...]
    readers: tuple[str, ...]


def jobs(groups: Sequence[tuple[str, ...]], rows: Mapping[str, int]) -> list[Job]:
    """Return which matrices share an H.

    ``groups``: matrices that read the same input.  ``rows``: how many inputs each matrix read; none at all is 0.
    """
    reached = [Job(group, group) for group in groups if rows[group[0]]]
    alike: dict[str, list[str]] = {}
    for name in (name for group in groups for name in group if not rows[group[0]]):
        alike.setdefault(_without_numbers(name), []).append(name)
    readers = {
        pattern: tuple(name for job in reached for name in job.readers if _without_numbers(name) == pattern)
        for pattern in alike
    }
    return reached + [Job(tuple(names), readers[pattern]) for pattern, names in alike.items()]


def passes(block: Any, listed: Sequence[Job]) -> list[list[Job]]:
    """Split jobs into passes, whose moments hold no more numbers than the block has weights."""
    most = sum(part.numel() for part in block.parameters())
    parts: list[list[Job]] = []
    size = 0
    for job in listed:
        entries = shape_of(block.get_submodule(job.matrices[0]))[1] ** 2
        if not parts or size + entries > most:
            parts.append([])
            size = 0
        parts[-1].append(job)
        size += entries
    return parts


def calibrate(
    block: nn.Module, calls: Sequence[Call], inputs: States, listed: Sequence[Job]
) -> list[tuple[Job, Float[Tensor, "in in"]]]:
    """Return E[x xᵀ] for the jobs of one pass, in their order."""
    moments: list[Tensor] = []
    handles = []
    rows = [0] * len(listed)
    seen: list[Tensor | None] = [None] * len(listed)

    def add(number: int, x: Tensor) -> None:
        if seen[number] is not x:
            seen[number] = x
            add_products(moments[number], x)
            rows[number] += x.numel() // x.shape[-1]

    for number, job in enumerate(listed):
        columns = shape_of(block.get_submodule(job.matrices[0]))[1]
        moments.append(torch.zeros(columns, columns))
        for name in job.readers:
            handles.append(
                block.get_submodule(name).register_forward_pre_hook(
                    lambda _, arguments, number=number: add(number, arguments[0])
                )
            )
    try:
        block_outputs(block, calls, inputs)
    finally:
        for handle in handles:
            handle.remove()
    for number, moment in enumerate(moments):
        if rows[number]:
            moment.div_(rows[number])
        else:
            moment.fill_diagonal_(1.0)
    return list(zip(listed, moments, strict=True))


@contextlib.contextmanager
def counted_rows(block: nn.Module, names: Sequence[str]) -> Iterator[dict[str, int]]:
    """Count, during the context, how many inputs each of the modules ``names`` of ``block`` reads."""
    rows = dict.fromkeys(names, 0)

    def count(name: str, x: Tensor) -> None:
        rows[name] += x.numel() // x.shape[-1]

    handles = [
        block.get_submodule(name).register_forward_pre_hook(lambda _, arguments, name=name: count(name, arguments[0]))
        for name in names
    ]
    try:
        yield rows
    finally:
        for handle in handles:
            handle.remove()


def block_outputs(block: nn.Module, calls: Sequence[Call], inputs: States) -> States:
    """Return the outputs of ``block``, computed window by window."""
    outputs = torch.empty_like(inputs)
    for number, (call, window) in enumerate(zip(calls, inputs, strict=True)):
        outputs[number] = call.run(block, window)
    return outputs


def add_products(moment: Float[Tensor, "in in"], inputs: Float[Tensor, "*positions in"]) -> None:
    """Add Σ x xᵀ over all positions to ``moment``."""
    flat = inputs.flatten(0, -2)
    moment.addmm_(flat.T, flat)


def _without_numbers(name: str) -> str:
    return re.sub(r"\d+", "#", name)
