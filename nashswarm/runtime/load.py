"""Requests to a server, several at a time, and what became of them."""

import concurrent.futures
import dataclasses
import logging
import time
from collections.abc import Sequence

import httpx
import numpy as np

from nashswarm import memory

SHED = (429, 503)
LONGEST = 600.0  # seconds that an answer may take
UNANSWERED = 0  # the status where there was no answer


@dataclasses.dataclass(frozen=True)
class Answer:
    """``seconds`` from when the request was due to its answer; ``tokens``: new ones in it; ``resident``: bytes that
    this process held then."""

    seconds: float
    status: int
    tokens: int
    resident: int = 0


def answers(
    url: str,
    prompts: Sequence[Sequence[int]],
    new_tokens: int,
    requests: int,
    concurrency: int,
    rate: float | None = None,
    seed: int = 0,
) -> tuple[list[Answer], float]:
    """What so many requests got, and the seconds from the first to the last of them.

    Closed loop: each of ``concurrency`` clients asks as soon as it is answered.  Open loop, at a ``rate`` of so many
    requests per second: they are due at random times (a Poisson process), whatever became of those before, and are late
    where all clients are busy.
    """
    logging.getLogger("httpx").setLevel(logging.WARNING)  # it tells of every request
    due = np.zeros(requests) if rate is None else np.random.default_rng(seed).exponential(1 / rate, requests).cumsum()
    started = time.perf_counter()

    def ask(number: int) -> Answer:
        time.sleep(max(0.0, started + due[number] - time.perf_counter()))
        begun = time.perf_counter() if rate is None else started + due[number]
        body = {"prompt": list(prompts[number % len(prompts)]), "max_tokens": new_tokens, "temperature": 0}
        try:
            found = client.post("/v1/completions", json=body)
        except httpx.HTTPError:
            return Answer(time.perf_counter() - begun, UNANSWERED, 0, memory.resident_bytes())
        tokens = found.json()["usage"]["completion_tokens"] if found.status_code == 200 else 0
        return Answer(time.perf_counter() - begun, found.status_code, tokens, memory.resident_bytes())

    limits = httpx.Limits(max_connections=concurrency, max_keepalive_connections=concurrency)
    with (
        httpx.Client(base_url=url, timeout=LONGEST, trust_env=False, limits=limits) as client,
        concurrent.futures.ThreadPoolExecutor(concurrency) as pool,
    ):
        return list(pool.map(ask, range(requests))), time.perf_counter() - started


def summary(found: Sequence[Answer], seconds: float) -> dict[str, float]:
    """Percentiles of latency in milliseconds of what was answered (all, if nothing was), tokens per second, the
    shares of requests that were shed by a full server and that failed otherwise, and ``resident_spread``: how far the
    memory of the process moved while it answered, as a share of the most."""
    good = [answer.seconds for answer in found if answer.status == 200] or [answer.seconds for answer in found]
    metrics = {f"latency_p{level}_ms": 1000 * float(np.percentile(good, level)) for level in (50, 95, 99)}
    shed = sum(answer.status in SHED for answer in found)
    held = [answer.resident for answer in found if answer.status == 200] or [0]
    failed = sum(answer.status not in (200, *SHED) for answer in found)
    return metrics | {
        "tokens_per_second": sum(answer.tokens for answer in found) / seconds,
        "shed_rate": shed / len(found),
        "error_rate": failed / len(found),
        "resident_spread": 1 - min(held) / max(held) if max(held) else 0.0,
    }
