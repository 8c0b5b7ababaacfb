"""Output of the counters is parsed, and the program that is counted computes the product."""

import itertools
import json
import pathlib
import shutil
import subprocess
import sys
from typing import Any

import pytest
import torch

from nashswarm import kernels
from nashswarm.cli import main
from nashswarm.kernels import native
from nashswarm.kernels import tiles as layout
from nashswarm.kernels.__main__ import example
from nashswarm.models.matrices import find_layers
from nashswarm.packed import checkpoint
from nashswarm.quant.grid import Scheme, quantize
from nashswarm.quant.pack import pack
from nashswarm.runtime import cache_misses, profile
from nashswarm.runtime.cache_misses import CACHEGRIND, PERF, Misses

NO_COUNTERS = """\
<not supported>,,L1-dcache-loads:u,0,100.00,,
<not supported>,,L1-dcache-load-misses:u,0,100.00,,
<not supported>,,LLC-load-misses:u,0,100.00,,
"""
COUNTED = """\
# started on Mon Jan  1 00:00:00 2024

300123,,L1-dcache-loads:u,812345,100.00,,
4321,,L1-dcache-load-misses:u,812345,100.00,1.44,of all L1-dcache accesses
17,,LLC-load-misses:u,812345,100.00,,
"""
SIMULATED = """\
desc: D1 cache:         32768 B, 64 B, 8-way associative
cmd: python products.py
events: Ir I1mr ILmr Dr D1mr DLmr Dw D1mw DLmw
fl=multiply.cpp
fn=multiply
12 900 3 3 300 40 5 9 8 7
summary: 1000 4 4 310 41 6 10 9 8
"""
# counts what a processor would whose product reads 10 times, misses the first level twice and the last never
FAKE = """#!/bin/sh
if [ "$3" = -e ]; then out=/dev/stderr; rounds=1; else
  out=$4; for rounds; do :; done; while [ "$1" != -- ]; do shift; done; shift; "$@" > /dev/null || exit
fi
echo "$((1000 + 10 * rounds)),,L1-dcache-loads:u,1,100.00,," > $out
echo "$((200 + 2 * rounds)),,L1-dcache-load-misses:u,1,100.00,," >> $out
echo "30,,LLC-load-misses:u,1,100.00,," >> $out
"""

needs_library = pytest.mark.skipif(isinstance(native.library(), str), reason="the C++ library was not built")


def program(folder: pathlib.Path, name: str, text: str) -> None:
    (folder / name).write_text(text)
    (folder / name).chmod(0o755)


@pytest.fixture
def programs(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> pathlib.Path:
    """The only folder where programs are looked for."""
    folder = tmp_path / "programs"
    folder.mkdir()
    monkeypatch.setenv("PATH", str(folder))
    return folder


def test_parse_counters_output() -> None:
    assert cache_misses.parse_perf(COUNTED) == Misses(300123, 4321, 17)
    assert cache_misses.parse_cachegrind(SIMULATED) == Misses(310, 41, 6)


@pytest.mark.parametrize(
    "text, why",
    [
        (NO_COUNTERS, "L1-dcache-loads not supported"),
        (COUNTED.replace("17,", "<not counted>,"), "LLC-load-misses not counted"),
        ("", "L1-dcache-loads missing"),
    ],
)
def test_parse_perf_uncounted_event_named(text: str, why: str) -> None:
    with pytest.raises(ValueError, match=f"^{why}$"):
        cache_misses.parse_perf(text)


@pytest.mark.parametrize("text", ["", "events: Ir I1mr ILmr\nsummary: 1 2 3\n", "events: Ir Dr D1mr DLmr\n"])
def test_parse_cachegrind_without_summary_refused(text: str) -> None:
    with pytest.raises(ValueError, match="cachegrind left no summary with Dr, D1mr, DLmr"):
        cache_misses.parse_cachegrind(text)


@pytest.mark.parametrize("size", [1 << 10, 32 << 10, 48 << 10, 8 << 20, 9 << 20, 30 << 20, 36608 << 10, 96 << 20])
def test_geometry_has_power_of_two_sets(size: int) -> None:
    written, ways, line = map(int, cache_misses.geometry(size).split(","))
    sets = size // ways // line
    assert written == size == sets * ways * line and sets & (sets - 1) == 0 and ways >= cache_misses.WAYS


def test_choose_counter_prefers_perf_then_valgrind(programs: pathlib.Path) -> None:
    with pytest.raises(ValueError, match=r"perf is not installed\), and valgrind is not installed \(apt install valg"):
        cache_misses.choose_counter()
    program(programs, "valgrind", "")
    assert (
        cache_misses.choose_counter()[0] == CACHEGRIND and "perf is not installed" in cache_misses.choose_counter()[1]
    )
    program(programs, "perf", "#!/bin/sh\necho 'Error:\nAccess is limited.\nAsk.' >&2\nexit 255\n")
    assert (
        cache_misses.choose_counter()[1]
        == "perf stat cannot count here (Access is limited): cachegrind simulates the caches"
    )
    program(programs, "perf", f"#!/bin/sh\necho '{NO_COUNTERS}' >&2\n")
    assert "L1-dcache-loads not supported" in cache_misses.choose_counter()[1]
    program(programs, "perf", FAKE)
    assert cache_misses.choose_counter()[0] == PERF


@needs_library
@pytest.mark.parametrize("lattice, activations", list(itertools.product((True, False), kernels.ACTIVATIONS)))
def test_products_program_computes_products(lattice: bool, activations: str, tmp_path: pathlib.Path) -> None:
    matrices = [example(rows, 192, (2, 3, 4), 64, lattice, seed=rows) for rows in (96, 256)]
    generator = torch.Generator().manual_seed(1)
    xs = [torch.randn(192, generator=generator) for _ in matrices]
    both = {
        activations: [kernels.matmul(x[None], one, activations).sum() for x, one in zip(xs, matrices, strict=True)],
        None: [(layout.dequantize(one) @ x).sum() for x, one in zip(xs, matrices, strict=True)],
    }
    for form, expected in both.items():
        cache_misses.write_matrices(tmp_path / "matrices.json", matrices, form)
        command = [sys.executable, "-P", str(cache_misses.PRODUCTS), str(tmp_path / "matrices.json"), "2"]
        printed = json.loads(subprocess.check_output(command))
        assert printed["sums"] == pytest.approx([float(value) for value in expected], rel=1e-4, abs=1e-3)
        assert (printed["path"] is None) == (form is None)


@needs_library
def test_count_misses_excludes_start_of_process(programs: pathlib.Path) -> None:
    program(programs, "perf", FAKE)
    matrices = [example(64, 64, (3,), 64, True, seed) for seed in (0, 1)]
    assert cache_misses.count_misses(matrices, "int8", 1 << 15, 1 << 20, PERF) == Misses(
        5, 1, 0
    )  # two products a round


@needs_library
def test_count_misses_failing_counter_named(programs: pathlib.Path) -> None:
    program(programs, "valgrind", "#!/bin/sh\necho 'no such tool' >&2\nexit 1\n")
    with pytest.raises(ValueError, match=r"cannot be counted: cachegrind fails \(no such tool\)"):
        cache_misses.count_misses([example(64, 64, (3,), 64, True)], None, 1 << 15, 1 << 20, CACHEGRIND)


@needs_library
def test_profile_command_prints_misses(
    model: Any, programs: pathlib.Path, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(profile, "read_bandwidth", lambda size: 1e10)  # reads for seconds
    layers = find_layers(model)
    checkpoint.adopt(model, layers, {layer.name: pack(quantize(layer.weight, 3, Scheme(32))) for layer in layers})
    model.save_pretrained(tmp_path / "model")
    words = ["profile", str(tmp_path / "model"), "--steps", "1", "--largest-batch", "1", "--threads", "1", "--misses"]
    assert main(words) == 2
    assert "cache misses cannot be counted here: " in capsys.readouterr().err
    program(programs, "perf", FAKE)
    assert main(words) == 0
    shown = capsys.readouterr().out
    assert "cache misses of a product with lm_head, " in shown and "\nperf stat counts them\n" in shown
    table = [line.split() for line in shown[shown.index("that miss L1") :].splitlines()]
    rows = {words[0]: words[2:] for words in table if words and words[0] in ("packed", "float32")}
    assert rows == {"packed": ["10", "2", "0"], "float32": ["10", "2", "0"]}


@pytest.mark.slow
@needs_library
@pytest.mark.skipif(not shutil.which("valgrind"), reason="needs valgrind")
def test_count_misses_of_uncached_matrix_one_per_line() -> None:
    matrix, lines = example(512, 512, (2,), 64, True), 512 * 512 * 4 / 64
    plain = cache_misses.count_misses([matrix], None, 32 << 10, 256 << 10, CACHEGRIND)
    packed = cache_misses.count_misses([matrix], "int8", 32 << 10, 256 << 10, CACHEGRIND)
    assert plain.last == pytest.approx(lines, rel=0.02) and lines <= 1.02 * plain.first <= 1.3 * lines
    assert packed.first == pytest.approx(lines / 16, rel=0.5) and packed.last < 0.01 * lines
