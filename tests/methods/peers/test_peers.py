"""Packed bytes of other libraries, decoded here by their documented layouts without their code."""

import contextlib
import copy
import importlib.metadata
import logging
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from nashswarm.calibration.cache import Cache
from nashswarm.calibration.context import CalibrationContext
from nashswarm.calibration.session import CalibrationSession
from nashswarm.errors import Unsupported
from nashswarm.methods.method import Method
from nashswarm.methods.peers import auto_round
from nashswarm.methods.peers.peer import LIBRARIES, Peer
from nashswarm.models import matrices
from nashswarm.quant.pack import unpack

ROWS, COLUMNS, GROUP = 48, 256, 64
WEIGHTS = ROWS * COLUMNS
GROUPS = WEIGHTS // GROUP
NF4 = (
    -1.0, -0.6961928, -0.52507305, -0.3949175, -0.28444138, -0.18477343, -0.09105004, 0.0,
    0.0795803, 0.1609302, 0.2461123, 0.33791524, 0.44070983, 0.562617, 0.72295684, 1.0,
)  # fmt: skip
BYTES = {  # (library, bits, group size) → codes + scales + zero points, by hand
    ("hqq", 2, 64): WEIGHTS // 4 + 4 * GROUPS,
    ("hqq", 3, 64): 4 * 20 * GROUP + 4 * GROUPS,  # ten rows of 64 codes in one of 32-bit words: 192 rows, 20 words
    ("hqq", 4, 64): WEIGHTS // 2 + 4 * GROUPS,
    ("hqq", 8, 64): WEIGHTS + 4 * GROUPS,
    ("bitsandbytes", 4, 64): WEIGHTS // 2 + GROUPS + 4 * 1 + 4,  # a byte a scale, one scale for 256 of them, their mean
    ("bitsandbytes", 8, None): WEIGHTS + 4 * ROWS,
    ("quanto", 2, 64): WEIGHTS // 4 + 4 * GROUPS,
    ("quanto", 4, 64): WEIGHTS // 2 + 4 * GROUPS,
    ("quanto", 8, None): WEIGHTS + 2 * ROWS,
    ("torchao", 2, 64): WEIGHTS + 3 * GROUPS,  # a byte a weight
    ("torchao", 4, 64): WEIGHTS // 2 + 4 * GROUPS,
    ("onnxruntime", 2, 64): WEIGHTS // 4 + 2 * GROUPS,
    ("onnxruntime", 4, 64): WEIGHTS // 2 + 2 * GROUPS + GROUPS // 2,
    ("onnxruntime", 8, 64): WEIGHTS + 2 * GROUPS + GROUPS,
    ("nncf", 2, 64): WEIGHTS // 4 + 2 * GROUPS + 1 + 16,  # and the shape, as two 64-bit numbers
    ("nncf", 3, 64): 3 * WEIGHTS // 8 + 2 * GROUPS + 1 + 16,
    ("nncf", 4, 64): WEIGHTS // 2 + 2 * GROUPS + GROUPS // 2 + 16,
    ("gguf", 2, 256): 84 * ROWS,  # a row is one super-block
    ("gguf", 3, 256): 110 * ROWS,
    ("gguf", 4, 256): 144 * ROWS,
    ("gguf", 8, 32): 34 * WEIGHTS // 32,
}
MOST_ERROR = {2: 0.3, 3: 0.06, 4: 0.012, 8: 1e-4}  # of weights, in squares


def skip_without(library: str) -> None:
    """Skip the test if the library is not installed."""
    with contextlib.suppress(ValueError):
        return LIBRARIES[library].require("this test")
    pytest.skip(f"{library} is not installed: pip install 'nashswarm[{LIBRARIES[library].extra}]'")


@pytest.fixture(scope="module")
def weight() -> Tensor:
    return 0.02 * torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def packed(weight: Tensor) -> Callable[[str, int, int | None], tuple[np.ndarray, np.ndarray]]:
    """(library, bits, group size) → packed bytes and decoded weights."""

    def pack(library: str, bits: int, group_size: int | None) -> tuple[np.ndarray, np.ndarray]:
        skip_without(library)
        content, decoded = LIBRARIES[library].pack(weight.clone(), bits, group_size)
        return content, decoded.numpy()

    return pack


def parts(content: np.ndarray, *sections: tuple[Any, int]) -> list[np.ndarray]:
    """Cut ``content`` into arrays of these (dtype, count); nothing may be left."""
    arrays, position = [], 0
    for dtype, count in sections:
        size = np.dtype(dtype).itemsize * count
        arrays.append(np.frombuffer(content[position : position + size].tobytes(), dtype))
        position += size
    assert position == len(content)
    return arrays


def low_first(codes: np.ndarray, bits: int) -> np.ndarray:
    """Return the codes of every byte, the one in the lowest bits first."""
    return (codes[..., None] >> np.arange(0, 8, bits) & (1 << bits) - 1).reshape(*codes.shape[:-1], -1)


@pytest.mark.parametrize("library, bits, group_size", BYTES)
def test_pack_every_format_has_counted_bytes_and_small_error(
    library: str, bits: int, group_size: int | None, weight: Tensor, packed: Any
) -> None:
    content, decoded = packed(library, bits, group_size)
    assert content.dtype == np.uint8 and decoded.dtype == np.float32
    assert len(content) == BYTES[library, bits, group_size]
    assert ((decoded - weight.numpy()) ** 2).sum() < MOST_ERROR[bits] * (weight.numpy() ** 2).sum()
    assert len(np.unique(decoded[0, : group_size or COLUMNS])) > 2


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_hqq_pack_puts_first_groups_into_highest_bits(bits: int, packed: Any) -> None:
    content, decoded = packed("hqq", bits, GROUP)
    codes, scale, zero = parts(content, ("u1", bits * WEIGHTS // 8), ("f2", GROUPS), ("f2", GROUPS))
    levels = [codes.reshape(-1, GROUP) >> shift & (1 << bits) - 1 for shift in range(8 - bits, -1, -bits)]
    expected = (np.concatenate(levels) - zero.astype(float)[:, None]) * scale.astype(float)[:, None]
    assert np.allclose(decoded.reshape(-1, GROUP), expected, rtol=2e-3, atol=1e-5)  # it computes in 16 bits


def test_bitsandbytes_pack_at_4_bits_is_nf4_with_quantized_scales(packed: Any) -> None:
    content, decoded = packed("bitsandbytes", 4, GROUP)
    codes, scale, scale_of_scales, mean = parts(content, ("u1", WEIGHTS // 2), ("u1", GROUPS), ("f4", 1), ("f4", 1))
    from bitsandbytes.functional import create_dynamic_map

    scales = create_dynamic_map().numpy()[scale] * scale_of_scales + mean
    high_first = np.stack([codes >> 4, codes & 15], 1).reshape(-1, GROUP)
    assert np.allclose(decoded.reshape(-1, GROUP), np.array(NF4)[high_first] * scales[:, None], atol=1e-6)


def test_bitsandbytes_pack_at_8_bits_has_one_scale_per_row(packed: Any) -> None:
    content, decoded = packed("bitsandbytes", 8, None)
    codes, scale = parts(content, ("i1", WEIGHTS), ("f4", ROWS))
    assert np.allclose(decoded, codes.reshape(ROWS, COLUMNS) * scale[:, None] / 127, atol=1e-6)


@pytest.mark.parametrize("bits", [2, 4])
def test_quanto_pack_puts_first_groups_into_lowest_bits(bits: int, packed: Any) -> None:
    content, decoded = packed("quanto", bits, GROUP)
    codes, scale, shift = parts(content, ("u1", bits * WEIGHTS // 8), ("f2", GROUPS), ("f2", GROUPS))
    levels = [codes.reshape(-1, GROUP) >> place & (1 << bits) - 1 for place in range(0, 8, bits)]
    expected = np.concatenate(levels) * scale.astype(float)[:, None] - shift.astype(float)[:, None]
    assert np.allclose(decoded.reshape(-1, GROUP), expected, rtol=2e-3, atol=1e-4)  # it computes in 16 bits


def test_torchao_pack_at_2_bits_takes_a_byte_per_weight(packed: Any) -> None:
    content, decoded = packed("torchao", 2, GROUP)
    codes, scale, zero = parts(content, ("i1", WEIGHTS), ("f2", GROUPS), ("i1", GROUPS))
    assert codes.min() >= -2 and codes.max() <= 1
    expected = (codes.reshape(-1, GROUP) - zero.astype(float)[:, None]) * scale.astype(float)[:, None]
    assert np.allclose(decoded.reshape(-1, GROUP), expected, rtol=2e-3, atol=1e-5)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_onnxruntime_pack_bytes_decode_to_the_weights_it_runs(bits: int, packed: Any) -> None:
    content, decoded = packed("onnxruntime", bits, GROUP)
    zeros = 0 if bits == 2 else bits * GROUPS // 8
    codes, scale, zero = parts(content, ("u1", bits * WEIGHTS // 8), ("f2", GROUPS), ("u1", zeros))
    middle = low_first(zero, bits)[:, None] if zeros else 2.0
    expected = (low_first(codes.reshape(GROUPS, -1), bits) - middle) * scale.astype(float)[:, None]
    assert np.allclose(decoded.reshape(-1, GROUP), expected, rtol=2e-3, atol=1e-5)


def test_nncf_pack_file_decodes_to_the_weights_it_runs(packed: Any) -> None:
    content, decoded = packed("nncf", 4, GROUP)
    codes, zero, scale, shape = parts(content, ("u1", WEIGHTS // 2), ("u1", GROUPS // 2), ("f2", GROUPS), ("i8", 2))
    expected = (low_first(codes, 4).reshape(-1, GROUP) - low_first(zero, 4)[:, None]) * scale.astype(float)[:, None]
    assert shape.tolist() == [ROWS, COLUMNS]
    assert np.allclose(decoded.reshape(-1, GROUP), expected, atol=1e-6)


def test_gguf_pack_at_4_bits_decodes_by_the_specification(packed: Any) -> None:
    """A super-block: d and dmin (fp16), eight 6-bit scales and minima in 12 bytes, 256 codes in 128 bytes."""
    content, decoded = packed("gguf", 4, 256)
    blocks = content.reshape(ROWS, 144)
    for block, row in zip(blocks, decoded, strict=True):
        d, least = np.frombuffer(block[:4].tobytes(), "f2").astype(float)
        low = block[4:16].astype(int)
        scale = [*(low[:4] & 63), *(low[8:] & 15 | low[:4] >> 6 << 4)]
        minimum = [*(low[4:8] & 63), *(low[8:] >> 4 | low[4:8] >> 6 << 4)]
        codes = block[16:].reshape(4, 32)
        levels = np.stack([codes & 15, codes >> 4], 1).reshape(8, 32)
        expected = d * np.array(scale)[:, None] * levels - least * np.array(minimum)[:, None]
        assert np.allclose(row.reshape(8, 32), expected, atol=1e-6)


def never(*_: Any) -> Any:
    raise AssertionError("a peer asked for data or statistics")


@pytest.fixture
def context(tiny: Any) -> CalibrationContext:
    return CalibrationContext(matrices.find_layers(tiny), 0, 1, never, never, never)


@pytest.mark.parametrize("library, bits", [("hqq", 3), ("bitsandbytes", 4), ("quanto", 2), ("onnxruntime", 4)])
def test_peer_packs_every_layer_and_the_tied_embedding(library: str, bits: int, context: CalibrationContext) -> None:
    skip_without(library)
    method = Peer(library, bits)
    assert isinstance(method, Method)
    result = method.compress(context, np.random.default_rng(0))
    for layer in context.layers:
        error = (result.weights[layer.name] - layer.weight).square().sum() / layer.weight.square().sum()
        assert 1e-4 < error < MOST_ERROR[bits]
        assert bits < 8 * len(result.packed[layer.name]) / layer.parameters < bits + 1.25
    assert result.allocation.splitlines() == [f"{layer.name} {bits}" for layer in context.layers]
    assert result.code_bits == bits * sum(layer.parameters for layer in context.layers)
    assert result.metrics == {"layers_at_16_bits": 0}


def test_peer_layer_that_does_not_fit_stays_at_16_bits_and_is_named(
    context: CalibrationContext, caplog: pytest.LogCaptureFixture
) -> None:
    """Super-blocks of 256 columns fit only the wide matrix of a block."""
    skip_without("gguf")
    with caplog.at_level(logging.WARNING):
        result = Peer("gguf", 3, 256).compress(context, np.random.default_rng(0))
    narrow = [layer for layer in context.layers if layer.weight.shape[1] % 256]
    assert 0 < len(narrow) < len(context.layers) and result.metrics == {"layers_at_16_bits": len(narrow)}
    for layer in narrow:
        assert layer.name in caplog.text and f"{layer.name} 16\n" in result.allocation
        assert torch.equal(result.weights[layer.name], layer.weight.half().float())
        assert torch.equal(unpack(result.packed[layer.name]).dequantize(), layer.weight.half().float())


def test_peer_no_layer_fits_raises(context: CalibrationContext) -> None:
    skip_without("onnxruntime")
    narrow = [layer for layer in context.layers if layer.weight.shape[1] % 256]
    some = CalibrationContext(tuple(narrow), 0, 1, never, never, never)
    with pytest.raises(ValueError, match=r"onnxruntime cannot pack any layer .* method\.group_size=256"):
        Peer("onnxruntime", 4, 256).compress(some, np.random.default_rng(0))


def calibrated(model: Any, windows: Tensor, layers: Any = None) -> CalibrationContext:
    """Return the context of a model with calibration text."""
    return CalibrationSession(
        model, layers or matrices.find_layers(model), windows, windows, 0, Cache(None, {})
    ).context()


@pytest.fixture
def brief(monkeypatch: pytest.MonkeyPatch) -> None:
    """AutoRound with few iterations."""
    skip_without("auto_round")
    monkeypatch.setattr(auto_round, "ITERATIONS", 40)


def words_of(words: np.ndarray, bits: int) -> np.ndarray:
    """Return the codes in 32-bit words that run down the columns; a code's bits start at the lowest, across words."""
    stream = (words.view(np.uint32)[..., None] >> np.arange(32, dtype=np.uint32) & 1).transpose(1, 0, 2)
    return (stream.reshape(words.shape[1], -1, bits) << np.arange(bits)).sum(-1).T


@pytest.mark.usefixtures("brief")
@pytest.mark.parametrize("kind, bits", [("gpt2", 2), ("gpt2", 3), ("llama", 4)])
def test_auto_round_packed_words_decode_to_the_weights_of_every_layer(
    kind: str, bits: int, random_model: Callable[[str], Any], token_windows: Tensor
) -> None:
    model, generator = random_model(kind), torch.get_rng_state()
    before = {key: part.clone() for key, part in model.state_dict().items()}
    context = calibrated(model, token_windows)
    result = Peer("auto_round", bits, 32).compress(context, np.random.default_rng(0))
    assert torch.equal(torch.get_rng_state(), generator)
    assert all(torch.equal(part, before[key]) for key, part in model.state_dict().items())
    assert result.allocation.splitlines() == [f"{layer.name} {bits}" for layer in context.layers]
    for layer in context.layers:
        rows, columns = layer.weight.shape
        groups = columns // 32
        codes, zero, scale = parts(
            result.packed[layer.name],
            ("i4", rows * groups * bits), ("i4", groups * rows * bits // 32), ("f2", rows * groups),
        )  # fmt: skip
        level = words_of(codes.reshape(-1, rows), bits).T.reshape(rows, groups, 32)
        middle = words_of(zero.reshape(groups, -1).T, bits).T + 1
        expected = (level - middle.T[..., None]) * scale.reshape(groups, rows).T[..., None].astype(float)
        decoded = result.weights[layer.name].numpy()
        assert np.allclose(decoded.reshape(rows, groups, 32), expected, rtol=2e-3, atol=1e-6)  # it computes in 16 bits
        assert ((decoded - layer.weight.numpy()) ** 2).sum() < MOST_ERROR[bits] * layer.weight.square().sum().item()


@pytest.mark.usefixtures("brief")
@torch.no_grad()
def test_auto_round_tuning_lowers_the_error_on_calibration_text(
    random_model: Callable[[str], Any], token_windows: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The input of the last norm is nearer to the full model's than after rounding with searched ranges."""
    model = random_model("gpt2")
    context = torch.enable_grad()(calibrated)(model, token_windows)

    def error() -> float:
        result = Peer("auto_round", 3, 32).compress(context, np.random.default_rng(0))
        compressed = copy.deepcopy(model)
        matrices.set_weights(compressed, {name: weight for name, weight in result.weights.items() if ".h." in name})
        full, approximate = (each.transformer(token_windows).last_hidden_state for each in (model, compressed))
        return float((full - approximate).square().sum())

    monkeypatch.setattr(auto_round, "ITERATIONS", 0)
    before = error()
    monkeypatch.setattr(auto_round, "ITERATIONS", 40)
    assert error() < 0.95 * before


@pytest.mark.usefixtures("brief")
def test_auto_round_odd_rows_pads_embedding_and_leaves_head_at_16_bits(
    random_model: Callable[[str], Any], token_windows: Tensor
) -> None:
    model = copy.deepcopy(random_model("llama"))
    model.resize_token_embeddings(model.config.vocab_size + 5)
    layers = matrices.find_layers(model, exclude=["*0.mlp.up_proj"])
    result = Peer("auto_round", 4, 32).compress(calibrated(model, token_windows, layers), np.random.default_rng(0))
    bits = dict(line.split() for line in result.allocation.splitlines())
    assert bits.pop("lm_head") == "16" and set(bits.values()) == {"4"} and len(bits) == len(layers) - 1
    assert result.weights["model.embed_tokens"].shape == model.get_input_embeddings().weight.shape
    filled = model.config.vocab_size + 27
    assert len(result.packed["model.embed_tokens"]) == filled * 64 // 2 + filled * 2 * 2 + filled * 2 // 2


def test_auto_round_model_without_head_raises_unsupported(
    random_model: Callable[[str], Any], token_windows: Tensor, context: CalibrationContext
) -> None:
    skip_without("auto_round")
    for headless in (calibrated(random_model("bert_encoder"), token_windows), context):
        with pytest.raises(Unsupported, match=r"method\.library=auto_round tunes models that predict text"):
            Peer("auto_round", 4, 32).compress(headless, np.random.default_rng(0))


@pytest.mark.parametrize(
    "settings, message",
    [
        (("hqp", 4, 64), r"unknown method\.library 'hqp': choose among hqq, bitsandbytes"),
        (("hqq", 5, 64), r"method\.bits=5: hqq knows 2, 3, 4, 8 bits"),
        (("gguf", 4, 64), r"method\.group_size=64: gguf at 4 bits knows 256"),
        (("bitsandbytes", 8, 64), r"method\.group_size=64: bitsandbytes at 8 bits knows null"),
    ],
)
def test_peer_unknown_settings_raise(settings: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Peer(*settings)


@pytest.fixture
def bare(monkeypatch: pytest.MonkeyPatch) -> None:
    """An environment in which no library is installed."""

    def version(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", version)


@pytest.mark.parametrize("library", LIBRARIES)
def test_peer_library_not_installed_names_the_extra(library: str, bare: None) -> None:
    bits, sizes = next(iter(LIBRARIES[library].formats.items()))
    blind = CalibrationContext((), 0, 1, never, never, never)
    with pytest.raises(ValueError, match=rf"method\.library={library} needs .*: pip install 'nashswarm\[\w+\]'"):
        Peer(library, bits, sizes[0]).compress(blind, np.random.default_rng(0))
