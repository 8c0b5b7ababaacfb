"""Compression by layer: what it writes is what a model in memory would have become, wherever it was killed."""

import copy
import json
import os
import pathlib
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
from nashswarm.methods.streaming import compress, forecast, shards
from nashswarm.methods.streaming.compress import ByLayer
from nashswarm.models.shapes import LARGE
from nashswarm.packed.file_format import decode
from nashswarm.packed.modules import QuantizedLinear, set_activations
from nashswarm.quant.coordinate_descent import quantize_layer
from nashswarm.quant.curvature import Curvature
from nashswarm.quant.grid import Scheme, quantize
from nashswarm.records import files as record

BLOCKS, WIDTH, INNER, VOCABULARY = 4, 64, 128, 512
SETTINGS = ByLayer(bits=3, group_size=64)
TOO_LARGE = {"hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 16, "num_attention_heads": 8}

Command = Callable[..., tuple[int, str, str]]


class Killed(BaseException):
    """Not to be caught by anything that catches errors."""


def a_config(tied: bool = False, **others: Any) -> Any:
    sizes = {"hidden_size": WIDTH, "intermediate_size": INNER, "num_hidden_layers": BLOCKS, "num_attention_heads": 4}
    tokens = {"vocab_size": VOCABULARY, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
    own = {"num_key_value_heads": 2, "attention_bias": True, "max_position_embeddings": 64, "initializer_range": 0.1}
    return transformers.LlamaConfig(**tokens | own | sizes | {"tie_word_embeddings": tied} | others)


def a_folder(folder: pathlib.Path, tokenizer: Any, config: Any) -> pathlib.Path:
    """A random LLaMA in bfloat16, in many files."""
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
    made = tmp_path_factory.mktemp("large") / "llama"
    found = a_folder(made, tokenizer, a_config(request.param == "tied"))
    assert (found / shards.INDEX).is_file() and len(list(found.glob("*.safetensors"))) > 2
    return found


@pytest.fixture(scope="module")
def windows() -> Tensor:
    return torch.randint(VOCABULARY, (3, 32), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def finished(
    folder: pathlib.Path, tokenizer: Any, windows: Tensor, tmp_path_factory: pytest.TempPathFactory
) -> tuple[pathlib.Path, dict[str, Any]]:
    """The compressed model, not to be changed, and what it cost."""
    out = tmp_path_factory.mktemp("small") / "llama"
    return out, compress.compress(shards.open_source(folder), tokenizer, windows, out, SETTINGS)


def contents(folder: pathlib.Path) -> dict[str, bytes]:
    """The files of the model alone: what is known about the run has times in it."""
    others = {"nashswarm.json"}
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.name not in others}


@torch.no_grad()
def in_memory(folder: pathlib.Path, windows: Tensor, settings: ByLayer, before: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same weights the slow way: the whole model, run from its first block for the inputs of every one; the blocks
    ``before`` it as they were found, so that a code which tips there moves nothing here."""
    model: Any = transformers.LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tied = model.config.tie_word_embeddings
    embedding = model.model.embed_tokens
    full = embedding.weight.detach().clone()
    scheme = Scheme(settings.group_size, search=True)
    found = {}
    if not tied:
        embedding.weight.copy_(quantize(full, settings.outer_bits, scheme).dequantize())
        found["model.embed_tokens.weight"] = embedding.weight
    blocks = [f"model.layers.{number}." for number in range(BLOCKS)]
    for prefix in [*blocks, "lm_head"]:
        linear = {n: m for n, m in model.named_modules() if n.startswith(prefix) and isinstance(m, torch.nn.Linear)}
        seen: dict[str, list[Tensor]] = {name: [] for name in linear}
        handles = [
            module.register_forward_hook(lambda _, given, out, own=seen[name]: own.append(given[0].flatten(0, 1)))
            for name, module in linear.items()
        ]
        for window in windows:
            model(input_ids=window.unsqueeze(0))
        for handle in handles:
            handle.remove()
        for name, module in linear.items():
            products = sum(x.T @ x for x in seen[name]) / sum(map(len, seen[name]))
            curved = Curvature(torch.ones(module.out_features), products, None)
            bits = settings.outer_bits if name == "lm_head" else settings.bits
            answer = quantize_layer(module.weight, bits, scheme, curved, settings.sweeps)
            kept = "model.embed_tokens.weight" if tied and name == "lm_head" else f"{name}.weight"
            found[kept] = answer.dequantize()
            module.weight.copy_(before[kept])  # a tied one is the embedding's too, and read no more
    return found


def decoded(folder: pathlib.Path) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for path in folder.glob("model*.safetensors"):
        tensors |= safetensors.torch.load_file(path)
    return {
        name: decode(name, part.numpy(), None).dequantize()
        for name, part in tensors.items()
        if part.dtype == torch.uint8
    }


def test_it_is_what_the_whole_model_would_have_become(folder: pathlib.Path, windows: Tensor, finished: Any) -> None:
    found = decoded(finished[0])
    expected = in_memory(folder, windows, SETTINGS, found)
    assert set(expected) == set(found)
    for name, weight in expected.items():  # sums of products are rounded in another order; codes may tip by a step
        same = (found[name] - weight).abs() < 1e-6
        assert same.float().mean() > 0.995, name
    error = sum((found[name] - weight).square().sum() for name, weight in expected.items())
    plain = safetensors.torch.load_file(next(folder.glob("model-00001*")))
    assert error < 1e-3 * sum(weight.square().sum() for weight in expected.values()) and plain


def test_error_feedback_helps(folder: pathlib.Path, windows: Tensor, finished: Any) -> None:
    """Against plain rounding of the same weights at the same widths, by the outputs of the whole model."""
    full = transformers.LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    rounded, small = copy.deepcopy(full), transformers.LlamaForCausalLM.from_pretrained(finished[0])
    set_activations(small, "float32")
    with torch.no_grad():
        for name, module in rounded.named_modules():
            if isinstance(module, torch.nn.Linear):
                bits = SETTINGS.width(name)
                module.weight.copy_(quantize(module.weight, bits, SETTINGS.scheme).dequantize())
        answers = [model(input_ids=windows).logits for model in (full, small, rounded)]
    assert (answers[1] - answers[0]).norm() < (answers[2] - answers[0]).norm()


def test_it_loads_and_generates(folder: pathlib.Path, finished: Any, tmp_path: pathlib.Path) -> None:
    out, cost = finished
    model = transformers.AutoModelForCausalLM.from_pretrained(out)
    tokenizer = transformers.AutoTokenizer.from_pretrained(out)
    packed = [module for module in model.modules() if isinstance(module, QuantizedLinear)]
    assert len(packed) == 7 * BLOCKS + 1
    prompt = tokenizer("the quiet flock", return_tensors="pt")
    assert model.generate(**prompt, max_new_tokens=5, do_sample=False).shape[1] <= prompt["input_ids"].shape[1] + 5
    model.save_pretrained(tmp_path)  # to the same tensors, in one file
    again = safetensors.torch.load_file(tmp_path / "model.safetensors")
    files = [safetensors.torch.load_file(path) for path in out.glob("model*.safetensors")]
    assert set(again) == {name for tensors in files for name in tensors}
    assert all(torch.equal(again[name], part) for tensors in files for name, part in tensors.items())
    assert cost["bytes_file"] == sum(
        path.stat().st_size for path in out.iterdir() if path.name.startswith(("model", "config"))
    )
    assert cost["starts"] == 1 and not list(out.parent.glob("*.unfinished")) and not list(out.parent.glob(".*"))


def test_the_plan_is_exact(folder: pathlib.Path, finished: Any) -> None:
    model = shards.skeleton(transformers.AutoConfig.from_pretrained(folder))
    found = forecast.forecast(model, SETTINGS, 3, 32, forecast.Rates(1e-11, 1e-10, 1e-7, 1e-7))
    assert found.bytes_file == finished[1]["bytes_file"] and found.parameters == finished[1]["parameters"]
    assert found.bits_per_weight_model == finished[1]["bits_per_weight_model"]
    assert found.seconds > 0 and found.bytes_states == 2 * 4 * 3 * 32 * WIDTH


@pytest.mark.parametrize("name", LARGE)
def test_plans_of_large_models(name: str) -> None:
    """By hand: a tile of 3 bits stores 3.3 bits a weight, one of 4 bits 4.3."""
    config = transformers.AutoConfig.for_model(**LARGE[name])
    found = forecast.forecast(shards.skeleton(config), ByLayer(), 4, 2048, forecast.Rates(1e-11, 1e-10, 1e-7, 1e-7))
    outer = 2 * config.vocab_size * config.hidden_size
    packed = (found.parameters - outer) * 3.296875 / 8 + outer * (4 + 20 / 64) / 8
    assert found.bytes_file == pytest.approx(packed, rel=1e-3)
    head = config.hidden_size // config.num_attention_heads * (config.num_key_value_heads or 0)
    block = config.hidden_size * (2 * config.hidden_size + 2 * head + 3 * config.intermediate_size)
    statistics = config.intermediate_size**2 * (8 + 3 * 8) + 3 * 4 * config.hidden_size**2
    states = found.bytes_states // 2
    assert found.peak_bytes <= memory.peak_bytes() + 2 * 4 * block + statistics + 3 * states


WRITES = 2 + 3 * (BLOCKS + 2) + 4  # notes, states, files; index, config, card


@pytest.mark.parametrize("after", (1, 2, 3, 4, 9, 11, WRITES - 5, WRITES - 1))
def test_killed_anywhere_it_goes_on_to_the_same_bytes(
    after: int, folder: pathlib.Path, tokenizer: Any, windows: Tensor, finished: Any, tmp_path: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    out, whole, left = tmp_path / "llama", record.write_whole, [after]

    def write(path: pathlib.Path, content: bytes) -> None:
        left[0] -= 1
        if not left[0]:
            path.parent.mkdir(exist_ok=True)
            path.with_name(f".{path.name}.0123.partial").write_bytes(content[: len(content) // 2])
            raise Killed
        whole(path, content)

    monkeypatch.setattr(record, "write_whole", write)
    source = shards.open_source(folder)
    try:
        compress.compress(source, tokenizer, windows, out, SETTINGS)
        assert left[0] > 0, "all writes came before the one to be killed at"
    except Killed:
        assert not out.exists()
        found = compress.compress(source, tokenizer, windows, out, SETTINGS)
        assert found["starts"] == (1 if after == 1 else 2)
    assert contents(out) == contents(finished[0])
    assert list(tmp_path.iterdir()) == [out]


@pytest.mark.parametrize("folder", ["untied"], indirect=True)
def test_killed_by_the_system(folder: pathlib.Path, tmp_path: pathlib.Path, text_file: pathlib.Path) -> None:
    """The command, in a process of its own that is sent SIGKILL while its third block is written, within a limit of
    memory; then the command again."""
    words = ["compress", str(folder), "--by-layer", "--calibration", str(text_file), "--length", "32", "--windows", "2"]
    program = """
import os, signal, sys
from nashswarm import record
from nashswarm.cli import main
whole = record.write_whole
def write(path, content):
    if path.name.startswith("model-00003"):
        path.with_name(f".{path.name}.0123.partial").write_bytes(content[:100])
        os.kill(os.getpid(), signal.SIGKILL)
    whole(path, content)
record.write_whole = write
sys.exit(main(sys.argv[1:]))
"""
    out, again = tmp_path / "killed", tmp_path / "never"
    found = subprocess.run([sys.executable, "-c", program, *words, "--out", str(out)], capture_output=True)
    assert found.returncode == -signal.SIGKILL, found.stderr
    assert not out.exists() and len(list((tmp_path / "killed.unfinished").glob("model*"))) == 2
    assert main([*words, "--out", str(out)]) == 0 and main([*words, "--out", str(again)]) == 0
    assert contents(out) == contents(again)


def test_a_finished_run_is_not_run_again(
    folder: pathlib.Path, tokenizer: Any, windows: Tensor, finished: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(compress, "_compressed")
    assert compress.compress(shards.open_source(folder), tokenizer, windows, finished[0], SETTINGS) == finished[1]
    with pytest.raises(ValueError, match="is not an empty folder"):
        compress.compress(shards.open_source(folder), tokenizer, windows, finished[0], ByLayer(bits=4))


def test_another_run_is_not_gone_on_with(
    folder: pathlib.Path, tokenizer: Any, windows: Tensor, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, source = tmp_path / "out", shards.open_source(folder)
    with monkeypatch.context() as patch:
        patch.setattr(compress, "_compressed", lambda *given: (_ for _ in ()).throw(Killed))
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


def broken(folder: pathlib.Path, what: str) -> None:
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
        ("kind", "knows LLaMA's architecture alone, and this is 'gpt2'"),
        ("shape", "other shapes than its config.json says: model.layers.0.mlp.gate_proj.weight"),
    ],
)
def test_a_broken_checkpoint(
    what: str, words: str, folder: pathlib.Path, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own = tmp_path / "own"
    shutil.copytree(folder, own)
    broken(own, what)
    assert main(["compress", str(own), "--by-layer", "--out", str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err
    with pytest.raises(ValueError, match=words):
        raise ValueError(said)
    assert said.count("\n") == 1 and [path.name for path in tmp_path.iterdir()] == ["own"]


def test_what_does_not_fit() -> None:
    with pytest.raises(ValueError, match="knows 2, 3, 4, 8 bits, not 5"):
        ByLayer(bits=5)
    with pytest.raises(ValueError, match="sweeps=-1"):
        ByLayer(sweeps=-1)
    narrow = shards.skeleton(a_config(intermediate_size=96))
    with pytest.raises(
        ValueError, match=r"columns of 4 matrices are not divisible by 64: model.layers.0.mlp.down_proj"
    ):
        compress.layout(narrow, ByLayer())


@pytest.mark.parametrize("folder", ["tied"], indirect=True)
def test_the_command(
    folder: pathlib.Path, text_file: pathlib.Path, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["compress", str(folder), "--windows", "2", "--length", "32", "--calibration", str(text_file)]
    assert main([*words, "--plan"]) == 0
    planned = json.loads(capsys.readouterr().out)
    assert main([*words, "--by-layer", "--sweeps", "2", "--out", str(tmp_path / "out")]) == 0
    made = json.loads(capsys.readouterr().out)
    assert planned["bytes_file"] == made["bytes_file"] and 0 < planned["seconds"] < 60
    assert main(["inspect", str(tmp_path / "out")]) == 0
    table = capsys.readouterr().out
    assert f"{made['bytes_file']:,} bytes of weights and config" in table and "groups of 64" in table
    card = (tmp_path / "out" / "README.md").read_text()
    assert f"{made['bytes_file']:,}" in card and "certify" not in card
    assert main(["certify", str(tmp_path / "out")]) == 2
    assert "was compressed by layer" in capsys.readouterr().err
    for more, said in (
        (["--by-layer"], "--out"),
        (["--by-layer", "--out", "x", "--method", "uniform"], "knows neither"),
        (["--by-layer", "--out", "x", "--bits", "2.5"], "whole number"),
        (["--sweeps", "2", "--out", "x"], "go with --by-layer"),
    ):
        assert main([*words, *more]) == 2 and said in capsys.readouterr().err
    assert main(["compress", "llama2_7b", "--plan"]) == 0
    assert main(["compress", "llama_none", "--plan"]) == 2


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="the limit is the Linux kernel's")
def test_memory_is_that_of_two_blocks(
    folder: pathlib.Path, tokenizer: Any, text_file: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    """A process that may have as much memory as a tiny model took, two blocks and the statistics compresses a model of
    many blocks; loading the whole model there fails."""
    config = a_config(**TOO_LARGE, attention_bias=False)
    large = a_folder(tmp_path / "large", tokenizer, config)
    whole = 4 * sum(part.numel() for part in shards.tensors_of(shards.skeleton(config)).values())
    inner = TOO_LARGE["intermediate_size"]
    room = 2 * 4 * 512 * (3 * inner + 3 * 512) + (4 + 28) * inner**2 + 2**25  # factored in double precision; and pieces
    program = f"""
import resource, sys
from nashswarm.cli import main
import transformers.models.llama.modeling_llama
words = "--windows 2 --length 32 --by-layer --calibration {text_file} --out {tmp_path}/".split()
assert main(["compress", {str(folder)!r}, *words[:-1], words[-1] + sys.argv[2]]) == 0
own = next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmData:")) * 1024
limit = own + int(sys.argv[1])
resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
if sys.argv[2] == "whole":
    import torch
    transformers.LlamaForCausalLM.from_pretrained({str(large)!r}, dtype=torch.float32)
else:
    sys.exit(main(["compress", {str(large)!r}, *words[:-1], words[-1] + "out"]))
"""
    ran = {
        what: subprocess.run([sys.executable, "-c", program, str(room), what], capture_output=True, text=True)
        for what in ("whole", "parts")
    }
    assert room < whole and ran["whole"].returncode != 0
    assert ran["parts"].returncode == 0, ran["parts"].stderr
