"""Enumerate what every player of a decoded model could gain by deviating alone.

This is a second implementation of the game, and it shares no sum with the solver: that is its point.  Only decoders and
plain values are imported.  Everything is in float64.  Error feedback uses a reversed Cholesky factor of H, where the
solver inverts H.

- Codes: every weight tries every code between the least and the largest of its layer (or of its tile's width) and pays
  for length as the codes of its method do.  The gains of a block's weights are added up.
- Steps: every block tries every other offset of the method.  Its codes answer by error feedback, and everything else
  stays as it is stored.  Fixed-width formats have no steps to try.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from nashswarm.experiment.decoded_costs import (
    BLOCK,
    Array,
    DecodedMatrix,
    Quadratic,
    RateCost,
    expected_size,
    float64,
    levels,
    scales_and_sizes,
)
from nashswarm.layers import Layer
from nashswarm.quant.lattice import LatticeTensor

CHUNK = 1 << 18  # weights enumerated at once


def gain_of_codes(weight: Float[Array, "out in"], matrix: DecodedMatrix, quadratic: Quadratic) -> Float[Array, " out"]:
    """Return what the weights of each row would gain by their best other codes, in nats per token.

    Each weight changes alone; the gains of a row are added up.
    """
    gains = np.zeros(len(weight))
    count = max(1, CHUNK // weight.shape[1])
    for start in range(0, len(weight), count):
        rows = slice(start, start + count)
        slope, stiffness = quadratic.slope(weight[rows] - matrix.values[rows], rows), quadratic.stiffness(rows)
        high = matrix.high if isinstance(matrix.high, int) else matrix.high[rows]
        best, rate = np.zeros_like(slope), matrix.rate
        paid = rate.price * rate.length(matrix.codes[rows], rows) if rate else 0.0
        for code in range(matrix.low, int(np.max(high)) + 1):
            change = (code - matrix.codes[rows]) * matrix.steps[rows]
            gain = change * (slope - stiffness * change / 2)
            if rate:
                gain += paid - rate.price * rate.length(code, rows)
            np.maximum(best, gain if isinstance(high, int) else np.where(code <= high, gain, 0), out=best)
        gains[rows] = best.sum(1)
    return gains


def gain_of_steps(
    layers: tuple[Layer, ...],
    tensors: Mapping[str, LatticeTensor],
    quadratics: Mapping[str, Quadratic],
    bits: Float[Array, "tables symbols"],
    settings: Mapping[str, Any],
    metrics: Mapping[str, float],
    game: Mapping[str, Array],
) -> Float[Array, " blocks"]:
    """Return what each block would gain by its best other offset, in nats per token.

    ``settings`` and ``metrics`` are those of the record; ``game``: the tensors that the model was saved with.
    """
    offsets, price = np.array(settings["offsets"]), metrics["price"] / 8
    costs_by_layer = []
    for layer in layers:
        quadratic = quadratics[layer.name]
        feedback = None if settings["code_game"] == "rounding" else feedback_matrix(quadratic)
        quadratic = quadratic.scale_rows(game[f"weights/{layer.name}"].astype(float))
        weight, tensor = float64(layer.weight), tensors[layer.name]
        costs_by_layer.append(costs_of_offsets(weight, tensor, quadratic, feedback, bits, offsets, price))
    costs = np.concatenate(costs_by_layer)
    stay = list(offsets).index(0)
    if align := metrics["flock_align"]:
        current = np.concatenate([game[f"offsets/{layer.name}"] for layer in layers])
        mover, neighbour = game["flock/pairs"]
        distance = np.abs(current[mover, None] + offsets - current[neighbour, None])
        disagreement = np.zeros(costs.shape)
        np.add.at(disagreement, mover, 8 * price * align * game["flock/weights"][:, None] * distance)
        costs += disagreement
    return costs[:, stay] - costs.min(1)


def costs_of_offsets(
    weight: Float[Array, "out in"],
    tensor: LatticeTensor,
    quadratic: Quadratic,
    feedback: Float[Array, "in in"] | None,
    bits: Float[Array, "tables symbols"],
    offsets: Int[Array, " offsets"],
    price: float,
) -> Float[Array, "blocks offsets"]:
    """Return what each block pays at each offset, in nats per token, at ``price`` a bit.

    At offset 0 it keeps its stored codes.  The sizes that the coder expects of columns are always the stored ones,
    because no other block moves.
    """
    lattice = tensor.lattice
    row_scale, column_scale, row_size, column_size = scales_and_sizes(tensor)

    def cost(
        codes: Int[Array, "out in"], row_scale: Int[Array, " out"], row_size: Int[Array, " out"]
    ) -> Float[Array, " blocks"]:
        error = weight - codes * steps_at(row_scale)
        damage = by_block((quadratic.slope(error) * error).sum(1) / 2)
        rate = RateCost(price, bits, levels(row_scale, column_scale, row_size, column_size))
        return damage + price * by_block(rate.length(codes).sum(1))

    def steps_at(row_scale: Int[Array, " out"]) -> Float[Array, "out in"]:
        return np.outer(lattice.base * 2.0 ** (row_scale / 4), 2.0 ** (column_scale / 4))

    costs = []
    for offset in offsets:
        if offset == 0:
            costs.append(cost(tensor.codes.numpy().astype(np.int64), row_scale, row_size))
            continue
        moved_scale = (row_scale + offset).clip(-128, 127)
        codes = error_feedback_codes(weight, steps_at(moved_scale), feedback)
        costs.append(cost(codes, moved_scale, expected_size(np.abs(codes).mean(1), moved_scale)))
    return np.stack(costs, 1)


def feedback_matrix(quadratic: Quadratic) -> Float[Array, "in in"] | None:
    """Return how far an error of column i moves the target of a later column j: G_ij / G_jj, or None without products.

    H = G Gᵀ with G upper triangular.  Column j alone can then compensate the columns before it, and
    ``e H eᵀ = Σ_j (G_jj (e_j + Σ_i<j e_i G_ij / G_jj))²`` is least if every column rounds to its target.  Lookups are
    added to H on average.
    """
    if quadratic.inputs is None:
        return None
    inputs = quadratic.inputs
    if quadratic.lookups is not None:
        inputs = inputs + np.diag(quadratic.lookups.sum(0) / quadratic.rows.sum())
    upper = np.linalg.cholesky(inputs[::-1, ::-1])[::-1, ::-1]
    return upper / upper.diagonal()


def error_feedback_codes(
    weight: Float[Array, "out in"], steps: Float[Array, "out in"], feedback: Float[Array, "in in"] | None
) -> Int[Array, "out in"]:
    """Return the codes of one pass of error feedback, column by column, or of plain rounding without ``feedback``."""
    if feedback is None:
        return np.rint(weight / steps).astype(np.int64)
    wanted, step = np.ascontiguousarray(weight.T), np.ascontiguousarray(steps.T)
    codes, error = np.zeros_like(wanted), np.zeros_like(wanted)
    for column in range(len(wanted)):
        target = wanted[column] + feedback[:column, column] @ error[:column]
        codes[column] = np.rint(target / step[column])
        error[column] = wanted[column] - codes[column] * step[column]
    return codes.T.astype(np.int64)


def by_block(rows: Float[Array, " out"]) -> Float[Array, " blocks"]:
    """Return the sum of every 16 rows."""
    return np.add.reduceat(rows, np.arange(0, len(rows), BLOCK))
