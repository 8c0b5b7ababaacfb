"""The method nash_swarm on matrices made by hand: its bytes, its game and its certificate, against enumeration."""

import copy
import dataclasses
import functools
import itertools
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import torch

from nashswarm.calibration.context import CalibrationContext, Quantize
from nashswarm.kernels import trellis as form
from nashswarm.layers import Moments, curvature
from nashswarm.methods.method import Compressed
from nashswarm.methods.nash_swarm import prices, solver
from nashswarm.methods.nash_swarm.settings import FIRST_BITS, QUICK_SHARE, NashSwarm
from nashswarm.methods.nash_swarm.solver import RateGame
from nashswarm.quant import trellis
from nashswarm.quant.curvature import Curvature
from nashswarm.quant.trellis_arrangement import arrange, arrange_again
from tests.methods.handmade import context_of, matrices, moments_of

SHAPES = {"wte": (200, 24), "h.0.up": (130, 40), "h.0.down": (64, 33)}  # a lookup too, and ragged in rows and columns
SMALL = NashSwarm(bits=6.0, sweeps=4, rounds=3)
VARIANTS: dict[str, NashSwarm] = {
    "nash_swarm": SMALL,
    "no_nash": dataclasses.replace(SMALL, rate_rule="uniform"),
    "no_swarm": dataclasses.replace(SMALL, grouping="stored", rotation=False),
    "no_rotation": dataclasses.replace(SMALL, rotation=False),
    "no_sweeps": dataclasses.replace(SMALL, sweeps=0),
    "random_groups": dataclasses.replace(SMALL, grouping="random"),
    "feature_groups": dataclasses.replace(SMALL, grouping="features"),
    "few_rates": dataclasses.replace(SMALL, rates=(2, 4)),
    "prune": dataclasses.replace(SMALL, rates=(0, 8)),
    "quick": dataclasses.replace(SMALL, effort="quick"),
}


def context_with(shapes: Mapping[str, tuple[int, int]]) -> CalibrationContext:
    layers = matrices(shapes)
    return context_of(layers, moments_of(layers))


@pytest.fixture(scope="module")
def context() -> CalibrationContext:
    return context_with(SHAPES)


@functools.cache
def compressed(name: str, seed: int = 0) -> Compressed:
    return VARIANTS[name].compress(context_with(SHAPES), np.random.default_rng(seed))


def rates_of(result: Compressed) -> np.ndarray:
    parts = [form.parse(torch.from_numpy(packed)) for packed in result.packed.values()]
    return np.concatenate([form.tile_rates(part).numpy().ravel() for part in parts]).astype(int)


def size(result: Compressed) -> int:
    return sum(len(packed) for packed in result.packed.values())


def game_of(context: CalibrationContext, **changed: Any) -> RateGame:
    return dataclasses.replace(SMALL, **changed).game(context, np.random.default_rng(0))


@pytest.mark.parametrize("name", VARIANTS)
def test_compress_bytes_meet_the_budget_and_decode_to_the_weights(name: str, context: CalibrationContext) -> None:
    result = compressed(name)
    budget = int(SMALL.bits * context.parameters / 8) - context.fixed_bytes
    widest = max(np.diff(VARIANTS[name].rates))
    room = widest * prices.BYTES_PER_BIT + 512  # the padding of the file, for which the method leaves room
    assert 0 <= budget - size(result) < room * (len(rates_of(result)) if name == "no_nash" else 1)
    assert list(result.packed) == [layer.name for layer in context.layers]
    for layer in context.layers:
        stored = form.parse(torch.from_numpy(result.packed[layer.name]))
        assert torch.equal(form.dequantize(stored), result.weights[layer.name])
        assert result.weights[layer.name].shape == layer.weight.shape
        assert stored.rotated == VARIANTS[name].rotation
        assert bool(stored.row_order.numel()) == (VARIANTS[name].grouping != "stored")
    assert set(rates_of(result)) <= set(VARIANTS[name].rates)
    assert result.metrics["players"] == len(rates_of(result))


@pytest.mark.parametrize("name", VARIANTS)
def test_damage_is_that_of_the_decoded_weights(name: str, context: CalibrationContext) -> None:
    """Of the curvature that the game is played with: damped, with a floor, one for all rows.

    Row weights are rounded to 1/8 octave.  Rows that fill up the last group count too, as long as it is encoded.
    """
    result, moments = compressed(name), context.moments()
    for layer in context.layers:
        rows, inputs = curvature(layer, moments, SMALL.floor).damped().mean_row_curvature()
        error = (layer.weight - result.weights[layer.name]).double()
        damage = float((rows.double() * ((error @ inputs.double()) * error).sum(1)).sum() / 2)
        assert result.damage[layer.name] >= 0.92 * damage
        if len(layer.weight) % 64 == 0:
            assert result.damage[layer.name] == pytest.approx(damage, rel=0.08)


def test_no_nash_gives_one_rate_or_two_neighbours_and_more_damage() -> None:
    uniform, game = compressed("no_nash"), compressed("nash_swarm")
    assert np.ptp(rates_of(uniform)) <= 1 < np.ptp(rates_of(game))
    assert game.metrics["damage"] < uniform.metrics["damage"]
    assert "regret_max" not in uniform.metrics and "price" not in uniform.metrics


def test_quick_is_one_pass_with_a_third_of_the_windows_and_claims_no_equilibrium() -> None:
    context, shares = context_with(SHAPES), []

    def zipf_moments(share: int = 1) -> Mapping[str, Moments]:
        shares.append(share)
        return context.moments()

    told = dataclasses.replace(context, zipf_moments=zipf_moments)
    metrics = VARIANTS["quick"].compress(told, np.random.default_rng(0)).metrics
    assert shares == [QUICK_SHARE]
    assert not {"price", "regret_max", "potential_end"} & set(metrics)


def test_compressed_gradients_are_those_of_one_pass_at_three_bits() -> None:
    context, seen = context_with(SHAPES), []

    def moments_after(quantize: Quantize, key: Mapping[str, Any]) -> Mapping[str, Moments]:
        seen.append((key, quantize(context.moments())))
        return context.moments()

    told = dataclasses.replace(context, moments_after=moments_after)
    dataclasses.replace(SMALL, gradients_at="compressed").game(told, np.random.default_rng(0))
    ((key, weights),) = seen
    assert key == {"bits": FIRST_BITS}
    first = NashSwarm(bits=FIRST_BITS).first_weights(context, context.moments())
    assert all(torch.equal(weights[name], first[name]) for name in first)


def test_each_part_lowers_the_damage() -> None:
    whole = compressed("nash_swarm").metrics["damage"]
    for name in ("no_nash", "no_swarm", "no_sweeps", "few_rates", "prune", "quick"):
        assert whole < compressed(name).metrics["damage"], name


def test_compress_same_seed_gives_the_same_bytes() -> None:
    again = SMALL.compress(context_with(SHAPES), np.random.default_rng(0))
    first = compressed("nash_swarm")
    assert all(np.array_equal(first.packed[name], again.packed[name]) for name in first.packed)
    assert first.metrics == again.metrics and first.allocation == again.allocation


def test_compress_with_another_number_of_threads_gives_the_same_bytes() -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(3 - min(before, 2))
    try:
        again = SMALL.compress(context_with(SHAPES), np.random.default_rng(0))
    finally:
        torch.set_num_threads(before)
    first = compressed("nash_swarm")
    assert all(np.array_equal(first.packed[name], again.packed[name]) for name in first.packed)


def test_random_groups_hang_on_the_seed_alone() -> None:
    orders = [
        form.parse(torch.from_numpy(compressed("random_groups", seed).packed["h.0.up"])).row_order for seed in (0, 1)
    ]
    assert not torch.equal(*orders)
    plain = [compressed("nash_swarm", seed).packed["h.0.up"] for seed in (0, 1)]
    assert np.array_equal(*plain)


def test_potential_never_rises_when_tiles_move_at_a_fixed_price(context: CalibrationContext) -> None:
    game = game_of(context)
    budget = int(5.5 * context.parameters / 8) - game.side_bytes()
    played = game._encode(prices.spread(game.shapes(), budget, game.allowed))
    price = prices.price_for(
        [part.at_rates for part in played.values()],
        prices.tile_bytes([part.rates for part in played.values()]),
        range(9),
    )
    potentials = [solver.potential(played, price)]
    for _ in range(4):
        wanted = [prices.best_rates(part.at_rates, price, range(9)) for part in played.values()]
        played = game._play(played, wanted, price)
        potentials.append(solver.potential(played, price))
    assert potentials[1] < potentials[0]
    for before, after in itertools.pairwise(potentials):
        assert after <= before + 1e-5 * abs(before)


def test_rate_regret_equals_enumeration_of_tiles_and_rates(context: CalibrationContext) -> None:
    """Each tile at each rate alone, played on a copy, its damage computed anew from all weights."""
    game = game_of(context)
    solved = game.solve(int(6.0 * context.parameters / 8), rounds=2)
    gains = []
    for layer in context.layers[1:]:
        part = solved.played[layer.name]
        arrangement = arrange_again(layer.weight, curvature(layer, context.moments(), SMALL.floor), part.layout)
        for group, tile in np.ndindex(part.rates.shape):
            costs = []
            for rate in range(9):
                state = trellis.reopen(arrangement, copy.deepcopy(part.encoded))
                chosen = torch.full((part.layout.shape[0],), 255, dtype=torch.uint8)
                chosen[group] = rate
                trellis.adopt(state, tile, chosen)
                costs.append(_damage(state) + solved.price * prices.BYTES_PER_BIT * rate)
            own = _damage(trellis.reopen(arrangement, part.encoded))
            gains.append(max(0.0, own + solved.price * prices.BYTES_PER_BIT * part.rates[group, tile] - min(costs)))
    played = {layer.name: solved.played[layer.name] for layer in context.layers[1:]}
    largest, mean = solver.rate_regret(played, solved.price)
    total = sum(part.damage for part in played.values())
    assert largest == pytest.approx(max(gains), abs=2e-5 * total)
    assert mean == pytest.approx(np.mean(gains), abs=2e-5 * total)


def _damage(state: trellis.State) -> float:
    error = (state.arrangement.weights - state.columns.values).double()
    return float((error * (state.arrangement.inputs.double() @ error)).sum() / 2)


def test_rate_regret_of_a_table_is_the_best_single_change() -> None:
    rng, price = np.random.default_rng(0), 1e-3
    rates = rng.integers(0, 9, (3, 5))
    table = rng.normal(size=(3, 5, 9))
    np.put_along_axis(table, rates[..., None], 0, 2)
    played = {"a": played_layer(table, rates), "b": played_layer(np.zeros((1, 1, 9)), np.array([[0]]))}
    gains = [
        max(price * prices.BYTES_PER_BIT * (rates[at] - rate) - table[at][rate] for rate in range(9))
        for at in np.ndindex(rates.shape)
    ]
    largest, mean = solver.rate_regret(played, price)
    assert largest == pytest.approx(max(gains)) and mean == pytest.approx(sum(gains) / 16)


def played_layer(at_rates: np.ndarray, rates: np.ndarray) -> solver.PlayedLayer:
    codes = torch.zeros(1, 64, dtype=torch.uint8)
    encoded = trellis.Encoded(torch.from_numpy(rates.astype(np.uint8)), codes, torch.zeros(1, dtype=torch.uint8))
    flat = Curvature(torch.ones(1), torch.eye(1), None)
    layout = arrange(torch.ones(1, 1), flat)[0].layout
    return solver.PlayedLayer(layout, encoded, 0.0, at_rates, 0.0, every_rate=True)


def test_regrets_in_the_metrics_are_small_and_potential_falls() -> None:
    metrics = compressed("nash_swarm").metrics
    assert metrics["regret_max"] == max(metrics["regret_of_rates"], metrics["regret_of_codes"])
    assert metrics["regret_mean"] <= metrics["regret_of_rates"] < 0.01 * metrics["damage"]
    assert metrics["potential_end"] <= metrics["potential_start"] * 1.01
    tiles = [metrics[f"tiles_at_{rate}_bits"] for rate in range(9)]
    assert sum(tiles) == metrics["players"] and np.arange(9) @ tiles == metrics["players"] * metrics["rate_mean"]


@pytest.mark.parametrize(
    ("changed", "least"), [({}, "every tile at 0 bits"), ({"rates": (2, 3)}, "every tile at 2 bits")]
)
def test_compress_budget_below_the_smallest_size_is_refused(
    changed: dict[str, Any], least: str, context: CalibrationContext
) -> None:
    method = dataclasses.replace(SMALL, bits=0.4, **changed)
    with pytest.raises(ValueError, match=f"method.bits=0.4 is below the smallest possible size .* with {least}"):
        method.compress(context, np.random.default_rng(0))


def test_smallest_size_that_the_refusal_names_is_accepted(context: CalibrationContext) -> None:
    with pytest.raises(ValueError, match="smallest possible size") as caught:
        dataclasses.replace(SMALL, bits=0.1).compress(context, np.random.default_rng(0))
    least = float(str(caught.value).split(" bits per parameter")[0].split()[-1])
    result = dataclasses.replace(SMALL, bits=least + 0.001).compress(context, np.random.default_rng(0))
    assert size(result) <= least * context.parameters / 8
    with pytest.raises(ValueError, match="smallest possible size"):
        dataclasses.replace(SMALL, bits=least - 0.001).compress(context, np.random.default_rng(0))


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"bits": 0.0}, "method.bits=0.0 must be a positive number"),
        ({"bits": float("inf")}, "method.bits=inf must be a positive number"),
        ({"bits": float("nan")}, "method.bits=nan must be a positive number"),
        ({"rates": ()}, r"method.rates \[\] must be ascending whole numbers from 0 to 8"),
        ({"rates": (3, 2)}, r"method.rates \[3, 2\] must be ascending"),
        ({"rates": (2, 2)}, r"method.rates \[2, 2\] must be ascending"),
        ({"rates": (0, 9)}, r"method.rates \[0, 9\] must be ascending"),
        ({"sweeps": -1}, "method.sweeps and method.floor must not be negative"),
        ({"floor": -0.5}, "method.sweeps and method.floor must not be negative"),
        ({"rounds": 0}, "method.rounds at least 1"),
    ],
)
def test_settings_without_a_meaning_are_refused(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        NashSwarm(**settings)


@pytest.mark.parametrize("name", ["rate_rule", "grouping"])
def test_settings_unknown_choice_is_refused_with_those_that_exist(name: str) -> None:
    untyped = getattr(NashSwarm, "__post_init__")  # noqa: B009  past the type checker of the tests
    value = object.__new__(NashSwarm)
    for field in dataclasses.fields(NashSwarm):
        object.__setattr__(value, field.name, "nothing" if field.name == name else field.default)
    with pytest.raises(ValueError, match=f"unknown method.{name} 'nothing': choose (equilibrium|weight)"):
        untyped(value)


@pytest.mark.parametrize("name", ["row", "column", "zero", "constant_columns", "lookup", "wide"])
def test_compress_odd_matrices(name: str) -> None:
    shapes = {"row": (1, 48), "column": (70, 1), "lookup": (90, 24), "wide": (3, 130)}
    layers = matrices({"h.0.up": (64, 32), "odd": shapes.get(name, (80, 32))})
    moments = moments_of(layers)
    if name in ("zero", "constant_columns"):
        weight = torch.zeros(80, 32)
        if name == "constant_columns":
            weight += torch.linspace(-1, 1, 32)
        layers = (layers[0], dataclasses.replace(layers[1], weight=weight))
    if name == "lookup":
        layers = (layers[0], dataclasses.replace(layers[1], kinds=("Embedding",)))
        share, outputs = torch.rand(90).softmax(0), 1e-3 * torch.rand(24)
        moments["odd"] = dataclasses.replace(
            moments["odd"], inputs=share, outputs=outputs, coupled=outputs, coupled_inputs=share
        )
    context = context_of(layers, moments)
    method = dataclasses.replace(SMALL, bits=16.0)
    result = method.compress(context, np.random.default_rng(0))
    assert size(result) <= 16.0 * context.parameters / 8
    for layer in layers:
        weight, curved = result.weights[layer.name], curvature(layer, moments, SMALL.floor)
        assert weight.shape == layer.weight.shape and weight.isfinite().all()
        left, nothing = (float(curved.damage_by_row(error).sum()) for error in (layer.weight - weight, layer.weight))
        assert left <= 0.1 * nothing, layer.name
