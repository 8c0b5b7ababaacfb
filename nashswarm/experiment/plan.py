"""What a config stands for: the choices of its groups, and their identity, everything that can move a number.

All that a user can have got wrong is told here, in one sentence, before anything slow.
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
from nashswarm.experiment.identity import to_importable, to_recorded
from nashswarm.measures.measure import Measure
from nashswarm.measures.moe.target import MoeMeasure
from nashswarm.measures.quality import Official
from nashswarm.measures.size import Size
from nashswarm.methods import distillation
from nashswarm.methods.method import Method
from nashswarm.methods.peers import peer
from nashswarm.methods.prototype import AsPublished
from nashswarm.models import sources
from nashswarm.moe.model import MoeSource
from nashswarm.moe.router.router import RouterSettings
from nashswarm.moe.training import Training
from nashswarm.packed import model_folder
from nashswarm.records.record import fingerprint

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
GROUPS = ("model", "method", "dataset", "measure")
TASKS = ("compress", "finetune", "train_moe")
DEVICES = ("auto", "cpu", "cuda", "mps")
TEXT_KEYS = ("calibration_sha256", "test_sha256")


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
    viewer: str = "disabled"
    records: str = "results/records"
    cache: str = "results/cache"


ConfigStore.instance().store(name="root", node=Root)


class Plan(NamedTuple):
    """What a config stands for, before anything slow; ``identity``: everything that can move a number."""

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
    """The same of a mixture of experts that is to be trained."""

    source: MoeSource
    router: RouterSettings
    dataset: corpus.Dataset
    measure: MoeMeasure
    device: str
    texts: Mapping[str, str]
    identity: Mapping[str, Any]
    training: Training


def plan(config: DictConfig) -> Plan:
    """Raises ValueError or OSError in one sentence for anything the user can mend."""
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
    texts = {purpose: dataset.text(purpose) for purpose in ("calibration", "test")}
    if not isinstance(measure, Size):
        refuse_training_text(source, texts["test"])
    return Plan(
        source, method, dataset, measure, device, dtype, texts, identify(config, device, source, texts), finetune
    )


def plan_moe(config: DictConfig) -> MoePlan:
    """Raises ValueError or OSError in one sentence for anything the user can mend."""
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
    texts = {purpose: dataset.text(purpose) for purpose in ("train", "calibration")}
    return MoePlan(source, router, dataset, measure, device, texts, identify(config, device, source, texts), training)


def config_again(about: Mapping[str, Any], paths: Mapping[str, str | None], **changed: Any) -> DictConfig:
    """The config that left a saved model; ``changed``: keys of its root, and ``bits`` of its method.

    Raises ValueError if the model or the text is no longer the one that it was, or the method has no size to choose.
    """
    config, was = OmegaConf.create(to_importable(about["config"])), about["record"]["config"]
    if config.get("task") == "train_moe":
        raise ValueError("the saved model was trained, not compressed: compress it first, for example by model=local")
    for group, path in paths.items():
        if path is not None:
            if "path" not in config[group]:
                raise ValueError(f"--{group} {path}: {config[group]._target_} comes with the package; leave it out")
            config[group].path = path
    bits = changed.pop("bits", None)
    if bits is not None:
        if config.method.get("bits") is None:
            raise ValueError(f"{about['record']['labels']['method']} has no method.bits that could be changed")
        config.method.bits = int(bits) if float(bits).is_integer() else bits
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


def config_of(source: sources.Source, method: Method, dataset: Any, measure: Measure, **root: Any) -> DictConfig:
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


def choose_task(config: DictConfig, method: Method) -> distillation.Recovery | None:
    """How the compressed model is to be fine-tuned, if it is.  Raises ValueError for an unknown task, Unsupported for a
    method whose format cannot be trained."""
    settings = config.get("finetune")
    if config.task not in TASKS or (settings is not None) != (config.task == "finetune"):
        raise ValueError(f"task={config.task} is not a choice of the group task: {', '.join(TASKS)}")
    if settings is None:
        return None
    if isinstance(method, peer.Peer | AsPublished):
        whose = method.library if isinstance(method, peer.Peer) else "as_published"
        raise Unsupported(f"task=finetune cannot train what {whose} packs; use task=compress")
    if config.dtype != "float32":
        raise ValueError(f"task=finetune trains in float32; leave dtype={config.dtype} out")
    found = build(settings)
    assert isinstance(found, distillation.Recovery)
    return found


def refuse_training_text(source: sources.Source, text: str) -> None:
    """Raises ValueError if the model was trained on the text that is to test it, as where both are one file."""
    path = getattr(source, "path", None)
    if path is not None and model_folder.training_text(pathlib.Path(path)) == corpus.sha256(text):
        raise ValueError(
            f"the model in {path} was trained on this very test text: choose another dataset, or train and test with a "
            "folder of train, validation and test files"
        )


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
    config: DictConfig, device: str, source: sources.Source | MoeSource, texts: Mapping[str, str]
) -> dict[str, Any]:
    """Everything that can move a number; paths count by their content."""
    groups: dict[str, Any] = {name: to_recorded(OmegaConf.to_container(config[name], resolve=True)) for name in GROUPS}
    dataset = {key: value for key, value in groups["dataset"].items() if key not in ("path", "name")}
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
        "dataset": dataset | {f"{purpose}_sha256": corpus.sha256(text) for purpose, text in texts.items()},
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
