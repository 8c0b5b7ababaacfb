"""What is measured of a compressed model.  Its size always is; a measure adds quality, speed or behaviour under
load."""

import contextlib
import copy
import dataclasses
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Int
from torch import Tensor

from nashswarm import errors, evaluators, measures_glue, timing
from nashswarm.data import glue
from nashswarm.layers import Layer
from nashswarm.methods.peers import peer
from nashswarm.models import evaluation, matrices
from nashswarm.packed.modules import Activations, set_activations
from nashswarm.progress import Track
from nashswarm.records import statistics
from nashswarm.runtime import room

BATCH = 8  # windows
log = logging.getLogger(__name__)
Found = tuple[dict[str, float], dict[str, list[float]]]


@dataclasses.dataclass(frozen=True)
class Subject:
    """A full model, its compressed copy as floats, and the test windows.  ``packed``: the compressed model as it is
    loaded, computing on packed weights.  ``reference``: the full model's answers to the windows, given a batch size.
    ``layers``: the full model's matrices, ``weights``: the compressed ones by the layers' names, ``damage``: what the
    method predicts of each, in nats per token, if it predicts any.  ``text``, ``tokenizer``: what the windows were cut
    from, and by what.  ``truth``: what is right of them, where each is an example of a task."""

    full: Any
    compressed: Any
    packed: Callable[[], Any]
    windows: Int[Tensor, "windows length"]
    reference: Callable[[int], evaluation.Reference]
    track: Track
    tokenizer: Any = None
    layers: tuple[Layer, ...] = ()
    weights: Mapping[str, Tensor] = dataclasses.field(default_factory=dict)
    damage: Mapping[str, float] = dataclasses.field(default_factory=dict)
    text: str = ""
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
        windows = evaluation.evaluate(subject.compressed, subject.windows, self.batch_size, full, subject.track)
        if not np.isfinite(windows["kl"]).all():
            raise ValueError("the compressed model's logits are not finite on the test text; raise method.bits")
        found = evaluation.summarise(windows)
        deltas = [own - full for own, full in zip(windows["nll"], windows["nll_full"], strict=True)]
        for name, values in (("kl", windows["kl"]), ("nll_delta", deltas)):
            found[f"{name}_low"], found[f"{name}_high"] = statistics.interval(values)
        return found, windows


@dataclasses.dataclass(frozen=True)
class Official:
    """The official metrics of a task of GLUE, of the compressed model and, with ``_full``, of the full one, and with
    ``_delta`` their paired difference, with bootstrap intervals over ``examples``; of a classifier also ``kl``, in nats
    per example, and ``top1_agreement``."""

    batch_size: int = 32

    def measure(self, subject: Subject) -> Found:
        truth = subject.truth
        assert truth is not None, "the windows have no labels"
        full, own = (
            measures_glue.scores(model, subject.windows, self.batch_size, subject.track)
            for model in (subject.full, subject.compressed)
        )
        if not np.isfinite(own).all():
            raise ValueError("the compressed model's logits are not finite on the test examples; raise method.bits")
        return measures_glue.compared(truth, own, full)


@dataclasses.dataclass(frozen=True)
class Speed:
    """Milliseconds per new token (batch 1, KV cache), prefill tokens per second and bytes in memory of the packed
    model, of the full one and of others, interleaved in one process; and what rounded activations cost in KL.

    ``prompt_tokens`` are read at once (prefill; None: 512 or half the window, whichever is less), and ``new_tokens``
    decoded after them (``decode_long``: at every step transformers copies the whole cache, in all models alike) and
    after ``context_tokens`` alone (``decode``).  The packed model runs twice, with int8 activations (no suffix) and
    with float32 ones.  ``against``: further contestants, ``bfloat16``, ``compile``, ``onnxruntime`` (4 bits),
    ``bitsandbytes`` (NF4), where they are installed.  Ratios are those of the full model's time to the contestant's,
    above 1 where it is faster.  ``quality_windows``: the test windows that KL is measured on.
    """

    prompt_tokens: int | None = None
    context_tokens: int = 32
    new_tokens: int = 32
    repeats: int = 30
    against: Sequence[str] = ()
    quality_windows: int = 10

    def __post_init__(self) -> None:
        if unknown := [name for name in self.against if name not in peer.CONTESTANTS]:
            raise ValueError(f"unknown measure.against {unknown[0]!r}: choose among {', '.join(peer.CONTESTANTS)}")

    def check(self, windows: Int[Tensor, "windows length"]) -> int:
        """The tokens of the prompt.  Raises ValueError if the windows are too short."""
        length = windows.shape[1]
        prompt = min(512, length // 2) if self.prompt_tokens is None else self.prompt_tokens
        if prompt + self.new_tokens > length:
            raise ValueError(
                f"measure.prompt_tokens={prompt} and measure.new_tokens={self.new_tokens} exceed the window of {length}"
            )
        return prompt

    def measure(self, subject: Subject) -> Found:
        prompt = self.check(subject.windows)
        context = min(self.context_tokens, prompt)
        packed = subject.packed()
        models = {"full": subject.full, "": packed, "float32": packed}
        for name in self.against:
            try:
                models[name] = peer.CONTESTANTS[name](subject.full)
            except errors.NotInstalled as missing:
                log.warning("not timed: %s", missing)
        tokens = subject.windows[:1, :prompt]

        def prepare(name: str) -> None:
            set_activations(packed, "float32" if name == "float32" else "int8")

        times = timing.interleaved(models, tokens, context, self.new_tokens, self.repeats, prepare, subject.track)
        found: dict[str, float] = {}
        for name, own in times.items():
            suffix = f"_{name}" if name else ""
            found[f"decode_ms{suffix}"] = float(np.median(own["decode"]))
            found[f"decode_long_ms{suffix}"] = float(np.median(own["decode_long"]))
            found[f"prefill_tokens_per_second{suffix}"] = prompt / float(np.median(own["prefill"]))
            found[f"bytes_resident{suffix}"] = resident_bytes(models[name])
            if name != "full":
                found |= timing.ratios(times["full"], own, suffix)
        kinds: tuple[Activations, ...] = ("float32", "int8")
        for activations in kinds:
            set_activations(packed, activations)
            windows = subject.windows[: self.quality_windows]
            seen = evaluation.evaluate(packed, windows, BATCH, subject.reference(BATCH), subject.track)
            found[f"kl_{activations}"] = evaluation.summarise(seen)["kl"]
        return found, {f"decode_ms_{name or 'int8'}": own["decode"] for name, own in times.items()}


@dataclasses.dataclass(frozen=True)
class Several:
    """Several measures of the same compressed model, one after the other."""

    measures: Sequence[Measure]

    def measure(self, subject: Subject) -> Found:
        parts = [part.measure(subject) for part in self.measures]
        found = {name: value for own, _ in parts for name, value in own.items()}
        return found, {name: values for _, own in parts for name, values in own.items()}


def of_quality(measure: Measure) -> list[Measure]:
    """What in a measure judges answers by the text or the task alone: how good a model was before it was trained."""
    return [part for part in parts_of(measure) if isinstance(part, Quality | Official)]


@dataclasses.dataclass(frozen=True)
class Load:
    """What clients of the packed model's server on this machine see, and with ``_full`` those of the full model's: the
    percentiles of latency in milliseconds, tokens per second, shares of requests shed and failed.  ``resident_mb``:
    what the process, which holds both models, holds at every answer.

    ``concurrency``: clients.  ``rate``: requests per second in open loop; None: closed loop, a client asks as soon as
    it is answered.  ``queue``: requests that may wait before the server sheds.  ``rounds``: in which the two models
    take turns, so that both meet the machine as it is.
    """

    NEEDS: ClassVar = ("fastapi", "httpx", "uvicorn")
    EXTRA: ClassVar = "serve"
    requests: int = 64
    concurrency: int = 4
    rate: float | None = None
    queue: int = 16
    rounds: int = 5
    prompt_tokens: int = 32
    new_tokens: int = 16

    def check(self, windows: Int[Tensor, "windows length"]) -> None:
        """Raises ValueError if the windows are too short, or numbers no numbers of requests."""
        _check_length(self.prompt_tokens + self.new_tokens, windows)
        numbers = (self.requests, self.concurrency, self.rounds, self.new_tokens, self.prompt_tokens)
        if min(numbers) < 1 or self.queue < 0:
            raise ValueError(
                "measure.requests, concurrency, rounds, prompt_tokens and new_tokens must be at least 1, queue 0"
            )
        if self.rate is not None and self.rate <= 0:
            raise ValueError(f"measure.rate={self.rate} must be above 0, or null for a closed loop")

    def measure(self, subject: Subject) -> Found:
        self.check(subject.windows)
        from nashswarm.runtime import load, server

        prompts = subject.windows[:, : self.prompt_tokens].tolist()
        got: dict[str, list[load.Answer]] = {"_full": [], "": []}
        spent = dict.fromkeys(got, 0.0)
        rounds = min(self.rounds, self.requests)
        with contextlib.ExitStack() as stack:
            urls = {}
            for suffix, model in (("_full", subject.full), ("", subject.packed())):
                app = server.application(model, subject.tokenizer, "model", server.Limits(self.queue))
                urls[suffix] = stack.enter_context(server.running(app))
                load.answers(urls[suffix], prompts, self.new_tokens, 1, 1)  # warms up
            turns = [(number, suffix) for number in range(rounds) for suffix in urls]
            for number, suffix in subject.track(turns, "load"):
                part = self.requests * (number + 1) // rounds - self.requests * number // rounds
                answers, seconds = load.answers(
                    urls[suffix], prompts, self.new_tokens, part, self.concurrency, self.rate, number
                )
                got[suffix] += answers
                spent[suffix] += seconds
        found: dict[str, float] = {}
        series: dict[str, list[float]] = {}
        for suffix, every in got.items():
            found |= {f"{name}{suffix}": value for name, value in load.summary(every, spent[suffix]).items()}
            series[f"latency_ms{suffix}"] = [1000 * answer.seconds for answer in every]
            series[f"resident_mb{suffix}"] = [1e-6 * answer.resident for answer in every]
        found["latency_p95_ratio"] = found["latency_p95_ms_full"] / found["latency_p95_ms"]
        return found, series


@dataclasses.dataclass(frozen=True)
class Layers:
    """What each matrix costs when it alone is compressed, on the first test ``windows``: KL and ΔNLL, nats per token.

    ``layer_kl``, with its interval over windows, and ``layer_nll_delta``: series in the order of the record's layers.
    ``damage_pearson`` and ``damage_spearman`` correlate that KL with the predicted damage, where one was predicted and
    differs between layers.  ``layer_kl_sum`` beside ``kl_together``, of all matrices at once, says how far damages add
    up.  ``forward_passes``: batches of 8 windows that were run, (layers + 2) · ⌈windows / 8⌉.
    """

    windows: int = 16

    def check(self, windows: Int[Tensor, "windows length"]) -> None:
        """Raises ValueError if the windows are too few."""
        _check_number(self.windows, windows)

    def measure(self, subject: Subject) -> Found:
        self.check(subject.windows)
        windows = subject.windows[: self.windows]
        full = evaluation.reference(subject.full, windows, BATCH)
        together = evaluation.evaluate(subject.compressed, windows, BATCH, full)
        trial = copy.deepcopy(subject.full)
        series: dict[str, list[float]] = {f"layer_{name}": [] for name in ("kl", "kl_low", "kl_high", "nll_delta")}
        for layer in subject.track(subject.layers, "one layer after the other"):
            matrices.put(trial, {layer.name: subject.weights[layer.name]})
            found = evaluation.evaluate(trial, windows, BATCH, full)
            matrices.put(trial, {layer.name: layer.weight})
            alone = evaluation.summarise(found)
            alone["kl_low"], alone["kl_high"] = statistics.interval(found["kl"])
            for name, values in series.items():
                values.append(alone[name.removeprefix("layer_")])
        measured = series["layer_kl"]
        batches = -(-self.windows // BATCH)
        metric = {
            "layer_kl_sum": sum(measured),
            "kl_together": evaluation.summarise(together)["kl"],
            "forward_passes": (len(subject.layers) + 2) * batches,
        }
        predicted = [subject.damage[layer.name] for layer in subject.layers if layer.name in subject.damage]
        if len(predicted) == len(measured) and min(len(set(predicted)), len(set(measured))) > 1:
            metric["damage_pearson"], metric["damage_spearman"] = statistics.correlations(predicted, measured)
        return metric, series


@dataclasses.dataclass(frozen=True)
class Bleu:
    """BLEU (sacrebleu, 0 to 100) of greedy continuations of the first test ``windows``, with intervals over windows.

    ``bleu``: the compressed model's against the full model's.  ``bleu_text``: against the true text, and
    ``bleu_text_full``: the full model's against it; ``bleu_text_delta``: their paired difference.  Series: the same of
    each window alone.  ``packed``: the model runs on its packed weights; false: on the floats that they stand for.
    """

    NEEDS: ClassVar = ("sacrebleu",)
    prompt_tokens: int = 64
    new_tokens: int = 64
    windows: int = 64
    packed: bool = True

    def check(self, windows: Int[Tensor, "windows length"]) -> None:
        """Raises ValueError if the windows are too few or too short."""
        _check_number(self.windows, windows)
        _check_length(self.prompt_tokens + self.new_tokens, windows)

    def measure(self, subject: Subject) -> Found:
        self.check(subject.windows)
        windows, length = subject.windows[: self.windows], self.prompt_tokens + self.new_tokens
        prompts, rest = windows[:, : self.prompt_tokens], windows[:, self.prompt_tokens : length]
        own, full = (
            evaluation.continuations(model, prompts, self.new_tokens, BATCH, subject.track)
            for model in (subject.packed() if self.packed else subject.compressed, subject.full)
        )
        texts = [subject.tokenizer.batch_decode(tokens, skip_special_tokens=True) for tokens in (own, full, rest)]
        return evaluators.bleu_compared(*texts)


@dataclasses.dataclass(frozen=True)
class LmEval:
    """Accuracy on tasks of the lm-evaluation-harness, of the compressed model and of the full one.

    ``accuracy_<task>`` with its ``_stderr``, the same with ``_full``, and ``_delta``, compressed minus full, with its
    paired interval over examples; series: right or wrong, example by example.  ``folder``: task files (YAML) of one's
    own instead of the harness's, whose examples come from the hub.  ``limit``: so many examples of each; null: all.
    The weights are the floats that the packed ones stand for: the harness takes no other module than torch's own.
    """

    NEEDS: ClassVar = ("lm-eval",)
    tasks: Sequence[str] = ("lambada_openai",)
    folder: str | None = None
    limit: int | None = None

    def measure(self, subject: Subject) -> Found:
        models = {"": subject.compressed, "_full": subject.full}
        metric: dict[str, float] = {}
        series: dict[str, list[float]] = {}
        for suffix, model in models.items():
            found = evaluators.harness(model, subject.tokenizer, self.tasks, self.folder, self.limit, BATCH)
            for task in self.tasks:
                name = f"accuracy_{task}{suffix}"
                metric[name], metric[f"{name}_stderr"] = (
                    float(found["results"][task][key]) for key in ("acc,none", "acc_stderr,none")
                )
                answered = sorted(found["samples"][task], key=lambda sample: sample["doc_id"])
                series[name] = [float(sample["acc"]) for sample in answered]
        for task in self.tasks:
            own, full = (np.array(series[f"accuracy_{task}{suffix}"]) for suffix in models)
            name = f"accuracy_{task}_delta"
            metric[name] = float((own - full).mean())
            metric[f"{name}_low"], metric[f"{name}_high"] = statistics.interval((own - full).tolist())
        return metric, series


def require(measure: Measure) -> None:
    """Raises ValueError if a package that a measure needs is not installed: without it nothing can be measured."""
    for part in parts_of(measure):
        try:
            errors.require(f"measure={type(part).__name__}", getattr(part, "NEEDS", ()), getattr(part, "EXTRA", "eval"))
        except errors.NotInstalled as missing:
            raise ValueError(str(missing)) from None


def check(measure: Measure, windows: Int[Tensor, "windows length"]) -> None:
    """Raises ValueError if a measure asks for more than these test windows are."""
    for part in parts_of(measure):
        getattr(part, "check", lambda _: None)(windows)


def _check_number(asked: int, windows: Int[Tensor, "windows length"]) -> None:
    if not 1 <= asked <= len(windows):
        raise ValueError(f"measure.windows={asked} must be between 1 and the {len(windows)} test windows")


def _check_length(tokens: int, windows: Int[Tensor, "windows length"]) -> None:
    if tokens > windows.shape[1]:
        raise ValueError(f"measure.prompt_tokens + measure.new_tokens exceed the window of {windows.shape[1]}")


def parts_of(measure: Measure) -> Sequence[Measure]:
    return measure.measures if isinstance(measure, Several) else [measure]


def resident_bytes(model: Any) -> int:
    """Bytes of all parameters and buffers of a loaded model, shared ones once; a contestant that keeps its weights out
    of torch's sight says how many they are as ``weight_bytes``."""
    held = sum(part.nbytes for part in room.tensors(model))
    return held + sum(getattr(module, "weight_bytes", 0) for module in model.modules())
