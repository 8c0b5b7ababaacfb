"""Architectures of transformers: compressed by the command line, certified, and opened again in another process."""

import pathlib
from typing import Any

import pytest
import torch
import transformers

import nashswarm
from nashswarm.models import architecture
from nashswarm.models.split_experts import unfuse
from nashswarm.packed.native_forward import plain_class
from tests.conftest import sentences
from tests.models import architectures
from tests.models.architectures import CommandLine, all_kinds, command, try_all
from tests.models.tiny_configs import tiny_config, tiny_model

COMMON = [
    *((kind, "causal") for kind in (
        "llama", "mistral", "qwen2", "qwen3", "qwen3_moe", "qwen3_next", "gemma2", "gemma3", "gemma3_text", "gemma4",
        "phi", "phi3", "phimoe", "gpt2", "gpt_neox", "gptj", "gpt_oss", "opt", "bloom", "falcon", "mixtral", "olmo2",
        "deepseek_v3", "llama4_text", "granite", "cohere2", "mamba2", "jamba", "starcoder2", "smollm3", "glm4",
        "stablelm", "jetmoe", "bart",
    )),
    *((kind, "classifier") for kind in ("bert", "llama", "deberta-v2")),
    *((kind, "masked") for kind in ("bert", "roberta", "modernbert")),
]  # fmt: skip
GROUP = 8  # architectures whose compressed models are opened by one process
COMMON_GROUP = 20  # the same for those of the quick tests: processes take longer to start than models to open
EXPERTS = [
    "mixtral", "deepseek_v3", "deepseek_v4", "gpt_oss", "llama4_text", "jetmoe", "longcat_flash", "inkling_text",
    "aria_text", "nemotron_h", "hy_v4", "qwen3_5_moe_text",
]  # fmt: skip


def groups(kinds: list[tuple[str, str]], size: int = GROUP) -> list[list[tuple[str, str]]]:
    return [kinds[first : first + size] for first in range(0, len(kinds), size)]


@pytest.fixture(scope="module")
def padded_tokenizer() -> Any:
    return architectures.padded_tokenizer(sentences(120, 0))


@pytest.fixture(scope="module")
def short_file(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    file = tmp_path_factory.mktemp("text") / "short.txt"
    file.write_text(sentences(60, 3))
    return file


@pytest.mark.parametrize("kinds", groups(COMMON, COMMON_GROUP), ids=lambda kinds: f"{kinds[0][0]}..{kinds[-1][0]}")
def test_common_architectures_open_as_they_were_saved(kinds: list[tuple[str, str]], tmp_path: pathlib.Path) -> None:
    assert [trial for trial in try_all(kinds, tmp_path, None) if trial.result != "compressed"] == []


@pytest.mark.slow
def test_command_line_keeps_the_kind_of_a_model_and_certifies_it(
    tmp_path: pathlib.Path, padded_tokenizer: Any, short_file: pathlib.Path
) -> None:
    kinds = [("mixtral", "causal"), ("gemma3", "causal"), ("bert", "classifier"), ("bert", "masked")]
    trials = list(try_all(kinds, tmp_path, CommandLine(padded_tokenizer, short_file)))
    assert [trial for trial in trials if trial.result != "compressed"] == []


@pytest.mark.slow
@pytest.mark.parametrize("kinds", groups(all_kinds()), ids=lambda kinds: f"{kinds[0]}..{kinds[-1]}")
def test_all_architectures_are_compressed_or_refused(
    kinds: list[tuple[str, str]], tmp_path: pathlib.Path, padded_tokenizer: Any, short_file: pathlib.Path
) -> None:
    trials = list(try_all(kinds, tmp_path, CommandLine(padded_tokenizer, short_file)))
    assert [trial for trial in trials if trial.result == "failed"] == []


def test_committed_page_follows_from_the_committed_results() -> None:
    assert architectures.PAGE.read_text() == architectures.page()


FAILING: list[tuple[str, str]] = []  # in the committed results


def test_committed_results_are_of_every_architecture_and_no_others_fail() -> None:
    version, trials = architectures.read_results()
    known = ("compressed", "refused", "cannot run")
    assert [(trial.kind, trial.purpose) for trial in trials if trial.result not in known] == FAILING
    assert all("\n" not in trial.reason for trial in trials)
    if version != transformers.__version__:
        pytest.skip(f"the results are of transformers {version}")
    assert [(trial.kind, trial.purpose) for trial in trials] == all_kinds()


@pytest.mark.parametrize("kind", EXPERTS)
@torch.no_grad()
def test_unfuse_every_layout_of_experts_computes_the_same(kind: str, token_windows: torch.Tensor) -> None:
    model, split = tiny_model(kind), tiny_model(kind)
    model.config._experts_implementation = "eager"
    assert unfuse(split) and not unfuse(split)
    left = [name for name, part in split.named_parameters() if part.ndim == 3 and "conv" not in name]
    assert not left
    expected = model(input_ids=token_windows).logits
    assert torch.allclose(split(input_ids=token_windows).logits, expected, atol=1e-4 * float(expected.abs().max()))


@pytest.mark.parametrize("kind", ["t5", "bart", "whisper", "vit"])
def test_compress_other_models_refuses_before_calibration(
    kind: str, tmp_path: pathlib.Path, padded_tokenizer: Any, short_file: pathlib.Path
) -> None:
    auto = {"whisper": transformers.AutoModelForSpeechSeq2Seq, "vit": transformers.AutoModelForImageClassification}
    model = tiny_model(kind, auto.get(kind, transformers.AutoModelForSeq2SeqLM))
    model.save_pretrained(tmp_path / kind)
    padded_tokenizer.save_pretrained(tmp_path / kind)
    status, said = command("compress", tmp_path / kind, "--out", tmp_path / "out", "--calibration", short_file)
    assert status == 2 and type(model).__name__ in said and not (tmp_path / "out").exists()
    with pytest.raises(ValueError, match=type(model).__name__):
        nashswarm.compress(model, calibration=torch.ones(3, 4, dtype=torch.long))


def test_multimodal_model_keeps_its_tower_and_names_it(
    caplog: pytest.LogCaptureFixture, token_windows: torch.Tensor
) -> None:
    model = tiny_model("gemma3")
    small, _ = nashswarm.compress(model, calibration=token_windows, bits=8, effort="quick")
    assert (
        plain_class(small) is type(model)
        and "vision_tower" in caplog.text
        and "not used by the model on text" in caplog.text
    )
    kept = dict(small.named_parameters())
    towers = {name: part for name, part in model.named_parameters() if "vision_tower" in name}
    assert towers and all(torch.equal(kept[name], part.half().float()) for name, part in towers.items())


def test_max_window_of_positions_behind_the_padding_is_shorter() -> None:
    model = tiny_model("roberta", transformers.AutoModelForMaskedLM)
    longest = architecture.max_window(model)
    assert longest == model.config.max_position_embeddings - model.config.pad_token_id - 1
    model(input_ids=torch.ones(1, longest, dtype=torch.long) * 5)
    with pytest.raises((IndexError, RuntimeError)):
        model(input_ids=torch.ones(1, longest + 1, dtype=torch.long) * 5)


def test_max_tokens_looks_into_the_text_part_and_may_be_unknown() -> None:
    assert architecture.max_tokens(tiny_config("gemma3")) == tiny_config("gemma3_text").max_position_embeddings
    assert architecture.max_tokens(tiny_config("mamba2")) is None
