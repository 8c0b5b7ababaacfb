"""A local server and real clients: each request gets the completion of its own prompt, or the reason for a refusal."""

import concurrent.futures
import contextlib
import copy
import gc
import os
import pathlib
import signal
import socket
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("fastapi", reason="not installed")
uvicorn = pytest.importorskip("uvicorn", reason="not installed")
httpx = pytest.importorskip("httpx", reason="not installed")

import nashswarm  # noqa: E402
from nashswarm.runtime import load, server  # noqa: E402

Start = Callable[..., Any]


@pytest.fixture
def start(tiny: Any, tokenizer: Any) -> Iterator[Start]:
    """Limits → a client of a server with them."""
    open_ones: list[Any] = []

    def started(**limits: Any) -> Any:
        serving = server.serve_in_thread(server.build_app(tiny, tokenizer, "tiny", server.Limits(**limits)))
        client = httpx.Client(base_url=serving.__enter__(), timeout=30, trust_env=False)
        open_ones.append((serving, client))
        return client

    yield started
    for serving, client in open_ones:
        client.close()
        serving.__exit__(None, None, None)


def ask(client: Any, **body: Any) -> Any:
    return client.post("/v1/completions", json={"prompt": [1, 2, 3], "max_tokens": 4, "temperature": 0, **body})


@pytest.fixture
def held(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Nothing is computed before it is set."""
    event, compute = threading.Event(), server.generate

    def generated(*arguments: Any) -> list[int]:
        assert event.wait(20)
        return compute(*arguments)

    monkeypatch.setattr(server, "generate", generated)
    return event


def wait_for(client: Any, admitted: int) -> None:
    for _ in range(500):
        if client.get("/health").json()["admitted"] == admitted:
            return
        time.sleep(0.01)
    raise AssertionError(f"{admitted} requests were never admitted")


@contextlib.contextmanager
def two_at_once(client: Any) -> Iterator[list[concurrent.futures.Future[Any]]]:
    """Two requests: the first is computed, the second waits."""
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        asked = []
        for admitted in (1, 2):
            asked.append(pool.submit(ask, client))
            wait_for(client, admitted)
        yield asked


def greedy(model: Any, ids: list[int], count: int) -> list[int]:
    """The slow way: without a cache."""
    tokens = list(ids)
    with torch.no_grad():
        for _ in range(count):
            tokens.append(int(model(input_ids=torch.tensor([tokens])).logits[0, -1].argmax()))
    return tokens[len(ids) :]


def test_completions_in_parallel_match_greedy_loop(
    start: Start, tiny: Any, tokenizer: Any, token_windows: Tensor
) -> None:
    client = start()
    prompts = [window[: 4 + number].tolist() for number, window in enumerate(token_windows)] * 3
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        responses = list(pool.map(lambda prompt: ask(client, prompt=prompt, max_tokens=6), prompts))
    for prompt, response in zip(prompts, responses, strict=True):
        assert response.status_code == 200
        body, expected = response.json(), greedy(tiny, prompt, 6)
        if 0 in expected:  # the end of a text
            expected = expected[: expected.index(0) + 1]
        assert body["choices"][0]["text"] == tokenizer.decode(expected, skip_special_tokens=True)
        assert body["usage"] == {
            "prompt_tokens": len(prompt),
            "completion_tokens": len(expected),
            "total_tokens": len(prompt) + len(expected),
        }
    assert len({response.json()["id"] for response in responses}) == len(responses)


def test_completions_with_seed_are_reproducible(start: Start, tokenizer: Any) -> None:
    client = start()
    responses = [ask(client, prompt="the quiet flock", temperature=1.5, seed=seed, max_tokens=12) for seed in (1, 1, 2)]
    texts = [response.json()["choices"][0]["text"] for response in responses]
    assert texts[0] == texts[1] != texts[2]
    assert responses[0].json()["usage"]["prompt_tokens"] == len(tokenizer("the quiet flock")["input_ids"])
    assert responses[0].json()["choices"][0]["finish_reason"] in ("length", "stop")
    assert client.get("/v1/models").json()["data"][0]["id"] == "tiny"


@pytest.mark.parametrize(
    ("changed", "status", "reason"),
    [
        ({"prompt": []}, 400, "prompt"),
        ({"prompt": 3}, 400, "prompt"),
        ({"prompt": [1, 512]}, 400, "prompt holds the token 512, the model's vocabulary has 512"),
        ({"prompt": [-1]}, 400, "prompt holds the token -1"),
        ({"max_tokens": 0}, 400, "max_tokens: Input should be greater than or equal to 1"),
        ({"max_tokens": 62}, 400, "3 tokens of prompt and max_tokens=62 exceed 64"),
        ({"temperature": "hot"}, 400, "temperature"),
        ({"stream": True}, 400, "stream: Input should be False"),
        ({"best_of": 3}, 400, "best_of: Extra inputs are not permitted"),
        ({"model": "huge"}, 404, "there is no model 'huge' here, only 'tiny'"),
        ({"prompt": "a" * 3000}, 413, "longer than 2000 bytes"),
    ],
)
def test_completions_malformed_or_too_long_refused(start: Start, changed: Any, status: int, reason: str) -> None:
    client = start(body=2000)
    response = ask(client, **changed)
    assert response.status_code == status and reason in response.json()["error"]["message"]
    assert response.json()["error"]["type"] == "invalid_request_error"
    assert ask(client).status_code == 200


def test_completions_invalid_json_or_path_refused(start: Start) -> None:
    client = start()
    assert client.post("/v1/completions", content=b"{prompt").status_code == 400
    assert client.get("/v1/completions").status_code == 405
    missing = client.get("/v2")
    assert missing.status_code == 404 and missing.json()["error"]["message"] == "Not Found"


def test_queue_full_sheds_and_recovers(start: Start, held: threading.Event) -> None:
    client = start(queue=1)
    with two_at_once(client) as (first, second):
        shed = ask(client)
        assert shed.status_code == 429 and shed.headers["retry-after"] == "1"
        assert shed.json()["error"]["type"] == "rate_limit_error"
        held.set()
        assert first.result().status_code == second.result().status_code == 200
    assert ask(client).status_code == 200 and client.get("/health").json()["admitted"] == 0


def test_request_waiting_too_long_refused(start: Start, held: threading.Event) -> None:
    client = start(patience=0.2)
    with two_at_once(client) as (first, second):
        time.sleep(0.3)
        held.set()
        assert first.result().status_code == 200
        late = second.result()
    assert late.status_code == 503 and late.headers["retry-after"] == "1" and "has waited 0.2" in late.text
    assert ask(client).status_code == 200


def test_request_failing_leaves_server_running(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    client, compute = start(), server.generate

    def broken(model: Any, ids: list[int], asked: Any) -> list[int]:
        if ids == [7]:
            raise RuntimeError("out of memory")
        return compute(model, ids, asked)

    monkeypatch.setattr(server, "generate", broken)
    failed = ask(client, prompt=[7])
    assert failed.status_code == 500 and failed.json()["error"]["type"] == "server_error"
    assert ask(client).status_code == 200


def test_completions_beyond_token_limit_refused(start: Start) -> None:
    client = start(tokens=8)
    assert ask(client, max_tokens=5).status_code == 200
    refused = ask(client, max_tokens=6)
    assert refused.status_code == 400 and "max_tokens=6 exceed 8" in refused.json()["error"]["message"]


def test_app_after_shutdown_releases_model(tiny: Any, tokenizer: Any) -> None:
    model = copy.deepcopy(tiny)
    alive = weakref.ref(model)
    with server.serve_in_thread(server.build_app(model, tokenizer, "tiny")) as url:
        assert httpx.post(f"{url}/v1/completions", json={"prompt": [1], "max_tokens": 1}).status_code == 200
    del model
    gc.collect()
    assert alive() is None


@pytest.mark.parametrize("rate", [None, 200.0])
def test_send_requests_to_server_all_succeed(start: Start, rate: float | None, token_windows: Tensor) -> None:
    url = str(start().base_url)
    responses, seconds = load.send_requests(url, token_windows[:, :8].tolist(), 3, 9, 3, rate)
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
            return httpx.Response(200, json={"usage": {"completion_tokens": 2}})

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


def test_openai_client_completes(start: Start) -> None:
    openai = pytest.importorskip("openai", reason="not installed")
    client = openai.OpenAI(base_url=f"{start().base_url}v1", api_key="none", max_retries=0)
    completion = client.completions.create(model="tiny", prompt="the quiet flock", max_tokens=3)
    assert completion.object == "text_completion" and 1 <= completion.usage.completion_tokens <= 3
    assert [model.id for model in client.models.list()] == ["tiny"]
    with pytest.raises(openai.BadRequestError, match="best_of"):
        client.completions.create(model="tiny", prompt="the", best_of=2)


@pytest.fixture
def served(model: Any, tokenizer: Any, tmp_path: pathlib.Path) -> Iterator[tuple[Any, int]]:
    """A client of the command itself, and the number of its process."""
    packed, _ = nashswarm.compress(model, tokenizer, "uniform", torch.arange(64).view(2, 32))
    for part in (packed, tokenizer):
        part.save_pretrained(tmp_path / "small")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = "import sys; from nashswarm.cli import main; sys.exit(main())"
    words = [sys.executable, "-c", command, "serve", str(tmp_path / "small"), "--port", str(port)]
    words += ["--memory-mb", "100000"]
    environment = os.environ | {"PYTHONPATH": str(pathlib.Path(__file__).parents[2])}
    with (
        subprocess.Popen(words, env=environment) as process,
        httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=120, trust_env=False) as client,
    ):
        try:
            yield client, process.pid
        finally:
            process.terminate()
            assert process.wait(60) == 0


def workers(parent: int) -> list[int]:
    processes = []
    for status in pathlib.Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            fields = status.read_text().rsplit(")", 1)[1].split()
            if int(fields[1]) == parent and b"spawn_main" in (status.parent / "cmdline").read_bytes():
                processes.append(int(status.parent.name))
    return processes


def ask_until_up(client: Any) -> Any:
    """Of a server that may be starting: whom the listening socket holds is answered in time."""
    for _ in range(240):
        with contextlib.suppress(httpx.HTTPError):
            return ask(client)
        time.sleep(0.5)
    raise AssertionError("the server never came up")


@pytest.mark.skipif(not hasattr(signal, "SIGSTOP"), reason="processes cannot be stopped here")
def test_supervisor_worker_death_ends_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    """The worker is stopped while a health check waits for it, and then killed."""
    monkeypatch.setattr("uvicorn.supervisors.multiprocess.SIGNALS", {})  # those of the tests stay
    supervisor = server.Supervisor(uvicorn.Config("nowhere:app"), [])
    supervisor.init_processes()
    (process,) = supervisor.processes
    os.kill(process.pid, signal.SIGSTOP)
    threading.Timer(0.5, os.kill, (process.pid, signal.SIGKILL)).start()
    started = time.monotonic()
    assert not process.is_alive(timeout=60) and 0.4 < time.monotonic() - started < 30
    process.join()


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="processes are looked up in /proc")
def test_serve_command_restarts_killed_worker(served: tuple[Any, int]) -> None:
    client, parent = served
    before = ask_until_up(client)
    assert before.status_code == 200
    (killed,) = workers(parent)
    os.kill(killed, signal.SIGKILL)
    after = ask_until_up(client)
    assert after.status_code == 200 and after.json()["choices"] == before.json()["choices"]
    assert killed not in workers(parent) and len(workers(parent)) == 1
