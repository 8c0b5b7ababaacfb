"""Records: named by what moves a number, written whole or not at all."""

import dataclasses
import errno
import json
import os
import pathlib
import subprocess
import sys
import time
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nashswarm.records import files, record
from nashswarm.records.files import write_report, write_whole
from nashswarm.records.record import Record, fingerprint, path_of, read, read_all, write

RECORD = Record(
    labels={"method": "uniform4", "seed": "0"},
    config={"method": {"bits": 4, "name": "größer"}, "seed": 0},
    metrics={"nll": 3.25, "tokens": 115.0, "tiny": 1e-300},
    series={"nll": [3.0, 3.5]},
    layers=[{"name": "wte", "bytes": 10}],
    allocation="wte 2x1 4*2\n",
    provenance={"commit": None, "dirty": True},
)


def changed(**fields: Any) -> Record:
    return dataclasses.replace(RECORD, **fields)


def test_fingerprint_of_reordered_keys_is_equal() -> None:
    config = {"a": {"x": 1, "y": [1, 2]}, "b": 2.5}
    assert fingerprint({"b": 2.5, "a": {"y": [1, 2], "x": 1}}) == fingerprint(config)
    others: list[dict[str, Any]] = [
        {"a": {"x": 1, "y": [2, 1]}, "b": 2.5},
        {"a": {"x": 1, "y": [1, 2]}, "b": 2.6},
        {"a": {"x": "1", "y": [1, 2]}, "b": 2.5},
        {"a": {"x": True, "y": [1, 2]}, "b": 2.5},
        {"a": {"x": None, "y": [1, 2]}, "b": 2.5},
        {"a": {"x": 1, "y": [1, 2]}, "b": 2.5, "c": None},
        {"a": {"x": 1, "y": [1, 2]}},
    ]
    names = {fingerprint(other) for other in [config, *others]}
    assert len(names) == len(others) + 1
    assert all(len(name) == 16 and set(name) <= set("0123456789abcdef") for name in names)


def test_fingerprint_of_a_known_config_does_not_change() -> None:
    """Records that are committed keep their names."""
    assert fingerprint({"seed": 0, "method": {"bits": 4}}) == "16f17ad3c976fa4b"


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_fingerprint_of_nonfinite_number_raises(value: float) -> None:
    with pytest.raises(ValueError):
        fingerprint({"bits": value})


def test_write_then_read_returns_the_record(tmp_path: pathlib.Path) -> None:
    path = write(tmp_path / "main", RECORD)
    assert path == path_of(tmp_path / "main", RECORD.config) == tmp_path / "main" / f"{RECORD.fingerprint}.json"
    assert read(path) == RECORD
    assert path.with_suffix(".txt").read_text() == RECORD.allocation
    assert sorted(file.name for file in path.parent.iterdir()) == [path.name, path.with_suffix(".txt").name]
    fields = json.loads(path.read_text())
    assert fields["schema"] == record.SCHEMA and "allocation" not in fields


def test_read_all_of_nested_folders_reads_every_record(tmp_path: pathlib.Path) -> None:
    other = changed(config={"seed": 1})
    paths = sorted([write(tmp_path / "b", RECORD), write(tmp_path / "a", other)])
    (tmp_path / "notes.json").write_text("not a record")
    (tmp_path / ".abc.json.1.partial").write_text("half")
    assert list(read_all(tmp_path)) == [read(path) for path in paths]
    assert list(read_all(tmp_path / "nowhere")) == []


def test_write_again_replaces_the_whole_record(tmp_path: pathlib.Path) -> None:
    write(tmp_path, RECORD)
    path = write(tmp_path, changed(metrics={"nll": 9.0}, allocation="wte 2x1 2*2\n"))
    assert read(path).metrics == {"nll": 9.0} and read(path).allocation == "wte 2x1 2*2\n"
    assert len(list(tmp_path.iterdir())) == 2


def test_read_between_two_file_writes_raises(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The new allocation stands beside the old metrics for a moment."""
    path = write(tmp_path, RECORD)
    seen, replace = [], pathlib.Path.replace

    def look(partial: pathlib.Path, target: pathlib.Path) -> None:
        replace(partial, target)
        try:
            seen.append(read(path))
        except ValueError as error:
            assert f"{path} and the allocation beside it are of two runs" in str(error)

    monkeypatch.setattr("pathlib.Path.replace", look)
    again = changed(metrics={"nll": 9.0}, allocation="wte 2x1 2*2\n")
    write(tmp_path, again)
    assert seen == [again]


def test_read_without_allocation_hash_returns_the_record(tmp_path: pathlib.Path) -> None:
    path = write(tmp_path, RECORD)
    fields = json.loads(path.read_text())
    del fields["allocation_sha256"]
    path.write_text(json.dumps(fields))
    assert read(path) == RECORD


def full_disk(*_: Any) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("where", ["os.fsync", "pathlib.Path.replace"])
def test_write_that_fails_leaves_nothing_and_names_the_file(
    where: str, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(where, full_disk)
    with pytest.raises(OSError, match=f"cannot write {tmp_path}/report.txt: No space left") as caught:
        write_whole(tmp_path / "report.txt", b"content")
    assert caught.value.errno == errno.ENOSPC and list(tmp_path.iterdir()) == []
    with pytest.raises(OSError, match=f"cannot write {tmp_path}/{RECORD.fingerprint}"):
        write(tmp_path, RECORD)
    assert list(tmp_path.iterdir()) == []


def test_write_that_fails_keeps_the_earlier_record(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path, RECORD)
    monkeypatch.setattr("os.fsync", full_disk)
    with pytest.raises(OSError):
        write(tmp_path, changed(metrics={"nll": 9.0}, allocation="other\n"))
    assert read(path) == RECORD and len(list(tmp_path.iterdir())) == 2


def test_write_that_fails_at_the_second_file_keeps_the_earlier_record(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path, RECORD)
    calls = []

    def second_fails(descriptor: int) -> None:
        calls.append(descriptor)
        if len(calls) == 2:
            full_disk()

    monkeypatch.setattr("os.fsync", second_fails)
    with pytest.raises(OSError):
        write(tmp_path, changed(metrics={"nll": 9.0}, allocation="other\n"))
    assert read(path) == RECORD


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_write_of_nonfinite_metric_raises_and_leaves_nothing(value: float, tmp_path: pathlib.Path) -> None:
    with pytest.raises(ValueError):
        write(tmp_path, changed(metrics={"nll": value}))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("content", ["", "{", '{"labels": {', "[1]", "null", "{}", '{"schema": 1}', "\x00\x00"])
def test_read_of_half_a_record_raises_naming_it(content: str, tmp_path: pathlib.Path) -> None:
    path = write(tmp_path, RECORD)
    path.write_text(content)
    with pytest.raises(ValueError) as caught:
        read(path)
    assert str(path) in str(caught.value) and "not a whole record" in str(caught.value)


def test_read_of_bytes_that_are_not_text_raises_naming_the_file(tmp_path: pathlib.Path) -> None:
    path = write(tmp_path, RECORD)
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match=str(path)):
        read(path)


def test_read_without_allocation_file_raises(tmp_path: pathlib.Path) -> None:
    path = write(tmp_path, RECORD)
    path.with_suffix(".txt").unlink()
    with pytest.raises(ValueError, match=str(path)):
        read(path)


@pytest.mark.parametrize("schema", [0, 2, "1"])
def test_read_of_another_schema_raises_with_remedy(schema: Any, tmp_path: pathlib.Path) -> None:
    path = write(tmp_path, RECORD)
    path.write_text(json.dumps(json.loads(path.read_text()) | {"schema": schema}))
    with pytest.raises(ValueError, match=f"has schema {schema}, this version reads schema 1: rerun it with rerun=true"):
        read(path)


def test_write_report_writes_json_beside_markdown(tmp_path: pathlib.Path) -> None:
    write_report(tmp_path / "new" / "flock", {"rows": [1.5]}, "| a table |\n")
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == ["flock.json", "flock.md"]
    assert json.loads((tmp_path / "new/flock.json").read_text()) == {"rows": [1.5]}
    assert (tmp_path / "new/flock.md").read_text() == "| a table |\n"


def test_write_by_failing_writer_leaves_nothing(tmp_path: pathlib.Path) -> None:
    def half(partial: pathlib.Path) -> None:
        partial.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="cannot write"):
        files.write_by(tmp_path / "folder" / "file", half)
    assert not list((tmp_path / "folder").iterdir())
    files.write_by(tmp_path / "folder" / "file", lambda partial: partial.write_bytes(b"whole"))
    assert (tmp_path / "folder" / "file").read_bytes() == b"whole"


HOLD = """
import pathlib, sys, time
import files  # from its own folder: the package would import torch
with files.claim(pathlib.Path(sys.argv[1])):
    (pathlib.Path(sys.argv[1]).parent / "held").touch()
    time.sleep(float(sys.argv[2]))
"""


def claimed_elsewhere(path: pathlib.Path, seconds: float) -> "subprocess.Popen[bytes]":
    """A process that holds the claim for so long."""
    root = str(pathlib.Path(record.__file__).parent)
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(path), str(seconds)], env=os.environ | {"PYTHONPATH": root}
    )
    while not (path.parent / "held").exists():
        assert process.poll() is None, "the process ended before it held the claim"
        time.sleep(0.02)
    return process


def test_claim_held_by_another_process_is_waited_for(tmp_path: pathlib.Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "abc.json"
    with caplog.at_level("INFO"), claimed_elsewhere(path, 0.7) as process, files.claim(path):
        assert process.wait(60) == 0
        assert "another worker holds" in caplog.text
    assert [one.name for one in tmp_path.iterdir()] == ["held"]


def test_claim_of_killed_process_ends(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "abc.json"
    (tmp_path / ".abc.txt.1234.partial").write_text("half")
    (tmp_path / ".abd.txt.1234.partial").write_text("of another record")
    with claimed_elsewhere(path, 600) as process:
        process.kill()
    assert (tmp_path / ".abc.json.lock").exists()
    with files.claim(path):
        pass
    assert sorted(one.name for one in tmp_path.iterdir()) == [".abd.txt.1234.partial", "held"]


def test_claim_below_a_file_raises_naming_it(tmp_path: pathlib.Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match=r"cannot claim .*abc\.json"), files.claim(tmp_path / "file" / "abc.json"):
        pass


def test_json_text_of_a_record_has_one_line_per_key_and_array(tmp_path: pathlib.Path) -> None:
    long = changed(series={"nll": [0.1 + 0.2, 1e-300, 3.0], "none": []}, layers=[{"name": "wte", "bytes": 10}] * 2)
    path = write(tmp_path, long)
    lines = path.read_text().splitlines()
    assert '  "nll": [0.30000000000000004, 1e-300, 3.0],' in lines and '  "none": []' in lines
    assert lines.count('  {"name": "wte", "bytes": 10},') == 1 and ' "layers": [' in lines
    assert read(path) == long


NESTED = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda items: st.lists(items, max_size=4) | st.dictionaries(st.text(), items, max_size=4),
)


@settings(max_examples=50)
@given(NESTED)
def test_json_text_is_read_back_as_json_dumps_would_write_it(value: Any) -> None:
    assert json.dumps(json.loads(files.json_text(value))) == json.dumps(value)


def test_json_text_of_keys_that_are_no_text_equals_json_dumps() -> None:
    value = {3: [1, 2], 0.5: {True: None}, None: (1, [2.0])}
    assert json.loads(files.json_text(value)) == json.loads(json.dumps(value))


def test_json_text_of_nonfinite_number_without_allow_nan_raises() -> None:
    assert files.json_text([float("inf")]) == "[Infinity]"
    with pytest.raises(ValueError):
        files.json_text({"rows": [{"kl": float("nan")}]}, allow_nan=False)
