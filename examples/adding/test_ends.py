"""The method ``ends`` where CONTRIBUTING.md puts it: its widths, bytes and KL, and what it refuses."""

import pathlib

import pytest

from experiments.config import compose
from nashswarm.errors import Unsupported
from nashswarm.experiment import plan
from nashswarm.experiment.run import run

LABELS = {"model": "local", "method": "ends", "dataset": "local_text", "measure": "quality"}


def test_ends_with_wider_ends_has_more_bytes_and_less_kl(small_run: list[str], tmp_path: pathlib.Path) -> None:
    folders = [f"records={tmp_path}/records", f"cache={tmp_path}/cache"]
    metrics = run(compose(*small_run, *folders, "method=ends"), LABELS).record.metrics
    even = run(compose(*small_run, *folders, "method=ends", "method.ends=3"), LABELS).record.metrics
    assert even["nominal_bits"] == 3 < metrics["nominal_bits"] < 8
    assert even["bytes_file"] < metrics["bytes_file"]
    assert even["kl"] > metrics["kl"] > 0


def test_ends_with_an_unknown_width_is_refused() -> None:
    with pytest.raises(Unsupported, match="method=ends knows 2, 3, 4, 8 bits, not 5"):
        plan.build(compose("method=ends", "method.bits=5").method)
