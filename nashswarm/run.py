"""run(config): the one function that knows Hydra's config and the disk.

It names the run by everything that can move a number, skips it if its record exists, and otherwise loads, compresses,
measures and writes the record, in one step at the end.
"""

import contextlib
import copy
import dataclasses
import datetime
import functools
import hashlib
import importlib.metadata
import logging
import os
import pathlib
import platform
import re
import resource
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from typing import Any, Literal, NamedTuple

import hydra
import hydra.errors
import numpy as np
import torch
from hydra.core.config_store import ConfigStore
from omegaconf import MISSING, DictConfig, OmegaConf
from torch import Tensor

from nashswarm import checkpoint, data, glue, measures, metrics, models, moe_training, peers, record, recovery, saved
from nashswarm.evidence import Cache, Evidence, show_progress
from nashswarm.measures import Measure, Official, Size, Subject
from nashswarm.methods import AsPublished, Compressed, Method, NotOffered
from nashswarm.moe.model import MoeSource
from nashswarm.moe.router import Settings
from nashswarm.moe_measures import CALIBRATION, MoeMeasure, MoeSubject
from nashswarm.record import Record, fingerprint

log = logging.getLogger(__name__)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
GROUPS = ("model", "method", "dataset", "measure")
CONSTANT = ("tokens", "examples")  # metrics that no training moves
FINETUNE_STREAM = 1  # of random numbers, so that those of the method stay as they are without it
TASKS = ("compress", "finetune", "train_moe")
DEVICES = ("auto", "cpu", "cuda", "mps")
TEXT_KEYS = ("calibration_sha256", "test_sha256")
EVALUATORS = ("lm-eval", "sacrebleu")
PACKAGES = ("nashswarm", "torch", "transformers", "datasets", "numpy", "scipy", "scikit-learn", "safetensors")


@dataclasses.dataclass
class Root:
    """The types of the root config; the groups are typed by the dataclasses that they name."""

    task: str = "compress"
    finetune: Any = None
    train_moe: Any = None
    model: Any = MISSING
    method: Any = MISSING
    dataset: Any = MISSING
    measure: Any = MISSING
    experiment: Any = None
    seed: int = 0
    device: str = "auto"
    dtype: str = "float32"
    rerun: bool = False
    save: str | None = None
    wandb: str = "offline"
    records: str = "results/records"
    cache: str = "results/cache"


ConfigStore.instance().store(name="root", node=Root)


@dataclasses.dataclass(frozen=True)
class Outcome:
    """How a run ended: its record was written (``finished``) or stood there already (``skipped``)."""

    status: Literal["finished", "skipped"]
    path: pathlib.Path
    record: Record


class Plan(NamedTuple):
    """What a config stands for, before anything slow; ``identity``: everything that can move a number."""

    source: models.Source
    method: Method
    dataset: data.Dataset
    measure: Measure
    device: str
    dtype: torch.dtype
    texts: Mapping[str, str]
    identity: Mapping[str, Any]
    finetune: recovery.Recovery | None = None


class MoePlan(NamedTuple):
    """The same of a mixture of experts that is to be trained."""

    source: MoeSource
    router: Settings
    dataset: data.Dataset
    measure: MoeMeasure
    device: str
    texts: Mapping[str, str]
    identity: Mapping[str, Any]
    training: moe_training.Training


def plan_moe(config: DictConfig) -> MoePlan:
    """Raises ValueError or OSError in one sentence for anything the user can mend."""
    device, _ = choose_device(config)
    source, router, dataset, measure = (build(config[group]) for group in GROUPS)
    wanted: dict[str, tuple[Any, Any]] = {
        "model": (source, MoeSource),
        "method": (router, Settings),
        "measure": (measure, MoeMeasure),
    }
    examples = {"model": "moe_small", "method": "moe_nash_swarm", "measure": "routed"}
    for group, (value, kind) in wanted.items():
        if not isinstance(value, kind):
            raise ValueError(f"task=train_moe cannot use this {group}: choose for example {group}={examples[group]}")
    if isinstance(dataset, glue.Glue):
        raise ValueError(f"{dataset.task} is a task, not a text: choose for example dataset=wikitext2")
    if config.dtype != "float32":
        raise ValueError(f"task=train_moe trains in float32; leave dtype={config.dtype} out")
    training = build(config.train_moe)
    texts = {purpose: dataset.text(purpose) for purpose in ("train", "calibration")}
    return MoePlan(source, router, dataset, measure, device, texts, identify(config, device, source, texts), training)


def plan(config: DictConfig) -> Plan:
    """Raises ValueError or OSError in one sentence for anything the user can mend."""
    device, dtype = choose_device(config)
    source, method, dataset, measure = (build(config[group]) for group in GROUPS)
    for group, value in (("model", source), ("method", method), ("measure", measure)):
        if isinstance(value, MoeSource | Settings | MoeMeasure):
            raise ValueError(f"this {group} is for mixtures of experts that are to be trained: add task=train_moe")
    finetune = choose_task(config, method)
    if isinstance(dataset, glue.Glue) and not isinstance(measure, Official | Size):
        raise ValueError(f"{dataset.task} is a task, not a text: choose measure=official or measure=size")
    if isinstance(measure, Official) and not isinstance(dataset, glue.Glue):
        raise ValueError("measure=official needs labels: choose a task of GLUE, for example dataset=sst2")
    texts = {purpose: dataset.text(purpose) for purpose in ("calibration", "test")}
    return Plan(
        source, method, dataset, measure, device, dtype, texts, identify(config, device, source, texts), finetune
    )


def run(config: DictConfig, labels: Mapping[str, str], many: bool = False) -> Outcome:
    """Execute one run, or find its record.  ``many``: it is one of a sweep, whose compressed models are saved in
    folders named by their fingerprints.

    Raises ValueError or OSError in one sentence for anything the user can mend; no record is left behind then.
    """
    started, start_time = time.monotonic(), datetime.datetime.now(datetime.UTC)
    planned = plan_moe(config) if config.task == "train_moe" else plan(config)
    identity = dict(planned.identity)
    all_labels = dict(labels) | {"seed": str(config.seed)}
    if isinstance(planned.dataset, glue.Glue):
        all_labels["dataset"] = planned.dataset.label + "".join(labels["dataset"].partition("[")[1:])
    folder = pathlib.Path(config.records) / (all_labels.get("experiment") or "single")
    path = record.path_of(folder, identity)
    target = None if config.save is None else pathlib.Path(config.save) / (fingerprint(identity) if many else "")

    def there() -> bool:
        saved_too = target is None or saved.holds(target, fingerprint(identity))
        return path.exists() and not config.rerun and saved_too

    if there():
        return Outcome("skipped", path, record.read(path))
    waits = time.monotonic()
    with record.claim(path):
        started += time.monotonic() - waits
        if there():  # another worker has made it meanwhile
            return Outcome("skipped", path, record.read(path))
        finished = _execute(config, planned, all_labels, target, started, start_time)
        return Outcome("finished", record.write(folder, finished), finished)


def _execute(
    config: DictConfig,
    planned: Plan,
    labels: Mapping[str, str],
    target: pathlib.Path | None,
    started: float,
    start_time: datetime.datetime,
) -> Record:
    """The record of a run, whose compressed model lies in ``target`` if it is to be kept."""
    if target is not None:
        if isinstance(planned, Plan) and isinstance(planned.method, peers.Peer):
            raise ValueError(f"save={target}: what {planned.method.library} packs cannot be loaded again; leave it out")
        saved.check_free(target)

    threads = torch.get_num_threads()
    log.info(
        "%s on %s: %s, seed %d, %d threads",
        labels["method"],
        labels["model"],
        labels["dataset"],
        config.seed,
        threads,
    )
    reset_peak()
    if isinstance(planned, MoePlan):
        trained, found, series = train_moe(config, planned)
        finished = Record(
            labels=all_labels,
            config=identity,
            metrics=found | {"seconds": time.monotonic() - started, "peak_bytes": peak_bytes()},
            series=series,
            layers=[],
            allocation="",
            provenance=provenance(start_time)
            | {"parameters": sum(part.numel() for part in trained.model.parameters())},
        )
        if target is not None:
            about = {"config": OmegaConf.to_container(config, resolve=True), "record": dataclasses.asdict(finished)}
            saved.write_model(target, trained.model, trained.tokenizer, about)
        return Outcome("finished", record.write(folder, finished), finished)
    measures.require(planned.measure)
    job = Job(config, *planned)
    result, found, series, cost = job.execute()
    finished = Record(
        labels=dict(labels),
        config=dict(planned.identity),
        metrics=found | {"seconds": time.monotonic() - started, "peak_bytes": peak_bytes()} | cost,
        series=series,
        layers=job.layer_table(result),
        allocation=result.allocation,
        provenance=provenance(start_time) | {"parameters": job.evidence.parameters, "cache_hits": job.cache.hits},
    )
    if target is not None:
        about = {"config": OmegaConf.to_container(config, resolve=True), "record": dataclasses.asdict(finished)}
        game = {name: part.numpy() for name, part in result.game.items()}
        saved.write(target, job.files, about, game, job.tokenizer)
    return finished


def train_moe(
    config: DictConfig, planned: MoePlan
) -> tuple[moe_training.Trained, dict[str, float], dict[str, list[float]]]:
    """A mixture of experts, trained or found in the cache, what is measured of it, and the series of both."""
    length = planned.dataset.sequence_length
    trained = moe_training.trained(
        planned.source, planned.router, planned.training, planned.texts["train"], length, int(config.seed),
        planned.device, pathlib.Path(config.cache), show_progress, code_digest(),
    )  # fmt: skip
    wanted = length or planned.source.context
    judged = data.windows(planned.texts["calibration"], trained.tokenizer, wanted, "validation")
    taught = data.windows(planned.texts["train"][: CALIBRATION * wanted * 32], trained.tokenizer, wanted, "training")
    subject = MoeSubject(trained, judged.to(planned.device), taught[:CALIBRATION].to(planned.device), show_progress)
    found, series = planned.measure.measure(subject)
    return trained, found, dict(trained.series) | series


class Job:
    """One run under way: the loaded model, its windows, and what is cached of them."""

    def __init__(
        self,
        config: DictConfig,
        source: models.Source,
        method: Method,
        dataset: data.Dataset,
        measure: Measure,
        device: str,
        dtype: torch.dtype,
        texts: Mapping[str, str],
        identity: Mapping[str, Any],
        finetune: recovery.Recovery | None = None,
    ) -> None:
        self.method, self.measure, self.finetune = method, measure, finetune
        self.seed = int(config.seed)
        self.rng = np.random.default_rng(config.seed)
        cut = data.windows
        self.truth: glue.Truth | None = None
        if isinstance(dataset, glue.Glue):
            cut = glue.windows
            loaded = glue.fine_tuned(dataset, source, texts["calibration"], device, dtype, pathlib.Path(config.cache))
            self.truth = dataset.truth(texts["test"])
        else:
            loaded = models.load(source, device, dtype)
        self.full = loaded.model
        layers = models.find_layers(self.full, source.exclude)
        length = loaded.window_length(dataset.sequence_length)
        pool, test = (
            cut(texts[purpose], loaded.tokenizer, length, purpose).to(device) for purpose in ("calibration", "test")
        )
        if dataset.test_windows is not None and len(test) < dataset.test_windows:
            raise ValueError(
                f"the test text has {len(test)} windows, fewer than dataset.test_windows={dataset.test_windows}"
            )
        self.test = test[: dataset.test_windows]
        measures.check(measure, self.test)
        self.pool = pool
        drawn = data.draw(pool, dataset.calibration_windows, dataset.holdout_windows, self.rng)
        label_seed = int(self.rng.integers(2**31))
        key = {name: identity[name] for name in ("model", "dataset", "dtype", "device", "threads")}
        key |= {"length": length, "torch": torch.__version__, "code": code_digest()}
        self.cache = Cache(pathlib.Path(config.cache) if getattr(method, "cache", True) else None, key)
        drawn_cache = self.cache.under({"seed": config.seed})
        self.evidence = Evidence(self.full, layers, *drawn, label_seed, drawn_cache)
        self.tokenizer, self.test_text = loaded.tokenizer, texts["test"]
        self.files: dict[str, bytes] = {}  # of the compressed model

    def execute(self) -> tuple[Compressed, dict[str, float], dict[str, list[float]], dict[str, float]]:
        """Compress and measure: the result, its metrics and series, and the time and memory (the process's peak, the
        full model included) that compression took; ``files`` are the compressed model from then on."""
        evidence = self.evidence
        started = time.monotonic()
        result = self.method.compress(evidence.oracle(), self.rng)
        cost = {"quantize_seconds": time.monotonic() - started, "quantize_peak_bytes": float(peak_bytes())}
        before: dict[str, float] = {}
        series: dict[str, list[float]] = dict(result.series)
        if self.finetune is not None:
            result, before, own = self.recover(result, self.finetune)
            series |= own
        others = self.place(result)
        layer_weights = sum(layer.parameters for layer in evidence.layers)
        layer_bytes = sum(len(packed) for packed in result.packed.values())
        self.files = checkpoint.files(self.full, result.packed, others, result.float_bits)
        size = sum(len(content) for content in self.files.values())
        found = dict(result.metrics) | {
            "bytes_file": size,
            "bits_per_weight": 8 * layer_bytes / layer_weights,
            "bits_per_weight_model": 8 * size / evidence.parameters,
            "nominal_bits": result.code_bits / layer_weights,
            "compression": 1 - size / (4 * evidence.parameters),
        }
        measured, windows = self.measure.measure(self.subject(result))
        return result, found | before | measured, series | windows, cost

    def recover(
        self, result: Compressed, settings: recovery.Recovery
    ) -> tuple[Compressed, dict[str, float], dict[str, list[float]]]:
        """The result after training; how good and how large it was before, how training went, and its series."""
        evidence = self.evidence
        started = copy.deepcopy(evidence.trial)  # in the precision that a trial of weights has
        others = self.place(result)
        files = checkpoint.files(self.full, result.packed, others, result.float_bits)
        found = {"bytes_file_before": float(sum(len(content) for content in files.values()))}
        for measure in measures.of_quality(self.measure):
            measured, _ = measure.measure(self.subject(result))
            found |= {_before(name): value for name, value in measured.items() if name not in CONSTANT}
        evidence.trial = started
        held = (self.pool[:, None] == evidence.holdout).all(-1).any(1)
        began = time.monotonic()
        trained = recovery.recover(
            evidence, result, self.pool[~held], settings, np.random.default_rng((self.seed, FINETUNE_STREAM))
        )
        found |= trained.metrics | {"finetune_seconds": time.monotonic() - began}
        return trained.result, found, trained.series

    def place(self, result: Compressed) -> dict[str, Tensor]:
        """Put the result's weights on the trial, everything else rounded as it is stored: those other tensors."""
        others = models.other_tensors(self.evidence.trial, self.evidence.layers)
        models.put(self.evidence.trial, result.weights)
        models.round_others(others, result.float_bits)
        return others

    def subject(self, result: Compressed) -> Subject:
        """What is measured: the trial, on which the result was put."""
        compressed, layers = self.evidence.trial, self.evidence.layers

        def pack() -> Any:
            if result.foreign is not None:
                raise ValueError(f"what {result.foreign} packs does not run here: only measure=quality is for it")
            model = copy.deepcopy(compressed)
            checkpoint.adopt(model, layers, result.packed, result.float_bits)
            return model

        return Subject(
            self.full, compressed, functools.cache(pack), self.test, self.reference, show_progress,
            self.tokenizer, layers, result.weights, result.damage, self.test_text, self.truth,
        )  # fmt: skip

    def reference(self, batch_size: int) -> metrics.Reference:
        """The full model's states on the test windows."""

        def compute() -> dict[str, Tensor]:
            return {"states": metrics.reference(self.full, self.test, batch_size, show_progress).states.cpu()}

        states = self.cache("baseline", {"batch_size": batch_size}, compute)["states"].to(self.test.device)
        return metrics.Reference(states, self.full.get_output_embeddings())

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
            for layer in self.evidence.layers
        ]


def _before(name: str) -> str:
    """The name of a metric of the model before it was trained.

    >>> _before("kl"), _before("kl_low")
    ('kl_before', 'kl_before_low')
    """
    return re.sub(r"(_low|_high)?$", r"_before\1", name, count=1)


@functools.cache
def code_digest() -> str:
    """The sha256 over this package's sources: what other code computed is not read back as if this code had."""
    digest = hashlib.sha256()
    folder = pathlib.Path(__file__).parent
    for path in sorted(folder.rglob("*.py")):
        digest.update(path.relative_to(folder).as_posix().encode() + path.read_bytes())
    return digest.hexdigest()


def reopen(about: Mapping[str, Any], paths: Mapping[str, str | None]) -> Job:
    """The job that left a saved model, from its ``about``, with as many threads as it had.  ``paths``: where model and
    dataset lie today, if not where they lay.

    Raises ValueError if the model or the text is no longer the one that it was.
    """
    config = config_again(about, paths)
    torch.set_num_threads(about["record"]["config"]["threads"])
    return Job(config, *plan(config))


def config_again(about: Mapping[str, Any], paths: Mapping[str, str | None], **changed: Any) -> DictConfig:
    """The config that left a saved model; ``changed``: keys of its root, and ``bits`` of its method.

    Raises ValueError if the model or the text is no longer the one that it was, or the method has no size to choose.
    """
    config, was = OmegaConf.create(dict(about["config"])), about["record"]["config"]
    for group, path in paths.items():
        if path is not None:
            if "path" not in config[group]:
                raise ValueError(f"--{group} {path}: {config[group]._target_} comes with the package; leave it out")
            config[group].path = path
    bits = changed.pop("bits", None)
    if bits is not None:
        if config.method.get("bits") is None:
            raise ValueError(f"{about['record']['labels']['method']} has no method.bits that could be changed")
        config.method.bits = int(bits) if bits == int(bits) else bits
    config.update(changed)
    identity = plan(config).identity
    hub_name = "@" in was["model"]["content"]  # a folder that stands in for it has a content of its own
    for group, differs in {
        "model": not hub_name and identity["model"]["content"] != was["model"]["content"],
        "dataset": any(identity["dataset"][key] != was["dataset"][key] for key in TEXT_KEYS),
    }.items():
        if differs:
            raise ValueError(f"the {group} is not the one of the saved run; name the right one by --{group}")
    return config


def config_of(source: models.Source, method: Method, dataset: Any, measure: Measure, **root: Any) -> DictConfig:
    """The config of a run that was not composed by Hydra; ``root``: what differs from the defaults of its root."""
    groups = {"model": source, "method": method, "dataset": dataset, "measure": measure}
    plain = dataclasses.asdict(Root()) | {"wandb": "disabled"} | root
    return OmegaConf.create(plain | {name: _described(value) for name, value in groups.items()})


def _described(value: Any) -> Any:
    """A value as a config that builds it."""
    if dataclasses.is_dataclass(value):
        kind = type(value)
        fields = {field.name: _described(getattr(value, field.name)) for field in dataclasses.fields(value)}
        return {"_target_": f"{kind.__module__}.{kind.__qualname__}"} | fields
    return [_described(item) for item in value] if isinstance(value, list | tuple) else value


def choose_task(config: DictConfig, method: Method) -> recovery.Recovery | None:
    """How the compressed model is to be fine-tuned, if it is.  Raises ValueError for an unknown task, NotOffered for a
    method whose format cannot be trained."""
    settings = config.get("finetune")
    if config.task not in TASKS or (settings is not None) != (config.task == "finetune"):
        raise ValueError(f"task={config.task} is not a choice of the group task: {', '.join(TASKS)}")
    if settings is None:
        return None
    if isinstance(method, peers.Peer | AsPublished):
        whose = method.library if isinstance(method, peers.Peer) else "as_published"
        raise NotOffered(f"task=finetune cannot train what {whose} packs; use task=compress")
    if config.dtype != "float32":
        raise ValueError(f"task=finetune trains in float32; leave dtype={config.dtype} out")
    found = build(settings)
    assert isinstance(found, recovery.Recovery)
    return found


def choose_device(config: DictConfig) -> tuple[str, torch.dtype]:
    """The device and dtype to compute in.  Raises ValueError for an unknown or absent one."""
    if config.device not in DEVICES:
        raise ValueError(f"unknown device={config.device}: choose one of {', '.join(DEVICES)}")
    if config.dtype not in DTYPES:
        raise ValueError(f"unknown dtype={config.dtype}: choose one of {', '.join(DTYPES)}")
    there = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    device = next(name for name in ("cuda", "mps", "cpu") if there[name]) if config.device == "auto" else config.device
    if not there[device]:
        raise ValueError(f"device={device} is not available on this machine; use device=cpu or device=auto")
    return device, DTYPES[config.dtype]


def build(config: DictConfig) -> Any:
    """The value that a config group names.  Raises the ValueError of its own checks, not Hydra's wrapping of it."""
    try:
        return hydra.utils.instantiate(config, _convert_="object")
    except hydra.errors.InstantiationException as error:
        raise (error.__cause__ if isinstance(error.__cause__, ValueError) else error) from None


def identify(
    config: DictConfig, device: str, source: models.Source | MoeSource, texts: Mapping[str, str]
) -> dict[str, Any]:
    """Everything that can move a number; paths count by their content."""
    groups: dict[str, Any] = {name: OmegaConf.to_container(config[name], resolve=True) for name in GROUPS}
    dataset = {key: value for key, value in groups["dataset"].items() if key not in ("path", "name")}
    model = {key: value for key, value in groups["model"].items() if key not in ("path", "revision")}
    settings = {name: config[name] for name in ("finetune", "train_moe") if config.get(name) is not None}
    return {
        "task": config.task,
        **{name: OmegaConf.to_container(part, resolve=True) for name, part in settings.items()},
        "model": model | {"content": source.label if isinstance(source, MoeSource) else models.content_of(source)},
        "method": groups["method"],
        "dataset": dataset | {f"{purpose}_sha256": data.sha256(text) for purpose, text in texts.items()},
        "measure": _by_content(groups["measure"]),
        "seed": config.seed,
        "device": device,
        "dtype": config.dtype,
        "threads": torch.get_num_threads(),
    }


def _by_content(group: Any) -> Any:
    """A config group, each ``folder`` that it names told by its files.  Raises ValueError for a folder without any."""
    if isinstance(group, list):
        return [_by_content(part) for part in group]
    if not isinstance(group, dict):
        return group
    found = {key: _by_content(value) for key, value in group.items()}
    if found.get("folder") is not None:
        folder = pathlib.Path(found["folder"])
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        if not files:
            raise ValueError(f"the folder {folder} holds no file; set measure.folder to one with task files")
        found["folder"] = fingerprint(
            {path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}
        )
    return found


def provenance(started: datetime.datetime) -> dict[str, Any]:
    """Where a record comes from: code, versions, machine, time."""
    root = pathlib.Path(__file__).parent.parent

    def git(*words: str) -> str | None:
        with contextlib.suppress(OSError, subprocess.CalledProcessError):
            return subprocess.run(
                ["git", "-C", str(root), *words], capture_output=True, text=True, check=True
            ).stdout.strip()
        return None

    changes = git("status", "--porcelain", "--untracked-files=no", "--", ".", ":!results")
    cores = f"{os.cpu_count()} cores, {torch.backends.cpu.get_cpu_capability()}"
    return {
        "commit": git("rev-parse", "HEAD"),
        "dirty": None if changes is None else bool(changes),
        "python": platform.python_version(),
        "versions": dict(_versions()),
        "machine": f"{platform.system()} {platform.machine()}, {cores}",
        "started": started.isoformat(timespec="seconds"),
    }


def _versions() -> Iterator[tuple[str, str]]:
    """Name and version of every package that numbers can depend on, the optional ones where they are installed."""
    needs = {need for library in peers.LIBRARIES.values() for need in library.needs}
    for name in (*PACKAGES, *EVALUATORS, *sorted(needs)):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            yield name, importlib.metadata.version(name)


def reset_peak() -> None:
    """Start a new high-water mark of this process's resident set, where the kernel allows it."""
    with contextlib.suppress(OSError):
        pathlib.Path("/proc/self/clear_refs").write_text("5")


def peak_bytes() -> int:
    """The high-water mark of the resident set, in bytes."""
    with contextlib.suppress(OSError, StopIteration):
        lines = pathlib.Path("/proc/self/status").read_text().splitlines()
        return 1024 * int(next(line for line in lines if line.startswith("VmHWM:")).split()[1])
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak
