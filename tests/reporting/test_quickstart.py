"""The quick start: what it prints and leaves, and what a failed run costs."""

import os
import pathlib
from collections.abc import Iterator

import pytest
from rich.console import Console

from nashswarm.experiment import choices
from nashswarm.records import record
from nashswarm.records.record import Record
from nashswarm.reporting import quickstart, typeset

RECORDS = pathlib.Path(__file__).parents[2] / "results/records/ablation"
METHODS = ["uniform4", "gptq", "nash_lattice"]


def test_methods_of_the_ablation_are_those_of_its_file() -> None:
    methods = choices.methods_of("ablation")
    assert {"no_nash", "no_swarm", "no_rotation", "no_sweeps", "no_cache", "nash_swarm"} <= set(methods)
    for method in methods:
        assert (choices.CONF / "method" / f"{method}.yaml").exists(), method


@pytest.mark.usefixtures("few_resamples")
def test_quickstart_with_a_failed_run_shows_the_others_and_returns_1(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """On 100 columns, with committed records in place of runs."""
    of_method = {one.labels["method"]: one for one in record.read_all(RECORDS)}

    def ended(methods: list[str], out: pathlib.Path, jobs: int) -> Iterator[tuple[str, Record | str]]:
        assert (methods, out, jobs) == ([*METHODS, "no_nash"], tmp_path, 2)
        yield from ((method, of_method[method]) for method in METHODS[::-1])
        yield "no_nash", "ValueError: the price is no price"

    monkeypatch.setattr(choices, "methods_of", lambda _: [*METHODS, "no_nash"])
    monkeypatch.setattr(quickstart, "run_all", ended)
    monkeypatch.setattr(quickstart, "page", lambda records, made_by: f"{len(records)} runs of {made_by}")
    monkeypatch.setattr(typeset, "console", lambda: Console(width=100))
    assert quickstart.quickstart(tmp_path) == 1
    printed = capsys.readouterr().out
    assert "no_nash failed: ValueError: the price is no price" in printed and "3 of 4 runs" in printed
    assert "nashswarm compress MODEL" in printed
    written = [f"tables/ablation{end}" for end in (".md", ".csv", ".tex")]
    written += ["figures/ablation_pareto.png", "figures/ablation_pareto.pdf", "ablation.html"]
    assert sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*.*")) == sorted(written)
    for name in ("tables/ablation.md", "figures/ablation_pareto.png", "ablation.html"):
        assert str(tmp_path / name) in printed.replace("\n", "")
    assert (tmp_path / "ablation.html").read_text() == "3 runs of ['nashswarm quickstart']"
    assert max(len(line) for line in printed.splitlines() if "│" in line or "━" in line) <= 100


def killed(method: str, out: pathlib.Path) -> pathlib.Path:
    """Stand in for ``run_one``: its process dies at ``gptq``."""
    if method == "gptq":
        os._exit(9)
    return next(path for path in RECORDS.glob("*.json") if f'"method": "{method}"' in path.read_text())


@pytest.mark.slow
def test_runs_of_a_killed_process_run_again_alone(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quickstart, "run_one", killed)
    ended = dict(quickstart.run_all(["uniform4", "gptq", "nash_lattice"], tmp_path, 1))
    assert ended.pop("gptq") == "its process was killed, perhaps for want of memory"
    assert {one.labels["method"] for one in ended.values() if isinstance(one, Record)} == {"uniform4", "nash_lattice"}


def test_quickstart_without_a_good_run_writes_nothing(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(choices, "methods_of", lambda _: ["gptq"])
    monkeypatch.setattr(quickstart, "run_all", lambda *_: iter([("gptq", "OSError: the disk is full")]))
    assert quickstart.quickstart(tmp_path) == 1
    told = capsys.readouterr()
    assert "gptq failed: OSError: the disk is full" in told.out and "nothing to show" in told.err
    assert not list(tmp_path.iterdir())
    with pytest.raises(ValueError, match="--jobs 0: give at least one process"):
        quickstart.quickstart(tmp_path, jobs=0)


@pytest.mark.slow
def test_quickstart_in_processes_of_its_own_writes_records(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two methods that compress in seconds; run again, both are found."""
    monkeypatch.setattr(choices, "methods_of", lambda _: ["baseline", "uniform4"])
    assert quickstart.quickstart(tmp_path) == 0
    paths = sorted((tmp_path / "records/ablation").glob("*.json"))
    assert {record.read(path).labels["method"] for path in paths} == {"baseline", "uniform4"}
    assert {record.read(path).config["threads"] for path in paths} == {1}
    before = [path.stat().st_mtime_ns for path in paths]
    assert quickstart.quickstart(tmp_path) == 0 and [path.stat().st_mtime_ns for path in paths] == before
