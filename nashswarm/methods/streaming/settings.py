"""Settings of compression by layer, at one price or at one width."""

import dataclasses
import math
from collections.abc import Sequence

from nashswarm.quant.curvature import DAMPING
from nashswarm.quant.grid import GRID_WIDTHS, Scheme


@dataclasses.dataclass(frozen=True)
class ByLayer:
    """Settings of the option ``--by-layer``.

    ``bits``: of every weight in a decoder block.  ``head_bits``: of embedding and head; None: ``bits``, but at least 4.
    ``sweeps``: sweeps of coordinate descent after the error feedback pass.  ``damping``: share of the mean diagonal of
    H added to it.
    """

    bits: int = 3
    head_bits: int | None = None
    group_size: int = 64
    sweeps: int = 0
    damping: float = DAMPING

    def __post_init__(self) -> None:
        if self.bits not in GRID_WIDTHS or self.outer_bits not in GRID_WIDTHS:
            chosen = f"{self.bits}" if self.head_bits is None else f"{self.bits} and {self.head_bits}"
            raise ValueError(f"compress by layer knows {', '.join(map(str, GRID_WIDTHS))} bits, not {chosen}")
        if self.sweeps < 0 or self.damping <= 0:
            raise ValueError(f"sweeps={self.sweeps} must not be negative, damping={self.damping} above 0")

    @property
    def outer_bits(self) -> int:
        """Bits of embedding and head."""
        return max(self.bits, 4) if self.head_bits is None else self.head_bits

    @property
    def scheme(self) -> Scheme:
        """The grids: the range of least error for every group."""
        return Scheme(self.group_size, search=True)


@dataclasses.dataclass(frozen=True)
class ByPrice:
    """Settings of ``--by-layer`` with ``--method nash_swarm``; those of the same name are the method's own.

    ``bits``: stored bits per parameter of the whole model, everything counted.  ``sweeps``: of best replies by all
    columns, at most, after error feedback.  ``seed``: of the arrangement of matrices; ``label_seed``: of the labels
    that the model samples.
    """

    bits: float = 3.0
    rates: Sequence[int] = (0, 1, 2, 3, 4, 5, 6, 7, 8)
    sweeps: int = 0
    floor: float = 0.1
    seed: int = 0
    label_seed: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.bits < math.inf:
            raise ValueError(f"method.bits={self.bits} must be a positive number")
        if self.sweeps < 0 or self.floor < 0:
            raise ValueError(f"sweeps={self.sweeps} and floor={self.floor} must not be negative")
