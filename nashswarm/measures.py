"""What is measured of a compressed model.  Its size always is; a measure adds quality, speed or behaviour under
load."""

import concurrent.futures
import dataclasses
import time
from collections import ChainMap
from collections.abc import Callable, Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Int
from scipy.special import rel_entr, softmax
from torch import Tensor

from nashswarm import compare, glue, metrics, peers
from nashswarm.linear import Activations, set_activations
from nashswarm.quant.calibration import Track

BATCH = 8  # windows
Found = tuple[dict[str, float], dict[str, list[float]]]


@dataclasses.dataclass(frozen=True)
class Subject:
    """A full model, its compressed copy as floats, and the test windows.  ``packed``: the compressed model as it is
    loaded, computing on packed weights.  ``reference``: the full model's answers to the windows, given a batch size.
    ``truth``: what is right of the windows, where each is an example of a task."""

    full: Any
    compressed: Any
    packed: Callable[[], Any]
    windows: Int[Tensor, "windows length"]
    reference: Callable[[int], metrics.Reference]
    track: Track
    truth: glue.Truth | None = None


@runtime_checkable
class Measure(Protocol):
    """What the runner asks of a measure: metrics and series of the record."""

    def measure(self, subject: Subject) -> Found: ...


@dataclasses.dataclass(frozen=True)
class Size:
    """Bytes alone: of the file, and of all that the loaded models hold in memory.  Nothing is run."""

    def measure(self, subject: Subject) -> Found:
        full, own = (resident_bytes(model) for model in (subject.full, subject.packed()))
        return {"bytes_resident": own, "bytes_resident_full": full}, {}


@dataclasses.dataclass(frozen=True)
class Quality:
    """NLL, KL and top-1 agreement on the test windows, with bootstrap intervals over windows."""

    batch_size: int = BATCH

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
class Official:
    """The official metrics of a task of GLUE, of the compressed model and, with ``_full``, of the full one, with
    bootstrap intervals over ``examples``; of a classifier also ``kl``, in nats per example, and ``top1_agreement``."""

    batch_size: int = 32

    def measure(self, subject: Subject) -> Found:
        truth = subject.truth
        assert truth is not None, "the windows have no labels"
        full, own = (
            glue.scores(model, subject.windows, self.batch_size, subject.track)
            for model in (subject.full, subject.compressed)
        )
        if not np.isfinite(own).all():
            raise ValueError("the compressed model's logits are not finite on the test examples; raise method.bits")
        found: dict[str, float] = {"examples": len(own)}
        series = {"label": truth.labels.tolist()}
        for suffix, scores in (("", own), ("_full", full)):
            predicted = glue.predictions(scores)
            series[f"prediction{suffix}"] = predicted.tolist()
            for name in truth.metrics:
                found[f"{name}{suffix}"] = float(glue.METRICS[name](truth.labels, predicted))
                low, high = glue.interval(name, truth.labels, predicted)
                found |= {f"{name}{suffix}_low": low, f"{name}{suffix}_high": high}
        if own.shape[1] > 1:
            series["kl"] = rel_entr(softmax(full, 1), softmax(own, 1)).sum(1).tolist()
            found["kl"] = float(np.mean(series["kl"]))
            found["kl_low"], found["kl_high"] = compare.interval(series["kl"])
            found["top1_agreement"] = float((full.argmax(1) == own.argmax(1)).mean())
        return found, series


@dataclasses.dataclass(frozen=True)
class Speed:
    """Milliseconds per new token (batch 1, KV cache), prefill tokens per second and bytes in memory of the packed
    model, of the full one and of others, interleaved in one process; and what rounded activations cost in KL.

    The packed model runs twice, with int8 activations (no suffix) and with float32 ones.  ``against``: further
    contestants, ``bfloat16``, ``compile``, ``onnxruntime`` (4 bits), ``bitsandbytes`` (NF4).  Ratios are those of the
    full model's time to the contestant's, above 1 where it is faster.  ``prompt_tokens`` of None: 512 or half the
    window, whichever is less.  ``quality_windows``: the test windows that KL is measured on.
    """

    prompt_tokens: int | None = None
    new_tokens: int = 32
    repeats: int = 30
    against: Sequence[str] = ()
    quality_windows: int = 10

    def __post_init__(self) -> None:
        if unknown := [name for name in self.against if name not in peers.CONTESTANTS]:
            raise ValueError(f"unknown measure.against {unknown[0]!r}: choose among {', '.join(peers.CONTESTANTS)}")

    def measure(self, subject: Subject) -> Found:
        length = subject.windows.shape[1]
        prompt = min(512, length // 2) if self.prompt_tokens is None else self.prompt_tokens
        if prompt + self.new_tokens > length:
            raise ValueError(
                f"measure.prompt_tokens={prompt} and measure.new_tokens={self.new_tokens} exceed the window of {length}"
            )
        packed = subject.packed()
        models = {"full": subject.full, "": packed, "float32": packed}
        models |= {name: peers.CONTESTANTS[name](subject.full) for name in self.against}
        tokens = subject.windows[:1, :prompt]
        times: dict[str, dict[str, list[float]]] = {name: {"prefill": [], "decode": []} for name in models}
        for repeat in subject.track(range(self.repeats + 2), "timing"):
            for name, model in models.items():
                set_activations(packed, "float32" if name == "float32" else "int8")
                prefill, decode = _generate(model, tokens, self.new_tokens)
                if repeat >= 2:  # the first two warm up
                    times[name]["prefill"].append(prefill)
                    times[name]["decode"].append(1000 * decode / self.new_tokens)
        found: dict[str, float] = {}
        for name, own in times.items():
            suffix = f"_{name}" if name else ""
            found[f"decode_ms{suffix}"] = float(np.median(own["decode"]))
            found[f"prefill_tokens_per_second{suffix}"] = prompt / float(np.median(own["prefill"]))
            found[f"bytes_resident{suffix}"] = resident_bytes(models[name])
            for phase in ("decode", "prefill") if name != "full" else ():
                ratios = [full / mine for full, mine in zip(times["full"][phase], own[phase], strict=True)]
                found[f"{phase}_ratio{suffix}"] = float(np.median(ratios))
                low, high = compare.interval(ratios)
                found |= {f"{phase}_ratio{suffix}_low": low, f"{phase}_ratio{suffix}_high": high}
        kinds: tuple[Activations, ...] = ("float32", "int8")
        for activations in kinds:
            set_activations(packed, activations)
            windows = subject.windows[: self.quality_windows]
            seen = metrics.evaluate(packed, windows, BATCH, subject.reference(BATCH), subject.track)
            found[f"kl_{activations}"] = metrics.summarise(seen)["kl"]
        return found, {f"decode_ms_{name or 'int8'}": own["decode"] for name, own in times.items()}


@dataclasses.dataclass(frozen=True)
class Several:
    """Several measures of the same compressed model, one after the other."""

    measures: Sequence[Measure]

    def measure(self, subject: Subject) -> Found:
        parts = [part.measure(subject) for part in self.measures]
        return dict(ChainMap(*(found for found, _ in parts))), dict(ChainMap(*(series for _, series in parts)))


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

        packed = subject.packed()

        def request(number: int) -> tuple[float, bool]:
            window = subject.windows[number % len(subject.windows)]
            started = time.perf_counter()
            try:
                _generate(packed, window[None, : self.prompt_tokens], self.new_tokens)
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


def resident_bytes(model: Any) -> int:
    """Bytes of all parameters and buffers of a loaded model, shared ones once; a contestant that keeps its weights out
    of torch's sight says how many they are as ``weight_bytes``."""
    tensors = {part.data_ptr(): part.nbytes for part in (*model.parameters(), *model.buffers())}
    return sum(tensors.values()) + sum(getattr(module, "weight_bytes", 0) for module in model.modules())


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
