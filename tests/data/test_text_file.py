"""Text files and tables of text: read as their names say, huge ones in pieces, or refused in a sentence."""

import gzip
import itertools
import pathlib

import pandas
import pytest

from nashswarm.calibration import texts
from nashswarm.data import text_file
from nashswarm.data.text_file import read_file

LINES = ["the quiet flock follows", "every player reads, alone", "é"]


def write(path: pathlib.Path) -> None:
    table = pandas.DataFrame({"number": [1, 2, 3], "text": LINES})
    text = {"txt": "\n".join(LINES), "jsonl": table.to_json(orient="records", lines=True, force_ascii=False)}
    text |= {"json": table.to_json(orient="records"), "csv": table.to_csv(index=False)}
    kind = path.name.split(".")[1]
    if kind == "parquet":
        return table.to_parquet(path)
    lines = text[kind].replace("\n", "\r\n") if "crlf" in path.stem else text[kind]
    content = ("\ufeff" * ("bom" in path.stem) + lines).encode()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)


@pytest.mark.parametrize(
    "name",
    ["a.txt", "bom.txt", "crlf.txt", "a.txt.gz", "a.jsonl", "a.jsonl.gz", "a.json", "a.csv", "a.csv.gz", "a.parquet"],
)
def test_calibration_file_is_read_as_its_name_says(name: str, tmp_path: pathlib.Path) -> None:
    write(tmp_path / name)
    assert read_file(tmp_path / name).rstrip("\n") == "\n".join(LINES)


def test_calibration_file_that_is_not_what_it_says_is_refused(tmp_path: pathlib.Path) -> None:
    for name, content in {
        "a.parquet": b"no", "a.jsonl": b"{", "a.txt.gz": b"no", "a.txt": "é".encode("latin-1"), "a.csv": b"a,b\nx,y\n",
    }.items():  # fmt: skip
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=f"{name} (cannot be read|is not UTF-8|is cut short or no|has no column)"):
            read_file(tmp_path / name)


@pytest.mark.parametrize("name", ["a.jsonl", "a.csv.gz", "a.parquet", "a.json"])
def test_calibration_column_is_read_or_the_columns_are_named(name: str, tmp_path: pathlib.Path) -> None:
    path = tmp_path / name
    table = pandas.DataFrame({"prompt": LINES, "answer": [line.upper() for line in LINES], "number": 1})
    if path.suffix == ".parquet":
        table.to_parquet(path)
    elif "csv" in name:
        table.to_csv(path, index=False)
    else:
        table.to_json(path, orient="records", lines=path.suffix == ".jsonl")
    assert texts.read(f"{path}::answer", None) == "\n".join(LINES).upper()
    assert texts.named(f"{path}::answer+embedded") == f"{name}::answer+embedded"
    for column in ("number", "absent"):
        with pytest.raises(ValueError, match=f"has no column of text named {column}, only prompt, answer"):
            texts.read(f"{path}::{column}", None)
    with pytest.raises(ValueError, match="no column named text, and 2 other columns"):
        texts.read(str(path), None)


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.parquet", "a.csv", "one_line.txt"])
def test_huge_calibration_file_is_read_in_whole_lines_that_are_spread_evenly(
    name: str, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, lines = tmp_path / name, [f"line {number:06d} é" for number in range(20_000)]
    monkeypatch.setattr(text_file, "PIECE", 1 << 12)
    table = pandas.DataFrame({"text": lines})
    if name == "a.parquet":
        table.to_parquet(path, row_group_size=50)
    elif name == "a.csv":
        table.to_csv(path, index=False)
    elif name == "a.jsonl":
        table.to_json(path, orient="records", lines=True, force_ascii=False)
    else:
        path.write_text((" " if name == "one_line.txt" else "\n").join(lines))
    text = read_file(path, most=40_000)
    assert 10_000 < len(text.encode()) < 60_000
    if name == "one_line.txt":
        assert "000000" in text and "0190" in text and text.count("\ufffd") == 0
        return
    found = text.split("\n")
    assert set(found) <= set(lines)  # whole ones
    numbers = [int(line.split()[1]) for line in found]
    assert numbers == sorted(numbers) and numbers[0] < 500
    assert name == "a.csv" or (numbers[-1] > 17_000 and max(b - a for a, b in itertools.pairwise(numbers)) < 4000)
    assert read_file(path) == "\n".join(lines)


def test_gzip_file_whose_content_is_damaged_raises(tmp_path: pathlib.Path) -> None:
    whole, path = bytearray(gzip.compress(bytes(range(256)) * 40)), tmp_path / "a.txt.gz"
    for place in range(10, len(whole) - 8, 7):  # behind the header; some bytes break the codes, others the checksum
        damaged = whole.copy()
        damaged[place] ^= 0xFF
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"a\.txt\.gz is (cut short or no sound gzip file|not UTF-8)"):
            read_file(path)
