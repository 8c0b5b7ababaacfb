"""The C++ library: loading it, choosing an instruction set, and calling it with the addresses of tensors.

The environment variable ``NASHSWARM_KERNEL`` (avx512vbmi, avx512, avx2, neon, portable or torch) forces a path.  By
default it is the first of these that the machine supports.  Tiles of fixed width do not use VBMI or NEON.
"""

import ctypes
import functools
import logging
import os
import pathlib
from typing import cast

import torch
from jaxtyping import Float32, Int64
from torch import Tensor

from nashswarm.kernels import tiles as layout
from nashswarm.kernels.tiles import Tiles

LIBRARY = pathlib.Path(__file__).parent / "nashswarm_kernels.so"
VARIABLE = "NASHSWARM_KERNEL"
PATHS = {"avx512vbmi": 3, "avx512": 2, "avx2": 1, "neon": 4, "portable": 0}  # fastest first; numbers in the library
SLOW = "torch"
INTERFACE = 12  # version of the functions and of Matrix, as in csrc/library.cpp
NO_MEMORY = -2  # what nashswarm_experts returns then
DIGITS = {"int8": 1, "float32": 3}  # number of signed bytes that represent an activation

log = logging.getLogger(__name__)


class Matrix(ctypes.Structure):
    """``struct Matrix`` of csrc/matrix.h, with addresses as integers."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ("rows", "columns", "group_size")),
        *(
            (name, ctypes.c_uint64)
            for name in (
                *("payload", "scale", "zero_point", "row_scale", "column_scale"),
                *("escape_starts", "escape_places", "escape_codes", "starts", "tiles"),
            )
        ),
    ]


@functools.cache
def library() -> ctypes.CDLL | str:
    """Load the library, or return the reason why it cannot be loaded."""
    if not LIBRARY.exists():
        return "the C++ library was not built: install nashswarm again where CMake finds a C++ compiler"
    try:
        loaded = ctypes.CDLL(str(LIBRARY))
    except OSError as error:
        return str(error)
    if loaded.nashswarm_interface() != INTERFACE:
        return "the C++ library was built from other sources: install nashswarm again"
    loaded.nashswarm_matmul.argtypes = [*[ctypes.c_void_p] * 4, ctypes.c_int64, *[ctypes.c_int] * 3]
    loaded.nashswarm_rows.argtypes = [*[ctypes.c_void_p] * 3, ctypes.c_int64]
    loaded.nashswarm_rows.restype = ctypes.c_int64
    loaded.nashswarm_route.argtypes = [
        *[ctypes.c_void_p] * 4, *[ctypes.c_int64] * 4, *[ctypes.c_void_p] * 2, ctypes.c_int,
    ]  # fmt: skip
    loaded.nashswarm_sums.argtypes = [*[ctypes.c_void_p] * 3, *[ctypes.c_int64] * 3, ctypes.c_void_p, ctypes.c_int]
    loaded.nashswarm_sums.restype = None
    loaded.nashswarm_experts.argtypes = [*[ctypes.c_void_p] * 5, *[ctypes.c_int64] * 5, *[ctypes.c_void_p] * 2]
    loaded.nashswarm_experts.restype = ctypes.c_int64
    loaded.nashswarm_group.argtypes = [ctypes.c_void_p, *[ctypes.c_int64] * 2, *[ctypes.c_void_p] * 3]
    loaded.nashswarm_group.restype = ctypes.c_int64
    loaded.nashswarm_trellis_circles.argtypes = [
        ctypes.c_void_p, ctypes.c_int64, ctypes.c_int, *[ctypes.c_void_p] * 3, ctypes.c_int64, ctypes.c_void_p,
    ]  # fmt: skip
    loaded.nashswarm_trellis_circles.restype = None
    return loaded


def available() -> list[str]:
    """Return the paths that this machine supports, fastest first."""
    loaded = library()
    if isinstance(loaded, str):
        return [SLOW]
    return [*(name for name, number in PATHS.items() if loaded.nashswarm_supports(number)), SLOW]


@functools.cache
def path() -> str:
    """Return the path that is used, and log it once.

    Raises ValueError if ``NASHSWARM_KERNEL`` names an unknown path, or one that the machine does not support.
    """
    paths = available()
    chosen = os.environ.get(VARIABLE) or paths[0]
    if chosen not in (*PATHS, SLOW):
        raise ValueError(f"{VARIABLE}={chosen} is no path: choose {', '.join((*PATHS, SLOW))}, or unset it")
    if chosen not in paths:
        raise ValueError(f"{VARIABLE}={chosen} cannot be taken here: choose {', '.join(paths)}, or unset it")
    log.log(logging.WARNING if chosen == SLOW else logging.INFO, describe_path(chosen))
    return chosen


def describe_path(chosen: str) -> str:
    """Return the log message for a path; for torch it says why the library is not used."""
    if chosen != SLOW:
        return f"packed weights are multiplied by the C++ library, path {chosen}"
    loaded = library()
    reason = loaded if isinstance(loaded, str) else f"{VARIABLE}={SLOW}"
    return f"packed weights are multiplied by torch, which is slow: {reason}"


def matrix_of(tiles: Tiles) -> Matrix:
    """Return the struct that the library reads.

    It is made once and stored with the order of the tiles, and made again if the payload has another address.
    """
    matrix = tiles.order.__dict__.get("matrix")
    if matrix is None or matrix.payload != tiles.payload.data_ptr():
        matrix = tiles.order.__dict__["matrix"] = _matrix(tiles)
    return cast(Matrix, matrix)


def _matrix(tiles: Tiles) -> Matrix:
    floats = [part.float() for part in (tiles.row_scale, tiles.column_scale)]
    escapes = [part.int() for part in (tiles.escape_starts, tiles.escape_places, tiles.escape_codes)]
    parts = [part.contiguous() for part in (tiles.payload, tiles.scale.half(), tiles.zero_point, *floats, *escapes)]
    starts = 4 * (len(layout.WIDTHS) - 1) * -(-len(tiles.widths) // layout.SPAN) + 4
    addresses = [part.data_ptr() if part.numel() else 0 for part in (*parts, tiles.order)]
    matrix = Matrix(tiles.rows, tiles.columns, tiles.group_size, *addresses, tiles.order.data_ptr() + starts)
    matrix.parts = parts  # keeps the tensors alive as long as their addresses are in use
    matrix.address, matrix.multiply = ctypes.addressof(matrix), _library().nashswarm_matmul
    return matrix


def matmul(
    x: Float32[Tensor, "*batch columns"], tiles: Tiles, activations: str, bias: Float32[Tensor, " rows"] | None
) -> Float32[Tensor, "*batch rows"]:
    """Compute x Wᵀ + bias for contiguous tensors on the CPU.

    Raises MemoryError if there is no memory for the rounded activations.
    """
    matrix = matrix_of(tiles)
    batch = x.numel() // matrix.columns
    product = torch.empty(batch, matrix.rows) if x.dim() == 2 else torch.empty(*x.shape[:-1], matrix.rows)
    failed = matrix.multiply(
        matrix.address,
        x.data_ptr(),
        None if bias is None else bias.data_ptr(),
        product.data_ptr(),
        batch,
        DIGITS[activations],
        torch.get_num_threads(),
        PATHS[path()],
    )
    if failed:
        raise MemoryError(f"no memory is left to round activations of shape {tuple(x.shape)}: take fewer at once")
    return product


def rows_of(tiles: Tiles, ids: Int64[Tensor, "*shape"]) -> Float32[Tensor, "*shape columns"]:
    """Return the rows ``ids`` of the dequantized matrix, for contiguous ``ids`` on the CPU.

    Raises IndexError for a row that does not exist.
    """
    matrix = matrix_of(tiles)
    rows = torch.empty(*ids.shape, tiles.columns)
    invalid = _library().nashswarm_rows(matrix.address, ids.data_ptr(), rows.data_ptr(), ids.numel())
    if invalid >= 0:
        raise layout.missing_row(tiles.rows, int(ids.flatten()[invalid]))
    return rows


def route(
    scores: Float32[Tensor, "rows size"],
    entry: Float32[Tensor, " size"],
    cost: Float32[Tensor, " size"],
    price: Float32[Tensor, " size"],
    flock: int,
    k: int,
) -> tuple[Int64[Tensor, "rows k"], Float32[Tensor, "rows k"]]:
    """Compute ``kernels.route`` for contiguous tensors on the CPU.  Ties go to the expert of the lower number.

    Raises MemoryError if there is no memory for the candidates.
    """
    rows, size = scores.shape
    chosen, gates = torch.empty(rows, k, dtype=torch.int64), torch.empty(rows, k)
    failed = _library().nashswarm_route(
        scores.data_ptr(), entry.data_ptr(), cost.data_ptr(), price.data_ptr(), rows, size, flock, k,
        chosen.data_ptr(), gates.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    if failed:
        raise MemoryError(f"no memory is left to choose among {size} experts: take fewer tokens at once")
    return chosen, gates


def sums(
    rows: Float32[Tensor, "assignments width"],
    places: Int64[Tensor, " assignments"],
    gates: Float32[Tensor, "tokens k"],
) -> Float32[Tensor, "tokens width"]:
    """Sum the k rows of each token, found at ``places``, weighted by their gates, for contiguous tensors on the CPU."""
    (tokens, k), width = gates.shape, rows.shape[1]
    output = torch.empty(tokens, width)
    _library().nashswarm_sums(
        rows.data_ptr(), places.data_ptr(), gates.data_ptr(), tokens, k, width, output.data_ptr(),
        torch.get_num_threads(),
    )  # fmt: skip
    return output


def experts(
    x: Float32[Tensor, "tokens width"],
    up: Float32[Tensor, "experts hidden width"],
    down: Float32[Tensor, "experts width hidden"],
    chosen: Int64[Tensor, "tokens k"],
    gates: Float32[Tensor, "tokens k"],
) -> Float32[Tensor, "tokens width"]:
    """Sum the outputs of the k experts of each token, weighted by their gates, for contiguous tensors on the CPU.

    An expert is ``down · gelu(up · x)``.  Few assignments are computed one after another.  More are sorted by expert,
    and a tile of tokens passes through both matrices of its expert while they are in cache.  Raises ValueError for an
    expert that does not exist, MemoryError if there is no memory for the outputs of all assignments.
    """
    (count, hidden, width), (tokens, k) = up.shape, chosen.shape
    output, inner = torch.empty(tokens, width), torch.empty(hidden)
    invalid = _library().nashswarm_experts(
        x.data_ptr(), up.data_ptr(), down.data_ptr(), chosen.data_ptr(), gates.data_ptr(), tokens, k, count, width,
        hidden, inner.data_ptr(), output.data_ptr(),
    )  # fmt: skip
    if invalid >= 0:
        raise _missing_expert(int(chosen.flatten()[invalid]), count)
    if invalid == NO_MEMORY:
        raise MemoryError(f"no memory is left for the experts of {tokens} tokens: take fewer tokens at once")
    return output


def group(numbers: Int64[Tensor, " count"], size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Compute ``kernels.group`` for a contiguous tensor on the CPU."""
    order, places = torch.empty_like(numbers), torch.empty_like(numbers)
    ends = torch.empty(size, dtype=torch.int32)
    invalid = _library().nashswarm_group(
        numbers.data_ptr(), len(numbers), size, order.data_ptr(), places.data_ptr(), ends.data_ptr()
    )
    if invalid >= 0:
        raise _missing_expert(int(numbers[invalid]), size)
    return order, places, ends


def _missing_expert(number: int, count: int) -> ValueError:
    return ValueError(f"there is no expert {number}: they are numbered from 0 to {count - 1}")


def _library() -> ctypes.CDLL:
    return cast(ctypes.CDLL, library())
