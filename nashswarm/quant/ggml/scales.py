"""Choose the steps and shifts of blocks: a search over ranges, by the weighted squared error of plain rounding.

Each group tries ranges around that of its weights.  With codes rounded at such a range, the best step and shift are
those of weighted least squares, as in ggml's own search.  In blocks of 256 the steps of the groups are then rounded to
integers times a 16-bit float of the block, which is searched in the same way.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from nashswarm.quant.curvature import TINY
from nashswarm.quant.ggml.types import BlockType, Scales

RANGES = tuple(0.8 + 0.04 * step for step in range(12))  # tried for groups, as shares of the range of the weights
SUPER_RANGES = tuple(0.85 + 0.025 * step for step in range(8))  # tried for the steps of the groups of a block
LARGEST = 65504.0  # of a 16-bit float

Groups = Float[Tensor, "rows groups columns"]
PerGroup = Float[Tensor, "rows groups"]


def choose_scales(
    kind: BlockType, weight: Float[Tensor, "rows columns"], importance: Float[Tensor, "#rows columns"]
) -> Scales:
    """Return the scales at which plain rounding has about the least error, each square times its ``importance``."""
    groups = weight.unflatten(1, (-1, kind.group))
    weights = importance.clamp(min=TINY).unflatten(1, (-1, kind.group)).expand_as(groups)
    steps, shifts = (_affine if kind.shifted else _symmetric)(kind, groups, weights)
    if kind.sub_scales is None:
        return Scales(kind, to_half(steps), to_half(shifts) if kind.shifted else None)
    codes = nearest_codes(kind, groups, steps[..., None], shifts[..., None])
    levels = kind.level(codes)
    scale, sub_scale = _super_blocks(kind, steps, (weights * levels.square()).sum(2), kind.sub_scales)
    if not kind.shifted:
        return Scales(kind, scale, sub_scale=sub_scale)
    offset, sub_offset = _super_blocks(kind, -shifts, weights.sum(2), (0, kind.sub_scales[1]))
    return Scales(kind, scale, offset, sub_scale, sub_offset)


def nearest_codes(
    kind: BlockType,
    target: Float[Tensor, "*shape"],
    step: Float[Tensor, "*#shape"],
    shift: Float[Tensor, "*#shape"],
) -> Int[Tensor, "*shape"]:
    """Return the code of the value nearest to ``target``; where the step is 0, that of the level nearest to 0."""
    return kind.nearest(torch.where(step == 0, 0.0, (target - shift) / torch.where(step == 0, 1.0, step)))


def to_half(values: Float[Tensor, "*shape"]) -> Tensor:
    """Round to 16-bit floats, the largest ones where numbers are larger."""
    return values.clamp(-LARGEST, LARGEST).half()


def set_steps(scales: Scales, steps: PerGroup) -> None:
    """Write the steps nearest to these into ``scales``; a 16-bit float that groups share stays as it is."""
    if scales.sub_scale is None:
        scales.scale.copy_(to_half(steps))
    else:
        scales.sub_scale.copy_(_integers(steps, scales.scale, scales.kind.sub_scales))


def set_shifts(scales: Scales, shifts: PerGroup) -> None:
    """Write the shifts nearest to these into ``scales``; a 16-bit float that groups share stays as it is."""
    assert scales.offset is not None
    if scales.sub_offset is None:
        scales.offset.copy_(to_half(shifts))
    else:
        scales.sub_offset.copy_(_integers(-shifts, scales.offset, scales.kind.sub_scales))


def _integers(values: PerGroup, halves: Tensor, limits: tuple[int, int] | None) -> Int[Tensor, "rows groups"]:
    """Return the integers within ``limits`` whose multiples of a 16-bit float are nearest to these values."""
    assert limits is not None
    units = halves.float()
    counted = torch.where(units == 0, 0.0, values / torch.where(units == 0, 1.0, units))
    return counted.round().clamp(*limits).int()


def _symmetric(kind: BlockType, groups: Groups, weights: Groups) -> tuple[PerGroup, PerGroup]:
    """Return steps for groups without a shift: the extreme weight lies near the level of largest magnitude."""
    extreme = groups.gather(2, groups.abs().argmax(2, keepdim=True))
    full = extreme / (kind.levels[0] if -kind.levels[0] >= kind.levels[-1] else kind.levels[-1])
    best, steps, zero = torch.zeros_like(extreme[..., 0]), torch.zeros_like(extreme[..., 0]), full == 0
    inverse = torch.where(zero, 0.0, 1 / torch.where(zero, 1.0, full))
    for share in RANGES:
        levels = kind.level(kind.nearest(groups * (inverse / share)))
        weighted = weights * levels
        product, square = (weighted * groups).sum(2), (weighted * levels).sum(2)
        gain = torch.where(square > 0, product.square() / square, 0.0)  # by which the squared error falls
        steps = torch.where(gain > best, product / square, steps)
        best = torch.maximum(best, gain)
    return steps, torch.zeros_like(steps)


def _affine(kind: BlockType, groups: Groups, weights: Groups) -> tuple[PerGroup, PerGroup]:
    """Return steps and shifts; blocks of 256 can only shift downwards."""
    least, most = groups.amin(2), groups.amax(2)
    downwards, top = kind.sub_scales is not None, kind.levels[-1]
    if downwards:
        least = least.clamp(max=0)
    total, moment = weights.sum(2), (weights * groups).sum(2)
    full = ((most - least) / top).clamp(min=0)
    steps, shifts, best = full, least, torch.full_like(least, torch.inf)
    inverse = torch.where(full > 0, 1 / torch.where(full > 0, full, 1.0), 0.0)
    for share in (*RANGES, 1.0):
        levels = kind.nearest((groups - least[..., None]) * (inverse / share)[..., None]).float()
        weighted = weights * levels
        first, second, product = weighted.sum(2), (weighted * levels).sum(2), (weighted * groups).sum(2)
        determinant = total * second - first.square()
        regular = determinant > 1e-6 * total * second
        safe = torch.where(regular, determinant, 1.0)
        step = torch.where(regular, (total * product - first * moment) / safe, full)
        shift = torch.where(regular, (second * moment - first * product) / safe, least)
        if downwards:
            above = shift > 0
            step = torch.where(above, product / second.clamp(min=TINY), step)
            shift = torch.where(above, 0.0, shift)
        errors = (weights * (groups - levels * step[..., None] - shift[..., None]).square()).sum(2)
        better = errors < best
        steps, shifts = torch.where(better, step, steps), torch.where(better, shift, shifts)
        best = torch.minimum(best, errors)
    return steps, shifts


def _super_blocks(
    kind: BlockType, values: PerGroup, weights: PerGroup, limits: tuple[int, int]
) -> tuple[Tensor, Int[Tensor, "rows groups"]]:
    """Write one number a group as a 16-bit float of its block times an integer within ``limits``."""
    count = kind.block // kind.group
    blocks, shares = values.unflatten(1, (-1, count)), weights.clamp(min=TINY).unflatten(1, (-1, count))
    low, high = limits
    extreme = blocks.gather(2, blocks.abs().argmax(2, keepdim=True)) if low else blocks.amax(2, keepdim=True)
    full = extreme / (low or high)
    best, scale = torch.full_like(full, torch.inf), to_half(full)
    integers = torch.zeros_like(blocks, dtype=torch.int32)
    for share in SUPER_RANGES:
        rounded = (full / share).float()
        inverse = torch.where(rounded == 0, 0.0, 1 / torch.where(rounded == 0, 1.0, rounded))
        trial = (blocks * inverse).round().clamp(low, high)
        square = (shares * trial.square()).sum(2, keepdim=True)
        fitted = torch.where(square > 0, (shares * trial * blocks).sum(2, keepdim=True) / square.clamp(min=TINY), full)
        half = to_half(fitted)
        errors = (shares * (blocks - trial * half.float()).square()).sum(2, keepdim=True)
        better = errors < best
        scale, integers = torch.where(better, half, scale), torch.where(better, trial.int(), integers)
        best = torch.minimum(best, errors)
    return scale[..., 0], integers.flatten(1)
