"""``nashswarm.compress``: what comes back computes, is as large as it says, and left the model as it was."""

import copy
import dataclasses
import json
import pathlib
from collections.abc import Callable
from typing import Any

import pytest
import safetensors.torch
import torch
import transformers
from torch import Tensor

import nashswarm
from nashswarm.api import METHODS
from nashswarm.calibration import texts
from nashswarm.data import corpus, stdlib_docs, stdlib_source
from nashswarm.methods.fixed_width import FixedWidth
from nashswarm.methods.gptq import Gptq
from nashswarm.methods.uniform import Uniform
from nashswarm.models import evaluation
from nashswarm.packed import file_format
from nashswarm.packed.modules import QuantizedEmbedding, QuantizedLinear, set_activations

compress = nashswarm.compress
QUICK = {"method": "uniform", "bits": 4}
UNTYPED = getattr(compress, "__wrapped__", compress)  # past the type checker of the tests


@pytest.fixture(scope="module")
def windows(text_file: pathlib.Path, tokenizer: Any) -> Tensor:
    """Twelve windows of 32 tokens of the small text."""
    tokens = tokenizer(text_file.read_text())["input_ids"]
    return torch.tensor(tokens[: 12 * 32]).view(12, 32)


@pytest.fixture(scope="module")
def played(model_folder: pathlib.Path, text_file: pathlib.Path) -> tuple[Any, Any]:
    """The tiny model as nash_swarm compressed it by default, and the report; not to be changed."""
    text = text_file.read_text()[:6000]
    with pytest.MonkeyPatch.context() as patch:
        for module in (stdlib_docs, stdlib_source):
            patch.setattr(module, "text", {"calibration": text}.__getitem__)
        return compress(transformers.AutoModelForCausalLM.from_pretrained(model_folder), bits=3.5)


@pytest.fixture
def short_text(text_file: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Instead of the embedded text, which takes seconds to read."""
    text = text_file.read_text()[:6000]
    for module in (stdlib_docs, stdlib_source):
        monkeypatch.setattr(module, "text", {"calibration": text}.__getitem__)
    return text


@torch.no_grad()
def answer(model: Any, windows: Tensor) -> Tensor:
    found = model(input_ids=windows)
    return found.logits if "logits" in found else found.last_hidden_state


def packed_modules(model: Any) -> dict[str, Any]:
    kinds = (QuantizedLinear, QuantizedEmbedding)
    return {name: one for name, one in model.named_modules(remove_duplicate=False) if isinstance(one, kinds)}


def kl(full: Any, model: Any, windows: Tensor) -> float:
    return evaluation.summarise(evaluation.evaluate(model, windows, 4, evaluation.compute_reference(full, windows, 4)))[
        "kl"
    ]


def test_compress_saved_model_loads_with_equal_logits(played: Any, tmp_path: pathlib.Path) -> None:
    model, report = played
    model.save_pretrained(tmp_path)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    tokens = torch.arange(20)[None]
    assert torch.equal(answer(again, tokens), answer(model, tokens))
    assert report.bits_per_weight_model <= 3.5 and report.compression > 0.85


def test_report_equals_the_saved_files(played: Any, tiny: Any, tmp_path: pathlib.Path) -> None:
    """Byte by byte weights and config; what save_pretrained adds is how to generate, which the full model has too."""
    model, report = played
    model.save_pretrained(tmp_path)
    sizes = {path.name: path.stat().st_size for path in tmp_path.iterdir()}
    assert set(sizes) == {"config.json", "model.safetensors", "generation_config.json"}
    assert report.bytes_file == sizes["config.json"] + sizes["model.safetensors"]
    parameters = sum(part.numel() for part in tiny.parameters())
    assert report.compression == 1 - report.bytes_file / (4 * parameters)
    assert report.bits_per_weight_model == 8 * report.bytes_file / parameters
    assert 3.4 < report.bits_per_weight_model <= 3.5
    tensors = safetensors.torch.load_file(tmp_path / "model.safetensors")
    matrices = [part for name, part in tensors.items() if part.dtype == torch.uint8 and name != file_format.PADDING]
    stored = sum(map(len, matrices))
    weights = {one.matrix: one.matrix.shape[0] * one.matrix.shape[1] for one in packed_modules(model).values()}
    assert report.bits_per_weight == 8 * stored / sum(weights.values())
    assert len(report.allocation.splitlines()) == len(weights) == 10
    assert report.regret_max == report.metrics["regret_max"] <= 1e-4 and report.seconds > 0
    with pytest.raises(dataclasses.FrozenInstanceError):
        report.bytes_file = 1


def test_compress_leaves_the_model_unchanged(model: Any, windows: Tensor) -> None:
    model.train()
    before, config = copy.deepcopy(model.state_dict()), model.config.to_dict()
    found, _ = compress(model, calibration=windows, **QUICK)
    assert model.training and not found.training and found is not model
    assert all(torch.equal(part, before[name]) for name, part in model.state_dict().items())
    assert model.config.to_dict() == config and getattr(model, "hf_quantizer", None) is None
    assert not packed_modules(model) and packed_modules(found)
    assert all(part.grad is None for part in model.parameters())


@pytest.mark.slow
@pytest.mark.parametrize("method", sorted(METHODS))
def test_compress_every_method_reports_its_size(method: str, tiny: Any, windows: Tensor, played: Any) -> None:
    alone = {"method": method, "calibration": windows[:5], "bits": 4}
    model, report = played if method == "nash_swarm" else compress(tiny, **alone)
    names = set(packed_modules(model))
    assert names == {name for name, one in tiny.named_modules() if hasattr(one, "weight") and one.weight.ndim == 2}
    assert {"lm_head", "transformer.wte"} <= names and model.lm_head.matrix is model.transformer.wte.matrix
    assert 0 < kl(tiny, model, windows[:4]) < 0.5
    assert (report.regret_max is None) == (method == "gptq")


def test_compress_method_instance_brings_its_own_bits(tiny: Any, windows: Tensor) -> None:
    own = FixedWidth(bits=4.0, group_size=32, code_game=False, swarm=None)
    _, report = compress(tiny, method=own, calibration=windows, bits=2.0)
    assert 3.8 < report.bits_per_weight_model <= 4


def test_compress_format_without_kernels_has_the_reported_size(
    tiny: Any, windows: Tensor, tmp_path: pathlib.Path
) -> None:
    """16-bit floats: nothing is packed, and nothing is hidden."""
    model, report = compress(tiny, method=Uniform(16), calibration=windows)
    assert not packed_modules(model)
    model.save_pretrained(tmp_path)
    size = sum((tmp_path / name).stat().st_size for name in ("config.json", "model.safetensors"))
    assert size == pytest.approx(report.bytes_file, rel=0.02)
    assert kl(tiny, model, windows[:4]) < 1e-5


@pytest.mark.slow
def test_compress_calibration_text_equals_its_windows(
    tiny: Any, tokenizer: Any, short_text: str, tmp_path: pathlib.Path
) -> None:
    """In windows of the model's length, by the tokenizer that the model had; the text may have a name or be a file."""
    tokens = torch.tensor(tokenizer(short_text)["input_ids"])
    cut = tokens[: len(tokens) // 64 * 64].view(-1, 64)
    (tmp_path / "story.txt").write_text(short_text, encoding="utf-8")
    givens = (short_text, cut, "embedded", tmp_path / "story.txt")
    by_text, *others = (compress(tiny, calibration=given, method="gptq", bits=3) for given in givens)
    for other in others:
        assert torch.equal(answer(by_text[0], cut[:2]), answer(other[0], cut[:2]))
    nameless = copy.deepcopy(tiny)
    nameless.name_or_path = nameless.config._name_or_path = ""
    by_hand, _ = compress(nameless, tokenizer, calibration=short_text, method="gptq", bits=3)
    assert torch.equal(answer(by_hand, cut[:2]), answer(by_text[0], cut[:2]))


@pytest.mark.slow
def test_compress_by_default_calibrates_on_what_auto_stands_for(
    tiny: Any,
    tokenizer: Any,
    windows: Tensor,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv(texts.HUB_VARIABLE, "nowhere")  # another test may have put a text in the place of the hub's
    text = texts.read(texts.OFFLINE, texts.own_of(tiny, tokenizer))
    named, default = (compress(tiny, calibration=given, method="gptq", bits=3) for given in (text, None))
    assert torch.equal(answer(named[0], windows), answer(default[0], windows))
    found = default[0].config.calibration
    assert found["source"] == texts.OFFLINE and found["sha256"] == corpus.sha256(text) and found["positions"] == 48 * 64
    assert any("out of reach" in said and said.endswith("by calibration=") for said in caplog.messages)
    with pytest.raises(ValueError, match=r"calibration=/nowhere\.txt is not a file, a folder or a source of text"):
        compress(tiny, calibration=pathlib.Path("/nowhere.txt"))


def test_compress_same_seed_gives_the_same_bytes(tiny: Any, windows: Tensor, tmp_path: pathlib.Path) -> None:
    for name, seed in (("first", 0), ("second", 0), ("third", 1)):
        compress(tiny, calibration=windows, method="gptq", bits=3, seed=seed)[0].save_pretrained(tmp_path / name)
    first, second, third = (
        (tmp_path / name / "model.safetensors").read_bytes() for name in ("first", "second", "third")
    )
    assert first == second != third


def test_compress_excluded_matrices_stay_at_16_bits(tiny: Any, windows: Tensor, tmp_path: pathlib.Path) -> None:
    model, report = compress(tiny, calibration=windows, exclude=["lm_head", "*.1.mlp.*"], **QUICK)
    names = packed_modules(model)
    assert "lm_head" not in names and "transformer.wte" not in names and "transformer.h.0.mlp.c_fc" in names
    kept = model.transformer.h[1].mlp.c_fc.weight
    assert torch.equal(kept, tiny.transformer.h[1].mlp.c_fc.weight.half().float())
    model.save_pretrained(tmp_path)
    size = sum((tmp_path / name).stat().st_size for name in ("config.json", "model.safetensors"))
    assert report.bytes_file == size
    with pytest.raises(ValueError, match="names no matrix of this model: nothing"):
        compress(tiny, calibration=windows, exclude=["nothing"])


@pytest.mark.parametrize("kind", ["llama", "llama_tied", "opt", "gpt_neox"])
def test_compress_other_architectures_reload_equal(
    kind: str, random_model: Callable[[str], Any], token_windows: Tensor, tmp_path: pathlib.Path
) -> None:
    full = random_model(kind)
    own = FixedWidth(bits=6.0, group_size=32, code_game=False, swarm=None)
    model, report = compress(full, method=own, calibration=token_windows)
    model.save_pretrained(tmp_path)
    again = type(full).from_pretrained(tmp_path)
    assert torch.equal(answer(again, token_windows), answer(model, token_windows))
    assert kl(full, model, token_windows) < 0.1
    size = sum((tmp_path / name).stat().st_size for name in ("config.json", "model.safetensors"))
    assert report.bytes_file == size


@pytest.mark.parametrize(
    ("kind", "method"),
    [
        ("bert", "gptq"),
        pytest.param("bert_encoder", "nash_lattice", marks=pytest.mark.slow),
        ("bert_encoder", "nash_swarm"),
        ("bert_classifier", "gptq"),
    ],
)
def test_compress_encoders_and_classifiers_reload_equal(
    kind: str,
    method: str,
    random_model: Callable[[str], Any],
    token_windows: Tensor,
    tmp_path: pathlib.Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The game needs a divergence: of predictions where there is a vocabulary, of directions where there is none."""
    full, own = random_model(kind), Gptq(8, group_size=32) if method == "gptq" else method
    model, report = compress(full, method=own, calibration=token_windows, bits=6)
    if kind == "bert_encoder":  # whose states do not depend on it
        assert "pooler.dense: without effect on what the model predicts" in caplog.text
        assert not isinstance(model.pooler.dense, QuantizedLinear)
    set_activations(model, "float32")
    expected = answer(full, token_windows)
    assert (answer(model, token_windows) - expected).norm() < 0.2 * expected.norm()
    model.save_pretrained(tmp_path)
    assert report.bits_per_weight_model <= (12 if method == "gptq" else 6)
    assert type(type(full).from_pretrained(tmp_path)) is type(full)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_compress_half_precision_model_reloads_equal(dtype: torch.dtype, tiny: Any, windows: Tensor) -> None:
    """It stays as it is; on a CPU its copy computes in float32."""
    half = copy.deepcopy(tiny).to(dtype)
    model, report = compress(half, calibration=windows, **QUICK)
    assert half.dtype == dtype and model.dtype == torch.float32
    assert {part.dtype for part in copy.deepcopy(model).dequantize().parameters()} == {torch.float32}
    reference, _ = compress(tiny, calibration=windows, **QUICK)
    expected = answer(reference, windows)
    assert (answer(model, windows) - expected).norm() < 0.1 * expected.norm()
    assert report.compression > 0.8


def test_compress_bfloat16_model_says_its_dtype_and_turns_back(
    tiny: Any, windows: Tensor, tmp_path: pathlib.Path, caplog: pytest.LogCaptureFixture
) -> None:
    small, _ = compress(copy.deepcopy(tiny).to(torch.bfloat16), calibration=windows, **QUICK)
    assert small.dtype == torch.float32 and "computes in float32 on a CPU; .to(torch.bfloat16)" in caplog.text
    small.to(torch.bfloat16).save_pretrained(tmp_path)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert again.dtype == torch.bfloat16
    with torch.no_grad():
        assert torch.equal(again(input_ids=windows).logits, small(input_ids=windows).logits)


def test_compress_quantized_model_is_refused_until_dequantized(played: Any, windows: Tensor) -> None:
    model = copy.deepcopy(played[0])
    with pytest.raises(ValueError, match=r"the model is quantized already; call model\.dequantize\(\) first"):
        compress(model, calibration=windows)
    again, _ = compress(model.dequantize(), calibration=windows, **QUICK)
    assert packed_modules(again)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (
            {"method": "nash_latt"},
            "unknown method 'nash_latt': choose nash_swarm, nash_lattice, nash_archive, fixed_width, gptq, uniform, or",
        ),
        ({"method": "gptq", "bits": 2.5}, "bits=2.5: gptq gives every weight the same whole number of bits"),
        ({"method": "uniform", "bits": 5}, "a uniform width is one of"),
        ({"method": "gptq", "bits": 3, "effort": "quick"}, "the effort quick is of nash_swarm and nash_lattice"),
        ({"bits": 0.01}, "is below the smallest possible size of this model"),
        ({"bits": -1.0}, "^bits=-1.0 must be above 0 and at most 16"),
        ({"bits": 32}, "^bits=32 must be above 0 and at most 16"),
        ({"bits": float("nan")}, "^bits=nan must be above 0"),
        ({"bits": "3"}, "^bits='3' is no number"),
        ({"exclude": ["nothing"]}, "^exclude=.* names no matrix|^exclude= names no matrix"),
        (
            {"calibration": torch.zeros(64)},
            r"of shape \(windows, length\) with at least 2 windows, not \(64,\) of torch",
        ),
        ({"calibration": torch.zeros(1, 64).long()}, r"with at least 2 windows, not \(1, 64\) of torch.int64"),
        ({"calibration": torch.zeros(4, 64)}, r"calibration must be token ids of shape .* of torch.float32"),
        ({"calibration": torch.zeros(4, 1).long()}, "a window needs at least 2 tokens"),
        ({"calibration": torch.zeros(4, 65).long()}, "windows of 65 tokens are longer than the model's maximum of 64"),
        (
            {"calibration": torch.full((4, 8), 512)},
            "calibration holds the token 512, the model's embedding has 512 rows",
        ),
        (
            {"calibration": -torch.ones(4, 8).long()},
            "calibration holds the token -1, the model's embedding has 512 rows",
        ),
        ({"calibration": "too short"}, "tokens, too short for one window of 64"),
        (
            {"calibration": "the a one every no old new small large quiet " * 9},
            "calibration text fills only 1 window",
        ),
    ],
)
def test_compress_mistake_is_answered_in_one_sentence(
    options: dict[str, Any], said: str, tiny: Any, windows: Tensor
) -> None:
    with pytest.raises(ValueError, match=said) as caught:
        UNTYPED(tiny, **({"calibration": windows} | options))
    assert "\n" not in str(caught.value)


def test_compress_object_that_is_no_model_is_refused(tiny: Any, windows: Tensor) -> None:
    with pytest.raises(ValueError, match="nashswarm compresses models of transformers, not a Linear"):
        UNTYPED(torch.nn.Linear(4, 4), calibration=windows)
    with pytest.raises(ValueError, match="calibration must be text or token windows, not a list"):
        nashswarm.api._windows.__wrapped__(tiny, None, [1, 2])
    nameless = copy.deepcopy(tiny)
    nameless.name_or_path = nameless.config._name_or_path = ""
    with pytest.raises(ValueError, match="does not say where it comes from: give its tokenizer, or token windows"):
        compress(nameless)


def test_report_numbers_are_plain(played: Any) -> None:
    assert json.loads(json.dumps(dataclasses.asdict(played[1])))["bytes_file"] == played[1].bytes_file
    assert isinstance(played[0], transformers.GPT2LMHeadModel)
