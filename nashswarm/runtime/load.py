"""Send requests to a server, several at a time, and summarise the responses."""

import concurrent.futures
import dataclasses
import logging
import time
from collections.abc import Sequence

import httpx
import numpy as np

from nashswarm import memory

SHED = (429, 503)  # status codes of an overloaded server
TIMEOUT = 600.0  # seconds
UNANSWERED = 0  # the status of a request without a response


@dataclasses.dataclass(frozen=True)
class Response:
    """The outcome of a request.

    ``seconds``: from when the request was due to its response.  ``tokens``: how many the server generated.
    ``resident``: bytes that this process held at that time.  ``text``: of the answer.
    """

    seconds: float
    status: int
    tokens: int
    resident: int = 0
    text: str = ""


def send_requests(
    url: str,
    prompts: Sequence[Sequence[int]],
    new_tokens: int,
    requests: int,
    concurrency: int,
    rate: float | None = None,
    seed: int = 0,
) -> tuple[list[Response], float]:
    """Send ``requests`` requests, and return their responses and the seconds that they took together.

    Closed loop (``rate`` None): each of ``concurrency`` clients sends its next request when the last one is answered.
    Open loop: requests are due at random times (a Poisson process of ``rate`` requests per second), independently of
    earlier responses; a request is sent late if all clients are busy.
    """
    logging.getLogger("httpx").setLevel(logging.WARNING)  # it logs every request
    due = np.zeros(requests) if rate is None else np.random.default_rng(seed).exponential(1 / rate, requests).cumsum()
    started = time.perf_counter()

    def send(number: int) -> Response:
        time.sleep(max(0.0, started + due[number] - time.perf_counter()))
        begun = time.perf_counter() if rate is None else started + due[number]
        body = {"prompt": list(prompts[number % len(prompts)]), "max_tokens": new_tokens, "temperature": 0}
        try:
            reply = client.post("/v1/completions", json=body)
        except httpx.HTTPError:
            return Response(time.perf_counter() - begun, UNANSWERED, 0, memory.resident_bytes())
        seconds, resident = time.perf_counter() - begun, memory.resident_bytes()
        if reply.status_code != 200:
            return Response(seconds, reply.status_code, 0, resident)
        answer = reply.json()
        tokens, text = answer["usage"]["completion_tokens"], answer["choices"][0]["text"]
        return Response(seconds, reply.status_code, tokens, resident, text)

    limits = httpx.Limits(max_connections=concurrency, max_keepalive_connections=concurrency)
    with (
        httpx.Client(base_url=url, timeout=TIMEOUT, trust_env=False, limits=limits) as client,
        concurrent.futures.ThreadPoolExecutor(concurrency) as pool,
    ):
        return list(pool.map(send, range(requests))), time.perf_counter() - started


def summarise(responses: Sequence[Response], seconds: float) -> dict[str, float]:
    """Compute the metrics of a load test that took ``seconds``.

    ``latency_p50_ms`` and so on: percentiles over successful responses, or over all if none succeeded.
    ``tokens_per_second``.  ``shed_rate`` and ``error_rate``: shares of requests that a full server refused, and that
    failed otherwise.  ``resident_spread``: 1 − least / most memory of this process over successful responses.
    """
    succeeded = [response for response in responses if response.status == 200]
    latencies = [response.seconds for response in succeeded or responses]
    metrics = {f"latency_p{level}_ms": 1000 * float(np.percentile(latencies, level)) for level in (50, 95, 99)}
    shed = sum(response.status in SHED for response in responses)
    failed = sum(response.status not in (200, *SHED) for response in responses)
    resident = [response.resident for response in succeeded] or [0]
    return metrics | {
        "tokens_per_second": sum(response.tokens for response in responses) / seconds,
        "shed_rate": shed / len(responses),
        "error_rate": failed / len(responses),
        "resident_spread": 1 - min(resident) / max(resident) if max(resident) else 0.0,
    }
