"""How fast products with trellis tiles are, beside those of ggml, the library of llama.cpp (extra ``llamacpp``):

    python -m experiments.benchmarks.ggml_kernels

One row of activations, one thread; ours rounds it to int8, ggml to the type that it pairs with a format.  All take
turns in one process, weights in cache.  Times are CPU time of that thread, which other work on the machine does not
add to; medians of rounds, and the ratio of ggml's time to ours with its 95 % interval: above 1 ours is faster.  ggml
computes graphs of several products, as a model's are, so that they share the overhead of a call; ours is called from
Python for each.  A format is run on plain rows and, where ggml has such a form for this machine, as llama.cpp holds it
after loading.  Where rows are no multiple of its blocks, llama.cpp takes the type that is named.
"""

import argparse
import ctypes
import datetime
import functools
import itertools
import pathlib
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import gguf
import numpy as np
import torch
from rich.progress import track
from torch import Tensor

from nashswarm import kernels
from nashswarm.errors import require
from nashswarm.kernels import native, trellis
from nashswarm.kernels.__main__ import example_trellis, fastest_call
from nashswarm.records import files
from nashswarm.records.provenance import provenance
from nashswarm.records.statistics import median_interval

OUT = pathlib.Path("results/benchmarks/ggml_kernels")
SHAPES = ((1536, 576), (3072, 768), (4096, 4096))
NEAREST = {2: ("Q2_K",), 3: ("Q3_K", "IQ3_S"), 4: ("Q4_0", "Q4_K")}  # bits of ours → types of about as many
NARROW = {"Q2_K": "Q4_0", "Q3_K": "Q4_0", "IQ3_S": "IQ4_NL", "Q4_K": "Q5_0"}  # llama.cpp's types for other rows
BLOCK = 256  # weights
ROUNDS = 41
PRODUCTS = 8  # in a graph
SECONDS = 2e-3  # that each call is repeated for in a round


def main() -> None:
    """Measure, save and print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=pathlib.Path, default=OUT)
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    options = parser.parse_args()
    require("this benchmark", ["gguf", "llama-cpp-python"], "llamacpp")
    started = datetime.datetime.now(datetime.UTC)
    torch.set_num_threads(1)
    ggml = Ggml()
    rows = [row for shape in track(SHAPES, "products") for row in measured(ggml, shape, options.rounds)]
    table = f"{as_table(rows)}\nOurs: {native.path()}.  ggml: {ggml.features}.\n"
    content = {"path": native.path(), "ggml": ggml.features, "rows": rows, "provenance": provenance(started)}
    files.write_report(options.out, content, table)
    print(table)


def measured(ggml: "Ggml", shape: tuple[int, int], rounds: int) -> list[dict[str, Any]]:
    """Return a row for every pair of ours and a type of ggml in one of its forms."""
    x = torch.randn(1, shape[1], generator=torch.Generator().manual_seed(1))
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(2))
    ours = {bits: example_trellis(*shape, (bits,)) for bits in NEAREST}
    calls: dict[tuple[str, str], Callable[[], Any]] = {}
    errors: dict[tuple[str, str], float] = {}
    stored: dict[tuple[str, str], float] = {}
    for bits, matrix in ours.items():
        key = (f"{bits} bits", "")
        calls[key] = functools.partial(fastest_call(matrix), x, matrix, "int8", None)
        errors[key] = error(kernels.direct(x, matrix, "int8"), x, trellis.dequantize(matrix))
        stored[key] = 8 * matrix.nbytes / weight.numel()
    kinds = {
        kind: kind if shape[1] % BLOCK == 0 else NARROW.get(kind, kind) for kind in itertools.chain(*NEAREST.values())
    }
    for kind in dict.fromkeys(kinds.values()):
        content, decoded = ggml.quantize(weight, kind)
        for form in ggml.forms():
            product = ggml.product(content, kind, shape, form, x)
            if product is None:
                continue
            calls[kind, form], result = product
            errors[kind, form], stored[kind, form] = error(result(), x, decoded), 8 * content.nbytes / weight.numel()
    times = dict(zip(calls, cpu_seconds(list(calls.values()), rounds), strict=True))
    rows = []
    for bits, nearest in NEAREST.items():
        mine = times[f"{bits} bits", ""]
        for wanted, (kind, form) in itertools.product(nearest, [key for key in calls if key[1]]):
            if kinds[wanted] != kind:
                continue
            theirs = [seconds / PRODUCTS for seconds in times[kind, form]]
            ratios = [their / my for their, my in zip(theirs, mine, strict=True)]
            low, high = median_interval(ratios)
            rows.append(
                {"shape": f"{shape[0]}x{shape[1]}", "ours": f"{bits} bits", "ggml": kind, "stands for": wanted}
                | {"form": form, "bits of ours": stored[f"{bits} bits", ""], "bits of ggml": stored[kind, form]}
                | {"microseconds of ours": 1e6 * statistics.median(mine)}
                | {"microseconds of ggml": 1e6 * statistics.median(theirs)}
                | {"ratio": statistics.median(ratios), "low": low, "high": high}
                | {"error of ours": errors[f"{bits} bits", ""], "error of ggml": errors[kind, form]}
            )
    return rows


def cpu_seconds(calls: Sequence[Callable[[], Any]], rounds: int) -> list[list[float]]:
    """Return the CPU seconds of each call in each round, in which the calls take turns for about equal times."""

    def seconds(call: Callable[[], Any], count: int) -> float:
        started = time.thread_time()
        for _ in range(count):
            call()
        return (time.thread_time() - started) / count

    with torch.inference_mode():
        counts = [max(1, round(SECONDS / min(seconds(call, 3) for _ in range(5)))) for call in calls]
        times: list[list[float]] = [[] for _ in calls]
        for _ in range(rounds):
            for call, count, by_round in zip(calls, counts, times, strict=True):
                seconds(call, 2)  # loads the weights into the CPU cache
                by_round.append(seconds(call, count))
    return times


def error(product: Tensor, x: Tensor, weight: Tensor) -> float:
    """Return the error of a product relative to the one in 64 bits."""
    exact = x.double() @ weight.double().T
    return float((product.double() - exact).norm() / exact.norm())


def as_table(rows: Sequence[dict[str, Any]]) -> str:
    """Return the rows as a Markdown table."""
    cells = [[f"{value:.3g}" if isinstance(value, float) else str(value) for value in row.values()] for row in rows]
    lines = [list(rows[0]), ["--:"] * len(rows[0]), *cells]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


class _Parameters(ctypes.Structure):
    """``ggml_init_params``: of a memory pool."""

    _fields_ = [("mem_size", ctypes.c_size_t), ("mem_buffer", ctypes.c_void_p), ("no_alloc", ctypes.c_bool)]


class Ggml:
    """ggml as ``llama-cpp-python`` builds it, computing on one thread of the CPU."""

    def __init__(self) -> None:
        import llama_cpp

        llama_cpp.llama_backend_init()
        folder = pathlib.Path(llama_cpp.__file__).parent / "lib"
        path = next(folder / name for name in ("libllama.so", "libllama.dylib") if (folder / name).exists())
        self.library = ctypes.CDLL(str(path))  # loaded already; it gives the functions of ggml as well
        self.features = llama_cpp.llama_print_system_info().decode().replace(" = 1", "").strip(" |")
        pointer, size = ctypes.c_void_p, ctypes.c_size_t
        signatures: dict[str, tuple[Any, Sequence[Any]]] = {
            "ggml_init": (pointer, [_Parameters]),
            "ggml_new_tensor_2d": (pointer, [pointer, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]),
            "ggml_mul_mat": (pointer, [pointer] * 3),
            "ggml_new_graph": (pointer, [pointer]),
            "ggml_build_forward_expand": (None, [pointer] * 2),
            "ggml_backend_alloc_ctx_tensors_from_buft": (pointer, [pointer] * 2),
            "ggml_backend_cpu_buffer_type": (pointer, []),
            "ggml_backend_buft_name": (ctypes.c_char_p, [pointer]),
            "ggml_backend_tensor_set": (None, [pointer, pointer, size, size]),
            "ggml_backend_tensor_get": (None, [pointer, pointer, size, size]),
            "ggml_backend_graph_compute": (ctypes.c_int, [pointer] * 2),
            "ggml_backend_reg_dev_get": (pointer, [pointer, size]),
            "ggml_backend_reg_get_proc_address": (pointer, [pointer, ctypes.c_char_p]),
            "ggml_backend_dev_supports_op": (ctypes.c_bool, [pointer] * 2),
            "ggml_quantize_chunk": (size, [ctypes.c_int, *2 * [pointer], *3 * [ctypes.c_int64], pointer]),
            "ggml_backend_cpu_init": (pointer, []),
            "ggml_backend_cpu_reg": (pointer, []),
            "ggml_backend_cpu_set_n_threads": (None, [pointer, ctypes.c_int]),
        }
        for name, (result, arguments) in signatures.items():
            function = getattr(self.library, name)
            function.restype, function.argtypes = result, arguments
        self.backend = self.library.ggml_backend_cpu_init()
        self.library.ggml_backend_cpu_set_n_threads(self.backend, 1)
        register = self.library.ggml_backend_cpu_reg()
        self.device = self.library.ggml_backend_reg_dev_get(register, 0)
        self.buffers = {"rows": self.library.ggml_backend_cpu_buffer_type()}
        address = self.library.ggml_backend_reg_get_proc_address(register, b"ggml_backend_dev_get_extra_bufts")
        listed = ctypes.CFUNCTYPE(ctypes.POINTER(pointer), pointer)(address)(self.device)
        for buffer_type in itertools.takewhile(bool, (listed[number] for number in itertools.count())):
            self.buffers[self.library.ggml_backend_buft_name(buffer_type).decode()] = buffer_type

    def forms(self) -> list[str]:
        """Return the names of the forms in which weights can be held: as rows, and those for this machine."""
        return list(self.buffers)

    def quantize(self, weight: Tensor, kind: str) -> tuple[np.ndarray, Tensor]:
        """Return the bytes of the matrix in a type, and what they decode to."""
        number = gguf.GGMLQuantizationType[kind]
        content = np.empty(gguf.quant_shape_to_byte_shape(tuple(weight.shape), number), np.uint8)
        self.library.ggml_quantize_chunk(int(number), weight.data_ptr(), content.ctypes.data, 0, *weight.shape, None)
        return content, torch.from_numpy(gguf.dequantize(content, number))

    def product(
        self, content: np.ndarray, kind: str, shape: tuple[int, int], form: str, x: Tensor
    ) -> tuple[Callable[[], int], Callable[[], Tensor]] | None:
        """Return the call that computes ``PRODUCTS`` products with x, and the one that returns the result of the last.

        None if the form is not for this type.
        """
        ggml, (rows, columns) = self.library, shape
        weights, others = (ggml.ggml_init(_Parameters(1 << 20, None, True)) for _ in range(2))
        matrix = ggml.ggml_new_tensor_2d(weights, int(gguf.GGMLQuantizationType[kind]), columns, rows)
        ggml.ggml_backend_alloc_ctx_tensors_from_buft(weights, self.buffers[form])
        inputs = ggml.ggml_new_tensor_2d(others, int(gguf.GGMLQuantizationType.F32), columns, len(x))
        products = [ggml.ggml_mul_mat(others, matrix, inputs) for _ in range(PRODUCTS)]
        if not ggml.ggml_backend_dev_supports_op(self.device, products[0]):
            return None
        graph = ggml.ggml_new_graph(others)
        for product in products:
            ggml.ggml_build_forward_expand(graph, product)
        ggml.ggml_backend_alloc_ctx_tensors_from_buft(others, self.buffers["rows"])
        ggml.ggml_backend_tensor_set(matrix, content.ctypes.data, 0, content.nbytes)
        ggml.ggml_backend_tensor_set(inputs, x.data_ptr(), 0, x.nbytes)

        def result() -> Tensor:
            ggml.ggml_backend_graph_compute(self.backend, graph)
            values = torch.empty(len(x), rows)
            ggml.ggml_backend_tensor_get(products[-1], values.data_ptr(), 0, values.nbytes)
            return values

        return functools.partial(ggml.ggml_backend_graph_compute, self.backend, graph), result


if __name__ == "__main__":
    main()
