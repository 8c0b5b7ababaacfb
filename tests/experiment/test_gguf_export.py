"""The commands that write GGUF files: their size, what is in them, and what a real llama.cpp makes of them."""

import json
import pathlib
from typing import Any

import pytest
import torch
import transformers

from nashswarm.cli import main
from nashswarm.models import gguf_architectures, gguf_file, matrices, sources
from tests.models.test_gguf_file import divergence, llama_cpp_log_probabilities, log_probabilities

pytest.importorskip("gguf", reason="the package gguf is not installed")
TYPES = ["--types", "IQ4_NL", "Q5_1", "Q8_0"]


@pytest.fixture(scope="module")
def made(
    model_folder: pathlib.Path, options: list[str], tmp_path_factory: pytest.TempPathFactory
) -> tuple[pathlib.Path, dict[str, Any]]:
    """The tiny model as a GGUF file, and what the command printed."""
    path = tmp_path_factory.mktemp("made") / "tiny.gguf"
    words = ["--to", "gguf", "--target-bits", "8", *TYPES, *options]
    with pytest.MonkeyPatch.context() as patch:
        printed: list[str] = []
        patch.setattr("builtins.print", lambda text, **_: printed.append(text))
        assert main(["compress", str(model_folder), "--out", str(path), *words]) == 0
    return path, json.loads(printed[-1])


def decoded(path: pathlib.Path, model: Any) -> Any:
    """Return the model with the weights of the file."""
    stored = gguf_file.read(path, gguf_architectures.layout(model))
    layers = matrices.find_layers(model)
    matrices.set_weights(model, {layer.name: stored[f"{layer.name}.weight"].values for layer in layers})
    return model


def test_compress_to_gguf_prints_what_is_in_the_file(made: Any, tiny: Any) -> None:
    path, printed = made
    assert printed["file"] == str(path) and printed["bytes_file"] == path.stat().st_size
    assert printed["bytes_asked"] == int(8 * tiny.num_parameters() / 8)
    assert 0.99 * printed["bytes_asked"] < printed["bytes_file"] <= printed["bytes_asked"]
    assert set(printed["tensors"]) <= {"IQ4_NL", "Q5_1", "Q8_0", "F16"}
    assert sum(printed["tensors"].values()) == printed["players"] == len(matrices.find_layers(tiny))
    assert 0 <= printed["regret_max"] <= printed["regret_sum"] and printed["damage"] > 0


def test_inspect_shows_the_type_and_the_regret_of_every_tensor(made: Any, capsys: pytest.CaptureFixture[str]) -> None:
    path, printed = made
    assert main(["inspect", str(path)]) == 0
    table = capsys.readouterr().out
    for name, count in printed["tensors"].items():
        assert sum(f" {name} " in line for line in table.splitlines()) == count
    assert f"{printed['bytes_file']:,} bytes" in table and f"largest regret {printed['regret_max']:.1e}" in table


def test_llama_cpp_reads_the_file_as_the_decoded_model(made: Any, model_folder: pathlib.Path) -> None:
    """It rounds inputs of products to 8 bits, which costs a small part of the damage of the types."""
    full = transformers.AutoModelForCausalLM.from_pretrained(model_folder).eval()
    tokens = torch.randint(512, (40,), generator=torch.Generator().manual_seed(0))
    expected = log_probabilities(full, tokens)
    ours = log_probabilities(decoded(made[0], full), tokens)
    theirs = llama_cpp_log_probabilities(made[0], tokens)
    assert divergence(ours, theirs) < 0.1 * divergence(expected, ours)


def test_llama_cpp_reads_tokenizer_and_certificate(made: Any, model_folder: pathlib.Path) -> None:
    library = pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")
    loaded, tokenizer = library.Llama(str(made[0]), vocab_only=True, verbose=False), _tokenizer(model_folder)
    text = "the old starling reads; it finds 12 blocks"
    assert loaded.tokenize(text.encode(), add_bos=True) == tokenizer(text)["input_ids"]
    assert "nashswarm.price" in loaded.metadata  # it shows numbers and strings alone
    loaded.close()


def _tokenizer(folder: pathlib.Path) -> Any:
    return transformers.AutoTokenizer.from_pretrained(folder)


@pytest.mark.slow
def test_export_to_gguf_compresses_the_full_model_of_a_folder(
    model_folder: pathlib.Path, options: list[str], tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--method", "uniform", "--bits", "4", *options]
    assert main(["compress", str(model_folder), "--out", str(tmp_path / "folder"), *words]) == 0
    out = tmp_path / "tiny.gguf"
    capsys.readouterr()
    words = ["--to", "gguf", "--target-size", "150KB", *TYPES, "--out", str(out)]
    assert main(["export", str(tmp_path / "folder"), *words]) == 0, capsys.readouterr().err
    printed = json.loads(capsys.readouterr().out)
    assert printed["bytes_asked"] == 150_000 >= printed["bytes_file"] == out.stat().st_size


@pytest.mark.parametrize(
    "words, message",
    [
        (["--to", "gguf", "--out", "x.gguf"], "either --target-size or --target-bits"),
        (["--to", "gguf", "--out", "x.gguf", "--bits", "4", "--target-size", "1MB"], "either --target-size or"),
        (["--to", "gguf", "--out", "x.bin", "--bits", "4"], "--out x.bin: name a file that ends in .gguf"),
        (["--to", "gguf", "--bits", "4"], "name a file that ends in .gguf"),
        (["--to", "gguf", "--out", "x.gguf", "--bits", "4", "--method", "gptq"], "does not go with --method"),
        (["--to", "gguf", "--out", "x.gguf", "--target-size", "9KB"], "a GGUF file of 9,000 bytes is too small"),
        (["--out", "x", "--types", "Q4_0"], "--target-size and --types go with --to gguf"),
    ],
)
def test_compress_with_options_that_do_not_fit_raises(
    words: list[str], message: str, model_folder: pathlib.Path, options: list[str], tmp_path: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    assert main(["compress", str(model_folder), *words, *options]) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_compress_into_a_file_that_exists_raises(
    made: Any, model_folder: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = made[0].read_bytes()
    assert main(["compress", str(model_folder), "--to", "gguf", "--bits", "8", "--out", str(made[0])]) == 2
    assert "tiny.gguf exists; name another file or delete it" in capsys.readouterr().err
    assert made[0].read_bytes() == before


@pytest.mark.slow
def test_llama_cpp_writes_the_greedy_text_of_the_decoded_model(options: list[str], tmp_path: pathlib.Path) -> None:
    library = pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")
    out = tmp_path / "default.gguf"
    assert main(["compress", "default", "--to", "gguf", "--bits", "6", *TYPES, "--out", str(out), *options]) == 0
    full = transformers.AutoModelForCausalLM.from_pretrained(sources.EMBEDDED, dtype=torch.float32).eval()
    assert 0.997 < out.stat().st_size / (6 * full.num_parameters() / 8) <= 1
    model, tokenizer, prompt = decoded(out, full), _tokenizer(sources.EMBEDDED), "The function returns a list of"
    tokens = tokenizer(prompt, return_tensors="pt")["input_ids"]
    expected = model.generate(tokens, do_sample=False, max_new_tokens=16)[0, tokens.shape[1] :]
    loaded = library.Llama(str(out), n_ctx=64, verbose=False)
    said = loaded(prompt, max_tokens=16, temperature=0.0)["choices"][0]["text"]
    loaded.close()
    assert said == tokenizer.decode(expected)
