"""A prompt, and its answer in the making."""

import dataclasses
import secrets
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from nashswarm.runtime.serving.sampling import Scored, score
from nashswarm.runtime.serving.text import TextStream

Finish = Literal["stop", "length"] | None


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
