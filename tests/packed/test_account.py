"""The account of a compressed model's tensors: it adds up, in memory and from the files."""

import logging
import pathlib
from typing import Any

import pytest
import safetensors
import torch

import nashswarm
from nashswarm.cli import main
from nashswarm.models import kept
from nashswarm.packed.account import by_reason
from tests.models.tiny_configs import tiny_model


def compressed(kind: str, windows: torch.Tensor, **options: Any) -> tuple[Any, Any, nashswarm.Report]:
    model = tiny_model(kind)
    return model, *nashswarm.compress(model, calibration=windows, method="gptq", bits=4, **options)


@pytest.mark.parametrize(
    ("kind", "exclude", "reasons"),
    [
        ("llama", ["lm_head"], {"compressed ", "kept excluded", "kept norm", "format headers and config.json"}),
        ("gpt2", [], {"compressed ", "kept bias", "kept norm", "tied ", "format headers and config.json"}),
        ("mixtral", [], {"compressed ", "kept router", "kept norm", "format headers and config.json"}),
    ],
)
def test_account_adds_up_to_all_parameters_and_bytes(
    kind: str, exclude: list[str], reasons: set[str], token_windows: torch.Tensor, tmp_path: pathlib.Path
) -> None:
    model, small, report = compressed(kind, token_windows, exclude=exclude)
    assert sum(entry.parameters for entry in report.tensors) == model.num_parameters()
    small.save_pretrained(tmp_path)
    files = [tmp_path / name for name in ("model.safetensors", "config.json")]
    assert sum(entry.nbytes for entry in report.tensors) == sum(file.stat().st_size for file in files)
    assert {f"{row['state']} {row['reason']}" for row in by_reason(report.tensors)} == reasons
    with safetensors.safe_open(files[0], "pt") as file:  # each stored tensor, as another reader finds it
        stored = {name: file.get_tensor(name).nbytes for name in file.keys()}  # noqa: SIM118
    assert {entry.name: entry.nbytes for entry in report.tensors[:-1] if entry.state != "tied"} == stored
    names = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    assert kind == "mixtral" or names == {entry.name for entry in report.tensors[:-1]}  # mixtures are split


def test_inspect_tells_why_matrices_are_kept_as_the_report_does(
    token_windows: torch.Tensor, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, small, report = compressed("gemma3", token_windows)
    small.save_pretrained(tmp_path)
    assert main(["inspect", str(tmp_path), "--quiet"]) == 0
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    rows = by_reason(report.tensors)
    assert any(row["reason"] == "not used by the model on text" for row in rows)
    for row in rows:
        start = " ".join(f"{row['state']} {row['reason']} {row['tensors']} {row['parameters']:,}".split())
        assert any(line.startswith(start) and f" {row['bytes']:,} " in line for line in lines), row
    assert any(line.startswith(f"all {len(report.tensors)} {model.num_parameters():,} ") for line in lines)


def test_warn_of_large_names_parameters_of_unknown_layout_with_their_share(caplog: pytest.LogCaptureFixture) -> None:
    model = tiny_model("llama")
    kept.warn_of_large(model)
    assert not caplog.records
    model.model.table = torch.nn.Parameter(torch.zeros(model.num_parameters() // 4 // 64, 64))
    with caplog.at_level(logging.WARNING):
        kept.warn_of_large(model)
    assert [record.getMessage() for record in caplog.records] == [
        "model.table: unknown layout, so kept at 16 bits (20.0 % of all parameters)"
    ]
