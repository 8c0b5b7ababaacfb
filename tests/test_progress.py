"""Progress outside of a terminal, and where nobody waits long enough to ask for it."""

import logging
import signal
import subprocess
import sys
import time
from typing import NamedTuple

import pytest

from nashswarm import progress
from nashswarm.progress import show_progress


class Part(NamedTuple):
    """Something that counts by its parameters."""

    parameters: int


def test_show_progress_outside_terminal_writes_lines(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(progress, "FIRST_SECONDS", 0.05)
    monkeypatch.setattr(progress, "EVERY_SECONDS", 0.05)
    with caplog.at_level(logging.INFO):
        for part in show_progress([Part(1), Part(3)], "weighing"):
            time.sleep(0.4 if part.parameters == 3 else 0.01)
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) >= 2
    assert all(line.startswith("weighing: 25 %, ") and line.endswith(" s left") for line in lines)


def test_show_progress_of_long_first_item_writes_lines_without_estimate(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(progress, "FIRST_SECONDS", 0.05)
    with caplog.at_level(logging.INFO):
        for _ in show_progress(range(1), "weighing"):
            time.sleep(0.3)
    assert [record.getMessage() for record in caplog.records] == ["weighing: 0 % after 0 s"]


def test_show_progress_is_silent_for_whoever_wants_warnings_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logging.getLogger("nashswarm"), "level", logging.WARNING)
    items = [1, 2]
    assert show_progress(items, "weighing") is items


def test_show_progress_of_short_stage_is_silent(
    caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    with caplog.at_level(logging.INFO):
        assert list(show_progress("abc", "weighing")) == ["a", "b", "c"]
    assert not caplog.records and capsys.readouterr() == ("", "")


@pytest.mark.slow
def test_end_interrupted_prints_a_sentence_and_ends_by_the_signal() -> None:
    program = "import threading, time; from nashswarm.progress import end_interrupted; "
    program += "threading.Thread(target=time.sleep, args=(60,)).start(); end_interrupted('interrupted; go on')"
    started = time.monotonic()
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert ended.returncode == -signal.SIGINT and ended.stderr == "interrupted; go on\n"
    assert time.monotonic() - started < 50  # it did not wait for the thread
