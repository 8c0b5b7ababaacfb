"""The file types of a real llama.cpp: its bytes, its weights, and its importance matrix."""

import pathlib
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from omegaconf import OmegaConf
from torch import Tensor

from nashswarm.calibration.cache import Cache
from nashswarm.calibration.session import CalibrationSession
from nashswarm.errors import MissingPackage, Unsupported
from nashswarm.experiment import plan
from nashswarm.methods.method import Compressed, Method
from nashswarm.methods.peers import llama_cpp
from nashswarm.methods.peers.llama_cpp import IMATRIX_ONLY, TYPES, LlamaCpp
from nashswarm.models import gguf_architectures, gguf_file, matrices
from tests.models.test_gguf_file import build, divergence, llama_cpp_log_probabilities, log_probabilities

WIDE = {  # of which every type of llama.cpp can pack every row
    "vocab_size": 300, "hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 1, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "initializer_range": 0.1, "bos_token_id": 0,
    "eos_token_id": 0,
}  # fmt: skip
BYTES = {"Q2_K": 84, "Q3_K": 110, "Q4_K": 144, "Q6_K": 210, "Q4_0": 144, "IQ2_XXS": 66, "IQ4_XS": 136}  # of 256 weights


@pytest.fixture
def installed() -> None:
    """Skip the test without a real llama.cpp."""
    pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed: pip install 'nashswarm[llamacpp]'")


@pytest.fixture(scope="module")
def wide() -> Any:
    return build(transformers.LlamaConfig(**WIDE, tie_word_embeddings=True))


def session_of(model: Any, exclude: tuple[str, ...] = ()) -> CalibrationSession:
    windows = torch.randint(300, (5, 24), generator=torch.Generator().manual_seed(1))
    return CalibrationSession(model, matrices.find_layers(model, exclude), windows, windows, 0, Cache(None, {}))


def compress(method: LlamaCpp, model: Any, exclude: tuple[str, ...] = ()) -> Compressed:
    return method.compress(session_of(model, exclude).context(), np.random.default_rng(0))


def types_of(result: Compressed) -> dict[str, str]:
    """Return the type of every tensor that the allocation names."""
    return dict(line.split() for line in result.allocation.splitlines())


def weighted_error(result: Compressed, model: Any) -> dict[str, float]:
    """Return Σ E[x²] (error)² of every matrix that multiplies."""
    session = session_of(model)
    moments = session.moments()
    return {
        layer.name: float(((result.weights[layer.name] - layer.weight) ** 2 @ moments[name].inputs.diagonal()).sum())
        for layer in session.layers
        for name in layer.modules
        if not moments[name].lookup
    }


def test_code_width_of_every_type_is_that_of_its_name() -> None:
    assert {llama_cpp.code_width(kind) for kind in TYPES.values()} == {1, 2, 3, 4, 5, 6, 8}


@pytest.mark.parametrize("kind", IMATRIX_ONLY)
def test_type_that_needs_an_importance_matrix_is_refused_without(kind: str) -> None:
    with pytest.raises(Unsupported, match=f"method.type={kind}: llama.cpp refuses it without method.imatrix=true"):
        LlamaCpp(kind, imatrix=False)
    assert LlamaCpp(kind).imatrix


@pytest.mark.parametrize(
    "options, message",
    [({"type": "Q9_K"}, "unknown method.type 'Q9_K'"), ({"embedding": "large"}, "unknown method.embedding 'large'")],
)
def test_unknown_settings_raise(options: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LlamaCpp(**options)


def test_compress_without_the_library_says_how_to_install_it(wide: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(setting: str, packages: Any, extra: str) -> None:
        raise MissingPackage(f"{setting} needs {', '.join(packages)}: pip install 'nashswarm[{extra}]'")

    monkeypatch.setattr(llama_cpp, "require", missing)
    with pytest.raises(MissingPackage, match=r"method\.type=Q4_0 needs gguf, llama-cpp-python: .*\[llamacpp\]"):
        compress(LlamaCpp("Q4_0"), wide)


@pytest.mark.usefixtures("installed")
def test_compress_model_of_another_architecture_raises(random_model: Any) -> None:
    with pytest.raises(ValueError, match="OPTForCausalLM cannot be written as GGUF"):
        compress(LlamaCpp("Q4_0"), random_model("opt"))


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize("kind", ["Q2_K", "Q3_K_M", "Q4_0", "IQ2_XXS", "IQ4_XS"])
def test_compress_counts_the_bytes_of_the_file(kind: str, wide: Any) -> None:
    method = LlamaCpp(kind)
    assert isinstance(method, Method)
    session = session_of(wide)
    result = method.compress(session.context(), np.random.default_rng(0))
    types = types_of(result)
    assert list(types) == [layer.name for layer in session.layers] and result.foreign == "llama.cpp"
    for layer in session.layers:
        if types[layer.name] in BYTES:
            assert len(result.packed[layer.name]) == BYTES[types[layer.name]] * layer.parameters // 256
    packed = sum(len(content) for content in result.packed.values())
    weights = sum(layer.parameters for layer in session.layers)
    assert result.metrics == {"bits_per_weight_resident": 8 * packed / weights}
    assert result.file_bytes is not None and packed < result.file_bytes < packed + 6000  # a header of some keys
    _, sizes = session.store(result.packed, result.weights, result.float_bits, result.file_bytes)
    assert sizes["bytes_file"] == result.file_bytes
    assert TYPES[kind] in types.values()


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize("kind", ["Q3_K_S", "Q4_0", "IQ2_XXS", "Q4_K_M"])
def test_compress_weights_are_those_that_llama_cpp_multiplies_by(kind: str, wide: Any, tmp_path: pathlib.Path) -> None:
    """llama.cpp rounds inputs of products to 8 bits, the harness does not: a small part of the damage."""
    tokens = torch.randint(300, (48,), generator=torch.Generator().manual_seed(2))
    full = log_probabilities(wide, tokens)
    session = session_of(wide)
    context, names = session.context(), gguf_architectures.layout(wide).names
    importance = {
        names[f"{layer.name}.weight"]: llama_cpp.column_importance(layer, context.moments()) for layer in session.layers
    }
    gguf_file.write(wide, tmp_path / "full.gguf", "float32")
    llama_cpp.quantize_file(tmp_path / "full.gguf", tmp_path / "small.gguf", kind, importance, {})
    result = LlamaCpp(kind).compress(context, np.random.default_rng(0))
    assert result.file_bytes == (tmp_path / "small.gguf").stat().st_size
    session.store(result.packed, result.weights, result.float_bits)
    ours = log_probabilities(session.candidate_model, tokens)
    theirs = llama_cpp_log_probabilities(tmp_path / "small.gguf", tokens)
    assert divergence(ours, theirs) < 0.1 * divergence(full, ours)
    gguf_file.write(session.candidate_model, tmp_path / "decoded.gguf", "float32")
    exactly = llama_cpp_log_probabilities(tmp_path / "decoded.gguf", tokens)
    assert abs(divergence(ours, exactly)) < 1e-6


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize("kind", ["Q4_0", "Q3_K_S"])
def test_compress_with_importance_matrix_lowers_the_error_that_inputs_weigh(kind: str, wide: Any) -> None:
    with_matrix, without = (weighted_error(compress(LlamaCpp(kind, imatrix), wide), wide) for imatrix in (True, False))
    assert sum(with_matrix.values()) < 0.95 * sum(without.values())


@pytest.mark.usefixtures("installed")
def test_compress_embedding_takes_the_type_that_is_asked_for(wide: Any) -> None:
    default, same = (types_of(compress(LlamaCpp("Q3_K_S", embedding=choice), wide)) for choice in ("default", "same"))
    assert default.pop("model.embed_tokens") == "Q6_K" and same.pop("model.embed_tokens") == "Q3_K"
    assert default == same and set(same.values()) == {"Q3_K"}


@pytest.mark.usefixtures("installed")
def test_compress_narrow_rows_take_a_larger_type(random_model: Any) -> None:
    """Rows of 64 and 128 weights hold no block of 256."""
    model = random_model("llama")
    types = types_of(compress(LlamaCpp("IQ2_XXS", embedding="same"), model))
    assert types["lm_head"] == types["model.embed_tokens"] == "IQ4_NL"


@pytest.mark.usefixtures("installed")
def test_compress_excluded_matrix_stays_as_it_is(wide: Any) -> None:
    some = compress(LlamaCpp("Q4_0"), wide, ("*q_proj",))
    every = compress(LlamaCpp("Q4_0"), wide)
    assert set(every.weights) - set(some.weights) == {"model.layers.0.self_attn.q_proj"}
    assert some.file_bytes is not None and every.file_bytes is not None
    assert some.file_bytes - every.file_bytes == 256 * 256 * 32 // 8 - 256 * 144


@pytest.mark.usefixtures("installed")
def test_quantize_file_that_llama_cpp_cannot_read_gives_its_message(tmp_path: pathlib.Path) -> None:
    (tmp_path / "full.gguf").write_bytes(b"no model")
    with pytest.raises(ValueError, match=r"llama\.cpp could not quantize to Q4_0: .*failed to"):
        llama_cpp.quantize_file(tmp_path / "full.gguf", tmp_path / "small.gguf", "Q4_0", {}, {})


def test_column_importance_of_a_lookup_is_even(wide: Any) -> None:
    session = session_of(build(transformers.LlamaConfig(**WIDE, tie_word_embeddings=False)))
    moments = session.moments()
    embedding, head = session.layers[0], session.layers[-1]
    assert torch.equal(llama_cpp.column_importance(embedding, moments), torch.ones(256))
    expected: Tensor = moments["lm_head"].inputs.diagonal()
    assert head.name == "lm_head" and torch.equal(llama_cpp.column_importance(head, moments), expected)


def test_finetune_of_what_llama_cpp_packs_is_refused() -> None:
    config = OmegaConf.create({"task": "finetune", "finetune": {}, "dtype": "float32"})
    with pytest.raises(Unsupported, match=r"task=finetune cannot train what llama\.cpp packs"):
        plan.choose_task(config, LlamaCpp())
