"""Progress of long work."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from rich.console import Console
from rich.progress import track

Track = Callable[[Sequence[Any], str], Iterable[Any]]


def no_track(items: Sequence[Any], description: str) -> Iterable[Any]:
    """Iterate without showing progress."""
    return items


def show_progress(items: Sequence[Any], description: str) -> Iterable[Any]:
    """Iterate behind a progress bar with an estimate, on a terminal."""
    console = Console(stderr=True)
    return track(items, description, console=console, transient=True, disable=not console.is_terminal)
