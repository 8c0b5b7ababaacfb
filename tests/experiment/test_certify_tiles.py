"""Certificates of models in trellis tiles: against the solver, against brute force, and of files that were changed."""

import functools
import hashlib
import json
import pathlib
import shutil
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
import torch
from torch import Tensor

from experiments.config import compose
from nashswarm.cli import main
from nashswarm.experiment.best_paths import best_values
from nashswarm.experiment.certify import certify
from nashswarm.experiment.compression import reopen
from nashswarm.experiment.decoded_costs import Quadratic
from nashswarm.experiment.run import run
from nashswarm.experiment.tile_deviations import arranged, gain_of_tiles, row_factors
from nashswarm.kernels import encoder, native, trellis
from nashswarm.kernels.trellis import Trellis
from nashswarm.kernels.trellis_codes import MEMORY, UNIT, tables, unpack_codes, values_of, values_of_sequences
from nashswarm.layers import Layer
from nashswarm.quant import trellis as quantizer
from nashswarm.quant.curvature import Curvature
from nashswarm.quant.trellis_arrangement import arrange
from nashswarm.records.record import Record
from tests.conftest import build

LABELS = {"experiment": "single", "model": "tiny", "method": "nash_swarm", "dataset": "story", "measure": "size"}
FEW_RATES = ("gpt2", "method.rates=[2,4,8]", "method.grouping=features", "method.floor=0", "method.sweeps=1")
LAYER = "transformer.h.0.mlp.c_fc"
Saved = Callable[..., tuple[Record, pathlib.Path]]


@pytest.fixture(scope="module")
def saved(small_run: list[str], tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> Saved:
    """Model and settings → the record and the folder, compressed once and not to be changed."""
    cache = tmp_path_factory.mktemp("cache")

    @functools.cache
    def compressed(kind: str, *settings: str) -> tuple[Record, pathlib.Path]:
        folder = tmp_path_factory.mktemp(kind)
        build(kind).save_pretrained(folder / "full")
        tokenizer.save_pretrained(folder / "full")
        places = [f"cache={cache}", f"records={folder}/records", f"save={folder}/model"]
        overrides = [*small_run, f"model.path={folder}/full", "method=nash_swarm", "measure=size", *places]
        return run(compose(*overrides, *settings), LABELS, many=False).record, folder / "model"

    return compressed


@pytest.mark.parametrize(
    "settings",
    [
        ("gpt2",),
        ("llama_tied", "method.sweeps=0"),
        ("llama", "method.grouping=stored", "method.rotation=false", "method.rounds=1", "method.rates=[0,3,5,6,7]"),
        FEW_RATES,
    ],
)
def test_certify_tiles_agrees_with_the_record(settings: tuple[str, ...], saved: Saved) -> None:
    record, folder = saved(*settings)
    certificate = certify(folder)
    assert certificate["agrees"] and certificate["enumerated"] == "codes and rates"
    assert certificate["tiles_enumerated"] == certificate["players"] == record.metrics["players"]
    assert certificate["recorded_regret_max"] == record.metrics["regret_max"]
    for name in ("regret_max", "regret_mean", "regret_of_codes", "regret_of_rates", "price"):
        assert certificate[name] == pytest.approx(record.metrics[name], rel=1e-3, abs=1e-9), name
    assert certificate["price"] > 1e-9  # the budget binds
    assert certificate["regret_of_codes"] > 1e-6 or "method.sweeps=0" not in settings


def test_certify_tiles_of_one_rate_enumerates_codes_alone(saved: Saved) -> None:
    record, folder = saved("gpt2", "method.rate_rule=uniform", "method.sweeps=1")
    certificate = certify(folder)
    assert certificate["agrees"] and certificate["enumerated"] == "codes"
    assert certificate["regret_of_rates"] is None and certificate["price"] is None
    recorded = record.metrics["regret_of_codes"]
    assert certificate["regret_max"] == pytest.approx(recorded, rel=1e-3) and recorded > 1e-7


def test_certify_some_tiles_says_how_many(saved: Saved, capsys: pytest.CaptureFixture[str]) -> None:
    record, folder = saved(*FEW_RATES)
    assert main(["certify", str(folder), "--tiles", "20"]) == 1  # it agrees, but is no equilibrium
    certificate = json.loads(capsys.readouterr().out)
    assert certificate["agrees"] and certificate["tiles_enumerated"] == 20 < certificate["players"]
    assert 0 <= certificate["regret_of_rates"] <= 1.001 * record.metrics["regret_of_rates"]
    with pytest.raises(ValueError, match="0 tiles to try: name at least 1"):
        certify(folder, tiles=0)


Change = Callable[[Tensor, Tensor, Tensor], None]


def rewrite(folder: pathlib.Path, change: Change) -> tuple[Trellis, Trellis]:
    """Change the rates, codes, and codes of row scales of a matrix in a saved model, and the checksums with them."""
    path = folder / "model.safetensors"
    tensors = safetensors.numpy.load_file(path)
    before = trellis.parse(torch.from_numpy(tensors[f"{LAYER}.weight"]))
    rates = trellis.tile_rates(before).clone()
    codes, scales = unpack_codes(before.payload, rates), before.row_scale.clone()
    change(rates, codes, scales)
    after = rebuilt(before, rates, codes, scales)
    safetensors.numpy.save_file(tensors | {f"{LAYER}.weight": after.content.numpy()}, path)
    about = json.loads((folder / "nashswarm.json").read_text())
    about["sha256"] = {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in about["sha256"]}
    (folder / "nashswarm.json").write_text(json.dumps(about))
    return before, after


def rebuilt(matrix: Trellis, rates: Tensor, codes: Tensor, row_scale: Tensor | None = None) -> Trellis:
    packed = matrix.row_size
    row_order, column_order = trellis.orders_of(matrix)
    return trellis.build(
        rates, codes, matrix.rows, matrix.columns, matrix.rotated, matrix.scale,
        torch.stack([packed & 15, packed >> 4], 1).flatten(), matrix.row_scale if row_scale is None else row_scale,
        matrix.column_scale, row_order, column_order,
    )  # fmt: skip


@pytest.fixture
def folder(saved: Saved, tmp_path: pathlib.Path) -> pathlib.Path:
    """A copy of a model that a test may change."""
    return pathlib.Path(shutil.copytree(saved(*FEW_RATES)[1], tmp_path / "model"))


def test_certify_tile_that_wastes_bytes_finds_their_price(folder: pathlib.Path) -> None:
    """A tile says the same at 8 bits as it did at 2, which is worth 6 bits of every weight."""

    def waste(rates: Tensor, codes: Tensor, _: Tensor) -> None:
        group, tile = (rates == 2).nonzero()[0].tolist()
        place = (slice(64 * group, 64 * group + 64), slice(16 * tile, 16 * tile + 16))
        codes[place] = values_of(rates, codes)[place].view(torch.uint8)
        rates[group, tile] = 8

    before, after = rewrite(folder, waste)
    assert torch.equal(trellis.dequantize(before), trellis.dequantize(after))
    certificate = certify(folder)
    assert certificate["regret_of_rates"] >= 6 * 128 * certificate["price"] > certificate["tolerance"]
    assert certificate["agrees"] is False and not certificate["equilibrium"]


def test_certify_changed_path_finds_its_gain(folder: pathlib.Path) -> None:
    """A path with other plain bits can go back, and gains what its damage rose by, but for the rounding of rows."""

    def flip(rates: Tensor, codes: Tensor, _: Tensor) -> None:
        group, tile = (rates == 2).nonzero()[0].tolist()
        codes[64 * group + 2 : 64 * group + 64 : 4, 16 * tile + 4] ^= 2

    before, after = rewrite(folder, flip)
    certificate = certify(folder, tiles=1)
    session = reopen(json.loads((folder / "nashswarm.json").read_text()), {}).session
    moments = session.moments()[LAYER]
    inputs = (moments.inputs + moments.coupled_inputs).double() / 2
    inputs += 0.01 * inputs.diagonal().mean() * torch.eye(len(inputs))
    weight = next(layer.weight for layer in session.layers if layer.name == LAYER)
    errors = [(weight - trellis.dequantize(matrix)).double() for matrix in (before, after)]
    good, bad = (float(moments.coupled.double() @ ((error @ inputs) * error).sum(1)) / 2 for error in errors)
    assert certificate["regret_of_codes"] >= 0.9 * (bad - good) > certificate["tolerance"]
    assert certificate["agrees"] is False and not certificate["equilibrium"]


def test_certify_changed_row_scale_raises(folder: pathlib.Path) -> None:
    def scale(rates: Tensor, codes: Tensor, scales: Tensor) -> None:
        scales[3] += 2

    rewrite(folder, scale)
    with pytest.raises(ValueError, match=f"scales of the rows of {LAYER} do not follow from their sensitivities"):
        certify(folder)


CIRCLES = (np.arange(1 << 16)[:, None] >> np.arange(16)) & 1  # all circles of 16 coded bits


@pytest.mark.parametrize("rate", range(9))
def test_best_values_equal_the_best_of_all_circles(rate: int) -> None:
    rng = np.random.default_rng(rate)
    target, weight = rng.normal(0, 1.2 * UNIT, (16, 5)), rng.uniform(0.1, 1, (16, 5))
    values = best_values(target, weight, rate)
    if rate in (0, 8):
        assert np.array_equal(values, np.rint(target).clip(-127, 127) * (rate == 8))
        return
    windows = sum(np.roll(CIRCLES, lag, 1) << lag for lag in range(MEMORY[rate] + 1))
    errors = np.square(target[:, :, None, None] - tables()[rate].astype(float)).min(3) * weight[:, :, None]
    least = [errors[np.arange(16), sequence][np.arange(16), windows].sum(1).min() for sequence in range(5)]
    assert (np.square(values - target) * weight).sum(0) == pytest.approx(least, rel=1e-12)


@pytest.mark.skipif(native.path() == native.SLOW, reason="the C++ library was not built")
@pytest.mark.parametrize("rate", range(1, 8))
@pytest.mark.parametrize("count", [1, 7, 8, 9, 130])
def test_best_values_of_the_library_are_those_of_numpy(rate: int, count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(count)
    target, weight = rng.normal(0, 1.5 * UNIT, (16, count)), rng.uniform(0, 1, (16, count))
    target[3, 0] = 1e6
    by_library = best_values(target, weight, rate)
    monkeypatch.setattr(native, "path", lambda: native.SLOW)
    assert np.array_equal(by_library, best_values(target, weight, rate))


def test_best_values_of_what_is_no_number_end(monkeypatch: pytest.MonkeyPatch) -> None:
    assert np.isfinite(best_values(np.full((16, 3), np.nan), np.ones((16, 3)), 2)).all()
    monkeypatch.setattr(native, "path", lambda: native.SLOW)
    assert np.isfinite(best_values(np.full((16, 3), np.nan), np.ones((16, 3)), 2)).all()


@pytest.fixture(scope="module", params=[True, False])
def small(request: pytest.FixtureRequest) -> tuple[Layer, Trellis, Quadratic]:
    """A matrix of 2 groups of rows and 3 tiles across, the last of 8 columns, at mixed rates.

    Sensitivities are whole steps of the scales, so that the weights of rows are exactly they.
    """
    random = torch.Generator().manual_seed(5)
    weight = torch.randn(128, 40, generator=random)
    mixed = torch.randn(60, 40, generator=random) @ torch.randn(40, 40, generator=random)
    rows = 2.0 ** (torch.randint(-16, -8, (128,), generator=random) / 4)
    curvature = Curvature(rows, mixed.T @ mixed / 60, None)
    arrangement, factor = arrange(weight, curvature, rotated=request.param)
    rates = torch.tensor([[2, 0, 8], [1, 3, 5]], dtype=torch.uint8)
    state = quantizer.feedback(arrangement, factor, rates)
    inputs = curvature.damped().inputs
    assert inputs is not None
    quadratic = Quadratic(rows.double().numpy(), inputs.double().numpy(), None)
    layer = Layer("small", "small", 0.0, ("small",), ("Linear",), weight)
    return layer, quantizer.finish(arrangement.layout, state.encoded()), quadratic


class Board:
    """A matrix whose values are all stored as int8, and best replies found in the space of its weights.

    The bytes are made and decoded anew for every move.
    """

    def __init__(self, layer: Layer, matrix: Trellis, quadratic: Quadratic) -> None:
        assert quadratic.inputs is not None
        self.weight, self.rows, self.inputs = layer.weight.double().numpy(), quadratic.rows, quadratic.inputs
        self.row_order, self.column_order = (order.numpy() for order in trellis.orders_of(matrix))
        self.rates = trellis.tile_rates(matrix)
        self.values = values_of(self.rates, unpack_codes(matrix.payload, self.rates))
        self.matrix = self.with_values(matrix, self.values)

    def with_values(self, matrix: Trellis, values: Tensor) -> Trellis:
        return rebuilt(matrix, torch.full_like(self.rates, 8), values.view(torch.uint8))

    def error(self, values: Tensor) -> np.ndarray:
        return np.asarray(self.weight - trellis.dequantize(self.with_values(self.matrix, values)).double().numpy())

    def damage(self, values: Tensor) -> float:
        error = self.error(values)
        return float((self.rows * ((error @ self.inputs) * error).sum(1)).sum() / 2)

    def reply(self, values: Tensor, group: int, place: int, rate: int) -> Tensor:
        """Return the values after the best reply of a group's column at a rate."""
        rows, column, matrix = slice(64 * group, 64 * group + 64), self.column_order[place], self.matrix
        error = self.error(values)
        wanted = self.weight[:, column] - error[:, column]
        wanted += error @ self.inputs[:, column] / self.inputs[column, column]
        packed = matrix.row_size.numpy()
        size = 0.5 ** (np.stack([packed & 15, packed >> 4], 1).ravel()[rows] / 4)
        scale = matrix.scale * 2.0 ** ((matrix.row_scale.numpy()[rows] - 128.0) / 8)
        turn = trellis.hadamard().double().numpy() if matrix.rotated else np.eye(64)
        column_scale = 2.0 ** ((float(matrix.column_scale[place]) - 128) / 16)
        target = turn @ (wanted[self.row_order[rows]] / scale) / size / column_scale * UNIT
        sequences = [torch.from_numpy(part.reshape(16, 4).T.copy()).float() for part in (target, size**2)]
        best = encoder.best_codes(sequences[0], sequences[1], rate)
        after = values.clone()
        after[rows, place] = (values_of_sequences(best, rate) if rate else torch.zeros(4, 16)).T.reshape(-1).char()
        return after


def test_gain_of_rate_equals_the_fall_of_the_damage_of_the_file(small: tuple[Layer, Trellis, Quadratic]) -> None:
    board = Board(*small)
    ((tiles, _),) = arranged(*small, np.ones((2, 3), bool))
    for rate in range(9):
        falls = []
        for group, tile in np.ndindex(2, 3):
            values, places = board.values, range(16 * tile, min(16 * tile + 16, 40))
            for place in sorted(places, key=lambda place: -board.inputs.diagonal()[board.column_order[place]]):
                values = board.reply(values, group, place, rate)
            falls.append(board.damage(board.values) - board.damage(values))
        gains = tiles.gain_of_rate(rate)
        assert gains == pytest.approx(falls, rel=1e-3, abs=1e-5), rate
        needed = np.random.default_rng(rate).permutation(gains) - 1e-9
        pruned = tiles.gain_of_rate(rate, needed)
        assert (pruned[gains > needed] == gains[gains > needed]).all()
        assert ((pruned == gains) | (pruned == -np.inf)).all()


def test_gain_of_tiles_adds_up_the_paths_and_pays_for_bytes(small: tuple[Layer, Trellis, Quadratic]) -> None:
    board, price = Board(*small), 1e-3
    before, gains = board.damage(board.values), np.zeros(2)
    for group, place, lane in np.ndindex(2, 40, 4):
        values, rows = board.values.clone(), slice(64 * group + lane, 64 * group + 64, 4)
        reply = board.reply(values, group, place, int(board.rates[group, place // 16]))
        values[rows, place] = reply[rows, place]
        gains[group] += max(0.0, before - board.damage(values))
    chosen = np.array([[True, False, True], [False, True, True]])
    rates, paths = gain_of_tiles(*small, [0, 2, 3], price, chosen, workers=2)
    assert paths == pytest.approx(gains, rel=1e-2) and gains.min() > 0
    ((tiles, _),) = arranged(*small, chosen)
    some = tiles.select(np.flatnonzero(chosen))
    costs = [128 * price * (some.rates - rate) + some.gain_of_rate(rate) for rate in (0, 2, 3)]
    assert rates == pytest.approx(np.maximum(np.max(costs, 0), 0)) and rates.max() > 0


def test_row_factors_of_sensitivities_between_steps_follow_the_file() -> None:
    """Rows that round to either of two steps count as the file holds them."""
    random = torch.Generator().manual_seed(2)
    weight, rows = torch.randn(70, 20, generator=random), torch.rand(70, generator=random) + 1e-3
    rows[5] = 0
    curvature = Curvature(rows, torch.eye(20), None)
    arrangement, factor = arrange(weight, curvature)
    state = quantizer.feedback(arrangement, factor, torch.ones(2, 2, dtype=torch.uint8))
    matrix = quantizer.finish(arrangement.layout, state.encoded())
    order = trellis.orders_of(matrix)[0].numpy()
    root, size = row_factors("matrix", matrix, rows.double().numpy()[order])
    assert size == pytest.approx(arrangement.layout.size.numpy(), rel=1e-6)
    assert np.abs(np.log2(root[rows[order] > 0] ** 2 / rows.numpy()[order[rows[order] > 0]])).max() < 0.126
    moved = np.where(np.arange(70) % 2, 1.06, 1 / 1.06) * rows.double().numpy()[order]
    assert row_factors("matrix", matrix, moved)[0] == pytest.approx(root)
    with pytest.raises(ValueError, match="do not follow from their sensitivities"):
        row_factors("matrix", matrix, np.where(np.arange(70) % 2, 1.5, 1) * rows.double().numpy()[order])
