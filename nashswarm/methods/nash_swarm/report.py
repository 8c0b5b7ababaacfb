"""Assemble the compressed model from a solved game: packed bytes, weights, allocation, metrics."""

import math

import numpy as np

from nashswarm.kernels.encoder import RATES
from nashswarm.methods.method import Compressed, store_trellis
from nashswarm.methods.nash_swarm.solver import SolvedGame, potential, rate_regret
from nashswarm.quant import trellis


def report(solved: SolvedGame) -> Compressed:
    """Return the model of a solved game as every method reports its own.

    Damages are those of the curvature that the game was played with, in nats per token.  Without a price nobody plays:
    there are no regrets of rates.  Raises ValueError that names the matrices whose damage 32-bit floats cannot hold.
    """
    if beyond := [name for name, part in solved.played.items() if not math.isfinite(part.damage)]:
        raise ValueError(
            f"the damage of {', '.join(beyond)} is beyond 32-bit floats, as the model's outputs or gradients are too "
            "large: leave these matrices out by exclude"
        )
    matrices = {name: trellis.finish(part.layout, part.encoded) for name, part in solved.played.items()}
    rates = np.concatenate([part.rates.ravel() for part in solved.played.values()])
    weights = sum(matrix.rows * matrix.columns for matrix in matrices.values())
    side_bytes = sum(matrix.nbytes - matrix.payload.nbytes for matrix in matrices.values())
    metrics: dict[str, float] = {
        "players": len(rates),
        "side_bits": 8 * side_bytes / weights,
        "rate_mean": float(rates.mean()),
        **{f"tiles_at_{rate}_bits": int((rates == rate).sum()) for rate in range(RATES)},
        "regret_of_codes": max(part.code_regret for part in solved.played.values()),
    }
    if solved.price:
        largest, mean = rate_regret(solved.played, solved.price)
        metrics |= {
            "price": solved.price,
            "potential_start": solved.history["potential"][0],
            "potential_end": potential(solved.played, solved.price),
            "regret_of_rates": largest,
            "regret_mean": mean,
            "regret_max": max(largest, metrics["regret_of_codes"]),
        }
    return store_trellis(
        matrices,
        {name: part.damage for name, part in solved.played.items()},
        metrics,
        {f"{name}_of_round": values for name, values in solved.history.items()},
    )
