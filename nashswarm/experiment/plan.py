"""Turn a config into a plan: the values of its groups, and its identity, everything that can move a number.

Every mistake that a user can make in a config is refused here, in one sentence, before anything slow.
"""

import dataclasses
import hashlib
import pathlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import hydra
import hydra.errors
import torch
from hydra.core.config_store import ConfigStore
from omegaconf import MISSING, DictConfig, OmegaConf

from nashswarm.data import corpus, glue
from nashswarm.errors import Unsupported
from nashswarm.experiment import texts
from nashswarm.experiment.identity import to_importable, to_recorded
from nashswarm.measures.measure import Measure
from nashswarm.measures.moe.target import MoeMeasure
from nashswarm.measures.quality import Official
from nashswarm.measures.size import Size
from nashswarm.methods import distillation
from nashswarm.methods.compressed_tensors import CompressedTensors
from nashswarm.methods.gguf_types.settings import GgufTypes
from nashswarm.methods.method import Method
from nashswarm.methods.peers import peer
from nashswarm.methods.peers.llama_cpp import LlamaCpp
from nashswarm.methods.prototype import AsPublished
from nashswarm.models import sources
from nashswarm.moe.model import MoeSource
from nashswarm.moe.router.router import RouterSettings
from nashswarm.moe.training import Training
from nashswarm.records.record import fingerprint

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
GROUPS = ("model", "method", "dataset", "measure")
TASKS = ("compress", "finetune", "train_moe")
DEVICES = ("auto", "cpu", "cuda", "mps")
TEXT_KEYS = ("calibration_sha256", "test_sha256")


@dataclasses.dataclass
class Root:
    """Types and defaults of the root config; each group is typed by the dataclass that its ``_target_`` names."""

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
    viewer: str = "disabled"
    records: str = "results/records"
    cache: str = "results/cache"


ConfigStore.instance().store(name="root", node=Root)


class Plan(NamedTuple):
    """A run that compresses a model, checked but not started.

    ``texts``: purpose (``calibration``, ``test``) -> text.  ``identity``: everything that can move a number.
    """

    source: sources.Source
    method: Method
    dataset: corpus.Dataset
    measure: Measure
    device: str
    dtype: torch.dtype
    texts: Mapping[str, str]
    identity: Mapping[str, Any]
    finetune: distillation.Recovery | None = None


class MoePlan(NamedTuple):
    """A run that trains a mixture of experts, checked but not started; fields as in ``Plan``."""

    source: MoeSource
    router: RouterSettings
    dataset: corpus.Dataset
    measure: MoeMeasure
    device: str
    texts: Mapping[str, str]
    identity: Mapping[str, Any]
    training: Training


def plan(config: DictConfig) -> Plan:
    """Build and check the values of a config that compresses a model.

    Raises ValueError or OSError in one sentence for anything the user can mend.
    """
    device, dtype = choose_device(config)
    source, method, dataset, measure = (build(config[group]) for group in GROUPS)
    for group, value in (("model", source), ("method", method), ("measure", measure)):
        if isinstance(value, MoeSource | RouterSettings | MoeMeasure):
            raise ValueError(f"this {group} is for mixtures of experts that are to be trained: add task=train_moe")
    finetune = choose_task(config, method)
    if isinstance(dataset, glue.Glue) and not isinstance(measure, Official | Size):
        raise ValueError(f"{dataset.task} is a task, not a text: choose measure=official or measure=size")
    if isinstance(measure, Official) and not isinstance(dataset, glue.Glue):
        raise ValueError("measure=official needs labels: choose a task of GLUE, for example dataset=sst2")
    read = texts.read(dataset, source, config.cache)
    if not isinstance(measure, Size):
        texts.refuse_training_text(source, read["test"])
    identity = identify(config, device, source, read)
    return Plan(source, method, dataset, measure, device, dtype, read, identity, finetune)


def plan_moe(config: DictConfig) -> MoePlan:
    """Build and check the values of a config that trains a mixture of experts.

    Raises ValueError or OSError in one sentence for anything the user can mend.
    """
    device, _ = choose_device(config)
    source, router, dataset, measure = (build(config[group]) for group in GROUPS)
    wanted: dict[str, tuple[Any, Any]] = {
        "model": (source, MoeSource),
        "method": (router, RouterSettings),
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
    read = {purpose: dataset.text(purpose) for purpose in ("train", "calibration")}
    return MoePlan(source, router, dataset, measure, device, read, identify(config, device, source, read), training)


def config_again(about: Mapping[str, Any], paths: Mapping[str, str | None], **changed: Any) -> DictConfig:
    """Return the config that made a saved model, from the ``about`` of its folder.

    ``paths``: group (``model``, ``dataset``) -> where it lies today, or None if it was not moved.  ``changed``: keys of
    the root config that shall differ, and ``bits`` of the method.

    Raises ValueError if the model or the text is not the same as then, or if the method has no ``bits``.
    """
    config, recorded = OmegaConf.create(to_importable(about["config"])), about["record"]["config"]
    if config.get("task") == "train_moe":
        raise ValueError("the saved model was trained, not compressed: compress it first, for example by model=local")
    for group, path in paths.items():
        if path is not None:
            key = next((key for key in ("path", "source") if key in config[group]), None)
            if key is None:
                raise ValueError(f"--{group} {path}: {config[group]._target_} comes with the package; leave it out")
            config[group][key] = path
    bits = changed.pop("bits", None)
    if bits is not None:
        if config.method.get("bits") is None:
            raise ValueError(f"{about['record']['labels']['method']} has no method.bits that could be changed")
        config.method.bits = int(bits) if float(bits).is_integer() else bits
    config.update(changed)
    identity = plan(config).identity
    hub_name = "@" in recorded["model"]["content"]  # a folder that stands in for it has a content of its own
    for group, differs in {
        "model": not hub_name and identity["model"]["content"] != recorded["model"]["content"],
        "dataset": any(identity["dataset"][key] != recorded["dataset"][key] for key in TEXT_KEYS),
    }.items():
        if differs:
            raise ValueError(f"the {group} is not the one of the saved run; name the right one by --{group}")
    return config


def config_of(source: sources.Source, method: Method, dataset: Any, measure: Measure, **root: Any) -> DictConfig:
    """Return the config of a run that Hydra did not compose; ``root``: keys that differ from the root's defaults."""
    groups = {"model": source, "method": method, "dataset": dataset, "measure": measure}
    plain = dataclasses.asdict(Root()) | {"wandb": "disabled"} | root
    return OmegaConf.create(plain | {name: described(value) for name, value in groups.items()})


def described(value: Any) -> Any:
    """Return a value as a config that builds it."""
    if dataclasses.is_dataclass(value):
        kind = type(value)
        fields = {field.name: described(getattr(value, field.name)) for field in dataclasses.fields(value)}
        return {"_target_": f"{kind.__module__}.{kind.__qualname__}"} | fields
    return [described(item) for item in value] if isinstance(value, list | tuple) else value


def choose_task(config: DictConfig, method: Method) -> distillation.Recovery | None:
    """Return how the compressed model is fine-tuned, or None if it is not.

    Raises ValueError for an unknown task, Unsupported for a method whose format cannot be trained.
    """
    settings = config.get("finetune")
    if config.task not in TASKS or (settings is not None) != (config.task == "finetune"):
        raise ValueError(f"task={config.task} is not a choice of the group task: {', '.join(TASKS)}")
    if settings is None:
        return None
    if isinstance(method, peer.Peer | LlamaCpp | GgufTypes | CompressedTensors | AsPublished):
        whose = "as_published" if isinstance(method, AsPublished) else method.library
        raise Unsupported(f"task=finetune cannot train what {whose} packs; use task=compress")
    if config.dtype != "float32":
        raise ValueError(f"task=finetune trains in float32; leave dtype={config.dtype} out")
    recovery = build(settings)
    assert isinstance(recovery, distillation.Recovery)
    return recovery


def choose_device(config: DictConfig) -> tuple[str, torch.dtype]:
    """Return the device and dtype to compute in.  Raises ValueError for an unknown one and for an absent device."""
    if config.device not in DEVICES:
        raise ValueError(f"unknown device={config.device}: choose one of {', '.join(DEVICES)}")
    if config.dtype not in DTYPES:
        raise ValueError(f"unknown dtype={config.dtype}: choose one of {', '.join(DTYPES)}")
    available = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    best = next(name for name in ("cuda", "mps", "cpu") if available[name])
    device = best if config.device == "auto" else config.device
    if not available[device]:
        raise ValueError(f"device={device} is not available on this machine; use device=cpu or device=auto")
    return device, DTYPES[config.dtype]


def build(config: DictConfig) -> Any:
    """Build the value that a config group names.

    Raises the ValueError of the value's own checks, without Hydra's wrapping.
    """
    try:
        return hydra.utils.instantiate(config, _convert_="object")
    except hydra.errors.InstantiationException as error:
        raise (error.__cause__ if isinstance(error.__cause__, ValueError) else error) from None


def identify(
    config: DictConfig, device: str, source: sources.Source | MoeSource, read: Mapping[str, str]
) -> dict[str, Any]:
    """Return everything that can move a number; paths count by their content."""
    groups: dict[str, Any] = {name: to_recorded(OmegaConf.to_container(config[name], resolve=True)) for name in GROUPS}
    model = {key: value for key, value in groups["model"].items() if key not in ("path", "revision")}
    settings: dict[str, Any] = {
        name: to_recorded(OmegaConf.to_container(config[name], resolve=True))
        for name in ("finetune", "train_moe")
        if config.get(name) is not None
    }
    settings.get("train_moe", {}).pop("any_version", None)  # the same model
    return {
        "task": config.task,
        **settings,
        "model": model | {"content": source.label if isinstance(source, MoeSource) else sources.content_digest(source)},
        "method": groups["method"],
        "dataset": texts.identify(groups["dataset"], read),
        "measure": by_content(groups["measure"]),
        "seed": config.seed,
        "device": device,
        "dtype": config.dtype,
        "threads": torch.get_num_threads(),
    }


def by_content(group: Any) -> Any:
    """Return a config group in which every ``folder`` is replaced by a digest of its files.

    Raises ValueError for a folder without files.
    """
    if isinstance(group, list):
        return [by_content(part) for part in group]
    if not isinstance(group, dict):
        return group
    content = {key: by_content(value) for key, value in group.items()}
    if content.get("folder") is not None:
        folder = pathlib.Path(content["folder"])
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        if not files:
            raise ValueError(f"the folder {folder} holds no file; set measure.folder to one with task files")
        content["folder"] = fingerprint(
            {path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}
        )
    return content
