"""What every width would cost each block, and how far a given choice of widths is from an equilibrium."""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from nashswarm import layers
from nashswarm.calibration.context import CalibrationContext
from nashswarm.layers import Moments
from nashswarm.methods.bit_allocation.blocks import Blocks, damage, features, log_sensitivity
from nashswarm.methods.bit_allocation.game import solve
from nashswarm.quant.coordinate_descent import quantize_layer
from nashswarm.quant.grid import Scheme, quantize

PROBED_WIDTHS = (0, 2, 3, 4)  # where the damage of a layer is measured, not only predicted
PROBE_TOKENS = 1024


def block_damages(
    context: CalibrationContext, moments: Mapping[str, Moments], widths: Sequence[int], scheme: Scheme, code_game: bool
) -> Blocks:
    """All players: what every width would cost each block, and what its flock compares.

    The second-order formula is right for small errors and was seen to mislead for large ones, so below 8 bits
    each layer is compressed alone, the KL of that is measured on held-out calibration text, and the damages of its
    blocks are scaled to add up to it.
    """

    def at_width(width: int) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        for layer in context.track(context.layers, f"probing at {width} bits"):
            curved = layers.curvature(layer, moments)
            answer = (
                quantize_layer(layer.weight, width, scheme, curved)
                if code_game
                else quantize(layer.weight, width, scheme)
            )
            quantized = answer.dequantize()
            predicted = damage(layer, quantized, curved, scheme)
            found[layer.name] = predicted
            if width in PROBED_WIDTHS and (total := float(predicted.sum())) > 0:
                measured = context.heldout_kl({layer.name: quantized}, PROBE_TOKENS)
                found[layer.name] = predicted * (measured / total)
        return found

    columns = []
    for width in widths:
        by_layer = context.cached("damage", key(width, scheme, code_game), functools.partial(at_width, width))
        columns.append(torch.cat([by_layer[layer.name] for layer in context.layers]).numpy())
    described = (each(context.layers, moments, scheme.group_size) for each in (log_sensitivity, features))
    return Blocks(context.layers, scheme, tuple(widths), np.stack(columns, 1), *described)


def key(width: int, scheme: Scheme, code_game: bool) -> dict[str, Any]:
    """By what the damages of all layers at a width are remembered, beside the model and its calibration."""
    probed = {"probed": PROBED_WIDTHS, "probe_tokens": PROBE_TOKENS}
    return dataclasses.asdict(scheme) | {"width": width, "code_game": code_game} | probed


def report_regret(blocks: Blocks, profile: Int[np.ndarray, " blocks"]) -> tuple[dict[str, float], dict[str, float]]:
    """Damage by layer, and how far a given profile is from an equilibrium at the price at which the game would have
    spent the same bytes."""
    solution = solve(blocks, blocks.packed_bytes(profile))
    regret = solution.game.regret(profile)
    metrics = {
        "regret_max": float(regret.max()),
        "regret_mean": float(regret.mean()),
        "potential_end": solution.game.potential(profile),
        "price": solution.price,
        "players": len(profile),
    }
    return blocks.damage_by_layer(profile), metrics
