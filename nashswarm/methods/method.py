"""The interface of compression methods: the protocol, its result, and the result in trellis tiles, tiles or groups."""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any, Protocol, runtime_checkable

import numpy as np
from torch import Tensor

from nashswarm.calibration.context import CalibrationContext
from nashswarm.kernels import trellis
from nashswarm.kernels.trellis import Trellis
from nashswarm.methods.bit_allocation.blocks import Bits, describe_widths
from nashswarm.quant.entropy import encode_groups
from nashswarm.quant.grid import TILE_ROWS, QuantizedTensor
from nashswarm.quant.pack import pack, run_lengths


@dataclasses.dataclass(frozen=True)
class Compressed:
    """A compressed model: the packed bytes of every layer, the weights they decode to, and what the method reports.

    ``packed`` and ``weights``: by layer name, in the order of the context's layers.  ``allocation``: text, one line per
    layer.  ``code_bits``: bits of the codes alone, without scales and headers.  ``damage``: predicted damage by layer,
    in nats per token.  ``metrics`` and ``series``: recorded with the result.  ``float_bits``: width of everything
    outside the layers.  ``game``: inputs of the game from which its certificate can be computed again; a saved model
    keeps them in a separate file, which no decoder needs and which does not count toward the model's size.
    ``foreign``: the library whose packed form this is, None for the formats of nashswarm.  ``file_bytes``: the size of
    the library's own file, None if the bytes of ``packed`` are stored in a checkpoint of nashswarm.  ``prices``: of the
    experts of a mixture, where the method changed them, by the name of the router's buffer.
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
    file_bytes: int | None = None
    prices: Mapping[str, Tensor] = dataclasses.field(default_factory=dict)


class DecodedWeights(Mapping[str, Tensor]):
    """The weights of trellis-coded matrices, decoded when one is asked for: all at a time are as large as the model."""

    def __init__(self, trellises: Mapping[str, Trellis]) -> None:
        self.trellises = trellises

    def __getitem__(self, name: str) -> Tensor:
        return trellis.dequantize(self.trellises[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self.trellises)

    def __len__(self) -> int:
        return len(self.trellises)


@runtime_checkable
class Method(Protocol):
    """A compression method.  Its settings are the fields of a dataclass, which refuses values that it cannot use."""

    def compress(self, context: CalibrationContext, rng: np.random.Generator) -> Compressed:
        """Compress all layers of ``context``.

        All random numbers come from ``rng``, so that the same seed gives the same bytes.
        """


def check_budget(bits: float, budget: int, smallest: int, parameters: int, at: str) -> None:
    """Raise ValueError if not even the ``smallest`` form of the layers fits into the ``budget``, both in bytes.

    ``bits``: stored bits for each of the model's ``parameters``, from which the budget follows.  ``at``: what the
    smallest form is.
    """
    if budget < smallest:
        least = bits + 8 * (smallest - budget) / parameters
        raise ValueError(
            f"method.bits={bits} is below the smallest possible size of this model, {least:.3f} bits per parameter "
            f"with {at}; raise method.bits"
        )


def store_groups(
    bits: Bits,
    tensors: Mapping[str, QuantizedTensor],
    damage: Mapping[str, float] | None = None,
    metrics: Mapping[str, float] | None = None,
    series: Mapping[str, list[float]] | None = None,
    float_bits: int = 16,
    coded: bool = False,
) -> Compressed:
    """Return ``tensors`` in packed form: tiles at their widths, or entropy-coded groups if ``coded``.

    ``bits``: width of every tile by layer, for the allocation.  The sum of ``damage`` is added to the metrics.
    """
    if damage is not None:
        metrics = dict(metrics or {}) | {"damage": sum(damage.values())}
    return Compressed(
        packed={name: encode_groups(tensor) if coded else pack(tensor) for name, tensor in tensors.items()},
        weights={name: tensor.dequantize() for name, tensor in tensors.items()},
        allocation=describe_widths(bits),
        code_bits=sum(
            int((tensor.bits.double() * TILE_ROWS * tensor.scheme.group_size).sum()) for tensor in tensors.values()
        ),
        damage=damage or {},
        metrics=metrics or {},
        series=series or {},
        float_bits=float_bits,
    )


def store_trellis(
    trellises: Mapping[str, Trellis],
    damage: Mapping[str, float] | None = None,
    metrics: Mapping[str, float] | None = None,
    series: Mapping[str, list[float]] | None = None,
    float_bits: int = 16,
    game: Mapping[str, Tensor] | None = None,
) -> Compressed:
    """Return trellis-coded matrices in packed form, which is the form that they are in: nothing is copied.

    The metrics gain the sum of ``damage``, and ``bits_per_weight_resident``, bits in memory per weight.
    """
    if damage is not None:
        metrics = dict(metrics or {}) | {"damage": sum(damage.values())}
    resident = sum(matrix.nbytes + matrix.starts.nbytes for matrix in trellises.values())
    weights = sum(matrix.rows * matrix.columns for matrix in trellises.values())
    return Compressed(
        packed={name: matrix.content.numpy() for name, matrix in trellises.items()},
        weights=DecodedWeights(trellises),
        allocation="".join(f"{name} {describe_rates(matrix)}\n" for name, matrix in trellises.items()),
        code_bits=8 * sum(matrix.payload.nbytes for matrix in trellises.values()),
        damage=damage or {},
        metrics={"bits_per_weight_resident": 8 * resident / weights} | dict(metrics or {}),
        series=series or {},
        float_bits=float_bits,
        game=game or {},
    )


def describe_rates(matrix: Trellis) -> str:
    """Return the grid of tiles, their mean rate in bits per weight, and their rates: "2x4 3.125 3*5 4 3*2".

    Rates are run-length coded.  Most runs are of one tile, whose count is left out.
    """
    rates = trellis.tile_rates(matrix).numpy().astype(int)
    runs = (
        f"{rate}*{length}" if length > 1 else f"{rate}"
        for rate, length in zip(*run_lengths(rates.ravel()), strict=True)
    )
    return f"{rates.shape[0]}x{rates.shape[1]} {rates.mean():.3f} {' '.join(runs)}"
