"""The types of ggml: their bytes against the package gguf, their rounding against slow second implementations."""

import numpy as np
import pytest
import torch
from torch import Tensor

from nashswarm.quant.curvature import Curvature, factor_curvature
from nashswarm.quant.ggml.packing import pack
from nashswarm.quant.ggml.rounding import descend, error_feedback, round_matrix, round_plainly
from nashswarm.quant.ggml.scales import choose_scales
from nashswarm.quant.ggml.types import TYPES, BlockMatrix, BlockType, Scales

ALL = pytest.mark.parametrize("kind", TYPES.values(), ids=TYPES)
SOME = pytest.mark.parametrize("name", ["Q2_K", "IQ4_XS", "Q5_0"])


def random_matrix(kind: BlockType, rows: int = 5, columns: int = 512) -> BlockMatrix:
    """Draw every field of a matrix evenly from all that a file can hold."""
    generator = torch.Generator().manual_seed(0)

    def draw(low: int, high: int, count: int) -> Tensor:
        return torch.randint(low, high + 1, (rows, count), generator=generator)

    def halves() -> Tensor:
        return (0.1 * torch.randn(rows, columns // kind.block, generator=generator)).half()

    codes, groups = draw(0, len(kind.levels) - 1, columns).to(torch.uint8), columns // kind.group
    scale, offset = halves(), halves() if kind.shifted else None
    if kind.sub_scales is None:
        return BlockMatrix(codes, Scales(kind, scale, offset))
    sub_offset = draw(0, kind.sub_scales[1], groups).int() if kind.shifted else None
    return BlockMatrix(codes, Scales(kind, scale, offset, draw(*kind.sub_scales, groups).int(), sub_offset))


def problem(rows: int = 6, columns: int = 256, lookups: bool = False) -> tuple[Tensor, Curvature]:
    """Return a matrix and a curvature with strong correlations of columns."""
    generator = torch.Generator().manual_seed(1)
    mixing = torch.eye(columns) + 0.2 * torch.randn(columns, columns, generator=generator)
    inputs = torch.randn(4 * columns, columns, generator=generator) @ mixing
    weight = 0.05 * torch.randn(rows, columns, generator=generator)
    looked_up = torch.rand(rows, columns, generator=generator) if lookups else None
    return weight, Curvature(torch.rand(rows, generator=generator) + 0.1, inputs.T @ inputs / len(inputs), looked_up)


def damage(curvature: Curvature, weight: Tensor, matrix: BlockMatrix) -> Tensor:
    return curvature.damage_by_row(weight - matrix.dequantize())


@ALL
def test_pack_is_what_the_package_gguf_decodes(kind: BlockType) -> None:
    gguf = pytest.importorskip("gguf", reason="the package gguf is not installed")
    matrix = random_matrix(kind)
    number = gguf.GGMLQuantizationType[kind.name]
    assert gguf.GGML_QUANT_SIZES[number] == (kind.block, kind.bytes)
    content = pack(matrix)
    assert content.shape == (5, kind.row_bytes(512))
    assert np.array_equal(gguf.dequantize(content, number), matrix.dequantize().numpy())


@ALL
def test_nearest_is_the_level_of_least_distance(kind: BlockType) -> None:
    targets = torch.linspace(kind.levels[0] - 3, kind.levels[-1] + 3, 997)
    distances = (targets[:, None] - torch.tensor(kind.levels)).abs()
    found = kind.level(kind.nearest(targets))
    assert torch.allclose((targets - found).abs(), distances.min(1).values, atol=1e-5)


@ALL
def test_round_plainly_matrix_of_zeros_stays_zero(kind: BlockType) -> None:
    matrix = round_plainly(kind, torch.zeros(2, 256), torch.ones(1, 256))
    assert torch.equal(matrix.dequantize(), torch.zeros(2, 256))


@pytest.mark.parametrize("name", ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"])
def test_choose_scales_has_less_error_than_the_package_gguf(name: str) -> None:
    gguf = pytest.importorskip("gguf", reason="the package gguf is not installed")
    weight, number = problem(rows=16)[0], gguf.GGMLQuantizationType[name]
    theirs = torch.from_numpy(gguf.dequantize(gguf.quantize(weight.numpy(), number), number))
    ours = round_plainly(TYPES[name], weight, torch.ones(1, 256)).dequantize()
    assert (weight - ours).square().sum() < 1.001 * (weight - theirs).square().sum()


def test_round_plainly_weights_on_a_grid_come_back_exactly() -> None:
    """Weights that were dequantized from Q4_1 lose nothing in Q4_1."""
    kind = TYPES["Q4_1"]
    codes = torch.arange(256).remainder(16).to(torch.uint8).repeat(3, 1)
    scales = Scales(kind, torch.full((3, 8), 0.013).half(), torch.full((3, 8), -0.1).half())
    weight = BlockMatrix(codes, scales).dequantize()
    assert torch.equal(round_plainly(kind, weight, torch.ones(1, 256)).dequantize(), weight)


@SOME
def test_error_feedback_equals_exact_compensation(name: str) -> None:
    """A column's error moves the later columns to where they minimise the damage, which a linear system tells."""
    kind, (weight, curvature) = TYPES[name], problem()
    factored = factor_curvature(curvature)
    inputs = factored.curvature.inputs
    assert factored.factor is not None and inputs is not None
    current, expected = weight.double(), torch.empty_like(weight)
    levels = torch.tensor(kind.levels, dtype=torch.float64)
    for column in range(256):
        if column % kind.block == 0:
            span = slice(column, column + kind.block)
            scales = choose_scales(kind, current[:, span].float(), factored.columns[None, span])
            steps, shifts = (
                part.double().repeat_interleave(kind.group, 1) for part in (scales.steps(), scales.shifts())
            )
        place = column % kind.block
        values = levels * steps[:, place, None] + shifts[:, place, None]
        expected[:, column] = values.gather(1, (values - current[:, column, None]).abs().argmin(1, keepdim=True))[:, 0]
        error = current[:, column] - expected[:, column]
        later = slice(column + 1, 256)
        response = torch.linalg.solve(inputs[later, later].double(), inputs[later, column].double())
        current[:, later] += error[:, None] * response
    found = error_feedback(kind, weight, factored.factor, factored.columns).dequantize()
    assert ((found - expected).abs() < 1e-5).float().mean() > 0.98  # ties and float32 move a few codes


@ALL
@pytest.mark.parametrize("lookups", [False, True])
def test_descend_lowers_the_damage_of_every_row(kind: BlockType, lookups: bool) -> None:
    weight, curvature = problem(lookups=lookups)
    matrix = round_plainly(kind, weight, torch.ones(1, 256))
    for _ in range(2):
        better = descend(matrix, weight, curvature)
        assert (damage(curvature, weight, better) < damage(curvature, weight, matrix) * (1 + 1e-5)).all()
        matrix = better


@pytest.mark.parametrize("name, columns, lookups", [("Q3_K", 256, False), ("IQ4_NL", 64, True), ("Q4_1", 64, False)])
def test_descend_ends_where_no_code_gains_alone(name: str, columns: int, lookups: bool) -> None:
    kind, (weight, curvature) = TYPES[name], problem(2, columns, lookups)
    matrix = round_plainly(kind, weight, torch.ones(1, columns))
    for _ in range(60):
        before, matrix = matrix, descend(matrix, weight, curvature)
        if torch.equal(before.codes, matrix.codes) and torch.equal(before.dequantize(), matrix.dequantize()):
            break
    own = damage(curvature, weight, matrix)
    for column in range(0, columns, 5):
        for code in range(0, len(kind.levels), max(len(kind.levels) // 16, 1)):
            other = matrix.codes.clone()
            other[:, column] = code
            assert (damage(curvature, weight, BlockMatrix(other, matrix.scales)) > own * (1 - 1e-4)).all()


@ALL
def test_round_matrix_with_feedback_has_less_damage_than_plain_rounding(kind: BlockType) -> None:
    weight, curvature = problem(rows=32)
    plain = round_plainly(kind, weight, curvature.diagonal())
    found = round_matrix(kind, weight, factor_curvature(curvature), 2)
    assert damage(curvature, weight, found).sum() < 0.6 * damage(curvature, weight, plain).sum()


def test_round_matrix_that_is_looked_up_is_rounded_plainly() -> None:
    weight, curvature = problem(lookups=True)
    curvature = Curvature(curvature.rows, None, curvature.lookups)
    found = round_matrix(TYPES["Q4_K"], weight, factor_curvature(curvature), 2)
    plain = round_plainly(TYPES["Q4_K"], weight, curvature.diagonal())
    assert torch.equal(found.codes, plain.codes)


def test_round_matrix_in_pieces_gives_the_same_codes(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, curvature = problem(lookups=True)
    factored = factor_curvature(curvature)
    whole = round_matrix(TYPES["Q3_K"], weight, factored, 1)
    monkeypatch.setattr("nashswarm.quant.ggml.rounding.CHUNK_WEIGHTS", 512)
    assert torch.equal(round_matrix(TYPES["Q3_K"], weight, factored, 1).codes, whole.codes)
