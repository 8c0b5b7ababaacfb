"""Assemble the compressed model from a solved game: packed bytes, weights, allocation, metrics and certificate."""

from collections.abc import Mapping

from nashswarm.methods.method import Compressed
from nashswarm.methods.nash_lattice.certificate import certificate_tensors
from nashswarm.methods.nash_lattice.quantizer import QuantizedModel
from nashswarm.methods.nash_lattice.solver import RateGameSolver, SolvedGame
from nashswarm.methods.nash_lattice.step_choices import Offsets
from nashswarm.packed.tiles import to_tiles
from nashswarm.quant.entropy import coded_bits
from nashswarm.quant.lattice import bit_price
from nashswarm.quant.pack import run_lengths


def report(solver: RateGameSolver, solved: SolvedGame) -> Compressed:
    """Return the model of a solved game as every method reports its own.

    Damages are those of the true curvature, in nats per token, without the row weights of the game.  Without a price
    nobody plays: there are no regrets, and a saved model keeps nothing for a certificate.
    """
    quantizer, choices, model = solver.quantizer, solved.choices, solved.model
    damage = {
        layer.name: float(quantizer.damage_by_row(layer, model.tensors[layer.name], quantizer.neutral).double().sum())
        for layer in quantizer.layers
    }
    bits = {name: float(coded_bits(tensor, model.tables).sum()) for name, tensor in model.tensors.items()}
    resident = sum(to_tiles(tensor).nbytes for tensor in model.tensors.values())
    metrics: dict[str, float] = {
        "damage": sum(damage.values()),
        "bits_per_weight_resident": 8 * resident / sum(layer.parameters for layer in quantizer.layers),
        "players": sum(quantizer.block_counts),
        **choices.metrics,
    }
    if solved.costs is not None:
        metrics |= {"price": 8 * bit_price(model.base_step)} | solver.regret_metrics(solved)
        metrics["potential_start"] = [*solved.rounds["potential"], metrics["potential_end"]][0]
    series = {name: values for name, values in solved.rounds.items() if values}
    series |= {f"{name}_of_reference": values for name, values in choices.history.items()}
    if not quantizer.uniform:
        series["price_of_trial"] = [8 * bit_price(base_step) for base_step, _ in solver.trials]
        series["bytes_of_trial"] = [float(size) for _, size in solver.trials]
    descent_metrics, descent_series = _descent(model)
    played = solved.costs is not None
    return Compressed(
        packed=model.packed,
        weights={layer.name: model.tensors[layer.name].dequantize() for layer in quantizer.layers},
        allocation=_allocation(
            choices.offsets, {name: bits[name] / tensor.codes.numel() for name, tensor in model.tensors.items()}
        ),
        code_bits=int(sum(bits.values())),
        damage=damage,
        metrics=metrics | descent_metrics,
        series=series | descent_series,
        game=certificate_tensors(choices.tensors(), solver.coupling if choices.align else None) if played else {},
    )


def _descent(model: QuantizedModel) -> tuple[dict[str, float], dict[str, list[float]]]:
    """Return how many sweeps the longest descent took, the layers it left unsettled, and the moves of each sweep."""
    descents = list(model.descents.values())
    if not descents:
        return {}, {}
    sweeps = max(len(descent.moves) for descent in descents)
    unsettled = sum(bool(descent.moves and descent.moves[-1]) for descent in descents)
    moves = [
        float(sum(descent.moves[sweep] for descent in descents if sweep < len(descent.moves)))
        for sweep in range(sweeps)
    ]
    return {"sweeps": sweeps, "unsettled": unsettled}, {"moves": moves}


def _allocation(offsets: Offsets, bits_per_weight: Mapping[str, float]) -> str:
    """Return one line a layer: its name, bits per weight of its codes, and its blocks' offsets, run-length coded."""
    lines = []
    for name, values in offsets.items():
        runs = " ".join(f"{value:+d}*{length}" for value, length in zip(*run_lengths(values.astype(int)), strict=True))
        lines.append(f"{name} {bits_per_weight[name]:.3f} {runs}\n")
    return "".join(lines)
