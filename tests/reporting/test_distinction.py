"""Runs of one label that differ in their model or text are rows of their own."""

import pathlib

import pytest

from nashswarm.records import record
from nashswarm.records.record import Record
from nashswarm.reporting import frame
from nashswarm.reporting.distinction import distinguish
from scripts import tables
from tests.reporting.test_frame import synthetic


def changed(run: Record, group: str, **settings: object) -> Record:
    run.config[group] = {**run.config.get(group, {}), **settings}
    return run


@pytest.mark.parametrize(
    ("group", "settings", "labels"),
    [
        (
            "dataset",
            [{"sequence_length": 32}, {"sequence_length": 64}],
            ["[sequence_length=32]", "[sequence_length=64]"],
        ),
        ("model", [{"exclude": []}, {"exclude": ["lm_head"]}], ["[exclude=[]]", "[exclude=['lm_head']]"]),
        ("model", [{"content": "a" * 64}, {"content": "b" * 64}], ["[content=aaaaaaaa]", "[content=bbbbbbbb]"]),
        ("dataset", [{}, {"columns": "text"}], ["[columns=absent]", "[columns=text]"]),
    ],
)
def test_distinguish_sweep_of_any_setting_can_be_tabled(
    group: str, settings: list[dict[str, object]], labels: list[str], tmp_path: pathlib.Path
) -> None:
    runs = [changed(synthetic("gptq", seed), group, **one) for one in settings for seed in (0, 1)]
    with pytest.raises(ValueError, match="differ in more than the seed"):
        frame.average(frame.frame(runs))
    means = frame.average(frame.frame(distinguish(runs)))
    name = runs[0].labels[group]
    assert list(means[group]) == sorted(f"{name}{label}" for label in labels) and (means["seeds"] == 2).all()
    for run in runs:
        record.write(tmp_path / "records", run)
    options = ["--records", str(tmp_path / "records"), "--out", str(tmp_path / "tables"), "--experiment", "ablation"]
    assert tables.main(options) == 0
    written = next((tmp_path / "tables").glob("*.csv")).read_text()
    assert all(label.strip("[]").split("'")[0] in written for label in labels)


def test_distinguish_other_methods_and_code_stay_an_error() -> None:
    runs = [synthetic("gptq", 0, bits=3), synthetic("gptq", 1, bits=4)]
    with pytest.raises(ValueError, match=r"method\.bits: 3, 4"):
        frame.average(frame.frame(distinguish(runs)))


def test_distinguish_committed_records_keep_their_labels(committed_records: list[Record]) -> None:
    assert [one.labels for one in distinguish(committed_records)] == [one.labels for one in committed_records]
