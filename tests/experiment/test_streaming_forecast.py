"""Forecasts of compression by layer at one price: linear in blocks and windows, and held against a run."""

import json
import pathlib
from typing import Any

import pytest
import torch
import transformers

from nashswarm.cli import main
from nashswarm.experiment import streaming_forecast
from nashswarm.experiment.streaming_forecast import BACKWARD, ENCODE, FORWARD, Rates
from nashswarm.methods.streaming import skeleton
from nashswarm.methods.streaming.settings import ByPrice

SHAPE: dict[str, Any] = {"vocab_size": 96, "hidden_size": 64, "num_attention_heads": 2, "num_key_value_heads": 2}
RATES = Rates(1e-9, {64: 1e-6, 128: 1e-6}, {64: 4e-6, 128: 4e-6})


def llama(blocks: int, tied: bool = True) -> Any:
    return transformers.LlamaConfig(
        **SHAPE, intermediate_size=128, num_hidden_layers=blocks, tie_word_embeddings=tied, max_position_embeddings=64
    )


def told(config: Any, windows: int = 2) -> dict[str, Any]:
    return streaming_forecast.forecast(skeleton.skeleton(config), ByPrice(bits=4.0), windows, 32, RATES)


def test_forecast_seconds_are_linear_in_blocks_and_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nashswarm.memory.peak_bytes", lambda: 0)
    one, two, four = (told(llama(blocks)) for blocks in (1, 2, 4))
    assert two["peak_bytes"] == four["peak_bytes"] and two["bytes_file"] < four["bytes_file"]
    for stage in (BACKWARD, ENCODE):
        assert four["seconds"][stage] - two["seconds"][stage] == pytest.approx(
            2 * (two["seconds"][stage] - one["seconds"][stage]), abs=0.21
        )
    # Rates by weight: those of a block and of the tied embedding.
    weights = 4 * 64 * 64 + 3 * 64 * 128
    assert two["seconds"][ENCODE] == pytest.approx(4e-6 * (2 * weights + 96 * 64), abs=0.06)
    more = told(llama(2), windows=200)
    assert more["seconds"][FORWARD] == pytest.approx(1e-9 * 200 * 32 * 2 * (weights + 2 * 32 * 64), abs=0.06)
    assert more["peak_bytes"] - two["peak_bytes"] <= 3 * 4 * 198 * 32 * 64


def test_forecast_of_an_untied_model_has_two_outer_matrices() -> None:
    tied, untied = (told(llama(1, tied)) for tied in (True, False))
    assert untied["parameters"] - tied["parameters"] == 96 * 64
    assert untied["seconds"][ENCODE] >= tied["seconds"][ENCODE] and untied["slowest"] in untied["seconds"]


def test_forecast_of_a_mixture_counts_experts_by_their_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nashswarm.memory.peak_bytes", lambda: 0)
    many, few = (
        told(
            transformers.Qwen3MoeConfig(
                **SHAPE, head_dim=32, moe_intermediate_size=32, num_experts=8, num_experts_per_tok=chosen,
                num_hidden_layers=2, tie_word_embeddings=True,
            ),
            windows=2000,
        )
        for chosen in (8, 1)
    )  # fmt: skip
    experts = 2 * 8 * 3 * 64 * 32
    less = 1e-9 * 2000 * 32 * experts * 7 / 8
    assert many["seconds"][FORWARD] - few["seconds"][FORWARD] == pytest.approx(less, abs=0.11)
    assert many["peak_bytes"] >= few["peak_bytes"] > 4 * experts


def test_command_plan_tells_the_bytes_and_half_of_the_memory_at_least(
    tmp_path: pathlib.Path, tokenizer: Any, text_file: pathlib.Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr("nashswarm.experiment.forecast.ROWS", 128)
    monkeypatch.setattr(streaming_forecast, "COLUMNS", (64, 128))
    config = llama(2)
    config.vocab_size = len(tokenizer)
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "full")
    tokenizer.save_pretrained(tmp_path / "full")
    words = ["compress", str(tmp_path / "full"), "--by-layer", "--bits", "6", "--windows", "2", "--length", "32"]
    assert main([*words, "--plan"]) == 0
    planned = json.loads(capsys.readouterr().out)
    assert planned["method"] == "nash_swarm" and planned["windows"] == [2, 32]
    assert all(seconds >= 0 for seconds in planned["seconds"].values()) and planned["slowest"] in planned["seconds"]
    assert main([*words, "--calibration", str(text_file), "--out", str(tmp_path / "small")]) == 0
    metrics = json.loads(capsys.readouterr().out)
    assert 0.97 * planned["bytes_file"] <= metrics["bytes_file"] <= planned["bytes_file"]
    assert metrics["parameters"] == planned["parameters"]
    assert planned["peak_bytes"] >= metrics["peak_bytes"] / 2
