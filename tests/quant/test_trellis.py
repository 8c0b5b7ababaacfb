"""Matrices in trellis tiles: arrangement, error feedback, sweeps and deviations, against plain algebra in float64."""

import copy
import itertools
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nashswarm.kernels import trellis as form
from nashswarm.kernels.encoder import KEEP, RATES
from nashswarm.kernels.trellis_codes import distortions
from nashswarm.quant import trellis
from nashswarm.quant.curvature import Curvature
from nashswarm.quant.trellis import State
from nashswarm.quant.trellis_arrangement import Arrangement, Grouping, arrange, arrange_again
from tests.quant.cases import correlated, weights

few_examples = settings(max_examples=25, deadline=None)
GROUPINGS: tuple[Grouping, ...] = ("weight", "features", "stored", "random")


def curvature_of(rows: int, columns: int, seed: int, lookups: str = "none") -> Curvature:
    """Sensitivities of very unequal rows; ``lookups``: none, some (a tied head), or only (an embedding)."""
    generator = torch.Generator().manual_seed(seed)
    sensitivity = 1e-4 * torch.randn(rows, generator=generator).exp()
    looked_up = 1e-4 * torch.rand(rows, 1, generator=generator) * torch.rand(columns, generator=generator)
    inputs = None if lookups == "only" else correlated(columns, seed)
    return Curvature(sensitivity, inputs, None if lookups == "none" else looked_up)


def arranged(
    rows: int, columns: int, seed: int = 0, grouping: Grouping = "weight", rotated: bool = True, **changed: Any
) -> tuple[Arrangement, torch.Tensor]:
    matrix = 0.1 * weights(rows, columns, seed) * torch.linspace(0.2, 2, columns)
    return arrange(changed.get("matrix", matrix), curvature_of(rows, columns, seed), grouping, rotated, seed)


def drawn_rates(arrangement: Arrangement, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(RATES, arrangement.layout.shape, generator=generator, dtype=torch.uint8)


def encoded(rows: int, columns: int, seed: int = 0, **options: Any) -> State:
    arrangement, factor = arranged(rows, columns, seed, **options)
    return trellis.feedback(arrangement, factor, drawn_rates(arrangement, seed))


def damage_of(state: State) -> float:
    """Return the damage of the values, in float64."""
    error = (state.arrangement.weights - state.columns.values).double()
    return float((error * (state.arrangement.inputs.double() @ error)).sum() / 2)


def restored(state: State, values: torch.Tensor) -> torch.Tensor:
    """Return the matrix that arranged values stand for: rotated back, unweighted, and in the order of the matrix."""
    layout = state.arrangement.layout
    by_row = values.double().T
    if layout.rotated:
        signs = [[(-1) ** bin(row & column).count("1") for column in range(64)] for row in range(64)]
        back = torch.tensor(signs, dtype=torch.float64) / 8
        by_row = torch.cat([back @ group for group in by_row.split(64)])
    matrix = torch.zeros(layout.rows, layout.columns, dtype=torch.float64)
    for place in range(layout.rows):
        row = place if layout.row_order is None else int(layout.row_order[place])
        matrix[row, layout.encoding_order] = by_row[place] / layout.root[place].double()
    return matrix


@st.composite
def states(draw: Any) -> State:
    rows, columns = draw(st.sampled_from([1, 5, 64, 70, 130])), draw(st.sampled_from([1, 7, 16, 33, 70]))
    seed, kind = draw(st.integers(0, 1000)), draw(st.sampled_from(["normal", "zero", "rows", "columns"]))
    matrix = weights(rows, columns, seed)
    if kind == "zero":
        matrix = torch.zeros(rows, columns)
    elif kind == "rows":
        matrix[::2] = 0
    elif kind == "columns":
        matrix = torch.linspace(-1, 1, columns).repeat(rows, 1)
    curvature = curvature_of(rows, columns, seed, draw(st.sampled_from(["none", "some", "only"])))
    arrangement, factor = arrange(matrix, curvature, draw(st.sampled_from(GROUPINGS)), draw(st.booleans()), seed)
    return trellis.feedback(arrangement, factor, drawn_rates(arrangement, seed))


@few_examples
@given(states())
def test_finish_decodes_to_the_values_of_the_state(state: State) -> None:
    layout = state.arrangement.layout
    matrix = form.dequantize(trellis.finish(layout, state.encoded())).double()
    expected = restored(state, state.columns.values)
    assert matrix.shape == (layout.rows, layout.columns)
    if state.arrangement.weights.any():
        assert torch.allclose(matrix, expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))
    else:  # the smallest scale of the file is larger than that of nothing
        assert matrix.abs().max() <= 1e-5


@pytest.mark.parametrize("factor", [1e-7, 1e-3, 1e3, 1e7])
def test_finish_decodes_matrices_of_any_size(factor: float) -> None:
    arrangement, inverse = arranged(70, 33, matrix=factor * weights(70, 33, 0))
    state = trellis.feedback(arrangement, inverse, torch.full(arrangement.layout.shape, 4, dtype=torch.uint8))
    matrix = form.dequantize(trellis.finish(arrangement.layout, state.encoded())).double()
    expected = restored(state, state.columns.values)
    assert torch.allclose(matrix, expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))


@few_examples
@given(states())
def test_orders_are_permutations(state: State) -> None:
    layout = state.arrangement.layout
    rows = torch.arange(layout.rows) if layout.row_order is None else layout.row_order
    assert sorted(rows.tolist()) == list(range(layout.rows))
    assert sorted(layout.encoding_order.tolist()) == list(range(layout.columns))
    assert sorted(layout.places.tolist()) == list(range(layout.columns))
    if layout.column_order is None:
        assert torch.equal(layout.places, layout.encoding_order)
    else:
        assert torch.equal(layout.column_order[layout.places], layout.encoding_order)


@pytest.mark.parametrize("rotated", [True, False])
@pytest.mark.parametrize("grouping", GROUPINGS)
def test_arrange_restores_the_matrix(grouping: Grouping, rotated: bool) -> None:
    matrix = weights(130, 40, 1)
    arrangement, factor = arrange(matrix, curvature_of(130, 40, 1), grouping, rotated, 3)
    state = trellis.feedback(arrangement, factor, drawn_rates(arrangement, 0))
    assert torch.allclose(restored(state, arrangement.weights), matrix.double(), atol=1e-5)


@few_examples
@given(states())
def test_damage_is_that_of_the_values(state: State) -> None:
    assert state.damage == pytest.approx(damage_of(state), rel=1e-3, abs=1e-12)


@pytest.mark.parametrize("lookups", ["none", "some"])
@pytest.mark.parametrize("grouping", GROUPINGS)
def test_damage_equals_that_of_the_curvature(grouping: Grouping, lookups: str) -> None:
    """Exactly with the sensitivities that the file can hold, and within their rounding, 1/8 octave, with the others."""
    matrix, curvature = weights(128, 48, 2), curvature_of(128, 48, 2, lookups)
    arrangement, factor = arrange(matrix, curvature, grouping)
    state = trellis.feedback(arrangement, factor, drawn_rates(arrangement, 5))
    layout = arrangement.layout
    error = matrix.double() - form.dequantize(trellis.finish(layout, state.encoded())).double()
    rows, inputs = curvature.damped().mean_row_curvature()
    by_row = ((error @ inputs.double()) * error).sum(1) / 2
    order = torch.arange(128) if layout.row_order is None else layout.row_order
    held = torch.empty(128, dtype=torch.float64)
    held[order] = layout.root.double().square()
    assert state.damage == pytest.approx(float(held @ by_row), rel=1e-3)
    assert bool((held / rows.double()).log2().abs().max() <= 1 / 8 + 1e-6)


@few_examples
@given(states())
def test_reopen_gives_the_same_state(state: State) -> None:
    again = trellis.reopen(state.arrangement, copy.deepcopy(state.encoded()))
    assert torch.equal(again.rates, state.rates) and torch.equal(again.columns.codes, state.columns.codes)
    size = float(state.columns.values.abs().max()) + 1e-30
    assert torch.allclose(again.columns.values, state.columns.values, rtol=1e-4, atol=1e-6 * size)
    assert torch.allclose(again.columns.scales, state.columns.scales, rtol=1e-5)
    assert damage_of(again) == pytest.approx(damage_of(state), rel=1e-3, abs=1e-12)


@few_examples
@given(states())
def test_sweeps_never_raise_the_damage(state: State) -> None:
    damages = [damage_of(state)]
    for _ in range(3):
        gain, changed = trellis.sweep(state)
        damages.append(damage_of(state))
        assert damages[-2] - damages[-1] == pytest.approx(gain, rel=0.02, abs=1e-4 * damages[0] + 1e-12)
        assert changed or gain == 0
    for before, after in itertools.pairwise(damages):
        assert after <= before * (1 + 1e-5) + 1e-12


@pytest.mark.parametrize("shape", [(130, 40), (64, 16), (5, 33)])
def test_path_regret_is_nothing_after_sweeps_have_settled(shape: tuple[int, int]) -> None:
    state = encoded(*shape)
    first = trellis.path_regret(state)
    for _ in range(60):
        _, changed = trellis.sweep(state)
        if not changed:
            break
    assert not changed
    state.refresh()
    assert first > 0 and trellis.path_regret(state) <= 1e-4 * first


def test_path_regret_leaves_the_state_as_it_is() -> None:
    state = encoded(70, 33)
    before = copy.deepcopy((state.columns, state.slopes))
    trellis.path_regret(state)
    assert torch.equal(before[0].codes, state.columns.codes) and torch.equal(before[1], state.slopes)


def test_deviations_equal_what_adopting_changes() -> None:
    state = encoded(130, 40, seed=4)
    for tile in range(3):
        changes = trellis.deviations(state, tile)
        for group, rate in itertools.product(range(3), range(RATES)):
            moved = copy.deepcopy(state)
            chosen = torch.full((3,), KEEP, dtype=torch.uint8)
            chosen[group] = rate
            trellis.adopt(moved, tile, chosen)
            assert int(moved.rates[group, tile]) == rate
            change = damage_of(moved) - damage_of(state)
            assert float(changes[group, rate]) == pytest.approx(change, rel=1e-3, abs=1e-5 * damage_of(state))
            error = moved.arrangement.weights - moved.columns.values
            assert torch.allclose(moved.slopes, moved.arrangement.inputs @ error, atol=1e-4 * float(error.abs().max()))


def test_deviations_try_the_rates_of_each_mask_alone() -> None:
    state = encoded(6 * 64, 33)
    masks = torch.tensor([0b1001, 0, 0b110, 0b1001, 0b1010, 0b111111111], dtype=torch.int32)
    every, some = trellis.deviations(state, 1), trellis.deviations(state, 1, masks)
    tried = (masks[:, None] >> torch.arange(RATES) & 1).bool()
    assert torch.equal(some, every * tried)


def test_most_gain_bounds_every_rate_and_is_reached_by_the_best_weights() -> None:
    state = encoded(130, 40, seed=4)
    for tile in range(3):
        most = trellis.most_gain(state, tile)
        assert (trellis.deviations(state, tile) >= -1.0001 * most[:, None]).all()
        best = copy.deepcopy(state)
        columns = (best.arrangement.layout.tiles == tile).nonzero()[:, 0]
        inputs = best.arrangement.inputs[columns[:, None], columns]
        best.columns.values[columns] += torch.linalg.solve(inputs, best.slopes[columns])
        best.refresh()
        assert damage_of(state) - damage_of(best) == pytest.approx(float(most.sum()), rel=1e-3)


@pytest.mark.parametrize("rate", range(RATES))
def test_feedback_at_one_rate_has_the_distortion_of_the_rate(rate: int) -> None:
    """Of normal weights and independent inputs; the damage of zero weights is that of rate 0."""
    matrix = weights(128, 64, 7)
    arrangement, factor = arrange(matrix, Curvature(torch.ones(128), torch.eye(64), None))
    rates = torch.full(arrangement.layout.shape, rate, dtype=torch.uint8)
    state = trellis.feedback(arrangement, factor, rates)
    nothing = float(arrangement.energies(factor)[..., 0].sum())
    assert nothing == pytest.approx(0.5 * 1.01 * float(matrix.square().sum()), rel=0.1)
    assert state.damage / nothing <= 1.1 * distortions()[rate]
    if rate <= 5:  # above, the scale is fitted to the few weights that there are
        assert state.damage / nothing >= 0.8 * distortions()[rate]
    if rate == 0:
        assert not state.columns.values.any() and trellis.path_regret(state) == 0


def test_energies_are_the_damage_of_each_tile_alone_for_independent_inputs() -> None:
    matrix, sizes = weights(130, 40, 1), torch.linspace(0.1, 3, 40)
    arrangement, factor = arrange(matrix, Curvature(torch.rand(130) + 0.1, torch.diag(sizes), None))
    energies, layout = arrangement.energies(factor), arrangement.layout
    for group, tile in itertools.product(range(3), range(3)):
        chosen = layout.tiles == tile
        part = arrangement.weights[chosen, 64 * group : 64 * (group + 1)].double()
        expected = float((part.square() * arrangement.inputs.diagonal()[chosen, None]).sum() / 2)
        assert energies[group, tile].tolist() == pytest.approx([expected, expected], rel=1e-4)


def test_energies_of_alike_inputs_are_small_only_if_other_columns_make_up_for_the_tile() -> None:
    arrangement, factor = arrange(weights(130, 40, 1), curvature_of(130, 40, 1))
    energies = arrangement.energies(factor)
    for group, tile in itertools.product(range(3), range(3)):
        error = torch.zeros(arrangement.weights.shape)
        chosen, rows = arrangement.layout.tiles == tile, slice(64 * group, 64 * (group + 1))
        error[chosen, rows] = arrangement.weights[chosen, rows]
        expected = float((error.T @ arrangement.inputs @ error).diagonal().sum() / 2)
        assert float(energies[group, tile, 1]) == pytest.approx(expected, rel=1e-4)
    assert bool((energies[..., 0] < energies[..., 1]).all())


def test_tile_gains_by_more_bits_when_all_tiles_are_erased() -> None:
    """The scale of a column has to suit the weights even if none of them is coded."""
    arrangement, factor = arrange(weights(130, 40, 1), curvature_of(130, 40, 1))
    state = trellis.feedback(arrangement, factor, torch.zeros(arrangement.layout.shape, dtype=torch.uint8))
    assert not state.columns.values.any()
    for tile in range(arrangement.layout.shape[1]):
        gains, most = -trellis.deviations(state, tile).min(1).values, trellis.most_gain(state, tile)
        assert bool((gains > 0.5 * most).all())


@pytest.mark.parametrize("grouping", GROUPINGS)
def test_arrange_again_equals_the_first_arrangement(grouping: Grouping) -> None:
    matrix, curvature = weights(130, 40, 1), curvature_of(130, 40, 1)
    first, _ = arrange(matrix, curvature, grouping, seed=2)
    again = arrange_again(matrix, curvature, first.layout)
    assert torch.allclose(again.weights, first.weights, rtol=1e-5, atol=1e-7)
    assert torch.equal(again.inputs, first.inputs)


@pytest.mark.parametrize("grouping", GROUPINGS)
def test_grouping_depends_on_the_seed_only_if_it_is_random(grouping: Grouping) -> None:
    matrix, curvature = weights(130, 40, 1), curvature_of(130, 40, 1)
    layouts = [arrange(matrix, curvature, grouping, seed=seed)[0].layout for seed in (0, 0, 1)]
    if grouping == "stored":
        assert all(layout.row_order is None and layout.column_order is None for layout in layouts)
        return
    for name in ("row_order", "column_order"):
        first, second, third = (getattr(layout, name) for layout in layouts)
        assert torch.equal(first, second), "the same seed gives the same order"
        assert torch.equal(first, third) == (grouping != "random")


def test_grouping_by_weight_sorts_rows_and_columns() -> None:
    matrix = weights(192, 48, 3) * torch.randn(192, 1, generator=torch.Generator().manual_seed(1)).exp()
    arrangement, factor = arrange(matrix, Curvature(torch.ones(192), torch.eye(48), None), "weight", False)
    by_row = arrangement.weights.square().sum(0)
    assert bool((by_row.diff() <= 1e-4 * by_row.max()).all())
    energies = arrangement.energies(factor)[..., 0]
    assert bool((energies.sum(1).diff() <= 0).all())
    stored = arrange(matrix, Curvature(torch.ones(192), torch.eye(48), None), "stored", False)[0]
    spread, before = (part.energies(factor)[..., 0].sum(1).std() for part in (arrangement, stored))
    assert spread > before


def test_scale_codes_round_to_the_nearest_step() -> None:
    codes = torch.arange(256).to(torch.uint8)
    scales = form.scales(codes, form.COLUMN_STEPS)
    assert torch.equal(trellis.scale_codes(scales), codes)
    assert torch.equal(trellis.scale_codes(scales * 2 ** (0.4 / 16)), codes)
    assert trellis.scale_codes(torch.tensor([0.0, 1e-30, 1e30])).tolist() == [0, 0, 255]
