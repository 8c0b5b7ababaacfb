"""A model as training would store it, and the compressed model that it becomes."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np
from jaxtyping import UInt8
from torch import Tensor

from nashswarm.methods.method import Compressed
from nashswarm.packed import file_format
from nashswarm.packed.tiles import to_tiles
from nashswarm.quant.entropy import CodeTables, coded_bits
from nashswarm.quant.grid import QuantizedTensor
from nashswarm.quant.lattice import LatticeTensor

STALE = ("regret", "potential", "damage")  # prefixes of metrics that training makes obsolete


@dataclasses.dataclass(frozen=True)
class StoredState:
    """A model as it would be stored: packed matrices, their tensors, and the rounded tensors beside them."""

    packed: dict[str, UInt8[np.ndarray, " _"]]
    tensors: dict[str, LatticeTensor | QuantizedTensor]
    floats: list[Tensor]

    @property
    def size(self) -> int:
        """Bytes of the packed matrices."""
        return packed_bytes(self.packed)

    def weights(self) -> dict[str, Tensor]:
        """Return the matrices in float32, by name."""
        return {name: tensor.dequantize() for name, tensor in self.tensors.items()}

    def as_result(self, result: Compressed) -> Compressed:
        """Return ``result`` with these matrices in place of its own; its damages and its certificate are gone."""
        metrics, bits = dict(result.metrics), {}
        if file_format.TABLES in self.packed:
            tables = CodeTables.unpack(self.packed[file_format.TABLES])
            lattices = {name: tensor for name, tensor in self.tensors.items() if isinstance(tensor, LatticeTensor)}
            bits = {name: float(coded_bits(tensor, tables).sum()) for name, tensor in lattices.items()}
            resident = sum(to_tiles(tensor).nbytes for tensor in lattices.values())
            parameters = sum(tensor.codes.numel() for tensor in lattices.values())
            metrics["bits_per_weight_resident"] = 8 * resident / parameters
        bits_per_weight = {name: bits[name] / self.tensors[name].codes.numel() for name in bits}
        return dataclasses.replace(
            result,
            packed=self.packed,
            weights=self.weights(),
            allocation=_with_bits(result.allocation, bits_per_weight),
            code_bits=int(sum(bits.values())) if bits else result.code_bits,
            damage={},
            metrics=metrics,
            game={},
        )


def with_stale_metrics(result: Compressed) -> Compressed:
    """Return ``result`` with ``_before`` added to the names of metrics that training makes obsolete."""
    metrics = {f"{name}_before" if name.startswith(STALE) else name: value for name, value in result.metrics.items()}
    return dataclasses.replace(result, metrics=metrics)


def packed_bytes(packed: Mapping[str, Any]) -> int:
    """Return the bytes that packed matrices take."""
    return sum(len(content) for content in packed.values())


def _with_bits(allocation: str, bits_per_weight: Mapping[str, float]) -> str:
    """Return the allocation with the bits per weight that the codes of lattices take now."""
    lines = []
    for line in allocation.splitlines():
        name, *rest = line.split(" ", 2)
        if name in bits_per_weight:
            rest[0] = f"{bits_per_weight[name]:.3f}"
        lines.append(" ".join([name, *rest]) + "\n")
    return "".join(lines)
