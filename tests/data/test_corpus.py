"""Text from files and folders, as it is, and the windows cut from it."""

import hashlib
import json
import pathlib
from typing import Any

import numpy as np
import pytest
import torch

from nashswarm.data import corpus
from nashswarm.data.corpus import (
    Dataset,
    HubText,
    StdlibDocs,
    cut_windows,
    draw_windows,
    first_windows,
    most_windows,
    sha256,
)
from nashswarm.methods.nash_swarm.settings import NashSwarm


def write(folder: pathlib.Path, **splits: str) -> str:
    for split, content in splits.items():
        (folder / f"{split}.txt").write_text(content, encoding="utf-8", newline="")
    return str(folder)


def refused(dataset: HubText, purpose: Any = "test") -> str:
    """The sentence with which ``dataset`` refuses."""
    with pytest.raises(ValueError) as caught:
        dataset.text(purpose)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_dataset_classes_satisfy_protocol() -> None:
    assert isinstance(StdlibDocs(), Dataset) and isinstance(HubText("x"), Dataset)
    assert HubText("folder/mine").label == "mine" and HubText("x", name="sst2").label == "sst2"
    assert StdlibDocs().label == "stdlib_docs"


def test_text_of_folder_equals_files_without_last_newline(tmp_path: pathlib.Path) -> None:
    content = "= Title =\n\n  indented, trailing \n\n\nend"
    for ending in ("", "\n"):
        folder = tmp_path / f"ending{len(ending)}"
        folder.mkdir()
        path = write(folder, train="not this", validation="calibrate\n", test=content + ending)
        assert HubText(path).text("test") == content
        assert HubText(path).text("calibration") == "calibrate"
    (tmp_path / "more").mkdir()
    assert HubText(write(tmp_path / "more", test="a\n\n\n")).text("test") == "a\n\n"


def test_text_with_unicode_line_separators_keeps_them(tmp_path: pathlib.Path) -> None:
    content = "page\x0cbreak, vertical\x0btab, next\x85line, separator\u2028and\u2029more, é, 漢字"
    assert HubText(write(tmp_path, test=content)).text("test") == content


def test_text_with_crlf_gets_newlines(tmp_path: pathlib.Path) -> None:
    assert HubText(write(tmp_path, test="one\r\ntwo\r\n")).text("test") == "one\ntwo"
    (tmp_path / "single.txt").write_bytes(b"0\r\n" * 10)
    assert "\r" not in HubText(str(tmp_path / "single.txt")).text("test")


def test_text_with_separator_joins_rows_as_on_hub(tmp_path: pathlib.Path) -> None:
    """On the hub a row of WikiText-2 is empty or ends in a newline; GPTQ joins them by two more."""
    hub_rows = ["", " = Title = \n", "", " First paragraph . \n", " Second . \n"]
    path = write(tmp_path, test="".join(row or "\n" for row in hub_rows))
    assert HubText(path, separator="\n\n").text("test") == "\n\n".join(hub_rows)


def test_text_of_hub_row_with_newline_gets_no_second(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = ["", " = Title = \n", "text \n", ""]
    monkeypatch.setattr(corpus, "read_rows", lambda *_: [(row,) for row in rows])
    assert HubText("owner/name", separator="\n\n").text("test") == "\n\n".join(rows)
    assert HubText("owner/name").text("test") == "\n = Title = \ntext \n"


def test_text_of_file_splits_beginning_and_rest(tmp_path: pathlib.Path) -> None:
    content = "".join(f"line {number}, é\n" for number in range(100))
    (tmp_path / "story.txt").write_text(content, encoding="utf-8")
    dataset = HubText(str(tmp_path / "story.txt"))
    assert dataset.text("calibration") + dataset.text("test") == content
    assert len(dataset.text("calibration")) == pytest.approx(0.2 * len(content), abs=1)


def test_stdlib_docs_text_serves_every_purpose() -> None:
    assert len(StdlibDocs().text("test")) > len(StdlibDocs().text("calibration")) > 10_000


def json_folder(folder: pathlib.Path) -> str:
    rows = [
        {"question": "Who ?", "answer": "A starling .", "label": 1},
        {"question": "Why ?", "answer": "", "label": 0},
    ]
    for split in ("train", "test"):
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(folder)


def test_text_of_two_columns_joined_by_space(tmp_path: pathlib.Path) -> None:
    path = json_folder(tmp_path)
    both = HubText(path, columns=("question", "answer"), separator="\n", calibration_split="train")
    assert both.text("test") == "Who ? A starling .\n\nWhy ? \n"
    assert HubText(path, columns=("answer",)).text("test") == "A starling .\n"
    assert both.text("calibration") == both.text("test")


def test_text_of_missing_split_or_column_refused(tmp_path: pathlib.Path) -> None:
    path = json_folder(tmp_path)
    message = refused(HubText(path, columns=("question",)), "calibration")
    assert path in message and "no split 'validation', only train, test; set dataset.calibration_split" in message
    message = refused(HubText(path, columns=("question", "text", "body")))
    assert path in message and "no column text, body, only question, answer, label; set dataset.columns" in message


def test_text_of_numeric_column_refused(tmp_path: pathlib.Path) -> None:
    assert "label" in refused(HubText(json_folder(tmp_path), columns=("label",)))


@pytest.mark.parametrize("path", ["/nowhere/at/all", "./nowhere", "../nowhere.txt", "a/b/c"])
def test_text_of_missing_path_refused(path: str) -> None:
    assert f"the dataset {path} does not exist" in refused(HubText(path))


def test_text_of_empty_folder_refused(tmp_path: pathlib.Path) -> None:
    assert str(tmp_path) in refused(HubText(str(tmp_path)))


def test_text_of_unreachable_hub_name_refused() -> None:
    message = refused(HubText("nobody/nothing"))
    assert message.startswith("the dataset nobody/nothing cannot be read from the Hugging Face hub")


def test_text_of_binary_file_refused(tmp_path: pathlib.Path) -> None:
    (tmp_path / "picture.txt").write_bytes(bytes(range(256)) * 4)
    assert "picture.txt" in refused(HubText(str(tmp_path / "picture.txt")))


def test_sha256_of_text_is_hexadecimal() -> None:
    assert sha256("é") == hashlib.sha256(b"\xc3\xa9").hexdigest()


@pytest.mark.parametrize("length", [7, 32])
def test_cut_windows_are_consecutive_and_drop_tail(tokenizer: Any, text_file: pathlib.Path, length: int) -> None:
    text = text_file.read_text()
    tokens = tokenizer(text)["input_ids"]
    cut = cut_windows(text, tokenizer, length, "test")
    assert cut.shape == (len(tokens) // length, length)
    assert cut.flatten().tolist() == tokens[: len(tokens) // length * length]
    exact = tokenizer.decode(tokens[: 2 * length])
    assert len(cut_windows(exact, tokenizer, len(tokenizer(exact)["input_ids"]), "test")) == 1


@pytest.mark.parametrize("text", ["", "the a one"])
def test_cut_windows_of_short_text_refused(tokenizer: Any, text: str) -> None:
    count = len(tokenizer(text)["input_ids"])
    with pytest.raises(ValueError, match=f"the calibration text has {count} tokens, too short for one window of 64"):
        cut_windows(text, tokenizer, 64, "calibration")


def test_first_windows_too_few_refused() -> None:
    pool = torch.arange(12).view(4, 3)
    assert torch.equal(first_windows(pool, 2, "test"), pool[:2]) and torch.equal(
        first_windows(pool, None, "test"), pool
    )
    with pytest.raises(ValueError, match=r"the test text has 4 windows, fewer than dataset\.test_windows=5"):
        first_windows(pool, 5, "test")
    for asked in (0, -1):
        with pytest.raises(ValueError, match=f"dataset.test_windows={asked} must be at least 1"):
            first_windows(pool, asked, "test")


def test_draw_windows_disjoint_and_seeded() -> None:
    pool = torch.arange(20 * 4).view(20, 4)
    calibration, holdout = draw_windows(pool, 12, 8, np.random.default_rng(0))
    assert calibration.shape == (12, 4) and holdout.shape == (8, 4)
    assert sorted(torch.cat([calibration, holdout])[:, 0].tolist()) == list(range(0, 80, 4))
    again = draw_windows(pool, 12, 8, np.random.default_rng(0))
    assert torch.equal(calibration, again[0]) and torch.equal(holdout, again[1])
    assert not torch.equal(calibration, draw_windows(pool, 12, 8, np.random.default_rng(1))[0])


def test_draw_windows_too_few_refused() -> None:
    pool, rng = torch.zeros(5, 4, dtype=torch.long), np.random.default_rng(0)
    with pytest.raises(ValueError, match=r"has 5 windows, fewer than the 4 \+ 2 asked for"):
        draw_windows(pool, 4, 2, rng)
    for calibration, holdout in ((0, 1), (1, 0), (-1, 1)):
        with pytest.raises(ValueError, match="must be at least 1"):
            draw_windows(pool, calibration, holdout, rng)


@pytest.mark.parametrize(
    ("there", "asked", "drawn"),
    [
        (200, (None, None), (48, 16)),
        (31, (None, None), (24, 7)),
        (3, (None, None), (2, 1)),
        (2, (None, None), (1, 1)),
        (31, (4, None), (4, 7)),
        (31, (None, 3), (28, 3)),
    ],
)
def test_draw_windows_by_default_holds_out_a_quarter(
    there: int, asked: tuple[int | None, int | None], drawn: tuple[int, int]
) -> None:
    pool = torch.arange(there * 4).view(there, 4)
    sets = draw_windows(pool, *asked, np.random.default_rng(0))
    assert tuple(map(len, sets)) == drawn
    assert len(set(torch.cat(sets)[:, 0].tolist())) == sum(drawn)


def test_draw_windows_for_best_effort_takes_four_times_as_many() -> None:
    pool, rng = torch.zeros(1000, 4, dtype=torch.long), np.random.default_rng(0)
    for effort, drawn in (("default", (48, 16)), ("best", (192, 64))):
        sets = draw_windows(pool, None, None, rng, most_windows(NashSwarm(effort=effort)))
        assert tuple(map(len, sets)) == drawn
    assert most_windows(object()) == most_windows(NashSwarm())


def test_draw_windows_of_one_window_refused() -> None:
    with pytest.raises(ValueError, match="fills only 1 window of 4 tokens: give more text"):
        draw_windows(torch.zeros(1, 4, dtype=torch.long), None, None, np.random.default_rng(0))


def test_cut_windows_with_special_tokens_encloses_each(
    tokenizer: Any, text_file: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    """As an encoder's tokenizer puts them; its own template is left out, once for every window comes in its place."""
    tokenizer.save_pretrained(tmp_path)
    between = type(tokenizer).from_pretrained(tmp_path, cls_token="[CLS]", sep_token="[SEP]")
    first, last = between.cls_token_id, between.sep_token_id
    assert first != last
    text = text_file.read_text()
    tokens = tokenizer(text)["input_ids"]
    cut = cut_windows(text, between, 32, "test")
    assert cut.shape == (len(tokens) // 30, 32) and cut.dtype == torch.long
    assert set(cut[:, 0].tolist()) == {first} and set(cut[:, -1].tolist()) == {last}
    assert cut[:, 1:-1].flatten().tolist() == tokens[: len(tokens) // 30 * 30]
