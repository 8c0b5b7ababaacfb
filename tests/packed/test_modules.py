"""Packed matrices and the modules around them: round trips are exact, and products match those of the floats."""

import copy
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as some
from torch import Tensor, nn
from transformers.models.opt.modeling_opt import OPTLearnedPositionalEmbedding
from transformers.pytorch_utils import Conv1D

from nashswarm.kernels import tiles as layout
from nashswarm.kernels import trellis
from nashswarm.kernels.trellis import Trellis
from nashswarm.packed.matrix import PackedMatrix, TileMatrix, TrellisMatrix, as_held
from nashswarm.packed.modules import (
    QuantizedEmbedding,
    QuantizedLinear,
    dequantized,
    quantized,
    set_activations,
)
from nashswarm.quant.entropy import decode_groups, decode_lattice
from nashswarm.quant.grid import GRID_WIDTHS, QuantizedTensor, Scheme, quantize, row_blocks
from nashswarm.quant.pack import unpack
from tests.packed.lattices import heavy_tailed, on_lattice
from tests.quant.laplace import LAPLACE

Drawn = dict[str, Callable[..., Any]]
few = settings(max_examples=30, deadline=None)


def fields_of(tensor: Any) -> dict[str, Any]:
    """The fields of a quantized tensor, those of its lattice among them."""
    fields = dict(vars(tensor))
    lattice = fields.pop("lattice", None)
    return fields | (vars(lattice) if lattice is not None else {})


def assert_same(decoded: Any, tensor: Any) -> None:
    """Equal in every field, also in dtype."""
    assert type(decoded) is type(tensor)
    decoded_fields = fields_of(decoded)
    for name, field in fields_of(tensor).items():
        if isinstance(field, Tensor):
            assert decoded_fields[name].dtype == field.dtype and torch.equal(decoded_fields[name], field), name
        else:
            assert decoded_fields[name] == field, name


@few
@given(some.integers(1, 70), some.integers(1, 150), some.sampled_from([0.0, 0.3, 2.0, 50.0, 1e6]), some.integers(0, 9))
def test_packed_matrix_of_lattice_round_trips(rows: int, columns: int, spread: float, seed: int) -> None:
    tensor = on_lattice(heavy_tailed(rows, columns, spread, seed), seed)
    matrix = TileMatrix(tensor, True, LAPLACE)
    assert_same(matrix.tensor(), tensor)
    assert torch.equal(matrix.dequantize(), tensor.dequantize())
    assert_same(decode_lattice(matrix.encode(), LAPLACE), tensor)


@some.composite
def grids(draw: some.DrawFn) -> QuantizedTensor:
    """Every mixture of widths, ragged rows."""
    rows, groups, size = draw(some.integers(1, 50)), draw(some.integers(1, 4)), draw(some.sampled_from([32, 64, 96]))
    count = row_blocks(rows) * groups
    widths = draw(some.lists(some.sampled_from((0, *GRID_WIDTHS)), min_size=count, max_size=count))
    weight = torch.randn(rows, groups * size, generator=torch.Generator().manual_seed(draw(some.integers(0, 99))))
    return quantize(weight, torch.tensor(widths).view(-1, groups), Scheme(size, symmetric=draw(some.booleans())))


@few
@given(grids(), some.booleans())
def test_packed_matrix_of_groups_round_trips(tensor: QuantizedTensor, coded: bool) -> None:
    matrix = TileMatrix(tensor, coded)
    assert_same(matrix.tensor(), tensor)
    assert torch.equal(matrix.dequantize(), tensor.dequantize())
    assert_same((decode_groups if coded else unpack)(matrix.encode()), tensor)


@pytest.fixture(params=["grid", "lattice", "trellis"])
def tensor(request: pytest.FixtureRequest, drawn: Drawn) -> Any:
    """40 × 64 weights, the lattice's with escapes."""
    return drawn[request.param](torch.randn(40, 64, generator=torch.Generator().manual_seed(3)))


@pytest.fixture
def weight(tensor: Any) -> Tensor:
    """The same as floats."""
    return trellis.dequantize(tensor) if isinstance(tensor, Trellis) else tensor.dequantize()


@pytest.fixture
def matrix(tensor: Any) -> PackedMatrix:
    held = as_held(tensor, not isinstance(tensor, Trellis), LAPLACE)
    assert isinstance(held, PackedMatrix)
    return held


def layer_of(matrix: PackedMatrix, bias: bool = True) -> QuantizedLinear:
    layer = quantized(nn.Linear(*reversed(matrix.shape), bias=bias), matrix, torch.float32)
    assert isinstance(layer, QuantizedLinear)
    layer.activations = "float32"
    return layer


def equal_rows(matrix: PackedMatrix, found: Tensor, expected: Tensor) -> bool:
    """Whether looked up rows are those of the floats: to the bit, or to a rounding if a kernel rotates them back."""
    if isinstance(matrix, TileMatrix):
        return torch.equal(found, expected)
    step = max(torch.finfo(found.dtype).eps, 1e-6)
    assert found.dtype == expected.dtype and found.shape == expected.shape
    return bool((found - expected).abs().max() <= step * expected.abs().max())


@pytest.mark.parametrize("bias", [True, False])
def test_quantized_linear_matches_float_product(weight: Tensor, matrix: PackedMatrix, bias: bool) -> None:
    layer, x = layer_of(matrix, bias), torch.randn(2, 5, 64)
    assert torch.equal(layer.weight, weight) and layer.weight.shape == (40, 64)
    assert (layer.in_features, layer.out_features, layer.bias is not None) == (64, 40, bias)
    expected = nn.functional.linear(x.double(), weight.double(), layer.bias.double() if bias else None)
    scale = expected.abs().max()
    assert (layer(x) - expected).abs().max() <= 1e-6 * scale
    layer.activations = "int8"
    assert 0 < (layer(x) - expected).abs().max() <= 0.02 * scale


def test_quantized_linear_holds_no_float_matrix(matrix: PackedMatrix) -> None:
    layer = layer_of(matrix)
    assert [name for name, _ in layer.named_parameters()] == ["bias"] and isinstance(layer, nn.Linear)
    sizes = {name: part.numel() for name, part in layer.named_buffers() if part.dtype == torch.float32}
    assert max(sizes.values(), default=0) <= 64  # scales of rows and columns
    assert "40x64" in repr(layer) and "bits" in repr(layer)


def test_quantized_conv1d_becomes_linear_and_round_trips(weight: Tensor, matrix: PackedMatrix) -> None:
    before, x = Conv1D(40, 64), torch.randn(3, 64)
    with torch.no_grad():
        before.weight.copy_(weight.T)
        before.bias.normal_()
    layer = quantized(before, matrix, torch.float32)
    assert isinstance(layer, QuantizedLinear) and layer.bias is before.bias
    layer.activations = "float32"
    torch.testing.assert_close(layer(x), before(x))
    after = dequantized(layer, nn.Parameter(matrix.dequantize()))
    assert type(after) is Conv1D and torch.equal(after(x), before(x))
    assert {name: part.shape for name, part in after.state_dict().items()} == {"weight": (64, 40), "bias": (40,)}


def test_dequantized_returns_original_module_type(matrix: PackedMatrix) -> None:
    for before in (nn.Linear(64, 40), nn.Embedding(40, 64, padding_idx=3), OPTLearnedPositionalEmbedding(38, 64)):
        names = set(before.state_dict())
        packed = quantized(before, matrix, torch.float32)
        after = dequantized(packed, nn.Parameter(matrix.dequantize()))
        assert type(after) is type(before) and set(after.state_dict()) == names == set(before.state_dict())
        assert torch.equal(after.weight, matrix.dequantize()) and not torch.equal(before.weight, after.weight)
        assert vars(after).keys() == vars(before).keys() and packed.matrix is matrix


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_quantized_embedding_returns_rows(weight: Tensor, matrix: PackedMatrix, dtype: torch.dtype) -> None:
    layer = quantized(nn.Embedding(40, 64, padding_idx=1), matrix, dtype)
    ids = torch.randint(40, (2, 3, 4))
    assert isinstance(layer, QuantizedEmbedding) and not list(layer.parameters())
    assert layer(ids).dtype == dtype and equal_rows(matrix, layer(ids), weight[ids].to(dtype))
    assert (layer.num_embeddings, layer.embedding_dim, layer.padding_idx) == (40, 64, 1)
    with pytest.raises((IndexError, RuntimeError, ValueError)):
        layer(torch.tensor([40]))


def test_quantized_derived_embedding_keeps_its_forward(weight: Tensor, matrix: PackedMatrix) -> None:
    """OPT's positions begin at an offset of 2."""
    before = OPTLearnedPositionalEmbedding(38, 64)
    with torch.no_grad():
        before.weight.copy_(weight)
    layer = quantized(before, matrix, torch.float32)
    assert isinstance(layer, QuantizedEmbedding) and isinstance(layer, OPTLearnedPositionalEmbedding)
    positions = torch.arange(5)[None]
    arguments = {"attention_mask": torch.ones(1, 5, dtype=torch.long), "position_ids": positions}
    assert equal_rows(matrix, layer(**arguments), before(**arguments))
    assert equal_rows(matrix, layer(**arguments)[0], weight[2:7])


def test_quantized_tied_head_shares_matrix(matrix: PackedMatrix) -> None:
    model = nn.ModuleDict({"embedding": nn.Embedding(40, 64), "head": nn.Linear(64, 40)})
    for name in ("embedding", "head"):
        model[name] = quantized(model[name], matrix, torch.float32)
    assert len({part.data_ptr() for part in model.buffers() if part.numel()}) == sum(
        part.numel() > 0 for part in matrix.buffers()
    )
    other = copy.deepcopy(model)
    assert other["embedding"].matrix is other["head"].matrix is not matrix


def test_weight_changed_in_place_refused(matrix: PackedMatrix) -> None:
    layer, table = layer_of(matrix), quantized(nn.Embedding(40, 64), matrix, torch.float32)
    for module in (layer, table):
        with pytest.raises(RuntimeError, match=r"(?i)inference tensor"):
            module.weight.add_(1)
        with pytest.raises(RuntimeError, match="packed weights cannot be changed"):  # as adapters do it
            module.weight.data += 1
        assert type(module.weight * 2) is Tensor and type(module.weight.clone()) is Tensor
        with pytest.raises((AttributeError, KeyError)):
            module.weight = nn.Parameter(torch.zeros(40, 64))
        assert torch.equal(module.weight, matrix.dequantize())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_module_to_other_dtype_keeps_packed_buffers(matrix: PackedMatrix, dtype: torch.dtype) -> None:
    model = nn.Sequential(quantized(nn.Embedding(40, 64), matrix, torch.float32), layer_of(matrix))
    before = {name: (part.dtype, part.clone()) for name, part in matrix.named_buffers()}
    model.to(dtype)
    for name, part in matrix.named_buffers():
        assert part.dtype == before[name][0] and torch.equal(part, before[name][1]), name
    ids = torch.arange(40)
    assert model[1].bias.dtype == dtype
    assert model[0](ids).dtype == dtype and model(ids).dtype == dtype
    assert equal_rows(matrix, model.float()[0](ids), matrix.dequantize())


def test_module_to_half_and_meta_works(matrix: PackedMatrix) -> None:
    layer = layer_of(matrix).half()
    assert layer(torch.randn(2, 64).half()).dtype == torch.float16 and layer.weight.dtype == torch.float32
    elsewhere = copy.deepcopy(layer).to("meta")
    assert all(part.is_meta for part in elsewhere.buffers()) and not any(part.is_meta for part in layer.buffers())


def test_deepcopy_shares_no_buffers(matrix: PackedMatrix) -> None:
    layer, x = layer_of(matrix), torch.randn(3, 64)
    before = layer(x)  # the tiles are made now
    other = copy.deepcopy(layer)
    assert torch.equal(other(x), before)
    pointers = {part.data_ptr() for part in matrix.buffers() if part.numel()}
    assert not pointers & {part.data_ptr() for part in other.matrix.buffers()}
    for held in (other.matrix, layer.matrix):  # kernels read the buffers
        largest = max(held.buffers(), key=len)
        assert held.tiles.payload.untyped_storage().data_ptr() == largest.untyped_storage().data_ptr()
    other.matrix.tiles.payload.zero_()
    assert torch.equal(layer(x), before) and not torch.equal(other(x), before)


def test_pickled_layer_computes_same_and_holds_bytes_once(matrix: PackedMatrix) -> None:
    layer, x = layer_of(matrix), torch.randn(3, 64)
    before = layer(x)
    content = pickle.dumps(layer)
    again = pickle.loads(content)
    assert torch.equal(again(x), before) and np.array_equal(again.matrix.encode(), matrix.encode())
    largest = max(again.matrix.buffers(), key=len)
    assert again.matrix.tiles.payload.untyped_storage().data_ptr() == largest.untyped_storage().data_ptr()
    if isinstance(matrix, TrellisMatrix):
        assert len(content) < len(matrix.content) + 8000


def test_set_activations_changes_every_layer(matrix: PackedMatrix) -> None:
    model = nn.Sequential(layer_of(matrix), nn.ReLU(), quantized(Conv1D(40, 64), matrix, torch.float32))
    set_activations(model, "int8")
    assert [model[number].activations for number in (0, 2)] == ["int8", "int8"]
    set_activations(model, "float32")
    assert [model[number].activations for number in (0, 2)] == ["float32", "float32"]
    with pytest.raises(ValueError, match="unknown activations 'int4': choose int8, float32"):
        set_activations.__wrapped__(model, "int4")  # past the type checker of the tests


@pytest.mark.parametrize("shape", [(64,), (3, 64), (2, 5, 64)])
def test_quantized_linear_gradients_match_floats(weight: Tensor, matrix: PackedMatrix, shape: tuple[int, ...]) -> None:
    layer, x = layer_of(matrix), torch.randn(shape, requires_grad=True)
    weigh = torch.randn(*shape[:-1], 40)
    (layer(x) * weigh).sum().backward()
    packed_gradients = x.grad, layer.bias.grad
    y = x.detach().clone().requires_grad_()
    bias = layer.bias.detach().clone().requires_grad_()
    (nn.functional.linear(y, weight, bias) * weigh).sum().backward()
    for gradient, expected in zip(packed_gradients, (y.grad, bias.grad), strict=True):
        assert (gradient - expected).abs().max() <= 1e-5 * expected.abs().max()
    assert not any(part.requires_grad for part in matrix.buffers())


def test_nbytes_counts_all_buffers(matrix: PackedMatrix) -> None:
    """What the model says of its memory is what its tiles take."""
    buffers = sum(part.nbytes for part in matrix.buffers())
    assert matrix.nbytes == buffers + matrix.weight_bytes and buffers > matrix.tiles.payload.nbytes
    if isinstance(matrix, TrellisMatrix):
        assert buffers == matrix.tiles.nbytes == len(matrix.encode()) and matrix.weight_bytes == 8 * 2
        return
    assert matrix.tiles.nbytes == matrix.nbytes
    assert layout.payload_starts(matrix.tiles.widths, matrix.group_size)[-1] == len(matrix.tiles.payload)
