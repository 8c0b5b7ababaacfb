"""Between text and tokens: prompts and conversations to tokens, and tokens to text as they come."""

from collections.abc import Mapping, Sequence
from typing import Any

import jinja2

from nashswarm.models.architecture import max_window
from nashswarm.models.sources import LONGEST_WINDOW

CONTEXT = 8  # tokens of the prompt that new ones are decoded with
DECODING = {"skip_special_tokens": True, "clean_up_tokenization_spaces": False}  # a text that grows is never changed
LONGEST = 4  # bytes of a character
UNKNOWN = "\ufffd"  # in place of bytes that are no whole character


def encode_prompt(tokenizer: Any, prompt: str | Sequence[int]) -> list[int]:
    """Return the tokens of a prompt, which may be tokens already.

    Raises ValueError for a prompt without tokens, or with half of a character.
    """
    if isinstance(prompt, str):
        check_characters(prompt, "the prompt")
        prompt = [int(token) for token in tokenizer(prompt, verbose=False)["input_ids"]]
    if not prompt:
        raise ValueError("the prompt has no tokens")
    return list(prompt)


def check_characters(text: str, of_what: str) -> None:
    """Raise ValueError for half of a surrogate pair, which JSON can name and no tokenizer reads."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{of_what} holds {text[error.start]!a} at character {error.start}, which is half of a surrogate pair and "
            "no character: send whole characters"
        ) from error


def encode_conversation(tokenizer: Any, messages: Sequence[Mapping[str, str]]) -> list[int]:
    """Return the tokens of a conversation in the template of the model, ready for its answer.

    Control tokens that messages spell out are text: only the template sets them.  Raises ValueError if the tokenizer
    has no template, the template refuses the conversation, or a message holds half of a character.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise ValueError(
            "the model's tokenizer has no chat template: send texts to /v1/completions, or put the template that the "
            "model was trained with into its folder, as chat_template.jinja"
        )
    for number, message in enumerate(messages):
        check_characters(message["content"], f"message {number}")
    try:
        ids = tokenizer.apply_chat_template(
            list(messages), add_generation_prompt=True, return_dict=False, sanitize_control_tokens=True
        )
    except (jinja2.TemplateError, TypeError) as error:  # TypeError: as templates fail on roles that they do not know
        raise ValueError(f"the model's chat template refuses this conversation: {error}") from error
    return encode_prompt(tokenizer, ids)


def end_tokens(model: Any, tokenizer: Any) -> frozenset[int]:
    """Return the tokens that end an answer, those of the generation config and that of the tokenizer."""
    named = [getattr(model.generation_config, "eos_token_id", None), getattr(tokenizer, "eos_token_id", None)]
    tokens = [token for ends in named for token in (ends if isinstance(ends, list) else [ends])]
    return frozenset(token for token in tokens if token is not None)


def longest_text(model: Any) -> int:
    """Return the tokens that a text may have: the model's maximum, or 2048 if its config names none."""
    return max_window(model) or LONGEST_WINDOW


def token_text(tokenizer: Any, before: Sequence[int], token: int) -> str:
    """Return the text that a token adds to those before it, special ones by their names."""
    ids = list(before[-1:])
    text = tokenizer.decode(ids, clean_up_tokenization_spaces=False)
    return tokenizer.decode([*ids, token], clean_up_tokenization_spaces=False)[len(text) :]


class TextStream:
    """The text of tokens that come one by one.

    Tokens are decoded together with some before them, since the first token of a text may lose its blank.  Text is
    held back while it ends within a character, or in what may become one of the ``stops``, texts that end the answer.
    ``stopped`` tells that one came; it is not part of the text.
    """

    def __init__(self, tokenizer: Any, prompt: Sequence[int], stops: Sequence[str] = ()) -> None:
        self.stopped = False
        self._tokenizer, self._stops = tokenizer, stops
        size = CONTEXT
        while self._decode(prompt[-size:]).startswith(UNKNOWN) and size < len(prompt):
            size *= 2  # back to where a character begins
        self._ids = list(prompt[-size:])
        self._first, self._read = 0, len(self._ids)  # tokens from the one are decoded, before the other are told
        while self._decode(self._ids[: self._read]).endswith(UNKNOWN) and len(self._ids) - self._read < LONGEST:
            self._read -= 1  # the prompt may end within a character
        self._held = ""

    def push(self, token: int) -> str:
        """Return the text that is sure to follow once this token has come."""
        self._ids.append(token)
        before, after = self._decode(self._ids[self._first : self._read]), self._decode(self._ids[self._first :])
        if after.endswith(UNKNOWN) or len(after) <= len(before):
            return ""
        self._first, self._read = self._read, len(self._ids)
        return self._pass_on(after[len(before) :])

    def finish(self) -> str:
        """Return the text that was held back, without a character of which bytes are missing."""
        before = self._decode(self._ids[self._first : self._read])
        text = self._pass_on(self._decode(self._ids[self._first :]).rstrip(UNKNOWN)[len(before) :])
        text, self._held = text + self._held, ""
        return text

    def _decode(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode(ids, **DECODING)

    def _pass_on(self, text: str) -> str:
        """Return what can be told of the text held and this one."""
        if self.stopped:
            return ""
        text = self._held + text
        starts = [start for stop in self._stops if (start := text.find(stop)) >= 0]
        if starts:
            self.stopped, self._held = True, ""
            return text[: min(starts)]
        held = max((_overlap(text, stop) for stop in self._stops), default=0)
        self._held = text[len(text) - held :]
        return text[: len(text) - held]


def _overlap(text: str, stop: str) -> int:
    """Return how many characters at the end of a text may be the beginning of ``stop``.

    >>> _overlap("one\\n", "\\n\\n"), _overlap("one", "two"), _overlap("aab", "aabc")
    (1, 0, 3)
    """
    return next((size for size in range(min(len(text), len(stop)), 0, -1) if stop.startswith(text[-size:])), 0)
