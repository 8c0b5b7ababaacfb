"""Cache misses of decoding: how many reads of data one product with a packed matrix misses, and one with its floats.

Hardware counters count them (``perf stat``) where kernel and processor allow it; elsewhere ``valgrind
--tool=cachegrind`` simulates two levels of cache, the first and the last, without prefetching, and the library takes
the best path that valgrind knows.  A process of its own multiplies, few times and many times: the difference is the
products' alone, their call from Python included.
"""

import dataclasses
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from nashswarm.kernels import native
from nashswarm.kernels import tiles as layout
from nashswarm.kernels.tiles import Tiles

PRODUCTS = pathlib.Path(__file__).with_name("products.py")
PERF, CACHEGRIND = "perf stat", "cachegrind"
EVENTS = ("L1-dcache-loads", "L1-dcache-load-misses", "LLC-load-misses")
USER = ",".join(f"{event}:u" for event in EVENTS)  # without the kernel, which may be closed to us
SIMULATED = ("Dr", "D1mr", "DLmr")
LINE, WAYS = 64, 8  # bytes of a line; the fewest places in a cache where one may stand
ENOUGH, MOST = 1 << 26, 64  # weights to multiply with, and rounds


@dataclasses.dataclass(frozen=True)
class Misses:
    """Reads of data, and how many of them missed the ``first`` and the ``last`` level of cache.  Cachegrind counts a
    read for each float that a multiply-add takes from memory, where hardware reads several at once."""

    reads: float
    first: float
    last: float

    def per_product(self, fewer: "Misses", products: int) -> "Misses":
        """What so many products added to ``fewer``."""
        pairs = zip(dataclasses.astuple(self), dataclasses.astuple(fewer), strict=True)
        return Misses(*((more - less) / products for more, less in pairs))


def tool() -> tuple[str, str]:
    """What can count here, and why that in a sentence.  Raises ValueError where nothing can."""
    refusal = _refusal()
    if not refusal:
        return PERF, f"{PERF} counts them"
    if shutil.which("valgrind"):
        return CACHEGRIND, f"{PERF} cannot count here ({refusal}): {CACHEGRIND} simulates the caches"
    raise ValueError(
        f"cache misses cannot be counted here: {PERF} cannot ({refusal}), and valgrind is not installed "
        "(apt install valgrind)"
    )


def count(matrices: Sequence[Tiles], activations: str | None, first: int, last: int, counter: str) -> Misses:
    """Of one product with one column, the mean over ``matrices``, which take turns; as floats where ``activations`` is
    None.  ``first`` and ``last``: bytes of the caches that cachegrind simulates.

    Raises ValueError if the library or the counter fails.
    """
    if isinstance(found := native.library(), str):
        raise ValueError(f"cache misses of packed products cannot be counted: {found}")
    rounds = min(max(ENOUGH // sum(one.rows * one.columns for one in matrices), 2), MOST)
    with tempfile.TemporaryDirectory() as folder:
        told = pathlib.Path(folder) / "matrices.json"
        tell(told, matrices, activations)
        fewer, more = (_counted(told, times, first, last, counter) for times in (1, 1 + rounds))
    return more.per_product(fewer, rounds * len(matrices))


def perf_counts(text: str) -> Misses:
    """What ``perf stat -x,`` wrote.  Raises ValueError with the event that was not counted.

    >>> perf_counts("900,,L1-dcache-loads:u,,\\n80,,L1-dcache-load-misses:u,,\\n7,,LLC-load-misses:u,,\\n")
    Misses(reads=900.0, first=80.0, last=7.0)
    """
    fields = [line.split(",") for line in text.splitlines()]
    values = {line[2].removesuffix(":u"): line[0] for line in fields if len(line) > 2}
    for event in EVENTS:
        if not values.get(event, "").isdigit():
            raise ValueError(f"{event} {values.get(event, 'missing').strip('<>')}")
    return Misses(*(float(values[event]) for event in EVENTS))


def cachegrind_counts(text: str) -> Misses:
    """What the file that cachegrind leaves sums up.  Raises ValueError if it does not.

    >>> cachegrind_counts("events: Ir Dr D1mr DLmr\\nfn=main\\n1 9 900 80 7\\nsummary: 9 900 80 7\\n")
    Misses(reads=900.0, first=80.0, last=7.0)
    """
    told = dict(line.split(": ", 1) for line in text.splitlines() if line.startswith(("events: ", "summary: ")))
    values = dict(zip(told.get("events", "").split(), told.get("summary", "").split(), strict=False))
    if not set(SIMULATED) <= set(values):
        raise ValueError(f"{CACHEGRIND} left no summary with {', '.join(SIMULATED)}")
    return Misses(*(float(values[event]) for event in SIMULATED))


def geometry(size: int) -> str:
    """A cache of so many bytes as cachegrind wants it: bytes, ways and bytes of a line, the sets a power of two.

    >>> geometry(32 << 10), geometry(48 << 10), geometry(36 << 20)
    ('32768,8,64', '49152,12,64', '37748736,9,64')
    """
    lines = size // LINE
    ways = lines // (lines & -lines)  # the odd part
    while ways < WAYS and 2 * ways <= lines:
        ways *= 2
    return f"{lines * LINE},{ways},{LINE}"


def _refusal() -> str:
    """Why ``perf stat`` cannot count here; nothing if it can."""
    if not shutil.which("perf"):
        return "perf is not installed"
    done = subprocess.run(["perf", "stat", "-x,", "-e", USER, "true"], capture_output=True, text=True)
    if done.returncode:
        said = (line.strip().rstrip(".") for line in done.stderr.splitlines())
        return next((line for line in said if line not in ("", "Error:")), "it fails without a word")
    try:
        perf_counts(done.stderr)
    except ValueError as error:
        return str(error)
    return ""


def tell(path: pathlib.Path, matrices: Sequence[Tiles], activations: str | None) -> None:
    """Write what ``products`` reads: the matrices for the library, or as floats where ``activations`` is None."""
    told: dict[str, Any] = {}
    if activations is not None:
        told["library"], told["openmp"] = str(native.LIBRARY), _openmp()
        told["paths"], told["digits"] = sorted(native.PATHS.values(), reverse=True), native.DIGITS[activations]
    generator = torch.Generator().manual_seed(1)
    with path.with_suffix(".bin").open("wb") as file:

        def place(part: torch.Tensor) -> int | None:
            """Where it lies in the file; None, which is no address, if it is empty."""
            file.write(bytes(-file.tell() % LINE))
            start = file.tell()
            file.write(np.ascontiguousarray(part.numpy()).tobytes())
            return start if part.numel() else None

        told["matrices"] = []
        for tiles in matrices:
            if activations is None:
                places = [place(layout.dequantize(tiles))]
            else:
                read = native.matrix_of(tiles)
                order = place(tiles.order)
                assert order is not None
                places = [*map(place, read.parts), order, order + read.tiles - read.starts]
            one = {"shape": [tiles.rows, tiles.columns], "group_size": tiles.group_size, "places": places}
            told["matrices"].append(one | {"x": place(torch.randn(tiles.columns, generator=generator))})
    path.write_text(json.dumps(told))


def _openmp() -> str:
    """The OpenMP library that torch has loaded: packed products ask for its symbols."""
    mapped = pathlib.Path("/proc/self/maps").read_text().split()
    found = next((word for word in mapped if re.match(r"/.*/lib(g|i)?omp[^/]*$", word)), None)
    if found is None:
        raise ValueError("cache misses cannot be counted: torch has loaded no OpenMP that packed products could take")
    return found


def _counted(told: pathlib.Path, rounds: int, first: int, last: int, counter: str) -> Misses:
    """Of a whole process."""
    out = told.with_suffix(".out")
    if counter == PERF:
        before = ["perf", "stat", "-x,", "-o", str(out), "-e", USER, "--"]
    else:
        caches = [f"--{name}={geometry(size)}" for name, size in (("I1", first), ("D1", first), ("LL", last))]
        before = ["valgrind", "-q", "--tool=cachegrind", "--cache-sim=yes", *caches, f"--cachegrind-out-file={out}"]
    alone = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "PYTHONHASHSEED": "0"}
    command = [*before, sys.executable, "-P", str(PRODUCTS), str(told), str(rounds)]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | alone)
    if done.returncode:
        reason = next(iter(done.stderr.strip().splitlines()[-1:]), f"exit status {done.returncode}")
        raise ValueError(f"cache misses cannot be counted: {counter} fails ({reason})")
    return (perf_counts if counter == PERF else cachegrind_counts)(out.read_text())
