"""The bodies of replies in the words of OpenAI's API, whole or as the chunks of a stream."""

from collections.abc import Sequence
from typing import Any, Literal

import pydantic

from nashswarm.runtime.serving.answer import Finish, Piece, Prompt
from nashswarm.runtime.serving.sampling import Scored
from nashswarm.runtime.serving.text import UNKNOWN, token_text


class Usage(pydantic.BaseModel):
    """Counts of tokens."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


def count(read: int, made: int) -> Usage:
    """Count the tokens of prompts and answers."""
    return Usage(prompt_tokens=read, completion_tokens=made, total_tokens=read + made)


class Logprobs(pydantic.BaseModel):
    """Scores of the tokens of a completion: natural logarithms, and where each token's text begins."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class CompletionChoice(pydantic.BaseModel):
    index: int
    text: str
    logprobs: Logprobs | None
    finish_reason: Finish


class TokenLogprob(pydantic.BaseModel):
    token: str
    logprob: float
    bytes: list[int] | None


class ChatTokenLogprob(TokenLogprob):
    top_logprobs: list[TokenLogprob]


class ChatLogprobs(pydantic.BaseModel):
    content: list[ChatTokenLogprob]
    refusal: None = None


class ChatMessage(pydantic.BaseModel):
    role: Literal["assistant"] = "assistant"
    content: str
    refusal: None = None


class ChatChoice(pydantic.BaseModel):
    index: int
    message: ChatMessage
    logprobs: ChatLogprobs | None
    finish_reason: Finish


class Delta(pydantic.BaseModel):
    """What a chunk adds to a message; only the first one names the role."""

    role: Literal["assistant"] | None = pydantic.Field(None, exclude_if=lambda role: role is None)
    content: str


class ChatChunkChoice(pydantic.BaseModel):
    index: int
    delta: Delta
    logprobs: ChatLogprobs | None
    finish_reason: Finish


class Reply(pydantic.BaseModel):
    """What all replies have in common."""

    id: str
    created: int
    model: str
    usage: Usage | None = None


class Completion(Reply):
    object: Literal["text_completion"] = "text_completion"
    choices: list[CompletionChoice]


class Chat(Reply):
    object: Literal["chat.completion"] = "chat.completion"
    choices: list[ChatChoice]


class ChatChunk(Reply):
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    choices: list[ChatChunkChoice]


class Model(pydantic.BaseModel):
    id: str
    object: Literal["model"] = "model"
    created: int = 0
    owned_by: str = "nashswarm"


class Models(pydantic.BaseModel):
    object: Literal["list"] = "list"
    data: list[Model]


class Fault(pydantic.BaseModel):
    message: str
    type: Literal["invalid_request_error", "rate_limit_error", "server_error"]
    param: None = None
    code: None = None


class Refusal(pydantic.BaseModel):
    """The body of every reply that is no success."""

    error: Fault


def refusal(status: int, reason: str) -> Refusal:
    """Return the body of a refusal with this HTTP status and one sentence."""
    if status < 429:
        return Refusal(error=Fault(message=reason, type="invalid_request_error"))
    return Refusal(error=Fault(message=reason, type="rate_limit_error" if status == 429 else "server_error"))


def merge(pieces: Sequence[Piece]) -> Piece:
    """Return the pieces of an answer as one."""
    scores = tuple(score for piece in pieces for score in piece.scores)
    return Piece(
        "".join(piece.text for piece in pieces), sum(piece.tokens for piece in pieces), scores, pieces[-1].finish
    )


class Writer:
    """The choices of one answer, whose pieces come one by one.  ``echo``: the text that the first one begins with."""

    def __init__(self, index: int, prompt: Prompt, tokenizer: Any, echo: str = "") -> None:
        self._index, self._tokenizer, self._echo = index, tokenizer, echo
        self._scored = prompt.alternatives is not None
        self._before = [] if prompt.scored else list(prompt.tokens[-1:])  # the token before the next that is scored
        self._offset = 0 if prompt.scored else len(echo)  # of its text
        self._begun = False

    def completion(self, piece: Piece) -> CompletionChoice:
        text, logprobs = ("" if self._begun else self._echo) + piece.text, None
        if self._scored:
            logprobs = Logprobs(tokens=[], token_logprobs=[], top_logprobs=[], text_offset=[])
            for score in piece.scores:
                own, *others = self._texts(score)
                logprobs.tokens.append(own)
                logprobs.token_logprobs.append(score.logprob)
                logprobs.top_logprobs.append(self._best(score, own, others))
                logprobs.text_offset.append(self._offset)
                self._offset += len(own)
        self._begun = True
        return CompletionChoice(index=self._index, text=text, logprobs=logprobs, finish_reason=piece.finish)

    def chat(self, piece: Piece) -> ChatChoice:
        logprobs, message = self._chat_logprobs(piece), ChatMessage(content=piece.text)
        return ChatChoice(index=self._index, message=message, logprobs=logprobs, finish_reason=piece.finish)

    def chat_chunk(self, piece: Piece) -> ChatChunkChoice:
        delta = Delta(role=None if self._begun else "assistant", content=piece.text)
        self._begun, logprobs = True, self._chat_logprobs(piece)
        return ChatChunkChoice(index=self._index, delta=delta, logprobs=logprobs, finish_reason=piece.finish)

    def _chat_logprobs(self, piece: Piece) -> ChatLogprobs | None:
        if not self._scored:
            return None
        content = []
        for score in piece.scores:
            own, *others = self._texts(score)
            pairs = zip(others, score.alternatives, strict=True)
            best = [TokenLogprob(token=text, logprob=logprob, bytes=_bytes(text)) for text, (_, logprob) in pairs]
            content.append(
                ChatTokenLogprob(token=own, logprob=score.logprob or 0.0, bytes=_bytes(own), top_logprobs=best)
            )
        return ChatLogprobs(content=content)

    def _texts(self, score: Scored) -> list[str]:
        """Return the text of a scored token and those of its alternatives."""
        tokens = [score.token, *(token for token, _ in score.alternatives)]
        texts = [token_text(self._tokenizer, self._before, token) for token in tokens]
        self._before = [score.token]
        return texts

    @staticmethod
    def _best(score: Scored, own: str, others: Sequence[str]) -> dict[str, float] | None:
        """Return the alternatives by text, the token itself among them; of one text the most probable counts."""
        if score.logprob is None:
            return None
        best: dict[str, float] = {}
        for text, (_, logprob) in zip(others, score.alternatives, strict=True):
            best.setdefault(text, logprob)
        best.setdefault(own, score.logprob)
        return best


def _bytes(text: str) -> list[int] | None:
    """Return the bytes of a token's text, or None if they are part of a character."""
    return None if UNKNOWN in text else list(text.encode())
