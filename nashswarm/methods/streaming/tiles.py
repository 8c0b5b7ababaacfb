"""Matrices in trellis tiles, one at a time: the damages that tiles expect, and the codes at given rates."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Float64, UInt8
from torch import Tensor

from nashswarm import layers
from nashswarm.kernels import trellis as form
from nashswarm.layers import Layer, Moments
from nashswarm.methods.nash_swarm import prices
from nashswarm.methods.nash_swarm.prices import Damage
from nashswarm.methods.nash_swarm.solver import SETTLED
from nashswarm.methods.nash_swarm.workers import one_thread_each
from nashswarm.methods.streaming.settings import ByPrice
from nashswarm.methods.streaming.skeleton import shape_of
from nashswarm.quant import trellis
from nashswarm.quant.trellis_arrangement import Arrangement, arrange

Energies = Float64[Tensor, "_groups _tiles 2"]  # of ``Arrangement.energies``
TileRates = UInt8[Tensor, "_groups _tiles"]


class ExpectedDamages(Sequence[Damage]):
    """The expected damage of each tile at each rate, by matrix; computed when it is asked for, as it takes memory."""

    def __init__(self, energies: Sequence[Energies]) -> None:
        self.energies = energies

    def __getitem__(self, number: Any) -> Any:
        return prices.expected_damage(self.energies[number].numpy())

    def __len__(self) -> int:
        return len(self.energies)

    def __iter__(self) -> Iterator[Damage]:
        return (self[number] for number in range(len(self)))


def as_layer(name: str, modules: tuple[str, ...], weight: Float[Tensor, "out in"]) -> Layer:
    """Return a matrix as the methods know it; ``modules``: all that share it."""
    return Layer(name, name.rpartition(".")[2], 0.0, modules, ("Linear",) * len(modules), weight)


def energies_of(matrices: Sequence[Layer], moments: Mapping[str, Moments], settings: ByPrice) -> Iterator[Energies]:
    """Yield the energies of each matrix, as ``nash_swarm`` estimates them."""

    def energies(layer: Layer) -> Energies:
        arrangement, factor = _arranged(layer, moments, settings)
        return arrangement.energies(factor)

    return one_thread_each(energies, matrices)


def encoded(
    matrices: Sequence[Layer], moments: Mapping[str, Moments], rates: Sequence[TileRates], settings: ByPrice
) -> Iterator[tuple[UInt8[Tensor, " bytes"], float]]:
    """Yield the stored bytes of each matrix at these rates, and its damage in nats per token."""

    def encode(layer: Layer, part: TileRates) -> tuple[Tensor, float]:
        state = trellis.feedback(*_arranged(layer, moments, settings), part)
        for _ in range(settings.sweeps):
            gain, changed = trellis.sweep(state)
            if not changed or gain < SETTLED:
                break
        damage, layout, codes = state.damage, state.arrangement.layout, state.encoded()
        del state
        return trellis.finish(layout, codes).content, damage

    return one_thread_each(encode, matrices, rates)


def _arranged(
    layer: Layer, moments: Mapping[str, Moments], settings: ByPrice
) -> tuple[Arrangement, Float[Tensor, "columns columns"]]:
    # no name for the curvature here: arranging lets it go, and an embedding's is as large as its weights
    return arrange(layer.weight, layers.curvature(layer, moments, settings.floor), seed=settings.seed)


def tiles_of(module: Any) -> int:
    """Return the number of tiles of the matrix of a module."""
    rows, columns = shape_of(module)
    return form.groups_of(rows) * form.tiles_across(columns)


def matrix_bytes(module: Any, tile_bits: int) -> int:
    """Return the stored bytes of the matrix of a module whose tiles have so many bits per weight in sum."""
    return form.side_bytes(*shape_of(module), True, True) + tile_bits * prices.BYTES_PER_BIT


def choose_rates(energies: Sequence[Energies], left: int, allowed: Sequence[int]) -> tuple[list[TileRates], float]:
    """Return the rates of least damage at one price at which all tiles take at most ``left`` bytes, and the price."""
    damages = ExpectedDamages(energies)
    price = prices.price_for(damages, left, allowed)
    rates = [torch.from_numpy(prices.best_rates(part, price, allowed).astype(np.uint8)) for part in damages]
    return rates, price
