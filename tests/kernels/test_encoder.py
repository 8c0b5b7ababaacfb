"""The encoder of trellis tiles: exact paths, and the library against the implementation in torch."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nashswarm.kernels import encoder, native, trellis_codes
from nashswarm.kernels import encoder_reference as reference
from nashswarm.kernels.trellis_codes import INT8, LANES, MEMORY, ROWS, STEPS, UNIT, values_of_sequences

RATES = range(INT8 + 1)
needs_library = pytest.mark.skipif(native.path() == native.SLOW, reason="the C++ library is not there")


def _draw(shape, seed, scale=1.0):
    return scale * torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def _costs(targets, weights, codes, rate):
    values = values_of_sequences(codes, rate).double() if rate else torch.zeros(codes.shape).double()
    return (weights.double() * (targets.double() - values).square()).sum(-1)


def _viterbi(targets, weights, rate):
    """Return the least cost of one sequence, by a plain Viterbi algorithm from each start state."""
    table, states = trellis_codes.tables()[rate].astype(float), 1 << MEMORY[rate]
    best = float("inf")
    for start in range(states):
        costs = {start: 0.0}
        for target, weight in zip(targets.tolist(), weights.tolist(), strict=True):
            after: dict[int, float] = {}
            for state, cost in costs.items():
                for coded in (0, 1):
                    window = (state << 1 | coded) % (2 * states)
                    total = cost + weight * min((target - value) ** 2 for value in table[window])
                    after[window % states] = min(after.get(window % states, float("inf")), total)
            costs = after
        best = min(best, costs[start])
    return best


@pytest.mark.parametrize("implementation", [encoder, reference])
@pytest.mark.parametrize("rate", range(1, INT8))
def test_best_codes_have_the_least_cost_of_a_plain_viterbi(implementation, rate):
    targets, weights = _draw((20, STEPS), rate, UNIT), _draw((20, STEPS), 9).square() + 0.01
    codes = implementation.best_codes(targets, weights, rate)
    costs = _costs(targets, weights, codes, rate)
    for sequence, cost in enumerate(costs.tolist()):
        assert cost == pytest.approx(_viterbi(targets[sequence], weights[sequence], rate), rel=1e-4)


@pytest.mark.parametrize("rate", [1, 2])
def test_best_codes_beat_every_other_sequence(rate):
    """All codes are tried: all of them at 1 bit, and at 2 bits those that differ in up to 2 steps."""
    targets, weights = _draw((1, STEPS), 3, UNIT), torch.ones(1, STEPS)
    best = encoder.best_codes(targets, weights, rate)
    if rate == 1:
        numbers = torch.arange(1 << STEPS)
        others = (numbers[:, None] >> torch.arange(STEPS) & 1).to(torch.uint8)
    else:
        others = torch.cat([_changed(best, steps) for steps in itertools.combinations(range(STEPS), 2)])
    assert _costs(targets, weights, others, rate).min() >= _costs(targets, weights, best, rate) * (1 - 1e-5)


def _changed(codes, steps):
    others = codes.repeat(16, 1)
    for number, (first, second) in enumerate(itertools.product(range(4), repeat=2)):
        others[number, steps[0]], others[number, steps[1]] = first, second
    return others


def test_best_codes_of_int8_and_nothing():
    targets, weights = torch.tensor([[-1000.0, -3.4, 0.0, 2.6, 1000.0] + [0.0] * 11]), torch.ones(1, STEPS)
    assert encoder.best_codes(targets, weights, INT8).view(torch.int8)[0, :5].tolist() == [-127, -3, 0, 3, 127]
    assert not encoder.best_codes(targets, weights, 0).any()


@st.composite
def _problems(draw):
    groups, columns = draw(st.integers(1, 6)), draw(st.integers(1, 5))
    seed = draw(st.integers(0, 1000))
    inputs = _draw((columns + 2, columns), seed)
    curvature = inputs.T @ inputs / len(inputs) + 0.05 * torch.eye(columns)
    weights = _draw((columns, groups * ROWS), seed + 1)
    if draw(st.booleans()):
        weights[0] = 0
    if draw(st.booleans()):
        weights[-1] = 0.7
    rates = draw(st.lists(st.sampled_from(RATES), min_size=groups, max_size=groups))
    rates = torch.tensor(rates, dtype=torch.uint8).repeat(columns, 1)
    size = torch.rand(groups * ROWS, generator=torch.Generator().manual_seed(seed)) + 0.3
    scales = torch.rand(columns, generator=torch.Generator().manual_seed(seed + 2)) + 0.5
    codes = torch.zeros(weights.shape, dtype=torch.uint8)
    columns = encoder.Columns(codes, torch.zeros_like(weights), scales, size)
    columns.values.copy_(_values(columns, rates))
    return columns, weights, curvature, rates


def _copy(columns):
    return encoder.Columns(*(getattr(columns, name).clone() for name in ("codes", "values", "scales", "size")))


def _damage(weights, columns, curvature):
    error = (weights - columns.values).double()
    return float((error * (curvature.double() @ error)).sum() / 2)


def _values(columns, rates):
    """Return what the codes stand for, sequence by sequence."""
    values = torch.zeros_like(columns.values)
    for column, group in itertools.product(range(len(values)), range(rates.shape[1])):
        for lane in range(LANES):
            rows = slice(group * ROWS + lane, (group + 1) * ROWS, LANES)
            rate = int(rates[column, group])
            if rate:
                found = values_of_sequences(columns.codes[column, rows], rate) / UNIT
                values[column, rows] = found * columns.size[rows] * columns.scales[column]
    return values


@settings(max_examples=40, deadline=None)
@given(_problems())
def test_a_sweep_never_raises_the_damage(problem):
    columns, weights, curvature, rates = problem
    for _ in range(3):
        before = _damage(weights, columns, curvature)
        slopes = curvature @ (weights - columns.values)
        moves, gains, changed = encoder.sweep(columns, slopes, curvature, rates)
        after = _damage(weights, columns, curvature)
        assert after <= before * (1 + 1e-5) + 1e-9
        assert before - after == pytest.approx(float(gains.sum()), rel=1e-3, abs=1e-4 * max(before, 1))
        assert (changed == 0) == bool((moves == 0).all())
        torch.testing.assert_close(slopes, curvature @ (weights - columns.values), rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(columns.values, _values(columns, rates))


@settings(max_examples=25, deadline=None)
@given(_problems(), st.sampled_from([encoder, reference]))
def test_feedback_encodes_every_corrected_column_best(problem, implementation):
    columns, weights, curvature, rates = problem
    factor = torch.linalg.cholesky(curvature.inverse().double(), upper=True).float()
    errors = implementation.feedback(columns, weights.clone(), factor, rates, encoder.OFFSETS)
    torch.testing.assert_close(columns.values, _values(columns, rates))
    for column, weight in enumerate(weights):
        target = weight - factor[:column, column] @ errors[:column]
        error = target - columns.values[column]
        torch.testing.assert_close(error, errors[column] * factor[column, column], rtol=1e-3, atol=1e-4)
        _, best = reference.encode_column(target, columns.size * columns.scales[column], rates[column])
        assert float(error.square().sum()) == pytest.approx(float((target - best).square().sum()), rel=1e-3, abs=1e-6)


@needs_library
@settings(max_examples=25, deadline=None)
@given(_problems())
def test_a_sweep_of_one_column_gains_what_torch_gains(problem):
    columns, weights, curvature, rates = problem
    first = [encoder.Columns(columns.codes[:1].clone(), columns.values[:1].clone(), columns.scales[:1], columns.size)
             for _ in range(2)]  # fmt: skip
    slopes = curvature[:1, :1] * (weights - columns.values)[:1]
    parts = zip((encoder, reference), first, strict=True)
    gains = [part.sweep(value, slopes.clone(), curvature[:1, :1], rates[:1])[1] for part, value in parts]
    torch.testing.assert_close(gains[0], gains[1], rtol=1e-3, atol=1e-4)


@settings(max_examples=25, deadline=None)
@given(_problems(), st.sampled_from([encoder, reference]))
def test_deviations_are_the_changes_of_damage_that_adopting_them_makes(problem, implementation):
    columns, weights, curvature, rates = problem
    encoder.sweep(columns, curvature @ (weights - columns.values), curvature, rates)
    slopes = curvature @ (weights - columns.values)
    masks = torch.full((rates.shape[1],), (1 << INT8 + 1) - 1, dtype=torch.int32)
    if implementation is encoder:
        changes = encoder.deviations(columns, slopes.clone(), curvature, masks)
    else:
        changes = reference.deviate(columns, slopes.clone(), curvature, masks, adopted=False)[1]
    before = _damage(weights, columns, curvature)
    for rate in (0, 2, 3, INT8):
        moved = _copy(columns)
        chosen = torch.full((rates.shape[1],), encoder.KEEP, dtype=torch.uint8)
        chosen[::2] = rate
        moves = encoder.adopt(moved, slopes.clone(), curvature, chosen)
        torch.testing.assert_close(moved.values, columns.values + moves)
        change = _damage(weights, moved, curvature) - before
        assert change == pytest.approx(float(changes[::2, rate].sum()), rel=1e-3, abs=1e-4 * max(before, 1e-3))
        kept = torch.ones(len(columns.size), dtype=torch.bool).view(-1, ROWS)
        kept[::2] = False
        assert torch.equal(moved.codes[:, kept.flatten()], columns.codes[:, kept.flatten()])
