"""Products with trellis-coded matrices: all paths against the slow decoder."""

import copy
import json
import pickle
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
from nashswarm.kernels import native, trellis_codes, trellis_native, trellis_reference
from nashswarm.kernels import trellis as form
from nashswarm.kernels.trellis import Trellis

PATHS = native.available()
BATCHES = (1, 2, 5, 64)
many_examples = settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
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
    rows: int,
    columns: int,
    rates: list[int],
    rotated: bool = True,
    orders: tuple[bool, bool] = (True, True),
    seed: int = 0,
) -> Trellis:
    """Random codes, sizes, scales and orders; the places that fill up tiles have random codes as well."""
    rng = np.random.default_rng(seed)
    groups, across = form.groups_of(rows), form.tiles_across(columns)
    of_tiles = rng.choice(rates, (groups, across))
    drawn = rng.integers(0, 256, (groups * 64, across * 16)) % (1 << of_tiles.repeat(64, 0).repeat(16, 1))
    sizes, down, across_scale = (
        torch.from_numpy(rng.integers(low, high, count).astype(np.uint8))
        for low, high, count in ((0, 16, groups * 64), (110, 140, rows), (100, 150, across * 16))
    )
    row_order, column_order = (
        torch.from_numpy(rng.permutation(size)) if ordered else None
        for size, ordered in zip((rows, columns), orders, strict=True)
    )
    return form.build(
        torch.from_numpy(of_tiles.astype(np.uint8)), torch.from_numpy(drawn.astype(np.uint8)), rows, columns, rotated,
        0.01, sizes, down, across_scale, row_order, column_order,
    )  # fmt: skip


def size_of(trellis: Trellis) -> float:
    """A bound of the norm of the matrix before rows are turned, for errors relative to what is summed."""
    rates = form.tile_rates(trellis)
    values = trellis_codes.values_of(rates, trellis_codes.unpack_codes(trellis.payload, rates)).double()
    values = values * form.row_sizes(trellis)[:, None] / trellis_codes.UNIT
    across = form.scales(trellis.column_scale, form.COLUMN_STEPS)
    down = form.scales(trellis.row_scale, form.ROW_STEPS)
    return float((values * across).norm() * down.max() * trellis.scale)


def assert_matches_reference(trellis: Trellis, batch: int, paths: Iterator[str], seed: int = 0) -> None:
    x = torch.randn(batch, trellis.columns, generator=torch.Generator().manual_seed(seed))
    size = float(x.norm()) * size_of(trellis)
    expected = {each: trellis_reference.matmul(x, trellis, each) for each in kernels.ACTIVATIONS}
    weight = form.dequantize(trellis)
    exact = x.double() @ weight.double().T
    assert float((expected["float32"] - exact).norm()) <= 1e-6 * size
    assert float((expected["int8"] - exact).norm()) <= 1e-2 * size
    for path in paths:
        for activations in kernels.ACTIVATIONS:
            product = kernels.matmul(x, trellis, activations)
            assert product.shape == exact.shape
            assert float((product - expected[activations]).norm()) <= 1e-6 * size, (path, activations)


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("rate", range(9))
def test_matmul_matches_slow_decoder_at_every_rate(
    each_path: Callable[[], Iterator[str]], rate: int, batch: int
) -> None:
    assert_matches_reference(example(130, 200, [rate], seed=rate), batch, each_path())


@given(
    st.integers(1, 200),
    st.integers(1, 300),
    st.lists(st.integers(0, 8), min_size=1, max_size=9),
    st.booleans(),
    st.tuples(st.booleans(), st.booleans()),
    st.sampled_from(BATCHES),
    st.integers(0, 2**16),
)
@many_examples
def test_matmul_matches_slow_decoder_for_any_shape(
    each_path: Callable[[], Iterator[str]],
    rows: int,
    columns: int,
    rates: list[int],
    rotated: bool,
    orders: tuple[bool, bool],
    batch: int,
    seed: int,
) -> None:
    assert_matches_reference(example(rows, columns, rates, rotated, orders, seed), batch, each_path(), seed)


@given(
    st.integers(1, 200),
    st.integers(1, 100),
    st.lists(st.integers(0, 8), min_size=1, max_size=9),
    st.booleans(),
    st.tuples(st.booleans(), st.booleans()),
    st.sampled_from([0, 1, 8, 9, 100]),
    st.integers(0, 2**16),
)
@many_examples
def test_rows_of_matches_slow_decoder(
    each_path: Callable[[], Iterator[str]],
    rows: int,
    columns: int,
    rates: list[int],
    rotated: bool,
    orders: tuple[bool, bool],
    count: int,
    seed: int,
) -> None:
    trellis = example(rows, columns, rates, rotated, orders, seed)
    ids = torch.randint(rows, (count, 2), generator=torch.Generator().manual_seed(seed))
    expected = form.dequantize(trellis)[ids]
    for path in each_path():
        found = kernels.rows_of(trellis, ids)
        assert found.shape == (count, 2, columns)
        if count:
            assert float((found - expected).abs().max()) <= 1e-6 * size_of(trellis), path


def test_matmul_with_wide_orders_matches_slow_decoder(each_path: Callable[[], Iterator[str]]) -> None:
    """Orders of more than 65536 rows or columns are stored in 32 bits."""
    assert_matches_reference(example(70_000, 20, [1, 0]), 1, each_path())
    trellis = example(20, 70_000, [1, 0])
    assert_matches_reference(trellis, 1, each_path())
    for _ in each_path():
        found = kernels.rows_of(trellis, torch.arange(20))
        torch.testing.assert_close(found, form.dequantize(trellis), rtol=1e-4, atol=1e-5)


def test_matmul_with_extreme_int8_values_is_exact(each_path: Callable[[], Iterator[str]]) -> None:
    """-128 has no opposite in a byte, and digits of float32 activations can be -128 as well."""
    codes = torch.full((64, 64), 128, dtype=torch.uint8)  # -128 in two's complement
    rates, zeros, ones = torch.full((1, 4), 8, dtype=torch.uint8), torch.zeros(64).byte(), torch.full((64,), 128).byte()
    trellis = form.build(rates, codes, 64, 64, False, 1.0, zeros, ones, ones)
    assert bool((form.dequantize(trellis) == -128 / 36).all())
    x = torch.cat([torch.ones(1, 64), -torch.ones(1, 64), torch.full((1, 64), -128.0 / (127 * 65793 - 8))])
    x[2, 0] = 1.0  # the other activations have the digits (-128, 0, 0), but for rounding
    for path in each_path():
        for activations in kernels.ACTIVATIONS:
            for rows in (x, x[:1], x[1:2], x[2:]):
                product, exact = kernels.matmul(rows, trellis, activations).double(), rows.double().sum(1) * (-128 / 36)
                tolerance = 3e-6 if activations == "float32" else 1e-3
                torch.testing.assert_close(
                    product, exact[:, None].expand(-1, 64), rtol=tolerance, atol=0, msg=f"{path} {activations}"
                )


@pytest.mark.parametrize("path", PATHS[:-1], indirect=True)  # torch chooses its own order of summation
@pytest.mark.parametrize("activations", kernels.ACTIVATIONS)
def test_trellis_matmul_is_bit_identical_in_any_batch(path: str, activations: str) -> None:
    trellis, x = example(100, 200, list(range(9))), torch.randn(70, 200)
    together = kernels.matmul(x, trellis, activations)
    assert torch.equal(together, torch.cat([kernels.matmul(row[None], trellis, activations) for row in x]))


@pytest.mark.parametrize("path", PATHS[:-1], indirect=True)
def test_trellis_matmul_with_torch_threads_is_bit_identical(path: str) -> None:
    trellis, x, ids = example(1040, 768, [2, 3, 4]), torch.randn(17, 768), torch.randint(1040, (300,))
    alone, rows = kernels.matmul(x, trellis), kernels.rows_of(trellis, ids)
    torch.set_num_threads(2)
    try:
        assert torch.equal(kernels.matmul(x, trellis), alone)
        assert torch.equal(kernels.rows_of(trellis, ids), rows)
    finally:
        torch.set_num_threads(1)


def test_trellis_matmul_from_many_threads_is_bit_identical(path: str) -> None:
    trellis, x = example(130, 256, [2, 3, 4]), torch.randn(9, 256)
    expected, products = kernels.matmul(x, copy.deepcopy(trellis)), [torch.empty(0)] * 30
    start = threading.Barrier(30)

    def call(number: int) -> None:
        start.wait()
        products[number] = kernels.matmul(x, trellis)

    threads = [threading.Thread(target=call, args=(number,)) for number in range(30)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(product, expected) for product in products)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_trellis_matmul_keeps_half_precision_dtype(path: str, dtype: torch.dtype) -> None:
    trellis, x = example(33, 70, [3]), torch.randn(2, 3, 70).to(dtype)
    bias = torch.randn(33).to(dtype)
    product = kernels.matmul(x, trellis, "float32", bias)
    exact = x.float() @ form.dequantize(trellis).T + bias.float()
    assert (product.dtype, product.shape) == (dtype, (2, 3, 33))
    assert float((product - exact).norm()) <= 1e-2 * float(exact.norm())


@pytest.mark.parametrize("shape", [(70,), (0, 70), (2, 0, 70)])
def test_trellis_matmul_of_vectors_and_empty_batches_keeps_shape(path: str, shape: tuple[int, ...]) -> None:
    trellis = example(33, 70, [3])
    assert kernels.matmul(torch.randn(shape), trellis).shape == (*shape[:-1], 33)
    assert kernels.rows_of(trellis, torch.zeros(0, dtype=torch.int64)).shape == (0, 70)


@pytest.mark.parametrize("activations", kernels.ACTIVATIONS)
@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_trellis_matmul_with_nonfinite_row_is_nonfinite(path: str, activations: str, value: float) -> None:
    trellis, x = example(16, 128, [3, 4]), torch.zeros(3, 128)
    x[1, 70] = value
    product = kernels.matmul(x, trellis, activations)
    assert not product[1].isfinite().any()
    assert not kernels.matmul(x[1], trellis, activations).isfinite().any()
    assert torch.equal(product[[0, 2]], torch.zeros(2, 16))


@pytest.mark.parametrize("size", [1e-44, 1e-20, 1e20])
def test_trellis_matmul_is_accurate_for_any_scale_of_activations(path: str, size: float) -> None:
    trellis, x = example(64, 128, [3]), torch.randn(3, 128) * size
    exact = x.double() @ form.dequantize(trellis).double().T
    error = float((kernels.matmul(x, trellis, "float32") - exact).norm())
    assert error <= 1e-6 * float(x.double().norm()) * size_of(trellis) + 1e-35


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda matrix: kernels.matmul(torch.zeros(1, 70), matrix, "int4"),
            "unknown activations 'int4': choose int8 or",
        ),
        (lambda matrix: kernels.matmul(torch.zeros(1, 71), matrix), "x has 71 columns and the packed matrix 70"),
        (
            lambda matrix: kernels.matmul(torch.zeros(1, 70, device="meta"), matrix),
            "x is on meta and the packed matrix",
        ),
    ],
)
def test_trellis_matmul_with_invalid_argument_raises(call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call(example(33, 70, [3]))


@pytest.mark.parametrize("row", [-1, 33])
def test_rows_of_trellis_with_missing_row_raises(path: str, row: int) -> None:
    with pytest.raises(IndexError, match=f"row {row} is asked for: the packed matrix has rows 0 … 32"):
        kernels.rows_of(example(33, 70, [3]), torch.tensor([5, row]))


@pytest.mark.parametrize("activations", kernels.ACTIVATIONS)
def test_trellis_matmul_operator_passes_torch_opcheck(activations: str) -> None:
    arguments = kernels.operator_arguments(example(33, 70, [0, 2, 3, 4, 8]))
    for x in (torch.randn(2, 70), torch.randn(2, 70, requires_grad=True)):
        bias = torch.randn(33, requires_grad=x.requires_grad)
        torch.library.opcheck(torch.ops.nashswarm.trellis_matmul.default, (x, bias, activations, *arguments))


def test_trellis_rows_operator_passes_torch_opcheck() -> None:
    arguments = kernels.operator_arguments(example(33, 70, [0, 2, 3, 4, 8]))
    torch.library.opcheck(torch.ops.nashswarm.trellis_rows.default, (torch.tensor([3, 32]), *arguments))


def test_trellis_matmul_gradients_of_x_and_bias_match_float_product(path: str) -> None:
    trellis = example(33, 70, [2, 3])
    x, bias = torch.randn(2, 3, 70, requires_grad=True), torch.randn(33, requires_grad=True)
    weight, output_weights = form.dequantize(trellis), torch.randn(2, 3, 33)
    (kernels.matmul(x, trellis, "int8", bias) * output_weights).sum().backward()
    torch.testing.assert_close(x.grad, output_weights @ weight, rtol=1e-5, atol=1e-3)
    torch.testing.assert_close(bias.grad, output_weights.sum((0, 1)))


class Layer(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.trellis = example(33, 70, [2, 3])

    def forward(self, x: Tensor) -> Tensor:
        return kernels.matmul(torch.relu(x), self.trellis) + kernels.rows_of(self.trellis, torch.tensor([1]))[:, :33]


@pytest.fixture
def without_shape_checks() -> Iterator[None]:
    """Compilers cannot trace the checks of shapes, which exist in tests only."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.mark.usefixtures("without_shape_checks")
def test_compiled_and_exported_modules_with_trellis_match_eager() -> None:
    layer, x = Layer(), torch.randn(4, 70)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    product, expected = compiled(x), layer(x)  # compiled before any eager call
    torch.testing.assert_close(product, expected)
    exported = torch.export.export(layer, (x,))
    assert any("nashswarm.trellis_matmul" in str(node.target) for node in exported.graph.nodes)
    torch.testing.assert_close(exported.module()(x), expected)


def test_copied_trellis_does_not_share_memory() -> None:
    trellis, x = example(33, 70, [2, 3]), torch.randn(4, 70)
    expected = kernels.matmul(x, trellis)
    others = [copy.deepcopy(trellis), pickle.loads(pickle.dumps(trellis))]
    trellis.payload.zero_()
    assert all(torch.equal(kernels.matmul(x, other), expected) for other in others)


def test_trellis_matmul_after_content_moved_reads_new_address(path: str) -> None:
    trellis, x = example(33, 70, [2, 3]), torch.randn(4, 70)
    expected = kernels.matmul(x, trellis)
    trellis.content.share_memory_()
    assert torch.equal(kernels.matmul(x, trellis), expected)


def test_trellis_matmul_at_any_address_is_bit_identical(path: str) -> None:
    """Files are mapped into memory, so that their arrays start anywhere."""
    trellis, x = example(70, 70, [2, 3, 8]), torch.randn(1, 70)
    expected = kernels.matmul(x, trellis)
    for offset in range(0, 64, 4):
        moved = torch.empty(len(trellis.content) + 64, dtype=torch.uint8)[offset : offset + len(trellis.content)]
        assert torch.equal(kernels.matmul(x, form.parse(moved.copy_(trellis.content))), expected)


@given(st.data())
@many_examples
def test_parse_of_damaged_bytes_raises_or_gives_a_matrix_that_can_be_read(
    each_path: Callable[[], Iterator[str]], data: st.DataObject
) -> None:
    """What is accepted is read by every path, under the sanitizers as well."""
    rows, columns, orders = data.draw(st.sampled_from([(33, 40, True), (70, 17, True), (64, 64, False)]))
    content = example(rows, columns, [0, 1, 3, 8], orders=(orders, orders)).content.clone()
    headers = form.side_bytes(rows, columns, orders, orders)
    for _ in range(data.draw(st.integers(0, 3))):
        place = data.draw(st.integers(0, headers - 1) | st.integers(0, 24) | st.integers(0, len(content) - 1))
        content[place] = data.draw(st.integers(0, 255))
    if data.draw(st.booleans()):
        content = content[: data.draw(st.integers(0, len(content)))].clone()
    try:
        trellis = form.parse(content)
    except ValueError:
        return
    for _ in each_path():
        for batch in (1, 3):
            assert kernels.matmul(torch.ones(batch, trellis.columns), trellis).shape == (batch, trellis.rows)
        ids = torch.arange(min(trellis.rows, 100))
        assert kernels.rows_of(trellis, ids).shape == (len(ids), trellis.columns)


def test_trellis_matmul_without_library_uses_torch(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    monkeypatch.setattr(native, "LIBRARY", tmp_path / "none.so")
    monkeypatch.delenv(native.VARIABLE, raising=False)
    native.library.cache_clear()
    native.path.cache_clear()
    try:
        trellis, x = example(33, 70, [3]), torch.randn(2, 70)
        assert torch.equal(kernels.matmul(x, trellis), trellis_reference.matmul(x, trellis, "int8"))
    finally:
        native.library.cache_clear()


def test_command_compares_trellis_with_plain_tiles(capsys: pytest.CaptureFixture[str]) -> None:
    command.main(["--shape", "96x128", "--bits", "3", "--trellis", "--rounds", "5"])
    (line,) = capsys.readouterr().out.splitlines()
    fields = json.loads(line)
    assert fields["ratio_to_plain_low"] <= fields["ratio_to_plain"] <= fields["ratio_to_plain_high"]
    assert fields["relative_error"] < 1e-2
    assert fields["microseconds"] > 0 < fields["microseconds_plain"]
    assert 3 < fields["bits_per_weight"] < 5


def test_library_takes_tables_of_every_size() -> None:
    sizes = {rate: table.size for rate, table in trellis_codes.tables().items()}
    assert max(sizes.values()) <= trellis_native.LARGEST_TABLE and set(sizes) == set(range(1, trellis_native.RATES))
    assert all(size == 1 << trellis_codes.MEMORY[rate] + rate for rate, size in sizes.items())
    assert all(int(np.abs(table.astype(int)).max()) < 128 for table in trellis_codes.tables().values())
