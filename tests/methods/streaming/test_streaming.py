"""Compression by layer gives the bytes of compression in memory, also after it was killed."""

import copy
import dataclasses
import json
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import safetensors.torch
import torch
import transformers
from torch import Tensor

from nashswarm import memory
from nashswarm.cli import main
from nashswarm.methods.streaming import compress, forecast, layout, shards, skeleton
from nashswarm.methods.streaming.settings import ByLayer
from nashswarm.models.shapes import LARGE
from nashswarm.packed.file_format import decode
from nashswarm.packed.modules import QuantizedLinear, set_activations
from nashswarm.quant.coordinate_descent import quantize_layer
from nashswarm.quant.curvature import Curvature
from nashswarm.quant.grid import Scheme, quantize

BLOCKS, WIDTH, INNER, VOCABULARY = 3, 64, 128, 512
SETTINGS = ByLayer(bits=3, group_size=64)
TOO_LARGE = {"hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 16, "num_attention_heads": 8}

Command = Callable[..., tuple[int, str, str]]


class Killed(BaseException):
    """Stands for a kill signal: no handler of errors catches it."""


def llama_config(tied: bool = False, **others: Any) -> Any:
    sizes = {"hidden_size": WIDTH, "intermediate_size": INNER, "num_hidden_layers": BLOCKS, "num_attention_heads": 4}
    tokens = {"vocab_size": VOCABULARY, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
    shape = {"num_key_value_heads": 2, "attention_bias": True, "max_position_embeddings": 64, "initializer_range": 0.1}
    return transformers.LlamaConfig(**tokens | shape | sizes | {"tie_word_embeddings": tied} | others)


def write_llama(folder: pathlib.Path, tokenizer: Any, config: Any) -> pathlib.Path:
    """Write a random LLaMA in bfloat16, in many files."""
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.1 * torch.randn(parameter.shape))
    model.bfloat16().save_pretrained(folder, max_shard_size="100KB")
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module", params=["untied", "tied"])
def folder(request: pytest.FixtureRequest, tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    path = write_llama(tmp_path_factory.mktemp("large") / "llama", tokenizer, llama_config(request.param == "tied"))
    assert (path / shards.INDEX).is_file() and len(list(path.glob("*.safetensors"))) > 2
    return path


@pytest.fixture(scope="module")
def windows() -> Tensor:
    return torch.randint(VOCABULARY, (3, 32), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def finished(
    folder: pathlib.Path, tokenizer: Any, windows: Tensor, tmp_path_factory: pytest.TempPathFactory
) -> tuple[pathlib.Path, dict[str, Any], int]:
    """The compressed model, which tests must not change, its metrics, and how often its run wrote a file."""
    out = tmp_path_factory.mktemp("small") / "llama"
    written: list[str] = []
    write_whole = compress.write_whole

    def write(path: pathlib.Path, content: bytes) -> None:
        written.append(path.name)
        write_whole(path, content)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compress, "write_whole", write)
        metrics = compress.compress(shards.open_source(folder), tokenizer, windows, out, SETTINGS)
    return out, metrics, len(written)


def model_files(folder: pathlib.Path) -> dict[str, bytes]:
    """Return the files of the model.  The description of the run is left out because it contains times."""
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.name != "nashswarm.json"}


@torch.no_grad()
def in_memory(folder: pathlib.Path, windows: Tensor, settings: ByLayer, before: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the compressed weights by the slow way: the whole model, run from its first block for every block.

    Weights that are already compressed are taken from ``before``, so that a code that differs in one block by a
    rounding error changes nothing in the next.
    """
    model: Any = transformers.LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tied = model.config.tie_word_embeddings
    embedding = model.model.embed_tokens
    full = embedding.weight.detach().clone()
    scheme = Scheme(settings.group_size, search=True)
    weights = {}
    if not tied:
        embedding.weight.copy_(quantize(full, settings.outer_bits, scheme).dequantize())
        weights["model.embed_tokens.weight"] = embedding.weight
    blocks = [f"model.layers.{number}." for number in range(BLOCKS)]
    for prefix in [*blocks, "lm_head"]:
        linear = {n: m for n, m in model.named_modules() if n.startswith(prefix) and isinstance(m, torch.nn.Linear)}
        seen: dict[str, list[Tensor]] = {name: [] for name in linear}
        handles = [
            module.register_forward_pre_hook(
                lambda _, arguments, inputs=seen[name]: inputs.append(arguments[0].flatten(0, 1))
            )
            for name, module in linear.items()
        ]
        for window in windows:
            model(input_ids=window.unsqueeze(0))
        for handle in handles:
            handle.remove()
        for name, module in linear.items():
            products = sum(x.T @ x for x in seen[name]) / sum(map(len, seen[name]))
            curvature = Curvature(torch.ones(module.out_features), products, None)
            bits = settings.outer_bits if name == "lm_head" else settings.bits
            stored_name = "model.embed_tokens.weight" if tied and name == "lm_head" else f"{name}.weight"
            weights[stored_name] = quantize_layer(module.weight, bits, scheme, curvature, settings.sweeps).dequantize()
            module.weight.copy_(before[stored_name])  # a tied head is the embedding too, which is not read again
    return weights


def decoded(folder: pathlib.Path) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for path in folder.glob("model*.safetensors"):
        tensors |= safetensors.torch.load_file(path)
    return {
        name: decode(name, part.numpy(), None).dequantize()
        for name, part in tensors.items()
        if part.dtype == torch.uint8
    }


def test_compress_equals_compression_in_memory(folder: pathlib.Path, windows: Tensor, finished: Any) -> None:
    weights = decoded(finished[0])
    expected = in_memory(folder, windows, SETTINGS, weights)
    assert set(expected) == set(weights)
    for name, weight in expected.items():  # sums of products are rounded in another order; a code may differ by a step
        same = (weights[name] - weight).abs() < 1e-6
        assert same.float().mean() > 0.995, name
    error = sum((weights[name] - weight).square().sum() for name, weight in expected.items())
    plain = safetensors.torch.load_file(next(folder.glob("model-00001*")))
    assert error < 1e-3 * sum(weight.square().sum() for weight in expected.values()) and plain


def test_compress_outputs_beat_plain_rounding(folder: pathlib.Path, windows: Tensor, finished: Any) -> None:
    """The outputs of the whole model, against rounding the same weights to nearest at the same widths."""
    full = transformers.LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    rounded, small = copy.deepcopy(full), transformers.LlamaForCausalLM.from_pretrained(finished[0])
    set_activations(small, "float32")
    with torch.no_grad():
        for module in rounded.modules():
            if isinstance(module, torch.nn.Linear):
                bits = SETTINGS.outer_bits if module is rounded.get_output_embeddings() else SETTINGS.bits
                module.weight.copy_(quantize(module.weight, bits, SETTINGS.scheme).dequantize())
        logits = [model(input_ids=windows).logits for model in (full, small, rounded)]
    assert (logits[1] - logits[0]).norm() < (logits[2] - logits[0]).norm()


def test_compressed_folder_loads_and_generates(folder: pathlib.Path, finished: Any, tmp_path: pathlib.Path) -> None:
    out, metrics, _ = finished
    model = transformers.AutoModelForCausalLM.from_pretrained(out)
    tokenizer = transformers.AutoTokenizer.from_pretrained(out)
    packed = [module for module in model.modules() if isinstance(module, QuantizedLinear)]
    assert len(packed) == 7 * BLOCKS + 1
    prompt = tokenizer("the quiet flock", return_tensors="pt")
    assert model.generate(**prompt, max_new_tokens=5, do_sample=False).shape[1] <= prompt["input_ids"].shape[1] + 5
    model.save_pretrained(tmp_path)  # writes the same tensors, in one file
    saved = safetensors.torch.load_file(tmp_path / "model.safetensors")
    files = [safetensors.torch.load_file(path) for path in out.glob("model*.safetensors")]
    assert set(saved) == {name for tensors in files for name in tensors}
    assert all(torch.equal(saved[name], part) for tensors in files for name, part in tensors.items())
    assert metrics["bytes_file"] == sum(
        path.stat().st_size for path in out.iterdir() if path.name.startswith(("model", "config"))
    )
    assert metrics["starts"] == 1 and not list(out.parent.glob("*.unfinished")) and not list(out.parent.glob(".*"))


def test_layout_head_in_a_list_of_modules_takes_the_heads_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its name has a number in it, as those of decoder blocks do."""
    model = skeleton.skeleton(llama_config())
    structure = dataclasses.replace(skeleton.structure_of(model), head="heads.0")
    expected = layout.layout(model, SETTINGS)
    model.heads = torch.nn.ModuleList([model.lm_head])
    del model.lm_head
    monkeypatch.setattr(skeleton, "structure_of", lambda _: structure)
    (*_, last), (*_, found) = expected.values(), layout.layout(model, SETTINGS).values()
    assert found["heads.0.weight"].shape == last["lm_head.weight"].shape


def test_forecast_bytes_are_exact(folder: pathlib.Path, finished: Any) -> None:
    model = shards.skeleton(transformers.AutoConfig.from_pretrained(folder))
    expected = forecast.forecast(model, SETTINGS, 3, 32, forecast.Rates(1e-11, 1e-10, 1e-7, 1e-7))
    assert expected.bytes_file == finished[1]["bytes_file"] and expected.parameters == finished[1]["parameters"]
    assert expected.bits_per_weight_model == finished[1]["bits_per_weight_model"]
    assert expected.seconds > 0 and expected.bytes_states == 2 * 4 * 3 * 32 * WIDTH


@pytest.mark.parametrize("name", LARGE)
def test_forecast_large_models_equal_sums_by_hand(name: str) -> None:
    """By hand: a tile of 3 bits stores 3.3 bits per weight, one of 4 bits 4.3."""
    config = transformers.AutoConfig.for_model(**LARGE[name])
    expected = forecast.forecast(shards.skeleton(config), ByLayer(), 4, 2048, forecast.Rates(1e-11, 1e-10, 1e-7, 1e-7))
    outer = 2 * config.vocab_size * config.hidden_size
    packed = (expected.parameters - outer) * 3.296875 / 8 + outer * (4 + 20 / 64) / 8
    assert expected.bytes_file == pytest.approx(packed, rel=1e-3)
    head = config.hidden_size // config.num_attention_heads * (config.num_key_value_heads or 0)
    block = config.hidden_size * (2 * config.hidden_size + 2 * head + 3 * config.intermediate_size)
    statistics = config.intermediate_size**2 * (8 + 3 * 8) + 3 * 4 * config.hidden_size**2
    states = expected.bytes_states // 2
    assert expected.peak_bytes <= memory.peak_bytes() + 2 * 4 * block + statistics + 3 * states


@pytest.mark.slow
@pytest.mark.parametrize("position", (1, 2, 3, 4, 11, -3, 0))
def test_compress_killed_at_any_write_resumes_to_the_same_bytes(
    position: int, folder: pathlib.Path, tokenizer: Any, windows: Tensor, finished: Any, tmp_path: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Killed at the write number ``position``, counted from the last one if not positive; half a file is left."""
    out, write_whole = tmp_path / "llama", compress.write_whole
    left = [position if position > 0 else finished[2] + position]

    def write(path: pathlib.Path, content: bytes) -> None:
        left[0] -= 1
        if not left[0]:
            path.parent.mkdir(exist_ok=True)
            path.with_name(f".{path.name}.0123.partial").write_bytes(content[: len(content) // 2])
            raise Killed
        write_whole(path, content)

    monkeypatch.setattr(compress, "write_whole", write)
    source = shards.open_source(folder)
    with pytest.raises(Killed):
        compress.compress(source, tokenizer, windows, out, SETTINGS)
    assert not out.exists()
    metrics = compress.compress(source, tokenizer, windows, out, SETTINGS)
    assert metrics["starts"] == (1 if position == 1 else 2)
    assert model_files(out) == model_files(finished[0])
    assert list(tmp_path.iterdir()) == [out]


@pytest.mark.slow
@pytest.mark.parametrize("folder", ["untied"], indirect=True)
def test_command_killed_by_the_system_resumes(
    folder: pathlib.Path, tmp_path: pathlib.Path, text_file: pathlib.Path
) -> None:
    """A process with the command is sent SIGKILL while its third file is written; then the command runs again."""
    words = ["compress", str(folder), "--by-layer", "--method", "gptq", "--windows", "2", "--length", "32"]
    words += ["--calibration", str(text_file)]
    program = """
import os, signal, sys
from nashswarm.cli import main
from nashswarm.methods.streaming import compress
write_whole = compress.write_whole
def write(path, content):
    if path.name.startswith("model-00003"):
        path.with_name(f".{path.name}.0123.partial").write_bytes(content[:100])
        os.kill(os.getpid(), signal.SIGKILL)
    write_whole(path, content)
compress.write_whole = write
sys.exit(main(sys.argv[1:]))
"""
    out, again = tmp_path / "killed", tmp_path / "never"
    process = subprocess.run([sys.executable, "-c", program, *words, "--out", str(out)], capture_output=True)
    assert process.returncode == -signal.SIGKILL, process.stderr
    assert not out.exists() and len(list((tmp_path / "killed.unfinished").glob("model*"))) == 2
    assert main([*words, "--out", str(out)]) == 0 and main([*words, "--out", str(again)]) == 0
    assert model_files(out) == model_files(again)


def test_compress_finished_run_is_not_repeated(
    folder: pathlib.Path, tokenizer: Any, windows: Tensor, finished: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(compress, "compress_unit")
    assert compress.compress(shards.open_source(folder), tokenizer, windows, finished[0], SETTINGS) == finished[1]
    with pytest.raises(ValueError, match="is not an empty folder"):
        compress.compress(shards.open_source(folder), tokenizer, windows, finished[0], ByLayer(bits=4))


def test_compress_unfinished_run_with_another_key_raises(
    folder: pathlib.Path, tokenizer: Any, windows: Tensor, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, source = tmp_path / "out", shards.open_source(folder)
    with monkeypatch.context() as patch:
        patch.setattr(compress, "compress_unit", lambda *arguments: (_ for _ in ()).throw(Killed))
        with pytest.raises(Killed):
            compress.compress(source, tokenizer, windows, out, SETTINGS)
    with pytest.raises(ValueError, match="the unfinished run of another settings and another windows"):
        compress.compress(source, tokenizer, windows[:2], out, ByLayer(bits=4))
    (tmp_path / "other.unfinished").mkdir()
    (tmp_path / "other.unfinished" / "letter").write_text("dear")
    with pytest.raises(ValueError, match="is not the folder of an unfinished run"):
        compress.compress(source, tokenizer, windows, tmp_path / "other", SETTINGS)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 9, 1))
    with pytest.raises(OSError, match=r"needs [\d,]+ bytes and the disk has 1 left"):
        compress.compress(source, tokenizer, windows, tmp_path / "third", SETTINGS)
    assert not list(tmp_path.glob("*third*"))


def damage_checkpoint(folder: pathlib.Path, what: str) -> None:
    """Damage the checkpoint in ``folder`` in the way ``what``."""
    index = json.loads((folder / shards.INDEX).read_text())
    first = folder / index["weight_map"]["model.norm.weight"]
    config = json.loads((folder / "config.json").read_text())
    if what == "gone":
        first.unlink()
    elif what == "cut":
        os.truncate(first, first.stat().st_size - 1)
    elif what == "absent":
        del index["weight_map"]["model.norm.weight"]
        tensors = safetensors.torch.load_file(first)
        del tensors["model.norm.weight"]
        safetensors.torch.save_file(tensors, first)
    elif what == "index":
        (folder / shards.INDEX).write_text("{")
    elif what == "no index":
        (folder / shards.INDEX).unlink()
    elif what == "kind":
        config["model_type"] = "gpt2"
    elif what == "shape":
        config["intermediate_size"] = 192
    elif what == "columns":
        config |= {"hidden_size": 80, "head_dim": 16}
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("what", "words"),
    [
        ("gone", "lacks model-.*, which its index names"),
        ("cut", "is cut short or damaged"),
        ("absent", "lacks 1 of the model's tensors: model.norm.weight"),
        ("index", "is damaged"),
        ("no index", "holds neither"),
        ("kind", "knows decoders, and this is a LlamaForCausalLM with a config of 'gpt2': leave --by-layer out"),
        ("shape", "other shapes than its config.json says: model.layers.0.mlp.gate_proj.weight"),
    ],
)
def test_command_broken_checkpoint_is_one_sentence(
    what: str, words: str, folder: pathlib.Path, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copied = tmp_path / "copied"
    shutil.copytree(folder, copied)
    damage_checkpoint(copied, what)
    assert main(["compress", str(copied), "--by-layer", "--out", str(tmp_path / "out")]) == 2
    message = capsys.readouterr().err
    assert re.search(words, message)
    assert message.count("\n") == 1 and [path.name for path in tmp_path.iterdir()] == ["copied"]


def test_settings_that_do_not_fit_raise() -> None:
    with pytest.raises(ValueError, match="knows 2, 3, 4, 8 bits, not 5"):
        ByLayer(bits=5)
    with pytest.raises(ValueError, match="sweeps=-1"):
        ByLayer(sweeps=-1)
    narrow = shards.skeleton(llama_config(intermediate_size=96))
    with pytest.raises(
        ValueError, match=rf"columns of {BLOCKS} matrices are not divisible by 64: model.layers.0.mlp.down_proj"
    ):
        layout.layout(narrow, ByLayer())


@pytest.mark.parametrize("folder", ["tied"], indirect=True)
def test_command_plan_compress_and_inspect_agree(
    folder: pathlib.Path,
    text_file: pathlib.Path,
    tmp_path: pathlib.Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(forecast, "SAMPLE_COLUMNS", 512)
    monkeypatch.setattr(forecast, "SAMPLE_ROWS", 64)
    words = ["compress", str(folder), "--windows", "2", "--length", "32", "--calibration", str(text_file)]
    assert main([*words, "--plan", "--by-layer", "--method", "gptq"]) == 0
    planned = json.loads(capsys.readouterr().out)
    assert main([*words, "--by-layer", "--method", "gptq", "--sweeps", "2", "--out", str(tmp_path / "out")]) == 0
    metrics = json.loads(capsys.readouterr().out)
    assert planned["bytes_file"] == metrics["bytes_file"] and 0 < planned["seconds"] < 60
    assert main(["inspect", str(tmp_path / "out")]) == 0
    table = capsys.readouterr().out
    assert f"{metrics['bytes_file']:,} bytes of weights and config" in table and "groups of 64" in table
    card = (tmp_path / "out" / "README.md").read_text()
    assert f"{metrics['bytes_file']:,}" in card and "certify" not in card
    assert main(["certify", str(tmp_path / "out")]) == 2
    assert "was compressed by layer" in capsys.readouterr().err
    for more, message in (
        (["--by-layer"], "--out"),
        (["--by-layer", "--out", "x", "--method", "uniform"], "knows neither"),
        (["--by-layer", "--out", "x", "--effort", "quick"], "knows neither --exclude, --effort"),
        (["--by-layer", "--out", "x", "--bits", "2.5", "--method", "gptq"], "whole number"),
        (["--by-layer", "--out", "x", "--head-bits", "4"], "goes with --by-layer --method gptq"),
        (["--sweeps", "2", "--out", "x"], "go with --by-layer"),
    ):
        assert main([*words, *more]) == 2 and message in capsys.readouterr().err
    assert main(["compress", "llama2_7b", "--plan", "--by-layer", "--method", "gptq"]) == 0
    assert main(["compress", "llama_none", "--plan", "--by-layer"]) == 2


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="the limit is the Linux kernel's")
def test_command_memory_is_bounded_by_two_blocks(
    folder: pathlib.Path, tokenizer: Any, text_file: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    """A process compresses a model of many blocks in the memory of a tiny model, two blocks and their statistics.

    Loading the whole model in that memory fails.
    """
    config = llama_config(**TOO_LARGE, attention_bias=False)
    large = write_llama(tmp_path / "large", tokenizer, config)
    whole = 4 * sum(part.numel() for part in shards.tensors_of(shards.skeleton(config)).values())
    inner = TOO_LARGE["intermediate_size"]
    statistics = (4 + 28) * inner**2  # H, and its factors in double precision
    limit = 2 * 4 * 512 * (3 * inner + 3 * 512) + statistics + 2**25
    program = f"""
import resource, sys
from nashswarm.cli import main
import transformers.models.llama.modeling_llama
words = "--windows 2 --length 32 --by-layer --method gptq --calibration {text_file} --out {tmp_path}/".split()
assert main(["compress", {str(folder)!r}, *words[:-1], words[-1] + sys.argv[2]]) == 0
used = next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmData:")) * 1024
limit = used + int(sys.argv[1])
resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
if sys.argv[2] == "whole":
    import torch
    transformers.LlamaForCausalLM.from_pretrained({str(large)!r}, dtype=torch.float32)
else:
    sys.exit(main(["compress", {str(large)!r}, *words[:-1], words[-1] + "out"]))
"""
    processes = {
        what: subprocess.run([sys.executable, "-c", program, str(limit), what], capture_output=True, text=True)
        for what in ("whole", "parts")
    }
    assert limit < whole and processes["whole"].returncode != 0
    assert processes["parts"].returncode == 0, processes["parts"].stderr
