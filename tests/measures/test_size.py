"""Bytes of loaded models, counted by hand."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from torch import Tensor

from nashswarm.measures.measure import EvaluationTarget
from nashswarm.measures.size import Size
from nashswarm.models import evaluation
from nashswarm.models.matrices import find_layers
from nashswarm.packed import checkpoint
from nashswarm.packed.matrix import PackedMatrix
from nashswarm.progress import no_track


@pytest.mark.parametrize("form", ["groups", "lattice", "trellis"])
def test_size_runs_nothing_and_counts_loaded_bytes(
    form: str, tiny: Any, model: Any, packed: Callable[..., dict[str, np.ndarray]], token_windows: Tensor
) -> None:
    """By hand: a tied matrix once, the rest as floats; of a packed matrix its tiles, and the order they are read in or
    where groups of rows start."""
    checkpoint.adopt(model, find_layers(model), packed(model, form))

    def never(batch_size: int) -> evaluation.Reference:
        raise AssertionError

    metrics, series = Size().measure(EvaluationTarget(tiny, None, lambda: model, token_windows, never, no_track))
    assert series == {} and set(metrics) == {"bytes_resident", "bytes_resident_full"}
    assert metrics["bytes_resident_full"] == 4 * sum(part.numel() for part in tiny.parameters())
    matrices = {module for module in model.modules() if isinstance(module, PackedMatrix)}
    others = 4 * sum(part.numel() for part in model.parameters())
    assert len(matrices) == 2 + 2 * 4
    starts = sum(8 * (1 + matrix.shape[0] // 64) for matrix in matrices) if form == "trellis" else 0
    assert metrics["bytes_resident"] == others + sum(matrix.tiles.nbytes for matrix in matrices) + starts
    assert metrics["bytes_resident"] < metrics["bytes_resident_full"] / 2
