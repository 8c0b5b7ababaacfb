"""The flock against brute force, its controls, and shrinkage toward neighbours."""

from typing import get_args

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import sparse

from nashswarm.games.flock import Graph, flock, shrink, standardise

few_examples = settings(max_examples=25, deadline=None)
graphs = st.sampled_from(get_args(Graph))


def points(blocks: int = 40, features: int = 3, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(blocks, features)) * np.arange(1, features + 1)


def coupling(graph: Graph, blocks: int = 40, neighbours: int = 7, seed: int = 0) -> np.ndarray:
    return flock(points(blocks, seed=seed), neighbours, graph, np.random.default_rng(seed)).toarray()


def flock_by_hand(features: np.ndarray, neighbours: int) -> np.ndarray:
    """J by all pairwise distances and a loop over blocks."""
    scaled = (features - features.mean(0)) / features.std(0)
    distance = np.sqrt(((scaled[:, None] - scaled[None]) ** 2).sum(-1))
    nearest = [[j for j in np.argsort(row) if j != i][:neighbours] for i, row in enumerate(distance)]
    typical = np.median([distance[i, j] for i, near in enumerate(nearest) for j in near])
    weights = np.zeros_like(distance)
    for i, near in enumerate(nearest):
        for j in near:
            weights[i, j] = weights[j, i] = np.exp(-((distance[i, j] / typical) ** 2))
    return weights


@given(st.integers(8, 40), st.integers(1, 7), st.integers(0, 1000))
@few_examples
def test_flock_matches_brute_force_nearest_neighbours(blocks: int, neighbours: int, seed: int) -> None:
    features = points(blocks, seed=seed)
    weights = flock(features, neighbours, "features", np.random.default_rng(0)).toarray()
    by_hand = flock_by_hand(features, neighbours)
    assert ((weights > 0) == (by_hand > 0)).all()
    assert weights == pytest.approx(np.maximum(by_hand, 1e-6 * (by_hand > 0)), abs=1e-9)


@given(graphs, st.integers(2, 30), st.integers(1, 40), st.integers(0, 1000))
@few_examples
def test_flock_is_symmetric_with_weights_up_to_one(graph: Graph, blocks: int, neighbours: int, seed: int) -> None:
    weights = flock(points(blocks, seed=seed), neighbours, graph, np.random.default_rng(seed))
    assert (weights != weights.T).nnz == 0
    assert not weights.diagonal().any()
    assert ((weights.data > 0) & (weights.data <= 1)).all()
    assert (np.diff(weights.indptr) >= 1).all()


@given(st.sampled_from(["features", "shuffled", "index"]), st.integers(2, 9), st.integers(0, 5))
@few_examples
def test_flock_with_too_many_neighbours_couples_all_blocks(graph: Graph, blocks: int, more: int) -> None:
    weights = coupling(graph, blocks, blocks - 1 + more)
    assert ((weights > 0) == ~np.eye(blocks, dtype=bool)).all()


def test_flock_gives_each_block_at_least_k_neighbours() -> None:
    assert ((coupling("features") > 0).sum(1) >= 7).all()
    assert ((coupling("index") > 0).sum(1) >= 7).all()


@given(st.integers(0, 1000))
@few_examples
def test_flock_shuffled_is_permuted_graph(seed: int) -> None:
    """The sorted weights of the blocks and the eigenvalues are the same, but the graph is another one."""
    original, shuffled = coupling("features", seed=seed), coupling("shuffled", seed=seed)
    assert sorted(map(tuple, np.sort(original).tolist())) == sorted(map(tuple, np.sort(shuffled).tolist()))
    assert np.linalg.eigvalsh(original) == pytest.approx(np.linalg.eigvalsh(shuffled), abs=1e-9)
    assert (original != shuffled).any()


def test_flock_index_couples_adjacent_blocks() -> None:
    weights = coupling("index", blocks=10, neighbours=4)
    for block in range(10):
        assert set(np.flatnonzero(weights[block])) == {(block + step) % 10 for step in (-2, -1, 1, 2)}
    assert set(np.unique(weights)) == {0.0, 1.0}


def test_flock_random_ignores_features() -> None:
    one = flock(points(seed=1), 7, "random", np.random.default_rng(0))
    other = flock(points(seed=2), 7, "random", np.random.default_rng(0))
    assert (one != other).nnz == 0
    assert set(one.data) == {1.0}
    assert 5 < one.nnz / 40 < 14


@given(graphs, st.integers(0, 1000))
@few_examples
def test_flock_with_same_seed_is_equal(graph: Graph, seed: int) -> None:
    assert np.array_equal(coupling(graph, seed=seed), coupling(graph, seed=seed))


@pytest.mark.parametrize("graph", get_args(Graph))
def test_flock_of_identical_blocks_has_weights_of_one(graph: Graph) -> None:
    weights = flock(np.ones((12, 2)), 3, graph, np.random.default_rng(0))
    assert not weights.diagonal().any()
    assert set(weights.data) == {1.0}


@pytest.mark.parametrize("graph", get_args(Graph))
def test_flock_of_one_block_is_empty(graph: Graph) -> None:
    assert flock(np.ones((1, 2)), 7, graph, np.random.default_rng(0)).nnz == 0


def test_flock_is_independent_of_feature_units() -> None:
    features = points()
    weights = flock(features * [1, 1e6, 1e-6], 7, "features", np.random.default_rng(0)).toarray()
    assert weights == pytest.approx(coupling("features"))


def test_standardise_gives_zero_mean_and_unit_variance() -> None:
    scaled = standardise(np.column_stack([points(), np.full(40, 0.5)]))
    assert scaled.mean(0) == pytest.approx(0, abs=1e-12)
    assert scaled.std(0) == pytest.approx([1, 1, 1, 0], abs=1e-12)


@given(st.integers(0, 1000), st.floats(0, 1))
@few_examples
def test_shrink_moves_toward_weighted_mean_of_neighbours(seed: int, strength: float) -> None:
    weights = coupling("features", seed=seed)
    values = np.random.default_rng(seed).normal(size=40)
    by_hand = [(1 - strength) * values[i] + strength * np.average(values, weights=weights[i]) for i in range(40)]
    assert shrink(values, sparse.csr_array(weights), strength) == pytest.approx(np.array(by_hand))


def test_shrink_with_extreme_strengths_and_constants() -> None:
    weights = sparse.csr_array(coupling("features"))
    values = np.random.default_rng(0).normal(size=40)
    assert np.array_equal(shrink(values, weights, 0.0), values)
    by_hand = [np.average(values, weights=row) for row in weights.toarray()]
    assert shrink(values, weights, 1.0) == pytest.approx(np.array(by_hand))
    assert shrink(np.full(40, -3.0), weights, 0.6) == pytest.approx(-3.0)


def test_shrink_without_neighbours_keeps_sensitivity() -> None:
    assert shrink(np.array([1.0, 2.0, 5.0]), sparse.csr_array((3, 3)), 1.0).tolist() == [1, 2, 5]
