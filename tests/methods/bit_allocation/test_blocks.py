"""Blocks: their damage, features, bytes and description, against loops over elements."""

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from nashswarm.layers import Layer, Moments, curvature
from nashswarm.methods.bit_allocation import blocks as allocation
from nashswarm.methods.bit_allocation.blocks import (
    Blocks,
    block_features,
    check_divisible,
    damage,
    describe_widths,
    quantize_layers,
)
from nashswarm.quant.grid import Scheme, quantize
from nashswarm.quant.pack import pack
from nashswarm.reporting.figures import games

few = settings(max_examples=25, deadline=None)
SCHEME = Scheme(8)


def layer(name: str, rows: int, columns: int, *modules: str, role: str = "mlp", seed: int = 0) -> Layer:
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    return Layer(name, role, 0.25, modules or (name,), ("Linear",) * max(1, len(modules)), weight)


def product_moments(rows: int, columns: int, seed: int = 1) -> Moments:
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(4 * columns, columns, generator=generator)
    outputs, coupled = torch.rand(2, rows, generator=generator) + 0.1
    seen, met = (part.T @ part / len(part) for part in inputs.split(2 * columns))
    return Moments(seen, outputs, coupled, met)


def lookup_moments(rows: int, columns: int, seed: int = 2) -> Moments:
    generator = torch.Generator().manual_seed(seed)
    outputs = torch.rand(columns, generator=generator) + 0.1
    share = torch.rand(rows, generator=generator).softmax(0)
    return Moments(share, outputs, outputs, share)


@given(st.data())
@few
def test_describe_widths_is_read_back_by_the_figures(data: st.DataObject) -> None:
    grids = {}
    for name in ("transformer.h.0.attn.c_attn", "lm_head"):
        rows, columns = data.draw(st.integers(1, 5)), data.draw(st.integers(1, 5))
        widths = st.lists(st.sampled_from([0, 2, 3, 4, 8, 16]), min_size=rows * columns, max_size=rows * columns)
        grids[name] = np.array(data.draw(widths), np.uint8).reshape(rows, columns)
    read = games.tiles(describe_widths(grids))
    assert list(read) == list(grids)
    for name, tiles in grids.items():
        assert read[name].tolist() == tiles.tolist()


def test_curvature_diagonal_of_products_and_lookups_equals_loop() -> None:
    moments = {"mlp": product_moments(6, 8), "wte": lookup_moments(6, 8)}
    product = curvature(layer("mlp", 6, 8), moments).diagonal()
    lookup = curvature(layer("wte", 6, 8), moments).diagonal()
    for row in range(6):
        for column in range(8):
            both = [part[column, column] for part in (moments["mlp"].inputs, moments["mlp"].coupled_inputs)]
            by_hand = moments["mlp"].coupled[row] * sum(both) / 2
            assert product[row, column].item() == pytest.approx(by_hand.item())
            by_hand = moments["wte"].inputs[row] * moments["wte"].outputs[column]
            assert lookup[row, column].item() == pytest.approx(by_hand.item())


def test_curvature_tied_matrix_is_the_sum_of_head_and_lookup() -> None:
    moments = {"head": product_moments(20, 8), "wte": lookup_moments(20, 8)}
    alone = [curvature(layer(name, 20, 8), moments).diagonal() for name in ("head", "wte")]
    assert torch.allclose(curvature(layer("tied", 20, 8, "wte", "head"), moments).diagonal(), alone[0] + alone[1])


def test_curvature_with_floor_adds_share_of_the_mean_of_all_rows() -> None:
    moments = {"head": product_moments(20, 8), "wte": lookup_moments(20, 8)}
    tied = layer("tied", 20, 8, "wte", "head")
    plain, floored = curvature(tied, moments), curvature(tied, moments, floor=0.5)
    for row in range(20):
        mean = sum(moments["head"].coupled.tolist()) / 20
        assert floored.rows[row].item() == pytest.approx(moments["head"].coupled[row].item() + 0.5 * mean)
        for column in range(8):
            all_rows = [moments["wte"].inputs[one] * moments["wte"].outputs[column] for one in range(20)]
            assert floored.lookups[row, column].item() == pytest.approx(
                (all_rows[row] + 0.5 * sum(all_rows) / 20).item()
            )
    assert torch.equal(floored.inputs, plain.inputs)


def test_damage_equals_loop_over_elements() -> None:
    """The quadratic form with the full H, shared out in proportion to the diagonal terms."""
    one, moments = layer("mlp", 20, 24), {"mlp": product_moments(20, 24)}
    layer_curvature = curvature(one, moments)
    s = layer_curvature.diagonal()
    error = one.weight - quantize(one.weight, 3, SCHEME).dequantize()
    shares = np.zeros((2, 3))
    for row in range(20):
        for column in range(24):
            shares[row // 16, column // 8] += s[row, column].item() * error[row, column].item() ** 2 / 2
    f, h = moments["mlp"].coupled, (moments["mlp"].inputs + moments["mlp"].coupled_inputs) / 2
    whole = 0.5 * sum((f[row] * error[row] @ h @ error[row]).item() for row in range(20))
    by_hand = shares * whole / shares.sum()
    damages = damage(one, one.weight - error, layer_curvature, SCHEME)
    assert damages.numpy() == pytest.approx(by_hand.ravel(), rel=1e-4)


def test_damage_uncorrelated_inputs_is_the_quadratic_form() -> None:
    """½ Σ_o f_o e_oᵀ H e_o with H diagonal."""
    one = layer("mlp", 20, 24)
    uncorrelated = torch.diag(torch.arange(1.0, 25))
    moments = {"mlp": dataclasses.replace(product_moments(20, 24), inputs=uncorrelated, coupled_inputs=uncorrelated)}
    quantized = quantize(one.weight, 2, SCHEME).dequantize()
    error, f, h = one.weight - quantized, moments["mlp"].coupled, moments["mlp"].inputs
    whole = 0.5 * sum((f[row] * error[row] @ h @ error[row]).item() for row in range(20))
    damages = damage(one, quantized, curvature(one, moments), SCHEME)
    assert damages.sum().item() == pytest.approx(whole, rel=1e-5)


@pytest.mark.parametrize("kind", ["multiplied", "looked_up", "tied"])
def test_block_features_equal_statistics_of_every_tile(kind: str) -> None:
    """Log variance, kurtosis, log trace of H and log mean f, the last row block being ragged."""
    head, table = product_moments(20, 24), lookup_moments(20, 24)
    modules = {"multiplied": {"a": head}, "looked_up": {"a": table}, "tied": {"b": table, "a": head}}[kind]
    by_row, by_column = (table.inputs, table.outputs) if kind == "looked_up" else (head.outputs, head.inputs.diagonal())
    one = layer("a", 20, 24, *modules)
    block_by_feature = block_features(one, modules, 8).reshape(2, 3, 4)
    for row, rows in enumerate((slice(0, 16), slice(16, 20))):
        for group in range(3):
            columns = slice(8 * group, 8 * group + 8)
            tile = one.weight[rows, columns].double().numpy().ravel()
            log_trace, log_fisher = by_column[columns].double().sum().log(), by_row[rows].double().mean().log()
            assert block_by_feature[row, group] == pytest.approx(
                [np.log(tile.var()), stats.kurtosis(tile, fisher=False), log_trace.item(), log_fisher.item()], rel=1e-6
            )


@pytest.mark.parametrize("constant", [0.0, 0.123, -3.7])
def test_block_features_constant_block_are_finite_and_moderate(constant: float) -> None:
    flat = dataclasses.replace(layer("a", 7, 8), weight=torch.full((7, 8), constant))
    assert (np.abs(allocation.block_features(flat, {"a": product_moments(7, 8)}, 8)) < 100).all()


def test_features_start_with_role_and_depth_and_sensitivity_is_the_mean() -> None:
    layers = [layer("a", 20, 16, role="mlp"), layer("b", 16, 8, role="attn")]
    moments = {"a": product_moments(20, 16), "b": product_moments(16, 8)}
    log_sensitivity = allocation.log_sensitivity(layers, moments, 8)
    features = allocation.features(layers, moments, 8)
    assert features.shape == (5, 2 + 1 + 4)
    assert features[:, :3].tolist() == [[0, 1, 0.25]] * 4 + [[1, 0, 0.25]]
    assert features[:4, 3:] == pytest.approx(allocation.block_features(layers[0], moments, 8))
    s = curvature(layers[0], moments).diagonal()
    means = [s[rows, columns].mean() for rows in (slice(16), slice(16, 20)) for columns in (slice(8), slice(8, 16))]
    means.append(curvature(layers[1], moments).diagonal().mean())
    assert np.exp(log_sensitivity) == pytest.approx(np.array(means), rel=1e-5)


def test_check_divisible_names_every_layer_that_does_not_divide() -> None:
    layers = [layer("fits", 4, 16), layer("first", 4, 12), layer("second", 4, 20)]
    with pytest.raises(ValueError, match=r"2 layers .* group_size 8: first \(12\), second \(20\);"):
        check_divisible(layers, 8)
    check_divisible(layers, 4)


def two_layers() -> Blocks:
    layers = (layer("one", 20, 16), layer("two", 33, 8))
    rng = np.random.default_rng(0)
    return Blocks(layers, SCHEME, (0, 2, 4), rng.random((7, 3)), rng.random(7), rng.random((7, 2)))


def test_bits_profile_is_ordered_by_layer_and_row() -> None:
    bits = two_layers().bits(np.array([0, 1, 2, 2, 1, 1, 0]))
    assert {name: tiles.tolist() for name, tiles in bits.items()} == {"one": [[0, 2], [4, 4]], "two": [[2], [2], [0]]}


@given(st.lists(st.integers(0, 2), min_size=7, max_size=7))
@few
def test_packed_bytes_equal_those_of_the_packed_layers(actions: list[int]) -> None:
    blocks, profile = two_layers(), np.array(actions)
    tensors = quantize_layers(blocks.layers, blocks.bits(profile), SCHEME)
    assert list(tensors) == ["one", "two"]
    assert blocks.packed_bytes(profile) == sum(len(pack(tensor)) for tensor in tensors.values())


def test_damage_by_layer_is_the_sum_of_its_blocks() -> None:
    blocks, profile = two_layers(), np.array([0, 1, 2, 2, 1, 1, 0])
    chosen = [blocks.damage[block, action] for block, action in enumerate(profile)]
    assert blocks.damage_by_layer(profile) == pytest.approx({"one": sum(chosen[:4]), "two": sum(chosen[4:])})


def test_storage_chain_links_consecutive_tiles_of_a_layer() -> None:
    pairs = {(int(one), int(other)) for one, other in zip(*two_layers().storage_chain().nonzero(), strict=True)}
    one_way = {(0, 1), (1, 2), (2, 3), (4, 5), (5, 6)}
    assert pairs == one_way | {(other, one) for one, other in one_way}


def test_quantize_layers_with_moments_lowers_damage() -> None:
    one, moments = layer("a", 20, 16), {"a": product_moments(20, 16)}
    bits = {"a": np.full((2, 2), 3, np.uint8)}
    layer_curvature = curvature(one, moments)
    scheme = Scheme(8, search=True)
    informed = allocation.quantize_layers([one], bits, scheme, moments)["a"].dequantize()
    blind = allocation.quantize_layers([one], bits, scheme)["a"].dequantize()
    damages = [
        allocation.damage(one, quantized, layer_curvature, scheme).sum().item() for quantized in (informed, blind)
    ]
    assert damages[0] < damages[1]
