"""Latency and throughput of a server under load."""

import contextlib
import dataclasses
from typing import ClassVar

from jaxtyping import Int
from torch import Tensor

from nashswarm.measures.measure import EvaluationTarget, MeasureResult, check_length


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
        check_length(self.prompt_tokens + self.new_tokens, windows)
        numbers = (self.requests, self.concurrency, self.rounds, self.new_tokens, self.prompt_tokens)
        if min(numbers) < 1 or self.queue < 0:
            raise ValueError(
                "measure.requests, concurrency, rounds, prompt_tokens and new_tokens must be at least 1, queue 0"
            )
        if self.rate is not None and self.rate <= 0:
            raise ValueError(f"measure.rate={self.rate} must be above 0, or null for a closed loop")

    def measure(self, subject: EvaluationTarget) -> MeasureResult:
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
