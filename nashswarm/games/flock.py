"""The flock: a graph that couples each block to its k nearest blocks in feature space.

Starlings track six or seven neighbours, whatever their distance (Ballerini et al., PNAS 2008); hence k = 7 by default.
The weight of an edge is ``J_ij = exp(−d_ij² / median²)``, with the median over all edges.  J is made symmetric, because
otherwise the game has no potential.
"""

from typing import Literal, get_args

import numpy as np
from jaxtyping import Float
from scipy import sparse

Graph = Literal["features", "shuffled", "random", "index"]


def standardise(features: Float[np.ndarray, "blocks features"]) -> Float[np.ndarray, "blocks features"]:
    """Scale each feature to mean 0 and variance 1.  Constant features become 0."""
    spread = features.std(0)
    return (features - features.mean(0)) / np.where(spread > 0, spread, 1)


def flock(
    features: Float[np.ndarray, "blocks features"],
    neighbours: int,
    graph: Graph,
    rng: np.random.Generator,
) -> sparse.csr_array:
    """Build the symmetric coupling J of the blocks, with weights between 0 and 1 and an empty diagonal.

    ``graph`` is ``features`` (the flock) or one of its controls: ``shuffled`` permutes the blocks of that graph at
    random, ``random`` draws the neighbours of each block, and ``index`` takes the blocks that are stored next to it.
    Raises ValueError for any other graph.
    """
    if graph not in get_args(Graph):
        raise ValueError(f"unknown swarm.graph {graph!r}: choose one of {', '.join(get_args(Graph))}")
    blocks = len(features)
    neighbours = min(neighbours, blocks - 1)
    if neighbours < 1:
        return sparse.csr_array((blocks, blocks))
    rows = np.repeat(np.arange(blocks), neighbours)
    if graph in ("features", "shuffled"):
        from sklearn.neighbors import NearestNeighbors  # here, because it takes a second and 100 MB

        points = standardise(features)
        distances, nearest = NearestNeighbors(n_neighbors=neighbours).fit(points).kneighbors()
        typical = np.median(distances)
        weights = np.exp(-((distances / typical) ** 2)) if typical > 0 else np.ones_like(distances)
        columns, values = nearest.ravel(), weights.ravel()
    elif graph == "random":
        columns, values = (rows + rng.integers(1, blocks, len(rows))) % blocks, np.ones(len(rows))
    else:
        steps = np.array([(step // 2 + 1) * (-1) ** step for step in range(neighbours)])
        columns, values = (rows + np.tile(steps, blocks)) % blocks, np.ones(len(rows))
    directed = sparse.csr_array((np.maximum(values, 1e-6), (rows, columns)), shape=(blocks, blocks))
    directed.data = np.minimum(directed.data, 1.0)  # a neighbour that was drawn twice counts once
    symmetric = directed.maximum(directed.T).tocsr()
    if graph == "shuffled":
        order = rng.permutation(blocks)
        symmetric = symmetric[order][:, order]
    return symmetric


def shrink(
    log_sensitivity: Float[np.ndarray, " blocks"], coupling: sparse.csr_array, strength: float
) -> Float[np.ndarray, " blocks"]:
    """Move the log sensitivity of each block toward the weighted mean of its neighbours, by ``strength`` (0 to 1).

    A block without neighbours keeps its sensitivity.
    """
    mass = coupling.sum(1)
    mean = (coupling @ log_sensitivity) / np.where(mass > 0, mass, 1)
    return np.where(mass > 0, (1 - strength) * log_sensitivity + strength * mean, log_sensitivity)
