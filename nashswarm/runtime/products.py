"""Multiply matrices with a vector repeatedly, in a process whose cache misses are counted from outside.

    python products.py FILE.json ROUNDS

The JSON file, which ``cache_misses`` writes, tells where matrices and inputs lie in FILE.bin.  With a key ``library``
the matrices are packed, without it they are floats, which numpy's BLAS multiplies.  The program prints the path of the
library's kernels and the sum of every product.  It does not import torch, which would cause most of the misses.
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
        layout = json.load(file)
    with open(path.removesuffix("json") + "bin", "rb") as file:
        data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    path_number, calls, products = packed(layout, data) if "library" in layout else floats(layout, data)
    for _ in range(rounds):
        for call in calls:
            call()
    print(json.dumps({"path": path_number, "sums": [float(sum(product)) for product in products]}))


def packed(layout: Any, data: mmap.mmap) -> tuple[int | None, list[Callable[[], object]], list[Any]]:
    """Return the number of the kernels' path, a call for every matrix, and the buffers that the calls write to."""
    ctypes.CDLL(layout["openmp"], mode=ctypes.RTLD_GLOBAL)
    library = ctypes.CDLL(layout["library"])
    multiply = library.nashswarm_matmul
    multiply.argtypes = [*[ctypes.c_void_p] * 4, ctypes.c_int64, *[ctypes.c_int] * 3]
    path = next(number for number in layout["paths"] if library.nashswarm_supports(number))
    start = ctypes.addressof(ctypes.c_char.from_buffer(data))
    calls: list[Callable[[], object]] = []
    products = []
    for entry in layout["matrices"]:
        addresses = [0 if offset is None else start + offset for offset in entry["places"]]
        words = [*entry["shape"], entry["group_size"], *addresses]
        matrix, y = (ctypes.c_uint64 * len(words))(*words), (ctypes.c_float * entry["shape"][0])()
        calls.append(functools.partial(multiply, matrix, start + entry["x"], None, y, 1, layout["digits"], 1, path))
        products.append(y)
    return path, calls, products


def floats(layout: Any, data: mmap.mmap) -> tuple[int | None, list[Callable[[], object]], list[Any]]:
    """Return the same for matrices of floats, which have no path."""
    import numpy as np  # only here: its import costs as much as everything else in this program

    calls: list[Callable[[], object]] = []
    products = []
    for entry in layout["matrices"]:
        rows, columns = entry["shape"]
        weight = np.frombuffer(data, np.float32, rows * columns, entry["places"][0]).reshape(rows, columns)
        x, y = np.frombuffer(data, np.float32, columns, entry["x"]), np.empty(rows, np.float32)
        calls.append(functools.partial(np.dot, weight, x, out=y))
        products.append(y)
    return None, calls, products


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
