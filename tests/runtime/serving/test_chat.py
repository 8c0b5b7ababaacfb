"""Talking in a terminal."""

import io
import signal
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import transformers

from nashswarm import inference
from nashswarm.cli import main
from nashswarm.models.matrices import find_layers
from nashswarm.packed import checkpoint
from nashswarm.runtime.serving import chat
from nashswarm.runtime.serving.engine import Engine, Limits

TEMPLATE = "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}assistant:"


@pytest.fixture
def talker(tokenizer: Any, tmp_path: Any) -> Any:
    tokenizer.save_pretrained(tmp_path)
    copy = transformers.AutoTokenizer.from_pretrained(tmp_path)
    copy.chat_template = TEMPLATE
    return copy


@pytest.fixture
def engine(gate: Any, talker: Any) -> Iterator[Engine]:
    made = Engine(gate, talker, frozenset(), Limits())
    yield made
    gate.open.set()
    made.close()


def say(monkeypatch: pytest.MonkeyPatch, *lines: str) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("".join(f"{line}\n" for line in lines)))


def test_talk_answers_lines_with_what_was_said_before(
    engine: Engine, gate: Any, talker: Any, greedy: Callable[..., list[int]],
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    gate.open.set()
    say(monkeypatch, "the flock", "", "a token", "/clear", "the flock", "/exit", "never read")
    chat.talk(engine, talker, 64, chat.Settings(temperature=0, max_tokens=4))
    out, err = capsys.readouterr()

    def expected(prompt: str) -> str:
        ids = talker(prompt)["input_ids"]
        return talker.decode([*ids, *greedy(ids, 4)])[len(prompt) :].rstrip("\ufffd")

    first = expected("user: the flock\nassistant:")
    second = expected(f"user: the flock\nassistant: {first}\nuser: a token\nassistant:")
    assert out == f"{first}\n{second}\n{first}\n"
    told = [line for line in err.splitlines() if line]
    assert len(told) == 3 and "4 written" in told[0] and "per second, cut at its limit]" in told[0]


def test_talk_with_full_context_says_so_and_goes_on(
    engine: Engine, gate: Any, talker: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    gate.open.set()
    say(monkeypatch, "the " * 80, "the")
    chat.talk(engine, talker, 64, chat.Settings(system="the flock", temperature=0, max_tokens=3))
    out, err = capsys.readouterr()
    assert out.endswith("\n") and "3 written" in err
    assert "tokens, the model reads 64; /clear forgets the conversation" in err


@pytest.mark.skipif(not hasattr(signal, "pthread_kill"), reason="signals cannot be sent to a thread here")
def test_interrupt_stops_the_answer_and_not_the_conversation(
    engine: Engine, gate: Any, talker: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if threading.current_thread() is not threading.main_thread():
        pytest.skip("signals reach the main thread alone")
    stepped = gate.stepper.step
    gate.open.set()

    def step(caches: Any, tokens: Any) -> Any:
        if len(gate.sizes) == 3:
            time.sleep(0.3)  # until what came before is printed
            signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)
        return stepped(caches, tokens)

    monkeypatch.setattr(gate.stepper, "step", step)
    say(monkeypatch, "the flock", "a token")
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        chat.talk(engine, talker, 64, chat.Settings(temperature=0, max_tokens=30))
    finally:
        signal.signal(signal.SIGINT, before)
    err = capsys.readouterr().err
    assert "3 written" in err and ", stopped]" in err and "cut at its limit" in err and engine.admitted == 0


def test_chat_command_talks_with_compressed_folder(
    model: Any, packed: Callable[..., Any], talker: Any, tmp_path: Any,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    checkpoint.adopt(model, find_layers(model), packed(model, "trellis"))
    model.save_pretrained(tmp_path)
    talker.save_pretrained(tmp_path)
    monkeypatch.setattr(inference.torch, "set_num_threads", lambda threads: None)
    words = ["chat", str(tmp_path), "--max-tokens", "3", "--seed", "1"]
    answers = []
    for _ in range(2):
        say(monkeypatch, "the flock")
        assert main(words) == 0
        answers.append(capsys.readouterr().out)
    assert answers[0] == answers[1] and len(answers[0].splitlines()) >= 1
    assert main([*words, "--temperature", "3"]) == 2 and "--temperature between 0 and 2" in capsys.readouterr().err
    talker.chat_template = None
    (tmp_path / "chat_template.jinja").unlink()
    talker.save_pretrained(tmp_path)
    assert main(words) == 2 and "has no chat template: serve completes texts without one" in capsys.readouterr().err
