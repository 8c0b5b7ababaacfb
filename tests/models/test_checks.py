"""What cannot be compressed is refused in one sentence, and settings of the caller's process stay as they were."""

import json
import pathlib
import shutil
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

import nashswarm
from nashswarm.cli import main
from nashswarm.models import checks, sources
from nashswarm.moe.model import MoeConfig, MoeForCausalLM
from nashswarm.packed.model_folder import check_free
from nashswarm.records.files import claim
from tests.models.tiny_configs import tiny_model

QUICK = {"method": "gptq", "bits": 4}


@pytest.fixture(scope="module")
def expected(tiny: Any, token_windows: Tensor) -> Tensor:
    """Logits of the tiny model as it is compressed by default settings of torch."""
    return logits(nashswarm.compress(tiny, calibration=token_windows, **QUICK)[0], token_windows)


@torch.no_grad()
def logits(model: Any, windows: Tensor) -> Tensor:
    return model(input_ids=windows).logits


@pytest.mark.parametrize("setting", ["no_grad", "inference_mode", "bfloat16", "float64"])
def test_compress_ignores_settings_of_torch(setting: str, tiny: Any, token_windows: Tensor, expected: Tensor) -> None:
    if hasattr(torch, setting) and not isinstance(getattr(torch, setting), torch.dtype):
        with getattr(torch, setting)():
            small, _ = nashswarm.compress(tiny, calibration=token_windows, **QUICK)
    else:
        torch.set_default_dtype(getattr(torch, setting))
        try:
            small, _ = nashswarm.compress(tiny, calibration=token_windows, **QUICK)
            assert torch.get_default_dtype() == getattr(torch, setting)
        finally:
            torch.set_default_dtype(torch.float32)
    assert torch.equal(logits(small, token_windows), expected)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weight_that_is_not_finite_is_named(value: float, model: Any, token_windows: Tensor) -> None:
    with torch.no_grad():
        model.transformer.h[1].mlp.c_fc.weight[3, 4] = value
    with pytest.raises(ValueError, match=r"1 of .* numbers of transformer.h.1.mlp.c_fc.weight are NaN or infinite"):
        nashswarm.compress(model, calibration=token_windows)


def test_matrix_whose_damage_is_beyond_floats_is_named(token_windows: Tensor) -> None:
    """Without norms the numbers of many random layers grow without bounds."""
    model = tiny_model("mobilebert", transformers.AutoModelForMaskedLM, normalization_type="no_norm")
    with pytest.raises(ValueError, match=r"the damage of .*is beyond 32-bit floats.*: leave these matrices out"):
        nashswarm.compress(model, calibration=token_windows, bits=9, effort="quick")


def test_model_that_cannot_run_is_refused(model: Any, token_windows: Tensor) -> None:
    model.config.return_dict = False
    with pytest.raises(ValueError, match="return_dict=False"):
        nashswarm.compress(model, calibration=token_windows)
    with torch.device("meta"):
        empty = transformers.GPT2LMHeadModel(transformers.GPT2Config(n_layer=1))
    with pytest.raises(ValueError, match="has no values in memory"):
        nashswarm.compress(empty, calibration=token_windows)


def test_attached_adapter_is_refused(random_model: Callable[[str], Any], token_windows: Tensor) -> None:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False)
    adapted = peft.get_peft_model(random_model("llama"), config)
    with pytest.raises(ValueError, match=r"carries an adapter at model\.layers\.0\.self_attn\.q_proj: merge it by"):
        nashswarm.compress(adapted.get_base_model(), calibration=token_windows)
    assert nashswarm.compress(adapted.merge_and_unload(), calibration=token_windows, **QUICK)


def test_tokenizer_larger_than_the_embedding_is_told(tiny: Any, tokenizer: Any, text_file: pathlib.Path) -> None:
    config = transformers.GPT2Config(vocab_size=200, n_layer=1, n_head=2, n_embd=32, n_positions=32)
    small = transformers.GPT2LMHeadModel(config)
    with pytest.raises(ValueError, match="the model's embedding has 200 rows: give the tokenizer of this model"):
        nashswarm.compress(small, tokenizer, calibration=text_file.read_text()[:6000], **QUICK)


@pytest.mark.parametrize("left", [True, False])
def test_padded_windows_are_read_without_padding(left: bool, tiny: Any, token_windows: Tensor) -> None:
    """Padding on either side, of any token: the windows that remain are those without it."""
    pad = torch.full((5, 8), 7)
    ids = torch.cat([pad, token_windows] if left else [token_windows, pad], 1)
    real, none = torch.ones_like(token_windows), torch.zeros_like(pad)
    padded = {"input_ids": ids, "attention_mask": torch.cat([none, real] if left else [real, none], 1)}
    small, plain = (nashswarm.compress(tiny, calibration=one, **QUICK)[0] for one in (padded, token_windows))
    assert torch.equal(logits(small, token_windows), logits(plain, token_windows))
    with pytest.raises(ValueError, match="calibration lacks attention_mask"):
        nashswarm.compress(tiny, calibration={"input_ids": ids})


@pytest.mark.parametrize("method", ["gptq", "awq", "bitsandbytes", "compressed-tensors", "hqq", "exl3", "fp8", "mxfp4"])
def test_folder_quantized_by_others_is_refused(
    method: str, model_folder: pathlib.Path, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    full = shutil.copytree(model_folder, tmp_path / "full")
    config = json.loads((full / "config.json").read_text())
    (full / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": method}}))
    assert main(["compress", str(full), "--out", str(tmp_path / "out"), "--cache", str(tmp_path / "cache")]) == 2
    assert f"is quantized already, by {method}" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["full"]


def test_folder_with_an_adapter_or_of_ours_is_refused(model_folder: pathlib.Path, tmp_path: pathlib.Path) -> None:
    full = shutil.copytree(model_folder, tmp_path / "full")
    (full / "adapter_config.json").write_text("{}")
    with pytest.raises(ValueError, match="merge_and_unload"):
        sources.check_location(sources.ModelSource(str(full)))
    (full / "adapter_config.json").unlink()
    (full / "config.json").write_text('{"quantization_config": {"quant_method": "nashswarm"}}')
    with pytest.raises(ValueError, match="compressed by nashswarm already"):
        sources.check_location(sources.ModelSource(str(full)))


def test_importing_and_loading_leave_the_voice_of_transformers(model_folder: pathlib.Path) -> None:
    logging = transformers.utils.logging
    before = logging.get_verbosity(), logging.is_progress_bar_enabled()
    sources.load(sources.ModelSource(str(model_folder)), "cpu", torch.float32)
    assert (logging.get_verbosity(), logging.is_progress_bar_enabled()) == before
    with checks.quiet_transformers():
        assert logging.get_verbosity() == logging.ERROR and not logging.is_progress_bar_enabled()
    assert (logging.get_verbosity(), logging.is_progress_bar_enabled()) == before


def test_gguf_file_is_a_model(gguf_package: dict[str, Tensor]) -> None:
    path = next(pathlib.Path(sys.path[0]).rglob("*.gguf"))
    source = sources.ModelSource(str(path))
    loaded = sources.load(source, "cpu", torch.float32)
    for name, weight in gguf_package.items():
        assert torch.equal(loaded.model.state_dict()[name], weight), name
    assert source.label == path.stem and sources.dequantized_from(source)
    assert sources.read_config(str(path)).hidden_size == loaded.model.config.hidden_size
    (path.parent / "other").write_text("text")
    with pytest.raises(ValueError, match="is no GGUF file"):
        sources.check_location(sources.ModelSource(str(path.parent / "other")))


def test_folder_that_cannot_be_written_is_refused_before_the_work(tmp_path: pathlib.Path) -> None:
    (tmp_path / "file").write_text("")
    for folder in (pathlib.Path("/proc/none/model"), tmp_path / "file" / "model"):
        with pytest.raises(OSError, match=f"cannot write {folder}"):
            check_free(folder)
    check_free(tmp_path / "new" / "model")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_claim_of_a_refused_run_leaves_no_folder(tmp_path: pathlib.Path) -> None:
    with pytest.raises(ValueError), claim(tmp_path / "records" / "single" / "a.json"):
        raise ValueError
    assert not any(tmp_path.iterdir())
    with claim(tmp_path / "records" / "a.json"):
        (tmp_path / "records" / "a.json").write_text("{}")
    assert [path.name for path in tmp_path.rglob("*")] == ["records", "a.json"]


def test_inspect_takes_our_mixture_and_refuses_code_of_a_models_own(
    tmp_path: pathlib.Path, token_windows: Tensor, capsys: pytest.CaptureFixture[str]
) -> None:
    config = MoeConfig(vocab_size=512, hidden_size=64, num_hidden_layers=1, num_experts=2, moe_intermediate_size=64)
    nashswarm.compress(MoeForCausalLM(config), calibration=token_windows, **QUICK)[0].save_pretrained(tmp_path)
    assert main(["inspect", str(tmp_path)]) == 0 and "blocks.0.attention.qkv" in capsys.readouterr().out
    content = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(content | {"auto_map": {"AutoConfig": "own.Config"}}))
    assert main(["inspect", str(tmp_path)]) == 2 and "code of its own" in capsys.readouterr().err
