"""What a method may know of a model, and what it gives back: all that the two sides have in common."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Integer
from torch import Tensor

from nashswarm.allocation import Layer
from nashswarm.layers import Moments
from nashswarm.progress import Track, no_track


@dataclasses.dataclass(frozen=True)
class Oracle:
    """All that a method may know.

    ``fixed_bytes``: stored bytes outside the layers (norms, biases, headers, config).  ``parameters``: of the whole
    model. ``moments``: calibration statistics by module, computed or read when asked for.  ``heldout_kl``: KL in
    nats per token of the model with these layer weights (the others at full precision), on so many tokens of held-out
    calibration text (None: all of it).  ``remember``: tensors by kind and key, read from an earlier run or computed.
    ``track``: iterate with progress shown.  ``inputs_after``: E[x xᵀ] of these modules, by name, once the model has
    these layer weights.  ``calibration``: the model itself and its calibration windows, for a library that calibrates
    by its own means.
    """

    layers: tuple[Layer, ...]
    fixed_bytes: int
    parameters: int
    moments: Callable[[], Mapping[str, Moments]]
    heldout_kl: Callable[[Mapping[str, Tensor], int | None], float]
    remember: Callable[[str, Mapping[str, Any], Callable[[], dict[str, Tensor]]], dict[str, Tensor]]
    track: Track = no_track
    inputs_after: Callable[[Mapping[str, Tensor], Sequence[str]], Mapping[str, Tensor]] | None = None
    calibration: tuple[Any, Integer[Tensor, "windows length"]] | None = None


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


class NotOffered(ValueError):
    """A method that has nothing to offer here: not at these bits, or not without a package that is absent.  In a sweep
    it is left out, which is no failure."""
