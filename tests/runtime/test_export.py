"""Compressed models in other runtimes: the same weights in every layout, the same logits, or no file."""

import copy
import json
import pathlib
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import nashswarm
from nashswarm.cli import main
from nashswarm.data import corpus, stdlib_docs
from nashswarm.models.matrices import find_layers
from nashswarm.models.sources import EMBEDDED, WEIGHTS, ModelSource, load
from nashswarm.packed import checkpoint
from nashswarm.packed.matrix import TileMatrix
from nashswarm.quant.grid import Scheme, quantize
from nashswarm.quant.lattice import LatticeTensor, make_lattice
from nashswarm.quant.pack import pack
from nashswarm.runtime import export, portable, qdq

Drawn = dict[str, Callable[..., Any]]
Packed = Callable[..., dict[str, np.ndarray]]


def at(model: Any, bits: int, group_size: int = 32, exclude: tuple[str, ...] = ()) -> Any:
    """A copy of a model with its matrices at one width."""
    small = copy.deepcopy(model)
    layers = find_layers(small, exclude)
    packed = {layer.name: pack(quantize(layer.weight, bits, Scheme(group_size))) for layer in layers}
    checkpoint.adopt(small, layers, packed)
    return small


def mixed(model: Any, packed: Packed, form: str) -> Any:
    small = copy.deepcopy(model)
    checkpoint.adopt(small, find_layers(small), packed(small, form))
    return small


@pytest.fixture
def model(tiny: Any) -> Any:
    """Of one block: tracing takes seconds."""
    torch.manual_seed(0)
    config = copy.deepcopy(tiny.config)
    config.n_layer = 1
    return type(tiny)(config).eval()


@pytest.fixture
def tokens(token_windows: Tensor) -> Tensor:
    return token_windows[:2].reshape(1, -1)


@pytest.fixture(scope="module")
def runtime() -> Any:
    pytest.importorskip("onnxscript", reason="not installed")
    pytest.importorskip("onnx", reason="not installed")
    return pytest.importorskip("onnxruntime", reason="not installed")


@pytest.mark.parametrize("bits", portable.NBITS_WIDTHS)
@pytest.mark.parametrize("columns", [64, 160])  # zero points of a row that fill no whole byte
def test_grouped_one_width_holds_same_matrix(bits: int, columns: int) -> None:
    matrix = TileMatrix(quantize(torch.randn(37, columns), bits, Scheme(32)), False)
    grouped = portable.for_onnx(matrix, "float32")
    assert isinstance(grouped, portable.Grouped)
    assert grouped.codes.shape == (37, columns // 32, 32 * bits // 8)
    assert torch.equal(grouped.rows(torch.arange(37)), matrix.dequantize())


@pytest.mark.parametrize("form", ["grid", "lattice"])
@pytest.mark.parametrize("shape", [(37, 128), (48, 64), (50, 192)])
def test_planes_hold_same_matrix_in_same_bytes(form: str, shape: tuple[int, int], drawn: Drawn) -> None:
    torch.manual_seed(0)
    matrix = TileMatrix(drawn[form](torch.randn(shape)), False)
    weight = portable.for_onnx(matrix, "float32")
    assert isinstance(weight, portable.Planes)
    whole, x, ids = matrix.dequantize(), torch.randn(3, 2, shape[1]), torch.tensor([[3, 0], [shape[0] - 1, 3]])
    torch.testing.assert_close(weight.rows(ids), whole[ids])
    torch.testing.assert_close(weight.product(x), x @ whole.T, rtol=1e-5, atol=1e-5 * float((x @ whole.T).abs().max()))
    planes = sum(part.nbytes for name, part in weight.named_buffers() if name.startswith("planes"))
    assert planes == matrix.tiles.payload.nbytes


def test_for_onnx_odd_width_uses_planes(drawn: Drawn) -> None:
    three = TileMatrix(quantize(torch.randn(16, 64), 3, Scheme(32)), False)
    assert isinstance(portable.for_onnx(three, "float32"), portable.Planes)
    pruned = TileMatrix(quantize(torch.randn(16, 64), 0, Scheme(32)), False)
    assert not portable.for_onnx(pruned, "float32").rows(torch.arange(16)).any()


def test_product_with_matmulnbits_matches_floats(runtime: Any) -> None:
    """A product alone, at every width, against the dequantized matrix."""
    for bits in portable.NBITS_WIDTHS:
        matrix = TileMatrix(quantize(torch.randn(24, 96), bits, Scheme(32)), False)
        product = portable.Product(portable.for_onnx(matrix, "float32"), torch.randn(24)).eval()
        program = torch.onnx.export(product, (torch.zeros(2, 96),), verbose=False)
        assert program is not None and "MatMulNBits" in {node.op_type for node in program.model.graph}
        x = torch.randn(2, 96)
        session = runtime.InferenceSession(program.model_proto.SerializeToString())
        (y,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
        expected = x @ matrix.dequantize().T + product.bias
        torch.testing.assert_close(torch.from_numpy(y), expected, rtol=1e-4, atol=1e-4)


def lattice_up_to(weight: Tensor, limit: int) -> LatticeTensor:
    """A matrix of codes up to a limit, reached in every column, and one beyond it."""
    lattice = make_lattice(weight, 0.5, torch.ones(len(weight)), torch.rand(weight.shape[1]) + 0.5)
    codes = (weight / (lattice.row_steps()[:, None] * lattice.column_steps())).round().clamp(-limit, limit).int()
    codes[0], codes[1, 5] = limit, 8 * limit
    return LatticeTensor(codes, lattice.fit_sizes(codes.abs().float()))


def of_form(form: str, shape: tuple[int, int], drawn: Drawn) -> TileMatrix:
    torch.manual_seed(0)
    weight = torch.randn(shape)
    if form.startswith("uniform"):
        return TileMatrix(quantize(weight, int(form[-1]), Scheme(32)), False)
    limits = {"narrow": 7, "wide": 127}
    return TileMatrix(lattice_up_to(weight, limits[form]) if form in limits else drawn[form](weight), False)


def matrix_of(digits: qdq.Digits) -> Tensor:
    """What DequantizeLinear and the operators after it make of the digits, one weight at a time, in float64."""
    rows, columns = digits.digits0.shape
    whole = np.zeros((rows, columns))
    for row in range(rows):
        for column in range(columns):
            group = column * digits.scale.shape[1] // columns
            code = float(digits.offset[row, group]) if hasattr(digits, "offset") else 0.0
            for number in range(digits.count):
                places = [place for place, of in enumerate(getattr(digits, f"chosen{number}").tolist()) if of == column]
                digit = sum(float(getattr(digits, f"digits{number}")[row, place]) for place in places)
                code += digit * 2.0 ** (digits.bits * number)
            side = float(digits.column_scale[column]) if hasattr(digits, "column_scale") else 1.0
            whole[row, column] = float(digits.scale[row, group]) * side * code
    return torch.from_numpy(whole)


FORMS = [("grid", (37, 128)), ("lattice", (20, 64)), ("narrow", (5, 96)), ("wide", (5, 128)), ("uniform3", (16, 96))]


@pytest.mark.parametrize(
    "form, shape", [*FORMS, ("uniform4", (16, 96)), ("uniform8", (16, 96)), ("uniform0", (16, 32))]
)
def test_digits_reproduce_codes(form: str, shape: tuple[int, int], drawn: Drawn) -> None:
    matrix = of_form(form, shape, drawn)
    digits = qdq.Digits(matrix, "float32")
    torch.testing.assert_close(matrix_of(digits).float(), matrix.dequantize())
    assert digits.bits == (8 if form in ("wide", "lattice") else 4) and (digits.scale > 0).all()
    parts = [getattr(digits, f"digits{number}") for number in range(digits.count)]
    assert all(-(1 << digits.bits - 1) <= int(part.min()) <= int(part.max()) < 1 << digits.bits - 1 for part in parts)
    columns = [part.shape[1] for part in parts]
    if form in ("narrow", "wide"):
        assert columns == [shape[1], 64 if form == "narrow" else 1]  # INT4 stands in whole blocks
    if form.startswith("uniform"):
        assert columns == [shape[1]] * (2 if form == "uniform8" else 1)
        assert hasattr(digits, "offset") == (form in ("uniform4", "uniform8"))


class Both(torch.nn.Module):
    """A product and the rows of one matrix."""

    def __init__(self, weight: Any) -> None:
        super().__init__()
        self.weight = weight

    def forward(self, x: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
        return self.weight.product(x), self.weight.rows(ids)


@pytest.mark.parametrize("form, shape", FORMS)
def test_digits_in_onnxruntime_match_floats(
    form: str, shape: tuple[int, int], drawn: Drawn, runtime: Any, tmp_path: pathlib.Path
) -> None:
    matrix = of_form(form, shape, drawn)
    both = Both(qdq.Digits(matrix, "float32")).eval()
    x, ids = torch.randn(3, shape[1]), torch.tensor([[3, 0], [shape[0] - 1, 3]])
    program = torch.onnx.export(both, (x, ids), opset_version=qdq.OPSET, verbose=False, optimize=False)
    assert program is not None
    export._to_int4(program.model)
    program.save(tmp_path / "both.onnx", external_data=False)
    read(tmp_path / "both.onnx")
    session = runtime.InferenceSession(str(tmp_path / "both.onnx"))
    names = [node.name for node in session.get_inputs()]
    product, rows = session.run(None, dict(zip(names, (x.numpy(), ids.numpy()), strict=True)))
    whole = matrix.dequantize()
    largest = float((x @ whole.T).abs().max())
    torch.testing.assert_close(torch.from_numpy(product), x @ whole.T, rtol=1e-5, atol=1e-5 * largest)
    torch.testing.assert_close(torch.from_numpy(rows), whole[ids], rtol=1e-5, atol=1e-6)


def read(path: pathlib.Path) -> Any:
    import onnx

    onnx.checker.check_model(str(path))
    return onnx.load(path)


def test_export_onnx_uses_matmulnbits(model: Any, tokens: Tensor, tmp_path: pathlib.Path, runtime: Any) -> None:
    out = tmp_path / "model.onnx"
    metrics = export.export(at(model, 4), "onnx", out, tokens, "float32")
    assert metrics["parity"] < 1e-4 and metrics["bytes_file"] == out.stat().st_size
    written = read(out)
    products = [node for node in written.graph.node if node.op_type == "MatMulNBits"]
    assert len(products) == 4 + 1 and metrics["matrices_unpacked_when_run"] == 0
    assert metrics["matrices_matmulnbits"] == 4 + 2  # with the positions; the tied head's is the embedding's
    codes = {node.input[1] for node in products}
    stored = {part.name: part for part in written.graph.initializer}
    head = next(part for name, part in stored.items() if name in codes and part.dims[0] == 512)
    assert sum(list(part.dims) == list(head.dims) for part in stored.values()) == 1
    assert sum(len(part.raw_data) for part in stored.values()) < 0.8 * model.num_parameters()  # four bits and scales


def bytes_of(written: Any, *kinds: str) -> int:
    """Of the weights of these types in an ONNX file."""
    import onnx

    types = [onnx.TensorProto.DataType.Value(kind) for kind in kinds]
    return sum(len(part.raw_data) for part in written.graph.initializer if part.data_type in types)


def standard(written: Any) -> bool:
    """Whether no operator is onnxruntime's own, and no DequantizeLinear has a zero point, as TensorRT asks."""
    nodes = written.graph.node
    pairs = [node for node in nodes if node.op_type == "DequantizeLinear"]
    return bool(pairs) and all(not node.domain for node in nodes) and all(len(node.input) == 2 for node in pairs)


def test_export_onnx_qdq_stores_three_bits_in_int4(
    model: Any, tokens: Tensor, tmp_path: pathlib.Path, runtime: Any
) -> None:
    small, out = at(model, 3), tmp_path / "model.onnx"
    metrics = export.export(small, "onnx-qdq", out, tokens, "float32")
    assert metrics["parity"] < 1e-5 and metrics["matrices_int4"] == 4 + 2 and metrics["matrices_int8"] == 0
    written = read(out)
    assert standard(written)
    weights = sum(layer.weight.numel() for layer in find_layers(model))
    assert bytes_of(written, "INT4") == weights / 2 and not bytes_of(written, "INT8")
    small.save_pretrained(tmp_path / "packed")
    assert out.stat().st_size > (tmp_path / "packed" / WEIGHTS).stat().st_size


@pytest.mark.parametrize(
    "dtype, target",
    [("bfloat16", "onnx-qdq"), ("float16", "torch-export")]
    + [pytest.param(dtype, "onnx", marks=pytest.mark.slow) for dtype in ("float16", "bfloat16")]
    + [pytest.param("float16", "onnx-qdq", marks=pytest.mark.slow)]
    + [pytest.param("bfloat16", "torch-export", marks=pytest.mark.slow)],
)
def test_export_in_16_bits_stores_rounded_tensors(
    dtype: str, target: str, model: Any, tokens: Tensor, tmp_path: pathlib.Path, runtime: Any
) -> None:
    """The file holds the rounded numbers, a tied head's once, and computes with them in float32: what it loses is their
    rounding alone."""
    small, out = at(model, 4, exclude=("transformer.wte",)), tmp_path / f"model{export.TARGETS[target]}"
    generator = torch.Generator().manual_seed(0)
    for part in small.parameters():  # as after training: no two of them equal, none made of 16 bits
        part.data += 0.01 * torch.randn(part.shape, generator=generator)
    metrics = export.export(small, target, out, tokens, "float32", dtype)
    assert metrics["parity_rounded"] < 1e-5 < metrics["parity"] < {"float16": 2e-3, "bfloat16": 2e-2}[dtype]
    if target == "torch-export":
        assert {part.dtype for part in torch.export.load(out).parameters()} == {export.DTYPES[dtype]}
    else:
        names = {f"model.{name}" for name, _ in small.named_parameters(remove_duplicate=False)}
        stored = [part for part in read(out).graph.initializer if part.name in names]
        assert sum(len(part.raw_data) for part in stored) == 2 * sum(part.numel() for part in small.parameters())


@pytest.mark.slow
def test_export_onnx_qdq_of_default_model_is_between_sizes(tmp_path: pathlib.Path, runtime: Any) -> None:
    """Its own 3 bits per parameter on real text.  The file is larger than the checkpoint, which is coded, and smaller
    than the model at 16 bits."""
    loaded = load(ModelSource(), "cpu", torch.float32)
    small, _ = nashswarm.compress(loaded.model, tokenizer=loaded.tokenizer, bits=3.0)
    text = corpus.StdlibDocs().text("test")
    tokens = corpus.cut_windows(text, loaded.tokenizer, export.PROMPT + export.DECODED, "test")[:1]
    out = tmp_path / "model.onnx"
    metrics = export.export(small, "onnx-qdq", out, tokens, "float32")
    assert metrics["parity"] < 1e-4 and metrics["matrices_int4"] + metrics["matrices_int8"] == 18
    written = read(out)
    assert standard(written)
    weights = sum(layer.weight.numel() for layer in find_layers(loaded.model))
    assert 4 < 8 * bytes_of(written, "INT4", "INT8") / weights < 8
    small.save_pretrained(tmp_path / "packed")
    packed, full = (folder / WEIGHTS for folder in (tmp_path / "packed", EMBEDDED))
    assert packed.stat().st_size < out.stat().st_size < full.stat().st_size


def test_export_onnx_qdq_in_tensorrt_matches_model(
    model: Any, tokens: Tensor, tmp_path: pathlib.Path, runtime: Any
) -> None:
    if "TensorrtExecutionProvider" not in runtime.get_available_providers():
        pytest.skip("this onnxruntime has no TensorRT")
    small, out = at(model, 4, 64), tmp_path / "model.onnx"
    export.export(small, "onnx-qdq", out, tokens, "float32")
    run = export.load_onnx(out, ["TensorrtExecutionProvider", "CUDAExecutionProvider", "CPUExecutionProvider"])
    assert export.compare_logits(small, run, tokens) < 1e-2  # products there may round to ten bits


@pytest.mark.slow
def test_export_onnx_of_lattice_serves_batches(
    random_model: Callable[[str], Any], packed: Packed, tokens: Tensor, tmp_path: pathlib.Path, runtime: Any
) -> None:
    small, out = mixed(random_model("llama_tied"), packed, "lattice"), tmp_path / "model.onnx"
    metrics = export.export(small, "onnx", out, tokens, "float32")
    assert metrics["parity"] < 1e-4 and metrics["matrices_matmulnbits"] == 0 < metrics["matrices_unpacked_when_run"]
    read(out)
    ids, empty = tokens.view(3, -1), [part.expand(3, -1, -1, -1).contiguous() for part in export.empty_cache(small)]
    logits, cache = export.load_onnx(out)(ids, empty)
    torch.testing.assert_close(logits, small(input_ids=ids).logits, rtol=1e-3, atol=1e-3)
    assert {part.shape[2] for part in cache} == {ids.shape[1]}


@pytest.mark.parametrize("activations", ["int8", pytest.param("float32", marks=pytest.mark.slow)])
@pytest.mark.parametrize("form", ["groups", "trellis"])
def test_export_torch_program_computes_on_tiles(
    form: str, activations: str, model: Any, packed: Packed, tokens: Tensor, tmp_path: pathlib.Path
) -> None:
    small, out = mixed(model, packed, form), tmp_path / "model.pt2"
    metrics = export.export(small, "torch-export", out, tokens, activations)
    assert metrics["parity"] < 1e-6
    program, operator = torch.export.load(out), "trellis_matmul" if form == "trellis" else "matmul"
    assert sum(f"nashswarm.{operator}.default" in str(node.target) for node in program.graph.nodes) == 4 + 1
    logits, _ = program.module()(tokens[:, :9], export.empty_cache(small))
    assert logits.shape == (1, 9, 512)


@pytest.mark.slow
def test_export_with_different_logits_leaves_no_file(
    model: Any, tokens: Tensor, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = at(model, 4)
    original = portable.for_torch

    def damaged(matrix: TileMatrix, activations: str) -> portable.Native:
        weight = original(matrix, activations)
        weight.scale = weight.scale * 1.01
        return weight

    monkeypatch.setattr(export, "for_torch", damaged)
    with pytest.raises(ValueError, match="logits differ by"):
        export.export(small, "torch-export", tmp_path / "model.pt2", tokens, "float32")
    assert not list(tmp_path.iterdir())


def test_check_exportable_unsupported_refused(
    random_model: Callable[[str], Any], model: Any, tmp_path: pathlib.Path
) -> None:
    with pytest.raises(ValueError, match="OPTForCausalLM cannot be exported: only language models of gpt2 and llama"):
        export.check_exportable(random_model("opt"), "torch-export", tmp_path / "model.pt2")
    with pytest.raises(ValueError, match=r"name a file that ends in \.pt2"):
        export.check_exportable(model, "torch-export", tmp_path / "model.onnx")
    (tmp_path / "model.pt2").touch()
    with pytest.raises(ValueError, match=r"model\.pt2 exists"):
        export.check_exportable(model, "torch-export", tmp_path / "model.pt2")
    with pytest.raises(ValueError, match="onnx-qdq leaves inputs of products as they are: take --to onnx for int8"):
        export.check_exportable(model, "onnx-qdq", tmp_path / "model.onnx", "int8")
    model.transformer.ln_f.weight.data[3] = 1e6
    with pytest.raises(ValueError, match=r"ln_f\.weight holds numbers that float16 cannot: take another"):
        export.export(model, "torch-export", tmp_path / "other.pt2", torch.zeros(1, 40).long(), "float32", "float16")
    model.config.rope_parameters = {"rope_type": "dynamic"}
    with pytest.raises(ValueError, match="rope_type=dynamic"):
        export.check_exportable(model, "torch-export", tmp_path / "other.pt2")


@pytest.mark.parametrize("target", ["onnx", "onnx-qdq"])
def test_export_onnx_of_trellis_refused(
    target: str, model: Any, packed: Packed, tokens: Tensor, tmp_path: pathlib.Path
) -> None:
    small, out = mixed(model, packed, "trellis"), tmp_path / "model.onnx"
    with pytest.raises(ValueError, match="no operator of ONNX reads trellis-coded matrices: compress with method=nash"):
        export.export(small, target, out, tokens, "float32")
    assert not list(tmp_path.iterdir())


def test_export_command_writes_file(
    model: Any, tokenizer: Any, text_file: pathlib.Path, tmp_path: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    text = text_file.read_text()
    monkeypatch.setattr(stdlib_docs, "text", lambda purpose: text)  # the embedded one takes seconds to read
    at(model, 4).save_pretrained(tmp_path / "made")
    tokenizer.save_pretrained(tmp_path / "made")
    out = tmp_path / "model.pt2"
    words = ["export", str(tmp_path / "made"), "--to", "torch-export", "--out", str(out), "--dtype", "float16"]
    assert main(words) == 0
    metrics = json.loads(capsys.readouterr().out)
    assert metrics["bytes_file"] == out.stat().st_size and metrics["parity"] < 1e-6
    assert main(words) == 2 and "exists" in capsys.readouterr().err
