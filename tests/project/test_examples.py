"""The scripts of ``examples/`` and the command of the guides run as they stand, without a download."""

import os
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[2]
PRINTED = {  # script → words that it must print
    "quantize": ("gptq", "nash_swarm", "largest regret"),
    "run_packed": ("bytes in memory", "times as fast", "int8 costs"),
    "route_tokens": ("top-k", "loss-free bias", "nash swarm"),
    "whole_system": ("$ nashswarm certify", '"equilibrium": true', "The function returns"),
}
pytestmark = pytest.mark.slow


def call(*command: str, **variables: str) -> str:
    """Run a command in the repository's root and return its output; fail with its errors if it fails."""
    offline = {"HF_HUB_OFFLINE": "1", "WANDB_MODE": "disabled", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, *command], cwd=ROOT, env=os.environ | offline | variables, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_scripts_are_all_named_here() -> None:
    assert {path.stem for path in (ROOT / "examples").glob("*.py")} == set(PRINTED)


@pytest.mark.parametrize("script", sorted(PRINTED))
def test_script_runs_to_its_end(script: str) -> None:
    printed = call(f"examples/{script}.py")
    for words in PRINTED[script]:
        assert words in printed


def test_command_of_the_guides_leads_to_a_row_of_a_table(
    model_folder: pathlib.Path, text_folder: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    folders = {"NASHSWARM_STORY_WRITER": str(model_folder), "NASHSWARM_STORIES": str(text_folder)}
    few = ["sequence_length=32", "calibration_windows=6", "holdout_windows=3", "test_windows=6"]
    words = [*(f"dataset.{word}" for word in few), f"records={tmp_path}/records", f"cache={tmp_path}/cache"]
    words += [f"hydra.run.dir={tmp_path}/logs", "wandb=disabled"]
    added = ["--config-dir", "examples/adding/conf", "model=story_writer", "dataset=stories", "method=ends"]
    call("-m", "experiments.run", *added, *words, **folders)
    call("scripts/tables.py", "--records", f"{tmp_path}/records", "--out", f"{tmp_path}/tables")
    assert "| ends |" in (tmp_path / "tables/single.md").read_text()
