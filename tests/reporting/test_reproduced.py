"""Runs that are repeated: the same to the last bit, inside of their intervals, or outside, times apart."""

import dataclasses
import pathlib

import pytest

from nashswarm.records import record
from nashswarm.records.record import Record
from nashswarm.reporting.reproduction import compared
from scripts import reproduced

METRICS = {
    "kl": 0.5,
    "kl_low": 0.4,
    "kl_high": 0.6,
    "decode_ratio": 2.0,
    "decode_ratio_low": 1.9,
    "decode_ratio_high": 2.1,
}


def run(
    kl: float = 0.5, ratio: float = 2.0, window: float = 0.25, method: str = "nash_lattice", threads: int = 1
) -> Record:
    labels = {"experiment": "ablation", "method": method, "model": "m", "dataset": "d", "measure": "q", "seed": "0"}
    metrics = METRICS | {"kl": kl, "decode_ratio": ratio}
    series = {"kl": [window, 0.75], "decode_ms": [ratio]}
    return Record(labels, {"method": method, "threads": threads}, metrics, series, [], "", {})


def words(folder: pathlib.Path) -> list[str]:
    places = {"records": "first", "reproduced": "again", "out": "report"}
    return [word for name, place in places.items() for word in (f"--{name}", str(folder / place))]


@pytest.mark.parametrize(
    ("again", "cells", "status"),
    [
        (run(), "| ablation | 1 | 1 | 1 | 1 | 1 | 1 | 1 | none |", 0),
        (run(kl=0.59, window=0.26), "| ablation | 1 | 1 | 0 | 1 | 1 | 1 | 1 | none |", 0),
        (run(window=0.26), "| ablation | 1 | 1 | 0 | 1 | 1 | 1 | 1 | none |", 0),
        (run(ratio=3.0), "| ablation | 1 | 1 | 1 | 1 | 1 | 1 | 0 | nash_lattice decode_ratio |", 0),
        (run(threads=2, window=0.26), "| ablation | 2 (committed: 1) | 1 | 0 | 1 | 1 | 1 | 1 | none |", 0),
        (run(kl=0.61), "| ablation | 1 | 1 | 0 | 1 | 0 | 1 | 1 | nash_lattice kl |", 1),
    ],
)
def test_reproduced_metric_outside_its_interval_is_named(
    again: Record, cells: str, status: int, tmp_path: pathlib.Path
) -> None:
    record.write(tmp_path / "first", run())
    record.write(tmp_path / "again", again)
    assert reproduced.main(words(tmp_path)) == status
    assert (tmp_path / "report.md").read_text().splitlines()[-1] == cells


def test_reproduced_without_repetition_fails_in_one_sentence(
    tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    record.write(tmp_path / "first", run())
    assert reproduced.main(words(tmp_path)) == 1
    assert "run an experiment with records=" in capsys.readouterr().err
    record.write(tmp_path / "again", run(method="gptq"))
    assert reproduced.main(words(tmp_path)) == 1
    assert "repeats a record" in capsys.readouterr().err
    assert not (tmp_path / "report.md").exists()
    record.write(tmp_path / "again", run(window=0.26))
    caplog.clear()
    assert reproduced.main(words(tmp_path)) == 0
    assert (tmp_path / "report.md").read_text().splitlines()[-1].startswith("| ablation | 1 | 1 | 0 |")
    assert [line.count("repeats no record") for line in caplog.messages] == [1]


def test_compared_metric_without_interval_must_be_equal() -> None:
    first, again = (dataclasses.replace(run(), metrics={"bytes_file": size}, series={}) for size in (10.0, 11.0))
    assert compared(first, again).failing == ["bytes_file"] and not compared(first, first).failing


def test_compared_absent_metric_lies_outside() -> None:
    again = dataclasses.replace(run(), metrics={"kl": 0.5})
    assert compared(run(), again).inside == {"kl": True, "decode_ratio": False}
