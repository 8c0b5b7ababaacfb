"""Moments of many modules in little memory: symmetric matrices by their upper half, shared ones once."""

import collections
import dataclasses
import mmap
from collections.abc import Iterator, Mapping

import torch
from jaxtyping import Float
from torch import Tensor

from nashswarm.layers import Moments

GRADIENTS = ("outputs", "coupled")  # fields of moments that are of gradients alone
BLOCK = 128  # rows of a symmetric matrix that are stored together, from the diagonal on


@dataclasses.dataclass(frozen=True)
class SymmetricMatrix:
    """The upper half of a symmetric matrix of ``size`` rows, in place of both halves.

    ``entries``: block rows one after another, each from its block on the diagonal to the right.
    """

    size: int
    entries: Float[Tensor, " entries"]

    @classmethod
    def zeros(cls, size: int) -> "SymmetricMatrix":
        """Return a matrix of zeros, on the CPU.

        It has pages of its own: sums that live long, between activations that do not, would leave holes in the heap.
        """
        entries = sum(min(BLOCK, size - start) * (size - start) for start in range(0, size, BLOCK))
        pages = mmap.mmap(-1, 4 * entries, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        return cls(size, torch.frombuffer(pages, dtype=torch.float32))

    @classmethod
    def of(cls, matrix: Float[Tensor, "size size"]) -> "SymmetricMatrix":
        """Return the upper half of a full matrix."""
        half = cls.zeros(len(matrix))
        for start, rows in half.block_rows():
            rows.copy_(matrix[start : start + BLOCK, start:])
        return half

    def block_rows(self) -> Iterator[tuple[int, Float[Tensor, "height width"]]]:
        """Iterate over the first row of each block row, and a view of its entries."""
        used = 0
        for start in range(0, self.size, BLOCK):
            height, width = min(BLOCK, self.size - start), self.size - start
            yield start, self.entries[used : used + height * width].view(height, width)
            used += height * width

    def add_gram(self, rows: Float[Tensor, "any size"]) -> None:
        """Add ``rowsᵀ rows`` in place: half of the operations of a full product, and no other memory on a CPU."""
        for start, part in self.block_rows():
            left, right = rows[:, start : start + BLOCK].T, rows[:, start:]
            if rows.device == part.device:
                part.addmm_(left, right)
            else:
                part.add_((left @ right).to(part.device))

    def full(self) -> Float[Tensor, "size size"]:
        """Return both halves."""
        matrix = torch.empty(self.size, self.size)
        for start, rows in self.block_rows():
            matrix[start:, start : start + BLOCK] = rows.T
            matrix[start : start + BLOCK, start:] = rows
        return matrix

    def trace(self) -> float:
        """Return the sum of the diagonal."""
        return sum(float(rows.diagonal().double().sum()) for _, rows in self.block_rows())

    def clone(self) -> "SymmetricMatrix":
        """Return a copy that shares no memory."""
        return SymmetricMatrix(self.size, self.entries.clone())


@dataclasses.dataclass(frozen=True)
class PackedMoments:
    """``layers.Moments`` of one module, of whose symmetric matrices one half is stored."""

    inputs: SymmetricMatrix | Tensor
    outputs: Float[Tensor, " out"]
    coupled: Float[Tensor, " out"]
    coupled_inputs: SymmetricMatrix | Tensor

    @classmethod
    def of(cls, moments: Moments) -> "PackedMoments":
        """Pack full moments."""
        return cls(_pack(moments.inputs), moments.outputs, moments.coupled, _pack(moments.coupled_inputs))

    def full(self) -> Moments:
        """Return full moments."""
        return Moments(_unpack(self.inputs), self.outputs, self.coupled, _unpack(self.coupled_inputs))


class MomentsTable(collections.UserDict[str, Moments]):
    """Moments by module name, as large as half the matrices in them.

    They are unpacked whenever one is asked for, so that full matrices exist for the layer in work alone.  ``data``
    holds them packed; modules with the same inputs share one matrix there.
    """

    data: dict[str, PackedMoments]  # type: ignore[assignment]  # of what the table stands for

    @classmethod
    def of(cls, moments: Mapping[str, Moments]) -> "MomentsTable":
        """Return a table of its own, from which modules can be deleted; the matrices of another table are shared."""
        if not isinstance(moments, MomentsTable):
            return cls(moments)
        table = cls()
        table.data = dict(moments.data)
        return table

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> "MomentsTable":
        """Return the table of ``tensors()``."""
        fields: dict[str, dict[str, SymmetricMatrix | Tensor]] = {}
        for key, tensor in tensors.items():
            uses, size = key.rsplit("/", 1)
            part = SymmetricMatrix(int(size), tensor) if size else tensor
            for use in uses.split():
                name, field = use.rsplit(":", 1)
                fields.setdefault(name, {})[field] = part
        table = cls()
        table.data = {name: PackedMoments(**parts) for name, parts in fields.items()}  # type: ignore[arg-type]
        return table

    def tensors(self) -> dict[str, Tensor]:
        """Return all moments as tensors to store, shared ones once: ``name:field name:field …/size`` → entries.

        ``size`` is that of a symmetric matrix, and empty for a vector.
        """
        stored: dict[int, tuple[list[str], SymmetricMatrix | Tensor]] = {}
        for name, moments in self.data.items():
            for field in dataclasses.fields(PackedMoments):
                part = getattr(moments, field.name)
                stored.setdefault(id(part), ([], part))[0].append(f"{name}:{field.name}")
        tensors: dict[str, Tensor] = {}
        for uses, part in stored.values():
            size, tensor = (part.size, part.entries) if isinstance(part, SymmetricMatrix) else ("", part)
            tensors[f"{' '.join(uses)}/{size}"] = tensor
        return tensors

    def gradients(self) -> dict[str, Tensor]:
        """Return the moments of gradients as tensors to store, none of them shared, by ``name:field``."""
        return {
            f"{name}:{field}": getattr(moments, field).clone()
            for name, moments in self.data.items()
            for field in GRADIENTS
        }

    def with_gradients(self, gradients: Mapping[str, Tensor]) -> "MomentsTable":
        """Return a table with these ``gradients()`` in place of its own; the matrices are shared."""
        table = type(self)()
        for name, moments in self.data.items():
            parts = {field: gradients[f"{name}:{field}"] for field in GRADIENTS}
            table.data[name] = dataclasses.replace(moments, **parts)
        return table

    def __getitem__(self, name: str) -> Moments:
        return self.data[name].full()

    def __setitem__(self, name: str, moments: Moments) -> None:
        self.data[name] = PackedMoments.of(moments)


def _pack(part: Tensor) -> SymmetricMatrix | Tensor:
    return SymmetricMatrix.of(part) if part.ndim == 2 else part


def _unpack(part: SymmetricMatrix | Tensor) -> Tensor:
    return part.full() if isinstance(part, SymmetricMatrix) else part
