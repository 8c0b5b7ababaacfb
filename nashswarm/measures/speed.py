"""Time of decoding and prefill against the full model and other runtimes."""

import dataclasses
import logging
from collections.abc import Sequence

import numpy as np
from jaxtyping import Int
from torch import Tensor

from nashswarm import errors
from nashswarm.measures import timing
from nashswarm.measures.contestants import CONTESTANTS
from nashswarm.measures.measure import BATCH, EvaluationTarget, MeasureResult
from nashswarm.measures.size import resident_bytes
from nashswarm.models import evaluation
from nashswarm.packed.modules import Activations, set_activations

log = logging.getLogger(__name__)


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
        if unknown := [name for name in self.against if name not in CONTESTANTS]:
            raise ValueError(f"unknown measure.against {unknown[0]!r}: choose among {', '.join(CONTESTANTS)}")

    def check(self, windows: Int[Tensor, "windows length"]) -> int:
        """The tokens of the prompt.  Raises ValueError if the windows are too short."""
        length = windows.shape[1]
        prompt = min(512, length // 2) if self.prompt_tokens is None else self.prompt_tokens
        if prompt + self.new_tokens > length:
            raise ValueError(
                f"measure.prompt_tokens={prompt} and measure.new_tokens={self.new_tokens} exceed the window of {length}"
            )
        return prompt

    def measure(self, subject: EvaluationTarget) -> MeasureResult:
        prompt = self.check(subject.windows)
        context = min(self.context_tokens, prompt)
        packed = subject.packed()
        models = {"full": subject.full, "": packed, "float32": packed}
        for name in self.against:
            try:
                models[name] = CONTESTANTS[name](subject.full)
            except errors.MissingPackage as missing:
                log.warning("not timed: %s", missing)
        tokens = subject.windows[:1, :prompt]

        def prepare(name: str) -> None:
            set_activations(packed, "float32" if name == "float32" else "int8")

        times = timing.decoding(models, tokens, context, self.new_tokens, self.repeats, prepare, subject.track)
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
