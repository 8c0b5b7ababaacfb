"""Compressed models on disk: transformers' own functions give the same bits back, or an error says why not."""

import copy
import json
import logging
import pathlib
import shutil
from collections.abc import Callable
from typing import Any

import numpy as np
import peft
import pytest
import safetensors.torch
import torch
import transformers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as some
from torch import Tensor
from transformers.pytorch_utils import Conv1D

from nashswarm.kernels import tiles as layout
from nashswarm.kernels import trellis
from nashswarm.kernels.trellis import Trellis
from nashswarm.models.matrices import find_layers, round_to_stored, set_weights, uncompressed_tensors
from nashswarm.packed import checkpoint, file_format
from nashswarm.packed.file_format import NashSwarmConfig
from nashswarm.packed.matrix import PackedMatrix, TileMatrix
from nashswarm.packed.modules import QuantizedEmbedding, QuantizedLinear, set_activations
from nashswarm.quant.entropy import CodeTables
from nashswarm.quant.grid import Scheme, quantize
from nashswarm.quant.pack import pack
from nashswarm.quant.prototype import quantize_by_magnitude

KINDS = ("gpt2", "llama", "llama_tied", "opt", "bert", "bert_encoder")
FORMATS = ("tiles", "groups", "lattice", "paths", "trellis")
CASES = [("gpt2", form) for form in FORMATS]
CASES += [("llama", "tiles"), ("llama_tied", "lattice"), ("opt", "groups"), ("bert", "tiles")]
CASES += [("bert_encoder", "lattice"), ("bert_classifier", "groups")]
CASES += [("llama_tied", "trellis"), ("bert_encoder", "trellis")]
CASES += [("gpt_neox", "lattice")]  # is stored under other names elsewhere
OTHER_CASES = [(kind, form) for kind in KINDS for form in FORMATS if (kind, form) not in CASES]
FILES = ["config.json", "model.safetensors"]

Packed = Callable[..., dict[str, np.ndarray]]


@torch.no_grad()
def outputs(model: Any, windows: Tensor) -> Tensor:
    """Logits, or the last hidden states of an encoder."""
    output = model(input_ids=windows)
    return output.logits if "logits" in output else output.last_hidden_state


def compressed(model: Any, packed: dict[str, np.ndarray], exclude: tuple[str, ...] = (), float_bits: int = 16) -> Any:
    """A copy of ``model`` with these matrices in the place of its own."""
    copied = copy.deepcopy(model)
    checkpoint.adopt(copied, find_layers(copied, exclude), packed, float_bits)
    return copied


def loaded(model: Any, folder: pathlib.Path, **options: Any) -> Any:
    """By the class that it was saved from."""
    return getattr(transformers, type(model).__name__).from_pretrained(folder, **options)


def floats_of(tensor: Any) -> Tensor:
    """The weights that a decoded matrix stands for."""
    return trellis.dequantize(tensor) if isinstance(tensor, Trellis) else tensor.dequantize()


def contents(folder: pathlib.Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.fixture(
    scope="module",
    params=[*CASES, *(pytest.param(case, marks=pytest.mark.slow) for case in OTHER_CASES)],
    ids="-".join,
)
def saved(
    request: pytest.FixtureRequest,
    random_model: Callable[[str], Any],
    packed: Packed,
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[Any, Any, dict[str, np.ndarray], pathlib.Path]:
    """Full model, compressed one, its packed matrices, and the folder that it was saved in."""
    kind, form = request.param
    full = random_model(kind)
    matrices = packed(full, form)
    small, folder = compressed(full, matrices), tmp_path_factory.mktemp("saved")
    small.save_pretrained(folder)
    return full, small, matrices, folder


def test_from_pretrained_computes_same_bits(saved: Any, token_windows: Tensor) -> None:
    full, small, matrices, folder = saved
    again = loaded(full, folder)
    assert isinstance(again, type(full)) and not again.training
    for activations in ("int8", "float32"):
        for model in (small, again):
            set_activations(model, activations)
        assert torch.equal(outputs(again, token_windows), outputs(small, token_windows))
    # in float32 it is the full model with the decoded weights, put there by hand
    by_hand = copy.deepcopy(full)
    layers = find_layers(by_hand)
    tables = CodeTables.unpack(matrices["code_tables"]) if "code_tables" in matrices else None
    decoded = {layer.name: file_format.decode(layer.name, matrices[layer.name], tables) for layer in layers}
    floats = {name: floats_of(tensor) for name, tensor in decoded.items()}
    round_to_stored(uncompressed_tensors(by_hand, layers), 16)
    set_weights(by_hand, floats)
    expected = outputs(by_hand, token_windows)
    assert (outputs(again, token_windows) - expected).abs().max() <= 1e-4 * expected.abs().max()
    for layer in layers:
        matrix = again.get_submodule(layer.name).matrix
        assert np.array_equal(matrix.encode(), matrices[layer.name])
        if isinstance(matrix, TileMatrix):
            assert torch.equal(matrix.tensor().codes, decoded[layer.name].codes)
        assert torch.equal(again.get_submodule(layer.name).weight, floats[layer.name])
        for name in layer.modules:
            assert again.get_submodule(name).matrix is again.get_submodule(layer.name).matrix


def test_save_pretrained_again_gives_same_bytes(saved: Any, tmp_path: pathlib.Path) -> None:
    full, small, _, folder = saved
    for number, model in enumerate((small, loaded(full, folder))):
        model.save_pretrained(tmp_path / str(number))
        assert contents(tmp_path / str(number)) == contents(folder)


def test_checkpoint_files_equal_saved_files(saved: Any) -> None:
    full, _, matrices, folder = saved
    others = uncompressed_tensors(full, find_layers(full))
    predicted = file_format.checkpoint_files(full, matrices, others, 16)
    written = contents(folder)
    assert sorted(predicted) == FILES and predicted == {name: written[name] for name in FILES}
    assert set(written) - set(FILES) <= {"generation_config.json"}
    assert not any(b"pickle" in name.encode() or name.endswith((".bin", ".pt", ".pkl")) for name in written)


def test_from_pretrained_of_shards_equals_whole(saved: Any, tmp_path: pathlib.Path, token_windows: Tensor) -> None:
    full, small, _, folder = saved
    small.save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    shards = sorted((tmp_path / "shards").glob("model-*.safetensors"))
    assert len(shards) > 2 and (tmp_path / "shards/config.json").read_bytes() == (folder / "config.json").read_bytes()
    again = loaded(full, tmp_path / "shards")
    assert torch.equal(outputs(again, token_windows), outputs(loaded(full, folder), token_windows))
    again.save_pretrained(tmp_path / "whole")
    assert contents(tmp_path / "whole") == contents(folder)
    shards[1].unlink()
    with pytest.raises((OSError, ValueError), match=shards[1].name):
        loaded(full, tmp_path / "shards")


def test_dequantize_gives_plain_model(saved: Any, tmp_path: pathlib.Path, token_windows: Tensor) -> None:
    full, small, _, folder = saved
    plain = loaded(full, folder)
    expected = {name: plain.get_submodule(name).weight for name in (layer.name for layer in find_layers(full))}
    plain.dequantize()
    assert not any(isinstance(module, (PackedMatrix, QuantizedLinear)) for module in plain.modules())
    for (name, module), (_, before) in zip(plain.named_modules(), full.named_modules(), strict=True):
        assert type(module) is type(before), name
    for layer in find_layers(plain):
        assert torch.equal(layer.weight, expected[layer.name])
    assert [layer.modules for layer in find_layers(plain)] == [layer.modules for layer in find_layers(full)]
    plain.save_pretrained(tmp_path)
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())
    again = loaded(full, tmp_path)
    assert torch.equal(outputs(again, token_windows), outputs(plain, token_windows))
    set_activations(small, "float32")
    dequantized, computed = outputs(plain, token_windows), outputs(small, token_windows)
    assert (dequantized - computed).abs().max() <= 1e-4 * computed.abs().max()


@pytest.mark.parametrize("dtype", [None, torch.float16])
def test_dequantize_gives_one_dtype(
    dtype: torch.dtype | None, folder: pathlib.Path, tmp_path: pathlib.Path, token_windows: Tensor
) -> None:
    model = load(folder)
    model.save_pretrained(tmp_path)  # from then on its config names its dtype by a string
    model.config.dtype = torch.bfloat16
    plain = model.dequantize(dtype=dtype) if dtype else model.dequantize()
    assert {part.dtype for part in plain.parameters()} == {dtype or torch.float32}
    assert outputs(plain, token_windows).dtype == (dtype or torch.float32)


@pytest.fixture(scope="module")
def folder(
    random_model: Callable[[str], Any], packed: Packed, tmp_path_factory: pytest.TempPathFactory
) -> pathlib.Path:
    """A lattice GPT-2; not to be changed."""
    full = random_model("gpt2")
    path = tmp_path_factory.mktemp("gpt2")
    compressed(full, packed(full, "lattice")).save_pretrained(path)
    return path


@pytest.fixture
def damaged(folder: pathlib.Path, tmp_path: pathlib.Path) -> pathlib.Path:
    """A copy that a test may change."""
    return pathlib.Path(shutil.copytree(folder, tmp_path / "model"))


def load(folder: pathlib.Path) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(folder)


def described(folder: pathlib.Path, **changes: Any) -> None:
    """Change what config.json says of the format."""
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"] |= changes
    path.write_text(json.dumps(config))


def resealed(folder: pathlib.Path, tensors: dict[str, Tensor]) -> None:
    """Other tensors, and the checksum that belongs to them."""
    safetensors.torch.save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    described(folder, checksum=file_format.checksum(tensors))


def test_from_pretrained_never_dequantizes(folder: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*arguments: Any) -> Tensor:
        raise AssertionError("a matrix was dequantized")

    for name in ("dequantize", "grid_values"):
        monkeypatch.setattr(layout, name, never)
    model = load(folder)
    largest = max(part.numel() for part in (*model.parameters(), *model.buffers()) if part.dtype.is_floating_point)
    assert largest <= 512  # scales and norms, not matrices
    assert model.num_parameters() < 10_000


def test_from_pretrained_without_head_keeps_base_model(
    saved: Any, token_windows: Tensor, caplog: pytest.LogCaptureFixture
) -> None:
    full, small, _, folder = saved
    if type(full).__name__ in ("BertModel", "BertForMaskedLM", "BertForSequenceClassification"):
        options = {"add_pooling_layer": False} if "MaskedLM" in type(full).__name__ else {}
        base = transformers.BertModel.from_pretrained(folder, **options)
        inner = getattr(small, "bert", small)
    else:
        base, inner = transformers.AutoModel.from_pretrained(folder), small.base_model
    set_activations(base, "int8")
    set_activations(small, "int8")
    packed = [module for module in base.modules() if isinstance(module, (QuantizedLinear, QuantizedEmbedding))]
    assert len(packed) == sum(isinstance(module, (QuantizedLinear, QuantizedEmbedding)) for module in inner.modules())
    with torch.no_grad():
        states, expected = (model(input_ids=token_windows).last_hidden_state for model in (base, inner))
    assert torch.equal(states, expected)


def test_from_pretrained_other_version_refused(damaged: pathlib.Path) -> None:
    described(damaged, version=2)
    with pytest.raises(ValueError, match="stored in version 2 of the nashswarm format, this program reads version 1"):
        load(damaged)


@pytest.mark.parametrize("left", [-1, 0, 4, 100, 5000])
def test_from_pretrained_truncated_file_refused(damaged: pathlib.Path, left: int) -> None:
    path = damaged / "model.safetensors"
    path.write_bytes(path.read_bytes()[:left])
    with pytest.raises(ValueError, match=r"model\.safetensors is cut short or damaged \(.*\); copy it again"):
        load(damaged)


def test_from_pretrained_changed_byte_refused(folder: pathlib.Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Also in the header, and in what was never packed: biases and norms."""
    whole = (folder / "model.safetensors").read_bytes()
    header = 8 + int.from_bytes(whole[:8], "little")
    target = pathlib.Path(shutil.copytree(folder, tmp_path_factory.mktemp("changed") / "model"))
    layers = json.loads(whole[8:header])
    norm = header + layers["transformer.ln_f.weight"]["data_offsets"][0] + 5
    kinds = [whole.index(b'"F16"') + 1, whole.index(b'"U8"') + 1]  # where a byte turns floats into integers

    def check(place: int, value: int) -> None:
        content = bytearray(whole)
        content[place] = value if content[place] != value else value ^ 1
        (target / "model.safetensors").write_bytes(content)
        with pytest.raises((ValueError, OSError), match=r"model\.safetensors|format|metadata"):
            load(target)

    @settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
    @given(some.integers(0, len(whole) - 1), some.integers(0, 255))
    def anywhere(place: int, value: int) -> None:
        check(place, value)

    @settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
    @given(some.integers(0, header - 1), some.integers(32, 126))
    def in_the_header(place: int, value: int) -> None:
        check(place, value)

    check(norm, 0x7F)
    check(whole.index(b'"pt"') + 1, ord("n"))
    if whole[header - 1] == ord(" "):
        check(header - 1, ord("\t"))
    check(kinds[0], ord("I"))
    check(kinds[1], ord("I"))
    anywhere()
    in_the_header()


def test_from_pretrained_changed_byte_with_new_checksum_refused_by_matrix(damaged: pathlib.Path) -> None:
    tensors = safetensors.torch.load_file(damaged / "model.safetensors")
    tensors = {name: part.clone() for name, part in tensors.items()}
    tensors["transformer.h.1.mlp.c_fc.weight"][100] ^= 1
    resealed(damaged, tensors)
    with pytest.raises(ValueError, match=r"transformer\.h\.1\.mlp\.c_fc cannot be read: the checksum .* is wrong"):
        load(damaged)


def test_from_pretrained_without_code_tables_refused(damaged: pathlib.Path) -> None:
    tensors = safetensors.torch.load_file(damaged / "model.safetensors")
    del tensors["code_tables"]
    safetensors.torch.save_file(tensors, damaged / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"damaged, or not the files that belong to this config\.json"):
        load(damaged)
    resealed(damaged, tensors)
    with pytest.raises(ValueError, match="cannot be read: the file lacks code_tables"):
        load(damaged)


def test_from_pretrained_without_file_refused(damaged: pathlib.Path) -> None:
    (damaged / "model.safetensors").unlink()
    with pytest.raises(OSError, match=r"model\.safetensors"):
        load(damaged)


def test_from_pretrained_weights_of_other_model_refused(
    damaged: pathlib.Path, random_model: Callable[[str], Any], packed: Packed, tmp_path: pathlib.Path
) -> None:
    other = random_model("llama")
    compressed(other, packed(other, "tiles")).save_pretrained(tmp_path / "other")
    shutil.copy(tmp_path / "other/model.safetensors", damaged)
    with pytest.raises(ValueError, match=r"not the files that belong to this config\.json; copy the whole folder"):
        load(damaged)


def test_from_pretrained_matrix_of_other_shape_refused(damaged: pathlib.Path) -> None:
    """With every checksum mended: the matrix says itself how large it is."""
    tensors = dict(safetensors.torch.load_file(damaged / "model.safetensors"))
    name = "transformer.h.0.mlp.c_fc"
    tensors[f"{name}.weight"] = torch.from_numpy(pack(quantize(torch.randn(256, 32), 4, Scheme(32))).copy())
    resealed(damaged, tensors)
    with pytest.raises(ValueError, match=f"{name} is stored as 256x32, the model has it as 256x64"):
        load(damaged)


def test_from_pretrained_unsupported_format_kept_as_floats(
    random_model: Callable[[str], Any], tmp_path: pathlib.Path, caplog: pytest.LogCaptureFixture, token_windows: Tensor
) -> None:
    full = random_model("gpt2")
    layers = {layer.name: layer for layer in find_layers(full)}
    odd = {
        "transformer.h.0.attn.c_attn": quantize(layers["transformer.h.0.attn.c_attn"].weight, 16, Scheme(64)),
        "transformer.h.0.mlp.c_fc": quantize(layers["transformer.h.0.mlp.c_fc"].weight, 4, Scheme(16)),
    }
    published = quantize_by_magnitude(layers["transformer.wte"].weight, (0.9, 0.7))
    packed = {name: pack(quantize(layer.weight, 4, Scheme(64))) for name, layer in layers.items()}
    packed |= {name: pack(tensor) for name, tensor in odd.items()} | {"transformer.wte": published.pack()}
    files = file_format.checkpoint_files(full, packed, uncompressed_tensors(full, list(layers.values())), 16)
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    with caplog.at_level(logging.WARNING):
        model = load(tmp_path)
    said = "kernels cannot read the format of 3 matrices, kept as floats: "
    lines = [record.getMessage() for record in caplog.records if record.name == "nashswarm.packed.checkpoint"]
    assert [line.startswith(said) for line in lines] == [True]
    assert set(lines[0].removeprefix(said).split(", ")) == {*odd, "transformer.wte"}
    assert type(model.transformer.h[0].attn.c_attn) is Conv1D and type(model.transformer.wte) is torch.nn.Embedding
    assert model.lm_head.weight is model.transformer.wte.weight
    assert torch.equal(model.transformer.wte.weight, published.dequantize())
    for name, tensor in odd.items():
        assert torch.equal(model.get_submodule(name).weight.T, tensor.dequantize())
    assert isinstance(model.transformer.h[1].mlp.c_fc, QuantizedLinear)
    assert outputs(model, token_windows).isfinite().all()


def test_adopt_with_exclude_keeps_floats(
    random_model: Callable[[str], Any], packed: Packed, tmp_path: pathlib.Path, token_windows: Tensor
) -> None:
    full, exclude = random_model("gpt2"), ("lm_head", "*.0.mlp.*")
    small = compressed(full, packed(full, "lattice", exclude), exclude)
    small.save_pretrained(tmp_path)
    again = load(tmp_path)
    assert torch.equal(outputs(again, token_windows), outputs(small, token_windows))
    excluded = again.transformer.h[0].mlp.c_fc
    assert type(excluded) is Conv1D and torch.equal(
        excluded.weight, full.transformer.h[0].mlp.c_fc.weight.half().float()
    )
    assert again.lm_head.weight is again.transformer.wte.weight
    stored = safetensors.torch.load_file(tmp_path / "model.safetensors")
    assert stored["transformer.wte.weight"].dtype == torch.float16 and "lm_head.weight" not in stored


@pytest.mark.parametrize("float_bits", [16, 32])
def test_adopt_rounds_other_tensors_to_float_bits(
    float_bits: int, random_model: Callable[[str], Any], packed: Packed, tmp_path: pathlib.Path
) -> None:
    full = random_model("gpt2")
    small = compressed(full, packed(full, "tiles"), float_bits=float_bits)
    small.save_pretrained(tmp_path)
    expected = full.transformer.ln_f.weight
    again = load(tmp_path)
    assert torch.equal(again.transformer.ln_f.weight, expected if float_bits == 32 else expected.half().float())
    again.save_pretrained(tmp_path / "again")
    assert contents(tmp_path / "again")["model.safetensors"] == (tmp_path / "model.safetensors").read_bytes()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_from_pretrained_in_half_precision_saves_and_loads(
    dtype: torch.dtype,
    random_model: Callable[[str], Any],
    packed: Packed,
    tmp_path: pathlib.Path,
    token_windows: Tensor,
) -> None:
    full = random_model("gpt2")
    compressed(full, packed(full, "groups")).save_pretrained(tmp_path / "whole")
    half, whole = (
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "whole", dtype=kind)
        for kind in (dtype, torch.float32)
    )
    assert half.dtype == dtype and outputs(half, token_windows).dtype == dtype
    computed, expected = outputs(half, token_windows).float(), outputs(whole, token_windows)
    assert (computed - expected).norm() < 0.05 * expected.norm()
    half.save_pretrained(tmp_path)
    again = load(tmp_path)
    assert again.dtype == dtype and torch.equal(outputs(again, token_windows), outputs(half, token_windows))
    for name, module in half.named_modules():
        if isinstance(module, PackedMatrix):
            assert torch.equal(module.payload, whole.get_submodule(name).payload)


def test_deepcopy_saves_same_bytes(folder: pathlib.Path, tmp_path: pathlib.Path) -> None:
    model = load(folder)
    copy.deepcopy(model).save_pretrained(tmp_path)
    assert contents(tmp_path) == contents(folder)


def test_generate_matches_greedy_loop(folder: pathlib.Path, token_windows: Tensor) -> None:
    model = load(folder)
    generated = model.generate(token_windows[:1, :8], max_new_tokens=5, do_sample=False, eos_token_id=None)
    tokens = token_windows[:1, :8]
    for _ in range(5):
        tokens = torch.cat([tokens, outputs(model, tokens)[:, -1:].argmax(-1)], 1)
    assert torch.equal(generated, tokens)


def test_from_pretrained_compressing_while_loading_refused(model_folder: pathlib.Path) -> None:
    with pytest.raises(ValueError, match="require the model to be pre-quantized"):
        transformers.AutoModelForCausalLM.from_pretrained(model_folder, quantization_config=NashSwarmConfig())


def test_adopt_unreadable_bytes_refused(model: Any, packed: Packed) -> None:
    matrices = packed(model, "groups")
    matrices["transformer.h.0.mlp.c_fc"] = np.zeros(3, np.uint8)
    with pytest.raises(ValueError, match=r"transformer\.h\.0\.mlp\.c_fc cannot be read"):
        checkpoint.adopt(model, find_layers(model), matrices)


def test_checksum_covers_all_but_order() -> None:
    tensors = {"a": torch.arange(4, dtype=torch.float16), "b": torch.zeros(2, 2)}
    whole = file_format.checksum(tensors)
    assert file_format.checksum(dict(reversed(tensors.items()))) == whole and len(whole) == 8
    for changed in (
        {"a": tensors["a"], "c": tensors["b"]},
        tensors | {"b": torch.zeros(4)},
        tensors | {"b": torch.zeros(2, 2, dtype=torch.int32)},
        tensors | {"a": tensors["a"] + 1},
        {"a": tensors["a"]},
    ):
        assert file_format.checksum(changed) != whole


@pytest.fixture
def tuned(folder: pathlib.Path) -> Any:
    """The compressed model with fresh adapters."""
    torch.manual_seed(0)
    config = peft.LoraConfig(r=4, target_modules=["c_attn", "c_fc"], task_type="CAUSAL_LM")
    return peft.get_peft_model(load(folder), config)


def test_adapters_train_on_packed_model(tuned: Any, token_windows: Tensor, tmp_path: pathlib.Path) -> None:
    base = tuned.get_base_model()
    before = {name: part.clone() for name, part in base.named_buffers()}
    fixed = {name: part.clone() for name, part in tuned.named_parameters() if not part.requires_grad}
    moving = [part for part in tuned.parameters() if part.requires_grad]
    assert sum(part.numel() for part in moving) == 2 * 4 * ((64 + 192) + (64 + 256))
    optimizer, losses = torch.optim.AdamW(moving, lr=0.02), []
    for _ in range(12):
        loss = tuned(input_ids=token_windows, labels=token_windows).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0] and losses[-1] == min(losses)
    assert before.keys() == dict(base.named_buffers()).keys()
    assert all(torch.equal(part, before[name]) for name, part in base.named_buffers())
    assert all(torch.equal(dict(tuned.named_parameters())[name], part) for name, part in fixed.items())
    tuned.save_pretrained(tmp_path)
    assert sorted(path.name for path in tmp_path.glob("*.safetensors")) == ["adapter_model.safetensors"]


def test_adapters_load_on_packed_model(
    tuned: Any, folder: pathlib.Path, tmp_path: pathlib.Path, token_windows: Tensor
) -> None:
    for name, part in tuned.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(part, std=0.1)
    tuned.eval().save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(load(folder), tmp_path).eval()
    assert torch.equal(outputs(again, token_windows), outputs(tuned, token_windows))
    assert not torch.equal(outputs(again, token_windows), outputs(load(folder), token_windows))


@pytest.mark.parametrize("safe", [False, True])
def test_adapters_merge_into_packed_weights_refused(tuned: Any, safe: bool) -> None:
    with pytest.raises(RuntimeError, match="packed weights cannot be changed: call the model's dequantize"):
        tuned.merge_and_unload(safe_merge=safe)
