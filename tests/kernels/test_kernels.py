"""Products with packed matrices: all paths against the torch reference, and the layout against a slow packer."""

import copy
import dataclasses
import importlib
import itertools
import json
import logging
import math
import pickle
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import jaxtyping
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from nashswarm import kernels
from nashswarm.kernels import __main__ as command
from nashswarm.kernels import native, reference
from nashswarm.kernels import tiles as layout
from nashswarm.kernels.tiles import Tiles

PATHS = native.available()
many_shapes = settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)


def force(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(native.VARIABLE, path)
    native.path.cache_clear()


@pytest.fixture(autouse=True)
def reset_path() -> Iterator[None]:
    yield
    native.path.cache_clear()


@pytest.fixture(params=PATHS)
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    force(request.param, monkeypatch)
    return str(request.param)


@pytest.fixture
def each_path(monkeypatch: pytest.MonkeyPatch) -> Callable[[], Iterator[str]]:
    """A function that takes every path in turn, so that a random example is made once for all of them."""

    def paths() -> Iterator[str]:
        for name in PATHS:
            force(name, monkeypatch)
            yield name

    return paths


def example(
    rows: int, columns: int, group_size: int, bits: list[int], lattice: bool, escapes: int = 0, seed: int = 0
) -> Tiles:
    """Random codes, zero points and escapes.  Escapes are so large that codes do not cancel them, because in stored
    tensors both have the same sign."""
    rng = np.random.default_rng(seed)
    blocks, groups = -(-rows // 16), -(-columns // group_size)
    widths = rng.choice(bits, (blocks, groups)).astype(np.uint8)
    top = 2.0 ** widths.reshape(-1, 1, 1)
    codes = torch.from_numpy(np.floor(rng.random((blocks * groups, 16, group_size)) * top).astype(np.uint8))
    places = np.sort(rng.choice(rows * columns, min(escapes, rows * columns), replace=False))
    row, column = places // columns, places % columns
    order = np.argsort(row // 16, kind="stable")
    starts = np.searchsorted(row[order] // 16, np.arange(blocks + 1))
    none = np.zeros(0, np.float32)
    scale = none if lattice else rng.uniform(-1, 1, (blocks, groups, 16)).astype(np.float32)
    zero_point = none if lattice else rng.random((blocks, groups, 16)) * top.reshape(blocks, groups, 1)
    across, down = (rng.uniform(0.5, 2, n).astype(np.float32) if lattice else none for n in (rows, columns))
    parts = (
        *(across, down, starts.astype(np.int32), (16 * column + row % 16)[order].astype(np.int32)),
        (rng.integers(512, 1000, len(places)) * rng.choice([-1, 1], len(places))).astype(np.int32),
    )
    tiles_widths = torch.from_numpy(widths)
    return Tiles(
        *(rows, columns, group_size, layout.pack(codes, tiles_widths.flatten()), tiles_widths),
        torch.from_numpy(scale).half(),
        torch.from_numpy(zero_point.astype(np.uint8)),
        *map(torch.from_numpy, parts),
    )


def relative(product: Tensor, exact: Tensor) -> float:
    assert product.shape == exact.shape
    return float((product.double() - exact.double()).norm() / exact.double().norm().clamp(min=1e-30))


@pytest.mark.parametrize("width", layout.WIDTHS[1:])
def test_pack_matches_slow_packer(width: int) -> None:
    """The slow packer places each bit where the documentation of the layout says."""
    codes = np.random.default_rng(width).integers(0, 2**width, (16, 64)).astype(np.uint8)
    payload = np.zeros(2 * width * 64, np.uint8)
    for row in range(16):
        for column in range(64):
            chunk, position, byte = column // 32, column % 32 // 4, 4 * row + column % 4
            for bit in range(width):
                if width == 3 and position >= 6:
                    register, at = (position - 6, 6 + bit) if bit < 2 else (2, position)
                elif width == 3:
                    register, at = position // 2, position % 2 * 3 + bit
                else:
                    register, at = divmod(position * width + bit, 8)
                value = codes[row, column] >> bit & 1
                payload[(chunk * width + register) * 64 + byte] |= value << at
    widths = torch.tensor([width], dtype=torch.uint8)
    packed = layout.pack(torch.from_numpy(codes)[None], widths)
    assert np.array_equal(packed.numpy(), payload)
    assert torch.equal(layout.unpack(packed, widths, 64)[0], torch.from_numpy(codes))


def test_dequantize_matches_weight_computed_by_hand() -> None:
    """row scale · column scale · (scale · (code − zero point) + escape)"""
    tiles = example(20, 40, 32, [4], lattice=False)
    places = torch.tensor([16 * 33 + 3], dtype=torch.int32)  # of row 19, column 33
    tiles = dataclasses.replace(
        tiles, row_scale=torch.full((20,), 2.0), column_scale=torch.full((40,), 0.5), escape_places=places,
        escape_codes=torch.tensor([7], dtype=torch.int32), escape_starts=torch.tensor([0, 0, 1], dtype=torch.int32),
    )  # fmt: skip
    code = float(layout.unpack(tiles.payload, tiles.widths.flatten(), 32)[3, 3, 1])  # tile (1, 1), row 3, input 1
    expected = float(tiles.scale[1, 1, 3]) * (code - float(tiles.zero_point[1, 1, 3])) + 7
    assert float(layout.dequantize(tiles)[19, 33]) == pytest.approx(expected)


shapes = st.fixed_dictionaries(
    {
        "rows": st.integers(1, 150),
        "columns": st.integers(1, 300),
        "group_size": st.sampled_from([32, 64, 96, 128]),
        "bits": st.lists(st.sampled_from(layout.WIDTHS), min_size=1, max_size=5, unique=True),
        "lattice": st.booleans(),
        "escapes": st.sampled_from([0, 1, 20]),
        "seed": st.integers(0, 2**16),
    }
)


@given(shapes, st.integers(1, 70))
@many_shapes
def test_matmul_matches_reference_for_any_shape(
    each_path: Callable[[], Iterator[str]], shape: dict[str, Any], batch: int
) -> None:
    tiles = example(**shape)
    x = torch.randn(batch, tiles.columns, generator=torch.Generator().manual_seed(shape["seed"]))
    size = x.norm() * layout.dequantize(tiles).norm()  # the error is relative to the factors, since products may cancel
    for activations in kernels.ACTIVATIONS:
        expected = reference.matmul(x, tiles, activations)
        for path in each_path():
            product = kernels.matmul(x, tiles, activations)
            assert product.shape == expected.shape
            assert float((product - expected).norm()) <= 1e-6 * float(size), (path, activations)


@given(shapes)
@many_shapes
def test_rows_of_matches_dequantized_rows(each_path: Callable[[], Iterator[str]], shape: dict[str, Any]) -> None:
    tiles = example(**shape)
    ids = torch.randint(tiles.rows, (2, 7), generator=torch.Generator().manual_seed(shape["seed"]))
    expected = layout.dequantize(tiles)[ids]
    for _ in each_path():
        torch.testing.assert_close(kernels.rows_of(tiles, ids), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("bits", [[2], [3], [4], [8], [0, 2, 3, 4, 8]])
@pytest.mark.parametrize("lattice", [False, True])
def test_matmul_error_is_that_of_rounding(path: str, bits: list[int], lattice: bool) -> None:
    tiles = command.example(512, 768, bits, 64, lattice)
    x = torch.randn(5, 768, generator=torch.Generator().manual_seed(0))
    exact = x.double() @ layout.dequantize(tiles).double().T
    assert relative(kernels.matmul(x, tiles, "float32"), exact) < 1e-6
    assert relative(kernels.matmul(x, tiles, "int8"), exact) < 1e-2


@pytest.mark.parametrize("path", PATHS[:-1], indirect=True)  # torch chooses its own order of summation
@pytest.mark.parametrize("activations", kernels.ACTIVATIONS)
def test_matmul_is_bit_identical_in_any_batch(path: str, activations: str) -> None:
    tiles = example(100, 200, 64, [2, 3, 4, 8], lattice=True, escapes=5)
    x = torch.randn(15, 200)
    together = kernels.matmul(x, tiles, activations)
    assert torch.equal(together, torch.cat([kernels.matmul(row[None], tiles, activations) for row in x]))


def test_matmul_from_many_threads_is_bit_identical(path: str) -> None:
    tiles, x = command.example(272, 256, [2, 3, 4], 64, False), torch.randn(9, 256)
    expected, products = kernels.matmul(x, copy.deepcopy(tiles)), [torch.empty(0)] * 100
    start = threading.Barrier(100)

    def call(number: int) -> None:
        start.wait()
        products[number] = kernels.matmul(x, tiles)

    threads = [threading.Thread(target=call, args=(number,)) for number in range(100)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(product, expected) for product in products)


@pytest.mark.parametrize("path", PATHS[:-1], indirect=True)
def test_matmul_with_torch_threads_is_bit_identical(path: str) -> None:
    tiles, x = command.example(1040, 768, [3], 64, False), torch.randn(17, 768)
    alone = kernels.matmul(x, tiles)
    torch.set_num_threads(2)
    try:
        together = kernels.matmul(x, tiles)
    finally:
        torch.set_num_threads(1)
    assert torch.equal(together, alone)


@given(st.integers(0, 40), st.lists(st.integers(1, 70), min_size=3, max_size=3), st.integers(0, 2**16))
@many_shapes
def test_route_matches_sorting(each_path: Callable[[], Iterator[str]], rows: int, sizes: list[int], seed: int) -> None:
    k, flock, size = sorted(sizes)
    generator = torch.Generator().manual_seed(seed)
    shapes = (rows, size), (size,), (size,), (size,)
    scores, entry, cost, price = (torch.randn(shape, generator=generator) for shape in shapes)
    expected_experts, expected_gates = [], []
    for row in scores.tolist():
        candidates = sorted(range(size), key=lambda place: entry[place].item() - row[place])[:flock]
        chosen = sorted(candidates, key=lambda place: cost[place].item() - row[place])[:k]
        weights = [math.exp(row[place] - price[place].item()) for place in range(size)]
        total = sum(weights[place] for place in (chosen if k > 1 else range(size)))
        expected_experts.append(chosen)
        expected_gates.append([weights[place] / total for place in chosen])
    for path in each_path():
        experts, gates = kernels.route(scores, entry, cost, price, flock, k)
        assert experts.tolist() == expected_experts, path
        for row_gates, expected in zip(gates.tolist(), expected_gates, strict=True):
            assert row_gates == pytest.approx(expected, rel=1e-5), path


@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_route_gradients_match_autograd(path: str, k: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(k)
    scores = torch.randn(6, 9, generator=generator).to(dtype).requires_grad_()
    entry, cost, price, gate_weights = (torch.randn(size, generator=generator) for size in (9, 9, 9, (6, k)))
    experts, gates = kernels.route(scores, entry, cost, price, 5, k)
    (gates * gate_weights).sum().backward()
    reference_scores = scores.detach().requires_grad_()
    logits = reference_scores - price
    chosen = logits.gather(1, experts)
    expected = chosen.softmax(1) if k > 1 else (chosen - logits.logsumexp(1, keepdim=True)).exp()
    (expected * gate_weights).sum().backward()
    torch.testing.assert_close(scores.grad, reference_scores.grad)
    assert not experts.requires_grad


@pytest.mark.parametrize("path", PATHS[:-1], indirect=True)
@pytest.mark.parametrize("tokens, k, width, hidden", [(90, 2, 24, 13), (401, 3, 40, 36)])
def test_experts_of_many_tokens_match_gemms(path: str, tokens: int, k: int, width: int, hidden: int) -> None:
    """Tiles of every size: one expert takes half of the tokens, another none."""
    generator = torch.Generator().manual_seed(tokens)
    x, gates, up, down = (
        torch.randn(shape, generator=generator)
        for shape in ((tokens, width), (tokens, k), (9, hidden, width), (9, width, hidden))
    )
    experts = torch.randint(8, (tokens, k), generator=generator) * (torch.rand(tokens, k, generator=generator) < 0.5)
    by_hand = torch.zeros(tokens, width)
    for expert in range(9):
        weights = (gates * (experts == expert)).sum(1, keepdim=True)
        by_hand += weights * (torch.nn.functional.gelu(x @ up[expert].T, approximate="tanh") @ down[expert].T)
    torch.testing.assert_close(native.experts(x, up, down, experts, gates), by_hand, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("path", PATHS[:-1][:1], indirect=True)
@given(st.lists(st.integers(1, 40), min_size=4, max_size=4), st.integers(0, 2**16))
@many_shapes
def test_experts_and_sums_match_loops(path: str, sizes: list[int], seed: int) -> None:
    tokens, k, width, hidden = sizes[0] % 9 + 1, sizes[1] % 4 + 1, *sizes[2:]
    generator = torch.Generator().manual_seed(seed)
    x, gates, out, up, down = (
        torch.randn(shape, generator=generator)
        for shape in ((tokens, width), (tokens, k), (tokens * k, width), (5, hidden, width), (5, width, hidden))
    )
    experts = torch.randint(5, (tokens, k), generator=generator)
    places = torch.randperm(tokens * k, generator=generator)
    by_hand, sums_by_hand = torch.zeros(tokens, width), torch.zeros(tokens, width)
    for token, rank in itertools.product(range(tokens), range(k)):
        inner = torch.nn.functional.gelu(up[experts[token, rank]] @ x[token], approximate="tanh")
        by_hand[token] += gates[token, rank] * (down[experts[token, rank]] @ inner)
        sums_by_hand[token] += gates[token, rank] * out[places[token * k + rank]]
    torch.testing.assert_close(native.experts(x, up, down, experts, gates), by_hand, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(native.sums(out, places, gates), sums_by_hand)


@pytest.mark.parametrize("path", PATHS[:-1], indirect=True)
def test_experts_with_missing_expert_raises(path: str) -> None:
    x, up, down, gates = torch.zeros(1, 2), torch.zeros(3, 4, 2), torch.zeros(3, 2, 4), torch.ones(1, 2)
    with pytest.raises(ValueError, match="there is no expert 3: they are numbered from 0 to 2"):
        native.experts(x, up, down, torch.tensor([[0, 3]]), gates)


@given(st.lists(st.integers(0, 9), max_size=60), st.integers(10, 12))
@many_shapes
def test_group_matches_sorting(each_path: Callable[[], Iterator[str]], numbers: list[int], size: int) -> None:
    for path in each_path():
        order, places, ends = (part.tolist() for part in kernels.group(torch.tensor(numbers, dtype=torch.int64), size))
        assert order == sorted(range(len(numbers)), key=lambda place: numbers[place]), path
        assert [order[place] for place in places] == list(range(len(numbers))), path
        assert ends == [sum(number <= each for number in numbers) for each in range(size)], path


@pytest.mark.parametrize("path", PATHS[:-1], indirect=True)
def test_group_with_too_large_number_raises(path: str) -> None:
    with pytest.raises(ValueError, match="there is no expert 5: they are numbered from 0 to 4"):
        kernels.group(torch.tensor([1, 5]), 5)


def test_route_with_ties_nan_and_other_dtypes(path: str) -> None:
    zeros = torch.zeros(5)
    ties = kernels.route(torch.zeros(2, 5), zeros, zeros, zeros, 5, 2)[0]
    assert all(len(set(row)) == 2 for row in ties.tolist())
    nan_choices = kernels.route(torch.full((2, 5), torch.nan), zeros, zeros, zeros, 3, 2)[0]
    assert nan_choices.shape == (2, 2) and bool(((nan_choices >= 0) & (nan_choices < 5)).all())
    with pytest.raises(ValueError, match="k=3 of a flock of 2 out of 5: none may exceed the next"):
        kernels.route(torch.zeros(2, 5), zeros, zeros, zeros, 2, 3)
    scores, doubles = (
        torch.arange(10.0).view(2, 5),
        torch.zeros(10, dtype=torch.float64)[::2],
    )  # a dtype and a stride that the library does not take
    assert kernels.route(scores, doubles, doubles, doubles, 3, 2)[0].tolist() == [[4, 3], [4, 3]]


@pytest.mark.parametrize("path", PATHS[:-1], indirect=True)
def test_route_with_torch_threads_is_bit_identical(path: str) -> None:
    scores, zeros = torch.randn(4096, 64), torch.zeros(64)
    alone = kernels.route(scores, zeros, zeros, zeros, 7, 2)
    torch.set_num_threads(2)
    try:
        together = kernels.route(scores, zeros, zeros, zeros, 7, 2)
        assert all(map(torch.equal, together, alone))
    finally:
        torch.set_num_threads(1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_matmul_keeps_half_precision_dtype(path: str, dtype: torch.dtype) -> None:
    tiles, x = example(33, 70, 32, [3], lattice=False), torch.randn(2, 3, 70).to(dtype)
    bias = torch.randn(33).to(dtype)
    product = kernels.matmul(x, tiles, "float32", bias)
    assert (product.dtype, product.shape) == (dtype, (2, 3, 33))
    assert relative(product, x.float() @ layout.dequantize(tiles).T + bias.float()) < 1e-2


@pytest.mark.parametrize("shape", [(70,), (0, 70), (2, 0, 70)])
def test_matmul_of_vectors_and_empty_batches_keeps_shape(path: str, shape: tuple[int, ...]) -> None:
    tiles = example(33, 70, 32, [3], lattice=False)
    assert kernels.matmul(torch.randn(shape), tiles).shape == (*shape[:-1], 33)


@pytest.mark.parametrize("activations", kernels.ACTIVATIONS)
@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_matmul_with_nonfinite_row_is_nonfinite(path: str, activations: str, value: float) -> None:
    tiles, x = command.example(16, 128, [3], 64, False), torch.zeros(3, 128)
    x[1, 70] = value
    product = kernels.matmul(x, tiles, activations)
    assert not product[1].isfinite().any()
    assert torch.equal(product[[0, 2]], torch.zeros(2, 16))


@pytest.mark.parametrize("size", [1e-44, 1e-20, 1e20])
def test_matmul_is_accurate_for_any_scale_of_activations(path: str, size: float) -> None:
    tiles, x = command.example(16, 128, [3], 64, False), torch.randn(3, 128) * size
    exact = x.double() @ layout.dequantize(tiles).double().T
    assert float((kernels.matmul(x, tiles, "float32") - exact).norm()) <= 1e-6 * float(exact.norm()) + 1e-35


def test_order_matches_hand_computation() -> None:
    """Nine row blocks are two spans; a span is ordered by width, then by row block; tiles of width 0 come last."""
    widths = torch.tensor([[4, 2]] + [[0, 0]] * 6 + [[2, 4]] + [[3, 0]], dtype=torch.uint8)
    starts, tiles = layout.order(widths, 32).split([2 * 4 + 1, 2 * 18])
    assert starts.tolist() == [0, 2, 2, 4, 4, 4, 5, 5, 5]
    # in registers: 32 × 16 codes of 4, 2, 2, 4, 3 bits begin at 0, 4, 6, 8, 12
    order = [(place, where // layout.SPAN, where % layout.SPAN) for place, where in tiles.view(-1, 2).tolist()[:5]]
    assert order == [(4, 1, 0), (6, 0, 7), (0, 0, 0), (8, 1, 7), (12, 0, 0)]


@pytest.mark.parametrize("activations", kernels.ACTIVATIONS)
def test_matmul_operator_passes_torch_opcheck(activations: str) -> None:
    tiles = example(33, 70, 32, [0, 2, 3, 4, 8], lattice=True, escapes=3)
    for x in (torch.randn(2, 70), torch.randn(2, 70, requires_grad=True)):
        bias = torch.randn(33, requires_grad=x.requires_grad)
        torch.library.opcheck(
            torch.ops.nashswarm.matmul.default, (x, bias, activations, *kernels.operator_arguments(tiles))
        )


def test_rows_operator_passes_torch_opcheck() -> None:
    tiles = example(33, 70, 32, [0, 2, 3, 4, 8], lattice=True, escapes=3)
    torch.library.opcheck(torch.ops.nashswarm.rows.default, (torch.tensor([3, 32]), *kernels.operator_arguments(tiles)))


def test_matmul_gradients_of_x_and_bias_match_float_product(path: str) -> None:
    tiles = example(33, 70, 32, [2, 3], lattice=False, escapes=3)
    x, bias = torch.randn(2, 3, 70, requires_grad=True), torch.randn(33, requires_grad=True)
    weight, output_weights = layout.dequantize(tiles), torch.randn(2, 3, 33)
    (kernels.matmul(x, tiles, "int8", bias) * output_weights).sum().backward()
    torch.testing.assert_close(x.grad, output_weights @ weight, rtol=1e-5, atol=1e-3)
    torch.testing.assert_close(bias.grad, output_weights.sum((0, 1)))


def test_matmul_gradients_with_tiles_made_in_inference_mode() -> None:
    original = example(33, 70, 32, [2, 3], lattice=False)
    with torch.inference_mode():
        tiles = dataclasses.replace(original)
    x = torch.randn(2, 70, requires_grad=True)
    kernels.matmul(x, tiles).sum().backward()
    assert x.grad is not None


class Layer(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.tiles = example(33, 70, 32, [2, 3], lattice=False, escapes=3)

    def forward(self, x: Tensor) -> Tensor:
        return kernels.matmul(torch.relu(x), self.tiles) + kernels.rows_of(self.tiles, torch.tensor([1]))[:, :33]


@pytest.fixture
def without_shape_checks() -> Iterator[None]:
    """Compilers cannot trace the checks of shapes, which exist in tests only."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.mark.usefixtures("without_shape_checks")
def test_compiled_and_exported_modules_match_eager() -> None:
    layer, x = Layer(), torch.randn(4, 70)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    product, expected = compiled(x), layer(x)  # compiled before any eager call
    torch.testing.assert_close(product, expected)
    exported = torch.export.export(layer, (x,))
    assert any("nashswarm.matmul" in str(node.target) for node in exported.graph.nodes)
    torch.testing.assert_close(exported.module()(x), expected)


def test_copied_tiles_do_not_share_memory() -> None:
    tiles, x = example(33, 70, 32, [2, 3], lattice=False), torch.randn(4, 70)
    expected = kernels.matmul(x, tiles)
    others = [copy.deepcopy(tiles), pickle.loads(pickle.dumps(tiles))]
    tiles.payload.zero_()
    assert all(torch.equal(kernels.matmul(x, other), expected) for other in others)


def test_matmul_after_tensors_moved_reads_new_addresses(path: str) -> None:
    tiles, x = example(33, 70, 32, [2, 3], lattice=False), torch.randn(4, 70)
    expected = kernels.matmul(x, tiles)
    for part in (tiles.payload, tiles.scale, tiles.zero_point, tiles.escape_starts):
        part.share_memory_()
    assert torch.equal(kernels.matmul(x, tiles), expected)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda tiles: kernels.matmul(torch.zeros(1, 70), tiles, "int4"), "unknown activations 'int4': choose int8 or"),
        (lambda tiles: kernels.matmul(torch.zeros(1, 71), tiles), "x has 71 columns and the packed matrix 70"),
        (lambda tiles: kernels.matmul(torch.zeros(1, 70, device="meta"), tiles), "x is on meta and the packed matrix"),
    ],
)
def test_matmul_with_invalid_argument_raises(call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call(example(33, 70, 32, [3], lattice=False))


@pytest.mark.parametrize("row", [-1, 33])
def test_rows_of_with_missing_row_raises(path: str, row: int) -> None:
    with pytest.raises(IndexError, match=f"row {row} is asked for: the packed matrix has rows 0 … 32"):
        kernels.rows_of(example(33, 70, 32, [3], lattice=False), torch.tensor([5, row]))


def test_path_with_unknown_name_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    force("sse9", monkeypatch)
    with pytest.raises(
        ValueError, match="NASHSWARM_KERNEL=sse9 is no path: choose avx512vbmi, avx512, avx2, neon, portable, torch"
    ):
        native.path()


def test_path_unsupported_by_machine_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "available", lambda: ["portable", native.SLOW])
    force("avx512", monkeypatch)
    with pytest.raises(ValueError, match="NASHSWARM_KERNEL=avx512 cannot be taken here: choose portable, torch"):
        native.path()


def test_path_is_logged_once(path: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    tiles = example(33, 70, 32, [3], lattice=False)
    with caplog.at_level(logging.INFO, native.__name__):
        for _ in range(3):
            kernels.matmul(torch.zeros(1, 70), tiles)
    assert [record.getMessage() for record in caplog.records] == [native.describe_path(path)]


def test_matmul_without_library_uses_torch_and_logs_reason(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Any
) -> None:
    monkeypatch.setattr(native, "LIBRARY", tmp_path / "none.so")
    monkeypatch.delenv(native.VARIABLE, raising=False)
    native.library.cache_clear()
    native.path.cache_clear()
    try:
        tiles, x = example(33, 70, 32, [3], lattice=False), torch.randn(1, 70)
        assert relative(kernels.matmul(x, tiles), reference.matmul(x, tiles, "int8")) < 1e-6
        assert native.path() == native.SLOW
        assert "multiplied by torch, which is slow: the C++ library was not built" in caplog.text
    finally:
        native.library.cache_clear()


def test_command_prints_one_json_line(capsys: pytest.CaptureFixture[str]) -> None:
    command.main(["--shape", "96x128", "--bits", "mixed", "--lattice", "--batch", "2", "--rounds", "5"])
    (line,) = capsys.readouterr().out.splitlines()
    fields = json.loads(line)
    assert fields["path"] in PATHS
    assert fields["ratio_low"] <= fields["ratio"] <= fields["ratio_high"]
    assert fields["relative_error"] < 1e-2
    assert fields["microseconds"] > 0 < fields["microseconds_fp32"]


@pytest.mark.parametrize(
    ("option", "message"), [("--bits=5", "widths are 0, 2, 3, 4, 8"), ("--group-size=48", "of 32")]
)
def test_command_with_invalid_option_exits(option: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        command.main([option])
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("lattice", [False, True])
def test_triton_matmul_in_interpreter_matches_float64(lattice: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton", reason="Triton is not installed")
    monkeypatch.setenv("TRITON_INTERPRET", "1")  # read when the module is imported
    monkeypatch.delitem(sys.modules, "nashswarm.kernels.triton_kernels", raising=False)
    triton_kernels = importlib.import_module("nashswarm.kernels.triton_kernels")

    tiles = example(40, 100, 32, [0, 2, 3, 4, 8], lattice, escapes=3)
    x = torch.randn(17, 100)
    assert relative(triton_kernels.matmul(x, tiles), x.double() @ layout.dequantize(tiles).double().T) < 1e-6
