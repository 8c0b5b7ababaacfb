"""Sample text from a causal language model, to calibrate it with where no other text is at hand.

At temperature 1 a small model drifts into noise.  Its likely tokens are therefore sampled alone, in many short
passages.  Each passage begins as text of some kind does (article, story, code, list, answer to a question), about a
word of the model's vocabulary, so that the passages have many tokens.  Passages that repeat themselves are left out.
"""

import itertools
import random
import re
import zlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import transformers
from torch import Tensor

from nashswarm.data.corpus import begins_with_bos
from nashswarm.models.sources import max_tokens
from nashswarm.progress import Track, no_track

TEMPERATURE = 0.8
LIKELIEST = 50  # tokens to sample from
PASSAGE = 128  # tokens
PASSAGES_AT_ONCE = 64
MOST_REPETITIVE = 2.2  # bytes of a passage per byte that zlib makes of it; English prose has 1.4 to 1.8, code up to 3
SPARE = 1.1  # so many times the passages that are needed, because some are left out
WORD = re.compile("[Ġ▁][A-Za-z]{4,}")  # a token of byte-level or SentencePiece vocabularies that begins a word
BEGINNINGS = (
    "{Word} is", "The {word}", " = {Word} = \n\n {Word}", "In {year}, {Word}", "def {word}(", "import ",
    "{Word} was born in", "Chapter 1\n\n", "A review of {Word}: ", "{Word}, ", '"{Word}', "class {Word}:\n",
    "It was {word}", "{Word} {Other} (born {year})", "# {Word}\n\n", "She {word}",
)  # fmt: skip
QUESTIONS = (
    "Write an encyclopedia article about {word}.", "Write a short story about {word}.",
    "Explain {word} to a beginner.", "Write a news report about {word}.", "Write a review of a film called {word}.",
    "Write a biography of somebody named {word}.", "What is the history of {word}?",
    "Write a Python program about {word}.",
)  # fmt: skip
QUESTIONS_EVERY = 3  # of three passages one answers a question, if the model has a chat template


def sample_text(model: Any, tokenizer: Any, tokens: int, seed: int = 0, track: Track = no_track) -> str:
    """Sample about ``tokens`` tokens of text from ``model``; special tokens stay in it, as in the model's own use.

    The same seed gives the same text on the same machine.  Raises ValueError for a model that predicts no tokens.
    """
    if model.get_output_embeddings() is None or not model.can_generate():
        raise ValueError("the model predicts no tokens, so it cannot sample text: calibrate it with another text")
    length = min(PASSAGE, max_tokens(model.config) or PASSAGE)
    begun = beginnings(tokenizer, int(tokens / length * SPARE) + 1, seed)
    begun = sorted((beginning[: length // 2] for beginning in begun), key=len)  # alike in length, so little padding
    batches = [begun[first : first + PASSAGES_AT_ONCE] for first in range(0, len(begun), PASSAGES_AT_ONCE)]
    devices = [model.device] if model.device.type == "cuda" else []
    passages: list[str] = []
    with torch.random.fork_rng(devices), torch.no_grad():
        torch.manual_seed(seed)
        longest = [max(map(len, batch)) for batch in batches]
        steps = iter(track(range(sum(length - already for already in longest)), "sampling text to calibrate with"))
        for batch, already in zip(batches, longest, strict=True):
            done = _Steps(steps)
            passages += continue_passages(model, tokenizer, batch, length, done)
            done.advance(length - already - done.count)  # a batch may end early
    random.Random(seed).shuffle(passages)
    varied = [passage for passage in passages if repetition(passage) <= MOST_REPETITIVE]
    return "\n\n".join(varied or passages)


def repetition(passage: str) -> float:
    """Return bytes of ``passage`` per byte that zlib makes of them.

    >>> repetition("again " * 100) > 20
    True
    """
    content = passage.encode()
    return len(content) / len(zlib.compress(content, 9))


def beginnings(tokenizer: Any, count: int, seed: int) -> list[list[int]]:
    """Return the first tokens of ``count`` passages."""
    draw = random.Random(seed)
    vocabulary = sorted((index, token) for token, index in tokenizer.get_vocab().items() if WORD.fullmatch(token))
    words = [token[1:] for _, token in vocabulary] or ["world"]
    chat = bool(getattr(tokenizer, "chat_template", None))
    begun = []
    for number in range(count):
        word = draw.choice(words)
        fields = {"Word": word.capitalize(), "Other": draw.choice(words).capitalize(), "year": draw.randint(1800, 2020)}
        if chat and number % QUESTIONS_EVERY == 0:
            question = QUESTIONS[number // QUESTIONS_EVERY % len(QUESTIONS)].format(word=word)
            messages = [{"role": "user", "content": question}]
            begun.append(list(tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)))
        else:
            text = BEGINNINGS[number % len(BEGINNINGS)].format(word=word, **fields)
            bos = [tokenizer.bos_token_id] if begins_with_bos(tokenizer) else []
            begun.append(bos + tokenizer(text, add_special_tokens=False)["input_ids"])
    return begun


class _Steps(transformers.StoppingCriteria):
    """Advances ``steps`` by one for every token of a batch, and never stops its generation; ``count``: so far."""

    def __init__(self, steps: Iterator[Any]) -> None:
        self.steps, self.count = steps, 0

    def __call__(self, tokens: Tensor, scores: Any, **options: Any) -> Tensor:
        self.advance(1)
        return torch.zeros(len(tokens), dtype=torch.bool, device=tokens.device)

    def advance(self, count: int) -> None:
        for _ in itertools.islice(self.steps, count):
            self.count += 1


def continue_passages(
    model: Any,
    tokenizer: Any,
    begun: Sequence[Sequence[int]],
    length: int,
    at_every_token: transformers.StoppingCriteria | None = None,
) -> list[str]:
    """Return passages of at most ``length`` tokens with these beginnings.

    ``at_every_token`` is called whenever each of them has another token.
    """
    longest = max(map(len, begun))
    end = tokenizer.eos_token_id
    padding = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else end or 0
    tokens = torch.tensor([[padding] * (longest - len(part)) + list(part) for part in begun])
    mask = torch.tensor([[0] * (longest - len(part)) + [1] * len(part) for part in begun])
    settings = transformers.GenerationConfig(
        do_sample=True, temperature=TEMPERATURE, top_k=LIKELIEST, top_p=1.0, max_length=length, min_new_tokens=1,
        eos_token_id=end, pad_token_id=padding, repetition_penalty=1.0,
        # A cache that grows is copied at every token: a third of the time.
        cache_implementation="static" if getattr(model, "_can_compile_fullgraph", False) else None,
    )  # fmt: skip
    found = model.generate(
        tokens.to(model.device), attention_mask=mask.to(model.device), generation_config=settings,
        stopping_criteria=None if at_every_token is None else transformers.StoppingCriteriaList([at_every_token]),
    ).cpu()  # fmt: skip
    passages = []
    for row, part in zip(found.tolist(), begun, strict=True):
        new = row[longest:]
        if end in new:
            new = new[: new.index(end) + 1]
        passages.append(tokenizer.decode([*part, *new]))
    return passages
