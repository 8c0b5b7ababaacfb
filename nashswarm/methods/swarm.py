"""Settings of the flock: which blocks are neighbours, and how neighbours inform a game."""

import dataclasses
from collections.abc import Sequence
from typing import get_args

import numpy as np
from jaxtyping import Float
from scipy import sparse

from nashswarm.games import flock


@dataclasses.dataclass(frozen=True)
class Flock:
    """Settings of the swarm; among several values of ``align`` or ``shrink``, held-out calibration text selects.

    ``neighbours``: of a block, the nearest by features.  ``align``: bytes that a block pays for each neighbour (of
    weight 1) with other bits.  ``shrink``: how far a block's log sensitivity moves to its flock's mean, 0 to 1.
    ``local_reply``: how many correlated columns the error feedback of a column takes into account; None: all.
    ``graph``: the flock, or one of its controls (see ``games.flock``).

    Raises ValueError for a setting without a meaning.
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
                f"method.swarm.neighbours={self.neighbours} must be at least 1; without a flock set method.swarm=null"
            )
        if self.local_reply is not None and self.local_reply < 0:
            raise ValueError(f"method.swarm.local_reply={self.local_reply} must be a number of columns or null")
        if not self.align or min(self.align) < 0:
            raise ValueError(f"method.swarm.align {list(self.align)} must hold numbers of bytes, none negative")
        if not self.shrink or min(self.shrink) < 0 or max(self.shrink) > 1:
            raise ValueError(f"method.swarm.shrink {list(self.shrink)} must hold numbers between 0 and 1")

    def coupling(self, features: Float[np.ndarray, "blocks features"], rng: np.random.Generator) -> sparse.csr_array:
        """Return the symmetric weights between blocks, 0 to 1, by their ``features``; ``rng`` draws random graphs."""
        return flock.flock(features, self.neighbours, self.graph, rng)
