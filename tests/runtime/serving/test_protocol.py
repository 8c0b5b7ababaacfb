"""What clients of OpenAI's API send is understood, and what they read is there."""

import json
import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import transformers

pytest.importorskip("fastapi", reason="not installed")
pytest.importorskip("uvicorn", reason="not installed")
httpx = pytest.importorskip("httpx", reason="not installed")

from nashswarm.runtime.serving import host, server  # noqa: E402

TEMPLATE = "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}assistant:"
COMPLETION = {"prompt": "the quiet flock", "max_tokens": 5, "temperature": 0}
CONVERSATION = [{"role": "system", "content": "the flock"}, {"role": "user", "content": "a token"}]


@pytest.fixture(scope="module")
def talker(tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A copy of the tokenizer with a chat template."""
    folder = tmp_path_factory.mktemp("talker")
    tokenizer.save_pretrained(folder)
    copy = transformers.AutoTokenizer.from_pretrained(folder)
    copy.chat_template = TEMPLATE
    return copy


@pytest.fixture(scope="module")
def client(tiny: Any, talker: Any) -> Iterator[Any]:
    app = server.build_app(tiny, talker, "tiny")
    with host.serve_in_thread(app) as url, httpx.Client(base_url=url, timeout=60, trust_env=False) as one:
        yield one


def text(client: Any, **body: Any) -> str:
    response = client.post("/v1/completions", json=COMPLETION | body)
    assert response.status_code == 200, response.text
    return str(response.json()["choices"][0]["text"])


def chat(client: Any, **body: Any) -> Any:
    asked = {"model": "tiny", "messages": CONVERSATION, "max_tokens": 5, "temperature": 0} | body
    response = client.post("/v1/chat/completions", json=asked)
    assert response.status_code == 200, response.text
    return response.json()


@pytest.mark.parametrize(
    "same",
    [
        dict.fromkeys(("model", "top_p", "n", "seed", "stop", "stream", "stream_options", "user", "echo", "logprobs")),
        dict.fromkeys(("frequency_penalty", "presence_penalty", "logit_bias", "best_of", "suffix")),
        {"n": 1, "best_of": 1, "frequency_penalty": 0, "presence_penalty": 0.0, "logit_bias": {}, "suffix": ""},
        {"stop": [], "echo": False, "stream": False, "user": "somebody", "top_p": 1, "seed": -1, "model": "tiny"},
        {"stop": "", "temperature": 0.0, "prompt": ["the quiet flock"]},
        {"top_p": 0, "temperature": 1.5},
        {"temperature": 1e-6},
    ],
)
def test_values_that_ask_for_nothing_change_nothing(client: Any, same: dict[str, Any]) -> None:
    assert text(client, **same) == text(client)


def test_null_means_the_default_of_every_field(client: Any) -> None:
    nulls = {"prompt": [1, 2], "max_tokens": None, "temperature": None, "seed": 3}
    replies = [client.post("/v1/completions", json=body).json() for body in (nulls, {"prompt": [1, 2], "seed": 3})]
    assert replies[0]["choices"] == replies[1]["choices"] and replies[0]["usage"]["completion_tokens"] <= 16


def test_prompts_in_lists_and_as_tokens_are_answered_in_order(client: Any, talker: Any) -> None:
    prompts = ["the quiet flock", "a token moves", "old"]
    single = [text(client, prompt=prompt) for prompt in prompts]
    for several in (prompts, [talker(prompt)["input_ids"] for prompt in prompts]):
        choices = client.post("/v1/completions", json=COMPLETION | {"prompt": several}).json()["choices"]
        assert [choice["text"] for choice in choices] == single
        assert [choice["index"] for choice in choices] == [0, 1, 2]
    assert text(client, prompt=talker(prompts[1])["input_ids"]) == single[1]


def test_n_choices_are_drawn_from_seeds_that_follow_each_other(client: Any) -> None:
    body = {"prompt": ["the flock", "a token"], "n": 2, "temperature": 1.5, "seed": 4, "max_tokens": 12}
    several = client.post("/v1/completions", json=body).json()
    texts = [choice["text"] for choice in several["choices"]]
    alone = [
        text(client, prompt=prompt, temperature=1.5, seed=4 + number, max_tokens=12)
        for number, prompt in enumerate(["the flock", "the flock", "a token", "a token"])
    ]
    assert texts == alone and texts[0] != texts[1]


def test_echo_and_logprobs_score_every_token(client: Any, talker: Any, tiny: Any) -> None:
    body = {"echo": True, "logprobs": 3, "max_tokens": 2}
    choice = client.post("/v1/completions", json=COMPLETION | body).json()["choices"][0]
    logprobs, prompt = choice["logprobs"], COMPLETION["prompt"]
    assert choice["text"].startswith(prompt) and "".join(logprobs["tokens"]) == choice["text"]
    read = len(talker(prompt)["input_ids"])
    assert {len(values) for values in logprobs.values()} == {read + 2}
    assert logprobs["text_offset"] == [len("".join(logprobs["tokens"][:place])) for place in range(read + 2)]
    with torch.no_grad():
        logits = tiny(input_ids=torch.tensor([talker(prompt)["input_ids"]])).logits[0].log_softmax(-1)
    for place in range(1, read):
        token = talker(prompt)["input_ids"][place]
        assert logprobs["token_logprobs"][place] == pytest.approx(float(logits[place - 1, token]), abs=1e-4)
        best = logprobs["top_logprobs"][place]
        assert max(best.values()) == pytest.approx(float(logits[place - 1].max()), abs=1e-4) and 1 <= len(best) <= 4
    assert logprobs["token_logprobs"][0] is None and logprobs["top_logprobs"][0] is None
    for place in range(read, read + 2):  # greedy
        assert logprobs["token_logprobs"][place] == max(logprobs["top_logprobs"][place].values())
    told = client.post("/v1/completions", json=COMPLETION | body | {"max_tokens": 0}).json()
    assert told["choices"][0]["text"] == prompt and told["usage"]["completion_tokens"] == 0
    plain = client.post("/v1/completions", json=COMPLETION | {"logprobs": 0}).json()["choices"][0]
    assert plain["logprobs"]["text_offset"][0] == 0 and [len(b) for b in plain["logprobs"]["top_logprobs"]] == [1] * 5


def test_stop_words_end_the_answer_and_are_no_part_of_it(client: Any) -> None:
    whole = text(client, max_tokens=30)
    stop = whole[len(whole) // 2 :][:3]
    for given in (stop, [stop], ["\x00", stop]):
        response = client.post("/v1/completions", json=COMPLETION | {"max_tokens": 30, "stop": given}).json()
        assert response["choices"][0]["text"] == whole.partition(stop)[0]
        assert response["choices"][0]["finish_reason"] == "stop" and response["usage"]["completion_tokens"] < 30


def test_chat_answers_in_the_template_of_the_model(client: Any) -> None:
    rendered = "system: the flock\nuser: a token\nassistant:"
    reply = chat(client)
    assert reply["object"] == "chat.completion" and reply["choices"][0]["message"]["role"] == "assistant"
    assert reply["choices"][0]["message"]["content"] == text(client, prompt=rendered)
    assert reply["choices"][0]["logprobs"] is None
    parts = [{"type": "text", "text": "a "}, {"type": "text", "text": "token"}]
    developer = [{"role": "developer", "content": "the flock", "name": "x"}, {"role": "user", "content": parts}]
    sent_back = [*CONVERSATION, reply["choices"][0]["message"] | {"tool_calls": None}, CONVERSATION[1]]
    assert chat(client, messages=developer)["choices"][0]["message"] == reply["choices"][0]["message"]
    assert chat(client, messages=sent_back)["usage"]["prompt_tokens"] > reply["usage"]["prompt_tokens"]


def test_chat_defaults_of_clients_change_nothing_and_length_is_what_is_left(client: Any) -> None:
    same = {"tools": [], "tool_choice": "auto", "response_format": {"type": "text"}, "store": False, "metadata": None}
    same |= {"parallel_tool_calls": True, "service_tier": "auto", "logprobs": False, "max_completion_tokens": 5, "n": 1}
    assert chat(client, **same)["choices"] == chat(client)["choices"]
    rest = chat(client, max_tokens=None)
    assert rest["usage"]["total_tokens"] == 64 or rest["choices"][0]["finish_reason"] == "stop"


def test_chat_logprobs_have_bytes_and_alternatives(client: Any) -> None:
    (choice,) = chat(client, logprobs=True, top_logprobs=2)["choices"]
    content = choice["logprobs"]["content"]
    assert "".join(score["token"] for score in content).rstrip("\ufffd") == choice["message"]["content"]
    for score in content:
        assert score["logprob"] == score["top_logprobs"][0]["logprob"] and len(score["top_logprobs"]) == 2
        assert score["bytes"] is None or bytes(score["bytes"]).decode() == score["token"]
        assert sum(math.exp(other["logprob"]) for other in score["top_logprobs"]) <= 1


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"messages": []}, "messages: List should have at least 1 item"),
        ({"messages": [{"role": "user", "content": 3}]}, "messages.0.content: must be a text, or a list of parts"),
        ({"messages": [{"role": "tool", "content": "3"}]}, "messages.0.role: Input should be 'system'"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages.0.content: must be a text"),
        ({"messages": [{"role": "user", "content": "the " * 100}]}, "exceed 64"),
        ({"tools": [{"type": "function"}]}, "tools: this server takes only []"),
        ({"response_format": {"type": "json_object"}}, "response_format.type: Input should be 'text'"),
        ({"top_logprobs": 2}, "top_logprobs: only with logprobs"),
        ({"max_tokens": 0}, "max_tokens: Input should be greater than or equal to 1"),
    ],
)
def test_chat_malformed_refused(client: Any, changed: dict[str, Any], reason: str) -> None:
    response = client.post("/v1/chat/completions", json={"messages": CONVERSATION} | changed)
    assert response.status_code == 400 and reason in response.json()["error"]["message"]


def test_chat_without_template_refused(tiny: Any, tokenizer: Any) -> None:
    with host.serve_in_thread(server.build_app(tiny, tokenizer, "tiny")) as url:
        response = httpx.post(f"{url}/v1/chat/completions", json={"messages": CONVERSATION}, trust_env=False)
    told = response.json()["error"]["message"]
    assert response.status_code == 400 and "has no chat template: send texts to /v1/completions, or put" in told


@pytest.mark.parametrize(
    ("path", "body", "place"),
    [
        ("completions", {"prompt": "a \ud83d"}, "the prompt holds '\\ud83d' at character 2"),
        ("completions", {"prompt": ["a", "\udc4d"]}, "the prompt holds '\\udc4d' at character 0"),
        ("chat/completions", {"messages": [*CONVERSATION, {"role": "user", "content": "a \ud83d"}]}, "message 2 holds"),
    ],
)
def test_half_of_a_character_is_refused_in_a_sentence(client: Any, path: str, body: Any, place: str) -> None:
    headers = {"Content-Type": "application/json"}
    response = client.post(f"/v1/{path}", content=json.dumps(body), headers=headers)
    told = response.json()["error"]["message"]
    assert response.status_code == 400 and told.startswith(place), told
    assert told.endswith("which is half of a surrogate pair and no character: send whole characters")


def test_models_are_listed_and_shown(client: Any) -> None:
    (listed,) = client.get("/v1/models").json()["data"]
    assert client.get("/v1/models/tiny").json() == listed and listed["object"] == "model"
    other = client.get("/v1/models/some/other")
    assert other.status_code == 404 and "there is no model 'some/other' here" in other.json()["error"]["message"]


def test_generation_config_of_the_model_changes_no_answer(
    model: Any, talker: Any, client: Any, greedy: Callable[..., Any]
) -> None:
    """Beams, penalties, truncation and a maximum length are not the client's wish; end tokens are the model's."""
    model.generation_config = transformers.GenerationConfig(
        eos_token_id=[0, 9], num_beams=3, top_k=1, repetition_penalty=1.5, max_length=8, do_sample=True
    )
    app = server.build_app(model, talker, "tiny")
    with host.serve_in_thread(app) as url, httpx.Client(base_url=url, trust_env=False) as one:
        assert text(one) == text(client)
        drawn = {text(one, temperature=1.5, seed=seed) for seed in range(4)}
    assert len(drawn) > 1


def test_served_api_describes_itself(client: Any) -> None:
    schema = client.get("/openapi.json").json()
    assert set(schema["paths"]) == {
        "/health",
        "/v1/models",
        "/v1/models/{model_id}",
        "/v1/completions",
        "/v1/chat/completions",
    }
    posted = schema["paths"]["/v1/completions"]["post"]
    assert set(posted["responses"]) >= {"200", "400", "404", "413", "415", "429", "500", "503"}
    assert "text/event-stream" in posted["responses"]["200"]["content"]
    assert {"type": "null"} in schema["components"]["schemas"]["CompletionRequest"]["properties"]["top_p"]["anyOf"]
