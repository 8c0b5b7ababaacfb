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
from jaxtyping import Float, Float32, Int64
from torch import Tensor

from nashswarm.kernels import tiles as layout
from nashswarm.kernels.tiles import Tiles

LIBRARY = pathlib.Path(__file__).parent / "nashswarm_kernels.so"
VARIABLE = "NASHSWARM_KERNEL"
PATHS = {"avx512": 2, "avx2": 1, "portable": 0}  # best first; the number is the library's
SLOW = "torch"
DIGITS = {"int8": 1, "float32": 3}

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
        return "it was not built: install nashswarm again where CMake finds a C++ compiler"
    try:
        found = ctypes.CDLL(str(LIBRARY))
    except OSError as error:
        return str(error)
    found.nashswarm_matmul.argtypes = [*[ctypes.c_void_p] * 4, ctypes.c_int64, *[ctypes.c_int] * 3]
    found.nashswarm_rows.argtypes = [*[ctypes.c_void_p] * 3, ctypes.c_int64]
    found.nashswarm_rows.restype = None
    return found


def available() -> list[str]:
    """The paths that this machine can take, the fastest first."""
    found = library()
    native = [] if isinstance(found, str) else [name for name, number in PATHS.items() if found.nashswarm_supports(number)]
    return [*native, SLOW]


@functools.cache
def path() -> str:
    """The path taken; the log says once which."""
    paths = available()
    chosen = os.environ.get(VARIABLE) or paths[0]
    if chosen not in (*PATHS, SLOW):
        raise ValueError(f"{VARIABLE}={chosen} is no path: choose {', '.join((*PATHS, SLOW))}, or unset it")
    if chosen not in paths:
        raise ValueError(f"{VARIABLE}={chosen} cannot be taken here: choose {', '.join(paths)}, or unset it")
    if chosen == SLOW:
        why = library() if len(paths) == 1 else f"{VARIABLE} says so"
        log.warning("packed weights are multiplied by torch, which is slow: no C++ library (%s)", why)
    else:
        log.info("packed weights are multiplied by the C++ library, path %s", chosen)
    return chosen


def matrix_of(tiles: Tiles) -> Matrix:
    """What the library reads; made once, and again where the tensors were moved."""
    found = tiles.__dict__.get("matrix")
    if found is None or found.payload != tiles.payload.data_ptr():
        found = tiles.__dict__["matrix"] = _matrix(tiles)
    return cast(Matrix, found)


def _matrix(tiles: Tiles) -> Matrix:
    floats = [part.float().contiguous() for part in (tiles.row_scale, tiles.column_scale)]
    escapes = [part.int().contiguous() for part in (tiles.escape_starts, tiles.escape_places, tiles.escape_codes)]
    grid = [tiles.scale.half().contiguous(), tiles.zero_point.contiguous()]
    order = tiles.order.contiguous()
    parts = [tiles.payload.contiguous(), *grid, *floats, *escapes, order]
    starts = 4 * -(-len(tiles.widths) // layout.SPAN) + 1
    addresses = [part.data_ptr() if part.numel() else 0 for part in parts]
    found = Matrix(tiles.rows, tiles.columns, tiles.group_size, *addresses, order.data_ptr() + 4 * starts)
    found.kept = parts  # alive as long as their addresses are
    return found


def matmul(
    x: Float32[Tensor, "batch columns"], tiles: Tiles, activations: str, bias: Float32[Tensor, " rows"] | None
) -> Float32[Tensor, "batch rows"]:
    """x Wᵀ + bias, of contiguous tensors on the CPU."""
    matrix = matrix_of(tiles)
    batch = x.shape[0]
    answer = torch.empty(batch, tiles.rows)
    failed = cast(ctypes.CDLL, library()).nashswarm_matmul(
        ctypes.byref(matrix),
        x.data_ptr(),
        None if bias is None else bias.data_ptr(),
        answer.data_ptr(),
        batch,
        DIGITS[activations],
        torch.get_num_threads(),
        PATHS[path()],
    )
    if failed:
        raise MemoryError(f"no memory is left for the activations of a batch of {batch}: make it smaller")
    return answer


def rows_of(tiles: Tiles, ids: Int64[Tensor, " count"]) -> Float32[Tensor, "count columns"]:
    """The rows of the dequantized matrix that ``ids`` name."""
    if len(ids) and not 0 <= int(ids.min()) <= int(ids.max()) < tiles.rows:
        raise IndexError(f"rows {int(ids.min())} … {int(ids.max())} are asked for; the packed matrix has {tiles.rows}")
    found = torch.empty(len(ids), tiles.columns)
    matrix = matrix_of(tiles)
    cast(ctypes.CDLL, library()).nashswarm_rows(ctypes.byref(matrix), ids.data_ptr(), found.data_ptr(), len(ids))
    return found
