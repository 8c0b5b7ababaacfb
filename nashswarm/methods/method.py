"""What every compression method does and gives back."""

import dataclasses
from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

import numpy as np
from torch import Tensor

from nashswarm.calibration.context import CalibrationContext
from nashswarm.methods.bit_allocation.blocks import Bits, text
from nashswarm.quant.entropy import encode_groups
from nashswarm.quant.grid import TILE_ROWS, QuantizedTensor
from nashswarm.quant.pack import pack


@dataclasses.dataclass(frozen=True)
class Compressed:
    """The packed bytes of every layer, the weights they decode to, and what the method reports.

    ``float_bits``: the width of everything outside the layers.  ``code_bits``: the payload of the codes alone, in
    bits.  ``game``: what the players brought to the game, by which its certificate can be computed again; a saved model
    keeps it in a file beside, for no decoder needs it and it counts as no part of the model's size.  ``foreign``: the
    library whose packed form it is, if not ours.
    """

    packed: Mapping[str, Any]
    weights: Mapping[str, Tensor]
    allocation: str
    code_bits: int
    damage: Mapping[str, float] = dataclasses.field(default_factory=dict)
    metrics: Mapping[str, float] = dataclasses.field(default_factory=dict)
    series: Mapping[str, list[float]] = dataclasses.field(default_factory=dict)
    float_bits: int = 16
    game: Mapping[str, Tensor] = dataclasses.field(default_factory=dict)
    foreign: str | None = None


@runtime_checkable
class Method(Protocol):
    """What the runner asks of a method."""

    def compress(self, context: CalibrationContext, rng: np.random.Generator) -> Compressed: ...


def store_groups(
    bits: Bits,
    tensors: Mapping[str, QuantizedTensor],
    damage: Mapping[str, float] | None = None,
    metrics: Mapping[str, float] | None = None,
    series: Mapping[str, list[float]] | None = None,
    float_bits: int = 16,
    coded: bool = False,
) -> Compressed:
    """The stored form of every layer: its tiles at their widths, or entropy-coded."""
    if damage is not None:
        metrics = dict(metrics or {}) | {"damage": sum(damage.values())}
    return Compressed(
        packed={name: encode_groups(tensor) if coded else pack(tensor) for name, tensor in tensors.items()},
        weights={name: tensor.dequantize() for name, tensor in tensors.items()},
        allocation=text(bits),
        code_bits=sum(
            int((tensor.bits.double() * TILE_ROWS * tensor.scheme.group_size).sum()) for tensor in tensors.values()
        ),
        damage=damage or {},
        metrics=metrics or {},
        series=series or {},
        float_bits=float_bits,
    )
