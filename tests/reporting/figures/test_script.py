"""The script that draws figures: it writes those that the records allow and removes the others."""

import dataclasses

import pytest

from nashswarm.records import record
from scripts import figures as script
from tests.reporting.conftest import few_statistics
from tests.reporting.test_frame import synthetic


@pytest.fixture(scope="module")
def script_figures(tmp_path_factory: pytest.TempPathFactory) -> set[str]:
    """Return the names of figures of two experiments that have the same run of ``nash_lattice``, drawn by the script.

    The folder had a figure of times from earlier records.
    """
    folder = tmp_path_factory.mktemp("script")
    one, other = synthetic("nash_lattice"), synthetic("gptq")
    for experiment, method in (("presets", "nash_lattice"), ("bit_budget", "nash_lattice[bits=3.0]")):
        for run, label in ((one, method), (other, "gptq")):
            labels = {**run.labels, "experiment": experiment, "method": label}
            record.write(folder / "records" / experiment, dataclasses.replace(run, labels=labels))
    out = folder / "figures"
    out.mkdir()
    (out / "presets_speed.pdf").touch()
    none = ["--flock", str(folder / "none"), "--kernels", str(folder / "none")]
    with few_statistics():
        assert script.main(["--records", str(folder / "records"), "--out", str(out), *none]) == 0
    return {path.name for path in out.iterdir()}


def test_figures_script_without_their_records_removes_figures(script_figures: set[str]) -> None:
    assert {"presets_pareto.pdf", "presets_bits.png"} <= script_figures and "presets_speed.pdf" not in script_figures


def test_figures_script_run_of_two_experiments_is_drawn_in_its_own(script_figures: set[str]) -> None:
    """``nash_lattice`` of one experiment may be ``nash_lattice[bits=3.0]`` of another, which has no reference then."""
    assert "presets_ablation.pdf" in script_figures and "bit_budget_ablation.pdf" not in script_figures
