"""A run whose method stores trellis tiles: its record, its folder, and what cannot be done with it."""

import pathlib
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from experiments.config import compose
from nashswarm.cli import main
from nashswarm.errors import Unsupported
from nashswarm.experiment.certify import certify
from nashswarm.experiment.run import run
from nashswarm.kernels import trellis
from nashswarm.measures.size import resident_bytes
from nashswarm.packed.matrix import TrellisMatrix
from nashswarm.records import record
from nashswarm.reporting.figures import games

LABELS = {"experiment": "single", "model": "tiny", "method": "rounding", "dataset": "story", "measure": "size"}
METHOD = ("~method", "+method={_target_: tests.experiment.rounding.Rounding}")


@pytest.fixture(scope="module")
def made(small_run: list[str], tmp_path_factory: pytest.TempPathFactory) -> tuple[record.Record, pathlib.Path, Any]:
    """The record, the folder of the saved model, and the model loaded from it."""
    folder = tmp_path_factory.mktemp("run")
    places = [f"cache={folder}/cache", f"records={folder}/records", f"save={folder}/model"]
    outcome = run(compose(*small_run, *METHOD, "measure=size", *places), LABELS, many=False)
    assert outcome.path is not None
    model = transformers.AutoModelForCausalLM.from_pretrained(folder / "model")
    return record.read(outcome.path), folder / "model", model


def test_record_counts_bytes_of_file_and_memory(made: Any) -> None:
    one, folder, model = made
    assert one.metrics["bytes_file"] == sum(
        (folder / name).stat().st_size for name in ("config.json", "model.safetensors")
    )
    assert one.metrics["bytes_resident"] == resident_bytes(model) <= 1.03 * one.metrics["bytes_file"]
    matrices = [module for module in model.modules() if isinstance(module, TrellisMatrix)]
    weights = sum(matrix.shape[0] * matrix.shape[1] for matrix in matrices)
    assert one.metrics["bits_per_weight_resident"] == pytest.approx(8 * sum(one.nbytes for one in matrices) / weights)
    assert one.metrics["damage"] == pytest.approx(0.5 * 10) and one.metrics["players"] == 7
    assert one.series["moves"] == [2, 1]


def test_record_has_a_row_and_a_line_for_every_matrix(made: Any) -> None:
    one, _, model = made
    grids, lines = games.tiles(one.allocation), one.allocation.splitlines()
    assert len(one.layers) == len(lines) == 10
    for row, line in zip(one.layers, lines, strict=True):
        matrix = model.get_submodule(row["name"]).matrix
        assert (row["rows"], row["columns"]) == matrix.shape and row["bytes"] == len(matrix.encode())
        assert row["bits_per_weight"] == 8 * row["bytes"] / row["parameters"] and row["damage"] == 0.5
        rates = trellis.tile_rates(matrix.tiles).numpy()
        assert np.array_equal(grids[row["name"]], rates)
        assert line.split()[:3] == [row["name"], f"{rates.shape[0]}x{rates.shape[1]}", f"{rates.mean():.3f}"]


def test_folder_is_inspected_and_generates(made: Any, capsys: pytest.CaptureFixture[str]) -> None:
    one, folder, model = made
    assert main(["inspect", str(folder)]) == 0
    shown = capsys.readouterr().out
    assert shown.count("trellis") == 10 and f"{one.metrics['bytes_resident']:,.0f} bytes in memory" in shown
    assert model.generate(torch.tensor([[1, 2]]), max_new_tokens=3, eos_token_id=None).shape == (1, 5)


def test_certify_of_trellis_refused(made: Any) -> None:
    with pytest.raises(ValueError, match="is trellis-coded, but not by method=nash_swarm: there is no game to certify"):
        certify(made[1])


def test_finetune_of_trellis_refused(small_run: list[str], tmp_path: pathlib.Path) -> None:
    options = ("task=finetune", "measure=size", f"cache={tmp_path}/cache", f"records={tmp_path}/records")
    with pytest.raises(
        Unsupported, match=r"cannot train the format in which .* is stored: choose a method that stores"
    ):
        run(compose(*small_run, *METHOD, *options), LABELS, many=False)
