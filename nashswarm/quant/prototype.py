"""The quantizer of the earlier prototype, as published: every weight of a tensor falls into one of three classes.

The largest 10 % of the magnitudes get 8 bits, the next 20 % get 4, the rest 2.  Each class has one min-max grid per
tensor.  Unlike the prototype, the format here also stores the class of every weight (2 bits), because nothing can be
decoded without it.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from nashswarm.quant.pack import pack_bits, unpack_bits

KIND = b"NSp1"  # first bytes of the format
CLASS_BITS = 2
CLASS_WIDTHS = (8, 4, 2)
QUANTILES = (0.9, 0.7)  # of the magnitudes, between the classes


@dataclasses.dataclass(frozen=True)
class ClassedTensor:
    """A matrix in which every weight belongs to a class.  ``grids``: minimum and step of each class, as float32."""

    classes: UInt8[np.ndarray, "out in"]
    codes: UInt8[np.ndarray, "out in"]
    grids: Float[np.ndarray, "classes 2"]

    def dequantize(self) -> Float[Tensor, "out in"]:
        """Return the float32 matrix that the codes stand for."""
        grids = self.grids[self.classes]
        return torch.from_numpy(grids[..., 0] + self.codes.astype(np.float32) * grids[..., 1])

    def pack(self) -> UInt8[np.ndarray, " bytes"]:
        """Return the stored bytes: shape, grids, class of every weight, then the codes class by class."""
        rows_columns = np.array(self.codes.shape, np.uint32)
        parts = [KIND, rows_columns.tobytes(), self.grids.tobytes(), pack_bits(self.classes.ravel(), CLASS_BITS)]
        parts += [pack_bits(self.codes[self.classes == rank], width) for rank, width in enumerate(CLASS_WIDTHS)]
        return np.frombuffer(b"".join(parts), np.uint8)

    @staticmethod
    def unpack(packed: UInt8[np.ndarray, " bytes"]) -> "ClassedTensor":
        """Return the tensor in bytes that ``pack`` wrote.  Raises ValueError if they are cut short."""
        content, position = packed.tobytes(), len(KIND)

        def take(size: int) -> bytes:
            nonlocal position
            position += size
            if position > len(content):
                raise ValueError(f"a classed matrix is cut short: {len(content)} bytes, at least {position} needed")
            return content[position - size : position]

        def integers(count: int, bits: int) -> UInt8[np.ndarray, " count"]:
            return unpack_bits(take(-(-count * bits // 8)), bits)[:count]

        rows, columns = np.frombuffer(take(8), np.uint32).astype(int).tolist()
        grids = np.frombuffer(take(8 * len(CLASS_WIDTHS)), np.float32).reshape(-1, 2)
        classes = integers(rows * columns, CLASS_BITS).reshape(rows, columns)
        codes = np.zeros_like(classes)
        for rank, width in enumerate(CLASS_WIDTHS):
            codes[classes == rank] = integers(int((classes == rank).sum()), width)
        return ClassedTensor(classes, codes, grids)


def quantize_by_magnitude(weight: Float[Tensor, "out in"], quantiles: Sequence[float]) -> ClassedTensor:
    """Assign classes by ``quantiles`` of the magnitudes, then round each class on its min-max grid.

    ``quantiles``: descending, such as 0.9 and 0.7.
    """
    values = weight.numpy()
    thresholds = np.quantile(np.abs(values), quantiles)
    classes = (np.abs(values)[..., None] < thresholds).sum(-1, dtype=np.uint8)
    codes = np.zeros(values.shape, np.uint8)
    grids = np.zeros((len(CLASS_WIDTHS), 2), np.float32)
    for rank, width in enumerate(CLASS_WIDTHS):
        members = values[classes == rank]
        if not len(members):
            continue
        low, step = members.min(), (members.max() - members.min()) / ((1 << width) - 1)
        codes[classes == rank] = np.round((members - low) / step) if step > 0 else 0
        grids[rank] = low, step
    return ClassedTensor(classes, codes, grids)
