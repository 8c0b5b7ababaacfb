"""Other people's clients against the server: OpenAI's own, LangChain's, lm-eval, and schemathesis on its description.

``pip install 'nashswarm[clients]'`` installs them; each test of one that is absent is skipped.
"""

import asyncio
import copy
import json
import pathlib
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch

pytest.importorskip("fastapi", reason="not installed")
pytest.importorskip("uvicorn", reason="not installed")

from nashswarm.runtime.serving import host, server
from nashswarm.runtime.serving.engine import Limits
from nashswarm.runtime.serving.steps import ModuleStepper

Greedy = Callable[[Sequence[int], int], list[int]]
TEMPLATE = "{% for message in messages %}{{ message.content }} {% endfor %}"
MESSAGES = [{"role": "system", "content": "the old flock"}, {"role": "user", "content": "reads quietly"}]
SEEN = "the old flock reads quietly "  # of these messages, by the template
STEP = 0.05  # seconds, of a server that a test slows down


@pytest.fixture(scope="module")
def talking(tokenizer: Any) -> Any:
    """The tokenizer with a chat template."""
    own = copy.deepcopy(tokenizer)
    own.chat_template = TEMPLATE
    return own


@pytest.fixture(scope="module")
def url(tiny: Any, talking: Any) -> Iterator[str]:
    with host.serve_in_thread(server.build_app(tiny, talking, "tiny", Limits(batch=8, queue=16))) as address:
        yield f"{address}/v1"


@pytest.fixture
def expected(greedy: Greedy, talking: Any) -> Callable[[str, int], str]:
    """The slow way: text and number of tokens → the greedy continuation."""

    def continued(text: str, count: int) -> str:
        return str(talking.decode(greedy(talking(text)["input_ids"], count), skip_special_tokens=True))

    return continued


def test_openai_client_completes_and_streams(url: str, expected: Callable[[str, int], str]) -> None:
    openai = pytest.importorskip("openai", reason="the extra clients is not installed")
    client = openai.OpenAI(base_url=url, api_key="none", max_retries=0)
    asked = {"model": "tiny", "prompt": "the quiet flock", "max_tokens": 8, "temperature": 0}
    whole = client.completions.create(**asked, logprobs=2)
    assert whole.choices[0].text == expected("the quiet flock", 8)
    scores = whole.choices[0].logprobs
    assert len(scores.token_logprobs) == whole.usage.completion_tokens and max(scores.token_logprobs) <= 0
    parts = [*client.completions.create(**asked, stream=True, stream_options={"include_usage": True})]
    assert "".join(part.choices[0].text for part in parts if part.choices) == whole.choices[0].text
    assert parts[-1].usage == whole.usage and len(parts) > 2
    with pytest.raises(openai.NotFoundError, match="no model 'large'"):
        client.completions.create(model="large", prompt="the")


def test_openai_client_chats_and_streams(url: str, expected: Callable[[str, int], str]) -> None:
    openai = pytest.importorskip("openai", reason="the extra clients is not installed")
    client = openai.OpenAI(base_url=url, api_key="none", max_retries=0)
    asked = {"model": "tiny", "messages": MESSAGES, "max_tokens": 8, "temperature": 0}
    whole = client.chat.completions.create(**asked)
    assert whole.choices[0].message.role == "assistant"
    assert whole.choices[0].message.content == expected(SEEN, 8)
    parts = [*client.chat.completions.create(**asked, stream=True)]
    assert "".join(part.choices[0].delta.content or "" for part in parts) == whole.choices[0].message.content
    assert parts[-1].choices[0].finish_reason == whole.choices[0].finish_reason
    two = client.chat.completions.create(**asked | {"temperature": 1, "n": 2, "seed": 3, "stop": ["flock"]})
    assert len(two.choices) == 2 and all("flock" not in choice.message.content for choice in two.choices)


def test_langchain_invokes_and_streams(url: str, expected: Callable[[str, int], str]) -> None:
    langchain = pytest.importorskip("langchain_openai", reason="the extra clients is not installed")
    options = {"model": "tiny", "base_url": url, "api_key": "none", "temperature": 0, "max_tokens": 8}
    chat = langchain.ChatOpenAI(**options, max_retries=0)
    messages = [(message["role"], message["content"]) for message in MESSAGES]
    assert chat.invoke(messages).content == expected(SEEN, 8)
    assert "".join(str(part.content) for part in chat.stream(messages)) == expected(SEEN, 8)
    completion = langchain.OpenAI(**options, max_retries=0)
    assert completion.invoke("the quiet flock") == expected("the quiet flock", 8)


class SlowSteps(ModuleStepper):
    """Steps that take at least ``STEP`` seconds each, so that a token's time is known."""

    def step(self, caches: Any, tokens: Any) -> Any:
        time.sleep(STEP)
        return super().step(caches, tokens)


def test_streams_of_others_are_neither_changed_nor_delayed_by_two_that_hang_up(
    tiny: Any, talking: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Eight clients of OpenAI's stream; two go after three words.  No gap of the others grows by a token's time."""
    openai = pytest.importorskip("openai", reason="the extra clients is not installed")
    monkeypatch.setattr(server, "end_tokens", lambda model, tokenizer: frozenset())
    app = server.build_app(tiny, talking, "tiny", Limits(batch=8, queue=8), stepper=SlowSteps(tiny))
    steps = 24

    async def listen(client: Any, number: int, hasty: bool) -> tuple[str, list[float]]:
        stream = await client.completions.create(
            model="tiny", prompt=[7 + number, 3, 11], max_tokens=steps, temperature=0, stream=True, logprobs=0
        )
        text, times = "", []
        async for part in stream:
            text += part.choices[0].text
            times.append(time.monotonic())
            if hasty and len(times) == 3:
                await stream.close()
                break
        return text, times

    async def all_at_once(address: str, hasty: Sequence[int]) -> list[tuple[str, list[float]]]:
        async with openai.AsyncOpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0) as client:
            return await asyncio.gather(*(listen(client, number, number in hasty) for number in range(8)))

    with host.serve_in_thread(app) as address:
        calm = asyncio.run(all_at_once(address, ()))
        hurried = asyncio.run(all_at_once(address, (2, 5)))
    slowest = max(later - now for _, times in calm for now, later in zip(times, times[1:], strict=False))
    for number, (alone, some) in enumerate(zip(calm, hurried, strict=True)):
        if number in (2, 5):
            assert alone[0].startswith(some[0]) and len(some[1]) == 3
            continue
        assert some[0] == alone[0]
        gaps = [later - now for now, later in zip(some[1], some[1][1:], strict=False)]
        assert max(gaps) < slowest + STEP


TASK = """task: small_questions
dataset_path: json
dataset_kwargs:
  data_files:
    test: {path}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{text}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: label
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
"""
QUESTIONS = [("the quiet", [" starling", " price of"], 0), ("every old", [" and or", " flock"], 1)] * 3


@pytest.mark.slow
def test_lm_eval_scores_a_task_as_the_model_itself(url: str, tiny: Any, talking: Any, tmp_path: pathlib.Path) -> None:
    lm_eval = pytest.importorskip("lm_eval", reason="the extra clients is not installed")
    pytest.importorskip("tenacity", reason="lm-eval's extra api is not installed")
    from lm_eval.tasks import TaskManager

    talking.save_pretrained(tmp_path / "tokenizer")
    rows = [{"text": text, "choices": choices, "label": label} for text, choices, label in QUESTIONS]
    (tmp_path / "questions.json").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks/small.yaml").write_text(TASK.format(path=tmp_path / "questions.json"))
    options = {"model": "tiny", "base_url": f"{url}/completions", "tokenizer": str(tmp_path / "tokenizer")}
    result = lm_eval.simple_evaluate(
        model="local-completions",
        model_args=options | {"num_concurrent": 1, "max_retries": 1, "tokenized_requests": True, "max_length": 60},
        tasks=["small_questions"],
        task_manager=TaskManager(include_path=str(tmp_path / "tasks"), include_defaults=False),
        bootstrap_iters=0,
        log_samples=True,
    )
    samples = sorted(result["samples"]["small_questions"], key=lambda sample: sample["doc_id"])
    assert len(samples) == len(QUESTIONS)
    for (text, choices, _), sample in zip(QUESTIONS, samples, strict=True):
        for choice, response in zip(choices, sample["filtered_resps"], strict=True):
            start, tokens = len(talking(text)["input_ids"]), torch.tensor(talking(text + choice)["input_ids"])
            with torch.no_grad():
                scores = tiny(input_ids=tokens[None]).logits[0].log_softmax(-1)
            by_hand = sum(float(scores[place - 1, tokens[place]]) for place in range(start, len(tokens)))
            assert float(response[0]) == pytest.approx(by_hand, abs=1e-3)


@pytest.mark.slow
def test_replies_are_as_the_description_says(url: str) -> None:
    """schemathesis draws bodies from the OpenAPI description, valid and not, and checks statuses and replies."""
    schemathesis = pytest.importorskip("schemathesis", reason="the extra clients is not installed")
    from hypothesis import HealthCheck, Phase, given, settings

    schema = schemathesis.openapi.from_url(url.removesuffix("/v1") + "/openapi.json")
    tried = 0
    for operation in schema.get_all_operations():
        found = operation.ok()

        @given(case=found.as_strategy())
        @settings(
            max_examples=40, deadline=None, database=None, derandomize=True, phases=[Phase.explicit, Phase.generate],
            suppress_health_check=list(HealthCheck),
        )  # fmt: skip
        def check(case: Any) -> None:
            if isinstance(case.body, dict) and isinstance(case.body.get("max_tokens"), int):
                case.body["max_tokens"] = min(case.body["max_tokens"], 4)
            response = case.call_and_validate(timeout=60)
            assert response.status_code < 500

        check()
        tried += 1
    assert tried >= 5
