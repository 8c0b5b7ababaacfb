"""Text that a model samples itself: reproducible, of the asked size, varied, and refused where nothing is predicted."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from nashswarm.models import sampled_text
from nashswarm.models.sampled_text import repetition, sample_text


def test_sample_text_same_seed_gives_the_same_text(tiny: Any, tokenizer: Any) -> None:
    torch.manual_seed(1)
    first, state = sample_text(tiny, tokenizer, 600), torch.random.get_rng_state()
    torch.manual_seed(2)
    assert sample_text(tiny, tokenizer, 600) == first != sample_text(tiny, tokenizer, 600, seed=1)
    torch.manual_seed(1)
    assert torch.equal(state, torch.random.get_rng_state())  # the caller's random numbers go on as they were


def test_sample_text_is_as_long_as_asked(tiny: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sampled_text, "PASSAGES_AT_ONCE", 5)
    steps: list[int] = []
    seen: list[int] = []

    def track(items: Any, description: str) -> Any:
        steps.append(len(items))
        return map(seen.append, items)

    text = sample_text(tiny, tokenizer, 1200, track=track)
    passages = int(1200 / 64 * sampled_text.SPARE) + 1
    assert len(steps) == 1 and len(seen) == steps[0]  # whatever ended early
    assert -(-passages // 5) < steps[0] < -(-passages // 5) * 64  # one for every token of a batch
    assert 600 < len(tokenizer(text)["input_ids"]) < 2000


def test_sample_text_leaves_repetitive_passages_out(tiny: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    said = iter(["again and " * 30, "no two words of this are alike", "again and " * 30])
    monkeypatch.setattr(sampled_text, "continue_passages", lambda *_: [next(said)])
    monkeypatch.setattr(sampled_text, "PASSAGES_AT_ONCE", 1)
    assert sample_text(tiny, tokenizer, 128) == "no two words of this are alike"
    assert repetition("no two words of this are alike") < sampled_text.MOST_REPETITIVE < repetition("again and " * 30)


def test_beginnings_name_words_of_the_vocabulary_and_begin_with_bos(tokenizer: Any) -> None:
    plain = [tokenizer.decode(tokens) for tokens in sampled_text.beginnings(tokenizer, 32, 0)]
    words = {token[1:] for token in tokenizer.get_vocab() if sampled_text.WORD.fullmatch(token)}
    assert any(word in text for word in words for text in plain) and len(set(plain)) > 16

    class WithBos:
        bos_token_id = 7
        chat_template = None

        def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
            return {"input_ids": [7] * add_special_tokens + tokenizer(text)["input_ids"]}

        def get_vocab(self) -> dict[str, int]:
            return dict(tokenizer.get_vocab())

    assert all(tokens[0] == 7 != tokens[1] for tokens in sampled_text.beginnings(WithBos(), 8, 0))


def test_beginnings_of_a_chat_model_ask_questions(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    template = "{% for message in messages %}small {{ message.content }} large{% endfor %}"
    monkeypatch.setattr(tokenizer, "chat_template", template, raising=False)
    begun = [tokenizer.decode(tokens) for tokens in sampled_text.beginnings(tokenizer, 6, 0)]
    assert [text.startswith("small ") and text.endswith("large") for text in begun] == [True, False, False] * 2


def test_sample_text_encoder_is_refused(random_model: Callable[[str], Any], tokenizer: Any) -> None:
    with pytest.raises(ValueError, match="predicts no tokens, so it cannot sample text"):
        sample_text(random_model("bert_encoder"), tokenizer, 100)
