"""Whole runs on the tiny model: records, repetition, sweeps, and what is said when something is wrong."""

import contextlib
import copy
import dataclasses
import hashlib
import importlib.metadata
import importlib.util
import json
import logging
import os
import pathlib
import runpy
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from hydra.core.global_hydra import GlobalHydra

from experiments import mirror
from experiments.config import compose
from nashswarm.experiment.plan import by_content
from nashswarm.experiment.run import Outcome, run
from nashswarm.methods.bit_allocation.game import Solution
from nashswarm.methods.peers import peer
from nashswarm.records import record
from scripts import train_default_model
from tests.models import gguf_file

ROOT = pathlib.Path(__file__).parents[2]
LABELS = {"experiment": "single", "model": "tiny", "method": "any", "dataset": "story", "measure": "quality"}
QUALITY = {"nll", "tokens", "nll_delta", "nll_delta_low", "nll_delta_high", "kl", "kl_low", "kl_high", "top1_agreement"}
SIZE = {"bytes_file", "bits_per_weight", "bits_per_weight_model", "nominal_bits", "compression"}
COST = {"seconds", "peak_bytes", "quantize_seconds", "quantize_peak_bytes"}
GAME = {"regret_max", "regret_mean", "potential_end", "price", "players", "damage"}
SOLVED = {"potential_start", "sweeps", "flock_moves", "flock_align", "flock_shrink", "heldout_passes", "pruned"}
UNPLAYED = {"damage", "price", "players", "potential_end", "sweeps", "unsettled"}
TILES = {"damage", "players", "side_bits", "rate_mean", "regret_of_codes", "bits_per_weight_resident"}
PLAYED = {"price", "potential_start", "potential_end", "regret_of_rates", "regret_mean", "regret_max"}
FLOCK = {"strength", "flock_moves", "flock_align", "flock_shrink", "heldout_passes"}
METHODS = {
    "baseline": set[str](),
    "as_published": set[str](),
    "uniform4": GAME,
    "gptq": {"damage"},
    "fixed_no_nash": GAME,
    "fixed_width": GAME | SOLVED,
    "lattice_no_bit_game": {"damage", "players", "sweeps", "unsettled"},
    "lattice_no_swarm": GAME | UNPLAYED | FLOCK | {"regret_of_steps", "regret_of_codes"},
    "nash_lattice": GAME | UNPLAYED | FLOCK | {"regret_of_steps", "regret_of_codes"},
    "nash_lattice_best": GAME | UNPLAYED | FLOCK | {"regret_of_steps", "regret_of_codes", "damage_correlation"},
    "nash_archive": {"damage", "price", "bits_per_weight_resident"},
    "no_nash": TILES,
    "no_swarm": TILES | PLAYED,
    "no_rotation": TILES | PLAYED,
    "no_sweeps": TILES | PLAYED,
    "no_cache": TILES | PLAYED,
    "random_groups": TILES | PLAYED,
    "feature_groups": TILES | PLAYED,
    "compressed_gradients": TILES | PLAYED,
    "nash_swarm": TILES | PLAYED,
}
SLOW = {"no_sweeps", "random_groups", "feature_groups", "compressed_gradients"}  # nash_swarm with another setting each
SMALL_GAME = ["method.offsets=[-1,0,1]", "method.sweeps=5"]


def runner(small_run: list[str], folder: pathlib.Path) -> Callable[..., Outcome]:
    """Run in this process with further overrides; records and cache under ``folder``."""

    def execute(*overrides: str) -> Outcome:
        config = compose(*small_run, f"records={folder}/records", f"cache={folder}/cache", *overrides)
        return run(config, LABELS)

    return execute


@pytest.fixture
def execute(small_run: list[str], tmp_path: pathlib.Path) -> Callable[..., Outcome]:
    """Run in this process with further overrides; records and cache under ``tmp_path``."""
    return runner(small_run, tmp_path)


@pytest.fixture(scope="module")
def uniform4_outcome(small_run: list[str], tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    """A run of uniform4, finished once; not to be changed."""
    return runner(small_run, tmp_path_factory.mktemp("uniform4"))("method=uniform4")


def lasting(metrics: dict[str, float]) -> dict[str, float]:
    """All metrics but times and memory."""
    return {name: value for name, value in metrics.items() if name not in COST}


def records_in(folder: pathlib.Path) -> list[pathlib.Path]:
    return sorted(folder.rglob("records/**/*.json"))


@pytest.mark.parametrize(
    "method", [pytest.param(method, marks=[pytest.mark.slow] if method in SLOW else []) for method in METHODS]
)
def test_run_every_method_leaves_a_record_with_all_its_metrics(
    method: str, execute: Callable[..., Outcome], tmp_path: pathlib.Path, tiny: Any
) -> None:
    extra = ["method.bits=4.5"] if method == "fixed_no_nash" else []
    ended = execute(f"method={method}", *extra)
    assert ended.status == "finished" and ended.path.parent == tmp_path / "records/single"
    found = record.read(ended.path)
    assert found == ended.record
    assert SIZE | QUALITY | COST | METHODS[method] <= set(found.metrics)
    assert set(found.series) >= {"nll", "tokens", "nll_full", "kl", "top1_agreement"}
    assert len(found.series["kl"]) == 6 and found.metrics["tokens"] == 6 * 31
    assert found.labels == LABELS | {"seed": "0"}
    parameters = sum(parameter.numel() for parameter in tiny.parameters())
    assert found.provenance["parameters"] == parameters
    size = found.metrics["bytes_file"]
    assert found.metrics["bits_per_weight_model"] == pytest.approx(8 * size / parameters)
    assert found.metrics["compression"] == pytest.approx(1 - size / (4 * parameters))
    layers = sum(row["bytes"] for row in found.layers)
    weights = sum(row["parameters"] for row in found.layers)
    shared = found.metrics["bits_per_weight"] * weights / 8 - layers  # code tables, which belong to no layer
    if method == "nash_archive":
        assert 200 < shared < 5000
    else:
        assert 100 < shared < 2500 if "players" in found.metrics and "lattice" in method else shared < 1
    assert [line.split()[0] for line in found.allocation.splitlines()] == [row["name"] for row in found.layers]
    if method == "baseline":
        assert found.metrics["kl"] < 1e-5 and found.metrics["nominal_bits"] == 16
    else:
        assert found.metrics["kl"] > 0
    if method == "fixed_width":
        assert 0.97 * 3 < found.metrics["bits_per_weight_model"] <= 3
        assert found.series["potential"] == sorted(found.series["potential"], reverse=True)
    if method == "nash_archive":
        assert 0.99 * 3 < found.metrics["bits_per_weight_model"] <= 3 and "regret_max" not in found.metrics
    if method in ("nash_lattice", "lattice_no_swarm", "lattice_no_bit_game"):
        assert 0.995 * 3 < found.metrics["bits_per_weight_model"] <= 3
        assert len(found.series["moves"]) == found.metrics["sweeps"]
    if METHODS[method] >= TILES:
        assert 0.98 * 3 < found.metrics["bits_per_weight_model"] <= 3
        assert any((tmp_path / "cache").rglob("*.safetensors")) == (method != "no_cache"), "what is kept"


@pytest.mark.usefixtures("gguf_package")
def test_run_of_gguf_model_records_what_its_weights_were_dequantized_from(
    small_run: list[str], tmp_path: pathlib.Path
) -> None:
    model = ["model=smollm2_135m", f"model.package={gguf_file.PACKAGE}", f"model.file={gguf_file.FILE}"]
    shared = [word for word in small_run if not word.startswith("model")]
    ended = runner([*model, *shared], tmp_path)("method=gptq", "method.bits=3", f"save={tmp_path}/saved")
    found = record.read(ended.path)
    assert found.provenance["dequantized_from"] == ["Q4_1", "Q8_0"]
    assert found.config["model"] == {
        "_target_": "nashswarm.models.packaged_gguf.PackagedGguf",
        "package": gguf_file.PACKAGE,
        "file": gguf_file.FILE,
        "exclude": [],
        "content": hashlib.sha256((tmp_path / "site-packages/tiny_gguf" / gguf_file.FILE).read_bytes()).hexdigest(),
    }
    assert found.metrics["kl"] > 0 and found.fingerprint == ended.path.stem
    card = (tmp_path / "saved/README.md").read_text()
    assert "| weights of the full model | dequantized from Q4_1 and Q8_0 |" in card
    floats = runner(small_run, tmp_path)("method=gptq", "method.bits=3", f"save={tmp_path}/floats").record
    assert "dequantized_from" not in floats.provenance
    assert "dequantized" not in (tmp_path / "floats/README.md").read_text()


def test_run_measure_layers_records_every_layer_alone(execute: Callable[..., Outcome]) -> None:
    found = execute("method=gptq", "measure=layers", "measure.windows=2").record
    assert {"damage_pearson", "damage_spearman", "layer_kl_sum", "kl_together"} <= set(found.metrics)
    assert len(found.series["layer_kl"]) == len(found.series["layer_nll_delta"]) == len(found.layers)
    predicted = [row["damage"] for row in found.layers]
    assert found.metrics["damage_pearson"] == pytest.approx(np.corrcoef(predicted, found.series["layer_kl"])[0, 1])


def test_run_measure_bleu_records_what_it_writes(execute: Callable[..., Outcome]) -> None:
    pytest.importorskip("sacrebleu", reason="the extra eval is not installed")
    lengths = ["measure.prompt_tokens=8", "measure.new_tokens=16", "measure.windows=3"]
    found = execute("method=uniform4", "measure=bleu", *lengths).record
    assert 0 <= found.metrics["bleu_text"] <= 100 and len(found.series["bleu"]) == 3


def test_run_measure_without_its_package_is_refused_before_any_work(
    execute: Callable[..., Outcome], monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(package: str) -> str:
        raise importlib.metadata.PackageNotFoundError(package)

    monkeypatch.setattr(importlib.metadata, "version", missing)
    monkeypatch.setattr("nashswarm.models.sources.load", lambda *_: pytest.fail("a model was loaded"))
    with pytest.raises(ValueError, match="needs sacrebleu"):
        execute("measure=bleu")


def test_identity_folder_counts_by_its_files(tmp_path: pathlib.Path) -> None:
    def told(folder: pathlib.Path) -> Any:
        return by_content({"measures": [{"folder": str(folder), "limit": 3}, {"folder": None}]})

    for name, content in (("one", "a"), ("same", "a"), ("other", "b")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "task.yaml").write_text(content)
    assert told(tmp_path / "one") == told(tmp_path / "same") != told(tmp_path / "other")
    assert told(tmp_path / "one")["measures"][1] == {"folder": None}
    with pytest.raises(ValueError, match=r"holds no file; set measure\.folder"):
        told(tmp_path / "absent")


def test_run_baseline_at_32_bits_changes_nothing(execute: Callable[..., Outcome]) -> None:
    found = execute("method=baseline", "method.bits=32").record
    assert found.metrics["nll_delta"] == pytest.approx(0, abs=1e-9) and found.metrics["top1_agreement"] == 1
    assert found.metrics["kl"] == pytest.approx(0, abs=1e-9)
    assert found.series["nll"] == pytest.approx(found.series["nll_full"], abs=1e-9)


def test_run_nll_is_that_of_the_test_text(
    execute: Callable[..., Outcome], tiny: Any, tokenizer: Any, text_file: pathlib.Path
) -> None:
    """From the file to the number by hand: the last four fifths of the text, the library's own loss."""
    text = text_file.read_text()
    tokens = torch.tensor(tokenizer(text[int(len(text) * 0.2) :])["input_ids"])
    with torch.no_grad():
        windows = [tokens[None, start : start + 32] for start in range(0, 6 * 32, 32)]
        expected = [tiny(input_ids=window, labels=window).loss.item() for window in windows]
    assert execute("method=baseline", "method.bits=32").record.series["nll"] == pytest.approx(expected, abs=1e-5)


class Repeated(NamedTuple):
    """One small game of nash_lattice: run, asked for again, run again with its cache, without it, with a damaged one.

    ``written``: when the record was written (ns), before and after it was asked for again.  ``cache_before``,
    ``cache_after``: the files of the cache around the run without it.
    """

    first: Outcome
    second: Outcome
    written: tuple[int, int]
    cached: Outcome
    uncached: Outcome
    cache_before: list[pathlib.Path]
    cache_after: list[pathlib.Path]
    damaged: Outcome


@pytest.fixture(scope="module")
def repeated(small_run: list[str], narrow_model: pathlib.Path, tmp_path_factory: pytest.TempPathFactory) -> Repeated:
    folder = tmp_path_factory.mktemp("repeated")
    execute = runner([*small_run, f"model.path={narrow_model}", "method=nash_lattice_best", *SMALL_GAME], folder)
    first = execute()
    before = first.path.stat().st_mtime_ns
    second = execute()
    written = before, first.path.stat().st_mtime_ns
    cached = execute("rerun=true")
    cache_before = sorted((folder / "cache").iterdir())
    uncached = execute("method.cache=false")
    cache_after = sorted((folder / "cache").iterdir())
    for path in cache_after:
        path.write_bytes(path.read_bytes()[:-20])
    return Repeated(first, second, written, cached, uncached, cache_before, cache_after, execute("rerun=true"))


def test_run_second_time_is_skipped(repeated: Repeated) -> None:
    assert repeated.second.status == "skipped" and repeated.second.record == repeated.first.record
    assert repeated.written[0] == repeated.written[1]


def test_run_rerun_gives_the_same_bits_from_the_cache(repeated: Repeated) -> None:
    first, again = repeated.first, repeated.cached
    assert again.status == "finished" and again.path == first.path
    assert "moments_zipf" not in first.record.provenance["cache_hits"]
    assert {"moments_zipf", "game", "baseline"} <= set(again.record.provenance["cache_hits"])
    for part in ("series", "layers", "allocation", "config"):
        assert getattr(again.record, part) == getattr(first.record, part), part
    assert lasting(again.record.metrics) == lasting(first.record.metrics)


def test_run_without_cache_gives_the_same_numbers_and_leaves_the_cache_alone(repeated: Repeated) -> None:
    cached, uncached = repeated.cached.record, repeated.uncached.record
    assert uncached.provenance["cache_hits"] == [] and repeated.cache_after == repeated.cache_before
    assert lasting(uncached.metrics) == lasting(cached.metrics) and uncached.series == cached.series
    assert uncached.allocation == cached.allocation and uncached.fingerprint != cached.fingerprint


def test_run_damaged_cache_is_made_anew(repeated: Repeated) -> None:
    again = repeated.damaged.record
    assert again.provenance["cache_hits"] == [] and again.series == repeated.first.record.series


def test_run_cache_of_other_code_is_not_read(execute: Callable[..., Outcome], monkeypatch: pytest.MonkeyPatch) -> None:
    execute("method=gptq")
    assert "moments" in execute("method=gptq", "rerun=true").record.provenance["cache_hits"]
    monkeypatch.setattr("nashswarm.experiment.compression.code_digest", lambda: "another version")
    assert execute("method=gptq", "rerun=true").record.provenance["cache_hits"] == []


@pytest.mark.slow
def test_run_recorded_regret_equals_enumeration(
    execute: Callable[..., Outcome], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every player, every action, cost by cost, at the profile that the record's allocation spells out."""
    solved: list[tuple[Any, Any]] = []
    report = Solution.report
    monkeypatch.setattr(
        Solution, "report", lambda self, blocks: (solved.append((self, blocks)), report(self, blocks))[1]
    )
    found = execute("method=fixed_width").record
    solution, blocks = solved[-1]
    widths = [
        int(run.split("*")[0])
        for line in found.allocation.splitlines()
        for run in line.split()[2:]
        for _ in range(int(run.split("*")[1]))
    ]
    profile = [blocks.widths.index(width) for width in widths]
    links = [(link.weights.toarray(), link.disagreement) for link in solution.game.couplings]

    def cost(player: int, action: int) -> float:
        shared = sum(
            weights[player, other] * disagreement[action, profile[other]]
            for weights, disagreement in links
            for other in np.flatnonzero(weights[player])
        )
        return float(solution.game.own_cost[player, action] + shared)

    regrets = [
        cost(player, own) - min(cost(player, action) for action in range(len(blocks.widths)))
        for player, own in enumerate(profile)
    ]
    assert found.metrics["players"] == len(profile)
    assert found.metrics["regret_max"] == pytest.approx(max(regrets), abs=1e-12)
    assert found.metrics["regret_mean"] == pytest.approx(sum(regrets) / len(regrets), abs=1e-12)
    # the last gap to the budget is closed out of equilibrium, by at most the price of one upgrade
    assert found.metrics["regret_max"] <= max(1e-6, found.metrics["price"] * blocks.scheme.tile_bytes(8))


@pytest.mark.parametrize(
    "change",
    ["seed=1", "method.group_size=32", "dataset.test_windows=5", "dataset.holdout_windows=2", "measure=size"],
)
def test_run_change_that_moves_a_number_has_its_own_record(
    change: str, uniform4_outcome: Outcome, execute: Callable[..., Outcome]
) -> None:
    second = execute("method=uniform4", change)
    assert second.status == "finished" and uniform4_outcome.path.name != second.path.name
    if change == "measure=size":
        assert not set(second.record.metrics) & QUALITY and set(second.record.metrics) >= SIZE


@pytest.mark.slow
def test_run_moved_model_and_text_are_skipped(
    execute: Callable[..., Outcome], tmp_path: pathlib.Path, text_file: pathlib.Path, model_folder: pathlib.Path
) -> None:
    first = execute("method=uniform4")
    (tmp_path / "moved.txt").write_bytes(text_file.read_bytes())
    (tmp_path / "moved").symlink_to(model_folder)
    moved = execute("method=uniform4", f"dataset.path={tmp_path}/moved.txt", f"model.path={tmp_path}/moved")
    assert moved.status == "skipped" and moved.path == first.path
    (tmp_path / "moved.txt").write_text(text_file.read_text() + "more")
    assert execute("method=uniform4", f"dataset.path={tmp_path}/moved.txt").status == "finished"


@pytest.mark.slow
def test_run_measure_speed_is_recorded(execute: Callable[..., Outcome]) -> None:
    speed = execute("method=uniform4", "measure=speed", "measure.new_tokens=4", "measure.repeats=3").record
    names = {"decode_ms", "decode_ms_full", "decode_ratio", "prefill_ratio", "bytes_resident", "kl_int8", "kl_float32"}
    assert names <= set(speed.metrics)


@pytest.mark.slow
def test_run_measure_load_is_recorded(execute: Callable[..., Outcome]) -> None:
    pytest.importorskip("fastapi", reason="not installed")
    load = ["measure=load", "measure.requests=4", "measure.prompt_tokens=8", "measure.new_tokens=4"]
    found = execute("method=uniform4", *load).record.metrics
    assert {"latency_p99_ms", "latency_p99_ms_full", "tokens_per_second", "error_rate"} <= set(found)


@pytest.mark.slow
def test_run_excluded_matrices_stay_at_16_bits(uniform4_outcome: Outcome, execute: Callable[..., Outcome]) -> None:
    found = execute("method=uniform4", "model.exclude=['*.mlp.*']").record
    assert not any(".mlp." in row["name"] for row in found.layers)
    assert found.metrics["bytes_file"] > uniform4_outcome.record.metrics["bytes_file"]
    without = execute("method=nash_lattice", *SMALL_GAME, "method.bits=6", "model.exclude=[lm_head,'*wpe']").record
    assert not any(row["name"].endswith(("wte", "wpe")) for row in without.layers)


@pytest.fixture
def command(
    small_run: list[str], tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> Iterator[Callable[..., tuple[int, str]]]:
    """``python -m experiments.run`` in this process and in an empty folder: exit status and all that was printed."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.delenv("HYDRA_FULL_ERROR", raising=False)
    loggers = [logging.getLogger(), logging.getLogger("nashswarm"), logging.getLogger("nashswarm.traceback")]
    before = [(logger, copy.copy(logger.handlers), logger.level, logger.propagate) for logger in loggers]

    def started(*more: str) -> tuple[int, str]:
        flags = [word for word in more if word.startswith("-")]
        words = [word for word in more if word not in flags]
        monkeypatch.setattr(sys, "argv", ["experiments.run", *flags, *small_run, "wandb=disabled", *words])
        monkeypatch.delitem(sys.modules, "experiments.run", raising=False)  # another test may have imported it
        capfd.readouterr()
        code = 0
        try:
            runpy.run_module("experiments.run", run_name="__main__", alter_sys=True)
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else int(end.code is not None)
        finally:
            GlobalHydra.instance().clear()
        printed = capfd.readouterr()
        return code, printed.out + printed.err

    yield started
    for logger, handlers, level, propagate in before:
        logger.handlers, logger.level, logger.propagate = handlers, level, propagate
    logging.disable(logging.NOTSET)


WRONG = {
    "method=nash_swrm": "Could not find 'method/nash_swrm'",
    "metod=nash_lattice": "Could not override 'metod'",
    "dataset=wikitxt": "Could not find 'dataset/wikitxt'",
    "model.path=/nowhere/model": "the model folder /nowhere/model does not exist",
    "model.path=results/family/default_s": "results/family/default_s does not exist; run make family",
    "model.path=nobody/nothing": "the model nobody/nothing cannot be fetched from the Hugging Face hub",
    "dataset.path=/nowhere/text": "the dataset /nowhere/text does not exist",
    "dataset.path=nobody/nothing": "the dataset nobody/nothing cannot be read from the Hugging Face hub",
    "dataset.path=???": "dataset.path must be given",
    "dataset.sequence_length=100000": "dataset.sequence_length=100000 is not between 2 and the model's maximum of 64",
    "dataset.calibration_windows=100000": "give more text, or lower dataset.calibration_windows or",
    "dataset.test_windows=100000": "fewer than dataset.test_windows=100000",
    "model.exclude=[nothing]": "model.exclude names no matrix of this model: nothing",
    "method=fixed_width method.group_size=48": "not divisible by group_size 48",
    "method=fixed_width method.group_size=0": "group_size",
    "method.bits=0.1": "method.bits=0.1 is below the smallest possible size",
    "method=fixed_width method.bits=null": "give either method.bits or method.split",
    "method=nash_lattice method.strength=[2]": "method.strength [2] must hold numbers between 0 and 1",
    "method=nash_lattice method.offsets=[1,2]": "method.offsets [1, 2] must be ascending small integers, 0 among them",
    "method.rates=[2,1]": "method.rates [2, 1] must be ascending whole numbers from 0 to 8",
    "device=gpu": "unknown device=gpu: choose one of auto, cpu, cuda, mps",
    "device=mps": "device=mps is not available on this machine",
    "dtype=float8": "unknown dtype=float8",
    "wandb=online": "wandb=online needs a key",
    "wandb=onlin": "unknown wandb=onlin",
    "viewer=trakio": "unknown viewer=trakio: choose one of disabled, trackio",
}


@pytest.mark.parametrize("wrong", WRONG)
def test_command_mistake_is_answered_in_one_sentence(
    wrong: str, command: Callable[..., tuple[int, str]], tmp_path: pathlib.Path
) -> None:
    code, printed = command(*wrong.split())
    assert code == 1
    assert WRONG[wrong] in printed and "Traceback" not in printed
    if not WRONG[wrong].startswith("Could not"):  # Hydra's own messages are longer
        last = printed.strip().splitlines()[-1]
        assert last.startswith("ERROR ") and WRONG[wrong] in last
    assert records_in(tmp_path) == []


def test_run_text_too_short_for_one_window_is_refused(
    command: Callable[..., tuple[int, str]], tmp_path: pathlib.Path
) -> None:
    (tmp_path / "short.txt").write_text("Not enough.")
    code, printed = command(f"dataset.path={tmp_path / 'short.txt'}")
    assert code == 1 and "too short for one window of 32" in printed and "Traceback" not in printed
    assert records_in(tmp_path) == []


def test_run_window_longer_than_the_context_is_refused(
    command: Callable[..., tuple[int, str]], tmp_path: pathlib.Path
) -> None:
    code, printed = command("dataset.sequence_length=65", "dataset.calibration_windows=2", "dataset.test_windows=2")
    assert code == 1 and "sequence_length" in printed and "64" in printed and "Traceback" not in printed


def test_run_full_disk_leaves_no_record(
    command: Callable[..., tuple[int, str]], tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full_disk(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full_disk)
    code, printed = command("method=uniform4")
    assert code == 1 and "cannot write" in printed and "No space left on device" in printed
    assert records_in(tmp_path) == [] and "Traceback" not in printed


def environment(folder: pathlib.Path) -> dict[str, str]:
    """For a process of its own: no network, no terminal, its home in ``folder``."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("WANDB", "HYDRA"))}
    return kept | {"PYTHONPATH": str(ROOT), "HOME": str(folder), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}


def start(folder: pathlib.Path, *words: str) -> subprocess.Popen[str]:
    """A sweep as users type it, in a process group of its own."""
    return subprocess.Popen(
        [sys.executable, "-m", "experiments.run", "-m", *words],
        cwd=folder,
        env=environment(folder),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


@pytest.mark.slow
def test_sweep_from_the_command_line_is_mirrored_and_then_skipped(
    small_run: list[str], tmp_path: pathlib.Path, command: Callable[..., tuple[int, str]]
) -> None:
    """It is mirrored to an offline folder of W&B; typed again, nothing is left to do."""
    methods = "method=baseline,uniform4,lattice_no_bit_game"
    process = start(tmp_path, *small_run, "wandb=offline", methods)
    printed, _ = process.communicate(timeout=300)
    assert process.returncode == 0 and "Traceback" not in printed, printed
    table = printed[printed.index("3 jobs: 3 finished, 0 skipped, 0 failed") :]
    names = "".join(line.split("│")[1].strip() for line in table.splitlines() if line.startswith("│"))  # long ones fold
    assert all(method in names for method in ("baseline", "uniform4", "lattice_no_bit_game"))
    assert len(list(tmp_path.rglob("offline-run-*/*.wandb"))) == 3
    labels = [record.read(path).labels for path in records_in(tmp_path)]
    assert sorted(label["method"] for label in labels) == ["baseline", "lattice_no_bit_game", "uniform4"]
    assert {(label["model"], label["dataset"]) for label in labels} == {("tiny", "story.txt[calibration_windows=6]")}
    before = {path: path.stat().st_mtime_ns for path in records_in(tmp_path)}
    code, printed = command("-m", methods)
    assert code == 0 and "3 jobs: 0 finished, 3 skipped, 0 failed" in printed
    assert {path: path.stat().st_mtime_ns for path in records_in(tmp_path)} == before


def test_viewer_absent_is_refused_before_any_work(
    command: Callable[..., tuple[int, str]], tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    there = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *more: None if name == "trackio" else there(name, *more)
    )
    code, printed = command("method=uniform4", "viewer=trackio")
    assert code == 1 and "ERROR viewer=trackio needs trackio: pip install -e '.[ui]'" in printed
    assert records_in(tmp_path) == []


@pytest.mark.slow
def test_mirror_failure_costs_no_run_and_can_be_made_later(
    command: Callable[..., tuple[int, str]], tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*_: Any) -> None:
        raise RuntimeError("the server burnt")

    with monkeypatch.context() as broken:
        broken.setattr(mirror, "to_wandb", refused)
        code, printed = command("method=uniform4", "wandb=offline")
    assert len(records_in(tmp_path)) == 1
    assert code == 0 and "finished: " in printed and "Traceback" not in printed
    assert "WARNING wandb=offline failed (RuntimeError: the server burnt)" in printed
    [outcome] = [json.loads(found.read_text()) for found in tmp_path.rglob("outcome.json")]
    assert outcome["status"] == "finished" and outcome["record"]
    told = printed[printed.index("python -m experiments.mirror") :].splitlines()[0].split()[3:]
    monkeypatch.setattr(sys, "argv", ["experiments.mirror", *told])
    with pytest.raises(SystemExit) as ended:
        mirror.main()
    assert not ended.value.code and len(list(tmp_path.rglob("offline-run-*/*.wandb"))) == 1
    monkeypatch.setattr(mirror, "to_wandb", refused)
    with pytest.raises(SystemExit) as ended:
        mirror.main()
    assert ended.value.code


@pytest.mark.parametrize(
    "words, said",
    [
        ("nowhere --wandb offline", "nowhere is no record and no folder of records"),
        (". --wandb offline", ". is no record and no folder of records"),
        (". --wandb online", "wandb=online needs a key"),
        (".", "give --wandb offline, --wandb online or --viewer trackio"),
    ],
)
def test_mirror_mistake_is_answered_in_one_sentence(
    words: str, said: str, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setattr(sys, "argv", ["experiments.mirror", *words.split()])
    with pytest.raises(SystemExit) as refused:
        mirror.main()
    assert refused.value.code
    assert said in f"{refused.value}{capfd.readouterr().err}"
    assert list(tmp_path.iterdir()) == []


def test_viewer_is_fed_once_and_opens_no_connection(
    command: Callable[..., tuple[int, str]], tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "viewed"))
    pytest.importorskip("trackio", reason="the extra ui is not installed")
    from trackio.sqlite_storage import SQLiteStorage

    monkeypatch.setattr("trackio.sqlite_storage.TRACKIO_DIR", tmp_path / "viewed")  # if it was imported before
    monkeypatch.setenv("TRACKIO_SPACE_ID", "nobody/nothing")
    monkeypatch.setattr(socket.socket, "connect", lambda *_: pytest.fail("a connection was asked for"))
    code, printed = command("method=uniform4", "viewer=trackio")
    [path] = records_in(tmp_path)
    assert code == 0 and "WARNING" not in printed
    kept = record.read(path)
    monkeypatch.setattr(sys, "argv", ["experiments.mirror", str(path.parent), "--viewer", "trackio"])
    for times in range(2):
        if times:
            with pytest.raises(SystemExit) as ended:
                mirror.main()
            assert not ended.value.code
        [run] = SQLiteStorage.get_runs("nashswarm")
        [last] = SQLiteStorage.get_logs("nashswarm", run)
        assert {name: last[name] for name in kept.metrics} == kept.metrics
        config = SQLiteStorage.get_run_config("nashswarm", run)
        assert config["labels"] == kept.labels and config["method"] == kept.config["method"]
    assert (tmp_path / "viewed/nashswarm.db").exists()


@pytest.mark.slow
def test_sweep_outlives_failing_jobs(small_run: list[str], tmp_path: pathlib.Path) -> None:
    """Choices misspelt inside a method; not in this process, where the type checker of the tests would answer first."""
    misspelt = ["method.swarm.graph=features,featurs", "method.bit_game=equilibrium,equilibrum"]
    lattice = ["method=nash_lattice", "method.swarm.align=[0]", "method.swarm.shrink=[0]"]
    process = start(tmp_path, *small_run, "wandb=disabled", *lattice, *misspelt)
    printed, _ = process.communicate(timeout=300)
    assert process.returncode == 1 and "Traceback" not in printed
    assert "4 jobs: 1 finished, 0 skipped, 3 failed" in printed, printed
    [made] = records_in(tmp_path)
    told = [json.loads(path.read_text())["record"] for path in tmp_path.rglob("outcome.json")]
    assert list(filter(None, told)) == [str(made)], "a summary finds it from any folder"
    reasons = {path.parent.name: json.loads(path.read_text())["message"] for path in tmp_path.rglob("outcome.json")}
    assert reasons["0"] == "" and "'equilibrum'" in reasons["1"] and "'featurs'" in reasons["2"] and reasons["3"]
    assert not any("\n" in reason for reason in reasons.values())
    logs = {path.parent.name: path.read_text() for path in tmp_path.rglob("*.log")}
    assert [("Traceback" in logs[job]) for job in "0123"] == [False, True, True, True]


def test_sweep_missing_peer_is_left_out_and_no_failure(
    small_run: list[str],
    tmp_path: pathlib.Path,
    command: Callable[..., tuple[int, str]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    absent = dataclasses.replace(peer.LIBRARIES["hqq"], needs=("no-such-package",))
    monkeypatch.setattr(peer, "LIBRARIES", dict(peer.LIBRARIES) | {"hqq": absent})
    code, printed = command("-m", "method=uniform4,peer_hqq")
    assert code == 0 and "2 jobs: 1 finished, 0 skipped, 1 left out, 0 failed" in printed
    assert "left out: " in printed and "needs no-such-package: pip install 'nashswarm[peers]'" in " ".join(
        printed.split()
    )
    assert len(records_in(tmp_path)) == 1


@pytest.mark.slow
def test_sweep_killed_leaves_whole_records_and_goes_on(
    small_run: list[str], tmp_path: pathlib.Path, command: Callable[..., tuple[int, str]]
) -> None:
    sweep = ["method=uniform3,uniform4,rtn", "seed=0,1"]
    process = start(tmp_path, *small_run, "wandb=disabled", *sweep)
    try:
        deadline = time.monotonic() + 120
        while not records_in(tmp_path) and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.01)
        assert process.poll() is None, "the sweep ended before it could be killed"
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
    left = records_in(tmp_path)
    assert 1 <= len(left) < 6
    for path in left:
        assert record.read(path).metrics["bytes_file"] > 0
        assert json.loads(path.read_text())["schema"] == record.SCHEMA
    code, printed = command("-m", *sweep)
    assert code == 0
    assert f"6 jobs: {6 - len(left)} finished, {len(left)} skipped, 0 failed" in printed
    assert len(records_in(tmp_path)) == 6


@pytest.fixture(scope="module")
def promised(tmp_path_factory: pytest.TempPathFactory) -> dict[str, record.Record]:
    """What the embedded default promises, on a part of its test text."""
    folder = tmp_path_factory.mktemp("promised")
    records = {}
    alone = ["method.strength=[0.0]", "method.swarm=null"]  # the game itself, without what is chosen on held-out text
    for name, method, more in (
        ("uniform2", "uniform4", ["method.bits=2"]),
        ("uniform3", "uniform3", []),
        ("nash_lattice", "nash_lattice", alone),
    ):
        windows = ["dataset.calibration_windows=8", "dataset.holdout_windows=2", "dataset.test_windows=16"]
        overrides = [f"method={method}", *more, *windows, f"records={folder}", f"cache={folder}/cache"]
        config = compose(*overrides, "wandb=disabled")
        records[name] = run(config, {"method": name, "model": "default", "dataset": "stdlib_docs"}).record
    return records


def test_default_model_card_is_far_better_than_word_frequencies() -> None:
    card = json.loads((ROOT / "nashswarm/models/default_model/training.json").read_text())
    assert 4 * card["test_perplexity"] <= card["unigram_perplexity"]
    assert 3e6 <= card["parameters"] <= 5e6
    last = [point["train_nll"] for point in card["curve"][-4:]]
    assert max(last) - min(last) < 0.1


@pytest.mark.slow
def test_default_model_at_two_bits_is_visibly_hurt(promised: dict[str, record.Record]) -> None:
    assert np.exp(promised["uniform2"].metrics["nll_delta"]) > 1.3


@pytest.mark.slow
def test_family_size_is_trained_and_composed_by_name(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train_default_model.main(["--size", "xs", "--steps", "2", "--out", str(tmp_path / "default_xs")])
    card = json.loads((tmp_path / "default_xs" / "training.json").read_text())
    train_default_model.main(["--size", "xs", "--steps", "5", "--keep", "--out", str(tmp_path / "default_xs")])
    assert json.loads((tmp_path / "default_xs" / "training.json").read_text()) == card
    assert card["architecture"].startswith("GPT-2, 2 blocks, width 64") and card["test_nll"] > 5
    monkeypatch.setenv("NASHSWARM_FAMILY", str(tmp_path))
    smallest, *_ = compose("experiment=scaling", return_hydra_config=True).hydra.sweeper.params["model.path"].split(",")
    assert smallest == str(tmp_path / "default_xs")
    overrides = ["model=local", f"model.path={smallest}", "method=uniform4", "dataset.test_windows=2"]
    config = compose(*overrides, "wandb=disabled", f"cache={tmp_path}/cache", f"records={tmp_path}")
    found = run(config, {"method": "uniform4", "model": "default_xs", "dataset": "stdlib_docs"}).record
    assert found.labels["model"] == "default_xs" and found.metrics["nll"] > 5


@pytest.mark.slow
def test_nash_lattice_beats_the_next_larger_uniform_width(promised: dict[str, record.Record]) -> None:
    game, uniform = promised["nash_lattice"].metrics, promised["uniform3"].metrics
    assert game["bits_per_weight_model"] <= 3.0 < uniform["bits_per_weight_model"]
    assert game["bits_per_weight_model"] > 3.0 * 0.999
    assert game["kl"] < uniform["kl"] / 2
    assert game["regret_max"] <= 1e-6
