"""Generate many answers at once: texts join the batch and leave it between two steps (continuous batching).

One thread computes.  Between two steps it lets go of answers that nobody waits for, admits those that have waited
longest while there is room, and reads a piece of the next prompts; a step then adds one token to every answer.  A
prompt is read in pieces, so that a long one does not hold the others up.
"""

import collections
import contextlib
import dataclasses
import functools
import logging
import secrets
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from nashswarm.runtime.serving.sampling import Scored, sample, score
from nashswarm.runtime.serving.steps import Stepper
from nashswarm.runtime.serving.text import TextStream

log = logging.getLogger(__name__)
Finish = Literal["stop", "length"] | None


@dataclasses.dataclass(frozen=True)
class Limits:
    """Limits of an engine.

    ``queue``: answers that may wait, without those being computed.  ``batch``: answers computed at once.  ``patience``:
    seconds that one may wait.  ``tokens``: of all texts being computed, prompts and answers at their longest; None: as
    many as the model can read, for each.
    """

    queue: int = 16
    batch: int = 16
    patience: float = 60.0
    tokens: int | None = None


@dataclasses.dataclass(frozen=True)
class Prompt:
    """What to answer, and how.

    ``max_tokens``: of the answer.  ``temperature``, ``top_p``: see ``sampling``.  ``seed``: None draws one.
    ``stops``: texts that end the answer.  ``alternatives``: tokens to score beside each of the answer; None: no scores.
    ``scored``: whether the prompt's tokens are scored too.
    """

    tokens: Sequence[int]
    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    seed: int | None = None
    stops: Sequence[str] = ()
    alternatives: int | None = None
    scored: bool = False


@dataclasses.dataclass(frozen=True)
class Piece:
    """Part of an answer: text, the number of its tokens, their scores if wanted, and why it ends if it does."""

    text: str
    tokens: int
    scores: tuple[Scored, ...] = ()
    finish: Finish = None


class FullError(Exception):
    """As many answers wait as may."""


class LateError(Exception):
    """An answer has waited as long as it may."""


class FailedError(Exception):
    """An answer could not be computed."""


Deliver = Callable[[Piece | Exception], None]


class Answer:
    """An answer in the making; what comes of it goes to ``deliver``, in the thread of the engine.

    The last thing that is delivered is a piece with ``finish``, or an exception.
    """

    def __init__(self, prompt: Prompt, deliver: Deliver, tokenizer: Any, deadline: float) -> None:
        self.prompt, self.deliver, self.deadline = prompt, deliver, deadline
        self.gone = False  # finished or cancelled
        self.cache: Any = None
        self.read = 0  # tokens of the prompt
        self.made: list[int] = []
        self.scores: list[Scored] = []  # that no piece has told yet
        self.text = TextStream(tokenizer, prompt.tokens, prompt.stops)
        self.generator = torch.Generator().manual_seed(secrets.randbits(63) if prompt.seed is None else prompt.seed)

    @property
    def size(self) -> int:
        """Return the tokens that the text may grow to."""
        return len(self.prompt.tokens) + self.prompt.max_tokens

    def score_prompt(self, logits: Float[Tensor, "positions vocabulary"]) -> None:
        """Score the tokens of the prompt that follow those which were just read; the first one follows nothing."""
        tokens, first, alternatives = self.prompt.tokens, self.read + 1, self.prompt.alternatives or 0
        if first == 1:
            self.scores.append(Scored(tokens[0]))
        following = zip(logits, tokens[first : first + len(logits)], strict=False)
        self.scores += [score(row, token, alternatives) for row, token in following]


class Engine:
    """Answers prompts with a model, many at a time.  ``ends``: tokens that end an answer."""

    def __init__(self, stepper: Stepper, tokenizer: Any, ends: frozenset[int], limits: Limits) -> None:
        self._stepper, self._tokenizer, self._ends, self._limits = stepper, tokenizer, ends, limits
        self._changed = threading.Condition()  # guards what follows
        self._waiting: collections.deque[Answer] = collections.deque()
        self._active: list[Answer] = []  # those that have waited longest first
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="generate", daemon=True)
        self._thread.start()

    @property
    def admitted(self) -> int:
        """Return how many answers wait or are computed."""
        return len(self._waiting) + sum(not answer.gone for answer in self._active)

    def check_room(self, count: int) -> None:
        """Raise ValueError for more answers than find room even where nothing else waits."""
        if count > (most := self._limits.batch + self._limits.queue):
            raise ValueError(f"{count} answers in one request are more than the {most} that this server takes at once")

    def submit(self, prompts: Sequence[Prompt], deliver: Callable[[int, Piece | Exception], None]) -> list[Answer]:
        """Queue prompts, all or none; ``deliver`` gets the number of the prompt and each piece of its answer.

        Raises FullError if they find no room.
        """
        deadline = time.monotonic() + self._limits.patience
        answers = [
            Answer(prompt, functools.partial(deliver, number), self._tokenizer, deadline)
            for number, prompt in enumerate(prompts)
        ]
        with self._changed:
            room = self._limits.batch + self._limits.queue - self.admitted
            if len(answers) > room:
                raise FullError(f"{len(self._waiting)} requests are waiting already: try again")
            self._waiting.extend(answers)
            self._changed.notify()
        return answers

    def cancel(self, answers: Sequence[Answer]) -> None:
        """Stop computing answers; nothing more is delivered of them once a step that runs has ended."""
        with self._changed:
            for answer in answers:
                answer.gone = True
            self._waiting = collections.deque(answer for answer in self._waiting if not answer.gone)

    def close(self) -> None:
        """End the thread; what is not answered yet is never answered."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join()

    def _run(self) -> None:
        while self._admit():
            self._read()
            self._step()
        self._active.clear()

    def _admit(self) -> bool:
        """Wait for something to do and fill the batch; return False once the engine is closed."""
        with self._changed:
            for answer in self._active:
                answer.cache = None if answer.gone else answer.cache
            self._active = [answer for answer in self._active if not answer.gone]
            self._changed.wait_for(lambda: self._closed or self._waiting or self._active)
            now = time.monotonic()
            late = [answer for answer in self._waiting if answer.deadline < now]
            for answer in late:
                self._waiting.remove(answer)
            while self._waiting and len(self._active) < self._limits.batch and self._fits(self._waiting[0]):
                self._active.append(self._waiting.popleft())
        for answer in late:
            self._deliver(answer, LateError(f"the request has waited {self._limits.patience:g} seconds: try again"))
        return not self._closed

    def _fits(self, answer: Answer) -> bool:
        limit = self._limits.tokens
        return limit is None or not self._active or sum(other.size for other in (*self._active, answer)) <= limit

    def _read(self) -> None:
        """Read a piece of the prompts that are not read yet, or several short ones, those that came first first.

        How a prompt is cut does not depend on the others, so that its numbers are rounded as if it were alone.
        """
        room = piece = self._stepper.piece
        for answer in [answer for answer in self._active if answer.read < len(answer.prompt.tokens)]:
            if room <= 0:
                break
            tokens = answer.prompt.tokens[answer.read : answer.read + piece]
            room -= len(tokens)
            with self._blamed([answer]):
                answer.cache = self._stepper.start() if answer.cache is None else answer.cache
                logits = self._stepper.read(answer.cache, tokens, answer.prompt.scored)
                if answer.prompt.scored:
                    answer.score_prompt(logits)
                answer.read += len(tokens)
                if answer.read == len(answer.prompt.tokens):
                    self._advance(answer, logits[-1])

    def _step(self) -> None:
        """Add one token to every answer whose prompt is read."""
        answers = [answer for answer in self._active if answer.made and not answer.gone]
        if not answers:
            return
        with self._blamed(answers):
            logits = self._stepper.step([answer.cache for answer in answers], [answer.made[-1] for answer in answers])
            for answer, row in zip(answers, logits, strict=True):
                with self._blamed([answer]):
                    self._advance(answer, row)

    def _advance(self, answer: Answer, logits: Float[Tensor, " vocabulary"]) -> None:
        """Add the token that follows to an answer, and deliver what it makes of its text."""
        prompt = answer.prompt
        finish: Finish = None
        if not prompt.max_tokens:
            self._deliver(answer, Piece("", 0, tuple(answer.scores), "length"))
            return
        token = sample(logits, prompt.temperature, prompt.top_p, answer.generator)
        answer.made.append(token)
        if prompt.alternatives is not None:
            answer.scores.append(score(logits, token, prompt.alternatives))
        text = "" if token in self._ends else answer.text.push(token)
        if token in self._ends or answer.text.stopped:
            finish = "stop"
        elif len(answer.made) == prompt.max_tokens:
            finish = "length"
        if finish is not None and not answer.text.stopped:
            text += answer.text.finish()
            finish = "stop" if answer.text.stopped else finish
        self._deliver(answer, Piece(text, 1, tuple(answer.scores), finish))
        answer.scores.clear()

    @contextlib.contextmanager
    def _blamed(self, answers: Sequence[Answer]) -> Iterator[None]:
        """End these answers if an error is raised; others are computed after any failure."""
        try:
            yield
        except Exception as error:
            log.exception("%d answers could not be computed", len(answers))
            for answer in answers:
                self._deliver(answer, FailedError(f"the request could not be computed: {type(error).__name__}"))

    @staticmethod
    def _deliver(answer: Answer, piece: Piece | Exception) -> None:
        if isinstance(piece, Exception) or piece.finish is not None:
            answer.gone, answer.cache = True, None
        try:
            answer.deliver(piece)
        except Exception:  # the listener is gone
            log.debug("an answer reached nobody", exc_info=True)
            answer.gone, answer.cache = True, None
