"""Settings of the flock that informs a game."""

import dataclasses
from collections.abc import Sequence
from typing import get_args

from nashswarm.games import flock


@dataclasses.dataclass(frozen=True)
class Flock:
    """The swarm's settings; where several values stand, held-out calibration text chooses.

    ``align``: bytes a block pays for each neighbour (of weight 1) that has other bits.  ``shrink``: how far a block's
    sensitivity moves toward its flock's mean, 0 to 1.  ``local_reply``: how many correlated columns a column minds when
    it replies; None: all.  ``graph``: the flock or one of its controls.
    """

    neighbours: int = 7
    align: Sequence[float] = (0.0, 4.0)
    shrink: Sequence[float] = (0.0, 0.25)
    local_reply: int | None = None
    graph: flock.Graph = "features"

    def __post_init__(self) -> None:
        if self.graph not in get_args(flock.Graph):
            raise ValueError(f"unknown method.swarm.graph {self.graph!r}: choose {', '.join(get_args(flock.Graph))}")
        if self.neighbours < 1:
            raise ValueError(
                f"method.swarm.neighbours={self.neighbours} must be at least 1; without a flock use no_swarm"
            )
        if self.local_reply is not None and self.local_reply < 0:
            raise ValueError(f"method.swarm.local_reply={self.local_reply} must be a number of columns or null")
        if not self.align or min(self.align) < 0:
            raise ValueError(f"method.swarm.align {list(self.align)} must hold numbers of bytes, none negative")
        if not self.shrink or min(self.shrink) < 0 or max(self.shrink) > 1:
            raise ValueError(f"method.swarm.shrink {list(self.shrink)} must hold numbers between 0 and 1")
