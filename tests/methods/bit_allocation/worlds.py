"""Blocks made up for tests of bit allocation, and what an allocation of them costs."""

import numpy as np
import torch

from nashswarm.layers import Layer
from nashswarm.methods.bit_allocation.blocks import Blocks
from nashswarm.quant.grid import Scheme

WIDTHS = (0, 2, 3, 4, 8)


def random_blocks(
    *shapes: tuple[int, int], group_size: int = 64, seed: int = 0, widths: tuple[int, ...] = WIDTHS
) -> Blocks:
    """Return the blocks of layers of these shapes.

    Their sensitivities span orders of magnitude, and their damage falls fourfold per bit.
    """
    rng = np.random.default_rng(seed)
    layers = tuple(
        Layer(f"layer{index}", "mlp", 0.5, (f"layer{index}",), ("Linear",), torch.zeros(shape))
        for index, shape in enumerate(shapes)
    )
    count = sum(-(-rows // 16) * (columns // group_size) for rows, columns in shapes)
    log_sensitivity = rng.normal(size=count) * 2
    noise = rng.uniform(0.8, 1.25, (count, len(widths)))
    damage = np.exp(log_sensitivity)[:, None] * 4.0 ** -np.array(widths) * noise
    return Blocks(layers, Scheme(group_size), widths, damage, log_sensitivity, rng.normal(size=(count, 3)))


def two_layers() -> Blocks:
    """Return 24 blocks in two layers, the second with ragged tiles."""
    return random_blocks((32, 512), (10, 512))


def budget_at(blocks: Blocks, bits: float) -> int:
    """Return the bytes of ``bits`` stored bits per weight."""
    return int(bits * sum(layer.parameters for layer in blocks.layers) / 8)


def total_damage(blocks: Blocks, profile: np.ndarray) -> float:
    """Return the damage of all blocks at ``profile``, in nats per token."""
    return sum(blocks.damage_by_layer(profile).values())


def moved(profile: np.ndarray, player: int, action: int) -> np.ndarray:
    """Return ``profile`` with another action of one player."""
    changed = profile.copy()
    changed[player] = action
    return changed
