"""Progress of long work."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

Track = Callable[[Sequence[Any], str], Iterable[Any]]


def no_track(items: Sequence[Any], description: str) -> Iterable[Any]:
    """Iterate without showing progress."""
    return items
