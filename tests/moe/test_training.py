"""Training a mixture of experts: it learns, resumes bit for bit, and leaves a record."""

import copy
import dataclasses
import pathlib
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from experiments.config import compose
from nashswarm import api
from nashswarm.data.corpus import HubText, sha256
from nashswarm.experiment.compression import reopen
from nashswarm.experiment.plan import plan
from nashswarm.experiment.run import Outcome, run
from nashswarm.moe import loss, training
from nashswarm.moe.model import MoeForCausalLM, MoeSource
from nashswarm.moe.router.expert_choice import ExpertChoice
from nashswarm.moe.router.loss_free import LossFree
from nashswarm.moe.router.nash_swarm import NashSwarmRouter
from nashswarm.moe.router.top_k import TopK
from nashswarm.moe.training import Training, draw_batches, train
from nashswarm.packed import model_folder
from nashswarm.progress import no_track
from nashswarm.records import record
from nashswarm.reporting import tables

ROOT = pathlib.Path(__file__).parents[2]
LABELS = {"experiment": "single", "model": "moe_small", "method": "any", "dataset": "story", "measure": "routed"}
SETTINGS = Training(steps=8, batch_size=2, warmup=2, save_every=3, price_steps=2)
ROUTERS = ["moe_dense", "moe_top_k", "moe_expert_choice", "moe_loss_free", "moe_quantile"]
ROUTERS += ["moe_no_nash", "moe_no_swarm", "moe_no_cache", "moe_nash_swarm"]
LOAD = {"max_violation", "max_violation_worst", "load_gini", "load_cv", "dead_experts", "dropped"}


def small(kind: Any) -> MoeForCausalLM:
    torch.manual_seed(0)
    return MoeSource(width=32, layers=2, expert_width=32, context=16).build(kind, 64, 0)


@pytest.fixture(scope="module")
def windows() -> torch.Tensor:
    return torch.randint(64, (10, 16), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("kind", [TopK(), LossFree(), ExpertChoice(), NashSwarmRouter()])
def test_train_killed_continues_to_the_same_bits(kind: Any, windows: torch.Tensor, tmp_path: pathlib.Path) -> None:
    whole, path = small(kind), tmp_path / "killed"
    series = train(whole, windows, SETTINGS, kind.loss, 0, tmp_path / "whole", no_track)

    def kill(step: int) -> None:
        if step == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(small(kind), windows, SETTINGS, kind.loss, 0, path, no_track, kill)
    again = small(kind)
    assert train(again, windows, SETTINGS, kind.loss, 0, path, no_track) == series
    for name, part in whole.state_dict().items():
        assert torch.equal(part, again.state_dict()[name]), name


def test_train_counting_text_loss_falls_and_terms_add_up(tmp_path: pathlib.Path) -> None:
    windows = (torch.arange(10)[:, None] + torch.arange(16)) % 8  # it counts
    weights = loss.LossWeights(balance=0.1, cache=0.2, swarm=0.3, nash=0.4)
    settings = dataclasses.replace(SETTINGS, steps=60, learning_rate=0.01, save_every=100)
    series = train(small(NashSwarmRouter()), windows, settings, weights, 0, tmp_path / "none", no_track)
    assert np.mean(series["train_nll"][-5:]) < series["train_nll"][0] - 1
    for step in (0, 30, 59):
        parts = sum(loss.SIGNS[name] * getattr(weights, name) * series[name][step] for name in loss.TERMS)
        assert series["train_loss"][step] == pytest.approx(series["train_nll"][step] + parts, rel=1e-5)
    assert not (tmp_path / "none").exists()


def test_draw_batches_every_window_comes_before_one_comes_again() -> None:
    order = torch.cat(draw_batches(10, Training(steps=9, batch_size=4, warmup=1), 3)).tolist()
    assert len(order) == 36 and all(sorted(order[start : start + 10]) == list(range(10)) for start in (0, 10, 20))
    assert order != torch.cat(draw_batches(10, Training(steps=9, batch_size=4, warmup=1), 4)).tolist()


def test_settle_one_text_evens_load(windows: torch.Tensor, tmp_path: pathlib.Path) -> None:
    """On the text that they were settled on, of a router whose affinities are far from even."""
    model = small(NashSwarmRouter())
    with torch.no_grad():
        for router in model.routers():
            router.weight.normal_(std=0.5)

    def worst() -> float:
        with torch.no_grad():
            routings = model(input_ids=windows).routings
        return max(float(routing.loads().max() / routing.loads().mean()) - 1 for routing in routings)

    before = worst()
    for step in range(30):
        with torch.no_grad():
            model.settle(model(input_ids=windows).routings, 1 / (step + 1))
    assert worst() < 0.2 * before


@pytest.fixture
def execute(text_folder: pathlib.Path, tmp_path: pathlib.Path) -> Callable[..., Outcome]:
    """A short run on the small text; records and cache under ``tmp_path``."""
    overrides = ["task=train_moe", "dataset=local_text", f"dataset.path={text_folder}", "device=cpu"]
    overrides += ["model.width=32", "model.layers=1", "model.expert_width=32", "model.context=32"]
    overrides += ["train_moe.steps=3", "train_moe.batch_size=4", "train_moe.price_steps=1"]
    overrides += [f"records={tmp_path}/records", f"cache={tmp_path}/cache"]

    def started(*more: str) -> Outcome:
        return run(compose(*overrides, *more), LABELS)

    return started


def test_load_or_train_locks_the_model_while_it_trains(
    execute: Callable[..., Outcome], tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another process cannot claim it while it is trained, and finds it afterwards."""
    program = "import fcntl, sys; fcntl.lockf(open(sys.argv[1], 'a'), fcntl.LOCK_EX | fcntl.LOCK_NB)"
    tried: list[str] = []

    def spied(*arguments: Any) -> dict[str, list[float]]:
        [lock] = (tmp_path / "cache").glob(".moe-*.lock")
        ended = subprocess.run([sys.executable, "-c", program, str(lock)], capture_output=True, text=True)
        tried.append(ended.stderr)
        return train(*arguments)

    monkeypatch.setattr(training, "train", spied)
    execute("method=moe_dense", "measure.repeats=1", "measure.windows=8")
    execute("method=moe_dense", "measure.repeats=2", "measure.windows=8")
    assert len(tried) == 1 and "BlockingIOError" in tried[0]
    assert not list((tmp_path / "cache").glob(".moe-*"))


def test_load_or_train_other_version_is_taken_only_if_asked(
    execute: Callable[..., Outcome], tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What comes after training, like the prices' step, is no other model; the record says who trained it."""
    sizes = ["measure.repeats=1", "measure.windows=8", "measure.served_tokens=5"]
    first = execute(*sizes, "rerun=true")
    monkeypatch.setattr("nashswarm.experiment.run.code_digest", lambda: "newer")
    monkeypatch.setattr(training, "train", lambda *_: pytest.fail("trained again"))
    other = execute(*sizes, "rerun=true", "train_moe.any_version=true", "method.follow=0.5")
    assert other.record.provenance["trained_by"] == first.record.provenance["trained_by"] != "newer"
    assert other.record.metrics["nll"] == first.record.metrics["nll"]
    assert other.record.metrics["nll_following"] != first.record.metrics["nll_following"]
    assert other.record.config["train_moe"] == first.record.config["train_moe"]
    for changed in ("train_moe.any_version=false", "train_moe.learning_rate=0.002"):
        with pytest.raises(BaseException, match="trained again"):
            execute(*sizes, "rerun=true", "train_moe.any_version=true", changed)


@pytest.mark.parametrize("method", ROUTERS)
def test_run_every_router_leaves_promised_record(method: str, execute: Callable[..., Outcome]) -> None:
    words = (f"method={method}", "measure.served_tokens=5", "measure.repeats=1", "measure.windows=8")
    outcome = execute(*words)
    written = outcome.record
    assert outcome.status == "finished" and record.read(outcome.path) == written
    always = {"nll", "tokens", "token_microseconds", "active_parameters", "looks_ahead", "seconds"}
    assert always <= set(written.metrics)
    assert len(written.series["nll"]) == 8 and len(written.series["train_nll"]) == 3
    assert (set(written.metrics) >= LOAD) == (method != "moe_dense")
    assert ("resident_hits" in written.metrics) == (method not in ("moe_dense", "moe_expert_choice"))
    assert ("resident_hits_without" in written.metrics) == (method in ("moe_no_nash", "moe_no_swarm", "moe_nash_swarm"))
    follows = method not in ("moe_dense", "moe_top_k", "moe_expert_choice", "moe_no_nash", "moe_quantile")
    assert ({"nll_following", "max_violation_following"} <= set(written.metrics)) == follows
    if "load_0" in written.series:
        assert sum(written.series["load_0"]) == 8 * 32 * 2
    assert execute(*words).status == "skipped"


def test_run_saved_model_can_be_compressed(execute: Callable[..., Outcome], tmp_path: pathlib.Path) -> None:
    sizes = ["measure.served_tokens=5", "measure.repeats=1", "measure.windows=8", "model.width=64"]
    trained = execute(f"save={tmp_path}/trained", "model.expert_width=64", *sizes).record
    changed = ["model=local", f"model.path={tmp_path}/trained", "method=gptq", "method.bits=4"]
    changed += ["dataset=local_text", f"dataset.path={tmp_path}/story.txt", "device=cpu", "dataset.test_windows=4"]
    changed += ["dataset.calibration_windows=4", "dataset.holdout_windows=2", f"records={tmp_path}/records"]
    (tmp_path / "story.txt").write_text("the starling follows its flock and the block its price . " * 200)
    compressed = run(compose(*changed, f"cache={tmp_path}/cache"), LABELS).record
    assert sum(row["role"] == "expert_up" for row in compressed.layers) == 8
    assert compressed.provenance["parameters"] == trained.provenance["parameters"]
    assert compressed.metrics["bits_per_weight_model"] < 8
    with pytest.raises(ValueError, match="the saved model was trained, not compressed"):
        reopen(model_folder.read(tmp_path / "trained").about, {})


@pytest.mark.slow
def test_quick_validation_fills_its_table(execute: Callable[..., Outcome], monkeypatch: pytest.MonkeyPatch) -> None:
    compress = api.compress
    monkeypatch.setattr(
        api, "compress", lambda model, tokenizer, _, windows, bits: compress(model, tokenizer, "gptq", windows, bits)
    )
    sizes = [
        "model.width=64",
        "model.expert_width=64",
        "measure.batches=2",
        "measure.length=16",
        "measure.batch_size=2",
    ]
    written = execute("measure=quick_validation", *sizes).record
    metrics = written.metrics
    table, columns = tables.special_table([written])
    assert columns is tables.VALIDATION and table["nll_quantized"].tolist() == [metrics["nll_quantized"]]
    assert metrics["bytes_file"] < metrics["bytes_memory"] and metrics["bytes_resident"] < metrics["bytes_memory"]
    assert abs(metrics["nll_quantized"] - metrics["nll"]) < 0.5
    for name in ("latency_ms", "tokens_per_second"):
        assert {name, f"{name}_quantized"} <= set(metrics)


def test_routing_time_fills_its_table(execute: Callable[..., Outcome]) -> None:
    written = execute("measure=routing_time", "measure.tokens=32", "measure.experts=[8]", "measure.repeats=2").record
    shares = [written.metrics[f"share_{name}_8"] for name in ("scores", "choice")]
    assert min(shares) > 0 and sum(shares) == pytest.approx(1)
    table, columns = tables.special_table([written])
    assert columns is tables.ROUTING and table["experts"].tolist() == [8]
    assert table["route_first"].tolist() == [written.metrics["route_first_8"]]
    assert table["layer_ratio_all"].tolist() == [written.metrics["layer_ratio_batch_32_8"]]


@pytest.mark.parametrize(
    "overrides, message",
    [
        (["method=gptq"], "task=train_moe cannot use this method: choose for example method=moe_nash_swarm"),
        (["measure=quality"], "task=train_moe cannot use this measure"),
        (["dtype=bfloat16"], "task=train_moe trains in float32"),
        (["model.top_k=9"], "model.top_k=9 is not between 1 and model.experts=8"),
        (["dataset.sequence_length=64"], "dataset.sequence_length=64 is not between 2 and model.context=32"),
        (["train_moe.batch_size=4000"], "lower train_moe.batch_size"),
        (["measure=quick_validation", "measure.length=64"], "measure.length=64 exceeds model.context=32"),
        (["measure=quick_validation", "measure.length=32", "measure.batches=100000"], "lower measure.batches"),
        (["dataset.test_windows=100000"], "the validation text has .* fewer than dataset.test_windows=100000"),
        (["dataset.test_windows=0"], "dataset.test_windows=0 must be at least 1"),
        (["train_moe.steps=0"], "train_moe.steps, batch_size and save_every must be at least 1"),
    ],
)
def test_run_settings_that_do_not_fit_are_named(
    execute: Callable[..., Outcome], overrides: list[str], message: str, tmp_path: pathlib.Path
) -> None:
    with pytest.raises(ValueError, match=message):
        execute(*overrides)
    assert not list((tmp_path / "cache").glob("moe-*"))  # nothing was trained


def test_run_evaluates_as_many_windows_as_the_dataset_says(execute: Callable[..., Outcome]) -> None:
    written = execute("method=moe_dense", "measure.repeats=1", "dataset.test_windows=5").record
    assert len(written.series["nll"]) == 5


def test_run_single_file_is_never_test_and_training_text(
    execute: Callable[..., Outcome], text_file: pathlib.Path, text_folder: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    """Its beginning judges a model that the rest has trained; the rest, which tests otherwise, is refused then."""
    single = HubText(str(text_file))
    assert single.text("calibration") + single.text("train") == text_file.read_text()
    sizes = [f"dataset.path={text_file}", "measure.repeats=1", "measure.served_tokens=5"]
    written = execute(*sizes, f"save={tmp_path}/trained").record
    assert written.config["dataset"]["calibration_sha256"] == sha256(single.text("calibration"))
    words = ["model=local", f"model.path={tmp_path}/trained", "dataset=local_text", "method=gptq", "device=cpu"]
    same, size, other = (
        compose(*words, f"dataset.path={path}", f"measure={measure}")
        for path, measure in ((text_file, "quality"), (text_file, "size"), (text_folder, "quality"))
    )
    with pytest.raises(ValueError, match="trained was trained on this very test text: choose another dataset"):
        plan(same)
    assert plan(size).identity["dataset"]["test_sha256"] == written.config["dataset"]["train_sha256"]
    assert plan(other).identity["model"]["content"] == plan(size).identity["model"]["content"]


def test_run_router_without_its_task_is_refused() -> None:
    config = compose("method=moe_top_k")
    with pytest.raises(ValueError, match="this method is for mixtures of experts that are to be trained: add task="):
        run(config, LABELS)


def test_settle_copy_has_prices_of_its_own(windows: torch.Tensor) -> None:
    """A copy that settles has other prices than one that does not: nothing is shared between models."""
    model = small(NashSwarmRouter())
    other = copy.deepcopy(model)
    model.settle(model(input_ids=windows).routings)
    assert not torch.equal(model.routers()[0].price, other.routers()[0].price)
