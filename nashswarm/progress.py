"""Iteration with or without a progress bar."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from rich.console import Console
from rich.progress import track

Track = Callable[[Sequence[Any], str], Iterable[Any]]  # (items, description) → the items


def no_track(items: Sequence[Any], description: str) -> Iterable[Any]:
    """Iterate over ``items`` without showing progress."""
    return items


def show_progress(items: Sequence[Any], description: str) -> Iterable[Any]:
    """Iterate over ``items`` with a progress bar and an estimate of the time left; show nothing outside a terminal."""
    console = Console(stderr=True)
    return track(items, description, console=console, transient=True, disable=not console.is_terminal)
