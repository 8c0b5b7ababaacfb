"""Streams, and clients that go away: what the others get does not change."""

import concurrent.futures
import contextlib
import json
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

pytest.importorskip("fastapi", reason="not installed")
pytest.importorskip("uvicorn", reason="not installed")
httpx = pytest.importorskip("httpx", reason="not installed")

from nashswarm.runtime.serving import host, server  # noqa: E402
from nashswarm.runtime.serving.engine import Limits  # noqa: E402


@pytest.fixture
def held(tiny: Any, tokenizer: Any, gate: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A client of a server whose steps the gate holds, and whose answers are as long as they may be."""
    monkeypatch.setattr(server, "end_tokens", lambda model, tokenizer: frozenset())
    app = server.build_app(tiny, tokenizer, "tiny", Limits(batch=8, queue=2), stepper=gate)
    with host.serve_in_thread(app) as url, httpx.Client(base_url=url, timeout=60, trust_env=False) as client:
        yield client
        gate.open.set()


def events(client: Any, path: str = "/v1/completions", **body: Any) -> Iterator[Any]:
    """The events of a stream, the last one as a word."""
    body = {"prompt": [1, 2, 3], "temperature": 0, "max_tokens": 6, "stream": True} | body
    if "messages" in body:
        del body["prompt"]
    with client.stream("POST", path, json=body) as response:
        assert response.status_code == 200 and response.headers["content-type"].startswith("text/event-stream")
        for line in response.iter_lines():
            if line:
                assert line.startswith("data: ")
                yield line[6:] if line == "data: [DONE]" else json.loads(line[6:])


def wait_until(true: Callable[[], bool]) -> None:
    for _ in range(6000):
        if true():
            return
        time.sleep(0.005)
    raise AssertionError("it never came true")


def admitted(client: Any) -> int:
    return int(client.get("/health").json()["admitted"])


def test_stream_is_whole_reply_in_parts(held: Any, gate: Any) -> None:
    gate.open.set()
    asked = {"prompt": ["the quiet flock", "a token"], "logprobs": 1, "echo": True, "n": 2, "max_tokens": 9}
    whole = held.post("/v1/completions", json={"temperature": 0} | asked).json()
    *parts, usage, last = events(held, stream_options={"include_usage": True}, **asked)
    assert last == "[DONE]" and usage["choices"] == [] and usage["usage"] == whole["usage"]
    assert {part["id"] for part in (*parts, usage)} == {parts[0]["id"]} and len(whole["choices"]) == 4
    for choice in whole["choices"]:
        own = [part["choices"][0] for part in parts if part["choices"][0]["index"] == choice["index"]]
        assert "".join(part["text"] for part in own) == choice["text"]
        assert [part["finish_reason"] for part in own] == [None] * (len(own) - 1) + [choice["finish_reason"]]
        for name, values in choice["logprobs"].items():
            assert [value for part in own for value in part["logprobs"][name]] == values
        assert len(own) > 3


def test_eight_streams_of_which_two_hang_up_leave_the_others_as_alone(held: Any, gate: Any) -> None:
    asked = [{"prompt": [7 + number, 3, 11], "max_tokens": 40, "logprobs": 0} for number in range(8)]
    gate.open.set()
    alone = ["".join(event["choices"][0]["text"] for event in [*events(held, **body)][:-1]) for body in asked]
    gate.open.clear()
    gate.sizes.clear()
    gate.pause = gate.entered + 8 + 4  # eight prompts are read, and a step of all of them waits

    def listen(number: int) -> str:
        stream = events(held, **asked[number])
        if number in (2, 5):
            with contextlib.closing(stream):
                text = str(next(stream)["choices"][0]["text"])
                wait_until(lambda: not gate.open.is_set())
                return text
        return "".join(event["choices"][0]["text"] for event in [*stream][:-1])

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        texts = [pool.submit(listen, number) for number in range(8)]
        wait_until(lambda: admitted(held) == 8)
        gate.open.set()
        wait_until(lambda: admitted(held) == 6)
        gate.open.set()
        for number, text in enumerate(texts):
            assert text.result() == alone[number] or (number in (2, 5) and alone[number].startswith(text.result()))
    before, after = gate.sizes[:4], gate.sizes[4:]
    assert before[-1] == 8 and len(after) > 30 and max(after) == 6, "those who hung up were computed on"
    assert admitted(held) == 0


@pytest.mark.parametrize("streamed", [False, True])
def test_client_that_hangs_up_while_waiting_is_forgotten(streamed: bool, held: Any, gate: Any) -> None:
    with httpx.Client(base_url=held.base_url, timeout=0.3, trust_env=False) as hasty, pytest.raises(httpx.ReadTimeout):
        hasty.post("/v1/completions", json={"prompt": [1], "max_tokens": 50, "stream": streamed})
    wait_until(lambda: admitted(held) == 0)
    gate.open.set()
    assert held.post("/v1/completions", json={"prompt": [1], "max_tokens": 2}).status_code == 200
    assert len(gate.sizes) <= 1, "the first was computed on"


def test_stream_refused_before_it_begins_has_a_status(held: Any) -> None:
    bodies = ({"prompt": [600]}, 400), ({"prompt": [[1]] * 11}, 400), ({"prompt": [1], "max_tokens": 64}, 400)
    for body, status in bodies:
        assert held.post("/v1/completions", json={"stream": True} | body).status_code == status


def test_stream_that_fails_says_so_in_its_last_event(held: Any, gate: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise RuntimeError("out of memory")

    gate.open.set()
    monkeypatch.setattr(gate.stepper, "step", fail)
    first, last = events(held)
    assert first["choices"][0]["finish_reason"] is None
    assert last["error"] == {
        "message": "the request could not be computed: RuntimeError",
        "type": "server_error",
        "param": None,
        "code": None,
    }
    gate.broken = [1, 2, 3]
    assert held.post("/v1/completions", json={"prompt": [1, 2, 3], "stream": True}).status_code == 500
