"""Iteration with progress: a bar in a terminal, lines in a log elsewhere, or nothing."""

import logging
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from rich.console import Console
from rich.progress import Progress

FIRST_SECONDS, EVERY_SECONDS = 5.0, 9.0  # until the first line of a log, and between lines

Track = Callable[[Sequence[Any], str], Iterable[Any]]  # (items, description) → the items

log = logging.getLogger(__name__)


def no_track(items: Sequence[Any], description: str) -> Iterable[Any]:
    """Iterate over ``items`` without showing progress."""
    return items


def show_progress(items: Sequence[Any], description: str) -> Iterable[Any]:
    """Iterate over ``items`` and show the share that is done, with an estimate of the time left.

    In a terminal that is a bar.  Elsewhere it is a line in the log every ten seconds, if all of it takes longer than
    five.  Layers count by their parameters, everything else alike.  A logger ``nashswarm`` that is set to WARNING keeps
    both away.
    """
    if logging.getLogger("nashswarm").level > logging.INFO:
        return items
    console = Console(stderr=True)
    return _with_bar(items, description, console) if console.is_terminal else _with_lines(items, description)


def _with_bar(items: Sequence[Any], description: str, console: Console) -> Iterator[Any]:
    with Progress(*Progress.get_default_columns(), console=console, transient=True) as progress:
        task = progress.add_task(description, total=sum(map(_size, items)))
        for item in items:
            yield item
            progress.advance(task, _size(item))


def _with_lines(items: Sequence[Any], description: str) -> Iterator[Any]:
    total, done, started, ended = sum(map(_size, items)), 0, time.monotonic(), threading.Event()

    def write_lines() -> None:
        pause = FIRST_SECONDS
        while not ended.wait(pause):
            log.info("%s", describe(description, done / total, time.monotonic() - started))
            pause = EVERY_SECONDS

    writer = threading.Thread(target=write_lines, daemon=True)  # an item may take minutes
    writer.start()
    try:
        for item in items:
            yield item
            done += _size(item)
    finally:
        ended.set()
        writer.join()


def end_interrupted(sentence: str) -> int:
    """Print a sentence and end the process as Ctrl-C asks, without waiting for threads that still compute."""
    print(sentence, file=sys.stderr, flush=True)
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    signal.raise_signal(signal.SIGINT)
    return 128 + signal.SIGINT


def describe(description: str, share: float, seconds: float) -> str:
    """Return a line about a stage of which ``share`` took ``seconds``.

    >>> describe("calibrating", 0.25, 20.0)
    'calibrating: 25 %, 60 s left'
    >>> describe("calibrating", 0.0, 20.0)
    'calibrating: 0 % after 20 s'
    """
    if not share:
        return f"{description}: 0 % after {seconds:.0f} s"
    return f"{description}: {100 * share:.0f} %, {seconds * (1 / share - 1):.0f} s left"


def _size(item: Any) -> int:
    size = getattr(item, "parameters", 1)
    return size if isinstance(size, int) else 1
