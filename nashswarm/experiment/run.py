"""Execute one run: from its config to its record.

A run is named by everything that can move a number.  If its record exists it is skipped; otherwise it is loaded,
compressed (or trained) and measured, and the record is written in one step at the end.
"""

import dataclasses
import datetime
import functools
import logging
import pathlib
import time
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

import torch
from omegaconf import DictConfig, OmegaConf

from nashswarm.data import corpus, glue
from nashswarm.experiment import card_facts, compression, texts
from nashswarm.experiment.identity import to_recorded
from nashswarm.experiment.plan import MoePlan, Plan, plan, plan_moe
from nashswarm.measures import measure
from nashswarm.measures.moe.target import CALIBRATION_WINDOWS, MoeTarget
from nashswarm.memory import peak_bytes, reset_peak
from nashswarm.methods.compressed_tensors import CompressedTensors
from nashswarm.methods.gguf_types.settings import GgufTypes
from nashswarm.methods.peers import peer
from nashswarm.methods.peers.llama_cpp import LlamaCpp
from nashswarm.models import sources
from nashswarm.moe import training
from nashswarm.packed import model_folder, reload
from nashswarm.progress import show_progress
from nashswarm.records import record
from nashswarm.records.files import claim
from nashswarm.records.provenance import code_digest, provenance
from nashswarm.records.record import Record, fingerprint

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Outcome:
    """How a run ended: its record was written (``finished``) or stood there already (``skipped``)."""

    status: Literal["finished", "skipped"]
    path: pathlib.Path
    record: Record


class RunResult(NamedTuple):
    """What a run measured.

    ``origin``: what its provenance says beside code and machine.  ``save``: write the model into a folder, with what is
    known about it.
    """

    metrics: Mapping[str, float]
    series: dict[str, list[float]]
    layers: list[dict[str, Any]]
    allocation: str
    origin: Mapping[str, Any]
    save: Callable[[pathlib.Path, dict[str, Any]], None]


def run(config: DictConfig, labels: Mapping[str, str], many: bool = False, verify: bool = False) -> Outcome:
    """Execute one run, or find its record.

    ``many``: the run is one of a sweep, whose compressed models are saved in folders named by their fingerprints.
    ``verify``: open a saved model in a new process, and keep it only if it computes the same there.
    Raises ValueError or OSError in one sentence for anything the user can mend; no record is left behind then.
    """
    started, origin = time.monotonic(), provenance(datetime.datetime.now(datetime.UTC))
    config = texts.resolved(config)
    planned = plan_moe(config) if config.task == "train_moe" else plan(config)
    identity = dict(planned.identity)
    run_labels = dict(labels) | {"seed": str(config.seed)}
    if isinstance(planned.dataset, glue.Glue):
        run_labels["dataset"] = planned.dataset.label + "".join(labels["dataset"].partition("[")[1:])
    folder = pathlib.Path(config.records) / (run_labels.get("experiment") or "single")
    path = record.path_of(folder, identity)
    target = None if config.save is None else pathlib.Path(config.save) / (fingerprint(identity) if many else "")

    def model_exists() -> bool:
        return target is not None and not config.rerun and model_folder.holds(target, fingerprint(identity))

    def finished_before() -> bool:
        return path.exists() and not config.rerun and (target is None or model_exists())

    if finished_before():
        return Outcome("skipped", path, record.read(path))
    _check(planned, None if model_exists() else target)
    waiting = time.monotonic()
    with claim(path):
        started += time.monotonic() - waiting
        if finished_before():  # another worker has made it meanwhile
            return Outcome("skipped", path, record.read(path))
        if target is not None and model_exists():  # stopped between the two: the folder holds the record as well
            log.info("%s holds this model and its record, which is taken from there", target)
            finished = dataclasses.replace(model_folder.record_in(target), labels=run_labels)
            return Outcome("finished", record.write(folder, finished), finished)
        names = (run_labels[name] for name in ("method", "model", "dataset"))
        log.info("%s on %s: %s, seed %d, %d threads", *names, config.seed, torch.get_num_threads())
        reset_peak()
        result = _compress(config, planned, verify) if isinstance(planned, Plan) else _train_moe(config, planned)
        finished = Record(
            labels=run_labels,
            config=identity,
            metrics={**result.metrics, "seconds": time.monotonic() - started, "peak_bytes": peak_bytes()},
            series=result.series,
            layers=result.layers,
            allocation=result.allocation,
            provenance=origin | dict(result.origin),
        )
        if target is not None:
            described = to_recorded(OmegaConf.to_container(config, resolve=True))
            result.save(target, {"config": described, "record": dataclasses.asdict(finished)})
        return Outcome("finished", record.write(folder, finished), finished)


def _check(planned: Plan | MoePlan, target: pathlib.Path | None) -> None:
    """Raise ValueError for what is missing or in the way, before any work."""
    if isinstance(planned, Plan):
        measure.require(planned.measure)
        if target is not None and isinstance(planned.method, peer.Peer | LlamaCpp | GgufTypes | CompressedTensors):
            raise ValueError(f"save={target}: what {planned.method.library} packs cannot be loaded again; leave it out")
    if target is not None:
        model_folder.check_free(target)


def _compress(config: DictConfig, planned: Plan, verify: bool) -> RunResult:
    """Load, quantize, finetune if asked, store and measure."""
    loaded = compression.load(config, planned)
    session = loaded.session
    result, cost = compression.quantize(loaded, planned.method)
    series: dict[str, list[float]] = dict(result.series)
    before: dict[str, float] = {}
    if planned.finetune is not None:
        result, (before, training_series) = compression.finetune(loaded, result, planned.finetune, planned.measure)
        series |= training_series
    files, sizes = session.store(
        result.packed, result.weights, result.float_bits, result.file_bytes, prices=result.prices
    )
    target = compression.evaluation_target(loaded, result)
    measured, windows = planned.measure.measure(target)
    nominal = {"nominal_bits": result.code_bits / sum(layer.parameters for layer in session.layers)}
    metrics = dict(result.metrics) | sizes | nominal | before | measured | cost

    def save(folder: pathlib.Path, about: dict[str, Any]) -> None:
        game = {name: part.numpy() for name, part in result.game.items()}
        about |= {"card": card_facts.gather(session, target.packed(), files, "kl" not in measured)}
        check = functools.partial(reload.check, model=target.packed(), window=session.holdout[0])
        files_beside = files | _generation(session.full)
        model_folder.write(folder, files_beside, about, game, loaded.tokenizer, *([check] if verify else []))

    origin: dict[str, Any] = {"parameters": session.parameters, "cache_hits": loaded.cache.hits}
    if types := sources.dequantized_from(planned.source):
        origin["dequantized_from"] = types
    table = compression.layer_table(session.layers, result)
    return RunResult(metrics, series | windows, table, result.allocation, origin, save)


def _generation(model: Any) -> dict[str, bytes]:
    """Return the file that says how the full model generates: its end tokens and how it samples."""
    if not model.can_generate():
        return {}
    return {"generation_config.json": model.generation_config.to_json_string().encode()}


def _train_moe(config: DictConfig, planned: MoePlan) -> RunResult:
    """Train a mixture of experts, or find it in the cache, and measure it."""
    source, texts, length = planned.source, planned.texts, planned.dataset.sequence_length
    judged = training.cut_windows(source, texts["calibration"], length, "validation")
    judged = corpus.first_windows(judged, planned.dataset.test_windows, "validation")
    planned.measure.check(judged, source.context)
    trained = training.load_or_train(
        source, planned.router, planned.training, texts["train"], length, int(config.seed), planned.device,
        pathlib.Path(config.cache), show_progress, code_digest(),
    )  # fmt: skip
    count = CALIBRATION_WINDOWS
    taught = training.cut_windows(source, texts["train"][: count * judged.shape[1] * 32], length, "training")[:count]
    judged, taught = judged.to(planned.device), taught.to(planned.device)
    metrics, series = planned.measure.measure(MoeTarget(trained, judged, taught, show_progress))
    save = functools.partial(_save_trained, trained)
    origin = {"parameters": sum(part.numel() for part in trained.model.parameters()), "trained_by": trained.code}
    return RunResult(metrics, dict(trained.series) | series, [], "", origin, save)


def _save_trained(trained: training.Trained, target: pathlib.Path, about: dict[str, Any]) -> None:
    model_folder.write_model(target, trained.model, trained.tokenizer, about)
