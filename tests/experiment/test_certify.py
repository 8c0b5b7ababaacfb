"""Compressed models in folders, and their certificates computed again from the bytes."""

import dataclasses
import functools
import hashlib
import json
import os
import pathlib
import shutil
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
import torch

from experiments.config import compose
from nashswarm.cli import main
from nashswarm.experiment.certify import certify, decode
from nashswarm.experiment.compression import load, quantize, reopen
from nashswarm.experiment.decoded_costs import DecodedMatrix, Quadratic
from nashswarm.experiment.enumeration import error_feedback_codes, feedback_matrix, gain_of_codes
from nashswarm.experiment.plan import config_again, plan
from nashswarm.experiment.run import Outcome, run
from nashswarm.methods.nash_lattice import solver
from nashswarm.methods.nash_lattice.step_choices import StepChoices
from nashswarm.packed.model_folder import read
from nashswarm.quant.entropy import CodeTables, decode_lattice, encode_lattice
from nashswarm.quant.lattice import LatticeTensor
from nashswarm.records import record

ROOT = pathlib.Path(__file__).parents[2]
LABELS = {"experiment": "single", "model": "tiny", "method": "any", "dataset": "story", "measure": "size"}
SEALED = ["config.json", "game.safetensors", "model.safetensors"]
FILES = sorted(
    [*SEALED, "README.md", "generation_config.json", "nashswarm.json", "tokenizer.json", "tokenizer_config.json"]
)
LAYER = "transformer.h.0.mlp.c_fc"

Execute = Callable[..., Outcome]
Saved = Callable[[str], tuple[record.Record, pathlib.Path]]


@pytest.fixture(scope="module")
def execute(small_run: list[str], narrow_model: pathlib.Path, tmp_path_factory: pytest.TempPathFactory) -> Execute:
    """Run on the narrow model; records beside the folder that is saved, one cache for all."""
    cache = tmp_path_factory.mktemp("cache")

    def started(save: pathlib.Path, *more: str, many: bool = False) -> Outcome:
        overrides = [
            *small_run,
            f"model.path={narrow_model}",
            "measure=size",
            f"cache={cache}",
            f"records={save.parent}/records",
            f"save={save}",
        ]
        return run(compose(*overrides, *more), LABELS, many=many)

    return started


@pytest.fixture(scope="module")
def saved(execute: Execute, tmp_path_factory: pytest.TempPathFactory) -> Saved:
    """Method → its record and the folder of its model, compressed once and not to be changed."""

    @functools.cache
    def compressed(method: str) -> tuple[record.Record, pathlib.Path]:
        folder = tmp_path_factory.mktemp(method) / "model"
        return execute(folder, f"method={method}").record, folder

    return compressed


@pytest.fixture
def folder(saved: Saved, tmp_path: pathlib.Path) -> pathlib.Path:
    """A copy of the model of nash_lattice that a test may change."""
    return pathlib.Path(shutil.copytree(saved("nash_lattice")[1], tmp_path / "model"))


def about(folder: pathlib.Path) -> dict[str, Any]:
    return dict(json.loads((folder / "nashswarm.json").read_text()))


def seal(folder: pathlib.Path) -> None:
    """Let the checksums of nashswarm.json be those of the files as they are now."""
    sums = {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in SEALED}
    (folder / "nashswarm.json").write_text(json.dumps(about(folder) | {"sha256": sums}))


@pytest.mark.parametrize("method", ["nash_lattice", "uniform4", "gptq", "baseline", "as_published"])
def test_saved_folder_files_have_the_recorded_size(method: str, saved: Saved) -> None:
    written, folder = saved(method)
    names = [path.name for path in sorted(folder.iterdir())]
    assert names == (FILES if method == "nash_lattice" else [name for name in FILES if name != "game.safetensors"])
    sizes = {name: (folder / name).stat().st_size for name in names}
    assert written.metrics["bytes_file"] == sizes["model.safetensors"] + sizes["config.json"]
    assert about(folder)["record"]["metrics"] == written.metrics
    assert sorted(path.name for path in folder.parent.iterdir()) == ["model", "records"]


def stay(
    self: solver.RateGameSolver, costs: np.ndarray, base_step: float, choices: StepChoices, align: float
) -> StepChoices:
    return choices.with_metrics(flock_align=align)


@pytest.mark.parametrize(
    "settings",
    [
        [],
        ["method.swarm.align=[0.5]", "method.swarm.shrink=[0.25]"],
        ["method.swarm.local_reply=5"],
        ["method.code_game=pass", "method.strength=[0.5]"],
        ["method.code_game=rounding", "method.swarm=null"],
    ],
)
def test_certify_game_away_from_equilibrium_agrees_with_the_record(
    settings: list[str],
    execute: Execute,
    narrow_model: pathlib.Path,
    model_folder: pathlib.Path,
    tmp_path: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Blocks stay although they would gain by moving, so that some regret is left.

    With a local reply no block of the narrow model would gain: that case takes the wider one.
    """
    model = model_folder if "method.swarm.local_reply=5" in settings else narrow_model
    monkeypatch.setattr(solver, "REGRET", np.inf)
    monkeypatch.setattr(solver.RateGameSolver, "best_response_offsets", stay)
    written = execute(tmp_path / "model", "method=nash_lattice", f"model.path={model}", *settings).record
    certificate = certify(tmp_path / "model")
    assert certificate["agrees"] and certificate["recorded_regret_max"] == written.metrics["regret_max"]
    assert certificate["players"] == written.metrics["players"] and certificate["price"] == written.metrics["price"]
    assert certificate["enumerated"] == "codes and steps" and certificate["layers"] == len(written.layers)
    for name in ("regret_max", "regret_mean", "regret_of_codes", "regret_of_steps"):
        assert certificate[name] == pytest.approx(written.metrics[name], rel=0.01, abs=1e-7), name
    assert certificate["regret_of_steps"] > 1e-6


@pytest.mark.parametrize("method", ["uniform4", "gptq", "lattice_no_swarm", "fixed_width", "gptq_one_step", "baseline"])
def test_certify_each_format_says_what_was_enumerated(method: str, saved: Saved) -> None:
    written, folder = saved(method)
    certificate = certify(folder)
    stepped = method == "lattice_no_swarm"
    assert certificate["enumerated"] == ("codes and steps" if stepped else "codes")
    assert certificate["agrees"] is (True if stepped else None)
    # An exact equilibrium leaves no regret but that of 32-bit sums, and floats leave none.
    assert (certificate["regret_of_codes"] < 1e-9) == (method in ("lattice_no_swarm", "baseline"))
    assert certificate["layers"] == len(written.layers)


@pytest.mark.parametrize("method", ["as_published", "nash_archive"])
def test_certify_format_without_players_raises(method: str, saved: Saved) -> None:
    _, folder = saved(method)
    with pytest.raises(ValueError, match=f"method={method} has no players: there is nothing to certify"):
        certify(folder)


def test_gain_of_codes_equals_the_fall_of_the_whole_damage() -> None:
    """Every code of every weight tried by hand, the damage of the whole row taken anew."""
    rng = np.random.default_rng(0)
    mixed = rng.normal(size=(30, 6))
    quadratic = Quadratic(rng.uniform(0.5, 2, 4), mixed.T @ mixed / 30, rng.uniform(0, 1, (4, 6)))
    weight, steps, codes = rng.normal(size=(4, 6)), rng.uniform(0.1, 1, (4, 6)), rng.integers(-3, 4, (4, 6))

    def damage(codes: np.ndarray, row: int) -> float:
        error = weight[row] - codes[row] * steps[row]
        return float(quadratic.rows[row] * error @ quadratic.inputs @ error + quadratic.lookups[row] @ error**2) / 2

    gains = np.zeros(4)
    for row, column in np.ndindex(4, 6):
        damages = []
        for code in range(-3, 4):
            other = codes.copy()
            other[row, column] = code
            damages.append(damage(other, row))
        gains[row] += damage(codes, row) - min(damages)
    matrix = DecodedMatrix(codes * steps, codes, steps, -3, 3)
    assert gain_of_codes(weight, matrix, quadratic) == pytest.approx(gains, rel=1e-12) and gains.min() > 0


def test_error_feedback_codes_equal_those_of_gptq() -> None:
    """As its paper states them: a column and an inverse of the remaining H at a time."""
    rng = np.random.default_rng(1)
    mixed = rng.normal(size=(30, 8)) @ rng.normal(size=(8, 8))
    inputs = mixed.T @ mixed / 30
    weight, steps = rng.normal(size=(5, 8)), rng.uniform(0.2, 0.5, (5, 8))
    rest, expected = weight.copy(), np.zeros(weight.shape, int)
    for column in range(8):
        inverse = np.linalg.inv(inputs[column:, column:])
        expected[:, column] = np.rint(rest[:, column] / steps[:, column])
        error = (rest[:, column] - expected[:, column] * steps[:, column]) / inverse[0, 0]
        rest[:, column:] -= np.outer(error, inverse[0])
    assert (error_feedback_codes(weight, steps, feedback_matrix(Quadratic(np.ones(5), inputs, None))) == expected).all()
    assert (error_feedback_codes(weight, steps, None) == np.rint(weight / steps)).all()


def test_certify_changed_code_finds_its_gain(folder: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One code moved by 40 steps and coded again: what its block gains by going back is known by hand."""
    before = certify(folder)
    tensors = safetensors.numpy.load_file(folder / "model.safetensors")
    tables = CodeTables.unpack(tensors["code_tables"])
    tensor = decode_lattice(tensors[f"{LAYER}.weight"], tables)
    codes = tensor.codes.clone()
    codes[5, 7] += 40
    tensors[f"{LAYER}.weight"] = encode_lattice(LatticeTensor(codes, tensor.lattice), tables)
    safetensors.numpy.save_file(tensors, folder / "model.safetensors")
    seal(folder)
    after = certify(folder)
    session = reopen(about(folder), {}).session
    moments = session.moments()[LAYER]
    inputs = (moments.inputs + moments.coupled_inputs).double() / 2
    inputs += 0.01 * inputs.diagonal().mean() * torch.eye(len(inputs))
    weight = next(layer.weight for layer in session.layers if layer.name == LAYER)
    good, bad = (
        (weight - LatticeTensor(part, tensor.lattice).dequantize())[5].double() for part in (tensor.codes, codes)
    )
    gain = float(moments.coupled[5]) / 2 * float(bad @ inputs @ bad - good @ inputs @ good)
    assert after["regret_of_codes"] >= 0.99 * gain > 10 * before["regret_max"]
    assert after["agrees"] is False and after["regret_of_steps"] > before["regret_of_steps"]
    assert after["regret_of_codes"] > before["regret_of_codes"]
    assert main(["certify", str(folder)]) == 1
    assert json.loads(capsys.readouterr().out)["regret_max"] == after["regret_max"]


def test_certify_changed_byte_raises(folder: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = folder / "model.safetensors"
    content = bytearray(path.read_bytes())
    header = 8 + int.from_bytes(content[:8], "little")
    first, last = json.loads(content[8:header])[f"{LAYER}.weight"]["data_offsets"]
    content[header + (first + last) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"checksum of .*model.safetensors is wrong"):
        certify(folder)
    assert main(["certify", str(folder)]) == 2
    printed = capsys.readouterr()
    assert printed.err.startswith("nashswarm certify: the checksum") and not printed.out
    seal(folder)  # whoever makes the checksum fit is found out by that of the layer
    with pytest.raises(ValueError, match=f"{LAYER} cannot be read: the checksum"):
        certify(folder)


def test_certify_folder_without_model_raises(folder: pathlib.Path) -> None:
    with pytest.raises(ValueError, match="holds no compressed model"):
        certify(folder.parent)
    (folder / "game.safetensors").unlink()
    with pytest.raises(ValueError, match=r"lacks game.safetensors"):
        certify(folder)


def test_certify_moved_model_and_text_are_found_by_their_paths(
    folder: pathlib.Path, tmp_path: pathlib.Path, narrow_model: pathlib.Path, text_file: pathlib.Path
) -> None:
    (tmp_path / "moved").symlink_to(narrow_model)
    shutil.copy(text_file, tmp_path / "moved.txt")
    described = about(folder)
    for group in ("model", "dataset"):
        described["config"][group]["path"] = "/nowhere"
    (folder / "nashswarm.json").write_text(json.dumps(described))
    with pytest.raises(ValueError, match="/nowhere"):
        certify(folder)
    assert certify(folder, str(tmp_path / "moved"), str(tmp_path / "moved.txt"))["agrees"]
    (tmp_path / "moved.txt").write_text(text_file.read_text() + "more")
    with pytest.raises(ValueError, match="the dataset is not the one of the saved run"):
        certify(folder, str(tmp_path / "moved"), str(tmp_path / "moved.txt"))


def test_decode_saved_model_returns_the_measured_weights(saved: Saved) -> None:
    model = read(saved("nash_lattice")[1])
    config = config_again(model.about, {})
    planned = plan(config)
    loaded = load(config, planned)
    result, _ = quantize(loaded, planned.method)
    for name, tensor in decode(model.tensors, loaded.session.layers).items():
        assert torch.equal(tensor.dequantize(), result.weights[name])


def test_run_save_to_full_folder_raises_before_any_work(execute: Execute, tmp_path: pathlib.Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "precious").touch()
    with pytest.raises(ValueError, match="is not an empty folder"):
        execute(tmp_path / "model", "method=uniform4")
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["model", "precious"]
    (tmp_path / "model" / "precious").unlink()
    assert execute(tmp_path / "model", "method=uniform4").status == "finished"


def test_run_record_without_its_model_runs_again(execute: Execute, tmp_path: pathlib.Path) -> None:
    assert execute(tmp_path / "model", "method=uniform4").status == "finished"
    assert execute(tmp_path / "model", "method=uniform4").status == "skipped"
    shutil.rmtree(tmp_path / "model")
    assert execute(tmp_path / "model", "method=uniform4").status == "finished"
    with pytest.raises(ValueError, match="is not an empty folder"):
        execute(tmp_path / "model", "method=uniform3")


def test_run_sweep_saves_one_folder_a_run(execute: Execute, tmp_path: pathlib.Path) -> None:
    ended = [execute(tmp_path / "models", f"method={method}", many=True) for method in ("uniform4", "uniform3")]
    assert sorted(path.name for path in (tmp_path / "models").iterdir()) == sorted(
        one.record.fingerprint for one in ended
    )
    assert execute(tmp_path / "models", "method=uniform4", many=True).status == "skipped"


def test_run_stopped_before_its_record_takes_it_from_the_model(
    execute: Execute, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, words = tmp_path / "model", ("method=uniform4",)

    def stopped(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(record, "write", stopped)
        with pytest.raises(OSError, match="No space left"):
            execute(folder, *words)
    before = {path: path.read_bytes() for path in folder.iterdir()}
    assert not list((tmp_path / "records").rglob("*.json"))
    with monkeypatch.context() as patched:
        patched.setattr("nashswarm.experiment.run._compress", None)  # nothing is computed
        ended = execute(folder, *words)
    assert ended.status == "finished" and record.read(ended.path) == ended.record
    assert dataclasses.asdict(ended.record) == about(folder)["record"]
    assert {path: path.read_bytes() for path in folder.iterdir()} == before
    assert execute(folder, *words).status == "skipped"
    with pytest.raises(ValueError, match="is not an empty folder"):
        execute(folder, *words, "rerun=true")


def test_run_full_disk_leaves_nothing(
    execute: Execute, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full_disk(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    execute(tmp_path / "warm" / "model", "method=uniform4")  # the cache is written now
    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(OSError, match=r"cannot write .*model: No space left on device"):
        execute(tmp_path / "cold" / "model", "method=uniform4")
    assert not [path for path in tmp_path.rglob("cold/**/*") if path.is_file() or path.name.startswith(".")]


def test_certify_command_prints_its_usage(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        main(["certify", "--help"])
    assert "FOLDER" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="2"):
        main([])
