"""Every method on the tiny GPT-2, through a calibration context that this file builds."""

import copy
import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from nashswarm.calibration.context import CalibrationContext
from nashswarm.calibration.moments import calibrate
from nashswarm.layers import curvature
from nashswarm.methods.bit_allocation.damages import cache_key
from nashswarm.methods.fixed_width import FixedWidth, Split
from nashswarm.methods.gptq import Gptq
from nashswarm.methods.method import Compressed, Method
from nashswarm.methods.prototype import AsPublished
from nashswarm.methods.swarm import Flock
from nashswarm.methods.uniform import Uniform
from nashswarm.models import evaluation, matrices
from nashswarm.quant.entropy import decode_groups
from nashswarm.quant.grid import QuantizedTensor, Scheme
from nashswarm.quant.pack import packed_bytes, unpack

FIXED_BYTES = 6000
PLAIN = Flock(align=(0.0,), shrink=(0.0,))
METHODS: dict[str, Method] = {
    "baseline": Uniform(16),
    "float32": Uniform(32),
    **{f"uniform{bits}": Uniform(bits) for bits in (2, 3, 4, 8)},
    "uniform4_coded": Uniform(4, coded=True),
    "rtn": Uniform(4, search=True),
    "gptq": Gptq(),
    "gptq_packed": Gptq(coded=False),
    "gptq_act_order": Gptq(2, act_order=True),
    "gptq_swept": Gptq(sweeps=3),
    "fixed_width": FixedWidth(),
    "fixed_no_nash": FixedWidth(bit_game="quantiles", code_game=False, bit_widths=(2, 4, 8), bits=4.0),
    "lot": FixedWidth(bit_game="lot"),
    "rounding": FixedWidth(code_game=False),
    "alone": FixedWidth(swarm=None),
    "alone_coded": FixedWidth(swarm=None, coded=True),
    "no_quantization": FixedWidth(bit_widths=(0, 16), bits=6.0),
    "low_resource": FixedWidth(bits=None, split=Split(2, 0.5), swarm=Flock(align=(4.0,), shrink=(0.25,))),
    "balanced": FixedWidth(bits=None, split=Split(4, 0.3), swarm=None),
    "high_accuracy": FixedWidth(bits=None, split=Split(8, 0.1), swarm=None),
}
HIGH_ACCURACY = pytest.param("high_accuracy", marks=pytest.mark.slow)  # the path of "balanced", for twice as long


def context_of(model: Any, windows: Tensor) -> CalibrationContext:
    """Return the context of ``model``; statistics stay in memory."""
    layers = matrices.find_layers(model)
    compressed = copy.deepcopy(model)
    full = evaluation.compute_reference(model, windows, 8)
    computed: dict[str, Any] = {}

    def moments() -> Any:
        names = [name for layer in layers for name in layer.modules]
        if "moments" not in computed:
            computed["moments"] = calibrate(model, names, windows, torch.Generator().manual_seed(0))
        return computed["moments"]

    def heldout_kl(weights: Mapping[str, Tensor], tokens: int | None) -> float:
        matrices.set_weights(compressed, weights)
        scores = evaluation.evaluate(compressed, windows, 8, full)
        matrices.set_weights(compressed, {layer.name: layer.weight for layer in layers if layer.name in weights})
        return float(np.mean(scores["kl"]))

    def cached(kind: str, key: Mapping[str, Any], compute: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
        name = f"{kind} {sorted(key.items())}"
        if name not in computed:
            computed[name] = compute()
        return computed[name]

    parameters = sum(parameter.numel() for parameter in model.parameters())
    return CalibrationContext(layers, FIXED_BYTES, parameters, moments, heldout_kl, cached)


@pytest.fixture(scope="module")
def context(tiny: Any, token_windows: Tensor) -> CalibrationContext:
    """The context of the tiny model; it computes its statistics once."""
    return context_of(tiny, token_windows)


@pytest.fixture(scope="module")
def second_context(tiny: Any, token_windows: Tensor) -> CalibrationContext:
    """Another context of the same model, which shares nothing with the first."""
    return context_of(tiny, token_windows)


def never(*_: Any) -> Any:
    raise AssertionError("a method asked for statistics before the cheap checks")


@pytest.fixture
def blind(context: CalibrationContext) -> CalibrationContext:
    """A context that refuses every slow question."""
    return dataclasses.replace(context, moments=never, heldout_kl=never, cached=never)


def compress(method: Method, context: CalibrationContext, seed: int = 0) -> Compressed:
    return method.compress(context, np.random.default_rng(seed))


@pytest.fixture(scope="module")
def results(context: CalibrationContext) -> Callable[[str], Compressed]:
    """Name → the result of that method on the tiny model, computed once."""
    return functools.cache(lambda name: compress(METHODS[name], context))


def size(result: Compressed) -> int:
    """Return the bytes of the packed layers."""
    return sum(len(packed) for packed in result.packed.values())


def read(packed: np.ndarray) -> QuantizedTensor:
    """Return the tensor in packed tiles or in entropy-coded groups."""
    return decode_groups(packed) if packed[:4].tobytes() == b"NSg1" else unpack(packed)


def tiles(result: Compressed) -> np.ndarray:
    """Return the width of every tile, read back from the packed bytes."""
    return np.concatenate([read(packed).bits.flatten().numpy() for packed in result.packed.values()])


def read_classed(packed: np.ndarray) -> np.ndarray:
    """Return the matrix in the bytes of the prototype's quantizer, read bit by bit."""
    content = packed.tobytes().removeprefix(b"NSp1")
    rows, columns = (int.from_bytes(content[start : start + 4], "little") for start in (0, 4))
    grids = np.frombuffer(content[8:32], np.float32).reshape(3, 2)
    position = 32

    def bits_of(count: int, width: int) -> list[int]:
        nonlocal position
        length = -(-count * width // 8)
        digits = "".join(f"{byte:08b}"[::-1] for byte in content[position : position + length])
        position += length
        return [int(digits[start : start + width][::-1], 2) for start in range(0, count * width, width)]

    classes = np.array(bits_of(rows * columns, 2))
    values = np.zeros(rows * columns, np.float32)
    for rank, width in enumerate((8, 4, 2)):
        members = np.flatnonzero(classes == rank)
        codes = np.array(bits_of(len(members), width), np.float32)
        values[members] = grids[rank, 0] + codes * grids[rank, 1]
    assert position == len(content)
    return values.reshape(rows, columns)


@pytest.mark.parametrize("name", [*(name for name in METHODS if name != "high_accuracy"), HIGH_ACCURACY])
def test_compress_packed_bytes_decode_to_the_weights(
    name: str, context: CalibrationContext, results: Callable[[str], Compressed]
) -> None:
    assert isinstance(METHODS[name], Method)
    result = results(name)
    assert list(result.packed) == list(result.weights) == [layer.name for layer in context.layers]
    code_bits = 0
    for layer, line in zip(context.layers, result.allocation.splitlines(), strict=True):
        tensor = read(result.packed[layer.name])
        assert torch.equal(tensor.dequantize(), result.weights[layer.name]), layer.name
        rows, columns = tensor.bits.shape
        described, shape, *runs = line.split()
        assert (described, shape) == (layer.name, f"{rows}x{columns}")
        widths = [int(width) for width, count in (run.split("*") for run in runs) for _ in range(int(count))]
        assert widths == tensor.bits.flatten().tolist()
        code_bits += sum(widths) * 16 * 64
    assert result.code_bits == code_bits


@pytest.mark.parametrize(
    "name", ["rtn", pytest.param("fixed_width", marks=pytest.mark.slow), "fixed_no_nash", "lot", "low_resource"]
)
def test_compress_same_seed_gives_the_same_bytes(
    name: str, second_context: CalibrationContext, results: Callable[[str], Compressed]
) -> None:
    first, second = results(name), compress(METHODS[name], second_context)
    assert all(np.array_equal(first.packed[layer], second.packed[layer]) for layer in first.packed)
    assert first.metrics == second.metrics and first.allocation == second.allocation


def test_uniform_32_bits_keeps_every_bit(blind: CalibrationContext) -> None:
    result = compress(Uniform(32), blind)
    assert result.float_bits == 32
    assert all(torch.equal(result.weights[layer.name], layer.weight) for layer in blind.layers)


def test_uniform_16_bits_keeps_every_bit_of_a_16_bit_model(model: Any, token_windows: Tensor) -> None:
    halved = model.half().float()
    context = dataclasses.replace(context_of(halved, token_windows), moments=never, heldout_kl=never, cached=never)
    with torch.no_grad():
        before = halved(input_ids=token_windows).logits
        result = compress(Uniform(16), context)
        matrices.set_weights(halved, result.weights)
        matrices.round_to_stored(matrices.uncompressed_tensors(halved, context.layers), result.float_bits)
        assert torch.equal(halved(input_ids=token_windows).logits, before)
    assert size(result) == sum(18 + 2 * layer.parameters for layer in context.layers)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_uniform_rounds_to_the_nearest_level(bits: int, context: CalibrationContext, results: Any) -> None:
    result = results(f"uniform{bits}")
    assert set(tiles(result)) == {bits}
    layer = context.layers[-1]
    for row in (0, 17, 63):
        for start in range(0, layer.weight.shape[1], 64):
            group = layer.weight[row, start : start + 64].numpy()
            step = float(np.float16((max(group.max(), 0) - min(group.min(), 0)) / (2**bits - 1)))
            zero = round(-min(float(group.min()), 0.0) / step)
            levels = step * (np.arange(2**bits) - zero)
            nearest = np.abs(group[:, None] - levels).min(1)
            rounded = result.weights[layer.name][row, start : start + 64].numpy()
            assert np.abs(rounded[:, None] - levels).min(1).max() <= 1e-6
            assert np.abs(rounded - group) == pytest.approx(nearest, abs=1e-6)


def test_uniform_search_lowers_the_error(context: CalibrationContext) -> None:
    plain, searched = compress(Uniform(3), context), compress(Uniform(3, search=True), context)
    assert size(plain) == size(searched)
    for layer in context.layers:
        errors = [(layer.weight - result.weights[layer.name]).square().sum() for result in (searched, plain)]
        assert errors[0] < errors[1]


def test_coded_changes_only_the_bytes(results: Callable[[str], Compressed]) -> None:
    for coded, packed in (("gptq", "gptq_packed"), ("uniform4_coded", "uniform4"), ("alone_coded", "alone")):
        shorter, longer = results(coded), results(packed)
        assert all(torch.equal(shorter.weights[name], longer.weights[name]) for name in shorter.weights)
        assert shorter.damage == longer.damage and shorter.code_bits == longer.code_bits
        assert size(shorter) < size(longer)  # entropy coding, and little padding of ragged rows


def test_gptq_damage_is_below_rounding_and_sweeps_lower_it(
    context: CalibrationContext, results: Callable[[str], Compressed]
) -> None:
    passed, swept = results("gptq"), results("gptq_swept")
    assert set(tiles(passed)) == {3} and set(tiles(results("gptq_act_order"))) == {2}
    rounded = compress(Uniform(3, search=True), context)
    for layer in context.layers:
        layer_curvature = curvature(layer, context.moments())
        damages = [
            float(layer_curvature.damage_by_row(layer.weight - result.weights[layer.name]).sum())
            for result in (swept, passed, rounded)
        ]
        assert damages[0] <= damages[1] * (1 + 1e-4), layer.name
        assert damages[1] == pytest.approx(passed.damage[layer.name], rel=1e-4)
        assert damages[1] <= damages[2] * (1 + 1e-4), layer.name
    assert swept.metrics["damage"] < passed.metrics["damage"]


@pytest.mark.parametrize(
    "bits, swarm", [(2.0, None), (2.5, Flock(align=(4.0,), shrink=(0.25,))), (3, None), (4.0, PLAIN), (6.0, None)]
)
def test_fixed_width_meets_and_never_exceeds_the_budget(
    bits: float, swarm: Flock | None, context: CalibrationContext
) -> None:
    result = compress(FixedWidth(bits=bits, swarm=swarm), context)
    budget = bits * context.parameters / 8 - FIXED_BYTES
    assert 0.98 * budget <= size(result) <= budget  # the step from one width of a tile to the next is near 0.5 %


@pytest.mark.parametrize("name", ["fixed_no_nash", "lot", "rounding", "no_quantization"])
def test_fixed_width_ablation_keeps_the_budget_and_its_widths(
    name: str, context: CalibrationContext, results: Callable[[str], Compressed]
) -> None:
    method = METHODS[name]
    assert isinstance(method, FixedWidth) and method.bits is not None
    budget = method.bits * context.parameters / 8 - FIXED_BYTES
    result = results(name)
    assert 0.95 * budget <= size(result) <= budget
    assert set(tiles(result)) <= set(method.bit_widths)


def test_equilibrium_beats_the_lottery(context: CalibrationContext, results: Callable[[str], Compressed]) -> None:
    equilibrium, drawn = results("fixed_width"), results("lot")
    assert context.heldout_kl(equilibrium.weights, None) < context.heldout_kl(drawn.weights, None)
    assert equilibrium.metrics["damage"] < drawn.metrics["damage"]


def test_flock_of_zero_strength_equals_no_swarm(
    context: CalibrationContext, results: Callable[[str], Compressed]
) -> None:
    alone, silent = results("alone"), compress(FixedWidth(swarm=PLAIN), context)
    assert all(torch.equal(alone.weights[name], silent.weights[name]) for name in alone.weights)
    assert alone.metrics == silent.metrics and alone.series == silent.series
    assert alone.metrics["flock_moves"] == 0


@pytest.mark.slow
def test_flock_settings_are_those_of_least_heldout_kl(
    context: CalibrationContext, results: Callable[[str], Compressed]
) -> None:
    chosen = results("fixed_width")
    assert chosen.metrics["heldout_passes"] == 4
    scores = {}
    for align in Flock().align:
        for shrink in Flock().shrink:
            fixed = compress(FixedWidth(swarm=Flock(align=(align,), shrink=(shrink,))), context)
            assert (fixed.metrics["flock_align"], fixed.metrics["flock_shrink"]) == (align, shrink)
            scores[align, shrink] = context.heldout_kl(fixed.weights, None)
    assert (chosen.metrics["flock_align"], chosen.metrics["flock_shrink"]) == min(scores, key=lambda pair: scores[pair])


def test_regret_equals_enumeration_from_packed_bytes(
    context: CalibrationContext, results: Callable[[str], Compressed]
) -> None:
    """Regret from the bytes: damages from the cache, sizes by packing every deviation."""
    result = results("alone")
    price, scheme, widths = result.metrics["price"], Scheme(64, search=True), (0, 2, 3, 4, 8)
    listed = []
    for width in widths:
        damages = context.cached("damage", cache_key(width, scheme, True), never)
        listed.append(np.concatenate([damages[layer.name].numpy() for layer in context.layers]))
    damage = np.stack(listed, 1)
    start, worst = 0, 0.0
    for packed in result.packed.values():
        bits = unpack(packed).bits.flatten().numpy().astype(int)
        before = packed_bytes(bits, scheme)
        assert before == len(packed)
        for tile, chosen in enumerate(bits):
            row = damage[start + tile]
            for action, width in enumerate(widths):
                moved = bits.copy()
                moved[tile] = width
                saved = before - packed_bytes(moved, scheme)
                worst = max(worst, row[widths.index(chosen)] - row[action] + price * saved)
        start += len(bits)
    assert start == result.metrics["players"]
    assert result.metrics["regret_max"] == pytest.approx(worst, rel=1e-6, abs=1e-12)


@pytest.mark.parametrize("name", ["low_resource", "balanced", HIGH_ACCURACY])
def test_split_prunes_its_share_within_its_bytes(
    name: str, context: CalibrationContext, results: Callable[[str], Compressed]
) -> None:
    method = METHODS[name]
    assert isinstance(method, FixedWidth) and method.split is not None
    result = results(name)
    assert (tiles(result) == 0).mean() >= method.split.pruned
    assert result.metrics["pruned"] == pytest.approx((tiles(result) == 0).mean())
    whole, empty = (
        sum(packed_bytes(np.full(-(-rows // 16) * (columns // 64), bits), Scheme()) for rows, columns in shapes)
        for bits, shapes in (
            (bits, [layer.weight.shape for layer in context.layers]) for bits in (method.split.bits, 0)
        )
    )
    assert size(result) <= (1 - method.split.pruned) * whole + method.split.pruned * empty


@pytest.mark.parametrize("bits", [0, 0.3, -1.0])
@pytest.mark.parametrize("bit_game", ["equilibrium", "quantiles", "lot"])
def test_fixed_width_budget_below_the_smallest_size_raises_before_calibration(
    bits: float, bit_game: Any, blind: CalibrationContext
) -> None:
    widths = (2, 4, 8) if bit_game == "quantiles" else (0, 2, 3, 4, 8)
    method = FixedWidth(bits=bits, bit_game=bit_game, bit_widths=widths)
    with pytest.raises(ValueError, match=r"below the smallest possible size of this model, [\d.]+ bits per parameter"):
        compress(method, blind)


@pytest.mark.slow
def test_fixed_width_smallest_size_in_the_message_is_possible(context: CalibrationContext) -> None:
    with pytest.raises(ValueError) as caught:
        compress(FixedWidth(bits=1.0, bit_widths=(2, 4)), context)
    least = float(str(caught.value).split("this model, ")[1].split(" bits")[0])
    assert set(tiles(compress(FixedWidth(bits=least + 0.001, bit_widths=(2, 4)), context))) == {2}


@pytest.mark.parametrize(
    "method", [Uniform(16, 48), Uniform(4, 48), Gptq(3, 48), FixedWidth(group_size=48), FixedWidth(group_size=128)]
)
def test_group_size_that_divides_no_layer_raises_before_calibration(
    method: Uniform | Gptq | FixedWidth, blind: CalibrationContext
) -> None:
    with pytest.raises(ValueError, match=f"not divisible by group_size {method.group_size}") as caught:
        compress(method, blind)
    odd = [layer.name for layer in blind.layers if layer.weight.shape[1] % method.group_size]
    assert odd and all(name in str(caught.value) for name in odd)


def test_as_published_compresses_linear_layers_only(random_model: Callable[[str], Any], token_windows: Tensor) -> None:
    for kind, touched in (("gpt2", 1), ("llama", 15)):
        context = context_of(random_model(kind), token_windows)
        result = compress(AsPublished(), dataclasses.replace(context, moments=never, heldout_kl=never, cached=never))
        linear = [layer for layer in context.layers if "Linear" in layer.kinds]
        assert len(linear) == touched
        for layer in context.layers:
            weight = result.weights[layer.name].numpy()
            if layer in linear:
                assert np.array_equal(read_classed(result.packed[layer.name]), weight)
                assert len(np.unique(weight)) <= 256 + 16 + 4
                assert f"{layer.name} mixed\n" in result.allocation
            else:
                assert np.array_equal(weight, layer.weight.half().float().numpy())
                assert np.array_equal(unpack(result.packed[layer.name]).dequantize().numpy(), weight)


def test_as_published_classes_follow_magnitude(context: CalibrationContext) -> None:
    result = compress(AsPublished(), context)
    layer = context.layers[0]
    weight, decoded = layer.weight.numpy(), result.weights[layer.name].numpy()
    order = np.sort(np.abs(weight), axis=None)
    high, middle = order[int(0.9 * order.size)], order[int(0.7 * order.size)]
    magnitude = np.abs(weight)
    for members, levels in (
        (magnitude > high, 256), ((magnitude > middle) & (magnitude < high), 16), (magnitude < middle, 4),
    ):  # fmt: skip
        step = np.ptp(weight[members]) / (levels - 1)
        assert len(np.unique(decoded[members])) <= levels + 1
        assert np.abs(decoded - weight)[members].max() <= 0.51 * step


@pytest.mark.slow
def test_fixed_width_matrix_of_zeros_is_pruned(model: Any, token_windows: Tensor) -> None:
    """Some checkpoints hold such a matrix; it is exact at every width."""
    with torch.no_grad():
        model.transformer.h[1].mlp.c_proj.weight.zero_()
    context = context_of(model, token_windows)
    result = compress(FixedWidth(swarm=None), context)
    name = "transformer.h.1.mlp.c_proj"
    assert not result.weights[name].any() and set(unpack(result.packed[name]).bits.unique().tolist()) == {0}


@pytest.mark.parametrize(
    "build",
    [
        lambda: Uniform(5),
        lambda: Uniform(0),
        lambda: Uniform(16, coded=True),
        lambda: FixedWidth(bit_widths=(0, 16), coded=True),
        lambda: Gptq(5),
        lambda: Gptq(16),
        lambda: Gptq(damping=0.0),
        lambda: Gptq(sweeps=-1),
        lambda: FixedWidth(swarm=Flock(local_reply=3)),
        lambda: FixedWidth(bits=None),
        lambda: FixedWidth(bits=3.0, split=Split(4, 0.3)),
        lambda: FixedWidth(bit_widths=()),
        lambda: FixedWidth(bit_widths=(4, 2)),
        lambda: FixedWidth(bit_widths=(2, 2, 4)),
        lambda: FixedWidth(bit_game="quantiles"),
        lambda: FixedWidth(bit_game="quantiles", quantiles=(0.5,), bit_widths=(2, 4, 8)),
    ],
)
def test_settings_that_contradict_raise_and_name_the_setting(build: Callable[[], Method]) -> None:
    with pytest.raises(ValueError, match=r"method\."):
        build()


@pytest.mark.parametrize(
    "build",
    [
        lambda: Uniform(4, group_size=0),
        lambda: Uniform(4, group_size=-64),
        lambda: Gptq(group_size=0),
        lambda: FixedWidth(group_size=0),
        lambda: FixedWidth(bit_widths=(0, 5)),
        lambda: FixedWidth(bits=None, split=Split(4, 1.5)),
        lambda: FixedWidth(bits=None, split=Split(4, -0.1)),
        lambda: FixedWidth(bits=None, split=Split(5, 0.3)),
        lambda: FixedWidth(swarm=Flock(align=())),
        lambda: FixedWidth(swarm=Flock(shrink=())),
        lambda: FixedWidth(swarm=Flock(align=(-1.0,))),
        lambda: FixedWidth(swarm=Flock(shrink=(1.5,))),
        lambda: FixedWidth(swarm=Flock(neighbours=0)),
        lambda: AsPublished(quantiles=(0.9,)),
        lambda: AsPublished(quantiles=(0.7, 0.9)),
    ],
)
def test_settings_without_a_meaning_raise_before_calibration(
    build: Callable[[], Method], blind: CalibrationContext
) -> None:
    with pytest.raises(ValueError):
        compress(build(), blind)
