"""The price of a byte on small games, against trying everything."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nashswarm.methods.nash_swarm.prices import BYTES_PER_BIT, best_rates, close, price_for, spread, tile_bytes

RATES = range(9)
few_examples = settings(max_examples=60, deadline=None)
allowances = st.sampled_from([tuple(RATES), (0, 2, 3, 4), (0, 8), (1, 2, 3), (3,)])


@st.composite
def games(draw):
    """Damages of one to three layers of one to four tiles, the rates that are allowed, and a budget."""
    allowed = draw(allowances)
    shapes = draw(st.lists(st.tuples(st.integers(1, 2), st.integers(1, 2)), min_size=1, max_size=3))
    rng = np.random.default_rng(draw(st.integers(0, 10**6)))
    damages = []
    for shape in shapes:
        size = np.exp(rng.normal(scale=2, size=(*shape, 1)))
        falling = size * 4.0 ** -np.arange(9) * np.exp(rng.normal(scale=0.3, size=(*shape, 9)))
        damages.append(falling if draw(st.booleans()) else size * rng.random((*shape, 9)))
    count = sum(part[..., 0].size for part in damages)
    bits = draw(st.floats(min(allowed), max(allowed) + 0.5))
    return damages, allowed, int(bits * count * BYTES_PER_BIT)


def flat(damages):
    return np.concatenate([part.reshape(-1, 9) for part in damages])


def damage_of(damages, rates):
    own = np.concatenate([part.ravel() for part in rates])
    return float(np.take_along_axis(flat(damages), own[:, None], 1).sum())


@few_examples
@given(games(), st.floats(1e-9, 1.0))
def test_best_rates_cost_no_more_than_any_other(game, price):
    damages, allowed, _ = game
    for damage in damages:
        rates = best_rates(damage, price, allowed)
        for group, tile in np.ndindex(rates.shape):
            costs = {rate: damage[group, tile, rate] + price * BYTES_PER_BIT * rate for rate in allowed}
            least = min(costs.values())
            assert rates[group, tile] == min(rate for rate in allowed if costs[rate] == least)


@few_examples
@given(games())
def test_price_for_is_the_lowest_that_meets_the_budget(game):
    damages, allowed, budget = game
    price = price_for(damages, budget, allowed)
    assert tile_bytes([best_rates(part, price, allowed) for part in damages]) <= budget
    # Rates change at prices at which a tile is indifferent between two of them, and nowhere else.
    slopes = [
        (damage[low] - damage[high]) / (BYTES_PER_BIT * (high - low))
        for damage in flat(damages)
        for low, high in itertools.combinations(allowed, 2)
    ]
    lower = [slope for slope in slopes if 0 < slope < price * (1 - 1e-6)]
    for tried in [1e-30, *(slope * (1 + 1e-7) for slope in lower)]:
        if tried < price * (1 - 1e-6):
            assert tile_bytes([best_rates(part, tried, allowed) for part in damages]) > budget


@few_examples
@given(games())
def test_best_rates_at_a_price_have_the_least_damage_of_their_bytes(game):
    """Everett 1963: no allocation of as many bytes or fewer has less damage."""
    damages, allowed, _ = game
    allowed = allowed[:3]
    if sum(part[..., 0].size for part in damages) > 6:
        damages = damages[:1]
    rates = [best_rates(part, 1e-4, allowed) for part in damages]
    bytes_taken, damage = tile_bytes(rates), damage_of(damages, rates)
    table = flat(damages)
    for others in itertools.product(allowed, repeat=len(table)):
        if sum(others) * BYTES_PER_BIT <= bytes_taken:
            assert sum(row[rate] for row, rate in zip(table, others, strict=True)) >= damage - 1e-9 * abs(damage)


@few_examples
@given(games(), st.integers(0, 10**6))
def test_close_keeps_the_budget_and_leaves_no_move_that_fits_and_gains(game, seed):
    damages, allowed, budget = game
    rng = np.random.default_rng(seed)
    rates = [rng.choice(allowed, part.shape[:2]) for part in damages]
    closed = close(damages, rates, budget, allowed)
    assert [part.shape for part in closed] == [part.shape for part in rates]
    assert all(np.isin(part, allowed).all() for part in closed)
    left = budget - tile_bytes(closed)
    assert left >= 0
    own = np.concatenate([part.ravel() for part in closed])
    for damage, rate in zip(flat(damages), own, strict=True):
        for other in allowed:
            if other > rate and (other - rate) * BYTES_PER_BIT <= left:
                assert damage[other] >= damage[rate]


@few_examples
@given(games())
def test_close_of_falling_damages_leaves_less_than_a_bit_of_a_tile(game):
    damages, _, budget = game
    falling = [np.sort(part, 2)[..., ::-1] + np.arange(9, 0, -1) * 1e-6 for part in damages]
    rates = [best_rates(part, 1e-3, RATES) for part in falling]
    closed = close(falling, rates, budget, RATES)
    full = 8 * BYTES_PER_BIT * sum(part.size for part in closed)
    assert 0 <= min(budget, full) - tile_bytes(closed) < BYTES_PER_BIT


def test_close_never_takes_a_rate_that_nobody_tried():
    damage = np.full((1, 4, 9), np.inf)
    damage[..., 2:5] = [0.3, 0.0, -0.1]
    closed = close([damage], [np.full((1, 4), 3)], 14 * BYTES_PER_BIT, tuple(RATES))
    assert np.isin(closed[0], (2, 3, 4)).all() and tile_bytes(closed) == 14 * BYTES_PER_BIT
    lower = close([damage], [np.full((1, 4), 3)], 9 * BYTES_PER_BIT, tuple(RATES))
    assert np.isin(lower[0], (2, 3)).all() and tile_bytes(lower) == 9 * BYTES_PER_BIT


@few_examples
@given(allowances, st.lists(st.tuples(st.integers(1, 3), st.integers(1, 4)), min_size=1, max_size=3), st.floats(0, 1))
def test_spread_is_one_rate_or_two_neighbours_that_use_up_the_budget(allowed, shapes, share):
    count = sum(groups * tiles for groups, tiles in shapes)
    bits = min(allowed) + share * (max(allowed) - min(allowed))
    budget = int(bits * count * BYTES_PER_BIT)
    if budget < min(allowed) * count * BYTES_PER_BIT:
        return
    rates = spread(shapes, budget, allowed)
    assert [part.shape for part in rates] == shapes
    found = sorted({int(rate) for part in rates for rate in part.ravel()})
    assert len(found) <= 2 and set(found) <= set(allowed)
    if len(found) == 2:
        assert allowed.index(found[1]) == allowed.index(found[0]) + 1
    low = max(rate for rate in allowed if rate * count * BYTES_PER_BIT <= budget)
    step = min((rate - low for rate in allowed if rate > low), default=1)
    assert 0 <= budget - tile_bytes(rates) < step * BYTES_PER_BIT or found == [max(allowed)]
    # Dealt evenly: no stretch of tiles has more than its share of the higher rate, but for one tile.
    own = np.concatenate([part.ravel() for part in rates])
    raised = np.cumsum(own == found[-1]) if len(found) == 2 else np.zeros(count)
    assert np.abs(raised - raised[-1] * np.arange(1, count + 1) / count).max() <= 1


def test_spread_of_a_whole_rate_is_that_rate_everywhere():
    rates = spread([(2, 3), (1, 5)], 3 * 11 * BYTES_PER_BIT + 100, RATES)
    assert all((part == 3).all() for part in rates)


@pytest.mark.parametrize("budget", [8, 100])
def test_spread_beyond_the_highest_rate_stays_there(budget):
    assert (spread([(2, 2)], budget * 4 * BYTES_PER_BIT, RATES)[0] == 8).all()
