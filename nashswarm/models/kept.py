"""Say why tensors of a model are not compressed, and warn of large ones.

A saved model's config has, as ``uncompressed``, the matrices that calibration did not reach, by reason.  All other
reasons follow from the model itself.
"""

import logging
import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from nashswarm.models.matrices import MATRICES, is_router

UNCOMPRESSED = "uncompressed"  # in a config
EXCLUDED, UNKNOWN = "excluded", "unknown layout"
LARGE = 0.01  # share of all parameters from which a warning names a tensor
log = logging.getLogger(__name__)


def describe_unreached(reasons: Mapping[str, str]) -> dict[str, list[str]]:
    """Return what a config says of unreached matrices: reason → their names, with # in place of numbers.

    >>> describe_unreached({"tower.0.fc1": "not used", "tower.1.fc1": "not used"})
    {'not used': ['tower.#.fc#']}
    """
    grouped: dict[str, list[str]] = {}
    for name, reason in reasons.items():
        names = grouped.setdefault(reason, [])
        if (pattern := _pattern(name)) not in names:
            names.append(pattern)
    return grouped


def reason(model: Any, name: str, tensor: Tensor) -> str:
    """Return why a tensor of the model's state, which is no compressed matrix, is kept: in a word or two."""
    owner, _, leaf = name.rpartition(".")
    module = model.get_submodule(owner)
    if leaf not in module._parameters:
        return "buffer"
    kind = type(module).__name__.lower()
    if is_router(owner) or "router" in kind or (owner.endswith(".gate") and not isinstance(module, MATRICES)):
        return "router"
    if leaf.endswith("bias"):
        return "bias"
    if tensor.ndim < 2:
        return "norm" if "norm" in f"{kind} {name.lower()}" else "vector"
    for cause, patterns in (getattr(model.config, UNCOMPRESSED, None) or {}).items():
        if _pattern(owner) in patterns:
            return str(cause)
    if isinstance(module, MATRICES):
        return EXCLUDED
    return "convolution" if isinstance(module, _ConvNd) else UNKNOWN


def warn_of_large(model: nn.Module) -> None:
    """Warn of large parameters that no module known here holds: no method sees them, and they stay at 16 bits."""
    total = sum(parameter.numel() for parameter in model.parameters())
    for name, parameter in model.named_parameters():
        share = parameter.numel() / total
        if share >= LARGE and reason(model, name, parameter) == UNKNOWN:
            log.warning("%s: %s, so kept at 16 bits (%.1f %% of all parameters)", name, UNKNOWN, 100 * share)


def _pattern(name: str) -> str:
    return re.sub(r"\d+", "#", name)
