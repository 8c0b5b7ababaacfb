"""What is measured of a compressed model.  Its size always is; a measure adds quality, speed or behaviour under
load."""

import concurrent.futures
import dataclasses
import time
from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from nashswarm import compare, metrics
from nashswarm.quant.calibration import Track

Found = tuple[dict[str, float], dict[str, list[float]]]


@dataclasses.dataclass(frozen=True)
class Subject:
    """A full model, its compressed copy, and the test windows.  ``reference``: the full model's answers to them, given
    a batch size."""

    full: Any
    compressed: Any
    windows: Int[Tensor, "windows length"]
    reference: Callable[[int], metrics.Reference]
    track: Track


@runtime_checkable
class Measure(Protocol):
    """What the runner asks of a measure: metrics and series of the record."""

    def measure(self, subject: Subject) -> Found: ...


@dataclasses.dataclass(frozen=True)
class Size:
    """Bytes alone: nothing is run."""

    def measure(self, subject: Subject) -> Found:
        return {}, {}


@dataclasses.dataclass(frozen=True)
class Quality:
    """NLL, KL and top-1 agreement on the test windows, with bootstrap intervals over windows."""

    batch_size: int = 8

    def measure(self, subject: Subject) -> Found:
        full = subject.reference(self.batch_size)
        windows = metrics.evaluate(subject.compressed, subject.windows, self.batch_size, full, subject.track)
        if not np.isfinite(windows["kl"]).all():
            raise ValueError("the compressed model's logits are not finite on the test text; raise method.bits")
        found = metrics.summarise(windows)
        deltas = [own - full for own, full in zip(windows["nll"], windows["nll_full"], strict=True)]
        for name, values in (("kl", windows["kl"]), ("nll_delta", deltas)):
            found[f"{name}_low"], found[f"{name}_high"] = compare.interval(values)
        return found, windows


@dataclasses.dataclass(frozen=True)
class Speed:
    """Milliseconds per new token (batch 1, KV cache) and prefill tokens per second, compressed and full interleaved.

    Compressed layers run on dequantized floats here, so a ratio near 1 is what to expect.  ``prompt_tokens`` of None:
    512 or half the window, whichever is less.
    """

    prompt_tokens: int | None = None
    new_tokens: int = 32
    repeats: int = 30

    def measure(self, subject: Subject) -> Found:
        length = subject.windows.shape[1]
        prompt = min(512, length // 2) if self.prompt_tokens is None else self.prompt_tokens
        if prompt + self.new_tokens > length:
            raise ValueError(
                f"measure.prompt_tokens={prompt} and measure.new_tokens={self.new_tokens} exceed the window of {length}"
            )
        tokens = subject.windows[:1, :prompt]
        times: dict[str, list[float]] = {name: [] for name in ("prefill", "decode", "prefill_full", "decode_full")}
        for repeat in subject.track(range(self.repeats + 2), "timing"):
            for suffix, model in (("", subject.compressed), ("_full", subject.full)):
                prefill, decode = _generate(model, tokens, self.new_tokens)
                if repeat >= 2:  # the first two warm up
                    times[f"prefill{suffix}"].append(prefill)
                    times[f"decode{suffix}"].append(1000 * decode / self.new_tokens)
        ratios = [own / full for own, full in zip(times["decode"], times["decode_full"], strict=True)]
        found = {f"{name}_ms": float(np.median(times[name])) for name in ("decode", "decode_full")}
        found["prefill_tokens_per_second"] = prompt / float(np.median(times["prefill"]))
        found["prefill_tokens_per_second_full"] = prompt / float(np.median(times["prefill_full"]))
        found["decode_ratio"] = float(np.median(ratios))
        found["decode_ratio_low"], found["decode_ratio_high"] = compare.interval(ratios)
        return found, {"decode_ms": times["decode"], "decode_ms_full": times["decode_full"]}


@dataclasses.dataclass(frozen=True)
class Load:
    """Closed-loop load inside this process: percentiles of latency in milliseconds, tokens per second, error rate."""

    requests: int = 64
    concurrency: int = 4
    prompt_tokens: int = 32
    new_tokens: int = 16

    def measure(self, subject: Subject) -> Found:
        if self.prompt_tokens + self.new_tokens > subject.windows.shape[1]:
            raise ValueError(
                f"measure.prompt_tokens + measure.new_tokens exceed the window of {subject.windows.shape[1]}"
            )

        def request(number: int) -> tuple[float, bool]:
            window = subject.windows[number % len(subject.windows)]
            started = time.perf_counter()
            try:
                _generate(subject.compressed, window[None, : self.prompt_tokens], self.new_tokens)
            except RuntimeError:
                return time.perf_counter() - started, False
            return time.perf_counter() - started, True

        request(0)
        started = time.perf_counter()
        with concurrent.futures.ThreadPoolExecutor(self.concurrency) as pool:
            answers = list(subject.track(list(pool.map(request, range(self.requests))), "load"))
        seconds = time.perf_counter() - started
        latencies = [1000 * latency for latency, _ in answers]
        done = sum(good for _, good in answers)
        found = {f"latency_p{level}_ms": float(np.percentile(latencies, level)) for level in (50, 95, 99)}
        found |= {"tokens_per_second": done * self.new_tokens / seconds, "error_rate": 1 - done / self.requests}
        return found, {"latency_ms": latencies}


@torch.no_grad()
def _generate(model: Any, tokens: Int[Tensor, "1 prompt"], new_tokens: int) -> tuple[float, float]:
    """Seconds of the prefill and of the greedy decoding of ``new_tokens`` with a KV cache."""
    started = time.perf_counter()
    answer = model(input_ids=tokens, use_cache=True)
    _wait(tokens)
    prefilled = time.perf_counter()
    for _ in range(new_tokens):
        token = answer.logits[:, -1:].argmax(-1)
        answer = model(input_ids=token, past_key_values=answer.past_key_values, use_cache=True)
    _wait(tokens)
    return prefilled - started, time.perf_counter() - prefilled


def _wait(tokens: Tensor) -> None:
    if tokens.is_cuda:
        torch.cuda.synchronize()
