"""The command ``nashswarm``, from a full model to a compressed one and on."""

import json
import math
import os
import pathlib
import re
import shutil
from collections.abc import Callable
from typing import Any

import hydra
import pytest
import safetensors.torch
import torch
import transformers

import nashswarm
from nashswarm.api import window_length
from nashswarm.calibration import texts
from nashswarm.cli import main
from nashswarm.data import stdlib_docs, stdlib_source
from nashswarm.experiment.plan import config_again
from nashswarm.models.matrices import find_layers
from nashswarm.packed import checkpoint
from nashswarm.packed.matrix import PackedMatrix, TrellisMatrix

FILES = ["config.json", "generation_config.json", "model.safetensors", "README.md", "nashswarm.json"]
FILES += ["tokenizer.json", "tokenizer_config.json"]
GAME = "game.safetensors"  # the inputs of a certificate, of methods that keep them
SIZES = {"bytes_file", "compression", "bits_per_weight_model", "bits_per_weight", "bytes_resident"}

Command = Callable[..., tuple[int, str, str]]


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str]) -> Command:
    """Exit status, what went to stdout, what went to stderr."""

    def typed(*words: Any) -> tuple[int, str, str]:
        capsys.readouterr()
        status = main([str(word) for word in words])
        return status, *capsys.readouterr()

    return typed


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def options(text_file: pathlib.Path, cache: pathlib.Path) -> list[str]:
    return ["--calibration", str(text_file), "--windows", "6", "--length", "32", "--cache", str(cache), "--no-verify"]


@pytest.fixture(scope="module")
def made(
    model_folder: pathlib.Path, options: list[str], tmp_path_factory: pytest.TempPathFactory
) -> tuple[pathlib.Path, dict[str, Any]]:
    """The tiny model, compressed by the command, and what it printed; not to be changed."""
    return compressed(tmp_path_factory.mktemp("made") / "model", model_folder, options)


@pytest.fixture(scope="module")
def lattice(
    model_folder: pathlib.Path, options: list[str], tmp_path_factory: pytest.TempPathFactory
) -> tuple[pathlib.Path, dict[str, Any]]:
    """The same, compressed by nash_lattice."""
    words = ["--method", "nash_lattice", *options]
    return compressed(tmp_path_factory.mktemp("lattice") / "model", model_folder, words)


@pytest.fixture(scope="module")
def archive(
    model_folder: pathlib.Path, options: list[str], tmp_path_factory: pytest.TempPathFactory
) -> tuple[pathlib.Path, dict[str, Any]]:
    """The same, compressed by nash_archive."""
    words = ["--method", "nash_archive", *options]
    return compressed(tmp_path_factory.mktemp("archive") / "model", model_folder, words)


def compressed(folder: pathlib.Path, model: pathlib.Path, words: list[str]) -> tuple[pathlib.Path, dict[str, Any]]:
    with pytest.MonkeyPatch.context() as patch:
        printed: list[str] = []
        patch.setattr("builtins.print", lambda text, **_: printed.append(text))
        assert main(["compress", str(model), "--out", str(folder), "--bits", "3.5", *words]) == 0
    return folder, json.loads(printed[-1])


@pytest.mark.parametrize(("fixture", "files"), [("made", FILES), ("lattice", [*FILES, GAME]), ("archive", FILES)])
def test_compress_writes_a_folder_that_transformers_loads(
    fixture: str, files: list[str], tiny: Any, request: pytest.FixtureRequest
) -> None:
    folder, printed = request.getfixturevalue(fixture)
    assert sorted(path.name for path in folder.iterdir()) == sorted(files)
    certified = set() if fixture == "archive" else {"regret_max"}
    assert set(printed) == SIZES | certified | {"folder", "seconds"} and printed["folder"] == str(folder)
    assert printed["bytes_file"] == sum((folder / name).stat().st_size for name in ("config.json", "model.safetensors"))
    assert 3.4 < printed["bits_per_weight_model"] <= 3.5
    assert printed["bits_per_weight_model"] == 8 * printed["bytes_file"] / tiny.num_parameters()
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    tokens = tokenizer("the quiet flock follows", return_tensors="pt")["input_ids"]
    assert model(input_ids=tokens).logits.isfinite().all()
    card = (folder / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: transformers\ntags: [nashswarm, quantized]\n---\n\n# tiny, compressed")
    assert f"{printed['bytes_file']:,}" in card and "import nashswarm" in card and "base_model" not in card


def test_archive_is_listed_as_paths_and_has_no_certificate(archive: Any, command: Command) -> None:
    folder, printed = archive
    assert "regret_max" not in printed and "certify" not in (folder / "README.md").read_text()
    status, table, _ = command("inspect", folder)
    assert status == 0 and table.count("lattice paths, coded") == 10
    status, _, error = command("certify", folder)
    assert status == 2 and "the format of method=nash_archive has no players: there is nothing to certify" in error


def test_inspect_lists_every_matrix_and_its_bytes(lattice: Any, command: Command) -> None:
    folder, printed = lattice
    status, table, _ = command("inspect", folder)
    assert status == 0
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    matrices = {name: one for name, one in model.named_modules() if isinstance(one, PackedMatrix)}
    assert len(matrices) == 10
    for name, matrix in matrices.items():
        row = next(line for line in table.splitlines() if f" {name.removesuffix('.matrix')} " in line)
        assert "x".join(map(str, matrix.shape)) in row and "lattice, coded" in row
        weights = matrix.shape[0] * matrix.shape[1]
        assert f"{8 * len(matrix.encode()) / weights:.3f}" in row and f"{8 * matrix.tiles.nbytes / weights:.3f}" in row
        assert f"{int((matrix.widths == 2).sum())}×2" in row or not (matrix.widths == 2).any()
    assert f"{printed['bytes_file']:,} bytes of weights and config" in table
    assert f"{printed['bytes_resident']:,} bytes in memory" in table


def test_inspect_encoder_saved_by_the_api_is_listed(
    random_model: Callable[[str], Any], token_windows: torch.Tensor, command: Command, tmp_path: pathlib.Path
) -> None:
    """Whatever the Python API has saved, also without the files of a run."""
    full = random_model("bert_encoder")
    model, _ = nashswarm.compress(full, method="gptq", calibration=token_windows, bits=3, exclude=["pooler.*"])
    model.save_pretrained(tmp_path)
    status, table, _ = command("inspect", tmp_path)
    assert status == 0 and "embeddings.word_embeddings" in table and "groups of 64, coded" in table


def test_inspect_trellis_lists_rates_and_equal_bytes(
    random_model: Callable[[str], Any], packed: Callable[..., Any], command: Command, tmp_path: pathlib.Path
) -> None:
    """In the file and in memory, but for where the tiles of 64 rows start."""
    model = random_model("llama_tied")
    checkpoint.adopt(model, find_layers(model), packed(model, "trellis"))
    model.save_pretrained(tmp_path)
    status, table, _ = command("inspect", tmp_path)
    assert status == 0
    for name, matrix in model.named_modules():
        if not isinstance(matrix, TrellisMatrix):
            continue
        row = next(line for line in table.splitlines() if f" {name.removesuffix('.matrix')} " in line)
        bits = 8 * len(matrix.encode()) / math.prod(matrix.shape)
        more = 64 * (1 + -(-matrix.shape[0] // 64)) / math.prod(matrix.shape)
        assert "trellis" in row and "coded" not in row and f"{bits:.3f}" in row and f"{bits + more:.3f}" in row
        rates = matrix.tile_widths()
        assert all(f"{int((rates == rate).sum())}×{rate}" in row for rate in rates.unique().tolist())


def test_bench_prints_ratios_with_intervals(
    made: Any, text_file: pathlib.Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads, text = torch.get_num_threads(), text_file.read_text()
    monkeypatch.setattr(stdlib_docs, "text", lambda purpose: text)  # the embedded one takes seconds to read
    words = ("--prompt-tokens", 8, "--new-tokens", 2, "--repeats", 2, "--threads", 1, "--against", "bfloat16")
    status, printed, _ = command("bench", made[0], *words)
    torch.set_num_threads(threads)
    found = json.loads(printed)
    assert status == 0 and found["folder"] == str(made[0]) and found["threads"] == 1
    for phase in ("decode", "prefill"):
        assert 0 < found[f"{phase}_ratio_low"] <= found[f"{phase}_ratio"] <= found[f"{phase}_ratio_high"]
    assert {"decode_ms", "decode_ms_full", "decode_ms_float32", "decode_ms_bfloat16"} <= set(found)
    assert found["bytes_resident"] == made[1]["bytes_resident"] < found["bytes_resident_full"]
    assert abs(found["kl_float32"]) < 1e-6 < found["kl_int8"]  # against its own weights


@pytest.mark.slow
@pytest.mark.parametrize(("fixture", "files"), [("made", FILES), ("lattice", [*FILES, GAME])])
def test_rebudget_uses_the_cache(
    fixture: str, files: list[str], command: Command, tmp_path: pathlib.Path, request: pytest.FixtureRequest
) -> None:
    first = request.getfixturevalue(fixture)
    status, printed, _ = command("rebudget", first[0], "--bits", 4.5, "--out", tmp_path / "larger")
    found = json.loads(printed)
    assert status == 0 and 4.4 < found["bits_per_weight_model"] <= 4.5 and set(found) == set(first[1])
    assert sorted(path.name for path in (tmp_path / "larger").iterdir()) == sorted(files)
    about = json.loads((tmp_path / "larger/nashswarm.json").read_text())
    assert about["record"]["provenance"]["cache_hits"] and about["config"]["method"]["bits"] == 4.5


@pytest.mark.slow
def test_certify_of_a_rebudgeted_lattice_agrees(lattice: Any, command: Command, tmp_path: pathlib.Path) -> None:
    status, printed, _ = command("rebudget", lattice[0], "--bits", 4.5, "--out", tmp_path / "larger")
    found = json.loads(printed)
    assert status == 0
    status, printed, _ = command("certify", tmp_path / "larger")
    assert status == 0 and json.loads(printed)["agrees"] is True
    assert json.loads(printed)["recorded_regret_max"] == found["regret_max"]


@pytest.mark.slow
def test_rebudget_whole_bits_method_refuses_fractions(
    model_folder: pathlib.Path, options: list[str], command: Command, tmp_path: pathlib.Path
) -> None:
    words = (model_folder, "--out", tmp_path / "gptq", "--method", "gptq", "--bits", 3, *options)
    assert command("compress", *words)[0] == 0
    status, printed, _ = command("rebudget", tmp_path / "gptq", "--bits", 4, "--out", tmp_path / "other")
    assert status == 0 and 4 < json.loads(printed)["bits_per_weight"] < 5
    with pytest.raises(hydra.errors.InstantiationException, match=r"2\.5"):  # tests check types before the method does
        command("rebudget", tmp_path / "gptq", "--bits", 2.5, "--out", tmp_path / "between")
    assert not (tmp_path / "between").exists()


def test_rebudget_infinite_bits_are_refused(made: Any, command: Command, tmp_path: pathlib.Path) -> None:
    status, printed, logged = command("rebudget", made[0], "--bits", "inf", "--out", tmp_path / "endless")
    assert status == 2 and not printed and "--bits inf must be a positive number" in logged


def test_rebudget_whole_budget_may_become_a_fraction(made: Any) -> None:
    about = json.loads((made[0] / "nashswarm.json").read_text())
    about["config"]["method"]["bits"] = 3
    config = config_again(about, {}, bits=2.5, save="elsewhere")
    assert config.method.bits == 2.5 and config.save == "elsewhere"


def test_compress_same_folder_again_does_nothing(
    made: Any, model_folder: pathlib.Path, options: list[str], command: Command
) -> None:
    before = {path: path.stat().st_mtime_ns for path in made[0].iterdir()}
    status, printed, _ = command("compress", model_folder, "--out", made[0], "--bits", 3.5, *options)
    assert status == 0 and json.loads(printed) == made[1]
    assert {path: path.stat().st_mtime_ns for path in made[0].iterdir()} == before


def test_compress_command_and_api_write_the_same_bytes(
    model_folder: pathlib.Path, text_file: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both doors draw the same windows from the same texts, and go on by the same functions."""
    for module in (stdlib_docs, stdlib_source):
        monkeypatch.setattr(module, "text", lambda purpose: text_file.read_text())
    words = (
        "--no-verify",
        "--method",
        "gptq",
        "--bits",
        "3",
        "--out",
        tmp_path / "command",
        "--cache",
        tmp_path / "cache",
    )
    assert main(["compress", str(model_folder), *map(str, words)]) == 0
    model = transformers.AutoModelForCausalLM.from_pretrained(model_folder)
    packed, _ = nashswarm.compress(model, method="gptq", bits=3)
    packed.save_pretrained(tmp_path / "api")
    by_command, by_api = (
        safetensors.torch.load_file(tmp_path / door / "model.safetensors") for door in ("command", "api")
    )
    assert by_command.keys() == by_api.keys()
    assert all(torch.equal(tensor, by_api[name]) for name, tensor in by_command.items())
    configs = [json.loads((tmp_path / door / "config.json").read_text())["calibration"] for door in ("command", "api")]
    assert configs[0] == configs[1] and configs[0]["source"] == texts.OFFLINE
    about = json.loads((tmp_path / "command/nashswarm.json").read_text())
    assert about["config"]["dataset"]["source"] == texts.OFFLINE  # not auto, which may stand for another one tomorrow
    assert about["record"]["config"]["dataset"]["calibration_sha256"] == configs[0]["sha256"]


def test_compress_long_context_model_needs_no_option(
    model_folder: pathlib.Path, command: Command, tmp_path: pathlib.Path
) -> None:
    """The embedded text has fewer windows of its length than the default model is calibrated with."""
    assert window_length(str(model_folder)) == 64
    assert window_length(str(tmp_path)) is None is window_length("/nowhere/model")
    long = tmp_path / "long"
    config = transformers.AutoConfig.from_pretrained(model_folder)
    config.n_positions = 2048
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(long)
    transformers.AutoTokenizer.from_pretrained(model_folder).save_pretrained(long)
    assert window_length(str(long)) == 512
    words = (long, "--out", tmp_path / "out", "--cache", tmp_path, "--method", "gptq", "--no-verify")
    status, printed, _ = command("compress", *words)
    assert status == 0 and json.loads(printed)["compression"] > 0.5


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["compress", "/nowhere/model"], "the model /nowhere/model cannot be fetched|the model folder /nowhere/model"),
        (["compress", "nobody/nothing"], "the model nobody/nothing cannot be fetched from the Hugging Face hub"),
        (["compress", "MODEL", "--bits", "0.01"], "is below the smallest possible size of this model"),
        (["compress", "MODEL", "--bits", "2.5", "--method", "gptq"], "gptq gives every weight the same whole number"),
        (["compress", "MODEL", "--bits", "inf", "--method", "gptq"], "gptq gives every weight the same whole number"),
        (
            ["compress", "MODEL", "--bits", "inf", "--method", "fixed_width"],
            "--bits inf must be above 0 and at most 16",
        ),
        (
            ["compress", "MODEL", "--effort", "best", "--method", "gptq"],
            "the effort best is of nash_swarm and nash_lattice",
        ),
        (["compress", "MODEL", "--exclude", "nothing"], "names no matrix of this model: nothing"),
        (["compress", "MODEL", "--calibration", "/nowhere.txt"], "--calibration /nowhere.txt is not a file"),
        (["compress", "MODEL", "--length", "65"], "--length 65 is not between 2 and the model's maximum of 64"),
        (["compress", "MODEL", "--windows", "100000"], "windows, fewer than the 100000"),
        (["rebudget", "/nowhere", "--bits", "3"], "/nowhere holds no compressed model"),
        (["rebudget", "MODEL", "--bits", "3"], "holds no compressed model"),
    ],
)
def test_command_mistake_is_answered_in_one_sentence(
    words: list[str],
    said: str,
    model_folder: pathlib.Path,
    options: list[str],
    command: Command,
    tmp_path: pathlib.Path,
) -> None:
    filled = [str(model_folder) if word == "MODEL" else word for word in words]
    own = [] if words[0] == "rebudget" else options  # of an option given twice the last counts
    status, printed, logged = command(*filled[:2], *own, *filled[2:], "--out", tmp_path / "out")
    last = logged.strip().splitlines()[-1]
    assert status == 2 and not printed and re.search(said, last) and last.startswith(f"nashswarm {words[0]}: ")
    assert "Traceback" not in logged and not list(tmp_path.iterdir())


def test_bench_encoder_is_refused(
    random_model: Callable[[str], Any], packed: Callable[..., Any], command: Command, tmp_path: pathlib.Path
) -> None:
    model = random_model("bert_encoder")
    checkpoint.adopt(model, find_layers(model), packed(model, "tiles"))
    model.save_pretrained(tmp_path)
    status, printed, logged = command("bench", tmp_path)
    assert status == 2 and not printed and "holds a BertModel, which writes no text" in logged.splitlines()[-1]


@pytest.mark.parametrize("name", ["inspect", "bench", "certify"])
def test_command_folder_without_compressed_model_is_refused(
    name: str, model_folder: pathlib.Path, command: Command, tmp_path: pathlib.Path
) -> None:
    for folder, said in ((tmp_path, "holds no"), (model_folder, "is not compressed|holds no compressed model")):
        status, printed, logged = command(name, folder)
        assert status == 2 and not printed and logged.count("\n") == 1
        assert re.search(said, logged)


def test_command_damaged_folder_is_refused(made: Any, command: Command, tmp_path: pathlib.Path) -> None:
    folder = pathlib.Path(shutil.copytree(made[0], tmp_path / "model"))
    content = bytearray((folder / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (folder / "model.safetensors").write_bytes(content)
    for name, said in (("inspect", "the checksum of"), ("bench", "the checksum of"), ("certify", "the checksum of")):
        status, printed, logged = command(name, folder)
        assert status == 2 and not printed and said in logged
    assert command("rebudget", folder, "--bits", 3, "--out", tmp_path / "other")[0] == 2
    assert not (tmp_path / "other").exists()


def test_compress_full_disk_leaves_nothing(
    model_folder: pathlib.Path, options: list[str], command: Command, tmp_path: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    def full_disk(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full_disk)
    words = ("--method", "uniform", "--bits", 4, "--out", tmp_path / "out")
    status, printed, logged = command("compress", model_folder, *words, *options)
    assert status == 2 and not printed and "cannot write" in logged and "No space left on device" in logged
    assert not list(tmp_path.iterdir())


def test_compress_folder_not_empty_is_refused(
    model_folder: pathlib.Path, options: list[str], command: Command, tmp_path: pathlib.Path
) -> None:
    (tmp_path / "precious").touch()
    status, printed, logged = command("compress", model_folder, "--out", tmp_path, *options)
    assert status == 2 and not printed and "is not an empty folder; name another one or delete it" in logged
    assert [path.name for path in tmp_path.iterdir()] == ["precious"]


@pytest.mark.parametrize("name", ["compress", "rebudget", "inspect", "bench", "certify"])
def test_help_every_command_names_its_options(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        main([name, "--help"])
    assert "FOLDER" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="2"):
        main([name])


def test_version_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        main(["--version"])
    assert capsys.readouterr().out == f"nashswarm {nashswarm.__version__}\n"
