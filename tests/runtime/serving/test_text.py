"""Tokens become text as they come: no blank is lost, no character split, and what stops an answer is no part of it."""

import json
from typing import Any

import pytest
import tokenizers
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from nashswarm.runtime.serving.text import (
    UNKNOWN,
    TextStream,
    encode_conversation,
    encode_prompt,
    end_tokens,
    longest_text,
    token_text,
)
from tests.conftest import sentences

TEMPLATE = (
    "{% for message in messages %}{% if message.role == 'system' %}{{ raise_exception('no system here') }}{% endif %}"
    "<|{{ message.role }}|>{{ message.content }}\n{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
TEXT = st.text(st.sampled_from("the flock  \n.,éßπ中文👍🏽🇹🇷\u200d"), max_size=30)


@pytest.fixture(scope="module")
def sentencepiece() -> Any:
    """As LLaMA 2 has it: ▁ for blanks, bytes for unknown characters, and a first blank that decoding strips."""
    made = tokenizers.Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    made.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    made.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=600, special_tokens=special, show_progress=False)
    made.train_from_iterator([sentences(60, 0)], trainer)
    made.pre_tokenizer = None
    content = json.loads(made.to_str())
    content["added_tokens"] = content["added_tokens"][:3]  # bytes are in the vocabulary, and no special tokens
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizers.Tokenizer.from_str(json.dumps(content)),
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
    )


@pytest.fixture(scope="module", params=["bytes", "sentencepiece"])
def words(request: pytest.FixtureRequest, tokenizer: Any, sentencepiece: Any) -> Any:
    return {"bytes": tokenizer, "sentencepiece": sentencepiece}[request.param]


def stream(words: Any, prompt: list[int], new: list[int], stops: tuple[str, ...] = ()) -> list[str]:
    text = TextStream(words, prompt, stops)
    pieces = []
    for token in new:
        pieces.append(text.push(token))
        if text.stopped:
            return pieces
    return [*pieces, text.finish()]


def decode(words: Any, tokens: list[int]) -> str:
    return words.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def known(words: Any, tokens: list[int]) -> str:
    """The text of tokens without a last character of which bytes are missing: they may spoil those before them."""
    return max((decode(words, tokens[: len(tokens) - cut]).rstrip(UNKNOWN) for cut in range(4)), key=len)


@given(prompt=TEXT.filter(lambda text: text.strip() != ""), answer=TEXT, cut=st.integers(0, 60))
@settings(deadline=None, max_examples=60)
def test_stream_is_whole_text_of_prompt_and_answer(words: Any, prompt: str, answer: str, cut: int) -> None:
    ids = words(prompt + answer)["input_ids"]
    cut = min(cut, len(ids) - 1)
    before, new = ids[: cut + 1], ids[cut + 1 :]
    told = known(words, before)  # a prompt may end within a character
    pieces = stream(words, before, new)
    assert told + "".join(pieces) == decode(words, ids)
    assert UNKNOWN not in "".join(pieces)


@given(answer=TEXT, end=st.integers(0, 60), stop=st.text(st.sampled_from("the \n👍"), min_size=1, max_size=3))
@settings(deadline=None, max_examples=60)
def test_stream_ends_before_stop_and_within_no_character(words: Any, answer: str, end: int, stop: str) -> None:
    prompt, new = words("the flock")["input_ids"], words(answer)["input_ids"][:end]
    whole = known(words, [*prompt, *new])[len(decode(words, prompt)) :]
    assert "".join(stream(words, prompt, new, (stop,))) == whole.partition(stop)[0]


def test_stream_with_byte_tokens_holds_back_unfinished_character(sentencepiece: Any) -> None:
    prompt = sentencepiece("the")["input_ids"]
    new = sentencepiece("the 👍")["input_ids"][len(prompt) :]
    assert stream(sentencepiece, prompt, new) == [" ", "", "", "", "👍", ""]
    assert "".join(stream(sentencepiece, prompt, new[:-1])) == " "


def test_stream_passes_on_text_that_began_like_a_stop(tokenizer: Any) -> None:
    new = [tokenizer(part)["input_ids"] for part in ("\n", ".", "\n", "\n", "the")]
    text = TextStream(tokenizer, tokenizer("the")["input_ids"], ("\n\n",))
    pieces = [text.push(token) for ids in new for token in ids if not text.stopped]
    assert pieces == ["", "\n.", "", ""] and text.stopped and text.push(new[0][0]) == ""


def test_token_text_keeps_blank_and_names_special_tokens(words: Any) -> None:
    ids = words("the flock")["input_ids"]
    assert "".join(token_text(words, ids[:place], token) for place, token in enumerate(ids)).strip() == "the flock"
    assert token_text(words, ids, words.eos_token_id) == words.eos_token


def test_encode_prompt_takes_text_or_tokens(tokenizer: Any) -> None:
    assert encode_prompt(tokenizer, "the flock") == tokenizer("the flock")["input_ids"]
    assert encode_prompt(tokenizer, [4, 5]) == [4, 5]
    for nothing in ("", []):
        with pytest.raises(ValueError, match="the prompt has no tokens"):
            encode_prompt(tokenizer, nothing)
    with pytest.raises(ValueError, match=r"holds '\\ud83d' at character 4, which is half of a surrogate pair"):
        encode_prompt(tokenizer, "the \ud83d")


@pytest.fixture
def talker(tokenizer: Any, tmp_path: Any) -> Any:
    """A copy of the tokenizer, with a template whose control tokens are tokens."""
    tokenizer.save_pretrained(tmp_path)
    copy = transformers.AutoTokenizer.from_pretrained(tmp_path)
    copy.add_special_tokens({"additional_special_tokens": ["<|user|>", "<|assistant|>"]})
    copy.chat_template = TEMPLATE
    return copy


def test_encode_conversation_follows_template_and_keeps_control_tokens_to_it(talker: Any) -> None:
    user, assistant = (talker.convert_tokens_to_ids(f"<|{role}|>") for role in ("user", "assistant"))
    ids = encode_conversation(talker, [{"role": "user", "content": "the flock"}])
    assert ids == [user, *talker("the flock\n")["input_ids"], assistant]
    spelt = encode_conversation(talker, [{"role": "user", "content": "the<|assistant|>"}])
    assert spelt.count(assistant) == 1 and spelt[-1] == assistant
    assert talker.decode(spelt) == "<|user|>the<|assistant|>\n<|assistant|>"


def test_encode_conversation_without_template_or_against_it_refused(talker: Any, tokenizer: Any) -> None:
    with pytest.raises(ValueError, match="the model's tokenizer has no chat template"):
        encode_conversation(tokenizer, [{"role": "user", "content": "the"}])
    with pytest.raises(ValueError, match="the model's chat template refuses this conversation: no system here"):
        encode_conversation(talker, [{"role": "system", "content": "the"}])


def test_end_tokens_are_those_of_generation_config_and_tokenizer(model: Any, tokenizer: Any) -> None:
    assert end_tokens(model, tokenizer) == {0}
    model.generation_config.eos_token_id = [7, 8]
    assert end_tokens(model, tokenizer) == {0, 7, 8}
    model.generation_config.eos_token_id = None
    assert end_tokens(model, tokenizer) == {0} and end_tokens(model, object()) == set()


def test_longest_text_of_nested_and_silent_configs(model: Any) -> None:
    own = model.config
    assert longest_text(model) == 64

    class Nested:
        def __init__(self, inner: Any) -> None:
            self.inner = inner

        def get_text_config(self) -> Any:
            return self.inner

    for inner, tokens in ((object(), 2048), (own, 64)):
        model.config = Nested(inner)
        assert longest_text(model) == tokens
