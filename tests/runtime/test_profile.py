"""What the machine is, and where time goes on it."""

import logging
import os
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
from nashswarm.runtime.machine import ASSUMED, read_machine


@pytest.fixture
def system(tmp_path: pathlib.Path) -> pathlib.Path:
    """A system of caches that no machine has."""
    for number, entry in enumerate(["1 Data 48K 0", "1 Instruction 32K 0", "2 Unified 3M 0-1", "3 Unified 9M 0-3,8"]):
        folder = tmp_path / f"cpu{min(os.sched_getaffinity(0))}" / "cache" / f"index{number}"
        folder.mkdir(parents=True)
        for name, value in zip(("level", "type", "size", "shared_cpu_list"), entry.split(), strict=True):
            (folder / name).write_text(f"{value}\n")
    (tmp_path / "cpuinfo").write_text("model name\t: Slow One\nflags\t\t: fpu avx2 avx512_vnni\n\nflags\t: other\n")
    return tmp_path


def test_read_machine_reads_caches_of_system(system: pathlib.Path) -> None:
    machine = read_machine(system, system / "cpuinfo")
    assert machine.caches == {1: 48 << 10, 2: 3 << 20, 3: 9 << 20} and machine.sharers == {1: 1, 2: 2, 3: 5}
    assert machine.instructions == ("avx2", "avx512_vnni") and machine.assumed == ()
    assert machine.cores == len(os.sched_getaffinity(0))
    assert [machine.level(size) for size in (48 << 10, 49 << 10, 9 << 20, 10 << 20)] == ["L1", "L2", "L3", "memory"]
    assert str(machine).startswith("Slow One: ") and "L3 9 MiB for 5 processors; avx2 avx512_vnni" in str(machine)


def test_read_machine_without_system_assumes_and_warns(
    tmp_path: pathlib.Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        machine = read_machine(tmp_path, tmp_path / "cpuinfo")
    assert machine.caches == ASSUMED and machine.assumed == (1, 2, 3) and machine.instructions == ()
    assert "assumed L1 32 KiB, L2 1 MiB, L3 8 MiB" in caplog.text and "L2 1 MiB (assumed)" in str(machine)


def test_read_machine_without_third_level_assumes_nothing(system: pathlib.Path) -> None:
    for entry in (next(system.glob("cpu*/cache")) / "index3").iterdir():
        entry.unlink()
    machine = read_machine(system, system / "cpuinfo")
    assert sorted(machine.caches) == [1, 2] and machine.assumed == () and machine.level(4 << 20) == "memory"


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
