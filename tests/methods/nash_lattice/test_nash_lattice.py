"""The rate game on matrices made by hand; the held-out KL is a quadratic form that players may know or not."""

import dataclasses
import functools
import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from nashswarm.calibration.context import CalibrationContext
from nashswarm.layers import Layer, Moments, curvature
from nashswarm.methods.method import Compressed, Method
from nashswarm.methods.nash_lattice.budget import BUDGET_TOLERANCE, ByteSlope, step_for_budget
from nashswarm.methods.nash_lattice.selection import HeldoutSelection
from nashswarm.methods.nash_lattice.settings import NashLattice
from nashswarm.methods.nash_lattice.solver import REGRET, RateGameSolver
from nashswarm.methods.swarm import Flock
from nashswarm.packed.file_format import TABLES
from nashswarm.quant.curvature import Curvature
from nashswarm.quant.entropy import ESCAPE, CodeTables, coded_bits, decode_lattice, table_and_shift
from nashswarm.quant.lattice import Lattice, LatticeTensor, bit_price
from tests.methods.handmade import FIXED_BYTES, SHAPES, context_of, matrices, moments_of

FLOOR = NashLattice().floor
SILENT = Flock(align=(0.0,), shrink=(0.0,))
ALONE = NashLattice(swarm=None, strength=(0.0,))
METHODS: dict[str, NashLattice] = {
    "nash_lattice": NashLattice(effort="best", swarm=Flock(align=(0.0, 0.25))),
    "lattice_no_swarm": NashLattice(effort="best", swarm=None),
    "default_effort": NashLattice(),
    "alone": ALONE,
    "pass": dataclasses.replace(ALONE, code_game="pass"),
    "rounding": dataclasses.replace(ALONE, code_game="rounding"),
    "uniform": dataclasses.replace(ALONE, rate_in_codes=0.0, bit_game="uniform"),
    "one_step": dataclasses.replace(ALONE, rate_in_codes=0.0, bit_game="uniform", code_game="pass"),
    "free_codes": dataclasses.replace(ALONE, rate_in_codes=0.0),
    "half_priced": dataclasses.replace(ALONE, rate_in_codes=0.5),
    "local": dataclasses.replace(ALONE, swarm=dataclasses.replace(SILENT, local_reply=4)),
    "aligned": dataclasses.replace(ALONE, swarm=Flock(align=(20.0,), shrink=(0.0,))),
    "low": dataclasses.replace(ALONE, bits=1.2),
    "high": dataclasses.replace(ALONE, bits=6.0),
}


@functools.cache
def example(correlated: bool = True) -> tuple[tuple[Layer, ...], dict[str, Moments]]:
    layers = matrices()
    return layers, moments_of(layers, correlated)


def solver_of(method: NashLattice, context: CalibrationContext | None = None) -> RateGameSolver:
    return method.solver(context or context_of(*example()), np.random.default_rng(0))


def selection_of(method: NashLattice, context: CalibrationContext) -> HeldoutSelection:
    return method.selection(solver_of(method, context), context)


def compress(method: Method, context: CalibrationContext | None = None) -> Compressed:
    return method.compress(context or context_of(*example()), np.random.default_rng(0))


@functools.cache
def solved(name: str) -> tuple[Compressed, dict[str, Any]]:
    """The example compressed once by one of the METHODS, and the cache that this filled."""
    store: dict[str, Any] = {}
    return compress(METHODS[name], context_of(*example(), store=store)), store


def result(name: str) -> Compressed:
    return solved(name)[0]


def decoded(compressed: Compressed) -> dict[str, LatticeTensor]:
    """The tensors, read from the bytes and from nothing else."""
    tables = CodeTables.unpack(compressed.packed[TABLES])
    return {name: decode_lattice(packed, tables) for name, packed in compressed.packed.items() if name != TABLES}


def true_damage(compressed: Compressed) -> float:
    return context_of(*example()).heldout_kl(compressed.weights, None)


@pytest.mark.slow
@pytest.mark.parametrize("name", METHODS)
def test_compress_any_settings_meets_the_budget_from_below(name: str) -> None:
    parameters = sum(layer.parameters for layer in example()[0])
    budget = METHODS[name].bits * parameters / 8 - FIXED_BYTES
    size = sum(len(packed) for packed in result(name).packed.values())
    gap = 5 * BUDGET_TOLERANCE if name == "priced_codes" else BUDGET_TOLERANCE  # prices follow tables, tables prices
    assert (1 - gap) * budget - 4 <= size <= budget  # the coder writes words of four bytes


@pytest.mark.parametrize("name", METHODS)
def test_compress_any_settings_packs_the_weights_it_returns(name: str) -> None:
    compressed, tensors = result(name), decoded(result(name))
    layers = example()[0]
    assert list(compressed.weights) == list(tensors) == [layer.name for layer in layers]
    assert all(torch.equal(tensors[name].dequantize(), weight) for name, weight in compressed.weights.items())
    tables = CodeTables.unpack(compressed.packed[TABLES])
    lengths = {name: float(coded_bits(tensor, tables).sum()) for name, tensor in tensors.items()}
    assert compressed.code_bits == int(sum(lengths.values()))
    for layer, line in zip(layers, compressed.allocation.splitlines(), strict=True):
        layer_name, bits, *runs = line.split()
        assert layer_name == layer.name and float(bits) == pytest.approx(
            lengths[layer_name] / layer.parameters, abs=6e-4
        )
        assert sum(int(run.split("*")[1]) for run in runs) == -(-len(layer.weight) // 16)


@pytest.mark.parametrize("name", ["alone", "uniform", "aligned"])
def test_compress_same_seed_gives_same_bytes_and_metrics(name: str) -> None:
    once, again = result(name), compress(METHODS[name])
    assert all(np.array_equal(once.packed[layer], again.packed[layer]) for layer in once.packed)
    assert once.metrics == again.metrics and once.series == again.series and once.allocation == again.allocation


def test_compress_damages_and_metrics_are_those_of_the_weights() -> None:
    layers, moments = example()
    compressed = result("lattice_no_swarm")
    for layer in layers:
        curved = curvature(layer, moments, FLOOR).damped()
        error = layer.weight - compressed.weights[layer.name]
        assert compressed.damage[layer.name] == pytest.approx(curved.damage_by_row(error).sum().item(), rel=1e-4)
    assert compressed.metrics["damage"] == pytest.approx(sum(compressed.damage.values()))
    paid = compressed.metrics["price"] / 8 * compressed.code_bits
    assert compressed.metrics["potential_end"] == pytest.approx(compressed.metrics["damage"] + paid, rel=1e-4)
    assert compressed.metrics["players"] == sum(-(-rows // 16) for rows, _ in SHAPES.values())


def test_compress_without_a_part_of_the_game_damages_more() -> None:
    damages = {name: true_damage(result(name)) for name in METHODS}
    assert damages["alone"] < 0.99 * damages["pass"] < 0.9 * damages["rounding"]
    assert damages["alone"] < 0.8 * damages["uniform"] and damages["uniform"] < damages["one_step"]
    assert damages["alone"] < damages["local"] < damages["rounding"]
    assert damages["high"] < damages["alone"] < damages["low"]


def test_compress_uniform_steps_are_proportional_to_weights() -> None:
    ratios = []
    for layer in example()[0]:
        lattice = decoded(result("uniform"))[layer.name].lattice
        assert len(lattice.row_scale.unique()) == len(lattice.column_scale.unique()) == 1
        step = lattice.row_steps()[0] * lattice.column_steps()[0]
        ratios.append(float(step / layer.weight.square().mean().sqrt()))
    assert ratios == pytest.approx([ratios[0]] * len(ratios), rel=1e-5)
    assert "regret_max" not in result("uniform").metrics


def test_compress_one_offset_steps_cost_the_same_everywhere() -> None:
    """½ a κ step² is the price of the unit, to a quarter of an octave and the offset of the block."""
    layers, moments = example()
    compressed = compress(dataclasses.replace(ALONE, offsets=(0,)))
    unit = math.sqrt(12 * compressed.metrics["price"] / 8 / math.log(2))
    for layer in layers:
        rows, inputs = curvature(layer, moments, FLOOR).damped().mean_row_curvature()
        h = inputs.double()
        columns = [1 / torch.linalg.inv(h[column:, column:])[0, 0].item() for column in range(len(h))]
        lattice = decoded(compressed)[layer.name].lattice
        steps = lattice.row_steps()[:, None] * lattice.column_steps()
        wanted = unit / torch.outer(rows, torch.tensor(columns)).sqrt()
        assert (steps / wanted).log2().abs().max() <= 0.26


def test_compress_cached_game_moves_no_number() -> None:
    fresh, store = solved("nash_lattice")
    games = list(store)
    assert sorted(key.split()[0] for key in games) == ["game", "probe"]
    cached = compress(METHODS["nash_lattice"], context_of(*example(), store=store))
    assert list(store) == games
    assert all(np.array_equal(fresh.packed[layer], cached.packed[layer]) for layer in fresh.packed)
    assert fresh.metrics == cached.metrics and fresh.allocation == cached.allocation


def test_compress_default_effort_takes_the_first_value_of_every_list_and_no_pass_of_the_model() -> None:
    def fail(weights: Any, tokens: int | None) -> float:
        raise AssertionError("the model was evaluated")

    context = dataclasses.replace(context_of(*example()), heldout_kl=fail)
    compressed, alone = compress(METHODS["default_effort"], context), result("alone")
    assert all(np.array_equal(compressed.packed[layer], alone.packed[layer]) for layer in alone.packed)
    assert compressed.metrics == alone.metrics and compressed.metrics["heldout_passes"] == 0


@pytest.mark.slow
def test_compress_games_of_same_curvature_share_one_probe() -> None:
    """Without moves or without a flock, the layers compressed alone are the same; another curvature is probed anew."""
    whole = METHODS["nash_lattice"]
    store = dict(solved("nash_lattice")[1])
    still = dataclasses.replace(whole, offsets=(0,))
    for method, alone in ((still, compress(still)), (METHODS["lattice_no_swarm"], result("lattice_no_swarm"))):
        sharing = compress(method, context_of(*example(), store=store))
        assert all(np.array_equal(sharing.packed[layer], alone.packed[layer]) for layer in alone.packed)
        assert sharing.metrics == alone.metrics and sharing.metrics["heldout_passes"] >= len(example()[0])
    assert len([key for key in store if key.startswith("probe")]) == 1
    compress(dataclasses.replace(whole, code_game="rounding"), context_of(*example(), store=store))
    compress(dataclasses.replace(whole, swarm=Flock(local_reply=2)), context_of(*example(), store=store))
    assert len([key for key in store if key.startswith("probe")]) == 3


@pytest.mark.slow
def test_compress_game_cached_at_another_budget_moves_no_number() -> None:
    store: dict[str, Any] = {}
    method = METHODS["nash_lattice"]
    compress(dataclasses.replace(method, bits=5.0), context_of(*example(), store=store))
    games = len(store)
    compressed = compress(method, context_of(*example(), store=store))
    assert len(store) == games, "what is chosen once was chosen again for another budget"
    assert all(
        np.array_equal(compressed.packed[layer], result("nash_lattice").packed[layer]) for layer in compressed.packed
    )
    assert compressed.metrics == result("nash_lattice").metrics


@pytest.mark.parametrize(
    "settings",
    [
        {"bits": 0.0},
        {"bits": -1.0},
        {"offsets": (1, 2)},
        {"offsets": ()},
        {"offsets": (0, 0)},
        {"offsets": (2, 0)},
        {"offsets": (-100, 0)},
        {"offsets": (0, 100)},
        {"strength": ()},
        {"strength": (-0.1,)},
        {"strength": (1.1,)},
        {"sweeps": -1},
        {"rate_in_codes": -0.1},
        {"rate_in_codes": 1.5},
        {"floor": -0.1},
    ],
)
def test_settings_without_meaning_raise_naming_the_field(settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=rf"method\.{next(iter(settings))}") as caught:
        NashLattice(**settings)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("bits", [0.05, 0.2])
def test_compress_below_smallest_size_raises_one_sentence(bits: float) -> None:
    with pytest.raises(ValueError, match=r"below the smallest possible size of this model, [\d.]+ bits") as caught:
        compress(dataclasses.replace(ALONE, bits=bits))
    assert "\n" not in str(caught.value)


@pytest.mark.slow
def test_compress_little_above_smallest_size_fits() -> None:
    with pytest.raises(ValueError) as caught:
        compress(dataclasses.replace(ALONE, bits=0.05))
    least = float(str(caught.value).split("this model, ")[1].split(" bits")[0])
    compressed = compress(dataclasses.replace(ALONE, bits=1.6 * least))
    parameters = sum(layer.parameters for layer in example()[0])
    assert sum(len(packed) for packed in compressed.packed.values()) <= 1.6 * least * parameters / 8 - FIXED_BYTES


# What the flock and measured damages do.


@pytest.mark.slow
def test_compress_wrong_predictions_are_corrected_by_measured_damages() -> None:
    """One matrix really costs 30 times what its moments say: held-out text finds out, and its steps shrink."""
    layers, moments = example()

    def truth(layer: Layer, error: Tensor) -> float:
        factor = 30.0 if layer.name == "h.0.up" else 1.0
        return factor * float(curvature(layer, moments).damage_by_row(error).sum())

    context = context_of(layers, moments, truth)
    uncorrected = compress(ALONE, context)
    corrected = compress(dataclasses.replace(ALONE, effort="best", strength=(0.0, 0.5, 1.0)), context)
    assert corrected.metrics["strength"] == 1.0 and uncorrected.metrics["strength"] == 0.0
    assert corrected.metrics["heldout_passes"] == len(layers) + 3 and uncorrected.metrics["heldout_passes"] == 0
    assert context.heldout_kl(corrected.weights, None) < 0.8 * context.heldout_kl(uncorrected.weights, None)
    finer, coarser = (
        decoded(compressed)["h.0.up"].lattice.row_steps().mean() for compressed in (corrected, uncorrected)
    )
    assert finer < 0.5 * coarser
    assert -1 <= corrected.metrics["damage_correlation"] <= 1
    base_step = math.sqrt(12 * uncorrected.metrics["price"] / 8 / math.log(2))
    _, ratios, _ = selection_of(ALONE, context).probe_layers(base_step)
    assert ratios["h.0.up"] / ratios["h.0.down"] == pytest.approx(30, rel=0.3)


@pytest.mark.slow
def test_compress_noisy_sensitivities_shrinkage_helps() -> None:
    """All rows of a role cost the same in truth; the moments say otherwise."""
    layers, moments = example()
    flat = {
        name: dataclasses.replace(measured, coupled=torch.full_like(measured.coupled, 1e-4))
        for name, measured in moments.items()
    }

    def truth(layer: Layer, error: Tensor) -> float:
        return float(curvature(layer, flat).damage_by_row(error).sum())

    context = context_of(layers, moments, truth)
    method = dataclasses.replace(ALONE, effort="best", swarm=Flock(align=(0.0,), shrink=(0.0, 1.0)))
    shrunk, alone = compress(method, context), compress(ALONE, context)
    assert shrunk.metrics["flock_shrink"] == 1.0 and shrunk.metrics["heldout_passes"] == 2
    assert context.heldout_kl(shrunk.weights, None) < 0.9 * context.heldout_kl(alone.weights, None)


def test_shrunk_half_strength_moves_every_row_half_way() -> None:
    layers, moments = example()
    selection = selection_of(NashLattice(), context_of(layers, moments))
    solver, quantizer = selection.solver, selection.quantizer
    weights = selection.shrunk(quantizer.neutral, 0.5).row_weights
    logs = [quantizer.curvatures[layer.name].rows.log() for layer in layers]
    means = torch.stack([block.mean() for part in logs for block in part.split(16)]).double().numpy()
    links, block = solver.coupling.toarray(), 0
    for layer, part in zip(layers, logs, strict=True):
        for rows, start in zip(part.split(16), range(0, len(part), 16), strict=True):
            target = links[block] @ means / links[block].sum()
            moved = rows + weights[layer.name][start : start + 16].log()
            assert moved.numpy() == pytest.approx(((rows + target) / 2).numpy(), abs=1e-4)
            block += 1


def offsets_of(compressed: Compressed) -> np.ndarray:
    """The offset of every block, read from the allocation."""
    runs = [run.split("*") for line in compressed.allocation.splitlines() for run in line.split()[2:]]
    return np.array([int(value) for value, length in runs for _ in range(int(length))])


def test_compress_aligned_neighbours_come_closer() -> None:
    links = solver_of(METHODS["aligned"]).coupling.tocoo()

    def apart(compressed: Compressed) -> float:
        offsets = offsets_of(compressed)
        return float((links.data * np.abs(offsets[links.row] - offsets[links.col])).sum())

    alone, aligned = result("alone"), result("aligned")
    assert len(set(offsets_of(alone))) > 1 and apart(aligned) < apart(alone)
    assert aligned.metrics["flock_align"] == 20.0 and aligned.metrics["flock_moves"] > 0
    assert alone.metrics["flock_moves"] == 0


def test_compress_silent_flock_equals_no_swarm() -> None:
    silent = compress(dataclasses.replace(ALONE, swarm=SILENT))
    assert all(torch.equal(result("alone").weights[name], weight) for name, weight in silent.weights.items())
    assert silent.metrics == result("alone").metrics


# Theory and certificate.


def slow_reply(weight: Tensor, h: Tensor, steps: Tensor) -> np.ndarray:
    """One pass of error feedback in float64, an inverse a column."""
    rest, hessian, codes = weight.double().numpy().copy(), h.double().numpy(), np.zeros(weight.shape)
    for column in range(weight.shape[1]):
        inverse = np.linalg.inv(hessian[column:, column:])
        codes[:, column] = np.round(rest[:, column] / steps[:, column].double().numpy())
        error = rest[:, column] - codes[:, column] * steps[:, column].double().numpy()
        rest[:, column:] -= np.outer(error, inverse[0] / inverse[0, 0])
    return codes


def slow_bits(codes: np.ndarray, lattice: Lattice, tables: CodeTables) -> np.ndarray:
    """Bits of every row, code by code."""
    total, lengths = np.zeros(len(codes)), tables.bits()
    for row, levels in enumerate(lattice.levels()):
        for level, code in zip(levels, codes[row], strict=True):
            table, shift = (int(part) for part in table_and_shift(level))
            symbol = min(int(abs(code)) >> shift, ESCAPE)
            total[row] += lengths[table, symbol] + shift + (symbol == 0 and code != 0)
    return total


def points(
    layer: Layer, tensor: LatticeTensor, curved: Curvature, tables: CodeTables, offsets: tuple[int, ...]
) -> tuple[np.ndarray, np.ndarray]:
    """Exact damage and bits of every block at every offset: rows tell their own sizes, columns stay as they are, and
    who stays keeps its codes."""
    damage, bits = [], []
    for offset in offsets:
        moved = dataclasses.replace(tensor.lattice, row_scale=tensor.lattice.row_scale + offset)
        steps = moved.row_steps()[:, None] * moved.column_steps()
        codes = slow_reply(layer.weight, curved.inputs, steps) if offset else tensor.codes.double().numpy()
        if offset:
            sizes = 2 * np.log2(np.abs(codes).mean(1) + 2.0**-7) + moved.row_scale.numpy() / 2
            moved = dataclasses.replace(moved, row_size=torch.from_numpy(np.round(sizes).astype(np.int8)))
        error = layer.weight.double().numpy() - codes * steps.double().numpy()
        h = curved.inputs.double().numpy()
        by_row = curved.rows.double().numpy() * np.einsum("oi,ij,oj->o", error, h, error) / 2
        damage.append([part.sum() for part in np.split(by_row, range(16, len(by_row), 16))])
        bits.append([part.sum() for part in np.split(slow_bits(codes, moved, tables), range(16, len(by_row), 16))])
    return np.array(damage).T, np.array(bits).T


@pytest.fixture(scope="module")
def small() -> tuple[tuple[Layer, ...], dict[str, Moments]]:
    layers = matrices({"up": (40, 12), "down": (24, 16), "out": (33, 12)})
    return layers, moments_of(layers)


def test_best_response_uncoupled_blocks_choose_from_the_rate_distortion_hull() -> None:
    """A block's choice at the price λ lies on the lower convex hull of its points, touched by a line of slope −λ."""
    layers = matrices({"up": (40, 12), "down": (24, 16), "out": (33, 12)})
    moments = moments_of(layers, correlated=False)
    solver = solver_of(dataclasses.replace(ALONE, offsets=tuple(range(-4, 5))), context_of(layers, moments))
    neutral = solver.quantizer.neutral
    for base_step in (2.0**-8, 2.0**-5):
        model = solver.quantizer.quantize_at(base_step, neutral, 0)
        price, costs = bit_price(base_step), solver.offset_costs(model, neutral)
        chosen = solver.best_response_offsets(costs, base_step, neutral, 0.0).offsets
        block = 0
        for layer in layers:
            curved = curvature(layer, moments, FLOOR).damped()
            damage, bits = points(layer, model.tensors[layer.name], curved, model.tables, tuple(range(-4, 5)))
            for action, d, r in zip(chosen[layer.name] + 4, damage, bits, strict=True):
                assert costs[block] == pytest.approx(d + price * r, rel=1e-3)
                assert d[action] + price * r[action] <= (d + price * r).min() * (1 + 1e-3)
                for a, b in itertools.permutations(range(len(d)), 2):
                    if r[a] < r[action] < r[b]:
                        line = d[a] + (d[b] - d[a]) * (r[action] - r[a]) / (r[b] - r[a])
                        assert d[action] <= line + 1e-3 * d[action] + 1e-3 * price * r[action]
                block += 1


def test_regret_metrics_equal_enumeration_from_the_bytes(small: Any) -> None:
    """Every offset of every block and every other code of every weight, in float64, from the decoded file."""
    layers, moments = small
    context = dataclasses.replace(context_of(layers, moments), parameters=6 * sum(layer.parameters for layer in layers))
    compressed = compress(ALONE, context)
    tables, price = CodeTables.unpack(compressed.packed[TABLES]), compressed.metrics["price"] / 8
    steps_regret, codes_regret = [], []
    for layer in layers:
        curved = curvature(layer, moments, FLOOR).damped()
        tensor = decoded(compressed)[layer.name]
        offsets = tuple(ALONE.offsets)
        damage, bits = points(layer, tensor, curved, tables, offsets)
        costs = damage + price * bits
        steps_regret += (costs[:, offsets.index(0)] - costs.min(1)).tolist()
        h, codes = curved.inputs.double().numpy(), tensor.codes.double().numpy()
        steps = (tensor.lattice.row_steps()[:, None] * tensor.lattice.column_steps()).double().numpy()
        by_row = np.zeros(len(codes))
        for row, column in itertools.product(*map(range, codes.shape)):
            error = layer.weight[row].double().numpy() - codes[row] * steps[row]
            before, gains = error @ h @ error, [0.0]
            for change in (-2, -1, 1, 2):
                moved = error.copy()
                moved[column] -= change * steps[row, column]
                gains.append(curved.rows[row].item() / 2 * (before - moved @ h @ moved))
            by_row[row] += max(gains)
        codes_regret += [part.sum() for part in np.split(by_row, range(16, len(by_row), 16))]
    worst = np.maximum(steps_regret, codes_regret)
    slack = 2e-3 * compressed.metrics["potential_end"] / len(worst)  # a float32 tie of the pass may fall the other way
    assert compressed.metrics["players"] == len(worst)
    assert compressed.metrics["regret_of_steps"] == pytest.approx(max(steps_regret), abs=slack)
    assert compressed.metrics["regret_of_codes"] == pytest.approx(max(codes_regret), abs=slack)
    assert compressed.metrics["regret_max"] == pytest.approx(worst.max(), abs=slack)
    assert compressed.metrics["regret_mean"] == pytest.approx(worst.mean(), abs=slack)


@pytest.mark.parametrize("name", ["nash_lattice", "lattice_no_swarm", "alone", "local", "aligned", "high", "low"])
def test_compress_at_equilibrium_regret_vanishes(name: str) -> None:
    metrics = result(name).metrics
    assert 0 <= metrics["regret_mean"] <= metrics["regret_max"] <= 1e-6
    assert metrics["regret_max"] == max(metrics["regret_of_steps"], metrics["regret_of_codes"])


@pytest.mark.parametrize("align", [0.0, 2.0])
def test_equilibrate_offsets_moves_regretful_blocks_until_none_gains(align: float) -> None:
    """Other blocks stay, the returned costs are those of the end, and no block pays more than it moved for."""
    solver = solver_of(NashLattice())
    quantizer = solver.quantizer
    start = quantizer.neutral.with_metrics(flock_align=align)
    model = quantizer.quantize_at(2.0**-6, start, 20)
    costs = solver.offset_costs(model, start)
    end = solver.equilibrate_offsets(model, start, costs)
    assert end.costs is not None
    assert end.model.tables is model.tables and end.model.base_step == model.base_step
    # A float32 tie of a pass may fall either way.
    assert end.costs == pytest.approx(solver.offset_costs(end.model, end.choices), rel=1e-2)
    moved = np.concatenate([end.choices.offsets[name] != start.offsets[name] for name in SHAPES])
    assert moved.any() and not moved.all() and (costs[~moved] == end.costs[~moved]).all()
    for name, tensor in model.tensors.items():
        still = torch.from_numpy(~quantizer.split_by_layer(moved)[name]).repeat_interleave(16)[: len(tensor.codes)]
        assert torch.equal(tensor.codes[still], end.model.tensors[name].codes[still])
        assert torch.equal(tensor.lattice.column_size, end.model.tensors[name].lattice.column_size)
    game, profile, _ = solver.offset_game(end.costs, model.base_step, end.choices, align)
    assert game.regret(profile).max() <= REGRET
    if not align:
        stay = list(NashLattice().offsets).index(0)
        assert (end.costs[moved, stay] <= costs[moved].min(1) * (1 + 1e-4)).all()


def test_coordinate_descent_ends_the_regret_of_codes() -> None:
    regrets = {name: result(name).metrics["regret_of_codes"] for name in ("alone", "pass", "rounding")}
    assert regrets["alone"] < 0.05 * regrets["pass"] < regrets["rounding"]
    moves = result("alone").series["moves"]
    assert len(moves) == result("alone").metrics["sweeps"] <= 20 and moves[0] > moves[-1]


# The search for the budget.


@pytest.mark.parametrize("rate", [0.2, 1.0, 1.7])
@pytest.mark.parametrize("start", [2.0**-14, 2.0**-6, 1.0, 64.0])
def test_step_for_budget_any_start_meets_the_budget(rate: float, start: float) -> None:
    """Bytes that fall by ``rate`` times what is expected with every octave, in steps of four bytes, to a floor."""

    def trial(unit: float) -> int:
        return max(4 * round((60_000 - rate * 10_000 * np.log2(unit / 0.01)) / 4), 300)

    assert 0.999 * 41_234 <= step_for_budget(trial, lambda size: size, 41_234, start, ByteSlope(10_000.0)) <= 41_234


def test_step_for_budget_constant_size_raises() -> None:
    with pytest.raises(ValueError, match=r"no step was found at which the layers take 100 bytes; raise method\.bits"):
        step_for_budget(lambda unit: 200, lambda size: size, 100, 1.0, ByteSlope(1000.0))


def test_step_for_budget_jump_in_size_takes_the_largest_that_fits() -> None:
    assert step_for_budget(lambda unit: 50 if unit > 3 else 500, lambda size: size, 100, 1.0, ByteSlope(100.0)) == 50
