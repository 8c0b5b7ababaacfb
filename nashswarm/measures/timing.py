"""How long models take to read a prompt and to decode after it: interleaved in one process, one against the other."""

import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from nashswarm.progress import Track
from nashswarm.records import statistics

PHASES = ("decode", "decode_long", "prefill")
WARM_UP = 2  # rounds
Times = dict[str, list[float]]  # phase → what every round took


def interleaved(
    models: Mapping[str, Any],
    tokens: Int[Tensor, "1 prompt"],
    context: int,
    new_tokens: int,
    rounds: int,
    prepare: Callable[[str], object],
    track: Track,
) -> dict[str, Times]:
    """By the names of the models: seconds of the prefill of ``tokens``, and milliseconds per token of decoding
    ``new_tokens`` after the first ``context`` of them (``decode``) and after all (``decode_long``).

    ``prepare``: called with its name before a model has its turn.
    """
    times: dict[str, Times] = {name: {phase: [] for phase in PHASES} for name in models}
    for number in track(range(WARM_UP + rounds), "timing"):
        for name, model in models.items():
            prepare(name)
            _, short = generated(model, tokens[:, :context], new_tokens)
            prefill, long = generated(model, tokens, new_tokens)
            if number >= WARM_UP:
                times[name]["prefill"].append(prefill)
                times[name]["decode"].append(1000 * short / new_tokens)
                times[name]["decode_long"].append(1000 * long / new_tokens)
    return times


def ratios(full: Times, own: Times, suffix: str) -> dict[str, float]:
    """The median ratio of the full model's time to another's in every phase, with its interval over rounds."""
    found: dict[str, float] = {}
    for phase in PHASES:
        values = np.array(full[phase]) / np.array(own[phase])
        low, high = statistics.median_interval(values.tolist())
        name = f"{phase}_ratio{suffix}"
        found |= {name: float(np.median(values)), f"{name}_low": low, f"{name}_high": high}
    return found


@torch.no_grad()
def generated(model: Any, tokens: Int[Tensor, "1 prompt"], new_tokens: int) -> tuple[float, float]:
    """Seconds of the prefill and of the greedy decoding of ``new_tokens`` with a KV cache."""
    started = time.perf_counter()
    answer = model(input_ids=tokens, use_cache=True)
    wait(tokens.device)
    prefilled = time.perf_counter()
    for _ in range(new_tokens):
        token = answer.logits[:, -1:].argmax(-1)
        answer = model(input_ids=token, past_key_values=answer.past_key_values, use_cache=True)
    wait(tokens.device)
    return prefilled - started, time.perf_counter() - prefilled


def wait(device: torch.device) -> None:
    """Return once ``device`` has done all that it was given; a CPU always has."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
