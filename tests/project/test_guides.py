"""The files that the guides add (``examples/adding``) work as the guides say; the guides show these tests."""

import copy
import functools
import pathlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from examples.adding.confidence import Confidence
from examples.adding.ends import Ends
from experiments.config import compose
from nashswarm.data import corpus
from nashswarm.errors import Unsupported
from nashswarm.experiment.run import run
from nashswarm.measures.measure import EvaluationTarget
from nashswarm.models import evaluation, matrices
from nashswarm.progress import no_track
from nashswarm.records.record import Record
from nashswarm.reporting.figures import games

ROOT = pathlib.Path(__file__).parents[2]
FEW = ["dataset.sequence_length=32", "dataset.calibration_windows=6", "dataset.holdout_windows=3"]
FEW += ["dataset.test_windows=6", "device=cpu"]
LABELS = {"experiment": "single", "model": "story_writer", "method": "any", "dataset": "stories", "measure": "any"}


@pytest.fixture
def execute(
    model_folder: pathlib.Path, text_folder: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Record]:
    """Run on the model and text of the guides; a tiny model and a few sentences in local folders replace them."""
    monkeypatch.setenv("NASHSWARM_STORY_WRITER", str(model_folder))
    monkeypatch.setenv("NASHSWARM_STORIES", str(text_folder))
    added = f"hydra.searchpath=[file://{ROOT / 'examples/adding/conf'}]"
    folders = [f"records={tmp_path}/records", f"cache={tmp_path}/cache"]

    def execute_run(*more: str) -> Record:
        config = compose(added, "model=story_writer", "dataset=stories", *FEW, *folders, *more)
        return run(config, LABELS).record

    return execute_run


def test_added_model_at_16_bits_is_unchanged(execute: Callable[..., Record], tiny: Any) -> None:
    record = execute("method=baseline")
    assert [row["name"] for row in record.layers] == [layer.name for layer in matrices.find_layers(tiny)]
    assert record.metrics["kl"] < 1e-5 and record.metrics["nominal_bits"] == 16


def test_added_dataset_is_named_by_its_hashes(execute: Callable[..., Record], text_folder: pathlib.Path) -> None:
    record = execute("method=baseline")
    for purpose, file in (("calibration", "validation.txt"), ("test", "test.txt")):
        text = (text_folder / file).read_text().removesuffix("\n")
        assert record.config["dataset"][f"{purpose}_sha256"] == corpus.sha256(text)
    assert record.metrics["tokens"] == 6 * 31


def test_added_method_follows_its_rule(execute: Callable[..., Record]) -> None:
    record = execute("method=ends")
    widths = {name: set(grid.ravel().tolist()) for name, grid in games.tiles(record.allocation).items()}
    assert widths["transformer.wte"] == widths["transformer.h.1.mlp.c_fc"] == {8}
    assert widths["transformer.h.0.mlp.c_fc"] == widths["transformer.h.0.attn.c_attn"] == {3}
    even = execute("method=ends", "method.ends=3")
    assert even.metrics["nominal_bits"] == 3 < record.metrics["nominal_bits"] < 8
    assert even.metrics["bytes_file"] < record.metrics["bytes_file"]
    assert even.metrics["kl"] > record.metrics["kl"] > 0
    with pytest.raises(Unsupported, match="method=ends knows 2, 3, 4, 8 bits, not 5"):
        Ends(bits=5)


def test_added_measure_of_equal_logits_is_one_over_the_vocabulary(
    execute: Callable[..., Record], tiny: Any, token_windows: Tensor
) -> None:
    undecided = copy.deepcopy(tiny)
    with torch.no_grad():
        undecided.lm_head.weight.zero_()  # every token is as probable as any other
    reference = functools.partial(evaluation.compute_reference, tiny, token_windows)
    metrics, series = Confidence(batch_size=2).measure(
        EvaluationTarget(tiny, undecided, lambda: undecided, token_windows, reference, no_track)
    )
    assert metrics["confidence"] == pytest.approx(1 / len(tiny.lm_head.weight))
    assert metrics["confidence_full"] > metrics["confidence"] and len(series["confidence"]) == len(token_windows)

    recorded = execute("method=uniform3", "measure=confidence").metrics
    assert recorded["confidence_delta_low"] <= recorded["confidence_delta"] <= recorded["confidence_delta_high"]
