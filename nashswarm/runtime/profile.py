"""Time decoding: matrix by matrix, and by batch size.

A product with one column reads every weight once.  Its bytes per second, as a share of the bandwidth measured here,
tell how close the product is to the limit of the memory; weights that stay in a cache can exceed it.
"""

import dataclasses
import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor, nn

from nashswarm.packed.modules import QuantizedLinear
from nashswarm.progress import Track

BEYOND = 4  # an array this many times the largest cache is read from memory
ROUNDS = 5
WARM_UP = 3  # steps
GAIN = 0.1  # relative gain in tokens per second that justifies a larger batch


@dataclasses.dataclass(frozen=True)
class LayerTime:
    """The time of a matrix in a decoding step of one sequence: ``size`` in bytes, median ``seconds`` of its product."""

    name: str
    kind: str
    size: int
    seconds: float

    @property
    def bandwidth(self) -> float:
        """Return bytes per second."""
        return self.size / self.seconds


@dataclasses.dataclass(frozen=True)
class BatchTime:
    """The time of a decoding step of ``batch`` sequences: median ``seconds``."""

    batch: int
    seconds: float

    @property
    def throughput(self) -> float:
        """Return tokens per second."""
        return self.batch / self.seconds


def read_bandwidth(size: int) -> float:
    """Measure the bytes per second at which torch's threads read an array of ``size`` bytes: the best of all rounds.

    Each round sums the floats and multiplies them with themselves; which is faster depends on the machine.
    """
    floats = torch.ones(max(size // 4, 1))
    best = math.inf
    for _ in range(ROUNDS):
        for read in (torch.sum, lambda x: torch.dot(x, x)):
            started = time.perf_counter()
            read(floats)
            best = min(best, time.perf_counter() - started)
    return floats.nbytes / best


def time_layers(
    model: Any, tokens: Int[Tensor, "1 context"], steps: int, track: Track
) -> tuple[list[LayerTime], float]:
    """Time every matrix that a decoded token is multiplied with, in the order of the model, and the whole step.

    Returns medians in seconds over ``steps`` steps after ``tokens``.
    """
    times: dict[str, list[float]] = {}
    with torch.no_grad(), _timed(model, times) as modules:
        output = model(input_ids=tokens, use_cache=True)
        step_times: list[float] = []
        for step in track(range(WARM_UP + steps), "decoding"):
            if step == WARM_UP:
                times.clear()
                step_times.clear()
            token = output.logits[:, -1:].argmax(-1)
            started = time.perf_counter()
            output = model(input_ids=token, past_key_values=output.past_key_values, use_cache=True)
            step_times.append(time.perf_counter() - started)
    layer_times = [
        LayerTime(name, *_kind_and_bytes(module), float(np.median(times[name])))
        for name, module in modules.items()
        if name in times
    ]
    return layer_times, float(np.median(step_times))


def time_batches(
    model: Any, tokens: Int[Tensor, "1 context"], batches: Sequence[int], steps: int, track: Track
) -> list[BatchTime]:
    """Time a decoding step for each batch size, every sequence after the same ``tokens``."""
    batch_times = []
    for batch in track(batches, "batch sizes"):
        times = []
        with torch.no_grad():
            output = model(input_ids=tokens.repeat(batch, 1), use_cache=True)
            for _ in range(WARM_UP + steps):
                token = output.logits[:, -1:].argmax(-1)
                started = time.perf_counter()
                output = model(input_ids=token, past_key_values=output.past_key_values, use_cache=True)
                times.append(time.perf_counter() - started)
        batch_times.append(BatchTime(batch, float(np.median(times[WARM_UP:]))))
    return batch_times


def choose_batch(times: Sequence[BatchTime], longest: float | None = None) -> tuple[BatchTime, str]:
    """Choose a batch size, and give the reason in a sentence.

    A larger batch is taken as long as it brings a tenth more tokens per second than the one before and its step takes
    at most ``longest`` seconds.

    >>> choose_batch([BatchTime(1, 0.010), BatchTime(2, 0.012), BatchTime(4, 0.023)])[1]
    'batch 2: 4 sequences would give only 4 % more tokens per second, and each step would take 92 % longer'
    """
    chosen = times[0]
    if longest is not None and chosen.seconds > longest:
        reason = f"even one step of {chosen.batch} takes {1000 * chosen.seconds:.1f} ms"
        return chosen, f"batch {chosen.batch}: {reason}, over the {1000 * longest:g} asked"
    for larger in times[1:]:
        gain, delay = larger.throughput / chosen.throughput - 1, larger.seconds / chosen.seconds - 1
        if longest is not None and larger.seconds > longest:
            reason = f"a step of {larger.batch} takes {1000 * larger.seconds:.1f} ms, over the {1000 * longest:g} asked"
            return chosen, f"batch {chosen.batch}: {reason}"
        if gain < GAIN:
            reason = f"{larger.batch} sequences would give {_more(gain)} tokens per second, and each step would take"
            return chosen, f"batch {chosen.batch}: {reason} {delay:.0%} longer".replace("%", " %")
        chosen = larger
    return chosen, f"batch {chosen.batch}: the largest tried, and tokens per second still grew"


def _more(gain: float) -> str:
    return f"only {gain:.0%} more" if gain >= 0 else f"{-gain:.0%} fewer"


def _kind_and_bytes(module: nn.Module) -> tuple[str, int]:
    """Return the format of a matrix, and the bytes of it that a product reads."""
    if isinstance(module, QuantizedLinear):
        return module.matrix.kind, module.matrix.nbytes
    weight = module.weight
    assert isinstance(weight, Tensor)
    return str(weight.dtype).removeprefix("torch."), weight.nbytes


@contextmanager
def _timed(model: nn.Module, times: dict[str, list[float]]) -> Iterator[dict[str, nn.Module]]:
    """Time the linear modules by hooks: yields them by name, and appends the seconds of each call to ``times``."""
    modules: dict[str, nn.Module] = {
        name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)
    }
    started = dict.fromkeys(modules, 0.0)

    def begin(name: str) -> None:
        started[name] = time.perf_counter()

    def end(name: str) -> None:
        times.setdefault(name, []).append(time.perf_counter() - started[name])

    hooks = []
    for name, module in modules.items():
        hooks.append(module.register_forward_pre_hook(lambda *_, name=name: begin(name)))
        hooks.append(module.register_forward_hook(lambda *_, name=name: end(name)))
    try:
        yield modules
    finally:
        for hook in hooks:
            hook.remove()
