"""Codes on lattices with and without a rate term, and their regret, against brute force."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nashswarm.quant.curvature import Curvature, factor_curvature
from nashswarm.quant.entropy import table_and_shift
from nashswarm.quant.lattice import LatticeTensor, make_lattice
from nashswarm.quant.lattice_codes import RateTerm, lattice_descent, lattice_error_feedback, regret_by_row
from tests.quant.cases import Case, cases, few_examples, make_case, weights
from tests.quant.laplace import LAPLACE


@given(cases)
@few_examples
def test_regret_by_row_matches_brute_force(case: Case) -> None:
    """The regret of rounded codes is the sum of the best gains of their weights; after descent it is zero."""
    start = (case.weight / case.steps).round()
    rate = RateTerm(LAPLACE, case.price) if case.price else None
    gains = np.zeros(len(start))
    for row, codes in enumerate(start.double().numpy()):
        for column, code in enumerate(codes):
            gains[row] += case.best_gain(row, codes, column, np.arange(code - 9, code + 10))
    regret = regret_by_row(case.weight, LatticeTensor(start.int(), case.lattice), case.curvature, rate)
    slack = 1e-5 * case.costs(start).max()
    assert (regret.numpy() <= (1 + 1e-3) * gains + slack).all()
    assert (regret.numpy() >= (1 - 1e-3) * gains - slack).all()
    tensor = LatticeTensor(case.descend(start).codes.int(), case.lattice)
    unit = (case.curvature.diagonal() * case.steps.square()).sum(1)
    assert (regret_by_row(case.weight, tensor, case.curvature, rate) <= 2e-5 * unit).all()


@given(st.integers(0, 10**6), st.sampled_from([0.0, 1.0, 4.0]), st.sampled_from([0.3, 1.0, 6.0]))
@few_examples
def test_lattice_descent_of_lookups_takes_cheapest_codes(seed: int, price: float, unit: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    weight, sensitivity = weights(5, 4, seed), torch.outer(*(torch.rand(5, generator=generator) + 0.2 for _ in "ab"))
    factored = factor_curvature(Curvature(torch.zeros(5), None, sensitivity[:, :4]))
    lattice = make_lattice(weight, unit, factored.rows, factored.columns)
    case = Case(weight, factored.curvature, lattice, price * unit**2 * np.log(2) / 12 if price else None)
    rate = RateTerm(LAPLACE, case.price) if case.price else None
    rounded = lattice_error_feedback(weight, factored, lattice)
    assert torch.equal(rounded.codes, (weight / case.steps).round().int())
    tensor, result = lattice_descent(weight, rounded, factored.curvature, rate)
    assert result.moves[-1] == 0 and case.worst_gain(tensor.codes) <= 1e-4
    if not price:
        assert torch.equal(tensor.codes, rounded.codes)


def test_lattice_descent_with_higher_price_gives_shorter_codes_and_more_damage() -> None:
    case = make_case(20, 24, 7, unit=1.0)
    factored, lengths, damages = factor_curvature(case.curvature), [], []
    for price in (0.0, 0.3, 1.0, 3.0):
        rate = RateTerm(LAPLACE, price * np.log(2) / 12) if price else None
        tensor, _ = lattice_descent(
            case.weight, lattice_error_feedback(case.weight, factored, case.lattice), case.curvature, rate, 20
        )
        table, shift = table_and_shift(case.lattice.levels())
        symbols = (tensor.codes.abs() >> shift).clamp(max=48)
        lengths.append(LAPLACE.bits()[table.numpy(), symbols.numpy()].sum())
        damages.append(float(case.curvature.damage_by_row(case.weight - tensor.dequantize()).sum()))
    assert lengths == sorted(lengths, reverse=True) and lengths[-1] < 0.995 * lengths[0]
    assert damages[0] == min(damages) and damages[-1] == max(damages)


def test_lattice_descent_ends_below_damage_of_pass_and_rounding() -> None:
    case = make_case(20, 24, 8, unit=1.0)
    factored = factor_curvature(case.curvature)
    rounded = lattice_error_feedback(case.weight, factor_curvature(case.curvature, feedback=False), case.lattice)
    feedback = lattice_error_feedback(case.weight, factored, case.lattice)
    tensor, result = lattice_descent(case.weight, feedback, factored.curvature, None, 50)
    assert torch.equal(rounded.codes, (case.weight / case.steps).round().int())
    damages = [
        factored.curvature.damage_by_row(case.weight - codes.dequantize()) for codes in (tensor, feedback, rounded)
    ]
    assert (damages[0] <= damages[1] * (1 + 1e-5)).all()
    assert damages[0].sum() < 0.98 * damages[1].sum() < 0.8 * damages[2].sum()
    assert result.moves[-1] == 0
    assert sum(result.gains) == pytest.approx(float((damages[1] - damages[0]).sum()), rel=1e-2)


@pytest.mark.parametrize("neighbours", [0, 2, 7])
def test_descent_on_sparse_curvature_never_diverges(neighbours: int) -> None:
    """The inputs are nearly equal, so that masking H without adding to its diagonal would make it indefinite."""
    common = torch.randn(64, 1, generator=torch.Generator().manual_seed(0))
    inputs = common + 0.05 * torch.randn(64, 24, generator=torch.Generator().manual_seed(1))
    full = Curvature(torch.ones(10), inputs.T @ inputs / 64, None)
    sparse, weight = full.keep_top_correlations(neighbours), weights(10, 24, 3)
    lattice = make_lattice(weight, 0.5, torch.ones(10), torch.ones(24))
    start = (weight / 0.5).round()
    case = Case(weight, sparse, lattice)
    result = case.descend(start)
    assert result.moves[-1] == 0
    bound = sparse.damage_by_row(weight - start * case.steps)
    error = weight - result.codes * case.steps
    assert (sparse.damage_by_row(error) <= bound * (1 + 1e-5)).all()
    assert (full.damage_by_row(error) <= sparse.damage_by_row(error) * (1 + 1e-4)).all()
    tensor, _ = lattice_descent(
        weight, lattice_error_feedback(weight, factor_curvature(sparse), lattice), sparse, None, 30
    )
    assert full.damage_by_row(weight - tensor.dequantize()).sum() <= bound.sum()
