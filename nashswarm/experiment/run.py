"""run(config): the one function that reads a config and leaves a record.

It names the run by everything that can move a number, skips it if its record exists, and otherwise loads, compresses
(or trains), measures and writes the record, in one step at the end.
"""

import copy
import dataclasses
import datetime
import functools
import logging
import pathlib
import re
import time
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from nashswarm.calibration.cache import Cache
from nashswarm.calibration.session import CalibrationSession
from nashswarm.data import corpus, glue
from nashswarm.experiment.identity import to_recorded
from nashswarm.experiment.plan import MoePlan, Plan, config_again, plan, plan_moe
from nashswarm.measures import moe, quality
from nashswarm.measures.measure import EvaluationTarget, Measure, check, require
from nashswarm.memory import peak_bytes, reset_peak
from nashswarm.methods import distillation
from nashswarm.methods.method import Compressed, Method
from nashswarm.methods.peers import peer
from nashswarm.models import classifier, evaluation, matrices, sources
from nashswarm.moe import training
from nashswarm.packed import checkpoint, file_format, model_folder
from nashswarm.progress import show_progress
from nashswarm.records import record
from nashswarm.records.files import claim
from nashswarm.records.provenance import code_digest, provenance
from nashswarm.records.record import Record, fingerprint

log = logging.getLogger(__name__)
CONSTANT = ("tokens", "examples")  # metrics that no training moves
FINETUNE_STREAM = 1  # of random numbers, so that those of the method stay as they are without it


@dataclasses.dataclass(frozen=True)
class Outcome:
    """How a run ended: its record was written (``finished``) or stood there already (``skipped``)."""

    status: Literal["finished", "skipped"]
    path: pathlib.Path
    record: Record


class Done(NamedTuple):
    """What a run found; ``origin``: what its provenance says beside code and machine.  ``write``: leave its model in a
    folder, with what is known about it."""

    metrics: Mapping[str, float]
    series: dict[str, list[float]]
    layers: list[dict[str, Any]]
    allocation: str
    origin: Mapping[str, Any]
    write: Callable[[pathlib.Path, dict[str, Any]], None]


def run(config: DictConfig, labels: Mapping[str, str], many: bool = False) -> Outcome:
    """Execute one run, or find its record.  ``many``: it is one of a sweep, whose compressed models are saved in
    folders named by their fingerprints.

    Raises ValueError or OSError in one sentence for anything the user can mend; no record is left behind then.
    """
    started, origin = time.monotonic(), provenance(datetime.datetime.now(datetime.UTC))
    planned = plan_moe(config) if config.task == "train_moe" else plan(config)
    identity = dict(planned.identity)
    all_labels = dict(labels) | {"seed": str(config.seed)}
    if isinstance(planned.dataset, glue.Glue):
        all_labels["dataset"] = planned.dataset.label + "".join(labels["dataset"].partition("[")[1:])
    folder = pathlib.Path(config.records) / (all_labels.get("experiment") or "single")
    path = record.path_of(folder, identity)
    target = None if config.save is None else pathlib.Path(config.save) / (fingerprint(identity) if many else "")

    def kept() -> bool:  # its model
        return target is not None and not config.rerun and model_folder.holds(target, fingerprint(identity))

    def there() -> bool:
        return path.exists() and not config.rerun and (target is None or kept())

    if there():
        return Outcome("skipped", path, record.read(path))
    _check(planned, None if kept() else target)
    waits = time.monotonic()
    with claim(path):
        started += time.monotonic() - waits
        if there():  # another worker has made it meanwhile
            return Outcome("skipped", path, record.read(path))
        if target is not None and kept():  # stopped between the two: the folder holds the record as well
            log.info("%s holds this model and its record, which is taken from there", target)
            finished = dataclasses.replace(model_folder.record_in(target), labels=all_labels)
            return Outcome("finished", record.write(folder, finished), finished)
        names = (all_labels[name] for name in ("method", "model", "dataset"))
        log.info("%s on %s: %s, seed %d, %d threads", *names, config.seed, torch.get_num_threads())
        reset_peak()
        done = _compress(config, planned) if isinstance(planned, Plan) else _train_moe(config, planned)
        finished = Record(
            labels=all_labels,
            config=identity,
            metrics={**done.metrics, "seconds": time.monotonic() - started, "peak_bytes": peak_bytes()},
            series=done.series,
            layers=done.layers,
            allocation=done.allocation,
            provenance=origin | dict(done.origin),
        )
        if target is not None:
            described = to_recorded(OmegaConf.to_container(config, resolve=True))
            done.write(target, {"config": described, "record": dataclasses.asdict(finished)})
        return Outcome("finished", record.write(folder, finished), finished)


def _check(planned: Plan | MoePlan, target: pathlib.Path | None) -> None:
    """Raises ValueError for what is missing or in the way, before any work."""
    if isinstance(planned, Plan):
        require(planned.measure)
        if target is not None and isinstance(planned.method, peer.Peer):
            raise ValueError(f"save={target}: what {planned.method.library} packs cannot be loaded again; leave it out")
    if target is not None:
        model_folder.check_free(target)


def _compress(config: DictConfig, planned: Plan) -> Done:
    job = Job(config, *planned)
    result, found, series = job.execute()

    def write(target: pathlib.Path, about: dict[str, Any]) -> None:
        game = {name: part.numpy() for name, part in result.game.items()}
        model_folder.write(target, job.files, about, game, job.tokenizer)

    origin = {"parameters": job.session.parameters, "cache_hits": job.cache.hits}
    return Done(found, series, job.layer_table(result), result.allocation, origin, write)


def _train_moe(config: DictConfig, planned: MoePlan) -> Done:
    """A mixture of experts, trained or found in the cache, and what is measured of it."""
    source, texts, length = planned.source, planned.texts, planned.dataset.sequence_length
    judged = training.windows(source, texts["calibration"], length, "validation")
    judged = corpus.first(judged, planned.dataset.test_windows, "validation")
    moe.check(planned.measure, judged)
    trained = training.trained(
        source, planned.router, planned.training, texts["train"], length, int(config.seed), planned.device,
        pathlib.Path(config.cache), show_progress, code_digest(),
    )  # fmt: skip
    few = moe.CALIBRATION
    taught = training.windows(source, texts["train"][: few * judged.shape[1] * 32], length, "training")[:few]
    judged, taught = judged.to(planned.device), taught.to(planned.device)
    subject = moe.MoeSubject(trained, judged, taught, show_progress)
    found, series = planned.measure.measure(subject)

    def write(target: pathlib.Path, about: dict[str, Any]) -> None:
        model_folder.write_model(target, trained.model, trained.tokenizer, about)

    origin = {"parameters": sum(part.numel() for part in trained.model.parameters()), "trained_by": trained.code}
    return Done(found, dict(trained.series) | series, [], "", origin, write)


class Job:
    """One run under way: the loaded model, its windows, and what is cached of them."""

    def __init__(
        self,
        config: DictConfig,
        source: sources.Source,
        method: Method,
        dataset: corpus.Dataset,
        measure: Measure,
        device: str,
        dtype: torch.dtype,
        texts: Mapping[str, str],
        identity: Mapping[str, Any],
        finetune: distillation.Recovery | None = None,
    ) -> None:
        self.method, self.measure, self.finetune = method, measure, finetune
        self.seed = int(config.seed)
        self.rng = np.random.default_rng(config.seed)
        cut = corpus.windows
        self.truth: glue.Truth | None = None
        if isinstance(dataset, glue.Glue):
            cut = glue.windows
            loaded = classifier.fine_tuned(
                dataset, source, texts["calibration"], device, dtype, pathlib.Path(config.cache)
            )
            self.truth = dataset.truth(texts["test"])
        else:
            loaded = sources.load(source, device, dtype)
        self.full = loaded.model
        layers = matrices.find_layers(self.full, source.exclude)
        length = loaded.window_length(dataset.sequence_length)
        pool, test = (
            cut(texts[purpose], loaded.tokenizer, length, purpose).to(device) for purpose in ("calibration", "test")
        )
        self.test = corpus.first(test, dataset.test_windows, "test")
        check(measure, self.test)
        self.pool = pool
        drawn = corpus.draw(pool, dataset.calibration_windows, dataset.holdout_windows, self.rng)
        label_seed = int(self.rng.integers(2**31))
        key = {name: identity[name] for name in ("model", "dataset", "dtype", "device", "threads")}
        key |= {"length": length, "torch": torch.__version__, "code": code_digest()}
        self.cache = Cache(pathlib.Path(config.cache) if getattr(method, "cache", True) else None, key)
        drawn_cache = self.cache.with_key({"seed": config.seed})
        self.session = CalibrationSession(self.full, layers, *drawn, label_seed, drawn_cache)
        self.tokenizer, self.test_text = loaded.tokenizer, texts["test"]
        self.files: dict[str, bytes] = {}  # of the compressed model

    def execute(self) -> tuple[Compressed, dict[str, float], dict[str, list[float]]]:
        """Compress and measure: the result, its metrics, the time and memory (the process's peak, the full model
        included) that compression took among them, and its series; ``files`` are the compressed model from then on."""
        session = self.session
        started = time.monotonic()
        result = self.method.compress(session.context(), self.rng)
        cost = {"quantize_seconds": time.monotonic() - started, "quantize_peak_bytes": float(peak_bytes())}
        before: dict[str, float] = {}
        series: dict[str, list[float]] = dict(result.series)
        if self.finetune is not None:
            result, before, own = self.recover(result, self.finetune)
            series |= own
        others = self.place(result)
        layer_weights = sum(layer.parameters for layer in session.layers)
        layer_bytes = sum(len(packed) for packed in result.packed.values())
        self.files = file_format.checkpoint_files(self.full, result.packed, others, result.float_bits)
        size = sum(len(content) for content in self.files.values())
        found = dict(result.metrics) | {
            "bytes_file": size,
            "bits_per_weight": 8 * layer_bytes / layer_weights,
            "bits_per_weight_model": 8 * size / session.parameters,
            "nominal_bits": result.code_bits / layer_weights,
            "compression": 1 - size / (4 * session.parameters),
        }
        measured, windows = self.measure.measure(self.subject(result))
        return result, found | before | measured | cost, series | windows

    def recover(
        self, result: Compressed, settings: distillation.Recovery
    ) -> tuple[Compressed, dict[str, float], dict[str, list[float]]]:
        """The result after training; how good and how large it was before, how training went, and its series."""
        session = self.session
        started = copy.deepcopy(session.candidate_model)  # in the precision that a trial of weights has
        others = self.place(result)
        files = file_format.checkpoint_files(self.full, result.packed, others, result.float_bits)
        found = {"bytes_file_before": float(sum(len(content) for content in files.values()))}
        for measure in quality.of_quality(self.measure):
            measured, _ = measure.measure(self.subject(result))
            found |= {_before(name): value for name, value in measured.items() if name not in CONSTANT}
        session.candidate_model = started
        held = (self.pool[:, None] == session.holdout).all(-1).any(1)
        began = time.monotonic()
        trained = distillation.recover(
            session, result, self.pool[~held], settings, np.random.default_rng((self.seed, FINETUNE_STREAM))
        )
        found |= trained.metrics | {"finetune_seconds": time.monotonic() - began}
        return trained.result, found, trained.series

    def place(self, result: Compressed) -> dict[str, Tensor]:
        """Put the result's weights on the trial, everything else rounded as it is stored: those other tensors."""
        others = matrices.uncompressed_tensors(self.session.candidate_model, self.session.layers)
        matrices.set_weights(self.session.candidate_model, result.weights)
        matrices.round_to_stored(others, result.float_bits)
        return others

    def subject(self, result: Compressed) -> EvaluationTarget:
        """What is measured: the trial, on which the result was put."""
        compressed, layers = self.session.candidate_model, self.session.layers

        def pack() -> Any:
            if result.foreign is not None:
                raise ValueError(f"what {result.foreign} packs does not run here: only measure=quality is for it")
            model = copy.deepcopy(compressed)
            checkpoint.adopt(model, layers, result.packed, result.float_bits)
            return model

        return EvaluationTarget(
            self.full, compressed, functools.cache(pack), self.test, self.reference, show_progress,
            self.tokenizer, layers, result.weights, result.damage, self.test_text, self.truth,
        )  # fmt: skip

    def reference(self, batch_size: int) -> evaluation.Reference:
        """The full model's states on the test windows."""

        def compute() -> dict[str, Tensor]:
            return {"states": evaluation.reference(self.full, self.test, batch_size, show_progress).states.cpu()}

        states = self.cache("baseline", {"batch_size": batch_size}, compute)["states"].to(self.test.device)
        return evaluation.Reference(states, self.full.get_output_embeddings())

    def layer_table(self, result: Compressed) -> list[dict[str, Any]]:
        """One row per weight matrix: shape, bytes, bits per weight, predicted damage in nats per token."""
        return [
            {
                "name": layer.name,
                "role": layer.role,
                "rows": layer.weight.shape[0],
                "columns": layer.weight.shape[1],
                "parameters": layer.parameters,
                "bytes": len(result.packed[layer.name]),
                "bits_per_weight": 8 * len(result.packed[layer.name]) / layer.parameters,
            }
            | ({"damage": result.damage[layer.name]} if layer.name in result.damage else {})
            for layer in self.session.layers
        ]


def _before(name: str) -> str:
    """The name of a metric of the model before it was trained.

    >>> _before("kl"), _before("kl_low")
    ('kl_before', 'kl_before_low')
    """
    return re.sub(r"(_low|_high)?$", r"_before\1", name, count=1)


def reopen(about: Mapping[str, Any], paths: Mapping[str, str | None]) -> Job:
    """The job that left a saved model, from its ``about``, with as many threads as it had.  ``paths``: where model and
    dataset lie today, if not where they lay.

    Raises ValueError if the model or the text is no longer the one that it was.
    """
    config = config_again(about, paths)
    torch.set_num_threads(about["record"]["config"]["threads"])
    return Job(config, *plan(config))
