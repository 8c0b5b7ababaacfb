"""Sizes from shapes: against known numbers of parameters, against a file that is written, and by hand."""

from typing import Any

import pytest
import torch
from torch import nn

from nashswarm.models.shapes import SHAPES, ParameterCounts, class_entropy, count_from_config, count_parameters
from nashswarm.quant.prototype import CLASS_BITS, quantize_by_magnitude

PARAMETERS = {
    "gpt2": 124_439_808,
    "gpt2_medium": 354_823_168,
    "gpt2_large": 774_030_080,
    "gpt2_xl": 1_557_611_200,
    "opt_125m": 125_239_296,
    "opt_350m": 331_196_416,
    "opt_1_3b": 1_315_758_080,
    "tinyllama": 1_100_048_384,
    "llama2_7b": 6_738_415_616,
    "llama2_13b": 13_015_864_320,
    "deepseek_67b": 67_425_001_472,
}


@pytest.mark.parametrize("name", SHAPES)
def test_count_from_config_matches_known_parameters(name: str) -> None:
    if name == "gpt3_175b":  # 96 blocks of 12 d² + 13 d, vocabulary, 2048 positions, last norm
        d = 12288
        assert count_from_config(SHAPES[name]).parameters == 96 * (12 * d * d + 13 * d) + (50257 + 2048) * d + 2 * d
    else:
        assert count_from_config(SHAPES[name]).parameters == PARAMETERS[name]


def test_count_parameters_on_meta_allocates_nothing() -> None:
    with torch.device("meta"):
        assert count_parameters(nn.Linear(10**6, 10**6)).linear == (10**12,)


def test_count_parameters_of_gpt2_has_only_head_linear(random_model: Any) -> None:
    assert count_from_config(SHAPES["gpt2"]).linear == (50257 * 768,)
    assert count_parameters(random_model("gpt2")).linear == (512 * 64,)
    assert len(count_parameters(random_model("llama")).linear) == 2 * 7 + 1


def test_parameter_counts_bytes_match_hand_computation() -> None:
    """A linear layer of 5 × 6 weights beside 4 other floats: 3, 6 and 21 codes of 8, 4 and 2 bits."""
    counts = ParameterCounts(34, (30,))
    assert (counts.bytes_full, counts.code_bytes, counts.uniform_bytes) == (136, 3 + 3 + 6, 15)
    assert counts.compression_counted == 1 - 12 / 120
    assert counts.bytes_prototype(CLASS_BITS) == 4 * 4 + 4 + 8 + 24 + 8 + 12
    assert counts.bytes_prototype(0) == 4 * 4 + 36 + 12
    assert counts.bytes_prototype(class_entropy()) == pytest.approx(4 * 4 + 36 + 12 + 30 * class_entropy() / 8)
    assert counts.compression(0) == 1 - 64 / 136
    assert counts.bytes_at(4) == 17
    assert counts.share == 30 / 34


@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (16, 64), (101, 13), (64, 256)])
def test_bytes_prototype_equals_written_file(shape: tuple[int, int]) -> None:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    assert len(quantize_by_magnitude(weight, (0.9, 0.7)).pack()) == ParameterCounts(
        weight.numel(), (weight.numel(),)
    ).bytes_prototype(CLASS_BITS)
