"""Products with one column again and again, for a counter outside to count: without torch, whose import would be most
of what is counted.

    python products.py FILE.json ROUNDS

The JSON, which ``misses`` writes, tells where matrices and inputs lie in FILE.bin; with ``library`` they are packed,
without they are floats, which numpy's BLAS multiplies.  Prints the path that the library took and a sum of every
answer.
"""

import ctypes
import functools
import json
import mmap
import sys
from collections.abc import Callable
from typing import Any


def main(path: str, rounds: int) -> None:
    """Multiply with every matrix in turn, ``rounds`` times."""
    with open(path) as file:
        told = json.load(file)
    with open(path.removesuffix("json") + "bin", "rb") as file:
        held = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    taken, calls, answers = packed(told, held) if "library" in told else floats(told, held)
    for _ in range(rounds):
        for call in calls:
            call()
    print(json.dumps({"path": taken, "sums": [float(sum(answer)) for answer in answers]}))


def packed(told: Any, held: mmap.mmap) -> tuple[int | None, list[Callable[[], object]], list[Any]]:
    """The path, a call for every matrix, and where their answers go."""
    ctypes.CDLL(told["openmp"], mode=ctypes.RTLD_GLOBAL)
    library = ctypes.CDLL(told["library"])
    multiply = library.nashswarm_matmul
    multiply.argtypes = [*[ctypes.c_void_p] * 4, ctypes.c_int64, *[ctypes.c_int] * 3]
    taken = next(number for number in told["paths"] if library.nashswarm_supports(number))
    start = ctypes.addressof(ctypes.c_char.from_buffer(held))
    calls: list[Callable[[], object]] = []
    answers = []
    for one in told["matrices"]:
        addresses = [0 if place is None else start + place for place in one["places"]]
        words = [*one["shape"], one["group_size"], *addresses]
        matrix, y = (ctypes.c_uint64 * len(words))(*words), (ctypes.c_float * one["shape"][0])()
        calls.append(functools.partial(multiply, matrix, start + one["x"], None, y, 1, told["digits"], 1, taken))
        answers.append(y)
    return taken, calls, answers


def floats(told: Any, held: mmap.mmap) -> tuple[int | None, list[Callable[[], object]], list[Any]]:
    """The same of floats; there is no path."""
    import numpy as np  # as much again as all the rest, which packed products need not wait for

    calls: list[Callable[[], object]] = []
    answers = []
    for one in told["matrices"]:
        rows, columns = one["shape"]
        weight = np.frombuffer(held, np.float32, rows * columns, one["places"][0]).reshape(rows, columns)
        x, y = np.frombuffer(held, np.float32, columns, one["x"]), np.empty(rows, np.float32)
        calls.append(functools.partial(np.dot, weight, x, out=y))
        answers.append(y)
    return None, calls, answers


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
