"""Count the cache misses of a product with a packed matrix, and of the same product with floats.

``perf stat`` reads the hardware counters if kernel and processor allow it.  Otherwise ``valgrind --tool=cachegrind``
simulates two levels of cache, the first and the last, without prefetching; the library then takes the best path that
valgrind supports.  A separate process multiplies few times and then many times: the difference is the count of the
products alone, with their calls from Python.
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
USER = ",".join(f"{event}:u" for event in EVENTS)  # in user space: counting in the kernel may need privileges
SIMULATED = ("Dr", "D1mr", "DLmr")
LINE, WAYS = 64, 8  # bytes of a cache line; the lowest associativity to simulate
WEIGHTS, MAX_ROUNDS = 1 << 26, 64  # weights to multiply with in total, in so many rounds at most


@dataclasses.dataclass(frozen=True)
class Misses:
    """Reads of data, and how many of them missed the ``first`` and the ``last`` level of cache.

    Cachegrind counts one read for each float that a multiply-add takes from memory; hardware reads several at once.
    """

    reads: float
    first: float
    last: float

    def per_product(self, fewer: "Misses", products: int) -> "Misses":
        """Return the counts of one product, if this process ran ``products`` products more than ``fewer``."""
        pairs = zip(dataclasses.astuple(self), dataclasses.astuple(fewer), strict=True)
        return Misses(*((more - less) / products for more, less in pairs))


def choose_counter() -> tuple[str, str]:
    """Return the counter to use on this machine, and the reason in a sentence.

    Raises ValueError if there is none.
    """
    problem = _perf_problem()
    if not problem:
        return PERF, f"{PERF} counts them"
    if shutil.which("valgrind"):
        return CACHEGRIND, f"{PERF} cannot count here ({problem}): {CACHEGRIND} simulates the caches"
    raise ValueError(
        f"cache misses cannot be counted here: {PERF} cannot ({problem}), and valgrind is not installed "
        "(apt install valgrind)"
    )


def count_misses(matrices: Sequence[Tiles], activations: str | None, first: int, last: int, counter: str) -> Misses:
    """Count the misses of one matrix-vector product, as the mean over ``matrices``, which are multiplied in turn.

    ``activations``: of the packed product; None multiplies the dequantized floats.  ``first`` and ``last``: bytes of
    the caches that cachegrind simulates.  Raises ValueError if the library or the counter fails.
    """
    if isinstance(problem := native.library(), str):
        raise ValueError(f"cache misses of packed products cannot be counted: {problem}")
    rounds = min(max(WEIGHTS // sum(tiles.rows * tiles.columns for tiles in matrices), 2), MAX_ROUNDS)
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder) / "matrices.json"
        write_matrices(path, matrices, activations)
        fewer, more = (_count_process(path, times, first, last, counter) for times in (1, 1 + rounds))
    return more.per_product(fewer, rounds * len(matrices))


def parse_perf(text: str) -> Misses:
    """Parse the output of ``perf stat -x,``.  Raises ValueError with the event that was not counted.

    >>> parse_perf("900,,L1-dcache-loads:u,,\\n80,,L1-dcache-load-misses:u,,\\n7,,LLC-load-misses:u,,\\n")
    Misses(reads=900.0, first=80.0, last=7.0)
    """
    fields = [line.split(",") for line in text.splitlines()]
    values = {line[2].removesuffix(":u"): line[0] for line in fields if len(line) > 2}
    for event in EVENTS:
        if not values.get(event, "").isdigit():
            raise ValueError(f"{event} {values.get(event, 'missing').strip('<>')}")
    return Misses(*(float(values[event]) for event in EVENTS))


def parse_cachegrind(text: str) -> Misses:
    """Parse the summary of a file that cachegrind wrote.  Raises ValueError if there is none.

    >>> parse_cachegrind("events: Ir Dr D1mr DLmr\\nfn=main\\n1 9 900 80 7\\nsummary: 9 900 80 7\\n")
    Misses(reads=900.0, first=80.0, last=7.0)
    """
    lines = dict(line.split(": ", 1) for line in text.splitlines() if line.startswith(("events: ", "summary: ")))
    values = dict(zip(lines.get("events", "").split(), lines.get("summary", "").split(), strict=False))
    if not set(SIMULATED) <= set(values):
        raise ValueError(f"{CACHEGRIND} left no summary with {', '.join(SIMULATED)}")
    return Misses(*(float(values[event]) for event in SIMULATED))


def geometry(size: int) -> str:
    """Describe a cache of ``size`` bytes to cachegrind: bytes, ways, bytes of a line; sets must be a power of two.

    >>> geometry(32 << 10), geometry(48 << 10), geometry(36 << 20)
    ('32768,8,64', '49152,12,64', '37748736,9,64')
    """
    lines = size // LINE
    ways = lines // (lines & -lines)  # the odd part
    while ways < WAYS and 2 * ways <= lines:
        ways *= 2
    return f"{lines * LINE},{ways},{LINE}"


def _perf_problem() -> str:
    """Return the reason why ``perf stat`` cannot count on this machine, or an empty string if it can."""
    if not shutil.which("perf"):
        return "perf is not installed"
    process = subprocess.run(["perf", "stat", "-x,", "-e", USER, "true"], capture_output=True, text=True)
    if process.returncode:
        lines = (line.strip().rstrip(".") for line in process.stderr.splitlines())
        return next((line for line in lines if line not in ("", "Error:")), "it fails without a message")
    try:
        parse_perf(process.stderr)
    except ValueError as error:
        return str(error)
    return ""


def write_matrices(path: pathlib.Path, matrices: Sequence[Tiles], activations: str | None) -> None:
    """Write the files that ``products`` reads: packed matrices, or their floats if ``activations`` is None."""
    description: dict[str, Any] = {}
    if activations is not None:
        description["library"], description["openmp"] = str(native.LIBRARY), _openmp()
        description["paths"], description["digits"] = (
            sorted(native.PATHS.values(), reverse=True),
            native.DIGITS[activations],
        )
    generator = torch.Generator().manual_seed(1)
    with path.with_suffix(".bin").open("wb") as file:

        def append(part: torch.Tensor) -> int | None:
            """Write a tensor and return its offset in the file; None, which becomes a null pointer, if it is empty."""
            file.write(bytes(-file.tell() % LINE))
            offset = file.tell()
            file.write(np.ascontiguousarray(part.numpy()).tobytes())
            return offset if part.numel() else None

        description["matrices"] = []
        for tiles in matrices:
            if activations is None:
                offsets = [append(layout.dequantize(tiles))]
            else:
                fields = native.matrix_of(tiles)
                order = append(tiles.order)
                assert order is not None
                offsets = [*map(append, fields.parts), order, order + fields.tiles - fields.starts]
            entry = {"shape": [tiles.rows, tiles.columns], "group_size": tiles.group_size, "places": offsets}
            description["matrices"].append(entry | {"x": append(torch.randn(tiles.columns, generator=generator))})
    path.write_text(json.dumps(description))


def _openmp() -> str:
    """Return the path of the OpenMP library that torch has loaded, which packed products need."""
    mapped = pathlib.Path("/proc/self/maps").read_text().split()
    path = next((word for word in mapped if re.match(r"/.*/lib(g|i)?omp[^/]*$", word)), None)
    if path is None:
        raise ValueError("cache misses cannot be counted: torch has loaded no OpenMP that packed products could take")
    return path


def _count_process(path: pathlib.Path, rounds: int, first: int, last: int, counter: str) -> Misses:
    """Count the misses of a whole process that runs ``products``."""
    out = path.with_suffix(".out")
    if counter == PERF:
        prefix = ["perf", "stat", "-x,", "-o", str(out), "-e", USER, "--"]
    else:
        caches = [f"--{name}={geometry(size)}" for name, size in (("I1", first), ("D1", first), ("LL", last))]
        prefix = ["valgrind", "-q", "--tool=cachegrind", "--cache-sim=yes", *caches, f"--cachegrind-out-file={out}"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "PYTHONHASHSEED": "0"}
    command = [*prefix, sys.executable, "-P", str(PRODUCTS), str(path), str(rounds)]
    process = subprocess.run(command, capture_output=True, text=True, env=environment)
    if process.returncode:
        reason = next(iter(process.stderr.strip().splitlines()[-1:]), f"exit status {process.returncode}")
        raise ValueError(f"cache misses cannot be counted: {counter} fails ({reason})")
    return (parse_perf if counter == PERF else parse_cachegrind)(out.read_text())
