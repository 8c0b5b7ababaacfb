"""The types of ggml: blocks of columns that share scales, and the values that a weight may take in them.

A row is cut into blocks of 32 or 256 columns, a block into groups of 16 or 32.  A weight of a group has the value
``step · level + shift``, with one of at most 256 levels, the same ones for the whole type.  In blocks of 32 the step
and, in some types, the shift are 16-bit floats.  In blocks of 256 they are small integers times a 16-bit float of the
block: ``step = scale · sub_scale`` and ``shift = −offset · sub_offset``.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float, Float16, Int, Integer, UInt8
from torch import Tensor

NONLINEAR = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)  # kvalues_iq4nl of ggml


@dataclasses.dataclass(frozen=True)
class BlockType:
    """A type of ggml.

    ``bytes``: of a block of ``block`` columns.  ``levels``: ascending, by code.  ``shifted``: whether groups have a
    shift.  ``sub_scales``: the least and the largest integer of a group's step, None where the step is a float itself;
    ``sub_offsets`` run from 0 to the largest of these.
    """

    name: str
    block: int
    group: int
    bytes: int
    levels: tuple[int, ...]
    shifted: bool = False
    sub_scales: tuple[int, int] | None = None

    @property
    def bits(self) -> float:
        """Stored bits of a weight, scales counted.

        >>> TYPES["Q4_K"].bits, TYPES["Q3_K"].bits
        (4.5, 3.4375)
        """
        return 8 * self.bytes / self.block

    @property
    def uniform(self) -> bool:
        """Whether neighbouring levels are one apart."""
        return self.levels[-1] - self.levels[0] == len(self.levels) - 1

    def fits(self, columns: int) -> bool:
        """Whether rows of so many columns are whole blocks."""
        return columns % self.block == 0

    def row_bytes(self, columns: int) -> int:
        """Return the bytes of a row of so many columns."""
        return columns // self.block * self.bytes

    def level(self, codes: Integer[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """Return the levels of codes."""
        if self.uniform:
            return codes.float().add_(self.levels[0])
        return _tables(self.levels)[0].index_select(0, codes.int().flatten()).view(codes.shape)

    def nearest(self, target: Float[Tensor, "*shape"]) -> Int[Tensor, "*shape"]:
        """Return the codes of the levels nearest to ``target``, which is counted in steps from the shift."""
        low, high = self.levels[0], self.levels[-1]
        if self.uniform:
            return (target - low).round_().clamp_(0, high - low).int()
        halves = target.mul(2).floor_().clamp_(2 * low, 2 * high - 1).sub_(2 * low)
        return _tables(self.levels)[1].index_select(0, halves.int().flatten()).view(target.shape)


@functools.cache
def _tables(levels: tuple[int, ...]) -> tuple[Float[Tensor, " levels"], Int[Tensor, " halves"]]:
    """Return the levels, and the code of the level nearest to all numbers between two multiples of one half."""
    values = torch.tensor(levels, dtype=torch.float32)
    middles = torch.arange(2 * levels[0], 2 * levels[-1]) / 2 + 0.25
    return values, torch.bucketize(middles, (values[1:] + values[:-1]) / 2, out_int32=True)


_BITS = {bits: tuple(range(1 << bits)) for bits in (2, 4, 5)}
_SIGNED = {bits: tuple(range(-(1 << bits - 1), 1 << bits - 1)) for bits in (3, 4, 5, 6, 8)}
TYPES: Mapping[str, BlockType] = {
    kind.name: kind
    for kind in (
        BlockType("Q2_K", 256, 16, 84, _BITS[2], True, (0, 15)),
        BlockType("Q3_K", 256, 16, 110, _SIGNED[3], False, (-32, 31)),
        BlockType("IQ4_XS", 256, 32, 136, NONLINEAR, False, (-32, 31)),
        BlockType("Q4_0", 32, 32, 18, _SIGNED[4]),
        BlockType("IQ4_NL", 32, 32, 18, NONLINEAR),
        BlockType("Q4_K", 256, 32, 144, _BITS[4], True, (0, 63)),
        BlockType("Q4_1", 32, 32, 20, _BITS[4], True),
        BlockType("Q5_0", 32, 32, 22, _SIGNED[5]),
        BlockType("Q5_K", 256, 32, 176, _BITS[5], True, (0, 63)),
        BlockType("Q5_1", 32, 32, 24, _BITS[5], True),
        BlockType("Q6_K", 256, 16, 210, _SIGNED[6], False, (-128, 127)),
        BlockType("Q8_0", 32, 32, 34, _SIGNED[8]),
    )
}


@dataclasses.dataclass(frozen=True)
class Scales:
    """Steps and shifts of all groups of some columns.

    ``scale`` and ``offset``: the 16-bit floats of blocks; ``sub_scale`` and ``sub_offset``: the integers of groups,
    None where the type has none.  In blocks of 32 ``offset`` is the shift itself.
    """

    kind: BlockType
    scale: Float16[Tensor, "rows blocks"]
    offset: Float16[Tensor, "rows blocks"] | None = None
    sub_scale: Int[Tensor, "rows groups"] | None = None
    sub_offset: Int[Tensor, "rows groups"] | None = None

    def steps(self) -> Float[Tensor, "rows groups"]:
        """Return the step of every group, as a decoder computes it."""
        if self.sub_scale is None:
            return self.scale.float()
        return _by_group(self.scale, self.sub_scale) * self.sub_scale

    def shifts(self) -> Float[Tensor, "rows groups"]:
        """Return the shift of every group, zeros for a type without."""
        if self.offset is None:
            return torch.zeros_like(self.scale if self.sub_scale is None else self.sub_scale, dtype=torch.float32)
        if self.sub_offset is None:
            return self.offset.float()
        return -(_by_group(self.offset, self.sub_offset) * self.sub_offset)

    def group(self, number: int) -> "Scales":
        """Return a view of the scales of one group: what is written to it is written to these."""
        block = number * self.kind.group // self.kind.block
        places = (block, block, number, number)
        parts = (self.scale, self.offset, self.sub_scale, self.sub_offset)
        views = [None if part is None else part[:, n : n + 1] for part, n in zip(parts, places, strict=True)]
        return Scales(self.kind, *views)  # type: ignore[arg-type]

    def select(self, rows: slice) -> "Scales":
        """Return the scales of some rows."""
        return self.map(lambda part: part[rows])

    def map(self, change: Callable[[Tensor], Tensor]) -> "Scales":
        """Return scales of which every tensor is changed alike."""
        return combine([self], lambda parts: change(parts[0]))


def combine(scales: Sequence[Scales], change: Callable[[list[Tensor]], Tensor]) -> Scales:
    """Return scales whose every tensor is made of those of several others, by ``torch.cat`` for example."""
    tensors: dict[str, Any] = {}
    for name in ("scale", "offset", "sub_scale", "sub_offset"):
        parts = [getattr(part, name) for part in scales]
        tensors[name] = None if parts[0] is None else change(parts)
    return Scales(scales[0].kind, **tensors)


def _by_group(halves: Float16[Tensor, "rows blocks"], integers: Int[Tensor, "rows groups"]) -> Float[Tensor, "..."]:
    """Return the 16-bit float of its block for every group."""
    return halves.float().repeat_interleave(integers.shape[1] // halves.shape[1], 1)


@dataclasses.dataclass(frozen=True)
class BlockMatrix:
    """A matrix in a type of ggml: a code for every weight, and the scales."""

    codes: UInt8[Tensor, "rows columns"]
    scales: Scales

    def dequantize(self) -> Float[Tensor, "rows columns"]:
        """Return the values of the weights, as a decoder computes them in float32."""
        kind = self.scales.kind
        levels = kind.level(self.codes).unflatten(1, (-1, kind.group))
        return (levels * self.scales.steps()[..., None] + self.scales.shifts()[..., None]).flatten(1)
