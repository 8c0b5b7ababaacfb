"""What every width costs each block, and how far a given choice of widths is from an equilibrium."""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from nashswarm.calibration.context import CalibrationContext
from nashswarm.layers import Moments, curvature
from nashswarm.methods.bit_allocation.blocks import Blocks, damage, features, log_sensitivity
from nashswarm.methods.bit_allocation.game import solve
from nashswarm.quant.coordinate_descent import quantize_layer
from nashswarm.quant.grid import Scheme, quantize

PROBED_WIDTHS = (0, 2, 3, 4)  # widths at which the damage of a layer is measured, not only predicted
PROBE_TOKENS = 1024


def block_damages(
    context: CalibrationContext,
    moments: Mapping[str, Moments],
    widths: Sequence[int],
    scheme: Scheme,
    code_game: bool,
    probed: bool = True,
) -> Blocks:
    """Return all blocks of the model with their damage, in nats per token, at each of ``widths``.

    ``code_game``: codes by error feedback, which lowers the damage; otherwise by rounding to nearest.

    The second-order estimate holds for small errors and misleads for large ones.  Below 8 bits, each layer is therefore
    compressed alone, the KL of that model is measured on held-out calibration text, and the damages of the layer's
    blocks are scaled to add up to it.  That takes passes through the model for every layer; unless the damages are
    ``probed``, the estimate has to do.
    """

    def damages_at(width: int) -> dict[str, Tensor]:
        damage_by_layer: dict[str, Tensor] = {}
        for layer in context.track(context.layers, f"{'prob' if probed else 'estimat'}ing at {width} bits"):
            layer_curvature = curvature(layer, moments)
            if code_game:
                quantized = quantize_layer(layer.weight, width, scheme, layer_curvature).dequantize()
            else:
                quantized = quantize(layer.weight, width, scheme).dequantize()
            predicted = damage(layer, quantized, layer_curvature, scheme)
            damage_by_layer[layer.name] = predicted
            if probed and width in PROBED_WIDTHS and (total := float(predicted.sum())) > 0:
                measured = context.heldout_kl({layer.name: quantized}, PROBE_TOKENS)
                damage_by_layer[layer.name] = predicted * (measured / total)
        return damage_by_layer

    columns = []
    for width in widths:
        compute = functools.partial(damages_at, width)
        key = cache_key(width, scheme, code_game) if probed else cache_key(width, scheme, code_game) | {"probed": []}
        damage_by_layer = context.cached("damage", key, compute)
        columns.append(torch.cat([damage_by_layer[layer.name] for layer in context.layers]).numpy())
    return Blocks(
        context.layers,
        scheme,
        tuple(widths),
        np.stack(columns, 1),
        log_sensitivity(context.layers, moments, scheme.group_size),
        features(context.layers, moments, scheme.group_size),
    )


def cache_key(width: int, scheme: Scheme, code_game: bool) -> dict[str, Any]:
    """Return the key under which the damages of all layers at ``width`` are cached, beside model and calibration."""
    probe = {"probed": PROBED_WIDTHS, "probe_tokens": PROBE_TOKENS}
    return dataclasses.asdict(scheme) | {"width": width, "code_game": code_game} | probe


def regret_metrics(blocks: Blocks, profile: Int[np.ndarray, " blocks"]) -> dict[str, float]:
    """Return how far ``profile`` is from an equilibrium, in nats per token.

    The price per byte, in nats, is the one at which the bit game would have spent the same bytes.
    """
    solution = solve(blocks, blocks.packed_bytes(profile))
    regret = solution.game.regret(profile)
    return {
        "regret_max": float(regret.max()),
        "regret_mean": float(regret.mean()),
        "potential_end": solution.game.potential(profile),
        "price": solution.price,
        "players": len(profile),
    }
