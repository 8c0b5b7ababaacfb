"""Fine-tuning what a file holds: every format on the tiny GPT-2, and whole runs."""

import copy
import dataclasses
import functools
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from omegaconf import OmegaConf
from torch import Tensor

from experiments.config import compose
from nashswarm.calibration.cache import Cache
from nashswarm.calibration.session import CalibrationSession
from nashswarm.errors import Unsupported
from nashswarm.experiment.run import Outcome, run
from nashswarm.methods import distillation
from nashswarm.methods.distillation import Recovery, recover
from nashswarm.methods.gptq import Gptq
from nashswarm.methods.method import Compressed
from nashswarm.methods.nash_lattice.settings import NashLattice
from nashswarm.methods.uniform import Uniform
from nashswarm.models import matrices
from nashswarm.packed import file_format
from nashswarm.progress import no_track
from nashswarm.quant.entropy import CodeTables, coded_bits, count_symbols, fit_tables
from nashswarm.quant.grid import Scheme, quantize
from nashswarm.quant.path_entropy import encode_paths, first_tables
from nashswarm.quant.prototype import quantize_by_magnitude
from nashswarm.quant.trainable_codes import TrainableCodes
from nashswarm.records import record
from tests.conftest import path_tensor, trellis_tensor

ROOT = pathlib.Path(__file__).parents[2]
LABELS = {"experiment": "single", "model": "tiny", "method": "any", "dataset": "story", "measure": "quality"}
METHODS = {
    "tiles": Uniform(2, search=True),
    "groups": Gptq(2),
    "lattice": NashLattice(bits=4.0, swarm=None, strength=(0.0,)),
    "floats": Uniform(16),
}
BRIEF = Recovery(steps=48, batch_size=3, code_rate=0.004, scale_rate=0.002, float_rate=0.002, candidates=4)


@pytest.fixture(scope="module")
def session(tiny: Any) -> CalibrationSession:
    """The tiny model with eight windows that calibrate it and are trained on, and four held out; not to be changed."""
    model = copy.deepcopy(tiny)
    windows = torch.randint(512, (12, 24), generator=torch.Generator().manual_seed(1))
    return CalibrationSession(
        model, matrices.find_layers(model), windows[:8], windows[8:], 0, Cache(None, {}), no_track
    )


@pytest.fixture(scope="module")
def compressed(session: CalibrationSession) -> Callable[[str], Compressed]:
    """Format → the tiny model in it, compressed once."""
    return functools.cache(lambda form: METHODS[form].compress(session.context(), np.random.default_rng(0)))


def trained(session: CalibrationSession, result: Compressed, settings: Recovery = BRIEF) -> distillation.Recovered:
    again = copy.copy(session)
    again.candidate_model = copy.deepcopy(session.full)
    return recover(again, result, session.calibration, settings, np.random.default_rng(0))


def size(result: Compressed) -> int:
    return sum(len(content) for content in result.packed.values())


def decoded(packed: Mapping[str, Any]) -> dict[str, Tensor]:
    tables = CodeTables.unpack(packed[file_format.TABLES]) if file_format.TABLES in packed else None
    return {
        name: file_format.decode(name, content, tables).dequantize()
        for name, content in packed.items()
        if name != file_format.TABLES
    }


@pytest.mark.slow
@pytest.mark.parametrize("form", ["tiles", "groups", "lattice"])
def test_recover_each_format_lowers_heldout_kl_within_the_bytes(
    form: str, session: CalibrationSession, compressed: Callable[[str], Compressed]
) -> None:
    before = compressed(form)
    recovered = trained(session, before)
    assert recovered.metrics["finetune_kl_heldout"] < 0.97 * recovered.metrics["finetune_kl_heldout_before"]
    assert recovered.metrics["finetune_chosen_step"] > 0
    assert size(recovered.result) <= 1.001 * size(before)
    for name, weight in decoded(recovered.result.packed).items():
        assert torch.equal(weight, recovered.result.weights[name]), name
    assert recovered.result.damage == {} and recovered.result.game == {}
    assert not any(name.startswith(("regret", "damage", "potential")) and not name.endswith("_before")
                   for name in recovered.result.metrics)  # fmt: skip
    assert [line.split()[0] for line in recovered.result.allocation.splitlines()] == list(recovered.result.weights)


@pytest.mark.parametrize("form", sorted(METHODS))
def test_recover_same_seed_gives_same_bytes(
    form: str, session: CalibrationSession, compressed: Callable[[str], Compressed]
) -> None:
    before, settings = compressed(form), dataclasses.replace(BRIEF, steps=4, candidates=2)
    one, other = (trained(session, before, settings) for _ in range(2))
    assert one.series == other.series and one.metrics == other.metrics
    assert all(np.array_equal(one.result.packed[name], other.result.packed[name]) for name in before.packed)


@pytest.mark.parametrize("form", ["tiles", "groups", "lattice"])
def test_recover_wild_rates_keep_the_untrained_state(
    form: str, session: CalibrationSession, compressed: Callable[[str], Compressed]
) -> None:
    before = compressed(form)
    wild = Recovery(steps=3, code_rate=30.0, scale_rate=5.0, float_rate=5.0, candidates=3)
    recovered = trained(session, before, wild)
    assert recovered.metrics["finetune_chosen_step"] == 0
    assert recovered.metrics["finetune_kl_heldout"] == recovered.metrics["finetune_kl_heldout_before"]
    assert recovered.result.packed is before.packed and recovered.result.weights is before.weights


def test_recover_model_without_vocabulary_learns_answers(random_model: Callable[[str], Any]) -> None:
    model = random_model("bert_classifier")
    windows = torch.randint(1, 512, (12, 24), generator=torch.Generator().manual_seed(1))
    session = CalibrationSession(
        model, matrices.find_layers(model), windows[:8], windows[8:], 0, Cache(None, {}), no_track
    )
    recovered = trained(session, METHODS["tiles"].compress(session.context(), np.random.default_rng(0)))
    assert recovered.series["finetune_loss"][-1] < recovered.series["finetune_loss"][0]
    assert recovered.metrics["finetune_kl_heldout"] <= recovered.metrics["finetune_kl_heldout_before"]


def test_clamp_codes_beyond_the_grid_returns_to_its_ends() -> None:
    weight = torch.randn(16, 64, generator=torch.Generator().manual_seed(0))
    latent = TrainableCodes(quantize(weight, 3, Scheme(64)), weight, torch.device("cpu"), coded=False)
    with torch.no_grad():
        latent.codes += torch.where(torch.arange(64) % 2 == 0, 50, -50)
    latent.clamp_codes()
    stored = latent.quantized(0.0)
    assert stored.codes.unique().tolist() == [0, 7] and torch.equal(stored.dequantize(), latent.weight())


def test_recover_float_tiles_keep_their_bytes(
    session: CalibrationSession, compressed: Callable[[str], Compressed]
) -> None:
    before = compressed("floats")
    recovered = trained(session, before)
    assert all(np.array_equal(recovered.result.packed[name], before.packed[name]) for name in before.packed)


def test_backpropagate_gradient_reaches_codes_and_scales() -> None:
    """L = Σ g·w of one group at 2 bits: dL/du = g·step, dL/ds = Σ g·w; a pruned tile stays as it is."""
    generator = torch.Generator().manual_seed(0)
    weight, slope = (torch.randn(32, 64, generator=generator) for _ in range(2))
    tensor = quantize(weight, torch.tensor([[2], [0]], dtype=torch.uint8), Scheme(64))
    latent = TrainableCodes(tensor, weight, torch.device("cpu"), coded=False)
    assert torch.equal(latent.weight(), tensor.dequantize())
    latent.backpropagate(slope, 0.0)
    assert latent.codes.grad is not None and latent.scale.grad is not None
    assert torch.allclose(latent.codes.grad[:16, 0], (slope * tensor.scale.float())[:16])
    assert not latent.codes.grad[16:].any() and not latent.scale.grad[16:].any()
    assert torch.allclose(latent.scale.grad[:16, 0, 0], (slope * tensor.dequantize())[:16].sum(1), atol=1e-4)


def test_backpropagate_price_pulls_codes_to_zero(drawn: dict[str, Callable[..., Any]]) -> None:
    """Without any other gradient every price makes latent codes between 0 and 1 smaller, and the file with them."""
    weight = torch.randn(32, 64, generator=torch.Generator().manual_seed(0))
    tensor = drawn["lattice"](weight)
    tables = fit_tables(count_symbols([tensor]))
    latent = TrainableCodes(tensor, weight, torch.device("cpu"), True, tables)
    assert float(latent.code_bits(latent.stored_codes).sum()) == pytest.approx(
        float(coded_bits(tensor, tables).sum()), rel=1e-5
    )
    latent.backpropagate(torch.zeros(32, 64), 1.0)
    assert latent.codes.grad is not None
    between = (latent.codes > 0) & (latent.codes < 1) & (latent.tensor.lattice.levels() < 0)[:, None]  # type: ignore[union-attr]
    assert between.any() and (latent.codes.grad[between] > 0).all()


def test_recover_untrainable_format_or_no_text_raises(session: CalibrationSession) -> None:
    packed = {layer.name: quantize_by_magnitude(layer.weight, (0.9, 0.7)).pack() for layer in session.layers}
    with pytest.raises(Unsupported, match="task=finetune cannot train the format"):
        trained(session, Compressed(packed, {}, "", 0))
    coded = {layer.name: trellis_tensor(layer.weight).content.numpy() for layer in session.layers}
    with pytest.raises(Unsupported, match=r"format in which .* is stored: choose a method that stores a lattice"):
        trained(session, Compressed(coded, {}, "", 0))
    tables = {"code_tables": first_tables().pack()}
    paths = {layer.name: encode_paths(path_tensor(layer.weight), first_tables()) for layer in session.layers}
    with pytest.raises(Unsupported, match="task=finetune cannot train the format"):
        trained(session, Compressed(paths | tables, {}, "", 0))
    with pytest.raises(ValueError, match="no calibration text is left"):
        recover(session, Compressed(packed, {}, "", 0), session.calibration[:0], BRIEF, np.random.default_rng(0))


@pytest.mark.parametrize("wrong", [{"steps": 0}, {"candidates": 0}, {"candidates": 65}, {"batch_size": 0},
                                   {"windows": 0}, {"code_rate": -1.0}, {"scale_rate": float("nan")},
                                   {"code_rate": 0, "scale_rate": 0, "float_rate": 0}])  # fmt: skip
def test_recovery_bad_settings_raise_one_sentence(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"^finetune\.[^\n]*(must be|may be)"):
        Recovery(**wrong)


@pytest.fixture
def execute(small_run: list[str], tmp_path: pathlib.Path) -> Callable[..., Outcome]:
    """A run of the tiny model on the small text."""
    folders = [f"records={tmp_path}/records", f"cache={tmp_path}/cache"]

    def started(*more: str) -> Outcome:
        return run(compose(*small_run, *folders, *more), LABELS)

    return started


@pytest.mark.slow
@pytest.mark.parametrize("method", [["method=uniform4", "method.bits=2"], ["method=gptq"]])
def test_run_finetune_records_before_and_after_and_saves_it(
    method: list[str], execute: Callable[..., Outcome], tmp_path: pathlib.Path, tiny: Any
) -> None:
    record_before = execute(*method).record
    short = ["task=finetune", "finetune.steps=6", "finetune.scale_rate=0.003", f"save={tmp_path}/saved"]
    ended = execute(*method, *short)
    record_after = ended.record
    assert "finetune" not in record_before.config and record_after.config["finetune"]["steps"] == 6
    assert record_before.fingerprint != record_after.fingerprint and record.read(ended.path) == record_after
    metrics = record_after.metrics
    for name in ("kl", "nll_delta"):
        assert metrics[f"{name}_before"] == record_before.metrics[name]
    assert metrics["kl_before_low"] == record_before.metrics["kl_low"]
    assert metrics["bytes_file_before"] == record_before.metrics["bytes_file"]
    assert not any(name.startswith("regret") and not name.endswith("_before") for name in metrics)
    assert metrics["finetune_seconds"] > 0 and metrics["finetune_chosen_step"] > 0
    folder = tmp_path / "saved"
    assert metrics["bytes_file"] == sum((folder / name).stat().st_size for name in ("model.safetensors", "config.json"))
    loaded: Any = transformers.AutoModelForCausalLM.from_pretrained(folder)
    norms = [model.transformer.h[0].ln_1.weight.detach().half() for model in (loaded, tiny)]
    assert not torch.equal(*norms), "the trained norms are in the file"
    again = execute(*method, *short[:-1], "rerun=true").record
    assert again.series["kl"] == record_after.series["kl"]


def test_run_finetune_with_wrong_settings_raises(execute: Callable[..., Outcome]) -> None:
    with pytest.raises(Unsupported, match="task=finetune cannot train what as_published packs"):
        execute("task=finetune", "method=as_published")
    with pytest.raises(ValueError, match=r"finetune\.candidates=9"):
        execute("task=finetune", "finetune.candidates=9", "finetune.steps=3")
    with pytest.raises(ValueError, match="trains in float32"):
        execute("task=finetune", "dtype=bfloat16")


def test_finetune_yaml_equals_the_defaults() -> None:
    written = OmegaConf.to_container(OmegaConf.load(ROOT / "conf/task/finetune.yaml"))["finetune"]  # type: ignore[index, call-overload]
    assert written == {"_target_": "nashswarm.methods.distillation.Recovery", **dataclasses.asdict(Recovery())}
