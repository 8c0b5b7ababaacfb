"""Talk with a model in a terminal, through the same engine and template as the server."""

import dataclasses
import queue
import sys
import time
from typing import Any

from nashswarm.runtime.serving.answer import Piece, Prompt
from nashswarm.runtime.serving.engine import Engine
from nashswarm.runtime.serving.text import encode_conversation

ASKING = "> "
FORGET, LEAVE = "/clear", "/exit"


@dataclasses.dataclass(frozen=True)
class Settings:
    """How a model talks.  ``max_tokens``: of an answer; None: as many as it can still read."""

    system: str | None = None
    temperature: float = 1.0
    top_p: float = 1.0
    max_tokens: int | None = None
    seed: int | None = None


def talk(engine: Engine, tokenizer: Any, longest: int, settings: Settings) -> None:
    """Answer lines of the standard input until it ends.

    Answers go to the standard output as they come, remarks to the standard error.  Ctrl-C stops an answer, which stays
    in the conversation as far as it came; before an answer it ends the conversation.
    """
    begun = [] if settings.system is None else [{"role": "system", "content": settings.system}]
    messages = list(begun)
    if sys.stdin.isatty():
        _remark(f"Ctrl-C stops an answer, {FORGET} forgets the conversation, {LEAVE} or Ctrl-D leaves")
    while (line := _read_line()) is not None:
        if line == FORGET:
            messages = list(begun)
        elif line:
            asked = [*messages, {"role": "user", "content": line}]
            try:
                tokens = encode_conversation(tokenizer, asked)
                if len(tokens) >= longest:
                    raise ValueError(f"the conversation has {len(tokens)} tokens, the model reads {longest}")
            except ValueError as error:
                _remark(f"{error}; {FORGET} forgets the conversation")
                continue
            most = min(settings.max_tokens or longest, longest - len(tokens))
            prompt = Prompt(tokens, most, settings.temperature, settings.top_p, settings.seed)
            messages = [*asked, {"role": "assistant", "content": _answer(engine, prompt)}]


def _read_line() -> str | None:
    """Return the next line that the user types, /exit and the end of the input as None."""
    try:
        line = input(ASKING if sys.stdin.isatty() else "").strip()
    except (EOFError, KeyboardInterrupt):
        print(file=sys.stderr)
        return None
    return None if line == LEAVE else line


def _answer(engine: Engine, prompt: Prompt) -> str:
    """Print an answer as it comes, then how fast it came, and return it."""
    pieces: queue.SimpleQueue[Piece | Exception] = queue.SimpleQueue()
    started = time.perf_counter()
    text, tokens, first, finish = "", 0, started, None
    answers = engine.submit([prompt], lambda _, piece: pieces.put(piece))
    try:
        while finish is None:
            piece = pieces.get()
            if isinstance(piece, Exception):
                raise piece
            first = first if tokens else time.perf_counter()
            text, tokens, finish = text + piece.text, tokens + piece.tokens, piece.finish
            print(piece.text, end="", flush=True)
    except KeyboardInterrupt:
        engine.cancel(answers)
    print(flush=True)
    ended = {"length": ", cut at its limit", "stop": "", None: ", stopped"}[finish]
    rate = f", {(tokens - 1) / (time.perf_counter() - first):.1f} per second" if tokens > 1 else ""
    _remark(f"{len(prompt.tokens)} tokens read in {first - started:.1f} s, {tokens} written{rate}{ended}")
    return text


def _remark(text: str) -> None:
    print(f"\033[2m[{text}]\033[0m" if sys.stderr.isatty() else f"[{text}]", file=sys.stderr, flush=True)
