"""Forecasts: linear in the blocks of a model, from measurements of its first two, and refused in a sentence."""

import json
import pathlib
from typing import Any

import pytest
import torch
import transformers

from nashswarm import api
from nashswarm.cli import main
from nashswarm.experiment import forecast
from nashswarm.experiment.forecast import Cost
from nashswarm.methods.nash_swarm.settings import QUICK_SHARE, NashSwarm

BLOCKS = 7
SHAPE: dict[str, Any] = {"vocab_size": 96, "hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2}


@pytest.fixture(autouse=True)
def small_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forecast, "ROWS", 128)
    monkeypatch.setattr(forecast, "COLUMNS", (64, 128))


@pytest.fixture
def config() -> Any:
    return transformers.LlamaConfig(**SHAPE, num_hidden_layers=BLOCKS, max_position_embeddings=64)


def parameters_of(config: Any) -> int:
    return sum(part.numel() for part in transformers.AutoModelForCausalLM.from_config(config).parameters())


def test_forecast_adds_blocks_to_the_first_one(config: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def measure(model: Any, length: int, seconds: Any) -> Cost:
        blocks = model.config.num_hidden_layers
        parameters = sum(part.numel() for part in model.parameters())
        return Cost(parameters, 2.0 + blocks, 30.0 + 5 * blocks, 1000 * blocks, 100 * blocks, 96 * 32)

    monkeypatch.setattr(forecast, "measure", measure)
    monkeypatch.setattr(forecast, "game_seconds", lambda method: {})
    monkeypatch.setattr("nashswarm.memory.resident_bytes", lambda: 10**6)
    told = forecast.forecast("it", config, NashSwarm(bits=4.0), 12, 32)
    parameters = parameters_of(config)
    assert told["parameters"] == parameters and told["bytes_file"] == parameters // 2
    assert told["seconds"] == {"calibrating": 12 * (2 + BLOCKS), "playing": 30 + 5 * BLOCKS}
    assert told["slowest"] == "calibrating" and told["minutes"] == round((12 * 9 + 65) / 60, 1)
    assert told["peak_bytes"] == 10**6 + 4 * parameters + 1000 * BLOCKS + forecast.GAME_BYTES * 96 * 32
    longer = forecast.forecast("it", config, NashSwarm(bits=4.0), 12, 64)  # whose logits take more than the game
    working = 100 * BLOCKS + forecast.ACTIVATIONS * 100 + forecast.LOGIT_BYTES * 64 * 96
    assert longer["peak_bytes"] == 10**6 + 4 * parameters + 1000 * BLOCKS + working
    quick = forecast.forecast("it", config, NashSwarm(effort="quick"), 12, 32)
    assert quick["windows"] == [12 // QUICK_SHARE, 32]


def test_measure_counts_moments_and_inputs_of_the_model(config: Any) -> None:
    config.num_hidden_layers = 1
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    cost = forecast.measure(model, 16, {16: 1e-9, 48: 3e-9})
    assert cost.parameters == parameters_of(config) and cost.largest == 96 * 32
    # Queries, keys and values read the same inputs, gate and up too; the head has inputs of its own.
    assert cost.inputs == 4 * 16 * (32 + 32 + 32 + 64 + 32)
    squares = 32 * 32 * 4 + 32 * 64 * 2  # attention, gate and up
    weights = squares + 64 * 32 + 2 * 96 * 32
    assert cost.game == pytest.approx(2e-9 * (weights - 64 * 32) + 4e-9 * 64 * 32)  # 32 and 64 columns
    assert 0 < cost.calibration < 60 and cost.moments > 4 * 32 * 32 / 2 * 5


def test_game_seconds_are_those_of_a_game_that_is_played() -> None:
    assert all(0 < seconds < 1e-2 for seconds in forecast.game_seconds(NashSwarm()).values())


def test_first_blocks_cut_lists_of_one_entry_for_each_block(config: Any) -> None:
    qwen = transformers.Qwen3Config(**SHAPE, num_hidden_layers=3, num_key_value_heads=2, head_dim=16)
    qwen.layer_types = ["full_attention"] * 3
    for whole in (config, qwen, transformers.GPT2Config(n_embd=32, n_layer=3, n_head=2, vocab_size=96)):
        cut = forecast.first_blocks(whole, 2)
        assert cut.num_hidden_layers == 2
        model = transformers.AutoModelForCausalLM.from_config(cut)
        assert model(input_ids=torch.zeros(1, 4, dtype=torch.long)).logits.shape == (1, 4, 96)
    assert len(qwen.layer_types) == 3


def test_two_blocks_that_are_too_wide_raise(config: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forecast, "MOST_MEASURED", 1000)
    with pytest.raises(ValueError, match=r"it is too wide to be measured: .*--plan --by-layer forecasts it"):
        forecast.forecast("it", config, NashSwarm(), 4, 16)


def test_command_forecasts_the_bytes_that_compressing_takes(
    config: Any, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config.save_pretrained(tmp_path)
    assert main(["compress", str(tmp_path), "--plan", "--bits", "4", "--windows", "3"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["bytes_file"] == parameters_of(config) // 2 and told["windows"] == [3, 64]
    assert all(seconds >= 0 for seconds in told["seconds"].values())
    config.max_position_embeddings = 2 * api.LONGEST_WINDOW
    config.save_pretrained(tmp_path)
    assert main(["compress", str(tmp_path), "--plan", "--windows", "2"]) == 0
    assert json.loads(capsys.readouterr().out)["windows"] == [2, api.window_length(str(tmp_path))]
    for options, message in (
        (["llama_none", "--plan"], "llama_none holds no config.json, and no shape is known by that name"),
        ([str(tmp_path), "--plan", "--method", "gptq"], "--plan forecasts nash_swarm"),
    ):
        assert main(["compress", *options]) == 2 and message in capsys.readouterr().err
