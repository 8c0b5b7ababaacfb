"""Add a tokenizer to a GGUF file: byte-level BPE, as of GPT-2 and LLaMA 3, and SentencePiece's BPE, as of LLaMA 2.

llama.cpp splits text by a rule of its own that the file names.  What the tokenizer does decides which rule is named, so
that both cut a text into the same tokens; a tokenizer that follows no known rule is refused.
"""

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

BYTE = re.compile(r"<0x[0-9A-F]{2}>")
SPACE = "▁"  # as SentencePiece writes it
SPECIAL = ("bos", "eos", "unk", "pad", "sep")  # roles of tokens that both sides know
LETTERS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+"
SIGNS = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
RULES = {  # how a byte-level tokenizer splits text → the name that llama.cpp has for it
    ("gpt2",): "gpt-2",
    ("digits", "gpt2"): "smollm",
    (LETTERS + r"|\p{N}{1,3}|" + SIGNS,): "llama-bpe",
    (LETTERS + r"|\p{N}|" + SIGNS,): "qwen2",
}


def add_tokenizer(writer: Any, tokenizer: Any, rows: int) -> None:
    """Add vocabulary, merges, special tokens and chat template to a ``GGUFWriter``.

    ``rows``: of the embedding; those beyond the vocabulary get names that no text contains.  Raises ValueError in one
    sentence for a tokenizer of another kind.
    """
    described = json.loads(tokenizer.backend_tokenizer.to_str())
    model = described["model"]
    if model["type"] != "BPE":
        raise ValueError(f"a tokenizer of the kind {model['type']} cannot be written as GGUF: only BPE")
    merges = [tuple(pair.split(" ") if isinstance(pair, str) else pair) for pair in model["merges"]]
    tokens, types = _vocabulary(tokenizer, rows, _control_tokens(described))
    if model.get("byte_fallback"):
        writer.add_tokenizer_model("llama")
        writer.add_tokenizer_pre("default")
        writer.add_token_scores(_scores(tokens, merges))
        writer.add_add_space_prefix(bool(tokenizer.tokenize("a")[0].startswith(SPACE)))
    else:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(_splitting_rule(described))
        writer.add_token_merges([" ".join(pair) for pair in merges])
        writer.add_add_space_prefix(False)
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    ids = {role: getattr(tokenizer, f"{role}_token_id", None) for role in SPECIAL}
    add_id = {
        "bos": writer.add_bos_token_id,
        "eos": writer.add_eos_token_id,
        "unk": writer.add_unk_token_id,
        "pad": writer.add_pad_token_id,
        "sep": writer.add_sep_token_id,
    }
    for role, token in ids.items():
        if token is not None:
            add_id[role](token)
    text = tokenizer("a")["input_ids"]
    writer.add_add_bos_token(ids["bos"] is not None and text[0] == ids["bos"])
    writer.add_add_eos_token(ids["eos"] is not None and text[-1] == ids["eos"])
    if isinstance(tokenizer.chat_template, str):
        writer.add_chat_template(tokenizer.chat_template)


def _vocabulary(tokenizer: Any, rows: int, control: Mapping[int, bool]) -> tuple[list[str], list[int]]:
    """Return the text and the type of every token.  ``control``: added token → whether it stands for no text."""
    import gguf

    texts = {number: text for text, number in tokenizer.get_vocab().items()}
    tokens, types = [], []
    for number in range(rows):
        text, kind = texts.get(number, f"[PAD{number}]"), gguf.TokenType.NORMAL
        if number not in texts:
            kind = gguf.TokenType.UNUSED
        elif number in control:
            kind = gguf.TokenType.CONTROL if control[number] else gguf.TokenType.USER_DEFINED
            text = text if control[number] else text.replace(SPACE, " ")
        elif BYTE.fullmatch(text):
            kind = gguf.TokenType.BYTE
        tokens.append(text)
        types.append(int(kind))
    return tokens, types


def _control_tokens(described: Mapping[str, Any]) -> dict[int, bool]:
    return {token["id"]: bool(token["special"]) for token in described["added_tokens"]}


def _scores(tokens: Sequence[str], merges: Sequence[tuple[str, ...]]) -> list[float]:
    """Return the score of every token: llama.cpp merges the pair of the highest score, transformers the first pair."""
    ranks: dict[str, int] = {}
    for rank, pair in enumerate(merges):
        ranks.setdefault("".join(pair), rank)
    return [-float(ranks.get(token, len(merges))) for token in tokens]


def _splitting_rule(described: Mapping[str, Any]) -> str:
    """Return llama.cpp's name for how a byte-level tokenizer splits text.

    Raises ValueError if it has none.
    """
    part = described["pre_tokenizer"] or {}
    parts = part.get("pretokenizers", [part])
    kinds: list[str] = []
    for each in parts:
        if each.get("type") == "Digits" and each["individual_digits"]:
            kinds.append("digits")
        elif each.get("type") == "Split" and each["behavior"] == "Isolated" and not each["invert"]:
            kinds.append(each["pattern"].get("Regex", "?"))
        elif each.get("type") == "ByteLevel" and not each["add_prefix_space"]:
            kinds += ["gpt2"] if each["use_regex"] else []
        else:
            kinds.append("?")
    normalizer = (described["normalizer"] or {"type": "NFC"})["type"]
    if tuple(kinds) not in RULES or normalizer != "NFC":
        raise ValueError("this tokenizer splits text by a rule that GGUF has no name for: write the file without it")
    return RULES[tuple(kinds)]
