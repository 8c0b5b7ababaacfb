"""What a compared library can do, and how its packed tensors are counted."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from nashswarm import errors
from nashswarm.layers import Layer
from nashswarm.quant.grid import Scheme, quantize
from nashswarm.quant.pack import pack

Packed = tuple[UInt8[np.ndarray, " bytes"], Float[Tensor, "out in"]]  # stored bytes, and the weights they decode to
PackMatrix = Callable[[Tensor, int, int | None], Packed]  # (weight, bits, group size)
TuneModel = Callable[[Any, Tensor, Sequence[Layer], int, int, int], dict[str, Packed]]
GROUP_SIZES = (32, 64, 128, 256)  # columns per scale that most libraries support


@dataclasses.dataclass(frozen=True)
class Library:
    """The formats of a library and the function that packs with it.

    ``pack``: packs one matrix at a number of bits and columns per scale.  ``tune``: packs all layers of a model at
    once, with its calibration windows and a seed.  A library has one of the two.  ``formats``: bits → supported group
    sizes, None for one scale per row.  ``needs``: required packages; ``extra``: the extra of nashswarm that installs
    them.  ``groups_per_word``: the number of groups of a matrix must be a multiple of it.  ``row_multiple``: the number
    of rows must be a multiple of it, except in an embedding, which the library pads.
    """

    pack: PackMatrix | None
    formats: Mapping[int, Sequence[int | None]]
    needs: tuple[str, ...]
    extra: str = "peers"
    groups_per_word: int = 1
    row_multiple: int = 1
    tune: TuneModel | None = None

    def require(self, setting: str) -> None:
        """Check that all packages are installed.  Raises MissingPackage, whose message names ``setting``, if not."""
        errors.require(setting, self.needs, self.extra)

    def fits(self, layer: Layer, group_size: int | None) -> bool:
        """Return whether the library can pack ``layer`` with ``group_size`` columns per scale (None: all columns)."""
        rows, columns = layer.weight.shape
        size = group_size or columns
        rows_fit = rows % self.row_multiple == 0 or "Embedding" in layer.kinds
        return rows_fit and columns % size == 0 and layer.parameters // size % self.groups_per_word == 0


def pack_as_float16(weight: Float[Tensor, "out in"]) -> Packed:
    """Return ``weight`` stored as 16-bit floats, for a layer that a library cannot pack."""
    tensor = quantize(weight, 16, Scheme(group_size=1))
    return pack(tensor), tensor.dequantize()


def concatenate_bytes(*parts: Tensor | np.ndarray) -> UInt8[np.ndarray, " bytes"]:
    """Return the raw contents of tensors and arrays, one after another."""
    tensors = (torch.from_numpy(part.copy()) if isinstance(part, np.ndarray) else part for part in parts)
    return torch.cat([tensor.detach().contiguous().flatten().view(torch.uint8) for tensor in tensors]).numpy()
