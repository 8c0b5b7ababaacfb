"""What a method may know of a model, and what it gives back: all that the two sides have in common."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from jaxtyping import Integer
from torch import Tensor

from nashswarm.layers import Layer, Moments
from nashswarm.progress import Track, no_track


@dataclasses.dataclass(frozen=True)
class CalibrationContext:
    """All that a method may know.

    ``fixed_bytes``: stored bytes outside the layers (norms, biases, headers, config).  ``parameters``: of the whole
    model. ``moments``: calibration statistics by module, computed or read when asked for.  ``heldout_kl``: KL in
    nats per token of the model with these layer weights (the others at full precision), on so many tokens of held-out
    calibration text (None: all of it).  ``cached``: tensors by kind and key, read from an earlier run or computed.
    ``track``: iterate with progress shown.  ``inputs_after``: E[x xᵀ] of these modules, by name, once the model has
    these layer weights.  ``calibration``: the model itself and its calibration windows, for a library that calibrates
    by its own means.
    """

    layers: tuple[Layer, ...]
    fixed_bytes: int
    parameters: int
    moments: Callable[[], Mapping[str, Moments]]
    heldout_kl: Callable[[Mapping[str, Tensor], int | None], float]
    cached: Callable[[str, Mapping[str, Any], Callable[[], dict[str, Tensor]]], dict[str, Tensor]]
    track: Track = no_track
    inputs_after: Callable[[Mapping[str, Tensor], Sequence[str]], Mapping[str, Tensor]] | None = None
    calibration: tuple[Any, Integer[Tensor, "windows length"]] | None = None
