"""The C++ library: where it is, which instruction set it takes, and calls with raw pointers.

``NASHSWARM_KERNEL`` = avx512, avx2, portable or torch forces a path; otherwise the first of these that there is.
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
PATHS = {"avx512": 2, "avx2": 1, "portable": 0}  # best first; the number is the library's
SLOW = "torch"
INTERFACE = 5  # of csrc/library.cpp: that of the functions and of Matrix
DIGITS = {"int8": 1, "float32": 3}  # signed bytes that stand for an activation

log = logging.getLogger(__name__)


class Matrix(ctypes.Structure):
    """``struct Matrix`` of csrc/matrix.h; addresses are plain numbers."""

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
    """The library, or why there is none."""
    if not LIBRARY.exists():
        return "the C++ library was not built: install nashswarm again where CMake finds a C++ compiler"
    try:
        found = ctypes.CDLL(str(LIBRARY))
    except OSError as error:
        return str(error)
    if found.nashswarm_interface() != INTERFACE:
        return "the C++ library was built of other sources: install nashswarm again"
    found.nashswarm_matmul.argtypes = [*[ctypes.c_void_p] * 4, ctypes.c_int64, *[ctypes.c_int] * 3]
    found.nashswarm_rows.argtypes = [*[ctypes.c_void_p] * 3, ctypes.c_int64]
    found.nashswarm_rows.restype = ctypes.c_int64
    found.nashswarm_route.argtypes = [
        *[ctypes.c_void_p] * 4, *[ctypes.c_int64] * 4, *[ctypes.c_void_p] * 2, ctypes.c_int,
    ]  # fmt: skip
    found.nashswarm_sums.argtypes = [*[ctypes.c_void_p] * 3, *[ctypes.c_int64] * 3, ctypes.c_void_p, ctypes.c_int]
    found.nashswarm_sums.restype = None
    found.nashswarm_experts.argtypes = [*[ctypes.c_void_p] * 5, *[ctypes.c_int64] * 5, *[ctypes.c_void_p] * 2]
    found.nashswarm_experts.restype = ctypes.c_int64
    found.nashswarm_group.argtypes = [ctypes.c_void_p, *[ctypes.c_int64] * 2, *[ctypes.c_void_p] * 3]
    found.nashswarm_group.restype = ctypes.c_int64
    return found


def available() -> list[str]:
    """The paths that this machine can take, the fastest first."""
    found = library()
    if isinstance(found, str):
        return [SLOW]
    return [*(name for name, number in PATHS.items() if found.nashswarm_supports(number)), SLOW]


@functools.cache
def path() -> str:
    """The path taken; the log says once which."""
    paths = available()
    chosen = os.environ.get(VARIABLE) or paths[0]
    if chosen not in (*PATHS, SLOW):
        raise ValueError(f"{VARIABLE}={chosen} is no path: choose {', '.join((*PATHS, SLOW))}, or unset it")
    if chosen not in paths:
        raise ValueError(f"{VARIABLE}={chosen} cannot be taken here: choose {', '.join(paths)}, or unset it")
    log.log(logging.WARNING if chosen == SLOW else logging.INFO, describe_path(chosen))
    return chosen


def describe_path(chosen: str) -> str:
    """What the log says."""
    if chosen != SLOW:
        return f"packed weights are multiplied by the C++ library, path {chosen}"
    found = library()
    why = found if isinstance(found, str) else f"{VARIABLE}={SLOW}"
    return f"packed weights are multiplied by torch, which is slow: {why}"


def matrix_of(tiles: Tiles) -> Matrix:
    """What the library reads; made once, kept with the order of the tiles, and made again where tensors were moved."""
    found = tiles.order.__dict__.get("matrix")
    if found is None or found.payload != tiles.payload.data_ptr():
        found = tiles.order.__dict__["matrix"] = _matrix(tiles)
    return cast(Matrix, found)


def _matrix(tiles: Tiles) -> Matrix:
    floats = [part.float() for part in (tiles.row_scale, tiles.column_scale)]
    escapes = [part.int() for part in (tiles.escape_starts, tiles.escape_places, tiles.escape_codes)]
    parts = [part.contiguous() for part in (tiles.payload, tiles.scale.half(), tiles.zero_point, *floats, *escapes)]
    starts = 4 * (len(layout.WIDTHS) - 1) * -(-len(tiles.widths) // layout.SPAN) + 4
    addresses = [part.data_ptr() if part.numel() else 0 for part in (*parts, tiles.order)]
    found = Matrix(tiles.rows, tiles.columns, tiles.group_size, *addresses, tiles.order.data_ptr() + starts)
    found.kept = parts  # alive as long as their addresses are
    found.address, found.multiply = ctypes.addressof(found), _library().nashswarm_matmul
    return found


def matmul(
    x: Float32[Tensor, "*batch columns"], tiles: Tiles, activations: str, bias: Float32[Tensor, " rows"] | None
) -> Float32[Tensor, "*batch rows"]:
    """x Wᵀ + bias, of contiguous tensors on the CPU."""
    matrix = matrix_of(tiles)
    batch = x.numel() // matrix.columns
    answer = torch.empty(batch, matrix.rows) if x.dim() == 2 else torch.empty(*x.shape[:-1], matrix.rows)
    failed = matrix.multiply(
        matrix.address,
        x.data_ptr(),
        None if bias is None else bias.data_ptr(),
        answer.data_ptr(),
        batch,
        DIGITS[activations],
        torch.get_num_threads(),
        PATHS[path()],
    )
    if failed:
        raise MemoryError(f"no memory is left to round activations of shape {tuple(x.shape)}: take fewer at once")
    return answer


def rows_of(tiles: Tiles, ids: Int64[Tensor, "*shape"]) -> Float32[Tensor, "*shape columns"]:
    """The rows of the dequantized matrix that ``ids`` name, of a contiguous tensor on the CPU."""
    matrix = matrix_of(tiles)
    found = torch.empty(*ids.shape, tiles.columns)
    wrong = _library().nashswarm_rows(matrix.address, ids.data_ptr(), found.data_ptr(), ids.numel())
    if wrong >= 0:
        raise layout.missing_row(tiles, int(ids.flatten()[wrong]))
    return found


def route(
    scores: Float32[Tensor, "rows size"],
    entry: Float32[Tensor, " size"],
    cost: Float32[Tensor, " size"],
    price: Float32[Tensor, " size"],
    flock: int,
    k: int,
) -> tuple[Int64[Tensor, "rows k"], Float32[Tensor, "rows k"]]:
    """``kernels.route`` of contiguous tensors on the CPU; of equal experts the earlier is the better."""
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
    """The gated sums of each token's k rows, which stand at ``places``; of contiguous tensors on the CPU."""
    (tokens, k), width = gates.shape, rows.shape[1]
    found = torch.empty(tokens, width)
    _library().nashswarm_sums(
        rows.data_ptr(), places.data_ptr(), gates.data_ptr(), tokens, k, width, found.data_ptr(),
        torch.get_num_threads(),
    )  # fmt: skip
    return found


def experts(
    x: Float32[Tensor, "tokens width"],
    up: Float32[Tensor, "experts hidden width"],
    down: Float32[Tensor, "experts width hidden"],
    chosen: Int64[Tensor, "tokens k"],
    gates: Float32[Tensor, "tokens k"],
) -> Float32[Tensor, "tokens width"]:
    """The gated sums of what each token's k experts make of it, one after the other; contiguous tensors on the CPU."""
    (count, hidden, width), (tokens, k) = up.shape, chosen.shape
    found, inner = torch.empty(tokens, width), torch.empty(hidden)
    wrong = _library().nashswarm_experts(
        x.data_ptr(), up.data_ptr(), down.data_ptr(), chosen.data_ptr(), gates.data_ptr(), tokens, k, count, width,
        hidden, inner.data_ptr(), found.data_ptr(),
    )  # fmt: skip
    if wrong >= 0:
        raise _no_expert(int(chosen.flatten()[wrong]), count)
    return found


def group(numbers: Int64[Tensor, " count"], size: int) -> tuple[Tensor, Tensor, Tensor]:
    """``kernels.group`` of a contiguous tensor on the CPU."""
    order, places = torch.empty_like(numbers), torch.empty_like(numbers)
    ends = torch.empty(size, dtype=torch.int32)
    wrong = _library().nashswarm_group(
        numbers.data_ptr(), len(numbers), size, order.data_ptr(), places.data_ptr(), ends.data_ptr()
    )
    if wrong >= 0:
        raise _no_expert(int(numbers[wrong]), size)
    return order, places, ends


def _no_expert(number: int, count: int) -> ValueError:
    return ValueError(f"there is no expert {number}: they are numbered from 0 to {count - 1}")


def _library() -> ctypes.CDLL:
    return cast(ctypes.CDLL, library())
