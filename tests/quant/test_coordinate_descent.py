"""The codes with which a layer answers: against GPTQ as its paper states it, and against brute force."""

import dataclasses
import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nashswarm.quant.coordinate_descent import DescentResult, coordinate_descent, quantize_layer
from nashswarm.quant.curvature import DAMPING, Curvature, factor_curvature, inverse_cholesky
from nashswarm.quant.entropy import table_and_shift
from nashswarm.quant.error_feedback import Grid, error_feedback_pass
from nashswarm.quant.grid import Scheme, quantize
from nashswarm.quant.lattice import Lattice, LatticeTensor, make_lattice
from nashswarm.quant.lattice_codes import RateTerm, lattice_descent, lattice_error_feedback, regret_by_row
from tests.quant.laplace import LAPLACE

SCHEME = Scheme(8, search=True)
some = settings(max_examples=30, deadline=None)


def correlated(columns: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(200, columns, generator=generator) @ torch.randn(columns, columns, generator=generator)
    return inputs.T @ inputs / 200


def weights(rows: int, columns: int, seed: int) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def gptq(weight: torch.Tensor, bits: int, h: torch.Tensor, diagonal: torch.Tensor) -> np.ndarray:
    """The obvious one: a row, a column and an inverse of the remaining Hessian at a time, in float64."""
    hessian = h.double() + DAMPING * h.double().diagonal().mean() * torch.eye(len(h))
    rest, found = weight.double().clone(), torch.zeros(weight.shape, dtype=torch.float64)
    for column in range(weight.shape[1]):
        if column % SCHEME.group_size == 0:
            group = slice(column, column + SCHEME.group_size)
            grids = quantize(rest[:, group].float(), bits, SCHEME, diagonal[:, group])
        inverse = torch.linalg.inv(hessian[column:, column:])
        scale, zero = grids.scale[:, 0].double(), grids.zero_point[:, 0].double()
        code = ((rest[:, column] / scale).round() + zero).clamp(0, 2**bits - 1)
        found[:, column] = (code - zero) * scale
        error = (rest[:, column] - found[:, column]) / inverse[0, 0]
        rest[:, column:] -= torch.outer(error, inverse[0])
    return found.numpy()


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_quantize_layer_matches_slow_gptq_or_plain_rounding(bits: int) -> None:
    weight, h = weights(24, 32, bits), correlated(32, bits)
    curved = Curvature(torch.ones(24), h, None)
    slow = gptq(weight, bits, h, curved.diagonal())
    plain = quantize(weight, bits, SCHEME, curved.diagonal()).dequantize().numpy()
    answer = quantize_layer(weight, bits, SCHEME, curved).dequantize().numpy()
    either = [min(np.abs(answer[row] - one[row]).max() for one in (slow, plain)) for row in range(24)]
    assert np.quantile(either, 0.9) < 1e-5  # a float32 tie may fall the other way now and then
    assert (np.abs(answer - plain).max(1) > 0).mean() > 0.5


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_quantize_layer_never_exceeds_damage_of_plain_rounding(bits: int) -> None:
    weight, curved = weights(40, 32, 7), Curvature(torch.rand(40) + 0.1, correlated(32, 7), torch.rand(40, 32))
    plain = curved.damage_by_row(weight - quantize(weight, bits, SCHEME, curved.diagonal()).dequantize())
    answer = curved.damage_by_row(weight - quantize_layer(weight, bits, SCHEME, curved).dequantize())
    assert (answer <= plain).all()
    assert answer.sum() < 0.8 * plain.sum()


def test_damage_by_row_equals_written_out_sums() -> None:
    error, h = weights(3, 8, 1), correlated(8, 1)
    curved = Curvature(torch.tensor([1.0, 2.0, 0.5]), h, torch.rand(3, 8))
    for row, found in enumerate(curved.damage_by_row(error).tolist()):
        pairs = itertools.product(range(8), repeat=2)
        products = sum(curved.rows[row] * h[i, j] * error[row, i] * error[row, j] for i, j in pairs)
        lookups = sum(curved.lookups[row, j] * error[row, j] ** 2 for j in range(8))
        assert found == pytest.approx(((products + lookups) / 2).item(), rel=1e-4)


def test_quantize_layer_with_diagonal_curvature_equals_plain_rounding() -> None:
    weight, curved = weights(16, 16, 3), Curvature(torch.ones(16), torch.diag(torch.rand(16) + 0.1), None)
    plain = quantize(weight, 3, SCHEME, curved.diagonal())
    assert torch.equal(quantize_layer(weight, 3, SCHEME, curved).dequantize(), plain.dequantize())


def test_quantize_layer_of_lookups_equals_plain_rounding() -> None:
    weight, curved = weights(16, 16, 4), Curvature(torch.zeros(16), None, torch.rand(16, 16))
    plain = quantize(weight, 3, SCHEME, curved.lookups)
    assert torch.equal(quantize_layer(weight, 3, SCHEME, curved).codes, plain.codes)


def test_quantize_layer_with_pruned_tiles_compensates_in_other_tiles() -> None:
    weight, curved = weights(16, 16, 5), Curvature(torch.ones(16), correlated(16, 5), None)
    widths = torch.tensor([[0, 8]])
    answer = quantize_layer(weight, widths, SCHEME, curved).dequantize()
    plain = quantize(weight, widths, SCHEME, curved.diagonal()).dequantize()
    assert (answer[:, :8] == 0).all()
    assert curved.damage_by_row(weight - answer).sum() < curved.damage_by_row(weight - plain).sum()


def test_quantize_layer_twice_gives_same_codes() -> None:
    weight, curved = weights(16, 16, 6), Curvature(torch.ones(16), correlated(16, 6), None)
    assert torch.equal(quantize_layer(weight, 2, SCHEME, curved).codes, quantize_layer(weight, 2, SCHEME, curved).codes)


@pytest.mark.parametrize("bits", [2, 3])
def test_quantize_layer_with_more_sweeps_lowers_damage_of_every_row(bits: int) -> None:
    """Each row pays less or the same after every further sweep, on the grids of the pass."""
    weight, curved = weights(40, 32, 8), Curvature(torch.rand(40) + 0.1, correlated(32, 8), torch.rand(40, 32))
    answers = [quantize_layer(weight, bits, SCHEME, curved, sweeps) for sweeps in (0, 1, 2, 50)]
    damages = [curved.damped().damage_by_row(weight - answer.dequantize()) for answer in answers]
    for before, after in itertools.pairwise(damages):
        assert (after <= before * (1 + 1e-5)).all()
    assert damages[-1].sum() < 0.95 * damages[0].sum()
    assert all(torch.equal(answer.scale, answers[0].scale) for answer in answers)
    assert all((answer.codes < 2**bits).all() for answer in answers)


def test_act_order_with_sorted_diagonal_equals_stored_order() -> None:
    h = correlated(16, 9)
    order = h.diagonal().argsort(descending=True)
    weight, sorted_h = weights(24, 16, 9), h[order][:, order]
    one_group = Scheme(16, search=True)
    answers = [
        quantize_layer(weight, 3, one_group, Curvature(torch.ones(24), sorted_h, None), act_order=act_order)
        for act_order in (False, True)
    ]
    assert torch.equal(answers[0].codes, answers[1].codes) and torch.equal(answers[0].scale, answers[1].scale)


def test_act_order_equals_pass_over_sorted_columns() -> None:
    weight, h, one_group = weights(24, 16, 10), correlated(16, 10), Scheme(16, search=True)
    order = h.diagonal().argsort(descending=True)
    found = quantize_layer(weight, 3, one_group, Curvature(torch.ones(24), h, None), act_order=True)
    by_hand = quantize_layer(weight[:, order], 3, one_group, Curvature(torch.ones(24), h[order][:, order], None))
    assert (found.codes[:, order] == by_hand.codes).float().mean() > 0.99


def test_quantize_layer_with_large_damping_approaches_plain_rounding() -> None:
    weight, curved = weights(16, 16, 11), Curvature(torch.ones(16), correlated(16, 11), None)
    plain = quantize(weight, 3, SCHEME, curved.diagonal())
    assert not torch.equal(quantize_layer(weight, 3, SCHEME, curved).codes, plain.codes)
    assert (quantize_layer(weight, 3, SCHEME, curved, damping=1e6).codes == plain.codes).float().mean() > 0.99


# On lattices.


@dataclasses.dataclass(frozen=True)
class Case:
    """A matrix, its curvature, a lattice, and perhaps the price of a bit."""

    weight: torch.Tensor
    curvature: Curvature
    lattice: Lattice
    price: float | None = None

    @property
    def steps(self) -> torch.Tensor:
        return self.lattice.row_steps()[:, None] * self.lattice.column_steps()

    def grid_of(self, columns: torch.Tensor, current: torch.Tensor) -> Grid:
        if self.price is None:
            return Grid(self.steps[:, columns])
        table, shift = table_and_shift(self.lattice.levels(columns))
        prices = self.price * torch.from_numpy(LAPLACE.bits()).float()
        return Grid(self.steps[:, columns], symbol_price=prices, table=table, shift=shift, sign_price=self.price)

    def settle(self, codes: torch.Tensor, sweeps: int = 100) -> DescentResult:
        return coordinate_descent(self.weight, codes, self.curvature, self.grid_of, sweeps)

    def cost(self, row: int, codes: np.ndarray) -> float:
        """Of one row in float64: the quadratic form written out, and the length of every code."""
        error = self.weight[row].double().numpy() - codes * self.steps[row].double().numpy()
        total = 0.0
        if self.curvature.inputs is not None:
            total += self.curvature.rows[row].item() * (error @ self.curvature.inputs.double().numpy() @ error) / 2
        if self.curvature.lookups is not None:
            total += (self.curvature.lookups[row].double().numpy() * error**2).sum() / 2
        if self.price is not None:
            for column, code in enumerate(codes):
                table, shift = (int(part) for part in table_and_shift(self.lattice.levels()[row, column]))
                symbol = int(abs(code)) >> shift
                total += self.price * (LAPLACE.bits()[table, min(symbol, 48)] + bool(code and not symbol and shift))
        return float(total)

    def costs(self, codes: torch.Tensor) -> np.ndarray:
        return np.array([self.cost(row, own) for row, own in enumerate(codes.double().numpy())])

    def worst_gain(self, codes: torch.Tensor, reach: int = 6) -> float:
        """The largest gain of any weight by any code near its own or near 0, as a share of what one step costs it."""
        worst = 0.0
        for row, own in enumerate(codes.double().numpy()):
            before = self.cost(row, own)
            for column in range(len(own)):
                unit = self.curvature.diagonal()[row, column].item() * self.steps[row, column].item() ** 2
                for code in {*np.arange(own[column] - reach, own[column] + reach + 1), 0.0}:
                    moved = own.copy()
                    moved[column] = code
                    worst = max(worst, (before - self.cost(row, moved)) / unit)
        return worst


def case(rows: int, columns: int, seed: int, unit: float = 0.5, lookups: bool = False, price: float = 0.0) -> Case:
    """``price``: in units of what a bit is worth at high rate."""
    generator = torch.Generator().manual_seed(seed)
    curvature = Curvature(
        torch.rand(rows, generator=generator) + 0.2,
        correlated(columns, seed) + 0.05 * torch.eye(columns),
        torch.rand(rows, columns, generator=generator) if lookups else None,
    )
    weight, whitened = weights(rows, columns, seed), factor_curvature(curvature)
    lattice = make_lattice(weight, unit, whitened.rows, whitened.columns)
    return Case(weight, curvature, lattice, price * unit**2 * np.log(2) / 12 if price else None)


cases = st.builds(
    case,
    st.integers(1, 4),
    st.integers(1, 5),
    st.integers(0, 10**6),
    st.sampled_from([0.1, 0.7, 3.0]),
    st.booleans(),
    st.sampled_from([0.0, 0.5, 1.0, 3.0]),
)


def slow_pass(weight: torch.Tensor, h: torch.Tensor, steps: torch.Tensor) -> np.ndarray:
    """GPTQ on a lattice: a column at a time, the inverse of the remaining Hessian every time, in float64."""
    rest, h, codes = weight.double().numpy().copy(), h.double().numpy(), np.zeros(weight.shape)
    for column in range(weight.shape[1]):
        inverse = np.linalg.inv(h[column:, column:])
        codes[:, column] = np.round(rest[:, column] / steps[:, column].double().numpy())
        error = rest[:, column] - codes[:, column] * steps[:, column].double().numpy()
        rest[:, column:] -= np.outer(error, inverse[0] / inverse[0, 0])
    return codes


@pytest.mark.parametrize("block", [1, 7, 64])
def test_error_feedback_pass_on_fine_lattice_matches_slow_gptq(block: int) -> None:
    one = case(30, 40, 1, unit=0.05)
    inputs = one.curvature.inputs
    found = error_feedback_pass(one.weight, inverse_cholesky(inputs), one.grid_of, block)
    slow = torch.from_numpy(slow_pass(one.weight, inputs, one.steps)).float()
    same = (found == slow).all(1)
    assert same.float().mean() >= 0.9  # a float32 tie may fall the other way, and the rest of its row answers
    assert one.costs(found) == pytest.approx(one.costs(slow), rel=0.2)
    assert one.costs(found).sum() < 0.7 * one.costs((one.weight / one.steps).round()).sum()


def test_error_feedback_pass_with_order_equals_pass_over_permuted_columns() -> None:
    one = case(30, 20, 2, unit=0.2)
    order = torch.randperm(20, generator=torch.Generator().manual_seed(0))
    permuted = one.curvature.inputs[order][:, order]
    found = error_feedback_pass(one.weight, inverse_cholesky(permuted), one.grid_of, 8, order)
    slow = slow_pass(one.weight[:, order], permuted, one.steps[:, order])
    assert (found[:, order].numpy() == slow).all(1).mean() >= 0.9


def test_inverse_cholesky_diagonal_is_cost_after_compensation() -> None:
    h = correlated(12, 3) + 0.05 * torch.eye(12)
    found = 1 / inverse_cholesky(h).diagonal().square()
    for column in range(12):
        near, far = h[column, column].double(), h[column, column + 1 :].double()
        left = near - far @ torch.linalg.pinv(h[column + 1 :, column + 1 :].double()) @ far
        assert found[column].item() == pytest.approx(left.item(), rel=1e-3)


@given(cases)
@some
def test_descent_result_leaves_no_weight_a_better_code(one: Case) -> None:
    start = (one.weight / one.steps).round()
    settled = one.settle(start)
    assert settled.moves[-1] == 0 and len(settled.moves) < 100
    assert one.worst_gain(settled.codes) <= 2e-5


@given(cases)
@some
def test_descent_sweep_never_raises_cost_of_a_row(one: Case) -> None:
    start = torch.zeros_like(one.weight)
    end = one.settle(start)
    costs = [one.costs(start)]
    for sweeps in range(1, len(end.moves) + 1):
        part = one.settle(start, sweeps)
        assert part.moves == end.moves[:sweeps]
        costs.append(one.costs(part.codes))
        assert (costs[-1] <= costs[-2] * (1 + 1e-5)).all()
        gained = costs[-2].sum() - costs[-1].sum()
        assert part.gains[-1] == pytest.approx(gained, rel=1e-3, abs=1e-5 * costs[0].sum())
    assert torch.equal(part.codes, end.codes)


@given(cases)
@some
def test_descent_is_deterministic_and_idempotent(one: Case) -> None:
    start = (one.weight / one.steps).round()
    once, again = one.settle(start), one.settle(start)
    assert torch.equal(once.codes, again.codes) and once.moves == again.moves and once.gains == again.gains
    rested = one.settle(once.codes)
    assert torch.equal(rested.codes, once.codes) and not any(rested.moves)


def test_descent_with_zero_sweeps_returns_start() -> None:
    one = case(3, 4, 0)
    assert torch.equal(one.settle(torch.zeros(3, 4), 0).codes, torch.zeros(3, 4))


@pytest.mark.parametrize("columns", [2, 3])
@pytest.mark.parametrize("lookups", [False, True])
@pytest.mark.parametrize("price", [0.0, 2.0])
def test_descent_result_is_equilibrium_of_exhaustive_search(
    columns: int, lookups: bool, price: float
) -> None:
    one = case(6, columns, 5, unit=1.5, lookups=lookups, price=price)
    settled = one.settle((one.weight / one.steps).round())
    best = []
    for row, found in enumerate(settled.codes.double().numpy()):
        profiles = {
            codes: one.cost(row, np.array(codes))
            for codes in itertools.product(*(range(int(code) - 4, int(code) + 5) for code in found))
        }
        slack = 3e-5 * profiles[tuple(found)]

        def stays(codes: tuple[float, ...], profiles: dict = profiles, slack: float = slack) -> bool:
            others = (
                (*codes[:at], code, *codes[at + 1 :])
                for at in range(columns)
                for code in {other[at] for other in profiles}
            )
            return all(profiles[codes] <= profiles[other] + slack for other in others)

        equilibria = {codes for codes in profiles if stays(codes)}
        assert tuple(found) in equilibria
        best.append(min(profiles, key=lambda codes: profiles[codes]))
        assert best[-1] in equilibria
    optimum = torch.tensor(best).float()
    assert (one.costs(optimum) <= one.costs(settled.codes)).all()
    assert torch.equal(one.settle(optimum).codes, optimum)  # the best profile is an equilibrium that nobody leaves


@given(cases)
@some
def test_regret_by_row_matches_brute_force(one: Case) -> None:
    """Before: what every weight would gain alone, added up.  After: nothing."""
    start = (one.weight / one.steps).round()
    rate = RateTerm(LAPLACE, one.price) if one.price else None
    gains = np.zeros(len(start))
    for row, own in enumerate(start.double().numpy()):
        for column in range(len(own)):
            alternatives = []
            for code in range(int(own[column]) - 9, int(own[column]) + 10):
                moved = own.copy()
                moved[column] = code
                alternatives.append(one.cost(row, moved))
            gains[row] += one.cost(row, own) - min(alternatives)
    found = regret_by_row(one.weight, LatticeTensor(start.int(), one.lattice), one.curvature, rate)
    slack = 1e-5 * one.costs(start).max()
    assert (found.numpy() <= (1 + 1e-3) * gains + slack).all()
    assert (found.numpy() >= (1 - 1e-3) * gains - slack).all()
    settled = LatticeTensor(one.settle(start).codes.int(), one.lattice)
    unit = (one.curvature.diagonal() * one.steps.square()).sum(1)
    assert (regret_by_row(one.weight, settled, one.curvature, rate) <= 2e-5 * unit).all()


@given(st.integers(0, 10**6), st.sampled_from([0.0, 1.0, 4.0]), st.sampled_from([0.3, 1.0, 6.0]))
@some
def test_lattice_descent_of_lookups_takes_cheapest_codes(seed: int, price: float, unit: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    weight, sensitivity = weights(5, 4, seed), torch.outer(*(torch.rand(5, generator=generator) + 0.2 for _ in "ab"))
    whitened = factor_curvature(Curvature(torch.zeros(5), None, sensitivity[:, :4]))
    lattice = make_lattice(weight, unit, whitened.rows, whitened.columns)
    one = Case(weight, whitened.curvature, lattice, price * unit**2 * np.log(2) / 12 if price else None)
    rate = RateTerm(LAPLACE, one.price) if one.price else None
    answer = lattice_error_feedback(weight, whitened, lattice)
    assert torch.equal(answer.codes, (weight / one.steps).round().int())
    settled, found = lattice_descent(weight, answer, whitened.curvature, rate)
    assert found.moves[-1] == 0 and one.worst_gain(settled.codes) <= 1e-4
    if not price:
        assert torch.equal(settled.codes, answer.codes)


def test_lattice_descent_with_higher_price_gives_shorter_codes_and_more_damage() -> None:
    one = case(20, 24, 7, unit=1.0)
    whitened, lengths, damages = factor_curvature(one.curvature), [], []
    for price in (0.0, 0.3, 1.0, 3.0):
        rate = RateTerm(LAPLACE, price * np.log(2) / 12) if price else None
        answer, _ = lattice_descent(
            one.weight, lattice_error_feedback(one.weight, whitened, one.lattice), one.curvature, rate, 20
        )
        table, shift = table_and_shift(one.lattice.levels())
        symbols = (answer.codes.abs() >> shift).clamp(max=48)
        lengths.append(LAPLACE.bits()[table.numpy(), symbols.numpy()].sum())
        damages.append(float(one.curvature.damage_by_row(one.weight - answer.dequantize()).sum()))
    assert lengths == sorted(lengths, reverse=True) and lengths[-1] < 0.995 * lengths[0]
    assert damages[0] == min(damages) and damages[-1] == max(damages)


def test_lattice_descent_ends_below_damage_of_pass_and_rounding() -> None:
    one = case(20, 24, 8, unit=1.0)
    whitened = factor_curvature(one.curvature)
    rounded = lattice_error_feedback(one.weight, factor_curvature(one.curvature, feedback=False), one.lattice)
    passed = lattice_error_feedback(one.weight, whitened, one.lattice)
    settled, found = lattice_descent(one.weight, passed, whitened.curvature, None, 50)
    assert torch.equal(rounded.codes, (one.weight / one.steps).round().int())
    damages = [whitened.curvature.damage_by_row(one.weight - each.dequantize()) for each in (settled, passed, rounded)]
    assert (damages[0] <= damages[1] * (1 + 1e-5)).all()
    assert damages[0].sum() < 0.98 * damages[1].sum() < 0.8 * damages[2].sum()
    assert found.moves[-1] == 0
    assert sum(found.gains) == pytest.approx(float((damages[1] - damages[0]).sum()), rel=1e-2)


# The local reply of the flock.


@given(st.integers(2, 24), st.integers(0, 24), st.integers(0, 10**6))
@some
def test_keep_top_correlations_is_sparse_symmetric_and_at_least_full_curvature(size: int, near: int, seed: int) -> None:
    curved = Curvature(torch.ones(3), correlated(size, seed), None)
    local, whole = curved.keep_top_correlations(near).inputs.double(), curved.inputs.double()
    torch.testing.assert_close(local, local.T, rtol=1e-5, atol=1e-5)
    scale = whole.diagonal().max()
    assert torch.linalg.eigvalsh(local).min() >= -1e-5 * scale
    assert torch.linalg.eigvalsh(local - whole).min() >= -1e-5 * scale
    if near >= size - 1:
        assert torch.equal(local, whole)
    links = (local != 0).sum().item() - size
    assert links <= 2 * near * size
    if near == 0:
        torch.testing.assert_close(local, torch.diag(whole.abs().sum(1)), rtol=1e-5, atol=0)


def test_keep_top_correlations_keeps_largest_correlations() -> None:
    h = correlated(12, 4)
    size = h.diagonal().sqrt()
    correlation = (h / torch.outer(size, size)).abs().fill_diagonal_(0)
    local = Curvature(torch.ones(1), h, None).keep_top_correlations(3).inputs
    for column in range(12):
        for near in correlation[column].argsort(descending=True)[:3].tolist():
            assert local[column, near] == h[column, near] and local[near, column] == h[near, column]


@pytest.mark.parametrize("near", [0, 2, 7])
def test_descent_on_sparse_curvature_never_diverges(near: int) -> None:
    """Inputs almost all alike: masking H alone would make it indefinite."""
    shared = torch.randn(64, 1, generator=torch.Generator().manual_seed(0))
    inputs = shared + 0.05 * torch.randn(64, 24, generator=torch.Generator().manual_seed(1))
    whole = Curvature(torch.ones(10), inputs.T @ inputs / 64, None)
    local, weight = whole.keep_top_correlations(near), weights(10, 24, 3)
    lattice = make_lattice(weight, 0.5, torch.ones(10), torch.ones(24))
    start = (weight / 0.5).round()
    one = Case(weight, local, lattice)
    settled = one.settle(start)
    assert settled.moves[-1] == 0
    bound = local.damage_by_row(weight - start * one.steps)
    error = weight - settled.codes * one.steps
    assert (local.damage_by_row(error) <= bound * (1 + 1e-5)).all()
    assert (whole.damage_by_row(error) <= local.damage_by_row(error) * (1 + 1e-4)).all()
    answer, _ = lattice_descent(
        weight, lattice_error_feedback(weight, factor_curvature(local), lattice), local, None, 30
    )
    assert whole.damage_by_row(weight - answer.dequantize()).sum() <= bound.sum()
