"""Settings of compression by layer."""

import dataclasses

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

    def width(self, name: str) -> int:
        """Return the bits of the codes of the matrix ``name``; those of decoder blocks have a number in their names."""
        return self.bits if any(part.isdigit() for part in name.split(".")) else self.outer_bits
