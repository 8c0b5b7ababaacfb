"""How many bytes the tiles of a model may take, so that its files take at most what was asked for."""

from collections.abc import Mapping, Sequence
from typing import Any

from nashswarm.methods.method import check_budget
from nashswarm.methods.nash_swarm import prices
from nashswarm.methods.streaming import tiles
from nashswarm.methods.streaming.layout import descriptions, file_bytes, tiled_layout
from nashswarm.methods.streaming.settings import ByPrice
from nashswarm.methods.streaming.skeleton import tensors_of, units


def bytes_for_tiles(model: Any, settings: ByPrice, kept_names: Sequence[str]) -> int:
    """Return the bytes that all tiles of a model may take; the matrices ``kept_names`` stay at 16 bits.

    Everything else is counted as if it were as long as with tiles of the highest rate, which moves only the digits of
    numbers.  Raises ValueError if the tiles do not fit even at the lowest rate.
    """
    modules = {
        name: model.get_submodule(name)
        for unit in units(model)
        for group in unit.matrices
        for name in group
        if name not in kept_names
    }
    count = sum(map(tiles.tiles_of, modules.values()))
    highest, lowest = max(settings.rates), min(settings.rates)
    size = bytes_of(
        model, {name: tiles.matrix_bytes(part, highest * tiles.tiles_of(part)) for name, part in modules.items()}
    )
    tile_bytes = prices.BYTES_PER_BIT * count
    budget = int(settings.bits * parameters_of(model) / 8)
    smallest = size - (highest - lowest) * tile_bytes
    check_budget(settings.bits, budget, smallest, parameters_of(model), f"every tile at {lowest} bits")
    return budget - (size - highest * tile_bytes)


def bytes_of(model: Any, sizes: Mapping[str, int]) -> int:
    """Return the bytes of weights and config of a model whose matrices take these bytes; all others stay at 16 bits."""
    files = tiled_layout(model, sizes)
    described = descriptions(model, files, checksum="00000000")
    return sum(file_bytes(part, on_lines=True) for part in files.values()) + sum(map(len, described.values()))


def parameters_of(model: Any) -> int:
    """Return the number of parameters of a model, shared ones once."""
    return sum(part.numel() for part in tensors_of(model).values())
