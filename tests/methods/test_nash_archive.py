"""``nash_archive`` on matrices made by hand: its budget, its bytes, threads, and what it refuses."""

import functools

import numpy as np
import pytest
import torch

from nashswarm.layers import Layer, Moments
from nashswarm.methods.method import Compressed
from nashswarm.methods.nash_archive.settings import NashArchive
from nashswarm.methods.nash_lattice.budget import BUDGET_TOLERANCE
from nashswarm.packed.file_format import TABLES
from nashswarm.quant.entropy import CodeTables
from nashswarm.quant.path_entropy import decode_paths
from tests.methods.handmade import FIXED_BYTES, context_of, matrices, moments_of

SHAPES = {"wte": (3300, 16), "h.0.up": (600, 16), "h.0.down": (330, 24)}
UNUSED = 2 * BUDGET_TOLERANCE  # share of the budget: estimates of bytes are a little wrong on matrices this small


@functools.cache
def example() -> tuple[tuple[Layer, ...], dict[str, Moments]]:
    layers = matrices(SHAPES)
    return layers, moments_of(layers)


def compress(bits: float) -> Compressed:
    return NashArchive(bits=bits).compress(context_of(*example()), np.random.default_rng(0))


@functools.cache
def result(bits: float) -> Compressed:
    return compress(bits)


@pytest.mark.parametrize("bits", [1.5, 3.0, 6.0])
def test_compress_meets_the_budget_from_below(bits: float) -> None:
    budget = bits * sum(layer.parameters for layer in example()[0]) / 8 - FIXED_BYTES
    size = sum(len(content) for content in result(bits).packed.values())
    assert (1 - UNUSED) * budget - 4 <= size <= budget  # the coder writes words of four bytes


def test_compress_packs_the_weights_it_returns() -> None:
    compressed = result(3.0)
    tables = CodeTables.unpack(compressed.packed[TABLES])
    for layer in example()[0]:
        decoded = decode_paths(compressed.packed[layer.name], tables)
        assert torch.equal(decoded.dequantize(), compressed.weights[layer.name]), layer.name
    assert [line.split()[0] for line in compressed.allocation.splitlines()] == [layer.name for layer in example()[0]]


def test_more_bits_are_worth_less_damage_at_a_lower_price() -> None:
    few, some, many = (result(bits).metrics for bits in (1.5, 3.0, 6.0))
    assert few["damage"] > 4 * some["damage"] > 4 * many["damage"] and few["price"] > some["price"] > many["price"]
    assert 0.15 < some["damage"] / few["damage"] * 4**1.5 < 3  # a bit divides the damage by about four


def test_compress_with_two_threads_gives_the_same_bytes() -> None:
    torch.set_num_threads(2)
    try:
        packed = compress(3.0).packed
    finally:
        torch.set_num_threads(1)
    assert all(np.array_equal(content, packed[name]) for name, content in result(3.0).packed.items())


def test_compress_has_no_certificate_and_says_nothing_of_regrets() -> None:
    assert not result(3.0).game and not [name for name in result(3.0).metrics if "regret" in name]


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"bits": 0.0}, r"method\.bits=0\.0 must be a positive number"),
        ({"bits": float("inf")}, r"method\.bits=inf must be a positive number"),
        ({"floor": -0.1}, r"method\.floor=-0\.1 must not be negative"),
    ],
)
def test_settings_without_a_meaning_are_refused(settings: dict[str, float], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        NashArchive(**settings)  # type: ignore[arg-type]


def test_budget_below_every_code_zero_is_refused() -> None:
    with pytest.raises(ValueError, match=r"below the smallest possible size of this model, .* raise method\.bits"):
        compress(0.05)
