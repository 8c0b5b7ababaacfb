"""Generate many answers at once: texts join the batch and leave it between two steps (continuous batching).

One thread computes.  Between two steps it lets go of answers that nobody waits for, and admits those that have waited
longest while there is room.  A step reads a piece of the next prompts and adds one token to every other answer, in
passes that all of them share if the model can.  A prompt is read in pieces, so that a long one does not hold the others
up.
"""

import collections
import contextlib
import dataclasses
import functools
import logging
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from jaxtyping import Float
from torch import Tensor

from nashswarm.runtime.serving.answer import Answer, Finish, Piece, Prompt
from nashswarm.runtime.serving.sampling import sample, score
from nashswarm.runtime.serving.steps import Stepper

log = logging.getLogger(__name__)


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


class FullError(Exception):
    """As many answers wait as may."""


class LateError(Exception):
    """An answer has waited as long as it may."""


class FailedError(Exception):
    """An answer could not be computed."""


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

    def _step(self) -> None:
        """Read a piece of the next prompts, and add one token to every answer whose prompt is read."""
        pieces = self._next_pieces()
        self._read([piece for piece in pieces if piece[0].prompt.scored])
        unscored = [piece for piece in pieces if not piece[0].prompt.scored]
        if not self._extend(unscored):
            self._read(unscored)
            self._grow()

    def _next_pieces(self) -> list[tuple[Answer, Sequence[int]]]:
        """Return pieces of the prompts to read next, those that came first first: one, and what finds room beside it.

        How a prompt is cut does not depend on the others, so that its numbers are rounded as if it were alone.
        """
        pieces: list[tuple[Answer, Sequence[int]]] = []
        piece = self._stepper.piece
        room = piece - len(self._growing())
        for answer in self._active:
            tokens = answer.prompt.tokens[answer.read : answer.read + piece]
            if tokens and pieces and len(tokens) > room:
                break
            if tokens:
                pieces.append((answer, tokens))
                room -= len(tokens)
        return pieces

    def _growing(self) -> list[Answer]:
        """Return the answers whose prompt is read."""
        return [answer for answer in self._active if answer.made and not answer.gone]

    def _extend(self, pieces: Sequence[tuple[Answer, Sequence[int]]]) -> bool:
        """Read pieces of prompts and add a token to the other answers together; return False if that cannot be done."""
        texts = [*pieces, *((answer, answer.made[-1:]) for answer in self._growing())]
        if not texts:
            return True
        try:
            caches = [self._cache(answer) for answer, _ in texts]
            logits = self._stepper.extend(caches, [tokens for _, tokens in texts])
        except Exception:
            log.warning("%d texts could not be computed together: each is computed alone", len(texts), exc_info=True)
            return False
        if logits is None:
            return False
        for number, ((answer, tokens), row) in enumerate(zip(texts, logits, strict=True)):
            with self._blamed([answer]):
                self._take(answer, tokens if number < len(pieces) else (), row)
        return True

    def _read(self, pieces: Sequence[tuple[Answer, Sequence[int]]]) -> None:
        """Read pieces of prompts one by one."""
        for answer, tokens in pieces:
            with self._blamed([answer]):
                logits = self._stepper.read(self._cache(answer), tokens, answer.prompt.scored)
                if answer.prompt.scored:
                    answer.score_prompt(logits)
                self._take(answer, tokens, logits[-1])

    def _grow(self) -> None:
        """Add one token to every answer whose prompt is read."""
        answers = self._growing()
        if not answers:
            return
        with self._blamed(answers):
            logits = self._stepper.step([answer.cache for answer in answers], [answer.made[-1] for answer in answers])
            for answer, row in zip(answers, logits, strict=True):
                with self._blamed([answer]):
                    self._advance(answer, row)

    def _cache(self, answer: Answer) -> Any:
        """Return the cache of an answer, which has none until its prompt is read."""
        answer.cache = self._stepper.start() if answer.cache is None else answer.cache
        return answer.cache

    def _take(self, answer: Answer, read: Sequence[int], logits: Float[Tensor, " vocabulary"]) -> None:
        """Count tokens of the prompt that are read; once all are, add the token that follows."""
        answer.read += len(read)
        if answer.read == len(answer.prompt.tokens):
            self._advance(answer, logits)

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
