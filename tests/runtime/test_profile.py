"""Times of decoding by matrix and by batch size."""

import pathlib
from typing import Any

import pytest
import torch
from torch import nn

from nashswarm.cli import main
from nashswarm.models.matrices import find_layers
from nashswarm.packed import checkpoint
from nashswarm.progress import no_track
from nashswarm.quant.grid import Scheme, quantize
from nashswarm.quant.pack import pack
from nashswarm.runtime import profile


def test_time_layers_times_every_linear(tiny: Any) -> None:
    tokens = torch.arange(8)[None]
    named = [name for name, module in tiny.named_modules() if isinstance(module, nn.Linear)]
    times, step_seconds = profile.time_layers(tiny, tokens, 4, no_track)
    assert [layer.name for layer in times] == named == ["lm_head"]
    assert times[0].size == tiny.lm_head.weight.nbytes and times[0].kind == "float32"
    assert 0 < times[0].seconds < step_seconds
    assert times[0].bandwidth == times[0].size / times[0].seconds
    assert not tiny.lm_head._forward_hooks and not tiny.lm_head._forward_pre_hooks


def test_time_batches_times_every_batch(tiny: Any) -> None:
    times = profile.time_batches(tiny, torch.arange(8)[None], (1, 3), 2, no_track)
    assert [point.batch for point in times] == [1, 3] and all(point.seconds > 0 for point in times)


def points(*seconds: float) -> list[profile.BatchTime]:
    return [profile.BatchTime(1 << number, value) for number, value in enumerate(seconds)]


@pytest.mark.parametrize(
    ("seconds", "longest", "batch", "reason"),
    [
        ((0.010, 0.011, 0.012), None, 4, "the largest tried"),
        ((0.010, 0.011, 0.021), None, 2, "4 sequences would give only 5 % more tokens per second"),
        ((0.010, 0.021, 0.022), None, 1, "2 sequences would give 5 % fewer tokens per second"),
        ((0.010, 0.011, 0.012), 0.0115, 2, "a step of 4 takes 12.0 ms, over the 11.5 asked"),
        ((0.010, 0.011, 0.012), 0.005, 1, "even one step of 1 takes 10.0 ms, over the 5 asked"),
    ],
)
def test_choose_batch_gives_size_and_reason(
    seconds: tuple[float, ...], longest: float | None, batch: int, reason: str
) -> None:
    chosen, why = profile.choose_batch(points(*seconds), longest)
    assert chosen.batch == batch and why.startswith(f"batch {batch}: {reason}")


def test_read_bandwidth_is_plausible() -> None:
    assert 1e8 < profile.read_bandwidth(1 << 22) < 1e13


def test_profile_command_prints_tables(
    model: Any, tokenizer: Any, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    layers = find_layers(model)
    checkpoint.adopt(model, layers, {layer.name: pack(quantize(layer.weight, 3, Scheme(32))) for layer in layers})
    model.save_pretrained(tmp_path)
    words = ["profile", str(tmp_path), "--steps", "2", "--largest-batch", "2", "--threads", "1"]
    assert main(words) == 0
    shown = capsys.readouterr().out
    for name in ("transformer.h.1.mlp.c_fc", "lm_head", "everything else", "groups of 32", "GB/s", "batch"):
        assert name in shown
    assert main([*words, "--context-tokens", "60"]) == 2
    assert "exceed the window of 64" in capsys.readouterr().err
