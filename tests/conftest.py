"""What the tests share: a tiny random GPT-2 with its tokenizer on disk, models of other architectures, a small text."""

import copy
import os
import pathlib
import tempfile
from collections.abc import Callable
from typing import Any

# Set before anything imports the hub's client: tests neither download nor leave traces in the user's caches.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_CACHE", tempfile.mkdtemp(prefix="nashswarm-datasets-"))
os.environ["WANDB_MODE"] = "offline"

import numpy as np
import pytest
import tokenizers
import torch
import transformers
from torch import Tensor

PHRASES = (
    "the a one every no old new small large quiet starling flock block player price byte model token window layer "
    "weight game reply head row column error reads writes moves minds follows leaves finds keeps loses and or while "
    "because after before of in with under near without slowly together alone again twice soon never always"
)
WORDS = PHRASES.split()
VOCABULARY = 512
WIDTH = 64
CONTEXT = 64


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def sentences(count: int, seed: int) -> str:
    """Lines of random words, an empty line now and then, a newline at the end."""
    rng = np.random.default_rng(seed)
    lines = [" ".join(rng.choice(WORDS, rng.integers(4, 12))) + " ." for _ in range(count)]
    return "".join(line + ("\n\n" if number % 5 == 4 else "\n") for number, line in enumerate(lines))


@pytest.fixture(scope="session")
def text_folder(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """A folder with train, validation and test files."""
    folder = tmp_path_factory.mktemp("splits")
    for seed, split in enumerate(("train", "validation", "test")):
        (folder / f"{split}.txt").write_text(sentences(120, seed), encoding="utf-8")
    return folder


@pytest.fixture(scope="session")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """One file of text without splits."""
    path = tmp_path_factory.mktemp("text") / "story.txt"
    path.write_text(sentences(300, 3), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def tokenizer(text_folder: pathlib.Path) -> Any:
    """A small byte-level BPE tokenizer."""
    trained = tokenizers.ByteLevelBPETokenizer()
    text = (text_folder / "train.txt").read_text()
    trained.train_from_iterator([text], VOCABULARY, show_progress=False, special_tokens=["<|endoftext|>"])
    return transformers.PreTrainedTokenizerFast(tokenizer_object=trained._tokenizer, eos_token="<|endoftext|>")


@pytest.fixture(scope="session")
def random_model() -> Callable[[str], Any]:
    """Architecture → a tiny model with random weights."""
    return build


def build(kind: str) -> Any:
    torch.manual_seed(0)
    shared = {"vocab_size": VOCABULARY, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
    blocks = {
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "hidden_size": WIDTH,
        "max_position_embeddings": CONTEXT,
    }
    if kind == "gpt2":
        own = {"n_layer": 2, "n_head": 4, "n_embd": WIDTH, "n_positions": CONTEXT, "initializer_range": 0.1}
        config = transformers.GPT2Config(**own, **shared)
    elif kind == "opt":
        config = transformers.OPTConfig(ffn_dim=128, word_embed_proj_dim=WIDTH, init_std=0.1, **blocks, **shared)
    elif kind == "llama":  # untied, two queries to a key
        own = {"intermediate_size": 128, "num_key_value_heads": 2, "initializer_range": 0.1}
        config = transformers.LlamaConfig(**own, **blocks, **shared)
    else:
        own = {"intermediate_size": 128, "initializer_range": 0.1}
        config = transformers.GPTNeoXConfig(**own, **blocks, **shared)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():  # fresh biases are zero and norms one: nothing would notice their loss
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.1 * torch.randn(parameter.shape))
    return model


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> pathlib.Path:
    """The tiny GPT-2 in Hugging Face layout."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    build("gpt2").save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny(model_folder: pathlib.Path) -> Any:
    """The tiny GPT-2; not to be changed."""
    return transformers.AutoModelForCausalLM.from_pretrained(model_folder).eval()


@pytest.fixture
def model(tiny: Any) -> Any:
    """A copy of the tiny GPT-2 that a test may change."""
    return copy.deepcopy(tiny)


@pytest.fixture(scope="session")
def token_windows() -> Tensor:
    """Five windows of 24 random tokens."""
    return torch.randint(VOCABULARY, (5, 24), generator=torch.Generator().manual_seed(1))
