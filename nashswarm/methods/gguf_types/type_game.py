"""The game of the tensors of a GGUF file: which type of ggml each one takes, at one price of a byte.

Tensors are players, their actions the types that llama.cpp reads and that divide their rows into blocks.  A tensor pays
its damage and its bytes times the price.  Tensors do not interact in the second-order damage, so the least damage
within a budget is a multiple-choice knapsack problem; what all tensors together could gain by any other allocation of
the budget is at most the sum of their regrets at the price (Everett 1963).
"""

import dataclasses
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int

from nashswarm.games import optima
from nashswarm.games.potential import Game
from nashswarm.layers import Layer
from nashswarm.models import gguf_architectures, gguf_file
from nashswarm.quant.ggml.types import TYPES

FLOAT = "F16"
ALL_TYPES = (*TYPES, FLOAT)
GAP = 1e-6  # of the integer programme, relative
PRICE, ACTIONS, PLAYERS, DAMAGE = (f"nashswarm.{name}" for name in ("price", "types", "tensors", "damage"))


@dataclasses.dataclass(frozen=True)
class TypeGame:
    """The game of the tensors of a model, and its solution.

    ``damage`` in nats per token and ``size`` in bytes, by tensor and type; a type that refuses the rows of a tensor has
    the numbers of F16, which the tensor takes instead.  ``price`` in nats per byte.  ``profile`` is the type of each
    tensor, and ``room`` the bytes of the budget that are left.
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


def sizes(
    layers: Sequence[Layer], types: Sequence[str]
) -> tuple[Int[np.ndarray, "layers types"], Bool[np.ndarray, "layers types"]]:
    """Return the bytes of every layer in every type, padded as in the file, and whether its rows refuse the type.

    The last type is F16, whose bytes stand where a type is refused.
    """
    size = np.zeros((len(layers), len(types)), np.int64)
    refused = np.array([[not fits(layer, name) for name in types] for layer in layers])
    for place, layer in enumerate(layers):
        rows, columns = layer.weight.shape
        floats = 2 * columns
        by_type = [TYPES[name].row_bytes(columns) if name != FLOAT and fits(layer, name) else floats for name in types]
        size[place] = [gguf_file.padded(rows * row) for row in by_type]
    return size, refused


def fits(layer: Layer, name: str) -> bool:
    """Whether the rows of a layer are whole blocks of a type."""
    return name == FLOAT or TYPES[name].fits(layer.weight.shape[1])


def solve(
    tensors: tuple[str, ...],
    types: tuple[str, ...],
    damage: Float[np.ndarray, "tensors types"],
    size: Int[np.ndarray, "tensors types"],
    budget: int,
) -> TypeGame:
    """Return the types of least damage within a ``budget`` of bytes, and the price at which all are compared.

    Where the last type, F16, is chosen through a type that was refused, the profile names F16.
    """
    damage = damage.astype(np.float32).astype(float)  # as a file keeps it, so that its regret is this one
    _, price = optima.dual_bound(damage, size, budget)
    profile = optima.integer_programme(damage, size, budget, GAP)
    same = (size == size[:, [-1]]) & (damage == damage[:, [-1]])
    profile = np.where(np.take_along_axis(same, profile[:, None], 1)[:, 0], len(types) - 1, profile)
    return TypeGame(tensors, types, damage, size, price, profile, budget - int(optima.total(size, profile)))


def certificate(game: TypeGame, model: Any) -> dict[str, Any]:
    """Return the keys of a file from which the regret of every tensor can be computed again."""
    names = gguf_architectures.layout(model).names
    return {
        PRICE: game.price,
        ACTIONS: list(game.types),
        PLAYERS: [names[f"{name}.weight"] for name in game.tensors],
        DAMAGE: game.damage.ravel().tolist(),
    }


def read_certificate(path: pathlib.Path) -> TypeGame:
    """Return the game of a file that ``certificate`` was written to, with the types that its tensors have.

    Raises ValueError if the file has none, or is no whole GGUF file.
    """
    import gguf

    try:
        reader = gguf.GGUFReader(path)
    except (ValueError, IndexError, KeyError) as error:
        raise ValueError(f"{path} is no GGUF file, or only a part of one: {error}") from error
    if any(key not in reader.fields for key in (PRICE, ACTIONS, PLAYERS, DAMAGE)):
        raise ValueError(f"{path} has no certificate of nashswarm: only files that nashswarm wrote have one")
    price, types, names, damage = (reader.fields[key].contents() for key in (PRICE, ACTIONS, PLAYERS, DAMAGE))
    stored = {tensor.name: tensor for tensor in reader.tensors}
    sized = [gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[name]] for name in types]
    size = []
    for name in names:
        columns, count = int(stored[name].shape[0]), int(stored[name].n_elements)
        floats = gguf_file.padded(2 * count)
        size.append([gguf_file.padded(count // b * n) if columns % b == 0 else floats for b, n in sized])
    profile = [types.index(stored[name].tensor_type.name) for name in names]
    return TypeGame(
        tuple(names),
        tuple(types),
        np.array(damage, float).reshape(len(names), -1),
        np.array(size),
        price,
        np.array(profile),
    )
