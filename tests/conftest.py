"""What the tests share: a tiny random GPT-2 with its tokenizer on disk, models of other architectures, a small text,
and matrices packed in every format."""

import copy
import logging
import os
import pathlib
import tempfile
from collections.abc import Callable, Iterator
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

import tests.checked_calls  # noqa: F401  (it comes before the package)
from nashswarm.kernels import trellis, trellis_codes
from nashswarm.kernels.trellis import Trellis
from nashswarm.models.matrices import find_layers
from nashswarm.quant.curvature import Curvature, FactoredCurvature
from nashswarm.quant.entropy import CodeTables, count_symbols, encode_groups, encode_lattice, fit_tables
from nashswarm.quant.grid import GRID_WIDTHS, QuantizedTensor, Scheme, quantize, row_blocks
from nashswarm.quant.lattice import Lattice, LatticeTensor
from nashswarm.quant.lattice_paths import PathTensor, path_error_feedback
from nashswarm.quant.pack import pack
from nashswarm.quant.path_entropy import encode_paths, first_tables, with_fitted_sizes
from tests.models import gguf_file

collect_ignore = ["packed/guided.py"]  # a program of its own, which imports what only the extra fuzz installs

PHRASES = (
    "the a one every no old new small large quiet starling flock block player price byte model token window layer "
    "weight game reply head row column error reads writes moves minds follows leaves finds keeps loses and or while "
    "because after before of in with under near without slowly together alone again twice soon never always"
)
WORDS = PHRASES.split()
VOCABULARY = 512
WIDTH = 64
CONTEXT = 64
ARCHITECTURES = {  # of those that do not predict the next token
    "bert": transformers.AutoModelForMaskedLM,
    "bert_encoder": transformers.AutoModel,
    "bert_classifier": transformers.AutoModelForSequenceClassification,
}
FORMATS = ("tiles", "groups", "lattice", "paths", "trellis")


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def own_log_level() -> Iterator[None]:
    """Undo what a command with --quiet does for its process, which other tests share."""
    yield
    logging.getLogger("nashswarm").setLevel(logging.NOTSET)


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
        options = {"n_layer": 2, "n_head": 4, "n_embd": WIDTH, "n_positions": CONTEXT, "initializer_range": 0.1}
        config = transformers.GPT2Config(**options, **shared)
    elif kind == "opt":
        config = transformers.OPTConfig(ffn_dim=128, word_embed_proj_dim=WIDTH, init_std=0.1, **blocks, **shared)
    elif kind.startswith("llama"):  # two queries to a key
        options = {"intermediate_size": 128, "num_key_value_heads": 2, "initializer_range": 0.1}
        config = transformers.LlamaConfig(tie_word_embeddings=kind == "llama_tied", **options, **blocks, **shared)
    elif kind in ARCHITECTURES:
        options = {"intermediate_size": 128, "initializer_range": 0.1}
        config = transformers.BertConfig(**options, **blocks, **shared)
    else:
        options = {"intermediate_size": 128, "initializer_range": 0.1}
        config = transformers.GPTNeoXConfig(**options, **blocks, **shared)
    model = ARCHITECTURES.get(kind, transformers.AutoModelForCausalLM).from_config(config).eval()
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


@pytest.fixture
def gguf_package(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, tokenizer: Any) -> dict[str, Tensor]:
    """The weights of a tiny LLaMA, which the GGUF file of an installed package holds."""
    pytest.importorskip("gguf", reason="the package gguf is not installed")
    folder = tmp_path / "site-packages"
    folder.mkdir()
    monkeypatch.syspath_prepend(folder)
    return gguf_file.write_package(folder, build("llama_tied"), tokenizer)


@pytest.fixture(scope="session")
def small_run(model_folder: pathlib.Path, text_file: pathlib.Path) -> list[str]:
    """The overrides of a run of the tiny model on the small text, a few short windows."""
    return [
        "model=local",
        f"model.path={model_folder}",
        "dataset=local_text",
        f"dataset.path={text_file}",
        "dataset.sequence_length=32",
        "dataset.calibration_windows=6",
        "dataset.holdout_windows=3",
        "dataset.test_windows=6",
        "device=cpu",
    ]


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


def grid_tensor(weight: Tensor, seed: int = 0, group_size: int = 64) -> QuantizedTensor:
    """A matrix in groups, every tile of a width drawn by lot, none among them."""
    generator = torch.Generator().manual_seed(seed)
    rows, columns = weight.shape
    drawn = torch.randint(5, (row_blocks(rows), columns // group_size), generator=generator)
    widths = torch.tensor((0, *GRID_WIDTHS), dtype=torch.uint8)[drawn]
    return quantize(weight, widths, Scheme(group_size))


def lattice_tensor(weight: Tensor, seed: int = 0) -> LatticeTensor:
    """A matrix on a lattice of drawn scales, a few codes large."""
    rng = np.random.default_rng(seed)
    row, column = (torch.from_numpy(rng.integers(-4, 5, size).astype(np.int8)) for size in weight.shape)
    none = [torch.zeros_like(side) for side in (row, column)]
    base = float(np.float32(0.4 * weight.std().item() + 1e-6))
    lattice = Lattice(base, row, column, *none)
    codes = (weight / (lattice.row_steps()[:, None] * lattice.column_steps())).round().int()
    for place in rng.integers(codes.numel(), size=2):
        codes.view(-1)[place] = int(rng.integers(-(10**6), 10**6))
    return LatticeTensor(codes, lattice.fit_sizes(codes.abs().float()))


def path_tensor(weight: Tensor, seed: int = 0) -> PathTensor:
    """A matrix on lattice paths of drawn scales, a few codes large."""
    lattice, large = lattice_tensor(weight, seed).lattice, weight.clone()
    rng = np.random.default_rng(seed)
    for place in rng.integers(large.numel(), size=2):
        large.view(-1)[place] = lattice.base * int(rng.integers(-(10**6), 10**6))
    rows, columns = (torch.ones(size) for size in weight.shape)
    curvature = FactoredCurvature(Curvature(rows, None, None), rows, columns, None)
    return with_fitted_sizes(path_error_feedback(large, curvature, lattice, first_tables(), 1e-9))[0]


def trellis_tensor(weight: Tensor, seed: int = 0) -> Trellis:
    """A matrix in trellis tiles of 8 bits, by rounding, but for a few of lower rates whose codes are drawn by lot; it
    is rotated, and its orders and scales are drawn too."""
    rows, columns = weight.shape
    random = torch.Generator().manual_seed(seed)
    groups, across = trellis.groups_of(rows), trellis.tiles_across(columns)
    row_order, column_order = (torch.randperm(size, generator=random) for size in (rows, columns))
    row_scale, column_scale = (
        torch.randint(trellis.MIDDLE - 3, trellis.MIDDLE + 4, (size,), generator=random, dtype=torch.uint8)
        for size in (rows, trellis_codes.COLUMNS * across)
    )
    stored = torch.zeros(trellis_codes.ROWS * groups, trellis_codes.COLUMNS * across)
    stored[:rows, :columns] = weight[row_order[:, None], column_order]
    stored[:rows] /= trellis.scales(row_scale, trellis.ROW_STEPS)[:, None]
    stored /= trellis.scales(column_scale, trellis.COLUMN_STEPS)
    values = (trellis.hadamard() @ stored.view(groups, trellis_codes.ROWS, -1)).view(stored.shape)
    scale = float(values.abs().max() * trellis_codes.UNIT / 127) or 1.0
    codes = (values / scale * trellis_codes.UNIT).round().to(torch.int8).view(torch.uint8)
    rates = torch.full((groups, across), trellis_codes.INT8, dtype=torch.uint8)
    low = torch.rand(rates.shape, generator=random) < 0.1
    rates[low] = torch.randint(trellis_codes.INT8, (int(low.sum()),), generator=random, dtype=torch.uint8)
    widths = rates.repeat_interleave(trellis_codes.ROWS, 0).repeat_interleave(trellis_codes.COLUMNS, 1)
    drawn = torch.randint(256, codes.shape, generator=random, dtype=torch.uint8) & (1 << widths.int()).sub(1).byte()
    codes = torch.where(widths == trellis_codes.INT8, codes, drawn)
    size = torch.zeros(len(stored), dtype=torch.uint8)
    return trellis.build(
        rates, codes, rows, columns, True, scale, size, row_scale, column_scale, row_order, column_order
    )


def packed_by(model: Any, form: str, exclude: tuple[str, ...] = ()) -> dict[str, np.ndarray]:
    """The matrices of a model as they are stored in one of the FORMATS, by the names of its layers."""
    layers = find_layers(model, exclude)
    if form == "trellis":
        return {layer.name: trellis_tensor(layer.weight, number).content.numpy() for number, layer in enumerate(layers)}
    if form == "paths":
        tables: CodeTables = first_tables()
        paths = {layer.name: path_tensor(layer.weight, number) for number, layer in enumerate(layers)}
        return {name: encode_paths(tensor, tables) for name, tensor in paths.items()} | {"code_tables": tables.pack()}
    if form != "lattice":
        encode = {"tiles": pack, "groups": encode_groups}[form]
        return {layer.name: encode(grid_tensor(layer.weight, number, 32)) for number, layer in enumerate(layers)}
    tensors = {layer.name: lattice_tensor(layer.weight, number) for number, layer in enumerate(layers)}
    tables = fit_tables(count_symbols(tensors.values()))
    return {name: encode_lattice(tensor, tables) for name, tensor in tensors.items()} | {"code_tables": tables.pack()}


@pytest.fixture(scope="session")
def packed() -> Callable[..., dict[str, np.ndarray]]:
    """Model, format and patterns of exclusion → its matrices as they are stored."""
    return packed_by


@pytest.fixture(scope="session")
def drawn() -> dict[str, Callable[..., Any]]:
    """Weight matrix and seed → a quantized tensor of it, on a grid, on a lattice or in trellis tiles."""
    return {"grid": grid_tensor, "lattice": lattice_tensor, "trellis": trellis_tensor}
