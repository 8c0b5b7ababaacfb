"""The types of the tensors of a GGUF file, their bytes, and the game that is written into the file and read from it.

The actions of a tensor are the types that llama.cpp reads and that divide its rows into blocks.
"""

import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Int

from nashswarm.layers import Layer
from nashswarm.methods.type_game import TypeGame
from nashswarm.models import gguf_architectures, gguf_file
from nashswarm.quant.ggml.types import TYPES

FLOAT = "F16"
ALL_TYPES = (*TYPES, FLOAT)
PRICE, ACTIONS, PLAYERS, DAMAGE = (f"nashswarm.{name}" for name in ("price", "types", "tensors", "damage"))


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
