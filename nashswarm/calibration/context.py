"""The interface between compression methods and the model: what a method may know, and nothing else."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from jaxtyping import Integer
from torch import Tensor

from nashswarm.calibration.expert_traffic import RoutedExperts
from nashswarm.layers import Layer, Moments
from nashswarm.progress import Track, no_track

Quantize = Callable[[Mapping[str, Moments]], Mapping[str, Tensor]]


def _unknown(*_: Any, **__: Any) -> Mapping[str, Moments]:
    raise NotImplementedError("this context has no such statistics")


@dataclasses.dataclass(frozen=True)
class CalibrationContext:
    """All that a compression method may know of a model.

    - ``layers``: the weight matrices to compress.
    - ``fixed_bytes``: stored bytes outside of the layers (norms, biases, headers, config).
    - ``parameters``: number of parameters of the whole model.
    - ``moments()`` returns the calibration statistics by module name, computed on first use or read from the cache.
    - ``heldout_kl(weights, tokens)`` returns the KL divergence, in nats per token, of the model with these layer
      weights (all others in full precision), on that many tokens of held-out calibration text (None: all of it).
    - ``cached(kind, key, compute)`` returns tensors, read from an earlier run or computed.
    - ``track(items, description)`` iterates over items and shows progress.
    - ``zipf_moments(share=1)`` returns the same of tokens that are expected by Zipf's law, and not evenly.  One in
      ``share`` windows counts.
    - ``moments_after(quantize, key)`` returns the latter with gradients of the model whose weights ``quantize`` makes
      from them; ``key`` names these in the cache.
    - ``inputs_after(weights, names)`` returns E[x xᵀ] of these modules in the model with these layer weights.
    - ``calibration``: the model and its calibration windows, for libraries that calibrate by their own means.
    - ``experts``: traffic and prices of the experts of a mixture.
    """

    layers: tuple[Layer, ...]
    fixed_bytes: int
    parameters: int
    moments: Callable[[], Mapping[str, Moments]]
    heldout_kl: Callable[[Mapping[str, Tensor], int | None], float]
    cached: Callable[[str, Mapping[str, Any], Callable[[], dict[str, Tensor]]], dict[str, Tensor]]
    track: Track = no_track
    zipf_moments: Callable[..., Mapping[str, Moments]] = _unknown
    moments_after: Callable[[Quantize, Mapping[str, Any]], Mapping[str, Moments]] = _unknown
    inputs_after: Callable[[Mapping[str, Tensor], Sequence[str]], Mapping[str, Tensor]] | None = None
    calibration: tuple[Any, Integer[Tensor, "windows length"]] | None = None
    experts: RoutedExperts | None = None
