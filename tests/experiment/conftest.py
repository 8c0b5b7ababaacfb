"""What the tests of runs and commands share: a model of one block, and options for a short calibration."""

import pathlib
from typing import Any

import pytest
import torch
import transformers


@pytest.fixture(scope="module")
def options(text_file: pathlib.Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The calibration is computed once in each file of tests."""
    cache = str(tmp_path_factory.mktemp("cache"))
    return ["--calibration", str(text_file), "--windows", "6", "--length", "32", "--cache", cache]


@pytest.fixture(scope="session")
def narrow_model(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> pathlib.Path:
    """A GPT-2 of one narrow block in Hugging Face layout: every kind of matrix, and few of them."""
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=512, n_layer=1, n_head=4, n_embd=64, n_inner=64, n_positions=64, initializer_range=0.1,
        bos_token_id=0, eos_token_id=0, pad_token_id=0,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("full") / "model"
    transformers.GPT2LMHeadModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
