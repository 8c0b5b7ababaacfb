"""Other people's libraries: their bytes are decoded here by their documented layouts, without them."""

import contextlib
import copy
import importlib.metadata
import logging
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from nashswarm.calibration.cache import Cache
from nashswarm.calibration.context import CalibrationContext
from nashswarm.calibration.session import CalibrationSession
from nashswarm.errors import Unsupported
from nashswarm.measures.size import resident_bytes
from nashswarm.methods.method import Method
from nashswarm.methods.peers import auto_round, peer
from nashswarm.methods.peers.peer import CONTESTANTS, LIBRARIES, Peer
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


def installed(library: str) -> None:
    """Skip the test where the library is not."""
    with contextlib.suppress(ValueError):
        return LIBRARIES[library].require("this test")
    pytest.skip(f"{library} is not installed: pip install 'nashswarm[{LIBRARIES[library].extra}]'")


@pytest.fixture(scope="module")
def weight() -> Tensor:
    return 0.02 * torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def packed(weight: Tensor) -> Callable[[str, int, int | None], tuple[np.ndarray, np.ndarray]]:
    """(library, bits, group size) → its bytes and its weights."""

    def by(library: str, bits: int, group_size: int | None) -> tuple[np.ndarray, np.ndarray]:
        installed(library)
        content, found = LIBRARIES[library].pack(weight.clone(), bits, group_size)
        return content, found.numpy()

    return by


def parts(content: np.ndarray, *wanted: tuple[Any, int]) -> list[np.ndarray]:
    """``content`` cut into arrays of these (dtype, count), with nothing left."""
    found, position = [], 0
    for dtype, count in wanted:
        size = np.dtype(dtype).itemsize * count
        found.append(np.frombuffer(content[position : position + size].tobytes(), dtype))
        position += size
    assert position == len(content)
    return found


def low_first(codes: np.ndarray, bits: int) -> np.ndarray:
    """The codes of every byte, that of the lowest bits first."""
    return (codes[..., None] >> np.arange(0, 8, bits) & (1 << bits) - 1).reshape(*codes.shape[:-1], -1)


@pytest.mark.parametrize("library, bits, group_size", BYTES)
def test_bytes_are_counted_by_hand_and_weights_come_back(
    library: str, bits: int, group_size: int | None, weight: Tensor, packed: Any
) -> None:
    content, found = packed(library, bits, group_size)
    assert content.dtype == np.uint8 and found.dtype == np.float32
    assert len(content) == BYTES[library, bits, group_size]
    assert ((found - weight.numpy()) ** 2).sum() < MOST_ERROR[bits] * (weight.numpy() ** 2).sum()
    assert len(np.unique(found[0, : group_size or COLUMNS])) > 2


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_hqq_puts_the_first_rows_of_groups_into_the_highest_bits(bits: int, packed: Any) -> None:
    content, found = packed("hqq", bits, GROUP)
    codes, scale, zero = parts(content, ("u1", bits * WEIGHTS // 8), ("f2", GROUPS), ("f2", GROUPS))
    levels = [codes.reshape(-1, GROUP) >> shift & (1 << bits) - 1 for shift in range(8 - bits, -1, -bits)]
    decoded = (np.concatenate(levels) - zero.astype(float)[:, None]) * scale.astype(float)[:, None]
    assert np.allclose(found.reshape(-1, GROUP), decoded, rtol=2e-3, atol=1e-5)  # it computes in 16 bits


def test_nf4_is_sixteen_levels_of_quantized_scales(packed: Any) -> None:
    content, found = packed("bitsandbytes", 4, GROUP)
    codes, scale, scale_of_scales, mean = parts(content, ("u1", WEIGHTS // 2), ("u1", GROUPS), ("f4", 1), ("f4", 1))
    from bitsandbytes.functional import create_dynamic_map

    scales = create_dynamic_map().numpy()[scale] * scale_of_scales + mean
    high_first = np.stack([codes >> 4, codes & 15], 1).reshape(-1, GROUP)
    assert np.allclose(found.reshape(-1, GROUP), np.array(NF4)[high_first] * scales[:, None], atol=1e-6)


def test_int8_has_one_scale_a_row(packed: Any) -> None:
    content, found = packed("bitsandbytes", 8, None)
    codes, scale = parts(content, ("i1", WEIGHTS), ("f4", ROWS))
    assert np.allclose(found, codes.reshape(ROWS, COLUMNS) * scale[:, None] / 127, atol=1e-6)


@pytest.mark.parametrize("bits", [2, 4])
def test_quanto_puts_the_first_rows_of_groups_into_the_lowest_bits(bits: int, packed: Any) -> None:
    content, found = packed("quanto", bits, GROUP)
    codes, scale, shift = parts(content, ("u1", bits * WEIGHTS // 8), ("f2", GROUPS), ("f2", GROUPS))
    levels = [codes.reshape(-1, GROUP) >> place & (1 << bits) - 1 for place in range(0, 8, bits)]
    decoded = np.concatenate(levels) * scale.astype(float)[:, None] - shift.astype(float)[:, None]
    assert np.allclose(found.reshape(-1, GROUP), decoded, rtol=2e-3, atol=1e-4)  # it computes in 16 bits


def test_torchao_has_a_byte_a_weight_at_2_bits(packed: Any) -> None:
    content, found = packed("torchao", 2, GROUP)
    codes, scale, zero = parts(content, ("i1", WEIGHTS), ("f2", GROUPS), ("i1", GROUPS))
    assert codes.min() >= -2 and codes.max() <= 1
    decoded = (codes.reshape(-1, GROUP) - zero.astype(float)[:, None]) * scale.astype(float)[:, None]
    assert np.allclose(found.reshape(-1, GROUP), decoded, rtol=2e-3, atol=1e-5)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_onnxruntime_runs_what_its_bytes_say(bits: int, packed: Any) -> None:
    content, found = packed("onnxruntime", bits, GROUP)
    zeros = 0 if bits == 2 else bits * GROUPS // 8
    codes, scale, zero = parts(content, ("u1", bits * WEIGHTS // 8), ("f2", GROUPS), ("u1", zeros))
    middle = low_first(zero, bits)[:, None] if zeros else 2.0
    decoded = (low_first(codes.reshape(GROUPS, -1), bits) - middle) * scale.astype(float)[:, None]
    assert np.allclose(found.reshape(-1, GROUP), decoded, rtol=2e-3, atol=1e-5)


def test_nncf_runs_what_its_file_says(packed: Any) -> None:
    content, found = packed("nncf", 4, GROUP)
    codes, zero, scale, shape = parts(content, ("u1", WEIGHTS // 2), ("u1", GROUPS // 2), ("f2", GROUPS), ("i8", 2))
    decoded = (low_first(codes, 4).reshape(-1, GROUP) - low_first(zero, 4)[:, None]) * scale.astype(float)[:, None]
    assert shape.tolist() == [ROWS, COLUMNS]
    assert np.allclose(found.reshape(-1, GROUP), decoded, atol=1e-6)


def test_k_quants_of_4_bits_are_read_as_their_specification_says(packed: Any) -> None:
    """A super-block: d and dmin (fp16), eight 6-bit scales and minima in 12 bytes, 256 codes in 128 bytes."""
    content, found = packed("gguf", 4, 256)
    blocks = content.reshape(ROWS, 144)
    for block, row in zip(blocks, found, strict=True):
        d, least = np.frombuffer(block[:4].tobytes(), "f2").astype(float)
        low = block[4:16].astype(int)
        scale = [*(low[:4] & 63), *(low[8:] & 15 | low[:4] >> 6 << 4)]
        minimum = [*(low[4:8] & 63), *(low[8:] >> 4 | low[4:8] >> 6 << 4)]
        codes = block[16:].reshape(4, 32)
        levels = np.stack([codes & 15, codes >> 4], 1).reshape(8, 32)
        decoded = d * np.array(scale)[:, None] * levels - least * np.array(minimum)[:, None]
        assert np.allclose(row.reshape(8, 32), decoded, atol=1e-6)


def never(*_: Any) -> Any:
    raise AssertionError("a peer needs neither data nor statistics")


@pytest.fixture
def context(tiny: Any) -> CalibrationContext:
    return CalibrationContext(matrices.find_layers(tiny), 0, 1, never, never, never)


@pytest.mark.parametrize("library, bits", [("hqq", 3), ("bitsandbytes", 4), ("quanto", 2), ("onnxruntime", 4)])
def test_a_peer_packs_every_layer_the_tied_embedding_too(library: str, bits: int, context: CalibrationContext) -> None:
    installed(library)
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


def test_what_a_library_cannot_pack_stays_at_16_bits_and_is_named(
    context: CalibrationContext, caplog: pytest.LogCaptureFixture
) -> None:
    """Super-blocks of 256 columns fit one matrix of a block only: the wide one."""
    installed("gguf")
    with caplog.at_level(logging.WARNING):
        result = Peer("gguf", 3, 256).compress(context, np.random.default_rng(0))
    narrow = [layer for layer in context.layers if layer.weight.shape[1] % 256]
    assert 0 < len(narrow) < len(context.layers) and result.metrics == {"layers_at_16_bits": len(narrow)}
    for layer in narrow:
        assert layer.name in caplog.text and f"{layer.name} 16\n" in result.allocation
        assert torch.equal(result.weights[layer.name], layer.weight.half().float())
        assert torch.equal(unpack(result.packed[layer.name]).dequantize(), layer.weight.half().float())


def test_nothing_packed_at_all_is_an_error(context: CalibrationContext) -> None:
    installed("onnxruntime")
    narrow = [layer for layer in context.layers if layer.weight.shape[1] % 256]
    some = CalibrationContext(tuple(narrow), 0, 1, never, never, never)
    with pytest.raises(ValueError, match=r"onnxruntime cannot pack any layer .* method\.group_size=256"):
        Peer("onnxruntime", 4, 256).compress(some, np.random.default_rng(0))


def evidence_of(model: Any, windows: Tensor, layers: Any = None) -> CalibrationContext:
    """An oracle of a model with its calibration text."""
    return CalibrationSession(
        model, layers or matrices.find_layers(model), windows, windows, 0, Cache(None, {})
    ).context()


@pytest.fixture
def brief(monkeypatch: pytest.MonkeyPatch) -> None:
    """AutoRound, tuning for no longer than a test may take."""
    installed("auto_round")
    monkeypatch.setattr(auto_round, "ITERATIONS", 40)


def words_of(words: np.ndarray, bits: int) -> np.ndarray:
    """The codes in 32-bit words that run down the columns, a code's bits from the lowest on, across words."""
    stream = (words.view(np.uint32)[..., None] >> np.arange(32, dtype=np.uint32) & 1).transpose(1, 0, 2)
    return (stream.reshape(words.shape[1], -1, bits) << np.arange(bits)).sum(-1).T


@pytest.mark.usefixtures("brief")
@pytest.mark.parametrize("kind, bits", [("gpt2", 2), ("gpt2", 3), ("llama", 4)])
def test_auto_round_packs_every_layer_in_words_of_32_bits(
    kind: str, bits: int, random_model: Callable[[str], Any], token_windows: Tensor
) -> None:
    model, generator = random_model(kind), torch.get_rng_state()
    before = {key: part.clone() for key, part in model.state_dict().items()}
    context = evidence_of(model, token_windows)
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
        decoded = (level - middle.T[..., None]) * scale.reshape(groups, rows).T[..., None].astype(float)
        found = result.weights[layer.name].numpy()
        assert np.allclose(found.reshape(rows, groups, 32), decoded, rtol=2e-3, atol=1e-6)  # it computes in 16 bits
        assert ((found - layer.weight.numpy()) ** 2).sum() < MOST_ERROR[bits] * layer.weight.square().sum().item()


@pytest.mark.usefixtures("brief")
@torch.no_grad()
def test_auto_round_answers_to_its_calibration_text(
    random_model: Callable[[str], Any], token_windows: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What goes into the last block's norm is nearer to the full model's than after rounding with searched ranges."""
    model = random_model("gpt2")
    context = evidence_of(model, token_windows)

    def error() -> float:
        found = Peer("auto_round", 3, 32).compress(context, np.random.default_rng(0))
        trial = copy.deepcopy(model)
        matrices.set_weights(trial, {name: weight for name, weight in found.weights.items() if ".h." in name})
        full, other = (one.transformer(token_windows).last_hidden_state for one in (model, trial))
        return float((full - other).square().sum())

    monkeypatch.setattr(auto_round, "ITERATIONS", 0)
    before = error()
    monkeypatch.setattr(auto_round, "ITERATIONS", 40)
    assert error() < 0.95 * before


@pytest.mark.usefixtures("brief")
def test_auto_round_fills_tables_up_and_leaves_what_does_not_fill_its_words(
    random_model: Callable[[str], Any], token_windows: Tensor
) -> None:
    model = copy.deepcopy(random_model("llama"))
    model.resize_token_embeddings(model.config.vocab_size + 5)
    layers = matrices.find_layers(model, exclude=["*0.mlp.up_proj"])
    result = Peer("auto_round", 4, 32).compress(evidence_of(model, token_windows, layers), np.random.default_rng(0))
    bits = dict(line.split() for line in result.allocation.splitlines())
    assert bits.pop("lm_head") == "16" and set(bits.values()) == {"4"} and len(bits) == len(layers) - 1
    assert result.weights["model.embed_tokens"].shape == model.get_input_embeddings().weight.shape
    filled = model.config.vocab_size + 27
    assert len(result.packed["model.embed_tokens"]) == filled * 64 // 2 + filled * 2 * 2 + filled * 2 // 2


def test_auto_round_is_for_models_that_predict_text(
    random_model: Callable[[str], Any], token_windows: Tensor, context: CalibrationContext
) -> None:
    installed("auto_round")
    for other in (evidence_of(random_model("bert_encoder"), token_windows), context):
        with pytest.raises(Unsupported, match=r"method\.library=auto_round tunes models that predict text"):
            Peer("auto_round", 4, 32).compress(other, np.random.default_rng(0))


@pytest.mark.parametrize(
    "settings, message",
    [
        (("hqp", 4, 64), r"unknown method\.library 'hqp': choose among hqq, bitsandbytes"),
        (("hqq", 5, 64), r"method\.bits=5: hqq knows 2, 3, 4, 8 bits"),
        (("gguf", 4, 64), r"method\.group_size=64: gguf at 4 bits knows 256"),
        (("bitsandbytes", 8, 64), r"method\.group_size=64: bitsandbytes at 8 bits knows null"),
    ],
)
def test_settings_that_a_library_does_not_know_are_refused(settings: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Peer(*settings)


@pytest.fixture
def bare(monkeypatch: pytest.MonkeyPatch) -> None:
    """An environment without any of the libraries."""

    def version(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", version)


@pytest.mark.parametrize("library", LIBRARIES)
def test_a_library_that_is_not_installed_is_one_sentence(library: str, bare: None) -> None:
    bits, sizes = next(iter(LIBRARIES[library].formats.items()))
    blind = CalibrationContext((), 0, 1, never, never, never)
    with pytest.raises(ValueError, match=rf"method\.library={library} needs .*: pip install 'nashswarm\[\w+\]'"):
        Peer(library, bits, sizes[0]).compress(blind, np.random.default_rng(0))


@pytest.mark.parametrize("name", ["onnxruntime", "bitsandbytes"])
def test_a_contestant_that_is_not_installed_is_one_sentence(name: str, tiny: Any, bare: None) -> None:
    with pytest.raises(ValueError, match=rf"measure\.against={name} needs .*{name}: pip install 'nashswarm\[peers\]'"):
        CONTESTANTS[name](tiny)


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
@pytest.mark.parametrize("name", ["onnxruntime", "bitsandbytes"])
@torch.no_grad()
def test_a_contestant_really_computes_with_4_bits(
    name: str, kind: str, random_model: Callable[[str], Any], token_windows: Tensor
) -> None:
    installed(name)
    model = random_model(kind)
    before = {key: part.clone() for key, part in model.state_dict().items()}
    found = CONTESTANTS[name](model)
    assert all(torch.equal(part, before[key]) for key, part in model.state_dict().items())
    products = [module for module in model.modules() if isinstance(module, nn.Linear | Conv1D)]
    replaced: list[Any] = [module for module in found.modules() if hasattr(module, "weight_bytes")]
    assert len(replaced) == len(products)
    assert not any(isinstance(module, Conv1D) or type(module) is nn.Linear for module in found.modules())
    if name == "bitsandbytes":
        assert all(part.weight.dtype == torch.uint8 for part in replaced)
        assert all(part.weight.quant_state.quant_type == "nf4" for part in replaced)

    weights = sum(module.weight.numel() for module in products)
    biases = sum(module.bias.numel() for module in products if module.bias is not None)
    head = model.get_output_embeddings().weight
    tied = head.numel() if head is model.get_input_embeddings().weight else 0  # it stays, as the embedding
    own = resident_bytes(found) - (resident_bytes(model) - 4 * (weights - tied + biases))
    scale_bytes, bias_bytes = (4, 4) if name == "onnxruntime" else (2 if has_bfloat16() else 4, 2)
    assert own == weights // 2 + scale_bytes * weights // 64 + bias_bytes * biases

    for product, ours in zip(products, replaced, strict=True):
        x = torch.randn(2, 5, product.weight.shape[isinstance(product, nn.Linear)])
        full = product(x)
        error = (full - ours(x)).square().sum() / full.square().sum()
        assert 1e-3 < error < 0.02
    answer = found(input_ids=token_windows[:1], use_cache=True)
    again = found(input_ids=token_windows[:1, -1:], past_key_values=answer.past_key_values, use_cache=True)
    assert again.logits.isfinite().all()


@torch.no_grad()
def test_bitsandbytes_computes_rows_that_its_kernel_does_not_divide(random_model: Callable[[str], Any]) -> None:
    installed("bitsandbytes")
    model = random_model("gpt2")
    odd = model.resize_token_embeddings(model.config.vocab_size + 5).num_embeddings
    ids, full = torch.tensor([[odd - 1, 3]]), model.get_output_embeddings()
    head = CONTESTANTS["bitsandbytes"](model).get_output_embeddings()
    x = model.transformer(ids).last_hidden_state
    assert head(x).shape == (1, 2, odd)
    assert (full(x) - head(x)).square().sum() < 0.02 * full(x).square().sum()


def has_bfloat16() -> bool:
    """Whether bitsandbytes lays weights and scales out for the processor's bfloat16 instructions."""
    from bitsandbytes.functional import has_avx512bf16

    return bool(has_avx512bf16())


def test_a_model_whose_products_would_not_be_replaced_is_an_error(tiny: Any) -> None:
    with pytest.raises(AssertionError, match="not replaced"):
        peer._with_products(tiny, lambda weight, bias: nn.Linear(*weight.T.shape))


@pytest.mark.slow
@torch.no_grad()
def test_a_compiled_model_steps_with_three_graphs(tiny: Any, token_windows: Tensor) -> None:
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    counters.clear()
    found = CONTESTANTS["compile"](tiny)
    tokens = token_windows[:1, :16]
    answer = found(input_ids=tokens, use_cache=True)
    assert torch.allclose(answer.logits, tiny(input_ids=tokens).logits, atol=1e-4)
    for _ in range(8):
        token = answer.logits[:, -1:].argmax(-1)
        answer = found(input_ids=token, past_key_values=answer.past_key_values, use_cache=True)
    assert counters["stats"]["unique_graphs"] == 3
    assert resident_bytes(found) == resident_bytes(tiny)
