"""The game of matrices that choose their types under one price of a byte, whatever file the types belong to.

Tensors are players, their actions the types that their rows fit.  A tensor pays its damage and its bytes times the
price.  Tensors do not interact in the second-order damage, so the least damage within a budget is a multiple-choice
knapsack problem; what all tensors together could gain by any other allocation of the budget is at most the sum of
their regrets at the price (Everett 1963).
"""

import dataclasses

import numpy as np
from jaxtyping import Float, Int

from nashswarm.games import optima
from nashswarm.games.potential import Game

GAP = 1e-6  # of the integer programme, relative


@dataclasses.dataclass(frozen=True)
class TypeGame:
    """The game of the tensors of a model, and its solution.

    ``damage`` in nats per token and ``size`` in bytes, by tensor and type; a type that refuses the rows of a tensor has
    the numbers of the last type, 16-bit floats, which the tensor takes instead.  ``price`` in nats per byte.
    ``profile`` is the type of each tensor, and ``room`` the bytes of the budget that are left.
    """

    tensors: tuple[str, ...]
    types: tuple[str, ...]
    damage: Float[np.ndarray, "tensors types"]
    size: Int[np.ndarray, "tensors types"]
    price: float
    profile: Int[np.ndarray, " tensors"]
    room: int = 0

    def regret(self) -> Float[np.ndarray, " tensors"]:
        """Return what each tensor would gain by its best type at the price, in nats per token."""
        return Game(self.damage + self.price * self.size).regret(self.profile)

    def metrics(self) -> dict[str, float]:
        """Return the price, and what one tensor and all of them would gain by other types at that price."""
        regret = self.regret()
        return {
            "players": len(regret),
            "price": self.price,
            "regret_max": float(regret.max()),
            "regret_sum": float(regret.sum()),
        }


def solve(
    tensors: tuple[str, ...],
    types: tuple[str, ...],
    damage: Float[np.ndarray, "tensors types"],
    size: Int[np.ndarray, "tensors types"],
    budget: int,
) -> TypeGame:
    """Return the types of least damage within a ``budget`` of bytes, and the price at which all are compared.

    Where the last type, 16-bit floats, is chosen through a type that was refused, the profile names that last type.
    """
    damage = damage.astype(np.float32).astype(float)  # as a file keeps it, so that its regret is this one
    _, price = optima.dual_bound(damage, size, budget)
    profile = optima.integer_programme(damage, size, budget, GAP)
    same = (size == size[:, [-1]]) & (damage == damage[:, [-1]])
    profile = np.where(np.take_along_axis(same, profile[:, None], 1)[:, 0], len(types) - 1, profile)
    return TypeGame(tensors, types, damage, size, price, profile, budget - int(optima.total(size, profile)))
