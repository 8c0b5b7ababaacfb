"""The encoder of trellis tiles: best codes of columns, alone, inside error feedback, and inside sweeps.

The C++ library computes (``csrc/trellis_encode.cpp``).  ``encoder_reference`` computes the same in torch where the
library is missing, and is what it is tested against.  Matrices are transposed and contiguous: one row of a tensor is
one column of the weights, ``stored_rows`` long.
"""

import ctypes
import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float, Float64, Int32, UInt8
from torch import Tensor

from nashswarm.kernels import encoder_reference as reference
from nashswarm.kernels import native
from nashswarm.kernels.trellis_codes import INT8, STEPS, tables

RATES = INT8 + 1
GROUPS_AT_ONCE = 4  # of rows, that the library encodes together
OFFSETS = (-4, -2, 0, 2, 4, 7)  # of a column's scale from its root mean square, in 1/16 octave
KEEP = 255  # instead of a rate: the tile stays as it is


class _Encoder(ctypes.Structure):
    """``struct Encoder`` of csrc/trellis_encode.cpp."""

    _fields_ = [("rows", ctypes.c_int64), ("tables", ctypes.c_uint64), ("size", ctypes.c_uint64)]


@dataclasses.dataclass(frozen=True)
class Columns:
    """Some columns of a matrix that is being encoded, each a row of the tensors.

    ``values``: the weights that ``codes`` stand for; both are changed in place.  ``scales``: of the columns, which
    error feedback chooses.
    ``size``: of the stored rows.  A weight is expected to be about as large as the size of its row times the scale of
    its column.
    """

    codes: UInt8[Tensor, "columns stored_rows"]
    values: Float[Tensor, "columns stored_rows"]
    scales: Float[Tensor, " columns"]
    size: Float[Tensor, " stored_rows"]


def best_codes(
    targets: Float[Tensor, "sequences 16"],
    weights: Float[Tensor, "sequences 16"],
    rate: int,
    table: Float[Tensor, "windows plain"] | None = None,
) -> UInt8[Tensor, "sequences 16"]:
    """Return the codes of least weighted squared error of sequences of 16 weights, in units of the tables.

    ``table``: of the rate; by default the one of the form.
    """
    if not _has_library():
        return reference.best_codes(targets, weights, rate, table)
    codes = torch.empty(targets.shape, dtype=torch.uint8)
    targets, weights = targets.contiguous(), weights.contiguous()
    used = _tables() if table is None else _padded({rate: table})
    _library().nashswarm_trellis_paths(
        used.data_ptr(), rate, targets.data_ptr(), weights.data_ptr(), len(targets), codes.data_ptr(), _threads()
    )
    return codes


def feedback(
    columns: Columns,
    targets: Float[Tensor, "columns stored_rows"],
    factor: Float[Tensor, "columns columns"],
    rates: UInt8[Tensor, "columns groups"],
    offsets: Sequence[int] = OFFSETS,
) -> Float[Tensor, "columns stored_rows"]:
    """Encode a block of columns one after another; each error moves to the later columns, whose ``targets`` change.

    The scale of a column is its root mean square times a power of two: the one of least error among ``offsets``, in
    steps of 1/16 octave.  ``factor``: the block of ``curvature.inverse_cholesky``.  Returns the errors that columns
    after the block have to compensate for: they lose ``factor`` times the errors.
    """
    if not _has_library():
        return reference.feedback(columns, targets, factor, rates, offsets)
    errors = torch.empty_like(targets)
    factor, rates = factor.contiguous(), rates.contiguous()
    choices = torch.tensor(offsets, dtype=torch.int32)
    costs = torch.empty(-(-rates.shape[1] // GROUPS_AT_ONCE), len(offsets), dtype=torch.float64)
    codes, values = (torch.empty(len(offsets), targets.shape[1], dtype=kind) for kind in (torch.uint8, torch.float32))
    _library().nashswarm_trellis_feedback(
        _encoder(columns, targets), len(targets), targets.data_ptr(), factor.data_ptr(), choices.data_ptr(),
        len(offsets), rates.data_ptr(), columns.codes.data_ptr(), columns.values.data_ptr(),
        columns.scales.data_ptr(), errors.data_ptr(), costs.data_ptr(), codes.data_ptr(), values.data_ptr(), _threads(),
    )  # fmt: skip
    return errors


def sweep(
    columns: Columns,
    slopes: Float[Tensor, "columns stored_rows"],
    curvature: Float[Tensor, "columns columns"],
    rates: UInt8[Tensor, "columns groups"],
) -> tuple[Float[Tensor, "columns stored_rows"], Float64[Tensor, " groups"], int]:
    """Give each column its best codes, one after another, while all others stay.

    ``slopes``, (W − Q) H of these columns, follow the moves.  Returns the moves of the values, by how much the damage
    of each group fell, and the number of sequences that changed.
    """
    if not _has_library():
        return reference.sweep(columns, slopes, curvature, rates)
    moves, gains = torch.zeros_like(slopes), torch.zeros(rates.shape[1], dtype=torch.float64)
    curvature, rates = curvature.contiguous(), rates.contiguous()
    changed = _library().nashswarm_trellis_sweep(
        _encoder(columns, slopes), len(slopes), slopes.data_ptr(), curvature.data_ptr(), columns.scales.data_ptr(),
        rates.data_ptr(), columns.codes.data_ptr(), columns.values.data_ptr(), moves.data_ptr(), gains.data_ptr(),
        _threads(),
    )  # fmt: skip
    return moves, gains, int(changed)


def deviations(
    columns: Columns,
    slopes: Float[Tensor, "columns stored_rows"],
    curvature: Float[Tensor, "columns columns"],
    masks: Int32[Tensor, " groups"],
) -> Float64[Tensor, "groups 9"]:
    """Return how much the damage would change if a tile took another rate, for each group of rows and each rate.

    The columns are those of one tile.  They reply one after another at the other rate while everything else stays.
    Bit r of its mask says whether a group tries rate r; others have a change of 0.
    """
    return _deviate(columns, slopes, curvature, masks, adopted=False)[1]


def adopt(
    columns: Columns,
    slopes: Float[Tensor, "columns stored_rows"],
    curvature: Float[Tensor, "columns columns"],
    rates: UInt8[Tensor, " groups"],
) -> Float[Tensor, "columns stored_rows"]:
    """Let the tiles of one tile column take these rates (``KEEP``: stay), and return the moves of the values."""
    masks = torch.where(rates == KEEP, 0, 1 << rates.int().clamp(max=INT8)).int()
    return _deviate(columns, slopes, curvature, masks, adopted=True)[0]


def _deviate(
    columns: Columns, slopes: Tensor, curvature: Tensor, masks: Tensor, adopted: bool
) -> tuple[Tensor, Tensor]:
    if not _has_library():
        return reference.deviate(columns, slopes, curvature, masks, adopted)
    moves = torch.zeros_like(slopes) if adopted else slopes.new_empty(0)
    changes = torch.zeros(len(masks), RATES, dtype=torch.float64)
    curvature, masks = curvature.contiguous(), masks.int().contiguous()
    _library().nashswarm_trellis_deviations(
        _encoder(columns, slopes), len(slopes), slopes.data_ptr(), curvature.data_ptr(), columns.scales.data_ptr(),
        masks.data_ptr(), adopted, columns.codes.data_ptr(), columns.values.data_ptr(), moves.data_ptr(),
        changes.data_ptr(), _threads(),
    )  # fmt: skip
    return moves, changes


@functools.cache
def _tables() -> Float[Tensor, "7 128"]:
    """Return the tables of all rates as floats, each filled up to 128 entries."""
    return _padded({rate: torch.from_numpy(table) for rate, table in tables().items()})


def _padded(tables_by_rate: Mapping[int, Tensor]) -> Float[Tensor, "7 128"]:
    padded = torch.zeros(INT8 - 1, 128)
    for rate, table in tables_by_rate.items():
        padded[rate % INT8 - 1, : table.numel()] = table.flatten()
    return padded


def _encoder(columns: Columns, changed: Tensor) -> Any:
    parts = (columns.codes, columns.values, columns.scales, columns.size, changed)
    assert all(part.is_contiguous() for part in parts) and columns.codes.shape[1] % (4 * STEPS) == 0
    return ctypes.byref(_Encoder(len(columns.size), _tables().data_ptr(), columns.size.data_ptr()))


def _threads() -> int:
    return torch.get_num_threads()


def _has_library() -> bool:
    return native.path() != native.SLOW


@functools.cache
def _library() -> ctypes.CDLL:
    library = native.library()
    assert not isinstance(library, str)
    pointer, int64, int32 = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
    library.nashswarm_trellis_paths.argtypes = [pointer, int32, pointer, pointer, int64, pointer, int32]
    library.nashswarm_trellis_feedback.argtypes = [pointer, int64, *[pointer] * 3, int64, *[pointer] * 8, int32]
    library.nashswarm_trellis_sweep.argtypes = [pointer, int64, *[pointer] * 8, int32]
    library.nashswarm_trellis_deviations.argtypes = [pointer, int64, *[pointer] * 4, int32, *[pointer] * 4, int32]
    library.nashswarm_trellis_sweep.restype = int64
    for name in ("paths", "feedback", "deviations"):
        getattr(library, f"nashswarm_trellis_{name}").restype = None
    return library
