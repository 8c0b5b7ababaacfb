"""Published ways to hand out bits, on the bit game's own blocks and bytes, to compare it with.

All of them answer a profile whose packed bytes stay within the budget.  What is taken over is how each paper allocates,
not its quantizer: the codes, the damages and the bytes are those of the bit game.
"""

import bisect
from collections.abc import Callable, Sequence

import numpy as np
from jaxtyping import Float, Int

from nashswarm.methods.bit_allocation.blocks import TINY, Blocks, grid_shape
from nashswarm.methods.bit_allocation.game import by_lot
from nashswarm.quant.grid import TILE_ROWS

REFERENCE_BITS = 4  # where high-rate theory reads a block's sensitivity
ROUNDS = 200  # of the dual ascent, at most
SETTLED = 1e-4  # bits: the ascent ends when no block moves further


def equal_loss(blocks: Blocks, budget: int) -> Int[np.ndarray, " blocks"]:
    """Every block at the width at which high-rate theory predicts the same damage for all.

    ``b_i = b̄ + ½ log2(s_i / geometric mean of s)``, rounded: the equal-loss structure of BAQ (Zhang, Wang, Lasaulce &
    Debbah, "BAQ: Efficient Bit Allocation Quantization for Large Language Models", 2025).  s is the factor of a
    loss s · 4^−b.  Theirs comes from the weights' range and the inverse Hessian; here it is read from the block's
    damage at the played width nearest to 4 bits.
    """
    reference = int(np.abs(np.array(blocks.widths) - REFERENCE_BITS).argmin())
    sensitivity = np.log2(np.maximum(blocks.damage[:, reference], TINY)) + 2 * blocks.widths[reference]
    return _nearest(blocks, budget, (sensitivity - sensitivity.mean()) / 2)


def dual_ascent(blocks: Blocks, budget: int) -> Int[np.ndarray, " blocks"]:
    """Widths of any real value at one price per bit, found by ascent of the dual, then rounded.

    ``b_i = clamp(½ log2(2 ln2 · s_i / λ))``, then λ rises where the bytes exceed the budget and falls where they do
    not: CVXQ and Radio (Young, "Foundations of Large Language Model Compression", 2024; "Radio: Rate-Distortion
    Optimization for Large Language Model Compression", 2025), whose s_i is the variance of the gradients times that of
    the weights.  They estimate it anew at the bits of the moment, here from the block's damages, log-linear between the
    played widths.  λ is stepped in its logarithm, so that the step has no unit, and bits go half way to what is wished:
    the whole way never settles where a damage falls more than 16-fold per bit.
    """
    widths = np.array(blocks.widths, float)
    sizes = np.array([float(blocks.scheme.tile_bytes(width)) for width in blocks.widths])
    code_bytes = TILE_ROWS * blocks.scheme.group_size / 8  # a block's, per bit
    log_damage = np.log2(np.maximum(blocks.damage, TINY))
    bits = np.full(len(blocks.damage), widths.mean())
    log_price = float(log_damage.mean())
    for _ in range(ROUNDS):
        between = _hats(widths, bits)
        log_sensitivity = (between * log_damage).sum(1) + 2 * bits
        wished = (np.log2(2 * np.log(2)) + log_sensitivity - log_price) / 2
        before, bits = bits, (bits + np.clip(wished, widths[0], widths[-1])) / 2
        overspent = float((_hats(widths, bits) @ sizes).sum()) - budget
        log_price += overspent / (len(bits) * code_bytes)
        if np.abs(bits - before).max() <= SETTLED:
            break
    return _nearest(blocks, budget, wished)


def evolve(
    blocks: Blocks,
    budget: int,
    measure: Callable[[Int[np.ndarray, " blocks"]], float],
    rng: np.random.Generator,
    generations: int,
    offspring: int,
) -> Int[np.ndarray, " blocks"]:
    """The profile of least ``measure`` (KL in nats per token) that mutation and selection find.

    A (1+λ) search over layers as in EvoPress (Sieberling, Kuznedelev, Kurtic & Alistarh, "EvoPress: Accurate Dynamic
    Model Compression via Evolutionary Search", 2025): the parent is the best of ``offspring`` lotteries and is replaced
    by its best child, if that is no worse.  ``measure`` is called ``offspring · (generations + 1)`` times, always on
    the same text, where EvoPress sifts the children on a little text first.
    """

    def best(profiles: Sequence[Int[np.ndarray, " blocks"]]) -> tuple[float, Int[np.ndarray, " blocks"]]:
        measured = [measure(profile) for profile in profiles]
        return min(measured), profiles[int(np.argmin(measured))]

    least, parent = best([by_lot(blocks, budget, rng) for _ in range(offspring)])
    for _ in range(generations):
        loss, child = best([_switched(blocks, parent, budget, rng) for _ in range(offspring)])
        if loss <= least:
            least, parent = loss, child
    return parent


def _nearest(blocks: Blocks, budget: int, wished: Float[np.ndarray, " blocks"]) -> Int[np.ndarray, " blocks"]:
    """The widths nearest to ``wished`` bits plus one offset for all, the greatest that the budget pays for.

    Raises ValueError if not even the smallest widths fit.
    """
    widths = np.array(blocks.widths, float)
    needed = (widths[1:] + widths[:-1]) / 2 - wished[:, None]  # the offset at which a block takes the next width
    offsets = np.append(-np.inf, np.unique(needed))

    def rounded(step: int) -> Int[np.ndarray, " blocks"]:
        return (needed <= offsets[step]).sum(1)

    if (smallest := blocks.packed_bytes(rounded(0))) > budget:
        raise ValueError(f"the smallest widths take {smallest} bytes, more than the budget of {budget}")
    steps = range(len(offsets))
    return rounded(max(bisect.bisect_right(steps, budget, key=lambda step: blocks.packed_bytes(rounded(step))) - 1, 0))


def _hats(
    widths: Float[np.ndarray, " widths"], bits: Float[np.ndarray, " blocks"]
) -> Float[np.ndarray, "blocks widths"]:
    """The share of each width in ``bits``, which lie linearly between two of them."""
    return np.stack([np.interp(bits, widths, one) for one in np.eye(len(widths))], 1)


def _switched(
    blocks: Blocks, profile: Int[np.ndarray, " blocks"], budget: int, rng: np.random.Generator
) -> Int[np.ndarray, " blocks"]:
    """One to three layers a width up, rather one than three, and others, drawn at random, a width down for it.

    A layer of two widths becomes one of its wider or its narrower width.  Of the last layer that goes down only as many
    blocks go as the budget asks, so that its bytes stay spent.
    """
    counts = [int(np.prod(grid_shape(layer, blocks.scheme))) for layer in blocks.layers]
    members = np.split(np.arange(sum(counts)), np.cumsum(counts)[:-1])
    order = [members[layer] for layer in rng.permutation(len(counts))]
    order.sort(key=lambda layer: bool(profile[layer].min() == len(blocks.widths) - 1))  # the widest cannot go up
    raised = int(rng.integers(1, 4, 2).min())
    child = profile.copy()
    for layer in order[:raised]:
        child[layer] = np.clip(child[layer], child[layer].min() + 1, len(blocks.widths) - 1)
    for layer in (*order[raised:], *order[:raised]):
        if blocks.packed_bytes(child) <= budget:
            break
        child = _lowered(blocks, child, rng.permutation(layer), budget)
    return child


def _lowered(
    blocks: Blocks, profile: Int[np.ndarray, " blocks"], layer: Int[np.ndarray, " members"], budget: int
) -> Int[np.ndarray, " blocks"]:
    """The widest blocks of ``layer`` a width down, as many in this order as the budget asks, at most all of them."""
    narrower = np.minimum(profile[layer], max(profile[layer].max() - 1, 0))

    def after(count: int) -> Int[np.ndarray, " blocks"]:
        lower = profile.copy()
        lower[layer[:count]] = narrower[:count]
        return lower

    counts = range(len(layer))
    return after(bisect.bisect_left(counts, -budget, key=lambda count: -blocks.packed_bytes(after(count))))
