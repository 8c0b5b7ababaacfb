"""Latency and throughput of a server under load."""

import contextlib
import dataclasses
from typing import ClassVar

from jaxtyping import Int
from torch import Tensor

from nashswarm.measures.measure import EvaluationTarget, MeasureResult, check_length
from nashswarm.runtime.serving.engine import Limits


@dataclasses.dataclass(frozen=True)
class Load:
    """What clients see of the packed model's server on this machine and, with ``_full``, of the full model's server.

    Percentiles of latency in milliseconds, tokens per second, and the shares of requests that were shed or failed.
    Series: ``latency_ms`` and ``resident_mb`` at every answer; one process holds both models.

    ``concurrency``: clients.  ``rate``: requests per second in open loop; None: closed loop, where a client asks again
    as soon as it is answered.  ``queue``: requests that may wait before the server sheds.  ``rounds``: how often the
    two models take turns, so that both meet the machine as it is.
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
        """Check windows and settings.  Raises ValueError for short windows and for numbers below 1."""
        check_length(self.prompt_tokens + self.new_tokens, windows)
        numbers = (self.requests, self.concurrency, self.rounds, self.new_tokens, self.prompt_tokens)
        if min(numbers) < 1 or self.queue < 0:
            raise ValueError(
                "measure.requests, concurrency, rounds, prompt_tokens and new_tokens must be at least 1, queue 0"
            )
        if self.rate is not None and self.rate <= 0:
            raise ValueError(f"measure.rate={self.rate} must be above 0, or null for a closed loop")

    def measure(self, target: EvaluationTarget) -> MeasureResult:
        self.check(target.windows)
        from nashswarm.runtime import load
        from nashswarm.runtime.serving import host, server

        prompts = target.windows[:, : self.prompt_tokens].tolist()
        answers: dict[str, list[load.Response]] = {"_full": [], "": []}
        spent = dict.fromkeys(answers, 0.0)  # seconds
        rounds = min(self.rounds, self.requests)
        with contextlib.ExitStack() as stack:
            urls = {}
            for suffix, model in (("_full", target.full), ("", target.packed())):
                app = server.build_app(model, target.tokenizer, "model", Limits(self.queue))
                urls[suffix] = stack.enter_context(host.serve_in_thread(app))
                load.send_requests(urls[suffix], prompts, self.new_tokens, 1, 1)  # warms up
            turns = [(number, suffix) for number in range(rounds) for suffix in urls]
            for number, suffix in target.track(turns, "load"):
                requests = self.requests * (number + 1) // rounds - self.requests * number // rounds
                turn_answers, seconds = load.send_requests(
                    urls[suffix], prompts, self.new_tokens, requests, self.concurrency, self.rate, number
                )
                answers[suffix] += turn_answers
                spent[suffix] += seconds
        metrics: dict[str, float] = {}
        series: dict[str, list[float]] = {}
        for suffix, received in answers.items():
            summary = load.summarise(received, spent[suffix])
            metrics |= {f"{name}{suffix}": value for name, value in summary.items()}
            series[f"latency_ms{suffix}"] = [1000 * answer.seconds for answer in received]
            series[f"resident_mb{suffix}"] = [1e-6 * answer.resident for answer in received]
        metrics["latency_p95_ratio"] = metrics["latency_p95_ms_full"] / metrics["latency_p95_ms"]
        return metrics, series
