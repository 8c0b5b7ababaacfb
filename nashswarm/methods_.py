"""What every compression method does and gives back."""

import dataclasses
from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

import numpy as np
from torch import Tensor

from nashswarm.calibration.context import Oracle


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

    def compress(self, oracle: Oracle, rng: np.random.Generator) -> Compressed: ...
