"""The timer of all measures: contestants take turns in one process, so that all of them meet the machine as it is.

The first rounds warm up caches and compilers and are not counted.  What is compared are medians or ratios over rounds.
"""

import functools
import time
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from nashswarm.progress import Track, no_track
from nashswarm.records import statistics

PHASES = ("decode", "decode_long", "prefill")
WARM_UP = 3  # rounds
CPU = torch.device("cpu")
Result = TypeVar("Result")
PhaseTimes = dict[str, list[float]]  # phase -> its time in every round


def timed(call: Callable[[], Result], device: torch.device = CPU) -> tuple[Result, float]:
    """Return the result of ``call`` and the seconds that it took on ``device``.

    Work that the device was given earlier is finished before the clock starts, and that of ``call`` before it stops.
    """
    wait(device)
    started = time.perf_counter()
    result = call()
    wait(device)
    return result, time.perf_counter() - started


def seconds(call: Callable[[], Any], device: torch.device = CPU) -> float:
    """Return the seconds that ``call`` takes on ``device``."""
    return timed(call, device)[1]


def interleaved(
    contestants: Mapping[str, Callable[[], Result]], rounds: int, warm_up: int = WARM_UP, track: Track = no_track
) -> dict[str, list[Result]]:
    """Return what every contestant returned in every round after the ``warm_up`` rounds, by name.

    In a round each contestant is called once, in the order of the mapping.
    """
    results: dict[str, list[Result]] = {name: [] for name in contestants}
    for number in track(range(warm_up + rounds), "timing"):
        for name, contestant in contestants.items():
            result = contestant()
            if number >= warm_up:
                results[name].append(result)
    return results


@torch.no_grad()
def medians(contestants: Mapping[str, Callable[[], Any]], rounds: int, device: torch.device = CPU) -> dict[str, float]:
    """Return the median seconds of every contestant, interleaved, by name."""
    turns = {name: functools.partial(seconds, contestant, device) for name, contestant in contestants.items()}
    return {name: float(np.median(times)) for name, times in interleaved(turns, rounds).items()}


def decoding(
    models: Mapping[str, Any],
    tokens: Int[Tensor, "1 prompt"],
    context: int,
    new_tokens: int,
    rounds: int,
    prepare: Callable[[str], object],
    track: Track,
) -> dict[str, PhaseTimes]:
    """Return the times of every model by phase and round.

    ``prefill``: seconds to read ``tokens``.  ``decode``, ``decode_long``: milliseconds per token to decode
    ``new_tokens`` after the first ``context`` of them, and after all.  ``prepare`` is called with a model's name before
    each of its turns.
    """

    def turn(name: str) -> tuple[float, ...]:
        prepare(name)
        _, short = generation(models[name], tokens[:, :context], new_tokens)
        prefill, long = generation(models[name], tokens, new_tokens)
        return 1000 * short / new_tokens, 1000 * long / new_tokens, prefill

    turns = {name: functools.partial(turn, name) for name in models}
    results = interleaved(turns, rounds, track=track)
    return {
        name: {phase: list(times) for phase, times in zip(PHASES, zip(*by_round, strict=True), strict=True)}
        for name, by_round in results.items()
    }


def ratios(full: PhaseTimes, contestant: PhaseTimes, suffix: str) -> dict[str, float]:
    """Return the median ratio of the full model's time to the contestant's in every phase, above 1 where the contestant
    is faster, with its interval over rounds."""
    metrics: dict[str, float] = {}
    for phase in PHASES:
        values = np.array(full[phase]) / np.array(contestant[phase])
        low, high = statistics.median_interval(values.tolist())
        name = f"{phase}_ratio{suffix}"
        metrics |= {name: float(np.median(values)), f"{name}_low": low, f"{name}_high": high}
    return metrics


@torch.no_grad()
def generation(model: Any, tokens: Int[Tensor, "1 prompt"], new_tokens: int) -> tuple[float, float]:
    """Return the seconds of reading the prompt and of decoding ``new_tokens`` greedily after it, with a KV cache."""
    output, prefill = timed(lambda: model(input_ids=tokens, use_cache=True), tokens.device)

    def decode(output: Any) -> None:
        for _ in range(new_tokens):
            token = output.logits[:, -1:].argmax(-1)
            output = model(input_ids=token, past_key_values=output.past_key_values, use_cache=True)

    return prefill, seconds(functools.partial(decode, output), tokens.device)


def wait(device: torch.device) -> None:
    """Return when ``device`` has finished all work it was given; a CPU always has."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
