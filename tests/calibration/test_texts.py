"""The text to calibrate on: every source, mixtures, what the default stands for, and what a run says of it."""

import logging
import pathlib
from typing import Any

import pytest
import torch

from nashswarm.calibration import texts
from nashswarm.calibration.texts import CalibrationText, read, resolve
from nashswarm.data import corpus, stdlib_docs, stdlib_source
from nashswarm.models import sources

LINES = "".join(f"line {number} of a text about numbers\n" for number in range(4000))


@pytest.fixture(autouse=True)
def short_texts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Instead of the embedded texts, which take seconds to read."""
    monkeypatch.setattr(stdlib_docs, "text", lambda split: f"prose of {split}\n" * 20_000)
    monkeypatch.setattr(stdlib_source, "text", lambda split: f"code = {split!r}\n" * 20_000)
    monkeypatch.setenv(texts.HUB_VARIABLE, "/nowhere")


@pytest.fixture
def hub_folder(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> pathlib.Path:
    """A folder with the files of the hub's dataset, which stands in for it."""
    folder = tmp_path / "wikitext"
    folder.mkdir()
    for split in ("train", "validation", "test"):
        (folder / f"{split}.txt").write_text(f"{split} of the encyclopedia\n" * 9000, encoding="utf-8")
    monkeypatch.setenv(texts.HUB_VARIABLE, str(folder))
    return folder


def own(tokens: int) -> str:
    return f"sampled {tokens}\n" * 9000


def test_dataset_satisfies_the_protocol() -> None:
    assert isinstance(CalibrationText(), corpus.Dataset)
    assert CalibrationText("own+folder/mine.txt").label == "own+mine.txt"


def test_read_each_source_gives_its_text(tmp_path: pathlib.Path, hub_folder: pathlib.Path) -> None:
    (tmp_path / "mine.txt").write_text(LINES, encoding="utf-8")
    assert read("embedded", None) == stdlib_docs.text("calibration")
    assert read("code", None) == stdlib_source.text("calibration")
    assert read(str(tmp_path / "mine.txt"), None) == LINES  # all of it
    assert read("hub", None).startswith("train of the encyclopedia")
    assert read(str(hub_folder), None).startswith("train of the encyclopedia")
    (hub_folder / "train.txt").unlink()
    assert read(str(hub_folder), None).startswith("validation of the encyclopedia")
    assert read("own", own) == own(texts.CHARACTERS // texts.CHARACTERS_OF_TOKEN)


def test_read_mixture_has_equal_shares_spread_over_each_part(tmp_path: pathlib.Path) -> None:
    (tmp_path / "a+b.txt").write_text(LINES, encoding="utf-8")
    mixed = read("own+code+embedded", own)
    share = texts.CHARACTERS // 3
    for name in ("sampled", "code", "prose"):
        lines = [line for line in mixed.split("\n") if line.startswith(name)]
        assert sum(len(line) + 1 for line in lines) == pytest.approx(share, rel=0.05)
    assert f"sampled {share // texts.CHARACTERS_OF_TOKEN}" in mixed
    assert read(str(tmp_path / "a+b.txt"), None) == LINES  # a path that exists is no mixture


def test_excerpt_takes_whole_lines_from_everywhere() -> None:
    found = texts.excerpt(LINES, 40_000)
    lines = [line for line in found.split("\n") if line]
    numbers = [int(line.split()[1]) for line in lines]
    assert len(found) == pytest.approx(40_000, rel=0.05) and set(lines) <= set(LINES.split("\n"))
    assert numbers == sorted(set(numbers)) and numbers[0] < 100 and numbers[-1] > 3700
    assert texts.excerpt("short", 40_000) == "short"
    assert len(texts.excerpt("x" * 9000, 4000)) >= 4000  # a text without lines


def test_resolve_auto_takes_the_hub_where_it_is_reachable(hub_folder: pathlib.Path) -> None:
    assert resolve("auto") == texts.ONLINE and resolve("auto", own=False) == texts.ONLINE
    assert resolve("embedded") == "embedded"


def test_resolve_auto_without_hub_samples_from_the_model() -> None:
    assert resolve("auto") == texts.OFFLINE and "own" in texts.OFFLINE
    assert resolve("auto", own=False) == "embedded"  # an encoder cannot sample
    assert read("auto", None) == stdlib_docs.text("calibration")


@pytest.mark.parametrize("given", ["nowhere.txt", "own+nowhere.txt", "wikipedia", ""])
def test_checked_unknown_source_is_refused(given: str) -> None:
    with pytest.raises(ValueError) as caught:
        texts.checked(given, "--calibration ")
    said = str(caught.value)
    assert said.startswith(f"--calibration {given.removeprefix('own+')} is not a file, a folder or a source of text")
    assert "choose a text file, auto, embedded, code, own, hub, or several joined by +" in said and "\n" not in said


def test_read_own_text_of_an_encoder_is_refused() -> None:
    with pytest.raises(ValueError, match="cannot sample a calibration text of its own: name another source or a file"):
        read("own+embedded", None)
    with pytest.raises(ValueError, match="cannot sample"):
        CalibrationText("own").text("calibration")


def test_read_hub_out_of_reach_is_refused() -> None:
    with pytest.raises(ValueError, match="the dataset /nowhere does not exist"):
        read("hub", None)


def test_text_of_test_is_the_embedded_one_or_the_named_one(text_file: pathlib.Path) -> None:
    assert CalibrationText("code").text("test") == stdlib_docs.text("test")
    other = corpus.HubText(str(text_file))
    assert CalibrationText("code", test=other).text("test") == other.text("test")


def test_cached_own_samples_once_for_a_model(
    model_folder: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = sources.ModelSource(str(model_folder))
    first = texts.cached_own(source, tmp_path)(400)
    monkeypatch.setattr(texts, "sample_text", lambda *_, **__: "sampled again")
    assert first and texts.cached_own(source, tmp_path)(400) == first
    assert texts.cached_own(source, tmp_path)(401) == "sampled again"


def test_own_of_half_precision_model_samples_in_float32(model: Any, tokenizer: Any) -> None:
    model.half().train()
    text = texts.own_of(model, tokenizer)(200)
    assert model.training and model.dtype == torch.float16 and text
    assert text == texts.own_of(model.float(), tokenizer)(200)


@pytest.mark.parametrize(
    ("source", "asked", "level"),
    [(texts.OFFLINE, "auto", logging.WARNING), (texts.ONLINE, "auto", logging.INFO), ("own", "own", logging.INFO)],
)
def test_announce_says_what_calibrates_and_how_to_better_it(
    source: str, asked: str, level: int, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    texts.announce(source, asked, "--calibration FILE")
    (said,) = caplog.records
    assert said.levelno == level and texts.describe(source) in said.message
    assert said.message.endswith("by --calibration FILE") and "\n" not in said.message
    assert ("out of reach" in said.message) == (level == logging.WARNING)


def test_about_names_source_hash_and_positions(tmp_path: pathlib.Path) -> None:
    (tmp_path / "mine.txt").write_text(LINES, encoding="utf-8")
    found = texts.about(str(tmp_path / "mine.txt"), LINES, torch.zeros(3, 8, dtype=torch.long))
    assert found == {"source": "mine.txt", "sha256": corpus.sha256(LINES), "positions": 24}
