"""A local server and real clients: each request gets the completion of its own prompt, or the reason for a refusal."""

import concurrent.futures
import contextlib
import copy
import gc
import json
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
from torch import Tensor

pytest.importorskip("fastapi", reason="not installed")
pytest.importorskip("uvicorn", reason="not installed")
httpx = pytest.importorskip("httpx", reason="not installed")

from nashswarm.runtime.serving import host, server  # noqa: E402
from nashswarm.runtime.serving.engine import Limits  # noqa: E402

Start = Callable[..., Any]
Greedy = Callable[[Any, int], list[int]]


@pytest.fixture
def start(tiny: Any, tokenizer: Any) -> Iterator[Start]:
    """Limits, and perhaps steps and the largest body → a client of a server with them."""
    open_ones: list[Any] = []

    def started(body: int = server.BODY, stepper: Any = None, origins: Sequence[str] = (), **limits: Any) -> Any:
        app = server.build_app(tiny, tokenizer, "tiny", Limits(**limits), body, stepper, origins)
        serving = host.serve_in_thread(app)
        client = httpx.Client(base_url=serving.__enter__(), timeout=30, trust_env=False)
        open_ones.append((serving, client))
        return client

    yield started
    for serving, client in open_ones:
        client.close()
        serving.__exit__(None, None, None)


def ask(client: Any, **body: Any) -> Any:
    return client.post("/v1/completions", json={"prompt": [1, 2, 3], "max_tokens": 4, "temperature": 0, **body})


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


def test_completions_in_parallel_match_greedy_loop(
    start: Start, greedy: Greedy, tokenizer: Any, token_windows: Tensor
) -> None:
    client = start()
    prompts = [window[: 4 + number].tolist() for number, window in enumerate(token_windows)] * 3
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        responses = list(pool.map(lambda prompt: ask(client, prompt=prompt, max_tokens=6), prompts))
    for prompt, response in zip(prompts, responses, strict=True):
        assert response.status_code == 200
        body, expected = response.json(), greedy(prompt, 6)
        whole = tokenizer.decode([*prompt, *expected], skip_special_tokens=True)
        assert whole.endswith(body["choices"][0]["text"] + "\ufffd" * (len(whole) - len(whole.rstrip("\ufffd"))))
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
        (
            {"prompt": []},
            400,
            "prompt: must be a text or tokens, or a list of texts or of lists of tokens, none of them",
        ),
        ({"prompt": 3}, 400, "prompt: must be a text"),
        ({"prompt": None}, 400, "prompt: must be a text"),
        ({"prompt": [[1], []]}, 400, "prompt: must be a text"),
        ({"prompt": ""}, 400, "the prompt has no tokens"),
        ({"prompt": [1, 512]}, 400, "prompt holds the token 512, the model's vocabulary has 512"),
        ({"prompt": [-1]}, 400, "prompt holds the token -1"),
        ({"max_tokens": 0}, 400, "max_tokens: at least 1 without echo"),
        ({"max_tokens": -1}, 400, "max_tokens: Input should be greater than or equal to 0"),
        ({"max_tokens": 62}, 400, "3 tokens of prompt and max_tokens=62 exceed 64"),
        ({"temperature": "hot"}, 400, "temperature"),
        ({"temperature": float("nan")}, 400, "temperature"),
        ({"best_of": 3}, 400, "best_of=3: this server takes only as many as n=1, or none"),
        ({"beams": 3}, 400, "beams: this server knows no such field"),
        ({"frequency_penalty": 0.5}, 400, "frequency_penalty: this server takes only 0"),
        ({"logit_bias": {"3": 1}}, 400, "logit_bias: this server takes only {}"),
        ({"suffix": "and"}, 400, "suffix: this server takes only ''"),
        ({"stop": ["a"] * 17}, 400, "stop: must be a text, or a list of at most 16"),
        ({"logprobs": 21}, 400, "logprobs: Input should be less than or equal to 20"),
        (
            {"prompt": [[1, 2]] * 33},
            400,
            "33 answers in one request are more than the 32 that this server takes at once",
        ),
        ({"model": "huge"}, 404, "there is no model 'huge' here, only 'tiny'"),
        ({"prompt": "a" * 3000}, 413, "longer than 2000 bytes"),
    ],
)
def test_completions_malformed_or_too_long_refused(start: Start, changed: Any, status: int, reason: str) -> None:
    client = start(body=2000)
    body = json.dumps({"prompt": [1, 2, 3], "max_tokens": 4, **changed})
    response = client.post("/v1/completions", content=body, headers={"Content-Type": "application/json"})
    assert response.status_code == status and reason in response.json()["error"]["message"]
    assert response.json()["error"]["type"] == "invalid_request_error"
    assert ask(client).status_code == 200


def test_completions_invalid_json_or_path_refused(start: Start) -> None:
    client = start()
    as_json = {"Content-Type": "application/json"}
    broken = client.post("/v1/completions", content=b"{prompt", headers=as_json)
    assert (
        broken.status_code == 400 and "the request is no JSON: Expecting property" in broken.json()["error"]["message"]
    )
    form = client.post("/v1/completions", data={"prompt": "the"})  # what pages of others can send without asking
    assert form.status_code == 415 and "Content-Type: application/json" in form.json()["error"]["message"]
    assert client.post("/v1/completions", headers=as_json).status_code == 400
    assert client.get("/v1/completions").status_code == 405


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("POST", "/v1/embeddings", 404),
        ("POST", "/completion", 404),  # llama.cpp's own, whose replies are other ones
        ("GET", "/v2", 404),
        ("GET", "/", 404),
        ("GET", "/v1/completions", 405),
    ],
)
def test_unknown_path_or_method_is_told_what_is_served(start: Start, method: str, path: str, status: int) -> None:
    refused = start().request(method, path, json={"input": "the"})
    assert refused.status_code == status
    assert refused.json()["error"]["message"] == (
        f"{method} {path!r} is not served here, only GET /health, GET /v1/models, GET /v1/models/{{model_id}}, "
        "POST /v1/completions, POST /v1/chat/completions"
    )


def test_slash_at_the_end_of_a_path_changes_nothing(start: Start) -> None:
    client, body = start(), {"prompt": [1, 2, 3], "max_tokens": 4, "temperature": 0}
    replies = [client.post(f"/v1/completions{slash}", json=body) for slash in ("", "/")]
    assert [reply.status_code for reply in replies] == [200, 200]  # httpx follows no redirection, nor does curl
    assert replies[0].json()["choices"] == replies[1].json()["choices"]
    for path in ("/health", "/v1/models", "/v1/models/tiny"):
        assert client.get(f"{path}/").json() == client.get(path).json()


PAGE = "http://localhost:3000"
ASKING = {"Origin": PAGE, "Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization"}


@pytest.mark.parametrize("origins", [["http://example.org", PAGE], ["*"]])
def test_page_of_a_named_origin_may_ask(start: Start, origins: list[str]) -> None:
    client = start(origins=origins)
    asked = client.options("/v1/completions", headers=ASKING)
    assert asked.status_code == 200 and "POST" in asked.headers["access-control-allow-methods"]
    assert (
        "authorization" in asked.headers["access-control-allow-headers"].lower()
    )  # clients send a key, whatever it is
    answers = [
        client.post("/v1/completions", json={"prompt": prompt, "max_tokens": 2}, headers={"Origin": PAGE})
        for prompt in ([1, 2], [])
    ]
    assert [answer.status_code for answer in answers] == [200, 400]
    for answer in (asked, *answers):  # a page reads a refusal too
        assert answer.headers["access-control-allow-origin"] in (PAGE, "*")
        assert "access-control-allow-credentials" not in answer.headers


def test_page_of_another_origin_may_not_ask(start: Start) -> None:
    plain, named = start(), start(origins=["http://example.org"])
    refused = plain.options("/v1/completions", headers=ASKING)
    assert refused.status_code == 405 and "--cors-origins names those that may" in refused.json()["error"]["message"]
    assert named.options("/v1/completions", headers=ASKING).status_code == 400
    for client in (plain, named):
        assert "access-control-allow-origin" not in client.get("/health", headers={"Origin": PAGE}).headers


def test_queue_full_sheds_and_recovers(start: Start, gate: Any) -> None:
    client = start(stepper=gate, queue=1, batch=1)
    with two_at_once(client) as (first, second):
        shed = ask(client)
        assert shed.status_code == 429 and shed.headers["retry-after"] == "1"
        assert shed.json()["error"]["type"] == "rate_limit_error"
        gate.open.set()
        assert first.result().status_code == second.result().status_code == 200
    assert ask(client).status_code == 200 and client.get("/health").json()["admitted"] == 0


def test_request_waiting_too_long_refused(start: Start, gate: Any) -> None:
    client = start(stepper=gate, patience=0.2, batch=1)
    with two_at_once(client) as (first, second):
        time.sleep(0.3)
        gate.open.set()
        assert first.result().status_code == 200
        late = second.result()
    assert late.status_code == 503 and late.headers["retry-after"] == "1" and "has waited 0.2" in late.text
    assert ask(client).status_code == 200


def test_request_failing_leaves_server_running(start: Start, gate: Any) -> None:
    client = start(stepper=gate)
    gate.broken = [7]
    gate.open.set()
    failed = ask(client, prompt=[7])
    assert failed.status_code == 500 and failed.json()["error"]["type"] == "server_error"
    assert failed.json()["error"]["message"] == "the request could not be computed: RuntimeError"
    assert ask(client).status_code == 200 and client.get("/health").json()["admitted"] == 0


def test_completions_beyond_token_limit_refused(start: Start) -> None:
    client = start(tokens=8)
    assert ask(client, max_tokens=5).status_code == 200
    refused = ask(client, max_tokens=6)
    assert (
        refused.status_code == 400
        and "max_tokens=6 exceed 8, which is what fits into the memory" in refused.json()["error"]["message"]
    )


def test_app_after_shutdown_releases_model(tiny: Any, tokenizer: Any) -> None:
    model = copy.deepcopy(tiny)
    alive = weakref.ref(model)
    with host.serve_in_thread(server.build_app(model, tokenizer, "tiny")) as url:
        assert httpx.post(f"{url}/v1/completions", json={"prompt": [1], "max_tokens": 1}).status_code == 200
    del model
    gc.collect()
    assert alive() is None


def test_openai_client_completes(start: Start) -> None:
    openai = pytest.importorskip("openai", reason="not installed")
    client = openai.OpenAI(base_url=f"{str(start().base_url).rstrip(chr(47))}/v1", api_key="none", max_retries=0)
    completion = client.completions.create(model="tiny", prompt="the quiet flock", max_tokens=3)
    assert completion.object == "text_completion" and 1 <= completion.usage.completion_tokens <= 3
    assert [model.id for model in client.models.list()] == ["tiny"]
    with pytest.raises(openai.BadRequestError, match="best_of=2"):
        client.completions.create(model="tiny", prompt="the", best_of=2)
