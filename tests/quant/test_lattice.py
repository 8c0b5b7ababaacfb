"""Lattices: dequantization, steps from sensitivities, and expected magnitudes."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nashswarm.quant.lattice import MIN_MAGNITUDE, Lattice, LatticeTensor, bit_price, make_lattice, stack_rows

few_examples = settings(max_examples=25, deadline=None)
EIGHTH = 1 / 8 + 1e-4  # of an octave: half a step of a scale, for rows and for columns


def random_lattice(rows: int, columns: int, seed: int = 0, base: float = 0.25) -> Lattice:
    rng = np.random.default_rng(seed)
    return Lattice(
        base, *(torch.from_numpy(rng.integers(-20, 21, size).astype(np.int8)) for size in (rows, columns) * 2)
    )


@given(st.integers(1, 20), st.integers(1, 20), st.integers(0, 99))
@few_examples
def test_dequantize_is_code_times_three_factors(rows: int, columns: int, seed: int) -> None:
    lattice = random_lattice(rows, columns, seed)
    codes = torch.randint(-50, 51, (rows, columns), generator=torch.Generator().manual_seed(seed))
    weight = LatticeTensor(codes, lattice).dequantize()
    assert weight.dtype == torch.float32
    for row in range(rows):
        for column in range(columns):
            scale = lattice.row_scale[row].item() + lattice.column_scale[column].item()
            by_hand = codes[row, column].item() * 0.25 * 2.0 ** (scale / 4)
            assert weight[row, column].item() == pytest.approx(by_hand, rel=1e-6)


def sensitivities(count: int, seed: int, spread: float) -> torch.Tensor:
    return (spread * torch.randn(count, generator=torch.Generator().manual_seed(seed))).exp()


@given(st.integers(1, 40), st.integers(1, 40), st.integers(0, 999), st.floats(0, 3), st.floats(1e-5, 1e3))
@few_examples
def test_make_lattice_steps_equalize_cost_of_errors(
    rows: int, columns: int, seed: int, spread: float, unit: float
) -> None:
    """Steps are proportional to 1/√(a κ), within an eighth of an octave for the row and for the column."""
    a, kappa = sensitivities(rows, seed, spread), sensitivities(columns, seed + 1, spread)
    lattice = make_lattice(torch.randn(rows, columns), unit, a, kappa)
    for row, step in enumerate(lattice.row_steps().tolist()):
        wanted = lattice.row_steps()[0].item() * math.sqrt(a[0].item() / a[row].item())
        assert abs(math.log2(step / wanted)) <= 2 * EIGHTH
    for row, by_row in enumerate(lattice.row_steps().tolist()):
        for column, by_column in enumerate(lattice.column_steps().tolist()):
            wanted = unit / math.sqrt(a[row].item() * kappa[column].item())
            assert abs(math.log2(by_row * by_column / wanted)) <= 2 * EIGHTH


@given(st.integers(0, 999), st.sampled_from(["rows", "columns"]))
@few_examples
def test_make_lattice_with_one_varied_side_is_within_rounding(seed: int, side: str) -> None:
    varied, same = sensitivities(30, seed, 2.0), torch.ones(7)
    if side == "rows":
        steps = make_lattice(torch.randn(30, 7), 0.01, varied, same).row_steps()
    else:
        lattice = make_lattice(torch.randn(7, 30), 0.01, same, varied)
        steps = lattice.column_steps() * lattice.row_steps()[0]
    assert (torch.log2(steps * varied.sqrt() / 0.01).abs() <= EIGHTH).all()


def test_make_lattice_with_zero_sensitivity_uses_least_positive() -> None:
    weight = torch.randn(4, 3)
    lattice = make_lattice(weight, 1.0, torch.tensor([4.0, 0.0, 1.0, 16.0]), torch.tensor([1.0, 0.0, 64.0]))
    steps = lattice.row_steps()[:, None] * lattice.column_steps()
    assert torch.allclose(steps, torch.tensor([[0.5], [1], [1], [0.25]]) * torch.tensor([1, 1, 0.125]))
    assert make_lattice(weight, 1.0, torch.zeros(4), torch.zeros(3)).row_steps().tolist() == [1.0] * 4


def test_make_lattice_with_any_scale_fits_int8() -> None:
    """Exponents are relative to the median, so only sensitivities that differ from it by more than 2³² saturate."""
    for scale in (1e-25, 1e-10, 1.0, 1e10):
        lattice = make_lattice(torch.ones(3, 1), 1e-3, scale * torch.tensor([1e-3, 1.0, 1e3]), torch.ones(1))
        ideal = 1e-3 / (scale * torch.tensor([1e-3, 1.0, 1e3])).sqrt()
        assert (torch.log2(lattice.row_steps() * lattice.column_steps() / ideal).abs() <= EIGHTH).all()


@given(st.integers(1, 12), st.integers(1, 12), st.integers(0, 99))
@few_examples
def test_levels_match_hand_computation(rows: int, columns: int, seed: int) -> None:
    """A level is the sum of the sizes, minus the exponent of the step, in half octaves."""
    lattice = random_lattice(rows, columns, seed)
    sides = [getattr(lattice, name).tolist() for name in ("row_scale", "column_scale", "row_size", "column_size")]
    levels = lattice.levels()
    for row in range(rows):
        for column in range(columns):
            by_hand = sides[2][row] + sides[3][column] - math.floor((sides[0][row] + sides[1][column]) / 2)
            assert levels[row, column].item() == by_hand
    chosen = torch.arange(columns - 1, -1, -1)
    assert torch.equal(lattice.levels(chosen), levels.flip(1))
    assert torch.equal(lattice.levels(slice(columns // 2, None)), levels[:, columns // 2 :])


@given(st.integers(0, 999), st.floats(0.1, 50))
@few_examples
def test_fit_sizes_levels_match_factored_magnitudes(seed: int, typical: float) -> None:
    """With magnitudes that factor into rows and columns, levels are right up to rounding, for steps of any size."""
    generator = torch.Generator().manual_seed(seed)
    lattice = random_lattice(20, 30, seed)
    by_row, by_column = (torch.randn(size, generator=generator).exp2() for size in (20, 30))
    magnitudes = typical * torch.outer(by_row / by_row.mean(), by_column / by_column.mean())
    levels = lattice.fit_sizes(magnitudes).levels()
    sides = [2 * (magnitudes.mean(axes, keepdim=True) + MIN_MAGNITUDE).log2() for axes in (1, 0, (0, 1))]
    assert ((levels - (sides[0] + sides[1] - sides[2])).abs() <= 2).all()  # three roundings by a half, a floor by one
    if typical >= 1:  # below, the smallest magnitude affects all three means
        expected = 2 * (magnitudes + MIN_MAGNITUDE).log2()
        assert ((levels - expected).abs() <= 2.25).all()
        assert (levels - expected).mean().abs() < 0.6


def test_make_lattice_levels_match_mean_magnitudes_of_rows() -> None:
    generator = torch.Generator().manual_seed(3)
    weight = torch.randn(200, 300, generator=generator) * torch.randn(200, 1, generator=generator).exp()
    lattice = make_lattice(weight, 0.02, sensitivities(200, 1, 1.0), sensitivities(300, 2, 1.0))
    steps = lattice.row_steps()[:, None] * lattice.column_steps()
    means = (weight / steps).abs().mean(1, keepdim=True)
    expected = 2.0 ** (lattice.levels() / 2)
    assert ((expected.mean(1, keepdim=True) / means).log2().abs() < 1).all()


def test_make_lattice_with_zero_rows_has_low_finite_levels() -> None:
    weight = torch.randn(5, 6)
    weight[2], weight[:, 3] = 0, 0
    levels = make_lattice(weight, 1e-2, torch.ones(5), torch.ones(6)).levels()
    assert (levels[2, [0, 1, 2, 4, 5]] < levels[0, [0, 1, 2, 4, 5]] - 10).all()
    assert (levels[[0, 1, 3, 4], 3] < levels[[0, 1, 3, 4], 0] - 10).all()
    assert (make_lattice(torch.zeros(5, 6), 1.0, torch.ones(5), torch.ones(6)).levels() <= -13).all()


def test_stack_rows_concatenates_rows() -> None:
    parts = [random_lattice(rows, 7, rows) for rows in (3, 1, 4)]
    parts = [Lattice(0.25, p.row_scale, parts[0].column_scale, p.row_size, parts[0].column_size) for p in parts]
    whole = stack_rows(parts)
    codes = torch.randint(-9, 10, (8, 7))
    by_part = [LatticeTensor(one, part).dequantize() for one, part in zip(codes.split([3, 1, 4]), parts, strict=True)]
    assert torch.equal(LatticeTensor(codes, whole).dequantize(), torch.cat(by_part))
    assert torch.equal(whole.levels(), torch.cat([part.levels() for part in parts]))


@pytest.mark.parametrize("unit", [1e-4, 0.3, 7.0])
def test_bit_price_is_slope_of_damage(unit: float) -> None:
    """The price of a bit is the slope of D(R) = unit² / 24 · 4^(-R) at R = 0."""
    assert bit_price(unit) == pytest.approx((unit**2 / 24) * math.log(4))
    smaller = (unit**2 / 24) * 4.0**-1e-6
    assert bit_price(unit) == pytest.approx((unit**2 / 24 - smaller) / 1e-6, rel=1e-5)


def test_rounding_on_fine_lattice_has_damage_of_theory() -> None:
    """With fine steps, the damage of a weight is unit² / 24, whatever its sensitivity."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(100, 400, generator=generator)
    a, kappa = sensitivities(100, 5, 1.0), sensitivities(400, 6, 1.0)
    lattice = make_lattice(weight, 1e-3, a, kappa)
    steps = lattice.row_steps()[:, None] * lattice.column_steps()
    tensor = LatticeTensor((weight / steps).round().int(), lattice)
    damage = torch.outer(a, kappa) * (weight - tensor.dequantize()).square() / 2
    assert damage.mean().item() == pytest.approx(1e-6 / 24, rel=0.05)
