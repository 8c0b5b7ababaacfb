"""Folders of compressed-tensors: their size and game, and that transformers loads the weights that we say it does."""

import json
import pathlib
import shutil
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
import transformers

from experiments.config import compose
from nashswarm.cli import main
from nashswarm.experiment import run
from nashswarm.methods.compressed_tensors import TYPES, CompressedTensors, read_certificate
from nashswarm.models import compressed_tensors_folder as folders
from tests.conftest import build

pytest.importorskip("compressed_tensors", reason="the package compressed-tensors is not installed")
ASKED = ["--to", "compressed-tensors", "--target-bits", "11"]


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> pathlib.Path:
    """A tiny LLaMA whose head is its embedding."""
    folder = tmp_path_factory.mktemp("models") / "llama"
    build("llama_tied").save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def made(
    full: pathlib.Path, options: list[str], tmp_path_factory: pytest.TempPathFactory
) -> tuple[pathlib.Path, dict[str, Any]]:
    """The tiny model with every width that the package packs, and what the command printed."""
    folder = tmp_path_factory.mktemp("made") / "small"
    types = ["--types", *(f"int{bits}-g64" for bits in range(2, 9)), "int4-g32"]
    with pytest.MonkeyPatch.context() as patch:
        printed: list[str] = []
        patch.setattr("builtins.print", lambda text, **_: printed.append(text))
        assert main(["compress", str(full), "--out", str(folder), *ASKED, *types, *options]) == 0
    return folder, json.loads(printed[-1])


def unpacked(words: torch.Tensor, bits: int, columns: int) -> torch.Tensor:
    """Return signed codes: the bits of the words of a row, least significant first, cut into codes from −2^(bits−1)."""
    rows = []
    for row in words.tolist():
        stream = sum((word % 2**32) << (32 * place) for place, word in enumerate(row))
        rows.append([((stream >> (bits * column)) % 2**bits) - 2 ** (bits - 1) for column in range(columns)])
    return torch.tensor(rows)


def by_hand(folder: pathlib.Path, full: pathlib.Path) -> Any:
    """Return the full model with the weights of the folder's file, decoded word by word."""
    model = transformers.AutoModelForCausalLM.from_pretrained(full, dtype=torch.float32).eval()
    stored = safetensors.torch.load_file(folder / folders.WEIGHTS)
    groups = json.loads((folder / folders.CONFIG).read_text())["quantization_config"]["config_groups"].values()
    bits = {name: group["weights"]["num_bits"] for group in groups for name in group["targets"]}
    state = {name: tensor.float() for name, tensor in stored.items() if tensor.dtype == torch.float16}
    for name, width in bits.items():
        rows, columns = stored[f"{name}.weight_shape"].tolist()
        scale = state.pop(f"{name}.weight_scale")
        codes = unpacked(stored[f"{name}.weight_packed"], width, columns)
        state[f"{name}.weight"] = codes * scale.repeat_interleave(columns // scale.shape[1], 1)
        assert state[f"{name}.weight"].shape == (rows, columns)
    missing = model.load_state_dict(state, strict=False)
    assert missing.unexpected_keys == [] and set(missing.missing_keys) <= {"lm_head.weight"}
    return model


def test_transformers_loads_exactly_the_weights_of_the_codes(made: Any, full: pathlib.Path) -> None:
    loaded = transformers.AutoModelForCausalLM.from_pretrained(made[0], dtype=torch.float32).eval()
    tokens = torch.randint(512, (2, 30), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected, found = by_hand(made[0], full)(tokens).logits, loaded(tokens).logits
    assert torch.equal(found, expected)
    assert transformers.AutoTokenizer.from_pretrained(made[0])("the flock")["input_ids"]


def test_compress_fills_the_bytes_asked_for_from_below(made: Any) -> None:
    folder, printed = made
    size = sum((folder / name).stat().st_size for name in (folders.WEIGHTS, folders.CONFIG))
    assert printed["folder"] == str(folder) and printed["bytes_file"] == size
    assert 0.96 * printed["bytes_asked"] < size <= printed["bytes_asked"]  # 8 schemes in config.json could be in use
    assert sum(printed["tensors"].values()) == 14 and printed["players"] == 2 * 4  # q, k, v and gate, up together
    assert 0 <= printed["regret_max"] <= printed["regret_sum"] and printed["damage"] > 0


def test_matrices_of_one_product_have_one_scheme(made: Any) -> None:
    stored = folders.read_schemes(made[0])
    assert stored["model.embed_tokens"] == (None, (512, 64))
    for layer in range(2):
        for block, roles in (("self_attn", ("q_proj", "k_proj", "v_proj")), ("mlp", ("gate_proj", "up_proj"))):
            assert len({stored[f"model.layers.{layer}.{block}.{role}"][0] for role in roles}) == 1


def test_inspect_shows_types_and_regret_by_enumeration(made: Any, capsys: pytest.CaptureFixture[str]) -> None:
    folder, printed = made
    assert main(["inspect", str(folder)]) == 0
    table = capsys.readouterr().out
    assert f"{printed['bytes_file']:,} bytes" in table and f"largest regret {printed['regret_max']:.1e}" in table
    assert "model.layers.0.self_attn.q_proj+model.layers.0.self_attn.k_proj" in table
    game, stored = read_certificate(folder), folders.read_schemes(folder)
    for player, name in enumerate(game.tensors):
        costs = []
        for action, kind in enumerate(game.types):
            size = 0
            for matrix in name.split("+"):
                rows, columns = stored[matrix][1]
                if kind == "float16":
                    size += 2 * rows * columns
                else:
                    bits, group = folders.parse_scheme(kind)
                    size += rows * columns * bits // 8 + 2 * rows * columns // group + 16
            costs.append(game.damage[player, action] + game.price * size)
        assert game.regret()[player] == pytest.approx(costs[game.profile[player]] - min(costs), abs=1e-12)
    assert game.regret().max() == pytest.approx(printed["regret_max"], rel=1e-6)


def test_wider_codes_damage_less(made: Any) -> None:
    game = read_certificate(made[0])
    damage = game.damage[:, [game.types.index(f"int{bits}-g64") for bits in range(2, 9)]].sum(0)
    assert (np.diff(damage) < 0).all() and game.damage[:, -1].sum() < damage[-1]


def test_damaged_folders_are_refused(made: Any, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    def refusal(name: str, change: Any) -> str:
        folder = tmp_path / name.replace(".", "_")
        shutil.copytree(made[0], folder)
        content = change((folder / name).read_bytes())
        (folder / name).unlink() if content is None else (folder / name).write_bytes(content)
        assert main(["inspect", str(folder)]) == 2
        return capsys.readouterr().err

    assert "is damaged, copy it again" in refusal("model.safetensors", lambda content: content[:3000])
    assert "does not go with the model beside it" in refusal("game.json", lambda content: content[:-40])
    shutil.rmtree(tmp_path / "game_json")
    assert "has no certificate of nashswarm" in refusal("game.json", lambda content: None)


@pytest.mark.slow
def test_export_compresses_the_full_model_of_a_folder(
    full: pathlib.Path, options: list[str], tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--method", "uniform", "--bits", "4", *options]
    assert main(["compress", str(full), "--out", str(tmp_path / "folder"), *words]) == 0
    capsys.readouterr()
    words = ["--to", "compressed-tensors", "--target-size", "150KB", "--types", "int4-g32", "int8-g32"]
    assert main(["export", str(tmp_path / "folder"), *words, "--out", str(tmp_path / "out")]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["bytes_asked"] == 150_000 >= printed["bytes_file"] > 0.98 * 150_000


def test_method_counts_the_bytes_of_its_files(
    full: pathlib.Path, text_file: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    """The record's size is the bound that the budget was counted with, a little above that of the files."""
    config = compose(
        "method=compressed_tensors", "method.bits=11", "model=local", f"model.path={full}", "dataset=local_text",
        f"dataset.path={text_file}", "dataset.calibration_windows=6", "dataset.holdout_windows=2",
        "dataset.test_windows=2", "dataset.sequence_length=32", "measure=quality", f"records={tmp_path}",
        f"cache={tmp_path / 'cache'}",
    )  # fmt: skip
    record = run.run(config, dict.fromkeys(("model", "method", "dataset", "measure"), "tiny")).record
    assert 0.97 * 11 < record.metrics["bits_per_weight_model"] <= 11
    assert record.metrics["regret_max"] >= 0 and record.metrics["damage"] > 0


@pytest.mark.parametrize(
    "words, message",
    [
        (["--out", "x"], "either --target-size or --target-bits"),
        (["--bits", "8"], "--out: name a new folder"),
        (["--out", "x", "--bits", "8", "--method", "gptq"], "--to compressed-tensors does not go with --method"),
        (["--out", "x", "--target-size", "9KB"], "9,000 bytes are too few: with the smallest types"),
        (["--out", "x", "--bits", "8", "--types", "Q4_K"], "--types: 'Q4_K' is no scheme: write intB-gN"),
    ],
)
def test_compress_with_options_that_do_not_fit_raises(
    words: list[str], message: str, full: pathlib.Path, options: list[str], tmp_path: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    assert main(["compress", str(full), "--to", "compressed-tensors", *words, *options]) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_model_without_linear_matrices_is_refused_before_calibrating(
    model_folder: pathlib.Path, options: list[str], tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["compress", str(model_folder), *ASKED, "--out", str(tmp_path / "x"), *options]) == 2
    error = capsys.readouterr().err
    assert "packs Linear matrices alone, of which GPT2LMHeadModel has none: write it with --to gguf" in error
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("options", [{"bits": 0}, {"types": ("int9-g32",)}, {"types": ("int4-g0",)}, {"sweeps": -1}])
def test_settings_without_a_meaning_raise(options: Any) -> None:
    with pytest.raises(ValueError, match="method"):
        CompressedTensors(**options)


def test_default_types_are_those_of_vllm() -> None:
    assert {folders.parse_scheme(name)[0] for name in TYPES[:-1]} == {4, 8} and TYPES[-1] == "float16"
