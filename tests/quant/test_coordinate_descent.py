"""Error feedback, coordinate descent and regret: against GPTQ as its paper states it, and against brute force."""

import dataclasses
import functools
import itertools
from collections.abc import Iterable

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
LAPLACE_BITS = LAPLACE.bits()
few_examples = settings(max_examples=30, deadline=None)


def correlated(columns: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(200, columns, generator=generator) @ torch.randn(columns, columns, generator=generator)
    return inputs.T @ inputs / 200


def weights(rows: int, columns: int, seed: int) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def gptq(weight: torch.Tensor, bits: int, h: torch.Tensor, diagonal: torch.Tensor) -> np.ndarray:
    """Quantize as in the GPTQ paper, inverting the remaining Hessian for each column, in float64."""
    hessian = h.double() + DAMPING * h.double().diagonal().mean() * torch.eye(len(h))
    remaining, quantized = weight.double().clone(), torch.zeros(weight.shape, dtype=torch.float64)
    for column in range(weight.shape[1]):
        if column % SCHEME.group_size == 0:
            group = slice(column, column + SCHEME.group_size)
            grids = quantize(remaining[:, group].float(), bits, SCHEME, diagonal[:, group])
        inverse = torch.linalg.inv(hessian[column:, column:])
        scale, zero = grids.scale[:, 0].double(), grids.zero_point[:, 0].double()
        code = ((remaining[:, column] / scale).round() + zero).clamp(0, 2**bits - 1)
        quantized[:, column] = (code - zero) * scale
        error = (remaining[:, column] - quantized[:, column]) / inverse[0, 0]
        remaining[:, column:] -= torch.outer(error, inverse[0])
    return quantized.numpy()


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_quantize_layer_matches_slow_gptq_or_plain_rounding(bits: int) -> None:
    weight, h = weights(24, 32, bits), correlated(32, bits)
    curvature = Curvature(torch.ones(24), h, None)
    by_hand = gptq(weight, bits, h, curvature.diagonal())
    plain = quantize(weight, bits, SCHEME, curvature.diagonal()).dequantize().numpy()
    quantized = quantize_layer(weight, bits, SCHEME, curvature).dequantize().numpy()
    distance = [min(np.abs(quantized[row] - other[row]).max() for other in (by_hand, plain)) for row in range(24)]
    assert np.quantile(distance, 0.9) < 1e-5  # float32 ties may round the other way
    assert (np.abs(quantized - plain).max(1) > 0).mean() > 0.5


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_quantize_layer_never_exceeds_damage_of_plain_rounding(bits: int) -> None:
    weight, curvature = weights(40, 32, 7), Curvature(torch.rand(40) + 0.1, correlated(32, 7), torch.rand(40, 32))
    plain_damage = curvature.damage_by_row(weight - quantize(weight, bits, SCHEME, curvature.diagonal()).dequantize())
    damage = curvature.damage_by_row(weight - quantize_layer(weight, bits, SCHEME, curvature).dequantize())
    assert (damage <= plain_damage).all()
    assert damage.sum() < 0.8 * plain_damage.sum()


def test_damage_by_row_equals_written_out_sums() -> None:
    error, h = weights(3, 8, 1), correlated(8, 1)
    curvature = Curvature(torch.tensor([1.0, 2.0, 0.5]), h, torch.rand(3, 8))
    for row, damage in enumerate(curvature.damage_by_row(error).tolist()):
        pairs = itertools.product(range(8), repeat=2)
        products = sum(curvature.rows[row] * h[i, j] * error[row, i] * error[row, j] for i, j in pairs)
        lookups = sum(curvature.lookups[row, j] * error[row, j] ** 2 for j in range(8))
        assert damage == pytest.approx(((products + lookups) / 2).item(), rel=1e-4)


def test_quantize_layer_with_diagonal_curvature_equals_plain_rounding() -> None:
    weight, curvature = weights(16, 16, 3), Curvature(torch.ones(16), torch.diag(torch.rand(16) + 0.1), None)
    plain = quantize(weight, 3, SCHEME, curvature.diagonal())
    assert torch.equal(quantize_layer(weight, 3, SCHEME, curvature).dequantize(), plain.dequantize())


def test_quantize_layer_of_lookups_equals_plain_rounding() -> None:
    weight, curvature = weights(16, 16, 4), Curvature(torch.zeros(16), None, torch.rand(16, 16))
    plain = quantize(weight, 3, SCHEME, curvature.lookups)
    assert torch.equal(quantize_layer(weight, 3, SCHEME, curvature).codes, plain.codes)


def test_quantize_layer_with_pruned_tiles_compensates_in_other_tiles() -> None:
    weight, curvature = weights(16, 16, 5), Curvature(torch.ones(16), correlated(16, 5), None)
    widths = torch.tensor([[0, 8]])
    quantized = quantize_layer(weight, widths, SCHEME, curvature).dequantize()
    plain = quantize(weight, widths, SCHEME, curvature.diagonal()).dequantize()
    assert (quantized[:, :8] == 0).all()
    assert curvature.damage_by_row(weight - quantized).sum() < curvature.damage_by_row(weight - plain).sum()


def test_quantize_layer_twice_gives_same_codes() -> None:
    weight, curvature = weights(16, 16, 6), Curvature(torch.ones(16), correlated(16, 6), None)
    assert torch.equal(
        quantize_layer(weight, 2, SCHEME, curvature).codes, quantize_layer(weight, 2, SCHEME, curvature).codes
    )


@pytest.mark.parametrize("bits", [2, 3])
def test_quantize_layer_with_more_sweeps_lowers_damage_of_every_row(bits: int) -> None:
    """No further sweep raises the damage of a row, and the grids stay those of the pass."""
    weight, curvature = weights(40, 32, 8), Curvature(torch.rand(40) + 0.1, correlated(32, 8), torch.rand(40, 32))
    tensors = [quantize_layer(weight, bits, SCHEME, curvature, sweeps) for sweeps in (0, 1, 2, 50)]
    damages = [curvature.damped().damage_by_row(weight - tensor.dequantize()) for tensor in tensors]
    for before, after in itertools.pairwise(damages):
        assert (after <= before * (1 + 1e-5)).all()
    assert damages[-1].sum() < 0.95 * damages[0].sum()
    assert all(torch.equal(tensor.scale, tensors[0].scale) for tensor in tensors)
    assert all((tensor.codes < 2**bits).all() for tensor in tensors)


def test_act_order_with_sorted_diagonal_equals_stored_order() -> None:
    inputs = correlated(16, 9)
    order = inputs.diagonal().argsort(descending=True)
    weight, sorted_inputs = weights(24, 16, 9), inputs[order][:, order]
    one_group = Scheme(16, search=True)
    tensors = [
        quantize_layer(weight, 3, one_group, Curvature(torch.ones(24), sorted_inputs, None), act_order=act_order)
        for act_order in (False, True)
    ]
    assert torch.equal(tensors[0].codes, tensors[1].codes) and torch.equal(tensors[0].scale, tensors[1].scale)


def test_act_order_equals_pass_over_sorted_columns() -> None:
    weight, inputs, one_group = weights(24, 16, 10), correlated(16, 10), Scheme(16, search=True)
    order = inputs.diagonal().argsort(descending=True)
    tensor = quantize_layer(weight, 3, one_group, Curvature(torch.ones(24), inputs, None), act_order=True)
    by_hand = quantize_layer(weight[:, order], 3, one_group, Curvature(torch.ones(24), inputs[order][:, order], None))
    assert (tensor.codes[:, order] == by_hand.codes).float().mean() > 0.99


def test_quantize_layer_with_large_damping_approaches_plain_rounding() -> None:
    weight, curvature = weights(16, 16, 11), Curvature(torch.ones(16), correlated(16, 11), None)
    plain = quantize(weight, 3, SCHEME, curvature.diagonal())
    assert not torch.equal(quantize_layer(weight, 3, SCHEME, curvature).codes, plain.codes)
    assert (quantize_layer(weight, 3, SCHEME, curvature, damping=1e6).codes == plain.codes).float().mean() > 0.99


# On lattices.


@dataclasses.dataclass(frozen=True)
class Case:
    """A matrix, its curvature, a lattice, and perhaps the price of a bit."""

    weight: torch.Tensor
    curvature: Curvature
    lattice: Lattice
    price: float | None = None

    @functools.cached_property
    def steps(self) -> torch.Tensor:
        return self.lattice.row_steps()[:, None] * self.lattice.column_steps()

    @functools.cached_property
    def tables_and_shifts(self) -> tuple[np.ndarray, np.ndarray]:
        table, shift = table_and_shift(self.lattice.levels())
        return table.numpy(), shift.numpy()

    def make_grid(self, columns: torch.Tensor, current: torch.Tensor) -> Grid:
        if self.price is None:
            return Grid(self.steps[:, columns])
        table, shift = table_and_shift(self.lattice.levels(columns))
        prices = self.price * torch.from_numpy(LAPLACE.bits()).float()
        return Grid(self.steps[:, columns], symbol_price=prices, table=table, shift=shift, sign_price=self.price)

    def descend(self, codes: torch.Tensor, sweeps: int = 100) -> DescentResult:
        return coordinate_descent(self.weight, codes, self.curvature, self.make_grid, sweeps)

    def cost(self, row: int, codes: np.ndarray) -> np.ndarray:
        """Cost of one row for any number of code vectors, in float64: the quadratic form and the length of codes."""
        error = self.weight[row].double().numpy() - codes * self.steps[row].double().numpy()
        total = np.zeros(codes.shape[:-1])
        if self.curvature.inputs is not None:
            products = (error @ self.curvature.inputs.double().numpy()) * error
            total += self.curvature.rows[row].item() * products.sum(-1) / 2
        if self.curvature.lookups is not None:
            total += (self.curvature.lookups[row].double().numpy() * error**2).sum(-1) / 2
        if self.price is not None:
            table, shift = (part[row] for part in self.tables_and_shifts)
            symbols = np.abs(codes).astype(int) >> shift
            separate_sign = (codes != 0) & (symbols == 0)
            total += self.price * (LAPLACE_BITS[table, np.minimum(symbols, 48)] + separate_sign).sum(-1)
        return total

    def costs(self, codes: torch.Tensor) -> np.ndarray:
        return np.array([self.cost(row, row_codes) for row, row_codes in enumerate(codes.double().numpy())])

    def best_gain(self, row: int, codes: np.ndarray, column: int, targets: Iterable[float]) -> float:
        """Largest gain of one weight by changing its code to one of the ``targets``."""
        targets = np.array(list(targets))
        changed = np.repeat(codes[None], len(targets), 0)
        changed[:, column] = targets
        return float(self.cost(row, codes) - self.cost(row, changed).min())

    def worst_gain(self, codes: torch.Tensor, reach: int = 6) -> float:
        """Largest gain of a weight by a code near its own or by 0, relative to the cost of one step."""
        stiffness = self.curvature.diagonal() * self.steps.square()
        return max(
            self.best_gain(row, row_codes, column, [*np.arange(code - reach, code + reach + 1), 0.0])
            / stiffness[row, column].item()
            for row, row_codes in enumerate(codes.double().numpy())
            for column, code in enumerate(row_codes)
        )


def make_case(rows: int, columns: int, seed: int, unit: float = 0.5, lookups: bool = False, price: float = 0.0) -> Case:
    """``price`` is relative to the price of a bit at high rate."""
    generator = torch.Generator().manual_seed(seed)
    curvature = Curvature(
        torch.rand(rows, generator=generator) + 0.2,
        correlated(columns, seed) + 0.05 * torch.eye(columns),
        torch.rand(rows, columns, generator=generator) if lookups else None,
    )
    weight, factored = weights(rows, columns, seed), factor_curvature(curvature)
    lattice = make_lattice(weight, unit, factored.rows, factored.columns)
    return Case(weight, curvature, lattice, price * unit**2 * np.log(2) / 12 if price else None)


cases = st.builds(
    make_case,
    st.integers(1, 4),
    st.integers(1, 5),
    st.integers(0, 10**6),
    st.sampled_from([0.1, 0.7, 3.0]),
    st.booleans(),
    st.sampled_from([0.0, 0.5, 1.0, 3.0]),
)


def slow_pass(weight: torch.Tensor, h: torch.Tensor, steps: torch.Tensor) -> np.ndarray:
    """GPTQ on a lattice, inverting the remaining Hessian for each column, in float64."""
    remaining, h, codes = weight.double().numpy().copy(), h.double().numpy(), np.zeros(weight.shape)
    for column in range(weight.shape[1]):
        inverse = np.linalg.inv(h[column:, column:])
        codes[:, column] = np.round(remaining[:, column] / steps[:, column].double().numpy())
        error = remaining[:, column] - codes[:, column] * steps[:, column].double().numpy()
        remaining[:, column:] -= np.outer(error, inverse[0] / inverse[0, 0])
    return codes


@pytest.mark.parametrize("block", [1, 7, 64])
def test_error_feedback_pass_on_fine_lattice_matches_slow_gptq(block: int) -> None:
    case = make_case(30, 40, 1, unit=0.05)
    inputs = case.curvature.inputs
    codes = error_feedback_pass(case.weight, inverse_cholesky(inputs), case.make_grid, block)
    by_hand = torch.from_numpy(slow_pass(case.weight, inputs, case.steps)).float()
    same = (codes == by_hand).all(1)
    assert same.float().mean() >= 0.9  # after a float32 tie that rounds the other way, the rest of its row differs
    assert case.costs(codes) == pytest.approx(case.costs(by_hand), rel=0.2)
    assert case.costs(codes).sum() < 0.7 * case.costs((case.weight / case.steps).round()).sum()


def test_error_feedback_pass_with_order_equals_pass_over_permuted_columns() -> None:
    case = make_case(30, 20, 2, unit=0.2)
    order = torch.randperm(20, generator=torch.Generator().manual_seed(0))
    permuted = case.curvature.inputs[order][:, order]
    codes = error_feedback_pass(case.weight, inverse_cholesky(permuted), case.make_grid, 8, order)
    by_hand = slow_pass(case.weight[:, order], permuted, case.steps[:, order])
    assert (codes[:, order].numpy() == by_hand).all(1).mean() >= 0.9


def test_inverse_cholesky_diagonal_is_cost_after_compensation() -> None:
    inputs = correlated(12, 3) + 0.05 * torch.eye(12)
    costs = 1 / inverse_cholesky(inputs).diagonal().square()
    for column in range(12):
        diagonal, later = inputs[column, column].double(), inputs[column, column + 1 :].double()
        cost = diagonal - later @ torch.linalg.pinv(inputs[column + 1 :, column + 1 :].double()) @ later
        assert costs[column].item() == pytest.approx(cost.item(), rel=1e-3)


@given(cases)
@few_examples
def test_descent_result_leaves_no_weight_a_better_code(case: Case) -> None:
    start = (case.weight / case.steps).round()
    result = case.descend(start)
    assert result.moves[-1] == 0 and len(result.moves) < 100
    assert case.worst_gain(result.codes) <= 2e-5


@given(cases)
@few_examples
def test_descent_sweep_never_raises_cost_of_a_row(case: Case) -> None:
    start = torch.zeros_like(case.weight)
    end = case.descend(start)
    costs = [case.costs(start)]
    for sweeps in range(1, len(end.moves) + 1):
        partial = case.descend(start, sweeps)
        assert partial.moves == end.moves[:sweeps]
        costs.append(case.costs(partial.codes))
        assert (costs[-1] <= costs[-2] * (1 + 1e-5)).all()
        gained = costs[-2].sum() - costs[-1].sum()
        assert partial.gains[-1] == pytest.approx(gained, rel=1e-3, abs=1e-5 * costs[0].sum())
    assert torch.equal(partial.codes, end.codes)


@given(cases)
@few_examples
def test_descent_is_deterministic_and_idempotent(case: Case) -> None:
    start = (case.weight / case.steps).round()
    first, second = case.descend(start), case.descend(start)
    assert torch.equal(first.codes, second.codes) and first.moves == second.moves and first.gains == second.gains
    continued = case.descend(first.codes)
    assert torch.equal(continued.codes, first.codes) and not any(continued.moves)


def test_descent_with_zero_sweeps_returns_start() -> None:
    case = make_case(3, 4, 0)
    assert torch.equal(case.descend(torch.zeros(3, 4), 0).codes, torch.zeros(3, 4))


@pytest.mark.parametrize("columns", [2, 3])
@pytest.mark.parametrize("lookups", [False, True])
@pytest.mark.parametrize("price", [0.0, 2.0])
def test_descent_result_is_equilibrium_of_exhaustive_search(columns: int, lookups: bool, price: float) -> None:
    case = make_case(6, columns, 5, unit=1.5, lookups=lookups, price=price)
    result = case.descend((case.weight / case.steps).round())
    best = []
    for row, end in enumerate(result.codes.double().numpy()):
        axes = [np.arange(code - 4, code + 5) for code in end]
        profiles = np.stack(np.meshgrid(*axes, indexing="ij"), -1)
        costs = case.cost(row, profiles)
        slack = 3e-5 * float(case.cost(row, end))
        is_equilibrium = np.all([costs <= costs.min(axis, keepdims=True) + slack for axis in range(columns)], 0)
        assert is_equilibrium[(4,) * columns]
        place = np.unravel_index(costs.argmin(), costs.shape)
        assert is_equilibrium[place]
        best.append(profiles[place])
    optimum = torch.from_numpy(np.array(best)).float()
    assert (case.costs(optimum) <= case.costs(result.codes)).all()
    assert torch.equal(case.descend(optimum).codes, optimum)  # the optimum is an equilibrium, so descent stays there


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


# Sparse curvature.


@given(st.integers(2, 24), st.integers(0, 24), st.integers(0, 10**6))
@few_examples
def test_keep_top_correlations_is_sparse_symmetric_and_at_least_full_curvature(
    size: int, neighbours: int, seed: int
) -> None:
    curvature = Curvature(torch.ones(3), correlated(size, seed), None)
    sparse, full = curvature.keep_top_correlations(neighbours).inputs.double(), curvature.inputs.double()
    torch.testing.assert_close(sparse, sparse.T, rtol=1e-5, atol=1e-5)
    scale = full.diagonal().max()
    assert torch.linalg.eigvalsh(sparse).min() >= -1e-5 * scale
    assert torch.linalg.eigvalsh(sparse - full).min() >= -1e-5 * scale
    if neighbours >= size - 1:
        assert torch.equal(sparse, full)
    links = (sparse != 0).sum().item() - size
    assert links <= 2 * neighbours * size
    if neighbours == 0:
        torch.testing.assert_close(sparse, torch.diag(full.abs().sum(1)), rtol=1e-5, atol=0)


def test_keep_top_correlations_keeps_largest_correlations() -> None:
    inputs = correlated(12, 4)
    size = inputs.diagonal().sqrt()
    correlation = (inputs / torch.outer(size, size)).abs().fill_diagonal_(0)
    sparse = Curvature(torch.ones(1), inputs, None).keep_top_correlations(3).inputs
    for column in range(12):
        for neighbour in correlation[column].argsort(descending=True)[:3].tolist():
            assert sparse[column, neighbour] == inputs[column, neighbour]
            assert sparse[neighbour, column] == inputs[neighbour, column]


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
