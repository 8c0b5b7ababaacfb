"""GGUF files whose tensors choose their types: the game by brute force, the file by the package gguf and llama.cpp."""

import itertools
import pathlib
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from nashswarm.calibration.cache import Cache
from nashswarm.calibration.session import CalibrationSession
from nashswarm.experiment.typed_export import parse_size
from nashswarm.methods.gguf_types.certificate import ALL_TYPES, certificate, read_certificate, sizes
from nashswarm.methods.gguf_types.settings import GgufTypes, decode, other_bytes, round_layer
from nashswarm.methods.method import Method
from nashswarm.methods.type_game import solve
from nashswarm.models import gguf_architectures, gguf_file, matrices
from nashswarm.quant.curvature import Curvature
from tests.models.test_gguf_file import (
    CONFIGS,
    SHARED,
    build,
    divergence,
    llama_cpp_log_probabilities,
    log_probabilities,
)

gguf = pytest.importorskip("gguf", reason="the package gguf is not installed")
WIDE = SHARED | {"hidden_size": 256, "intermediate_size": 288, "num_hidden_layers": 1}  # down_proj has narrow rows
FEW = ("Q3_K", "Q4_0", "Q4_K", "Q8_0")


@pytest.fixture(scope="module")
def session(tmp_path_factory: pytest.TempPathFactory) -> CalibrationSession:
    model = build(transformers.LlamaConfig(**WIDE, tie_word_embeddings=True))
    windows = torch.randint(512, (9, 24), generator=torch.Generator().manual_seed(1))
    return CalibrationSession(
        model, matrices.find_layers(model), windows, windows, 0, Cache(tmp_path_factory.mktemp("cache"), {})
    )


@pytest.fixture(scope="module")
def written(session: CalibrationSession, tmp_path_factory: pytest.TempPathFactory) -> tuple[pathlib.Path, Any]:
    """A file of 5 bits per parameter, and what the method says of it."""
    method, model = GgufTypes(types=FEW, sweeps=1), session.full
    total = int(5 * session.parameters / 8)
    others = other_bytes(model, session.layers, method.actions, None, "wide")
    rounded = method.round(session.context(), total, others)
    path = tmp_path_factory.mktemp("gguf") / "wide.gguf"
    packed = {f"{name}.weight": tensor for name, tensor in rounded.packed.items()}
    gguf_file.write(model, path, "float16", None, "wide", packed, certificate(rounded.game, model))
    assert path.stat().st_size == total - rounded.game.room
    return path, rounded


def test_solve_is_the_least_damage_of_all_allocations() -> None:
    rng = np.random.default_rng(0)
    for _ in range(20):
        size = np.sort(rng.integers(1, 30, (4, 4)) * 32, 1)
        damage = np.sort(rng.random((4, 4)).astype(np.float32).astype(float), 1)[:, ::-1].copy()
        budget = int(rng.integers(size.min(1).sum(), size.max(1).sum() + 1))
        game = solve(tuple("abcd"), ("Q4_0", "Q5_0", "Q8_0", "F16"), damage, size, budget)
        players = np.arange(4)
        feasible = [p for p in itertools.product(range(4), repeat=4) if size[players, list(p)].sum() <= budget]
        least = min(damage[players, list(p)].sum() for p in feasible)
        assert damage[players, game.profile].sum() == pytest.approx(least, rel=1e-5)
        assert game.room == budget - size[players, game.profile].sum() >= 0
        for player in players:  # regret by enumeration; their sum bounds what any other allocation saves
            costs = [damage[player, action] + game.price * size[player, action] for action in range(4)]
            assert game.regret()[player] == pytest.approx(costs[game.profile[player]] - min(costs), abs=1e-12)
        rest = damage[players, game.profile].sum() - game.regret().sum() - game.price * game.room
        assert all(damage[players, list(p)].sum() >= rest - 1e-9 for p in feasible)


def test_sizes_of_narrow_rows_are_those_of_16_bits(session: CalibrationSession) -> None:
    size, refused = sizes(session.layers, ALL_TYPES)
    for layer, row, no in zip(session.layers, size, refused, strict=True):
        for name, found, is_refused in zip(ALL_TYPES, row, no, strict=True):
            block, count = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[name]]
            assert is_refused == bool(layer.weight.shape[1] % block)
            whole = 2 * layer.parameters if is_refused else layer.parameters // block * count
            assert found == -(-whole // 32) * 32


def test_round_fills_the_file_with_what_decodes_to_its_weights(written: Any, session: CalibrationSession) -> None:
    path, rounded = written
    stored = gguf_file.read(path, gguf_architectures.layout(session.full))
    for layer in session.layers:
        tensor = rounded.packed[layer.name]
        assert stored[f"{layer.name}.weight"].type == tensor.type in (*FEW, "F16")
        assert torch.equal(stored[f"{layer.name}.weight"].values, decode(tensor))
        assert (decode(tensor) - layer.weight).square().mean() < 0.1 * layer.weight.square().mean()
    assert rounded.packed["model.layers.0.mlp.down_proj"].type in ("Q4_0", "Q8_0", "F16")
    norm = session.full.get_parameter("model.norm.weight").detach()
    assert torch.equal(stored["model.norm.weight"].values, norm)


def test_transformers_reads_the_weights_of_the_file(written: Any, session: CalibrationSession) -> None:
    path, rounded = written
    dequantized = transformers.GgufConfig(dequantize=True)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, quantization_config=dequantized
    )
    for layer in matrices.find_layers(loaded):
        assert torch.equal(layer.weight, decode(rounded.packed[layer.name]))
    model, tokens = build(session.full.config), torch.arange(20)
    matrices.set_weights(model, {name: decode(tensor) for name, tensor in rounded.packed.items()})
    assert torch.allclose(log_probabilities(loaded.eval(), tokens), log_probabilities(model, tokens), atol=1e-5)


def test_read_certificate_has_the_regret_of_the_game(written: Any) -> None:
    path, rounded = written
    game = read_certificate(path)
    assert game.types == (*FEW, "F16") and game.price == rounded.game.price
    assert [game.types[action] for action in game.profile] == [tensor.type for tensor in rounded.packed.values()]
    assert np.allclose(game.regret(), rounded.game.regret(), rtol=0, atol=1e-12)
    assert np.array_equal(game.size, rounded.game.size)


def test_read_certificate_of_other_or_damaged_files_raises(written: Any, tmp_path: pathlib.Path) -> None:
    model = build(CONFIGS["llama"]())
    gguf_file.write(model, tmp_path / "plain.gguf")
    with pytest.raises(ValueError, match=r"plain\.gguf has no certificate of nashswarm"):
        read_certificate(tmp_path / "plain.gguf")
    (tmp_path / "part.gguf").write_bytes(written[0].read_bytes()[:5000])
    with pytest.raises(ValueError, match=r"part\.gguf is no GGUF file, or only a part of one"):
        read_certificate(tmp_path / "part.gguf")


def test_compress_reports_the_bytes_of_its_file(session: CalibrationSession) -> None:
    method = GgufTypes(bits=5.5, types=("Q4_0", "Q8_0"), sweeps=0)
    assert isinstance(method, Method)
    result = method.compress(session.context(), np.random.default_rng(0))
    assert result.foreign == "llama.cpp" and result.file_bytes is not None
    assert 0.9 * 5.5 < 8 * result.file_bytes / session.parameters <= 5.5
    assert result.metrics["damage"] == pytest.approx(sum(result.damage.values()))
    assert result.metrics["regret_sum"] >= result.metrics["regret_max"] >= 0
    for layer in session.layers:
        assert result.weights[layer.name].shape == layer.weight.shape


def test_round_below_the_smallest_types_raises_before_calibrating(session: CalibrationSession) -> None:
    def calibrate(*_: Any) -> Any:
        raise AssertionError("calibrated")

    context = session.context()
    object.__setattr__(context, "zipf_moments", calibrate)
    with pytest.raises(ValueError, match=r"a GGUF file of 20,000 bytes is too small: .* takes [\d,]+ bytes"):
        GgufTypes().round(context, 20_000, 0)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"bits": 0}, "method.bits=0 must be a positive number"),
        ({"types": ("Q4_0", "Q9")}, "unknown method.types Q9: choose among Q2_K, "),
        ({"sweeps": -1}, "must not be negative"),
    ],
)
def test_settings_without_a_meaning_raise(options: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GgufTypes(**options)


@pytest.mark.parametrize("text", ["", "GB", "4.2TB", "-3", "1e9", "four"])
def test_parse_size_of_other_text_raises(text: str) -> None:
    with pytest.raises(ValueError, match="is no size: write a number of bytes"):
        parse_size(text)


@pytest.mark.parametrize("name", [name for name in ALL_TYPES if name != "F16"])
def test_llama_cpp_dequantizes_to_the_same_weights(
    name: str, session: CalibrationSession, tmp_path: pathlib.Path
) -> None:
    """A real llama.cpp writes the file again in 32 bits; its numbers are ours, to the last bits of a product."""
    library = pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")
    model, packed = session.full, {}
    for layer in session.layers:
        own = Curvature(torch.ones(len(layer.weight)), None, torch.ones_like(layer.weight))
        kind = name if layer.weight.shape[1] % 256 == 0 else "Q4_0"
        packed[f"{layer.name}.weight"] = round_layer(layer, kind, own, 0)
    gguf_file.write(model, tmp_path / "small.gguf", packed=packed)
    parameters = library.llama_model_quantize_default_params()
    parameters.ftype, parameters.allow_requantize = int(gguf.LlamaFileType.ALL_F32), True
    paths = [str(tmp_path / file).encode() for file in ("small.gguf", "full.gguf")]
    assert library.llama_model_quantize(*paths, parameters) == 0
    decoded = gguf_file.read(tmp_path / "full.gguf", gguf_architectures.layout(model))
    for layer in session.layers:
        ours, theirs = decode(packed[f"{layer.name}.weight"]), decoded[f"{layer.name}.weight"]
        assert theirs.type == "F32" and torch.allclose(ours, theirs.values, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("kind", ["gemma", "gemma2", "gemma3", "phi3", "gpt2", "mistral", "qwen2", "qwen3"])
def test_llama_cpp_computes_with_packed_tensors_of(kind: str, tmp_path: pathlib.Path) -> None:
    """Matrices of every layout, fused and transposed ones too, are packed in the order that llama.cpp reads."""
    pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")
    model, packed, decoded = build(CONFIGS[kind]()), {}, {}
    tokens = torch.randint(512, (40,), generator=torch.Generator().manual_seed(0))
    full = log_probabilities(model, tokens)
    for layer in matrices.find_layers(model):
        own = Curvature(torch.ones(len(layer.weight)), None, torch.ones_like(layer.weight))
        packed[f"{layer.name}.weight"] = round_layer(layer, "Q5_1", own, 0)
        decoded[layer.name] = decode(packed[f"{layer.name}.weight"])
    gguf_file.write(model, tmp_path / "small.gguf", packed=packed)
    matrices.set_weights(model, decoded)
    ours, theirs = log_probabilities(model, tokens), llama_cpp_log_probabilities(tmp_path / "small.gguf", tokens)
    assert divergence(ours, theirs) < 0.2 * divergence(full, ours)  # it rounds inputs of products to 8 bits
