"""Ways to allocate bits without the game, on the same blocks and bytes, to compare the game with.

Every function returns a profile whose packed bytes stay within the budget.  Three are published: only each paper's
allocation is reproduced, not its quantizer; codes, damages and bytes are those of the bit game.
"""

import bisect
from collections.abc import Callable, Sequence

import numpy as np
from jaxtyping import Float, Int

from nashswarm.methods.bit_allocation.blocks import TINY, Blocks, grid_shape
from nashswarm.quant.grid import TILE_ROWS

REFERENCE_BITS = 4  # width at which high-rate theory reads a block's sensitivity
MOST_STEPS = 200  # of dual ascent
CONVERGED = 1e-4  # bits: dual ascent ends when no block moves further than this


def allocate_randomly(blocks: Blocks, budget: int, rng: np.random.Generator) -> Int[np.ndarray, " blocks"]:
    """Return the widest uniform width that fits, with random blocks one width up as far as the budget allows."""
    count = len(blocks.damage)
    order = rng.permutation(count)
    fitting = [rank for rank in range(len(blocks.widths)) if blocks.packed_bytes(np.full(count, rank)) <= budget]
    lower = fitting[-1]
    if lower + 1 == len(blocks.widths):
        return np.full(count, lower)

    def with_raised(raised: int) -> Int[np.ndarray, " blocks"]:
        profile = np.full(count, lower)
        profile[order[:raised]] += 1
        return profile

    fits_up_to = bisect.bisect_right(
        range(count + 1), budget, key=lambda raised: blocks.packed_bytes(with_raised(raised))
    )
    return with_raised(fits_up_to - 1)


def allocate_by_quantiles(blocks: Blocks, budget: int, quantiles: Sequence[float]) -> Int[np.ndarray, " blocks"]:
    """Return widths by importance rank: blocks above the first quantile get the widest, and so on down.

    Importance is the damage at the smallest width.  All quantiles are shifted together until the bytes fit the budget.
    """
    importance = blocks.damage[:, 0]
    ranks = np.argsort(np.argsort(importance, kind="stable")) / len(importance)

    def shifted(steps: int) -> Int[np.ndarray, " blocks"]:
        return (ranks[:, None] >= np.array(quantiles) + steps / 10_000).sum(1)

    steps = range(-10_000, 10_001)
    return shifted(steps[bisect.bisect_left(steps, -budget, key=lambda step: -blocks.packed_bytes(shifted(step)))])


def allocate_equal_loss(blocks: Blocks, budget: int) -> Int[np.ndarray, " blocks"]:
    """Return the widths at which high-rate theory predicts the same damage for every block (BAQ).

    ``b_i = b̄ + ½ log2(s_i / geometric mean of s)``, rounded: the equal-loss structure of Zhang, Wang, Lasaulce &
    Debbah, "BAQ: Efficient Bit Allocation Quantization for Large Language Models", 2025.  s is the factor of a loss
    s · 4^−b.  The authors compute it from the weights' range and the inverse Hessian; here it is read from the block's
    damage at the width nearest to 4 bits.
    """
    reference = int(np.abs(np.array(blocks.widths) - REFERENCE_BITS).argmin())
    sensitivity = np.log2(np.maximum(blocks.damage[:, reference], TINY)) + 2 * blocks.widths[reference]
    return _round_to_budget(blocks, budget, (sensitivity - sensitivity.mean()) / 2)


def allocate_dual_ascent(blocks: Blocks, budget: int) -> Int[np.ndarray, " blocks"]:
    """Return real-valued widths at one price per bit, found by dual ascent and then rounded (Radio).

    ``b_i = clamp(½ log2(2 ln2 · s_i / λ))``; then the price λ rises if the bytes exceed the budget and falls if they do
    not: CVXQ and Radio (Young, "Foundations of Large Language Model Compression", 2024; "Radio: Rate-Distortion
    Optimization for Large Language Model Compression", 2025).  Their s_i, the variance of the gradients times that of
    the weights, is estimated again at the current bits; here it comes from the block's damages, log-linear between the
    widths.  λ is stepped in its logarithm, so that the step has no unit.  Bits go half way to their target: the whole
    way never converges where a damage falls more than 16-fold per bit.
    """
    widths = np.array(blocks.widths, float)
    sizes = np.array([float(blocks.scheme.tile_bytes(width)) for width in blocks.widths])
    bytes_per_bit = TILE_ROWS * blocks.scheme.group_size / 8  # of one block
    log_damage = np.log2(np.maximum(blocks.damage, TINY))
    bits = np.full(len(blocks.damage), widths.mean())
    log_price = float(log_damage.mean())
    for _ in range(MOST_STEPS):
        shares = _width_shares(widths, bits)
        log_sensitivity = (shares * log_damage).sum(1) + 2 * bits
        target = (np.log2(2 * np.log(2)) + log_sensitivity - log_price) / 2
        before, bits = bits, (bits + np.clip(target, widths[0], widths[-1])) / 2
        overspent = float((_width_shares(widths, bits) @ sizes).sum()) - budget
        log_price += overspent / (len(bits) * bytes_per_bit)
        if np.abs(bits - before).max() <= CONVERGED:
            break
    return _round_to_budget(blocks, budget, target)


def allocate_by_evolution(
    blocks: Blocks,
    budget: int,
    measure: Callable[[Int[np.ndarray, " blocks"]], float],
    rng: np.random.Generator,
    generations: int,
    offspring: int,
) -> Int[np.ndarray, " blocks"]:
    """Return the profile of least ``measure`` (KL in nats per token) that mutation and selection find (EvoPress).

    This is a (1+λ) search over layers as in Sieberling, Kuznedelev, Kurtic & Alistarh, "EvoPress: Accurate Dynamic
    Model Compression via Evolutionary Search", 2025: the parent is the best of ``offspring`` random allocations and is
    replaced by its best child if that is no worse.  ``measure`` is called ``offspring · (generations + 1)`` times,
    always on the same text; EvoPress first selects among the children on less text.
    """

    def best(profiles: Sequence[Int[np.ndarray, " blocks"]]) -> tuple[float, Int[np.ndarray, " blocks"]]:
        measured = [measure(profile) for profile in profiles]
        return min(measured), profiles[int(np.argmin(measured))]

    least, parent = best([allocate_randomly(blocks, budget, rng) for _ in range(offspring)])
    for _ in range(generations):
        loss, child = best([_mutate(blocks, parent, budget, rng) for _ in range(offspring)])
        if loss <= least:
            least, parent = loss, child
    return parent


def _round_to_budget(blocks: Blocks, budget: int, target: Float[np.ndarray, " blocks"]) -> Int[np.ndarray, " blocks"]:
    """Round ``target`` bits plus one offset for all blocks to widths, with the largest offset that fits the budget.

    Raises ValueError if not even the smallest widths fit.
    """
    widths = np.array(blocks.widths, float)
    needed = (widths[1:] + widths[:-1]) / 2 - target[:, None]  # offset at which a block takes the next width
    offsets = np.append(-np.inf, np.unique(needed))

    def rounded(step: int) -> Int[np.ndarray, " blocks"]:
        return (needed <= offsets[step]).sum(1)

    if (smallest := blocks.packed_bytes(rounded(0))) > budget:
        raise ValueError(f"the smallest widths take {smallest} bytes, more than the budget of {budget}")
    steps = range(len(offsets))
    return rounded(max(bisect.bisect_right(steps, budget, key=lambda step: blocks.packed_bytes(rounded(step))) - 1, 0))


def _width_shares(
    widths: Float[np.ndarray, " widths"], bits: Float[np.ndarray, " blocks"]
) -> Float[np.ndarray, "blocks widths"]:
    """Return the linear interpolation weights of ``bits`` between the two widths around them."""
    return np.stack([np.interp(bits, widths, unit) for unit in np.eye(len(widths))], 1)


def _mutate(
    blocks: Blocks, profile: Int[np.ndarray, " blocks"], budget: int, rng: np.random.Generator
) -> Int[np.ndarray, " blocks"]:
    """Raise one to three random layers by one width, more often one, and lower other random layers to pay for it.

    A layer that mixes two widths takes its wider one when raised and its narrower one when lowered.  In the last layer
    that is lowered, only as many blocks are lowered as the budget requires, so that its bytes stay spent.
    """
    counts = [int(np.prod(grid_shape(layer, blocks.scheme))) for layer in blocks.layers]
    members = np.split(np.arange(sum(counts)), np.cumsum(counts)[:-1])
    order = [members[layer] for layer in rng.permutation(len(counts))]
    order.sort(key=lambda layer: bool(profile[layer].min() == len(blocks.widths) - 1))  # the widest cannot be raised
    raised = int(rng.integers(1, 4, 2).min())
    child = profile.copy()
    for layer in order[:raised]:
        child[layer] = np.clip(child[layer], child[layer].min() + 1, len(blocks.widths) - 1)
    for layer in (*order[raised:], *order[:raised]):
        if blocks.packed_bytes(child) <= budget:
            break
        child = _lower(blocks, child, rng.permutation(layer), budget)
    return child


def _lower(
    blocks: Blocks, profile: Int[np.ndarray, " blocks"], layer: Int[np.ndarray, " members"], budget: int
) -> Int[np.ndarray, " blocks"]:
    """Lower the widest blocks of ``layer`` by one width, in this order, as many as the budget requires."""
    narrower = np.minimum(profile[layer], max(profile[layer].max() - 1, 0))

    def with_lowered(count: int) -> Int[np.ndarray, " blocks"]:
        lowered = profile.copy()
        lowered[layer[:count]] = narrower[:count]
        return lowered

    counts = range(len(layer))
    needed = bisect.bisect_left(counts, -budget, key=lambda count: -blocks.packed_bytes(with_lowered(count)))
    return with_lowered(needed)
