"""The bodies of requests in the words of OpenAI's API, and the prompts that they stand for.

A value of null means the default.  Fields of the API that this server does not compute are accepted where their value
asks for nothing, and refused otherwise; unknown fields are refused, not ignored.
"""

from collections.abc import Sequence
from typing import Annotated, Any, Literal

import pydantic

from nashswarm.runtime.serving.answer import Prompt
from nashswarm.runtime.serving.text import DECODING, encode_conversation, encode_prompt

MOST_CHOICES = 128
MOST_STOPS = 16
MOST_ALTERNATIVES = 20
CHOICES = {  # fields that take values of several types
    "prompt": "a text or tokens, or a list of texts or of lists of tokens, none of them empty",
    "stop": f"a text, or a list of at most {MOST_STOPS}",
    "content": "a text, or a list of parts of type text",
}


class TooLongError(ValueError):
    """A prompt and its answer exceed what can be read."""


def _only(*allowed: Any) -> pydantic.AfterValidator:
    """Refuse all values of a field but these, the ones that ask for nothing."""

    def check(value: Any) -> Any:
        if value not in allowed:
            raise ValueError(f"this server takes only {' or '.join(map(repr, allowed))}")
        return value

    return pydantic.AfterValidator(check)


def _allow_null(schema: dict[str, Any]) -> None:
    """Tell in the schema of a body that null is allowed wherever there is a default."""
    for name, field in schema["properties"].items():
        if name not in schema.get("required", ()):
            schema["properties"][name] = {"anyOf": [field, {"type": "null"}]}


class Body(pydantic.BaseModel):
    """A JSON object where null means the default."""

    model_config = pydantic.ConfigDict(
        extra="forbid", strict=True, allow_inf_nan=False, json_schema_extra=_allow_null, protected_namespaces=()
    )

    @pydantic.model_validator(mode="before")
    @classmethod
    def _drop_null(cls, body: Any) -> Any:
        if not isinstance(body, dict):
            return body
        optional = {name for name, field in cls.model_fields.items() if not field.is_required()}
        return {name: value for name, value in body.items() if value is not None or name not in optional}


class StreamOptions(Body):
    """Options of a stream.  ``include_usage``: whether the last event counts tokens."""

    include_usage: bool = False
    include_obfuscation: bool = False


class Request(Body):
    """What all requests have in common."""

    model: str | None = None
    temperature: float = pydantic.Field(1.0, ge=0, le=2)
    top_p: float = pydantic.Field(1.0, ge=0, le=1)
    n: int = pydantic.Field(1, ge=1, le=MOST_CHOICES)
    seed: int | None = pydantic.Field(None, ge=-1, lt=2**62, description="-1: another one each time, as without it")
    stop: str | Annotated[list[str], pydantic.Field(max_length=MOST_STOPS)] = []
    stream: bool = False
    stream_options: StreamOptions = StreamOptions()
    user: str = ""
    frequency_penalty: Annotated[float, _only(0)] = 0
    presence_penalty: Annotated[float, _only(0)] = 0
    logit_bias: Annotated[dict[str, float], _only({})] = {}

    def stops(self) -> tuple[str, ...]:
        return tuple(stop for stop in ([self.stop] if isinstance(self.stop, str) else self.stop) if stop)

    def seed_of(self, number: int) -> int | None:
        return None if self.seed is None or self.seed < 0 else self.seed + number


class CompletionRequest(Request):
    """The body of a request to ``/v1/completions``; a prompt is a text or its tokens, or several of one kind."""

    prompt: (
        str
        | Annotated[list[int], pydantic.Field(min_length=1)]
        | Annotated[list[str], pydantic.Field(min_length=1)]
        | Annotated[list[Annotated[list[int], pydantic.Field(min_length=1)]], pydantic.Field(min_length=1)]
    )
    max_tokens: int = pydantic.Field(16, ge=0, description="0: only with echo")
    echo: bool = False
    logprobs: int | None = pydantic.Field(
        None, ge=0, le=MOST_ALTERNATIVES, description="tokens to score beside each one told"
    )
    best_of: int | None = pydantic.Field(None, ge=1, le=MOST_CHOICES, description="as many as n")
    suffix: Annotated[str, _only("")] = ""

    def prompts(self) -> Sequence[str | list[int]]:
        """Return the prompts as a list, whatever was given."""
        prompt: Any = self.prompt
        return prompt if isinstance(prompt, list) and not isinstance(prompt[0], int) else [prompt]

    @pydantic.model_validator(mode="after")
    def _agree(self) -> "CompletionRequest":
        if self.best_of not in (None, self.n):
            raise ValueError(f"best_of={self.best_of}: this server takes only as many as n={self.n}, or none")
        if self.max_tokens == 0 and not self.echo:
            raise ValueError("max_tokens: at least 1 without echo")
        return self


class TextPart(Body):
    """A part of a message."""

    type: Literal["text"]
    text: str


class Message(Body):
    """A message of a conversation, with what clients send back of an answer."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart] = ""
    name: str = ""
    refusal: Annotated[str, _only("")] = ""
    annotations: Annotated[list[Any], _only([])] = []
    tool_calls: Annotated[list[Any], _only([])] = []

    def plain(self) -> dict[str, str]:
        """Return what templates of chat know."""
        text = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return {"role": "system" if self.role == "developer" else self.role, "content": text}


class ResponseFormat(Body):
    """The format of an answer: text."""

    type: Literal["text"] = "text"


class ChatRequest(Request):
    """The body of a request to ``/v1/chat/completions``."""

    messages: list[Message] = pydantic.Field(min_length=1)
    max_tokens: int | None = pydantic.Field(None, ge=1, description="default: as many as the model can still read")
    max_completion_tokens: int | None = pydantic.Field(None, ge=1)
    logprobs: bool = False
    top_logprobs: int = pydantic.Field(0, ge=0, le=MOST_ALTERNATIVES)
    tools: Annotated[list[Any], _only([])] = []
    tool_choice: Literal["none", "auto"] = "none"
    parallel_tool_calls: bool = True
    response_format: ResponseFormat = ResponseFormat()
    store: Annotated[bool, _only(False)] = False
    metadata: dict[str, str] = {}
    service_tier: Literal["auto", "default"] = "auto"

    @pydantic.model_validator(mode="after")
    def _agree(self) -> "ChatRequest":
        if self.top_logprobs and not self.logprobs:
            raise ValueError("top_logprobs: only with logprobs")
        return self


def explain(place: Sequence[str | int], kind: str, message: str) -> str:
    """Say in a sentence what is wrong with the value at this place of a body, by the words of its validator."""
    message = message.removeprefix("Value error, ")
    chosen = next((number for number, part in enumerate(place) if part in CHOICES), None)
    if chosen is not None and kind != "missing":
        place, message = place[: chosen + 1], f"must be {CHOICES[str(place[chosen])]}"
    if kind == "extra_forbidden":
        message = "this server knows no such field"
    return ": ".join([".".join(map(str, place)), message] if place else [message])


def completion_prompts(body: CompletionRequest, tokenizer: Any, vocabulary: int, longest: int) -> list[Prompt]:
    """Return the prompts of a request, each ``n`` times.

    Raises ValueError for tokens that the model does not know and texts longer than it reads.
    """
    scored = body.echo and body.logprobs is not None
    found: list[Prompt] = []
    for prompt in body.prompts():
        tokens = encode_prompt(tokenizer, prompt)
        check_length(tokens, body.max_tokens, vocabulary, longest)
        for _ in range(body.n):
            found.append(_prompt(body, len(found), tokens, body.max_tokens, body.logprobs, scored))
    return found


def echoes(body: CompletionRequest, tokenizer: Any) -> list[str]:
    """Return the text that each of the answers begins with."""
    texts = [prompt if isinstance(prompt, str) else tokenizer.decode(prompt, **DECODING) for prompt in body.prompts()]
    return [text if body.echo else "" for text in texts for _ in range(body.n)]


def chat_prompts(body: ChatRequest, tokenizer: Any, vocabulary: int, longest: int) -> list[Prompt]:
    """Return the prompt of a conversation, ``n`` times.

    Raises ValueError if the model has no template, its template refuses the conversation, or it is too long.
    """
    tokens = encode_conversation(tokenizer, [message.plain() for message in body.messages])
    wanted = body.max_completion_tokens or body.max_tokens
    check_length(tokens, wanted or 1, vocabulary, longest)
    most, alternatives = wanted or longest - len(tokens), body.top_logprobs if body.logprobs else None
    return [_prompt(body, number, tokens, most, alternatives, False) for number in range(body.n)]


def check_length(tokens: Sequence[int], answer: int, vocabulary: int, longest: int) -> None:
    """Raise ValueError for tokens beyond the vocabulary, and TooLongError for a text of more than ``longest``."""
    if unknown := [token for token in tokens if not 0 <= token < vocabulary]:
        raise ValueError(f"prompt holds the token {unknown[0]}, the model's vocabulary has {vocabulary}")
    if len(tokens) + answer > longest:
        raise TooLongError(f"{len(tokens)} tokens of prompt and max_tokens={answer} exceed {longest}")


def _prompt(
    body: Request, number: int, tokens: Sequence[int], most: int, alternatives: int | None, scored: bool
) -> Prompt:
    chosen = (body.temperature, body.top_p, body.seed_of(number), body.stops())
    return Prompt(tokens, most, *chosen, alternatives, scored)
