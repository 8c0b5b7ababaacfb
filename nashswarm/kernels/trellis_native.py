"""Products with trellis-coded matrices in the C++ library, which reads the stored bytes as they are."""

import ctypes
import functools
from typing import cast

import numpy as np
import torch
from jaxtyping import Float32, Int64
from torch import Tensor

from nashswarm.kernels import native
from nashswarm.kernels import tiles as layout
from nashswarm.kernels.trellis import Trellis
from nashswarm.kernels.trellis_codes import tables

LARGEST_TABLE, RATES = 128, 8  # entries of a table, and tables, as in csrc/trellis.h


def matmul(
    x: Float32[Tensor, "*batch columns"], trellis: Trellis, activations: str, bias: Float32[Tensor, " rows"] | None
) -> Float32[Tensor, "*batch rows"]:
    """Compute x Wᵀ + bias for contiguous tensors on the CPU.

    Raises MemoryError if there is no memory for the rounded activations.
    """
    batch = x.numel() // trellis.columns
    product = torch.empty(*x.shape[:-1], trellis.rows)
    failed = library_with_tables().nashswarm_trellis_matmul(
        trellis.content.data_ptr(),
        trellis.starts.data_ptr(),
        x.data_ptr(),
        None if bias is None else bias.data_ptr(),
        product.data_ptr(),
        batch,
        native.DIGITS[activations],
        torch.get_num_threads(),
        native.PATHS[native.path()],
    )
    if failed:
        raise MemoryError(f"no memory is left to round activations of shape {tuple(x.shape)}: take fewer at once")
    return product


def rows_of(trellis: Trellis, ids: Int64[Tensor, "*shape"]) -> Float32[Tensor, "*shape columns"]:
    """Return the rows ``ids`` of the dequantized matrix, for contiguous ``ids`` on the CPU.

    Raises IndexError for a row that does not exist, and MemoryError if there is no memory for the order of the rows.
    """
    rows = torch.empty(*ids.shape, trellis.columns)
    invalid = library_with_tables().nashswarm_trellis_rows(
        trellis.content.data_ptr(), trellis.starts.data_ptr(), ids.data_ptr(), rows.data_ptr(), ids.numel(),
        torch.get_num_threads(), native.PATHS[native.path()],
    )  # fmt: skip
    if invalid >= 0:
        raise layout.missing_row(trellis.rows, int(ids.flatten()[invalid]))
    if invalid < -1:
        raise MemoryError(f"no memory is left to look up {ids.numel()} rows: take fewer at once")
    return rows


def library_with_tables() -> ctypes.CDLL:
    """Return the C++ library, which holds the tables that codes index."""
    return _with_tables(cast(ctypes.CDLL, native.library()))


@functools.cache
def _with_tables(loaded: ctypes.CDLL) -> ctypes.CDLL:
    """Hand the library the tables, and return it."""
    padded = np.zeros((RATES, LARGEST_TABLE), np.int8)
    for rate, table in tables().items():
        padded[rate, : table.size] = table.flatten()
    loaded.nashswarm_trellis_tables.argtypes, loaded.nashswarm_trellis_tables.restype = [ctypes.c_void_p], None
    loaded.nashswarm_trellis_tables(padded.ctypes.data)
    loaded.nashswarm_trellis_matmul.argtypes = [*[ctypes.c_void_p] * 5, ctypes.c_int64, *[ctypes.c_int] * 3]
    loaded.nashswarm_trellis_rows.argtypes = [*[ctypes.c_void_p] * 4, ctypes.c_int64, *[ctypes.c_int] * 2]
    loaded.nashswarm_trellis_rows.restype = ctypes.c_int64
    loaded.nashswarm_decoder_pass.argtypes = [*[ctypes.c_void_p] * 2, *[ctypes.c_int] * 3]
    return loaded
