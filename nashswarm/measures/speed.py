"""Time of decoding and prefill, against the full model and other runtimes."""

import dataclasses
import logging
from collections.abc import Sequence

import numpy as np
from jaxtyping import Int
from torch import Tensor

from nashswarm import errors
from nashswarm.measures import timing
from nashswarm.measures.contestants import CONTESTANTS
from nashswarm.measures.measure import EvaluationTarget, MeasureResult
from nashswarm.measures.size import resident_bytes
from nashswarm.models import evaluation
from nashswarm.models.evaluation import BATCH
from nashswarm.packed.modules import Activations, set_activations

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Speed:
    """Times of the packed model, the full one and other runtimes, interleaved in one process, and their memory.

    ``decode_ms``, ``decode_long_ms``: milliseconds per new token (batch 1, KV cache) for ``new_tokens`` decoded after
    ``context_tokens``, and after ``prompt_tokens`` (None: 512 or half the window, whichever is less); at every step
    transformers copies the whole cache, in all models alike.  ``prefill_tokens_per_second``: the prompt read at once.
    ``…_ratio``: the full model's time over the contestant's, above 1 where the contestant is faster.

    The packed model runs twice: with int8 activations (no suffix) and with float32 ones; ``kl_int8``, ``kl_float32``
    are its KL on ``quality_windows`` test windows.  ``against``: further contestants, each timed if it is installed:
    ``bfloat16``, ``compile``, ``onnxruntime`` (4 bits), ``bitsandbytes`` (NF4).
    """

    prompt_tokens: int | None = None
    context_tokens: int = 32
    new_tokens: int = 32
    repeats: int = 30
    against: Sequence[str] = ()
    quality_windows: int = 10

    def __post_init__(self) -> None:
        if unknown := [name for name in self.against if name not in CONTESTANTS]:
            raise ValueError(f"unknown measure.against {unknown[0]!r}: choose among {', '.join(CONTESTANTS)}")

    def check(self, windows: Int[Tensor, "windows length"]) -> int:
        """Return the length of the prompt in tokens.  Raises ValueError if the windows are too short."""
        length = windows.shape[1]
        prompt = min(512, length // 2) if self.prompt_tokens is None else self.prompt_tokens
        if prompt + self.new_tokens > length:
            raise ValueError(
                f"measure.prompt_tokens={prompt} and measure.new_tokens={self.new_tokens} exceed the window of {length}"
            )
        return prompt

    def measure(self, target: EvaluationTarget) -> MeasureResult:
        prompt = self.check(target.windows)
        context = min(self.context_tokens, prompt)
        packed = target.packed()
        models = {"full": target.full, "": packed, "float32": packed}
        for name in self.against:
            try:
                models[name] = CONTESTANTS[name](target.full)
            except errors.MissingPackage as missing:
                log.warning("not timed: %s", missing)
        tokens = target.windows[:1, :prompt]

        def prepare(name: str) -> None:
            set_activations(packed, "float32" if name == "float32" else "int8")

        times = timing.decoding(models, tokens, context, self.new_tokens, self.repeats, prepare, target.track)
        metrics: dict[str, float] = {}
        for name, phases in times.items():
            suffix = f"_{name}" if name else ""
            metrics[f"decode_ms{suffix}"] = float(np.median(phases["decode"]))
            metrics[f"decode_long_ms{suffix}"] = float(np.median(phases["decode_long"]))
            metrics[f"prefill_tokens_per_second{suffix}"] = prompt / float(np.median(phases["prefill"]))
            metrics[f"bytes_resident{suffix}"] = resident_bytes(models[name])
            if name != "full":
                metrics |= timing.ratios(times["full"], phases, suffix)
        kinds: tuple[Activations, ...] = ("float32", "int8")
        for activations in kinds:
            set_activations(packed, activations)
            windows = target.windows[: self.quality_windows]
            by_window = evaluation.evaluate(packed, windows, BATCH, target.reference(BATCH), target.track)
            metrics[f"kl_{activations}"] = evaluation.summarise(by_window)["kl"]
        return metrics, {f"decode_ms_{name or 'int8'}": phases["decode"] for name, phases in times.items()}
