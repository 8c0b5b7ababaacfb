"""Metrics of load against their definitions."""

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nashswarm.moe import load


@pytest.mark.parametrize("metric", [load.gini, load.variation, load.max_violation])
@given(loads=st.lists(st.floats(0.1, 100), min_size=2, max_size=12))
def test_load_metrics_equal_definitions(metric: Any, loads: list[float]) -> None:
    values = np.array(loads)
    mean = sum(loads) / len(loads)
    apart = sum(abs(one - other) for one in loads for other in loads)
    wanted = {
        "gini": apart / (2 * len(loads) ** 2 * mean),
        "variation": math.sqrt(sum((one - mean) ** 2 for one in loads) / len(loads)) / mean,
        "max_violation": max(loads) / mean - 1,
    }
    assert metric(values) == pytest.approx(wanted[metric.__name__], abs=1e-9)
