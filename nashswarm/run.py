"""run(config): the one function that knows Hydra's config and the disk.

It names the run by everything that can move a number, skips it if its record exists, and otherwise loads, compresses,
measures and writes the record, in one step at the end.
"""

import contextlib
import copy
import dataclasses
import datetime
import errno
import functools
import hashlib
import importlib.metadata
import logging
import os
import pathlib
import platform
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import hydra
import hydra.errors
import numpy as np
import safetensors
import safetensors.torch
import torch
from hydra.core.config_store import ConfigStore
from omegaconf import MISSING, DictConfig, OmegaConf
from rich.console import Console
from rich.progress import track
from torch import Tensor

from nashswarm import data, metrics, models, record, saved
from nashswarm.measures import Measure, Subject
from nashswarm.methods import Compressed, Method, Oracle
from nashswarm.quant.calibration import Moments, calibrate
from nashswarm.record import Record, fingerprint

log = logging.getLogger(__name__)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
GROUPS = ("model", "method", "dataset", "measure")
DEVICES = ("auto", "cpu", "cuda", "mps")
TEXT_KEYS = ("calibration_sha256", "test_sha256")
HELDOUT_LOGITS = 1 << 26  # in a batch of held-out windows: what their divergence may take in memory
PACKAGES = ("nashswarm", "torch", "transformers", "datasets", "numpy", "scipy", "scikit-learn", "safetensors")


@dataclasses.dataclass
class Root:
    """The types of the root config; the groups are typed by the dataclasses that they name."""

    task: str = "compress"
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

    source: models.ModelSource
    method: Method
    dataset: data.Dataset
    measure: Measure
    device: str
    dtype: torch.dtype
    texts: Mapping[str, str]
    identity: Mapping[str, Any]


def plan(config: DictConfig) -> Plan:
    """Raises ValueError or OSError in one sentence for anything the user can mend."""
    device, dtype = choose_device(config)
    source, method, dataset, measure = (build(config[group]) for group in GROUPS)
    texts = {purpose: dataset.text(purpose) for purpose in ("calibration", "test")}
    return Plan(source, method, dataset, measure, device, dtype, texts, identify(config, device, source, texts))


def run(config: DictConfig, labels: Mapping[str, str], many: bool = False) -> Outcome:
    """Execute one run, or find its record.  ``many``: it is one of a sweep, whose compressed models are saved in
    folders named by their fingerprints.

    Raises ValueError or OSError in one sentence for anything the user can mend; no record is left behind then.
    """
    started, start_time = time.monotonic(), datetime.datetime.now(datetime.UTC)
    planned = plan(config)
    identity = dict(planned.identity)
    all_labels = dict(labels) | {"seed": str(config.seed)}
    folder = pathlib.Path(config.records) / (all_labels.get("experiment") or "single")
    path = record.path_of(folder, identity)
    target = None if config.save is None else pathlib.Path(config.save) / (fingerprint(identity) if many else "")
    there = target is None or saved.holds(target, fingerprint(identity))
    if path.exists() and not config.rerun and there:
        return Outcome("skipped", path, record.read(path))
    if target is not None:
        saved.check_free(target)

    reset_peak()
    threads = torch.get_num_threads()
    log.info(
        "%s on %s: %s, seed %d, %d threads", labels["method"], labels["model"], labels["dataset"], config.seed, threads
    )
    job = Job(config, *planned)
    result, found, series, seconds = job.execute()
    finished = Record(
        labels=all_labels,
        config=identity,
        metrics=found | {"seconds": time.monotonic() - started, "peak_bytes": peak_bytes()} | seconds,
        series=series,
        layers=job.layer_table(result),
        allocation=result.allocation,
        provenance=provenance(start_time) | {"parameters": job.parameters, "cache_hits": job.cache_hits},
    )
    if target is not None:
        about = {"config": OmegaConf.to_container(config, resolve=True), "record": dataclasses.asdict(finished)}
        saved.write(target, job.files, about, {name: part.numpy() for name, part in result.game.items()})
    return Outcome("finished", record.write(folder, finished), finished)


class Job:
    """One run under way: the loaded model, its windows, and what is cached of them."""

    def __init__(
        self,
        config: DictConfig,
        source: models.ModelSource,
        method: Method,
        dataset: data.Dataset,
        measure: Measure,
        device: str,
        dtype: torch.dtype,
        texts: Mapping[str, str],
        identity: Mapping[str, Any],
    ) -> None:
        self.method, self.measure = method, measure
        self.cache_folder = pathlib.Path(config.cache)
        self.use_cache = bool(getattr(method, "cache", True))
        self.cache_hits: list[str] = []
        self.rng = np.random.default_rng(config.seed)
        loaded = models.load(source, device, dtype)
        self.full = loaded.model
        self.compressed = copy.deepcopy(self.full)
        self.layers = models.find_layers(self.full, source.exclude)
        self.parameters = sum(parameter.numel() for parameter in self.full.parameters())
        length = loaded.window_length(dataset.sequence_length)
        pool, test = (
            data.windows(texts[purpose], loaded.tokenizer, length, purpose).to(device)
            for purpose in ("calibration", "test")
        )
        if dataset.test_windows is not None and len(test) < dataset.test_windows:
            raise ValueError(
                f"the test text has {len(test)} windows, fewer than dataset.test_windows={dataset.test_windows}"
            )
        self.test = test[: dataset.test_windows]
        self.calibration, self.holdout = data.draw(pool, dataset.calibration_windows, dataset.holdout_windows, self.rng)
        self.label_seed = int(self.rng.integers(2**31))
        shared = ("model", "dataset", "dtype", "device", "threads")
        self.key = {name: identity[name] for name in shared}
        self.key |= {"length": length, "torch": torch.__version__, "code": code_digest()}
        self.seed = config.seed
        self.files: dict[str, bytes] = {}  # of the compressed model

    def execute(self) -> tuple[Compressed, dict[str, float], dict[str, list[float]], dict[str, float]]:
        """Compress and measure: the result, its metrics and series, and the seconds that compression took; ``files``
        are the compressed model from then on."""
        others = models.other_tensors(self.compressed, self.layers)
        started = time.monotonic()
        result = self.method.compress(self.oracle(), self.rng)
        quantize_seconds = time.monotonic() - started
        models.put(self.compressed, result.weights)
        models.round_others(others, result.float_bits)

        layer_weights = sum(layer.parameters for layer in self.layers)
        layer_bytes = sum(len(packed) for packed in result.packed.values())
        self.files = models.files(self.full, result.packed, others, result.float_bits)
        size = sum(len(content) for content in self.files.values())
        found = dict(result.metrics) | {
            "bytes_file": size,
            "bits_per_weight": 8 * layer_bytes / layer_weights,
            "bits_per_weight_model": 8 * size / self.parameters,
            "nominal_bits": result.code_bits / layer_weights,
            "compression": 1 - size / (4 * self.parameters),
        }
        subject = Subject(self.full, self.compressed, self.test, self.reference, show_progress)
        measured, series = self.measure.measure(subject)
        return result, found | measured, dict(result.series) | series, {"quantize_seconds": quantize_seconds}

    def oracle(self) -> Oracle:
        """All that the method may know."""
        others = models.other_tensors(self.compressed, self.layers)
        empty = {layer.name: np.zeros(0, np.uint8) for layer in self.layers}
        slack = 24 * len(self.layers) + 100  # of the header: longer offsets once layers are filled, and code tables
        return Oracle(
            layers=self.layers,
            fixed_bytes=models.file_bytes(self.full, empty, others, 16) + slack,
            parameters=self.parameters,
            moments=functools.cache(self.moments),
            heldout_kl=self.heldout_kl,
            remember=self.cached_for_seed,
            track=show_progress,
        )

    def moments(self) -> dict[str, Moments]:
        """Calibration statistics of every module of the layers."""
        names = [module for layer in self.layers for module in layer.modules]
        parts = [field.name for field in dataclasses.fields(Moments)]

        def compute() -> dict[str, Tensor]:
            generator = torch.Generator().manual_seed(self.label_seed)
            found = calibrate(self.full, names, self.calibration, generator, track=show_progress)
            return {f"{name}/{part}": getattr(moments, part) for name, moments in found.items() for part in parts}

        tensors = self.cached_for_seed("moments", {}, compute)
        return {name: Moments(*(tensors[f"{name}/{part}"] for part in parts)) for name in names}

    def reference(self, batch_size: int) -> metrics.Reference:
        """The full model's states on the test windows."""

        def compute() -> dict[str, Tensor]:
            return {"states": metrics.reference(self.full, self.test, batch_size, show_progress).states.cpu()}

        states = self.cached("baseline", {"batch_size": batch_size}, compute)["states"].to(self.test.device)
        return metrics.Reference(states, self.full.get_output_embeddings())

    @functools.cached_property
    def holdout_reference(self) -> metrics.Reference:
        return metrics.reference(self.full, self.holdout, self.heldout_batch)

    @property
    def heldout_batch(self) -> int:
        """Windows in a batch of held-out text: 8, or fewer of a long window and a large vocabulary."""
        rows = len(self.full.get_output_embeddings().weight)
        return min(max(HELDOUT_LOGITS // (rows * self.holdout.shape[1]), 1), 8)

    def heldout_kl(self, weights: Mapping[str, Tensor], tokens: int | None) -> float:
        """KL in nats per token on held-out calibration text of the model with these layer weights."""
        length = self.holdout.shape[1]
        windows = self.holdout if tokens is None else self.holdout[: -(-tokens // length)]
        models.put(self.compressed, weights)
        found = metrics.evaluate(self.compressed, windows, self.heldout_batch, self.holdout_reference)
        models.put(self.compressed, {layer.name: layer.weight for layer in self.layers if layer.name in weights})
        return metrics.summarise(found)["kl"]

    def cached_for_seed(
        self, kind: str, key: Mapping[str, Any], compute: Callable[[], dict[str, Tensor]]
    ) -> dict[str, Tensor]:
        """As ``cached``, for what depends on the windows drawn for calibration."""
        return self.cached(kind, {"seed": self.seed} | dict(key), compute)

    def cached(self, kind: str, key: Mapping[str, Any], compute: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
        """Tensors kept on disk under the fingerprint of what produced them."""
        path = self.cache_folder / f"{kind}-{fingerprint(self.key | dict(key))}.safetensors"
        if self.use_cache and path.exists():
            try:
                tensors = safetensors.torch.load_file(path)
            except safetensors.SafetensorError as error:
                log.warning("%s is damaged (%s) and is made anew", path, error)
            else:
                self.cache_hits.append(kind)
                return tensors
        tensors = compute()
        if self.use_cache:
            record.write_by(path, functools.partial(_save, tensors))
        return tensors

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
            for layer in self.layers
        ]


@functools.cache
def code_digest() -> str:
    """The sha256 over this package's sources: what other code computed is not read back as if this code had."""
    digest = hashlib.sha256()
    folder = pathlib.Path(__file__).parent
    for path in sorted(folder.rglob("*.py")):
        digest.update(path.relative_to(folder).as_posix().encode() + path.read_bytes())
    return digest.hexdigest()


def _save(tensors: Mapping[str, Tensor], path: pathlib.Path) -> None:
    try:
        safetensors.torch.save_file({name: part.contiguous() for name, part in tensors.items()}, path)
    except safetensors.SafetensorError as error:  # how safetensors reports a full disk
        raise OSError(errno.EIO, str(error)) from error


def reopen(about: Mapping[str, Any], paths: Mapping[str, str | None]) -> Job:
    """The job that left a saved model, from its ``about``, with as many threads as it had.  ``paths``: where model and
    dataset lie today, if not where they lay.

    Raises ValueError if the model or the text is no longer the one that it was.
    """
    config, was = OmegaConf.create(dict(about["config"])), about["record"]["config"]
    for group, path in paths.items():
        if path is not None:
            if "path" not in config[group]:
                raise ValueError(f"--{group} {path}: {config[group]._target_} comes with the package; leave it out")
            config[group].path = path
    torch.set_num_threads(was["threads"])
    planned = plan(config)
    hub_name = "@" in was["model"]["content"]  # a folder that stands in for it has a content of its own
    for group, changed in {
        "model": not hub_name and planned.identity["model"]["content"] != was["model"]["content"],
        "dataset": any(planned.identity["dataset"][key] != was["dataset"][key] for key in TEXT_KEYS),
    }.items():
        if changed:
            raise ValueError(f"the {group} is not the one of the saved run; name the right one by --{group}")
    return Job(config, *planned)


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


def identify(config: DictConfig, device: str, source: models.ModelSource, texts: Mapping[str, str]) -> dict[str, Any]:
    """Everything that can move a number; paths count by their content."""
    groups: dict[str, Any] = {name: OmegaConf.to_container(config[name], resolve=True) for name in GROUPS}
    dataset = {key: value for key, value in groups["dataset"].items() if key not in ("path", "name")}
    model = {key: value for key, value in groups["model"].items() if key not in ("path", "revision")}
    return {
        "task": config.task,
        "model": model | {"content": models.content_of(source)},
        "method": groups["method"],
        "dataset": dataset | {f"{purpose}_sha256": data.sha256(text) for purpose, text in texts.items()},
        "measure": groups["measure"],
        "seed": config.seed,
        "device": device,
        "dtype": config.dtype,
        "threads": torch.get_num_threads(),
    }


def show_progress(items: Sequence[Any], description: str) -> Iterable[Any]:
    """Iterate behind a progress bar with an estimate, on a terminal."""
    console = Console(stderr=True)
    return track(items, description, console=console, transient=True, disable=not console.is_terminal)


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
        "versions": {name: importlib.metadata.version(name) for name in PACKAGES},
        "machine": f"{platform.system()} {platform.machine()}, {cores}",
        "started": started.isoformat(timespec="seconds"),
    }


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
