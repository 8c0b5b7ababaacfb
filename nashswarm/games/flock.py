"""The flock: every block minds its k nearest blocks in feature space.

Starlings track six or seven topological neighbours, whatever the distance (Ballerini et al., PNAS 2008), hence k = 7.
The coupling ``J_ij = exp(−d_ij² / median²)`` is symmetrised, otherwise no potential exists.
"""

from typing import Literal, get_args

import numpy as np
from jaxtyping import Float
from scipy import sparse
from sklearn.neighbors import NearestNeighbors

Graph = Literal["features", "shuffled", "random", "index"]


def standardise(features: Float[np.ndarray, "blocks features"]) -> Float[np.ndarray, "blocks features"]:
    """Every feature with mean 0 and variance 1; constant features become 0."""
    spread = features.std(0)
    return (features - features.mean(0)) / np.where(spread > 0, spread, 1)


def flock(
    features: Float[np.ndarray, "blocks features"],
    neighbours: int,
    graph: Graph,
    rng: np.random.Generator,
) -> sparse.csr_array:
    """The symmetric coupling J between blocks, its weights between 0 and 1, its diagonal empty.

    ``graph``: ``features``, the flock itself, or one of its controls: ``shuffled`` (the same graph with the blocks
    renamed at random), ``random`` (each block draws its neighbours) and ``index`` (the blocks stored next to it).
    """
    if graph not in get_args(Graph):
        raise ValueError(f"unknown swarm.graph {graph!r}: choose one of {', '.join(get_args(Graph))}")
    blocks = len(features)
    neighbours = min(neighbours, blocks - 1)
    if neighbours < 1:
        return sparse.csr_array((blocks, blocks))
    rows = np.repeat(np.arange(blocks), neighbours)
    if graph in ("features", "shuffled"):
        points = standardise(features)
        distances, near = NearestNeighbors(n_neighbors=neighbours).fit(points).kneighbors()
        typical = np.median(distances)
        weights = np.exp(-((distances / typical) ** 2)) if typical > 0 else np.ones_like(distances)
        columns, values = near.ravel(), weights.ravel()
    elif graph == "random":
        columns, values = (rows + rng.integers(1, blocks, len(rows))) % blocks, np.ones(len(rows))
    else:
        steps = np.array([(step // 2 + 1) * (-1) ** step for step in range(neighbours)])
        columns, values = (rows + np.tile(steps, blocks)) % blocks, np.ones(len(rows))
    directed = sparse.csr_array((np.maximum(values, 1e-6), (rows, columns)), shape=(blocks, blocks))
    directed.data = np.minimum(directed.data, 1.0)  # a neighbour drawn twice is one neighbour
    symmetric = directed.maximum(directed.T).tocsr()
    if graph == "shuffled":
        names = rng.permutation(blocks)
        symmetric = symmetric[names][:, names]
    return symmetric


def shrink(
    log_sensitivity: Float[np.ndarray, " blocks"], coupling: sparse.csr_array, strength: float
) -> Float[np.ndarray, " blocks"]:
    """Each block's log sensitivity moved by ``strength`` (0 to 1) toward the mean of its flock."""
    mass = coupling.sum(1)
    mean = (coupling @ log_sensitivity) / np.where(mass > 0, mass, 1)
    return np.where(mass > 0, (1 - strength) * log_sensitivity + strength * mean, log_sensitivity)
