"""How fast products with packed matrices are, beside torch and onnxruntime:

    python -m experiments.benchmarks.kernels

Ratios to torch's float32 product of the same shape, medians of rounds in which the two take turns, weights in cache,
one thread and two, with 95 % intervals; the error is relative to float64 products of the same weights.  Below, matrices
whose tiles have several widths beside those of one width each, all in turns: the ratio is to their mean.
"""

import argparse
import datetime
import functools
import itertools
import pathlib
import statistics
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from rich.progress import track
from torch import Tensor

from nashswarm import kernels
from nashswarm.kernels import native
from nashswarm.kernels import tiles as layout
from nashswarm.kernels.__main__ import example, fastest_call, interleaved
from nashswarm.records import files
from nashswarm.records.provenance import provenance
from nashswarm.records.statistics import median_interval

OUT = pathlib.Path("results/benchmarks/kernels")
SHAPES = ((3072, 768), (768, 3072))
MIXED = (2, 3, 4)
BITS: tuple[tuple[int, ...], ...] = ((2,), (3,), (4,), (8,), MIXED)
ROUNDS = {1: 61, 64: 21, 512: 7}  # of every batch
THREADS = (1, 2)
GROUP_SIZE = 64


def main() -> None:
    """Measure, save and print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=pathlib.Path, default=OUT)
    options = parser.parse_args()
    started = datetime.datetime.now(datetime.UTC)
    rows, mixed = [], []
    for threads, shape, batch in track(list(itertools.product(THREADS, SHAPES, ROUNDS)), "products"):
        torch.set_num_threads(threads)
        rows += [{"threads": threads} | row for row in measured(shape, batch, ROUNDS[batch])]
        if batch == 1:
            mixed += [{"threads": threads} | row for row in several_widths(shape, ROUNDS[batch])]
    tables = f"{as_table(rows)}\n{as_table(mixed)}"
    content = {"path": native.path(), "rows": rows, "mixed": mixed, "provenance": provenance(started)}
    files.write_report(options.out, content, tables)
    print(tables)


def measured(shape: tuple[int, int], batch: int, rounds: int) -> list[dict[str, Any]]:
    """A row for every kernel."""
    x = torch.randn(batch, shape[1], generator=torch.Generator().manual_seed(1))
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(2))
    calls: dict[str, Callable[[], Tensor]] = {"torch fp32": lambda: torch.nn.functional.linear(x, weight)}
    exact = {"torch fp32": x.double() @ weight.double().T}
    for bits, lattice, activations in itertools.product(BITS, (False, True), kernels.ACTIVATIONS):
        tiles = example(*shape, bits, GROUP_SIZE, lattice)
        kind = "lattice" if lattice else f"groups of {GROUP_SIZE}"
        name = f"{'+'.join(map(str, bits))} bits, {kind}, {activations}"
        exact[name] = exact[f"{name}, operator"] = x.double() @ layout.dequantize(tiles).double().T
        calls[name] = functools.partial(fastest_call(), x, tiles, activations, None)
        if bits == (3,):
            calls[f"{name}, operator"] = functools.partial(kernels.matmul, x, tiles, activations)
    for width, (level, activations) in itertools.product((2, 4, 8), ((4, "int8"), (1, "float32"))):
        name = f"onnxruntime {width} bits, groups of {GROUP_SIZE}, {activations}"
        calls[name], dequantized = onnx_product(shape, width, level, x)
        exact[name] = x.double() @ dequantized.double().T
    rows: list[dict[str, Any]] = []
    for name, call in calls.items():
        ours, plain = interleaved([call, calls["torch fp32"]], rounds)
        ratios = sorted(second / first for first, second in zip(ours, plain, strict=True))
        low, high = median_interval(ratios)
        rows.append(
            {"shape": f"{shape[0]}x{shape[1]}", "batch": batch, "kernel": name}
            | {"microseconds": 1e6 * statistics.median(ours), "ratio": statistics.median(ratios)}
            | {"low": low, "high": high}
            | {"relative error": float((call().double() - exact[name]).norm() / exact[name].norm())}
        )
    return rows


def several_widths(shape: tuple[int, int], rounds: int) -> list[dict[str, Any]]:
    """What mixing widths in one matrix costs at batch 1, over the mean of matrices of one of them each."""
    x = torch.randn(1, shape[1], generator=torch.Generator().manual_seed(1))
    rows: list[dict[str, Any]] = []
    for lattice, activations in itertools.product((False, True), kernels.ACTIVATIONS):
        widths = [*((bits,) for bits in MIXED), MIXED]
        tiles = [example(*shape, bits, GROUP_SIZE, lattice) for bits in widths]
        *alone, several = interleaved(
            [functools.partial(fastest_call(), x, each, activations, None) for each in tiles], rounds
        )
        of_one = [statistics.mean(each) for each in zip(*alone, strict=True)]
        ratios = sorted(one / other for one, other in zip(several, of_one, strict=True))
        low, high = median_interval(ratios)
        kind = "lattice" if lattice else f"groups of {GROUP_SIZE}"
        rows.append(
            {"shape": f"{shape[0]}x{shape[1]}", "kernel": f"{'+'.join(map(str, MIXED))} bits, {kind}, {activations}"}
            | {"microseconds": 1e6 * statistics.median(several), "of one width": 1e6 * statistics.median(of_one)}
            | {"ratio": statistics.median(ratios), "low": low, "high": high}
        )
    return rows


def onnx_product(shape: tuple[int, int], bits: int, level: int, x: Tensor) -> tuple[Callable[[], Tensor], Tensor]:
    """onnxruntime's MatMulNBits on random codes in groups, bound to x, and the matrix that they stand for."""
    rng = np.random.default_rng(bits)
    rows, columns = shape
    groups = columns // GROUP_SIZE
    codes = rng.integers(0, 2**bits, (rows, groups, GROUP_SIZE)).astype(np.uint8)
    scale = rng.uniform(0.01, 0.02, (rows, groups)).astype(np.float32)
    each = 8 // bits
    packed = np.zeros((rows, groups, GROUP_SIZE // each), np.uint8)
    for place in range(each):
        packed |= codes[..., place::each] << bits * place
    node = onnx.helper.make_node(
        "MatMulNBits", ["x", "codes", "scale"], ["y"], domain="com.microsoft", K=columns, N=rows, bits=bits,
        block_size=GROUP_SIZE, accuracy_level=level,
    )  # fmt: skip
    graph = onnx.helper.make_graph(
        [node],
        "product",
        [onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, tuple(x.shape))],
        [onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, (len(x), rows))],
        [onnx.numpy_helper.from_array(packed, "codes"), onnx.numpy_helper.from_array(scale.flatten(), "scale")],
    )
    opsets = [onnx.helper.make_opsetid("", 21), onnx.helper.make_opsetid("com.microsoft", 1)]
    model = onnx.helper.make_model(graph, opset_imports=opsets, ir_version=10)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    output = torch.empty(len(x), rows)
    binding = session.io_binding()
    for bind, name, part in ((binding.bind_input, "x", x), (binding.bind_output, "y", output)):
        bind(name, "cpu", 0, np.float32, tuple(part.shape), part.data_ptr())

    def call() -> Tensor:
        session.run_with_iobinding(binding)
        return output

    matrix = (codes - np.float32(2 ** (bits - 1))) * scale[..., None]
    return call, torch.from_numpy(matrix.reshape(rows, columns))


def as_table(rows: Sequence[dict[str, Any]]) -> str:
    """Return the rows as a Markdown table."""
    names = list(rows[0])
    lines = ["| " + " | ".join(names) + " |", "| " + " | ".join("--:" for _ in names) + " |"]
    for row in rows:
        cells = [f"{value:.3g}" if isinstance(value, float) else str(value) for value in row.values()]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
