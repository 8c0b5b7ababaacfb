"""The encoder of lattice paths (see ``path_form``): best codes down the columns of a matrix, inside error feedback.

The C++ library computes (``csrc/path_encode.cpp``).  ``path_encoder_reference`` computes the same in torch where the
library is missing, and is what it is tested against.
"""

import ctypes
import functools
from typing import cast

import torch
from jaxtyping import Float, Int32
from torch import Tensor

from nashswarm.kernels import native, path_encoder_reference
from nashswarm.kernels.path_form import Columns, Rows


class _Block(ctypes.Structure):
    """``struct PathBlock`` of csrc/path_encode.cpp."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ("rows", "columns")),
        *((name, ctypes.c_void_p) for name in ("prices", "row_steps", "column_steps", "row_weights")),
        *((name, ctypes.c_void_p) for name in ("row_scale", "row_size", "column_scale", "column_size")),
        *((name, ctypes.c_void_p) for name in ("targets", "factor", "codes", "errors")),
        ("bit_price", ctypes.c_float),
    ]


def feedback(
    targets: Float[Tensor, "columns out"],
    rows: Rows,
    columns: Columns,
    factor: Float[Tensor, "columns columns"],
    prices: Float[Tensor, "2 tables symbols"],
    bit_price: float,
) -> tuple[Int32[Tensor, "columns out"], Float[Tensor, "columns out"]]:
    """Encode a block of columns one after another; each error moves to the later columns, whose ``targets`` change.

    A path costs its damage plus the price of its length, in nats per token.  ``prices``: of the symbols of a code with
    its sign, by set and table.  ``bit_price``: of a sign whose symbol is 0.  ``factor``: the block of
    ``curvature.inverse_cholesky``.  ``targets`` is contiguous.  Returns the codes, and the errors that columns after
    the block have to compensate for: they lose ``factor`` times the errors.
    """
    if native.path() == native.SLOW:
        return path_encoder_reference.feedback(targets, rows, columns, factor, prices, bit_price)
    codes, errors = torch.zeros(targets.shape, dtype=torch.int32), torch.zeros_like(targets)
    parts = [
        prices, rows.steps, columns.steps, rows.sensitivities, rows.scale, rows.size, columns.scale, columns.size,
        targets, factor, codes, errors,
    ]  # fmt: skip
    assert targets.is_contiguous()
    parts = [part.contiguous() for part in parts]
    block = _Block(targets.shape[1], len(targets), *(part.data_ptr() for part in parts), bit_price)
    _library().nashswarm_path_feedback(ctypes.byref(block), torch.get_num_threads())
    return codes, errors


@functools.cache
def _library() -> ctypes.CDLL:
    library = cast(ctypes.CDLL, native.library())
    library.nashswarm_path_feedback.argtypes = [ctypes.c_void_p, ctypes.c_int]
    library.nashswarm_path_feedback.restype = None
    return library
