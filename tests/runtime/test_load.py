"""Clients of a server, and what is told of its answers."""

import time
from typing import Any

import pytest
from torch import Tensor

pytest.importorskip("fastapi", reason="not installed")
httpx = pytest.importorskip("httpx", reason="not installed")

from nashswarm.runtime import load  # noqa: E402
from nashswarm.runtime.serving import host, server  # noqa: E402


@pytest.mark.parametrize("rate", [None, 200.0])
def test_send_requests_to_server_all_succeed(
    tiny: Any, tokenizer: Any, rate: float | None, token_windows: Tensor
) -> None:
    with host.serve_in_thread(server.build_app(tiny, tokenizer, "tiny")) as url:
        responses, seconds = load.send_requests(url, token_windows[:, :8].tolist(), 3, 9, 3, rate)
    texts = [response.text for response in responses]
    assert any(texts) and texts[:4] == texts[5:]
    assert len(responses) == 9 and {response.status for response in responses} == {200}
    metrics = load.summarise(responses, seconds)
    assert metrics["error_rate"] == metrics["shed_rate"] == 0 < metrics["tokens_per_second"]
    assert 0 < metrics["latency_p50_ms"] <= metrics["latency_p95_ms"] <= metrics["latency_p99_ms"] < 1000 * seconds


def test_send_requests_open_loop_counts_from_due_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """One client, answers of 50 ms, ten requests due at once: each waits for those before it."""

    class Slow:
        def __init__(self, **_: Any) -> None:
            pass

        def __enter__(self) -> "Slow":
            return self

        def __exit__(self, *_: Any) -> None:
            pass

        def post(self, *_: Any, **__: Any) -> Any:
            time.sleep(0.05)
            return httpx.Response(200, json={"usage": {"completion_tokens": 2}, "choices": [{"text": "b"}]})

    monkeypatch.setattr(load.httpx, "Client", Slow)
    responses, _ = load.send_requests("http://nowhere", [[1]], 2, 10, 1, rate=1e6)
    assert [response.seconds >= 0.05 * (number + 1) - 1e-3 for number, response in enumerate(responses)] == [True] * 10
    closed, _ = load.send_requests("http://nowhere", [[1]], 2, 3, 1)
    assert all(0.05 <= response.seconds < 0.15 for response in closed)


def test_summarise_counts_shed_and_failed_apart() -> None:
    responses = [
        load.Response(0.1, 200, 4),
        load.Response(0.01, 429, 0),
        load.Response(0.01, 500, 0),
        load.Response(9.0, 0, 0),
    ]
    metrics = load.summarise(responses, 2.0)
    assert (metrics["shed_rate"], metrics["error_rate"], metrics["tokens_per_second"]) == (0.25, 0.5, 2.0)
    assert metrics["latency_p99_ms"] == pytest.approx(100)


def test_send_requests_without_server_all_fail() -> None:
    responses, seconds = load.send_requests("http://127.0.0.1:9", [[1]], 2, 2, 1)
    assert {response.status for response in responses} == {load.UNANSWERED} and load.summarise(responses, seconds)[
        "error_rate"
    ] == 1
