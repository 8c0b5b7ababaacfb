"""A saved model is opened in a new process, and kept only if it computes the same there; its card tells the truth."""

import json
import math
import pathlib
from typing import Any

import pytest
import torch
import transformers

from nashswarm.calibration.session import CalibrationSession
from nashswarm.cli import main
from nashswarm.packed import reload


@pytest.fixture(scope="module")
def words(model_folder: pathlib.Path, text_file: pathlib.Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    cache = tmp_path_factory.mktemp("cache")
    options = ["--calibration", str(text_file), "--windows", "6", "--length", "32", "--cache", str(cache), "--quiet"]
    return ["compress", str(model_folder), "--method", "gptq", *options]


@pytest.mark.slow
def test_compress_opens_the_folder_in_a_new_process_and_measures_what_it_costs(
    words: list[str], tiny: Any, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    windows: list[torch.Tensor] = []
    store = CalibrationSession.store

    def watched(session: CalibrationSession, *arguments: Any) -> Any:
        windows.append(session.holdout)
        return store(session, *arguments)

    monkeypatch.setattr(CalibrationSession, "store", watched)
    assert main([*words, "--out", str(tmp_path / "out")]) == 0
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    with torch.no_grad():
        full, small = (one(input_ids=windows[0]).logits[:, :-1].double().log_softmax(-1) for one in (tiny, model))
    kl = (full.exp() * (full - small)).sum(-1).flatten()
    about = json.loads((tmp_path / "out/nashswarm.json").read_text())
    cost = about["card"]["heldout"]
    assert math.isclose(cost["kl"], float(kl.mean()), rel_tol=1e-3) and cost["tokens"] == kl.numel()
    assert math.isclose(cost["kl_p99"], float(kl.quantile(0.99, interpolation="higher")), rel_tol=1e-3)
    targets = windows[0][:, 1:, None]
    assert math.isclose(cost["nll"], float(-small.gather(-1, targets).mean()), rel_tol=1e-4)
    same = (full.argmax(-1) == small.argmax(-1)).double().mean()
    assert math.isclose(cost["top1_agreement"], float(same), abs_tol=1.5 / kl.numel())
    card = (tmp_path / "out/README.md").read_text()
    sha256 = about["record"]["config"]["dataset"]["calibration_sha256"]
    for part in (f"{cost['kl']:.4f}", f"{cost['kl_p99']:.4f}", f"{cost['nll']:.4f}", sha256, "AutoModelForCausalLM"):
        assert part in card


@pytest.mark.slow
def test_compress_folder_that_computes_other_numbers_is_not_kept(
    words: list[str], tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    honest = reload.outputs
    monkeypatch.setattr(reload, "outputs", lambda model, tokens: honest(model, tokens) + 1)  # in this process alone
    assert main([*words, "--out", str(tmp_path / "out")]) == 2
    assert "computes other numbers in a new process" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
    assert main([*words, "--out", str(tmp_path / "out"), "--no-verify"]) == 0


def test_check_folder_that_cannot_be_opened_says_why(
    tiny: Any, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.executable", "false")  # the program, which fails without a word
    with pytest.raises(ValueError, match="cannot be opened in a new process, so nothing was kept: it ended with"):
        reload.check(tmp_path, tiny, torch.arange(4))
