"""The machine as Linux describes it, or as it is assumed."""

import logging
import os
import pathlib

import pytest

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
