"""What would an entropy-coded trellis gain over an entropy-coded lattice at equal bits?  A prototype on matrices.

    python -m experiments.benchmarks.entropy_trellis model=smollm2_135m --layers model.layers.15.mlp.down_proj

Each column gets the step that its curvature asks for, as in ``nash_lattice``.  One pass of error feedback chooses the
codes at a price of a bit.  The lattice may choose any multiple of the step.  The trellis of 8 states (Ungerboeck 1982)
has half the step, and may choose even or odd multiples, as its state says; Viterbi's algorithm finds the best path down
64 rows (entropy-coded trellis-coded quantization, Fischer & Wang 1992).  Both pay the length of a code in tables that
depend on how large the code is expected to be, as the lattice's entropy coder does.  Tables are fitted to the codes of
the pass before.  Bits are entropies: there is no file.  Beside both stands ``nash_lattice`` itself on the same matrix,
with the same step, its code tables, and sweeps of best replies by its codes.  Every damage is that of one curvature.
"""

import argparse
import datetime
import functools
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int

from experiments.config import compose
from nashswarm import layers
from nashswarm.experiment import compression
from nashswarm.experiment.plan import plan
from nashswarm.layers import Layer
from nashswarm.methods.nash_lattice.quantizer import LatticeQuantizer
from nashswarm.progress import show_progress
from nashswarm.quant.curvature import Curvature, factor_curvature
from nashswarm.quant.entropy import coded_bits
from nashswarm.quant.trellis_arrangement import Arrangement, arrange
from nashswarm.records import files
from nashswarm.records.provenance import provenance

BITS = (2.0, 3.0, 4.0)
ROWS = 64  # of a path
STATES = {"lattice": 1, "trellis": 8}
PARITIES = (0o04, 0o13)
PRICE = 2 * np.log(2) / 12  # of a bit, in squared steps of a scalar quantizer: the slope of its distortion at high rate
LARGEST = 2047  # code
CLASSES = 24  # of expected sizes, in half octaves
PASSES, HALVINGS, SWEEPS = 3, 20, 20


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure the layers, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", help="overrides of the configuration, as for experiments.run")
    parser.add_argument("--layers", nargs="+", required=True, help="names of matrices")
    parser.add_argument("--floor", type=float, default=0.5, help="share of the mean sensitivity added to each row")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("results/benchmarks/entropy_trellis"))
    options = parser.parse_args(arguments)
    started = datetime.datetime.now(datetime.UTC)
    config = compose("wandb=disabled", *options.overrides)
    loaded = compression.load(config, plan(config))
    moments = loaded.session.moments()
    rows = []
    for layer in loaded.session.layers:
        if layer.name in options.layers:
            curvature = layers.curvature(layer, moments, options.floor)
            rows += [measure(layer, curvature, bits) for bits in BITS]
            print(table(rows[-len(BITS) :]), flush=True)
    files.write_report(options.out, {"rows": rows, "provenance": provenance(started)}, table(rows))


def measure(layer: Layer, curvature: Curvature, bits: float) -> dict[str, Any]:
    """Return bits and damages of all three at about ``bits`` per weight, and the trellis' ratios at equal bits."""
    row: dict[str, Any] = {"layer": layer.name, "rows": layer.weight.shape[0], "columns": layer.weight.shape[1]}
    arrangement, factor = arrange(layer.weight, curvature, "stored", False)
    factored = factor_curvature(curvature)
    base_step = step_of_rounding(arrangement, factor.double().numpy(), bits)
    for name, states in STATES.items():
        entropy, damage = encode(arrangement, factor.double().numpy(), base_step, states, factored.curvature)
        row |= {f"{name}_bits": entropy, f"{name}_damage": damage}
    quantizer = LatticeQuantizer([layer], {layer.name: factored}, False, 1.0, show_progress)
    model = quantizer.quantize_at(base_step, quantizer.neutral, SWEEPS)
    tensor = model.tensors[layer.name]
    row["swept_bits"] = float(coded_bits(tensor, model.tables).sum()) / tensor.codes.numel()
    row["swept_damage"] = float(quantizer.damage_by_row(layer, tensor, quantizer.neutral).double().sum())
    for name in ("lattice", "swept"):  # a bit more divides the damage by four
        equal = row["trellis_damage"] * 4 ** (row["trellis_bits"] - row[f"{name}_bits"])
        row[f"ratio_to_{name}"] = equal / row[f"{name}_damage"]
    return row


def step_of_rounding(arrangement: Arrangement, factor: Float[np.ndarray, "k k"], bits: float) -> float:
    """Return the step at which plain rounding takes about ``bits`` per weight, by the tables of the prototype."""
    weights = arrangement.weights.double().numpy()[:, : arrangement.layout.rows]
    finest, coarsest = -40.0, 10.0  # logarithms of the step
    for _ in range(HALVINGS):
        middle = (finest + coarsest) / 2
        steps = 2.0**middle * np.diag(factor)
        codes = np.clip(np.round(weights / steps[:, None]), -LARGEST, LARGEST).astype(int)
        _, entropy = _fit(codes, _classes(weights, steps), 1)
        finest, coarsest = (middle, coarsest) if entropy > bits else (finest, middle)
    return float(2.0**middle)


def encode(
    arrangement: Arrangement, factor: Float[np.ndarray, "k k"], step: float, states: int, curvature: Curvature
) -> tuple[float, float]:
    """Return bits per weight and damage after ``PASSES`` of error feedback, each with tables fitted to the last."""
    weights = arrangement.weights.double().numpy()[:, : arrangement.layout.rows]
    steps = step * np.diag(factor)
    classes = _classes(weights, steps)
    lengths = _first_lengths(states)
    for _ in range(PASSES):
        codes, values = _pass(weights, factor, steps, classes, lengths, states)
        lengths, entropy = _fit(codes, classes, states)
    error = torch.empty(weights.T.shape)
    error[:, arrangement.layout.encoding_order] = torch.from_numpy(weights - values).T.float()
    damage = curvature.damage_by_row(error / arrangement.layout.root[:, None])
    return entropy, float(damage.double().sum())


def _classes(
    weights: Float[np.ndarray, "columns rows"], steps: Float[np.ndarray, " columns"]
) -> Int[np.ndarray, "columns rows"]:
    """Return the class of each code: how large it is expected to be, from the means of its row and its column."""
    squares = (weights / steps[:, None]) ** 2
    sizes = np.sqrt(squares.mean(0))[None] * np.sqrt(squares.mean(1, keepdims=True))
    sizes /= max(np.sqrt(squares.mean()), 1e-30)
    return np.clip(np.round(2 * np.log2(np.maximum(sizes, 1e-6))) + 8, 0, CLASSES - 1).astype(int)


def _pass(
    weights: Float[np.ndarray, "columns rows"],
    factor: Float[np.ndarray, "columns columns"],
    steps: Float[np.ndarray, " columns"],
    classes: Int[np.ndarray, "columns rows"],
    lengths: Float[np.ndarray, "sets classes codes"],
    states: int,
) -> tuple[Int[np.ndarray, "columns rows"], Float[np.ndarray, "columns rows"]]:
    """Return the codes of one pass of error feedback, and the values that they stand for."""
    corrected, codes, values = weights.copy(), np.zeros(weights.shape, int), np.zeros(weights.shape)
    unit = 1.0 if states == 1 else 0.5  # a trellis of half the step has as many codes to choose from at a time
    for column in range(len(weights)):
        targets = corrected[column] / (steps[column] * unit)
        codes[column] = _best_path(targets, classes[column], lengths, states, PRICE / unit**2)
        values[column] = codes[column] * steps[column] * unit
        error = (corrected[column] - values[column]) / factor[column, column]
        corrected[column + 1 :] -= np.outer(factor[column, column + 1 :], error)
    return codes, values


def _best_path(
    targets: Float[np.ndarray, " rows"],
    classes: Int[np.ndarray, " rows"],
    lengths: Float[np.ndarray, "sets classes codes"],
    states: int,
    price: float,
) -> Int[np.ndarray, " rows"]:
    """Return the codes of least squared error plus priced length, in paths of ``ROWS`` rows that start at state 0."""
    length, count = len(targets), -(-len(targets) // ROWS)
    filling = (0, count * ROWS - length)
    targets, classes = (np.pad(part, filling).reshape(count, ROWS) for part in (targets, classes))
    modulus = 1 if states == 1 else 4
    # The best code of each subset at each row, and its cost: (subsets, paths, rows).
    nearest = np.round((targets - np.arange(modulus)[:, None, None]) / modulus).astype(int)
    options = np.arange(modulus)[:, None, None] + modulus * (nearest + np.arange(-2, 3)[:, None, None, None])
    smallest = np.arange(modulus)[:, None, None] + 0 * nearest
    options = np.concatenate([options, smallest[None], smallest[None] - modulus])
    options = np.clip(options, -LARGEST + modulus, LARGEST - modulus)
    options += (np.arange(modulus)[:, None, None] - options) % modulus
    sets = np.arange(modulus)[:, None, None] % 2 + 0 * nearest if states > 1 else 0 * nearest
    costs = (targets - options) ** 2 + price * lengths[sets, classes, options + LARGEST]
    best = costs.argmin(0)
    cost = np.take_along_axis(costs, best[None], 0)[0]
    code = np.take_along_axis(options, best[None], 0)[0]
    if states == 1:
        return code[0].ravel()[:length]
    before, subset = _transitions(states)
    total = np.full((count, states), np.inf)
    total[:, 0] = 0
    choices = np.zeros((ROWS, count, states), int)
    for row in range(ROWS):
        arriving = total[:, before] + cost[subset, :, row].transpose(2, 0, 1)  # paths, states, two ways
        choices[row] = arriving.argmin(2)
        total = arriving.min(2)
    at, everyone = total.argmin(1), np.arange(count)
    path = np.zeros((count, ROWS), int)
    for row in reversed(range(ROWS)):
        way = choices[row, everyone, at]
        path[:, row] = code[subset[at, way], everyone, row]
        at = before[at, way]
    return path.ravel()[:length]


@functools.cache
def _transitions(states: int) -> tuple[Int[np.ndarray, "states 2"], Int[np.ndarray, "states 2"]]:
    """Return the two states before each state, and the subset of codes on each way."""
    windows = np.arange(states)[:, None] + states * np.arange(2)
    parity = [np.vectorize(lambda window, mask=mask: bin(window & mask).count("1") & 1)(windows) for mask in PARITIES]
    return windows >> 1, 2 * parity[1] + parity[0]


def _first_lengths(states: int) -> Float[np.ndarray, "sets classes codes"]:
    """Return code lengths of Laplacian codes of the expected sizes, to start from."""
    sets = 1 if states == 1 else 2
    sizes = 2.0 ** ((np.arange(CLASSES) - 8) / 2) * (1 if states == 1 else 2)
    codes = np.abs(np.arange(-LARGEST, LARGEST + 1))
    mass = np.exp(-np.sqrt(2) * codes / np.maximum(sizes, 0.3)[:, None])
    mass /= mass.sum(1, keepdims=True) / sets
    return np.broadcast_to(-np.log2(np.maximum(mass, 2.0**-40)), (sets, CLASSES, 2 * LARGEST + 1)).copy()


def _fit(
    codes: Int[np.ndarray, "columns rows"], classes: Int[np.ndarray, "columns rows"], states: int
) -> tuple[Float[np.ndarray, "sets classes codes"], float]:
    """Return code lengths fitted to codes, and the entropy in bits per weight."""
    sets = codes % 2 if states > 1 else 0 * codes
    counts = np.zeros((1 if states == 1 else 2, CLASSES, 2 * LARGEST + 1))
    np.add.at(counts, (sets, classes, codes + LARGEST), 1)
    total = counts.sum(2, keepdims=True)
    entropy = -(counts * np.log2(np.maximum(counts, 1) / np.maximum(total, 1))).sum() / codes.size
    usable = np.arange(-LARGEST, LARGEST + 1) % 2 == np.arange(len(counts))[:, None, None] if states > 1 else 1
    smooth = (counts + 0.02 * usable) / np.maximum((counts + 0.02 * usable).sum(2, keepdims=True), 1e-9)
    return -np.log2(np.maximum(smooth, 2.0**-40)), float(entropy)


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Return the rows as a Markdown table."""
    lines = [
        "| matrix | `nash_lattice`: bits | damage | priced pass: bits | damage | trellis: bits | damage "
        "| damage over `nash_lattice`'s at equal bits | over the priced pass' |",
        "|:--|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    lines += [
        f"| `{row['layer']}` | {row['swept_bits']:.3f} | {row['swept_damage']:.3g} | {row['lattice_bits']:.3f} | "
        f"{row['lattice_damage']:.3g} | {row['trellis_bits']:.3f} | {row['trellis_damage']:.3g} | "
        f"{row['ratio_to_swept']:.3f} | {row['ratio_to_lattice']:.3f} |"
        for row in rows
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
