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

from nashswarm import checkpoint, stdlib_docs
from nashswarm.cli import main
from nashswarm.linear import PackedMatrix
from nashswarm.models import find_layers
from nashswarm.quant.grid import Scheme, quantize
from nashswarm.quant.pack import pack
from nashswarm.runtime import export, portable

Drawn = dict[str, Callable[..., Any]]
Packed = Callable[..., dict[str, np.ndarray]]


def at(model: Any, bits: int, group_size: int = 32) -> Any:
    """A copy of a model with all of its matrices at one width."""
    own = copy.deepcopy(model)
    layers = find_layers(own)
    found = {layer.name: pack(quantize(layer.weight, bits, Scheme(group_size))) for layer in layers}
    checkpoint.adopt(own, layers, found)
    return own


def mixed(model: Any, packed: Packed, form: str) -> Any:
    own = copy.deepcopy(model)
    checkpoint.adopt(own, find_layers(own), packed(own, form))
    return own


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
def test_groups_of_one_width_hold_the_same_matrix(bits: int, columns: int) -> None:
    matrix = PackedMatrix(quantize(torch.randn(37, columns), bits, Scheme(32)), False)
    found = portable.for_onnx(matrix, "float32")
    assert isinstance(found, portable.Grouped)
    assert found.codes.shape == (37, columns // 32, 32 * bits // 8)
    assert torch.equal(found.rows(torch.arange(37)), matrix.dequantize())


@pytest.mark.parametrize("form", ["grid", "lattice"])
@pytest.mark.parametrize("shape", [(37, 128), (48, 64), (50, 192)])
def test_planes_hold_the_same_matrix_in_no_more_bytes(form: str, shape: tuple[int, int], drawn: Drawn) -> None:
    torch.manual_seed(0)
    matrix = PackedMatrix(drawn[form](torch.randn(shape)), False)
    found = portable.for_onnx(matrix, "float32")
    assert isinstance(found, portable.Planes)
    whole, x, ids = matrix.dequantize(), torch.randn(3, 2, shape[1]), torch.tensor([[3, 0], [shape[0] - 1, 3]])
    torch.testing.assert_close(found.rows(ids), whole[ids])
    torch.testing.assert_close(found.product(x), x @ whole.T, rtol=1e-5, atol=1e-5 * float((x @ whole.T).abs().max()))
    planes = sum(part.nbytes for name, part in found.named_buffers() if name.startswith("planes"))
    assert planes == matrix.tiles.payload.nbytes


def test_a_matrix_of_one_odd_width_is_unpacked(drawn: Drawn) -> None:
    three = PackedMatrix(quantize(torch.randn(16, 64), 3, Scheme(32)), False)
    assert isinstance(portable.for_onnx(three, "float32"), portable.Planes)
    pruned = PackedMatrix(quantize(torch.randn(16, 64), 0, Scheme(32)), False)
    assert not portable.for_onnx(pruned, "float32").rows(torch.arange(16)).any()


def test_matmulnbits_gets_what_it_reads(runtime: Any) -> None:
    """A product alone, at every width, against the dequantized matrix."""
    for bits in portable.NBITS_WIDTHS:
        matrix = PackedMatrix(quantize(torch.randn(24, 96), bits, Scheme(32)), False)
        product = portable.Product(portable.for_onnx(matrix, "float32"), torch.randn(24)).eval()
        program = torch.onnx.export(product, (torch.zeros(2, 96),), verbose=False)
        assert program is not None and "MatMulNBits" in {node.op_type for node in program.model.graph}
        x = torch.randn(2, 96)
        session = runtime.InferenceSession(program.model_proto.SerializeToString())
        (found,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
        expected = x @ matrix.dequantize().T + product.bias
        torch.testing.assert_close(torch.from_numpy(found), expected, rtol=1e-4, atol=1e-4)


def read(path: pathlib.Path) -> Any:
    import onnx

    onnx.checker.check_model(str(path))
    return onnx.load(path)


def test_onnx_with_matmulnbits(model: Any, tokens: Tensor, tmp_path: pathlib.Path, runtime: Any) -> None:
    out = tmp_path / "model.onnx"
    found = export.export(at(model, 4), "onnx", out, tokens, "float32")
    assert found["parity"] < 1e-4 and found["bytes_file"] == out.stat().st_size
    written = read(out)
    products = [node for node in written.graph.node if node.op_type == "MatMulNBits"]
    assert len(products) == 4 + 1 and found["matrices_unpacked_when_run"] == 0
    assert found["matrices_matmulnbits"] == 4 + 2  # with the positions; the tied head's is the embedding's
    codes = {node.input[1] for node in products}
    stored = {part.name: part for part in written.graph.initializer}
    head = next(part for name, part in stored.items() if name in codes and part.dims[0] == 512)
    assert sum(list(part.dims) == list(head.dims) for part in stored.values()) == 1
    assert sum(len(part.raw_data) for part in stored.values()) < 0.8 * model.num_parameters()  # four bits and scales


@pytest.mark.slow
def test_onnx_of_any_widths_serves_batches(
    random_model: Callable[[str], Any], packed: Packed, tokens: Tensor, tmp_path: pathlib.Path, runtime: Any
) -> None:
    own, out = mixed(random_model("llama_tied"), packed, "lattice"), tmp_path / "model.onnx"
    found = export.export(own, "onnx", out, tokens, "float32")
    assert found["parity"] < 1e-4 and found["matrices_matmulnbits"] == 0 < found["matrices_unpacked_when_run"]
    read(out)
    ids, empty = tokens.view(3, -1), [part.expand(3, -1, -1, -1).contiguous() for part in export._empty(own)]
    logits, cache = export.onnx_run(out)(ids, empty)
    torch.testing.assert_close(logits, own(input_ids=ids).logits, rtol=1e-3, atol=1e-3)
    assert {part.shape[2] for part in cache} == {ids.shape[1]}


@pytest.mark.parametrize("activations", ["int8", pytest.param("float32", marks=pytest.mark.slow)])
def test_a_program_of_torch_computes_on_tiles(
    activations: str, model: Any, packed: Packed, tokens: Tensor, tmp_path: pathlib.Path
) -> None:
    own, out = mixed(model, packed, "groups"), tmp_path / "model.pt2"
    found = export.export(own, "torch-export", out, tokens, activations)
    assert found["parity"] < 1e-6
    program = torch.export.load(out)
    assert sum("nashswarm.matmul" in str(node.target) for node in program.graph.nodes) == 4 + 1
    logits, _ = program.module()(tokens[:, :9], export._empty(own))
    assert logits.shape == (1, 9, 512)


@pytest.mark.slow
def test_what_answers_differently_is_not_left_behind(
    model: Any, tokens: Tensor, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = at(model, 4)
    whole = portable.for_torch

    def damaged(matrix: PackedMatrix, activations: str) -> portable.Native:
        found = whole(matrix, activations)
        found.scale = found.scale * 1.01
        return found

    monkeypatch.setattr(export, "for_torch", damaged)
    with pytest.raises(ValueError, match="logits differ by"):
        export.export(own, "torch-export", tmp_path / "model.pt2", tokens, "float32")
    assert not list(tmp_path.iterdir())


def test_what_cannot_be_exported(random_model: Callable[[str], Any], model: Any, tmp_path: pathlib.Path) -> None:
    with pytest.raises(ValueError, match="OPTForCausalLM cannot be exported: only language models of gpt2 and llama"):
        export.check(random_model("opt"), "torch-export", tmp_path / "model.pt2")
    with pytest.raises(ValueError, match=r"name a file that ends in \.pt2"):
        export.check(model, "torch-export", tmp_path / "model.onnx")
    (tmp_path / "model.pt2").touch()
    with pytest.raises(ValueError, match=r"model\.pt2 exists"):
        export.check(model, "torch-export", tmp_path / "model.pt2")
    model.config.rope_parameters = {"rope_type": "dynamic"}
    with pytest.raises(ValueError, match="rope_type=dynamic"):
        export.check(model, "torch-export", tmp_path / "other.pt2")


def test_the_command(
    model: Any, tokenizer: Any, text_file: pathlib.Path, tmp_path: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    text = text_file.read_text()
    monkeypatch.setattr(stdlib_docs, "text", lambda purpose: text)  # the embedded one takes seconds to read
    at(model, 4).save_pretrained(tmp_path / "made")
    tokenizer.save_pretrained(tmp_path / "made")
    out = tmp_path / "model.pt2"
    words = ["export", str(tmp_path / "made"), "--to", "torch-export", "--out", str(out)]
    assert main(words) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["bytes_file"] == out.stat().st_size and found["parity"] < 1e-6
    assert main(words) == 2 and "exists" in capsys.readouterr().err
