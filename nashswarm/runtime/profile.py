"""Where the time of decoding goes: matrix by matrix, and by batch size.

A product with one column reads every weight once, so bytes over time, as a share of the bandwidth measured here, says
how near it is to what memory allows; weights that stay in a cache can go beyond it.
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

BEYOND = 4  # times the largest cache: what is read of memory
ROUNDS = 5
WARM_UP = 3  # steps
GAIN = 0.1  # more tokens per second that a larger batch has to bring


@dataclasses.dataclass(frozen=True)
class LayerTime:
    """A matrix in a step of one sequence: ``size`` in bytes in memory, median ``seconds`` of its product."""

    name: str
    kind: str
    size: int
    seconds: float

    @property
    def bandwidth(self) -> float:
        """Bytes per second."""
        return self.size / self.seconds


@dataclasses.dataclass(frozen=True)
class Point:
    """A step of ``batch`` sequences: median ``seconds``."""

    batch: int
    seconds: float

    @property
    def throughput(self) -> float:
        """Tokens per second."""
        return self.batch / self.seconds


def bandwidth(size: int) -> float:
    """Bytes per second at which so many bytes are read, with the threads that torch has: the best of several rounds of
    the faster of two ways to read floats."""
    floats = torch.ones(max(size // 4, 1))
    best = math.inf
    for _ in range(ROUNDS):
        for read in (torch.sum, lambda x: torch.dot(x, x)):
            started = time.perf_counter()
            read(floats)
            best = min(best, time.perf_counter() - started)
    return floats.nbytes / best


def layers(model: Any, tokens: Int[Tensor, "1 context"], steps: int, track: Track) -> tuple[list[LayerTime], float]:
    """Every matrix that a decoded token is multiplied with, in the order of the model, and the seconds of a whole step;
    medians over ``steps`` after ``tokens``."""
    times: dict[str, list[float]] = {}
    with torch.no_grad(), _timed(model, times) as found:
        answer = model(input_ids=tokens, use_cache=True)
        whole: list[float] = []
        for step in track(range(WARM_UP + steps), "decoding"):
            if step == WARM_UP:
                times.clear()
                whole.clear()
            token = answer.logits[:, -1:].argmax(-1)
            started = time.perf_counter()
            answer = model(input_ids=token, past_key_values=answer.past_key_values, use_cache=True)
            whole.append(time.perf_counter() - started)
    own = [
        LayerTime(name, *_held(module), float(np.median(times[name])))
        for name, module in found.items()
        if name in times
    ]
    return own, float(np.median(whole))


def curve(
    model: Any, tokens: Int[Tensor, "1 context"], batches: Sequence[int], steps: int, track: Track
) -> list[Point]:
    """How long a decoding step of so many sequences takes, each after the same ``tokens``."""
    found = []
    for batch in track(batches, "batch sizes"):
        times = []
        with torch.no_grad():
            answer = model(input_ids=tokens.repeat(batch, 1), use_cache=True)
            for _ in range(WARM_UP + steps):
                token = answer.logits[:, -1:].argmax(-1)
                started = time.perf_counter()
                answer = model(input_ids=token, past_key_values=answer.past_key_values, use_cache=True)
                times.append(time.perf_counter() - started)
        found.append(Point(batch, float(np.median(times[WARM_UP:]))))
    return found


def best(points: Sequence[Point], longest: float | None = None) -> tuple[Point, str]:
    """The batch size to take, and why: the largest that each time brought a tenth more tokens per second than the one
    before it, within ``longest`` seconds a step.

    >>> best([Point(1, 0.010), Point(2, 0.012), Point(4, 0.023)])[1]
    'batch 2: 4 sequences would give only 4 % more tokens per second, and each step would take 92 % longer'
    """
    chosen = points[0]
    if longest is not None and chosen.seconds > longest:
        slow = (
            f"even one step of {chosen.batch} takes {1000 * chosen.seconds:.1f} ms, over the {1000 * longest:g} asked"
        )
        return chosen, f"batch {chosen.batch}: {slow}"
    for point in points[1:]:
        gain, delay = point.throughput / chosen.throughput - 1, point.seconds / chosen.seconds - 1
        if longest is not None and point.seconds > longest:
            took = f"a step of {point.batch} takes {1000 * point.seconds:.1f} ms, over the {1000 * longest:g} asked"
            return chosen, f"batch {chosen.batch}: {took}"
        if gain < GAIN:
            why = f"{point.batch} sequences would give {_more(gain)} tokens per second, and each step would take"
            return chosen, f"batch {chosen.batch}: {why} {delay:.0%} longer".replace("%", " %")
        chosen = point
    return chosen, f"batch {chosen.batch}: the largest tried, and tokens per second still grew"


def _more(gain: float) -> str:
    return f"only {gain:.0%} more" if gain >= 0 else f"{-gain:.0%} fewer"


def _held(module: nn.Module) -> tuple[str, int]:
    """What kind of matrix it is, and how many bytes of it are read."""
    if isinstance(module, QuantizedLinear):
        kind = "lattice" if module.matrix.lattice is not None else f"groups of {module.matrix.group_size}"
        return kind, module.matrix.tiles.nbytes
    weight = module.weight
    assert isinstance(weight, Tensor)
    return str(weight.dtype).removeprefix("torch."), weight.nbytes


@contextmanager
def _timed(model: nn.Module, times: dict[str, list[float]]) -> Iterator[dict[str, nn.Module]]:
    """The linear modules by name; ``times`` gets the seconds of each of their calls."""
    found: dict[str, nn.Module] = {
        name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)
    }
    started = dict.fromkeys(found, 0.0)

    def begin(name: str) -> None:
        started[name] = time.perf_counter()

    def end(name: str) -> None:
        times.setdefault(name, []).append(time.perf_counter() - started[name])

    hooks = []
    for name, module in found.items():
        hooks.append(module.register_forward_pre_hook(lambda *_, name=name: begin(name)))
        hooks.append(module.register_forward_hook(lambda *_, name=name: end(name)))
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()
