"""Every file of conf/ composes and builds, offline, and says the same as the code."""

import dataclasses
import functools
import itertools
import pathlib
from collections.abc import Iterable, Iterator
from typing import Any

import pytest
from hydra.core.hydra_config import HydraConfig
from hydra.errors import ConfigCompositionException
from hydra.utils import get_class, instantiate
from omegaconf import DictConfig, MissingMandatoryValue, OmegaConf

import nashswarm.experiment.plan  # noqa: F401  (it registers the types of the root config)
from experiments.config import CONF, compose
from experiments.run import labels_of

CHOICES = sorted(path.relative_to(CONF).with_suffix("").as_posix() for path in CONF.glob("*/*.yaml"))
VALUES = [choice for choice in CHOICES if choice.split("/")[0] in {"model", "method", "dataset", "measure"}]
OTHERS = [choice for choice in CHOICES if choice not in VALUES]
EXPERIMENTS = [choice.split("/")[1] for choice in CHOICES if choice.startswith("experiment/")]
MANDATORY = {
    "model/local": ["model.path=folder"],
    "model/hub": ["model.path=name/on_the_hub"],
    "dataset/local_text": ["dataset.path=file.txt"],
    "dataset/glue": ["dataset.task=rte"],
}
CHANGED = {  # method → what it is made from, and what it changes of that
    "nash_lattice4": ("nash_lattice", {"bits"}),
    "nash_lattice_best": ("nash_lattice", {"effort"}),
    "nash_swarm4": ("nash_swarm", {"bits"}),
    "no_nash": ("nash_swarm", {"rate_rule"}),
    "no_swarm": ("nash_swarm", {"grouping", "rotation"}),
    "no_rotation": ("nash_swarm", {"rotation"}),
    "no_sweeps": ("nash_swarm", {"sweeps"}),
    "no_cache": ("nash_swarm", {"cache"}),
    "random_groups": ("nash_swarm", {"grouping"}),
    "feature_groups": ("nash_swarm", {"grouping"}),
    "compressed_gradients": ("nash_swarm", {"gradients_at"}),
    "baseline": ("uniform4", {"bits"}),
    "uniform3": ("uniform4", {"bits"}),
    "rtn": ("uniform4", {"search"}),
    "moe_no_nash": ("moe_nash_swarm", {"prices", "loss"}),
    "moe_no_swarm": ("moe_nash_swarm", {"flock", "loss"}),
    "moe_no_cache": ("moe_nash_swarm", {"residency", "loss"}),
    "fixed_no_nash": ("fixed_width", {"bit_game", "code_game", "bit_widths"}),
    "lattice_no_bit_game": ("nash_lattice", {"bit_game", "rate_in_codes", "swarm"}),
    "lattice_no_code_game": ("nash_lattice", {"code_game"}),
    "lattice_no_offsets": ("nash_lattice", {"offsets"}),
    "lattice_no_sweeps": ("nash_lattice", {"code_game"}),
    "lattice_no_swarm": ("nash_lattice", {"swarm"}),
    "no_quantization": ("fixed_width", {"bit_widths"}),
    "lattice_no_cache": ("nash_lattice", {"cache"}),
    "gptq_one_step": ("nash_lattice", {"bit_game", "code_game", "rate_in_codes", "strength", "swarm"}),
    "baq": ("fixed_width", {"bit_game", "swarm"}),
    "radio": ("fixed_width", {"bit_game", "swarm"}),
    "evopress": ("fixed_width", {"bit_game", "swarm", "generations"}),
    "low_resource": ("fixed_width", {"bits", "split"}),
    "balanced": ("fixed_width", {"bits", "split"}),
    "high_accuracy": ("fixed_width", {"bits", "split"}),
}
SAID_TWICE = [  # the files whose values are the defaults of their dataclass
    "model/default",
    "method/nash_swarm",
    "method/nash_mixture",
    "method/nash_lattice",
    "method/nash_archive",
    "method/fixed_width",
    "method/gptq",
    "method/uniform4",
    "method/as_published",
    "dataset/stdlib_docs",
    "measure/quality",
    "measure/size",
    "measure/speed",
    "measure/load",
    "measure/bleu",
    "measure/layers",
    "measure/lm_eval",
    "measure/published",
    "model/moe_small",
    "method/moe_nash_swarm",
    "method/moe_top_k",
    "method/moe_loss_free",
    "method/moe_quantile",
    "method/moe_expert_choice",
    "method/moe_dense",
    "measure/routed",
    "measure/quick_validation",
    "measure/routing_time",
]


@functools.cache
def composed(choice: str) -> DictConfig:
    """Compose the configuration with ``choice``, for example method/nash_lattice, and what it needs; not to be changed.

    It takes a tenth of a second, so that every file is composed once in a process.
    """
    group, name = choice.split("/")
    return compose(f"{group}={name}", *MANDATORY.get(choice, []), return_hydra_config=True)


def node(choice: str) -> DictConfig:
    """The part of the configuration that ``choice`` fills."""
    return composed(choice)[choice.split("/")[0]]


@pytest.fixture(scope="module", params=VALUES)
def choice(request: pytest.FixtureRequest) -> str:
    """Each choice in turn; the scope has pytest run all tests of one choice together, on what was composed once."""
    return str(request.param)


def plain(value: Any) -> Any:
    """``value`` as YAML would hold it: dataclasses as dicts with their target, tuples as lists."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {field.name: plain(getattr(value, field.name)) for field in dataclasses.fields(value) if field.init}
        return {"_target_": f"{type(value).__module__}.{type(value).__qualname__}", **fields}
    if isinstance(value, dict):
        return {key: plain(entry) for key, entry in value.items()}
    return [plain(entry) for entry in value] if isinstance(value, list | tuple) else value


def targets(value: Any) -> Iterator[dict[str, Any]]:
    """Every dict in ``value`` that names a ``_target_``."""
    if isinstance(value, dict):
        if "_target_" in value:
            yield value
        for entry in value.values():
            yield from targets(entry)


@pytest.mark.parametrize("path", sorted(CONF.rglob("*.yaml")), ids=lambda path: path.relative_to(CONF).as_posix())
def test_file_begins_with_its_reason(path: pathlib.Path) -> None:
    comments = list(itertools.takewhile(lambda line: line.startswith("# "), path.read_text().splitlines()))
    assert comments and comments[-1].endswith("."), comments  # before it: Hydra's package, an experiment's command


@pytest.mark.parametrize("path", OTHERS)
def test_compose_every_other_choice_leaves_nothing_missing(path: str) -> None:
    nothing_missing(composed(path))


def test_compose_every_value_leaves_nothing_missing(choice: str) -> None:
    nothing_missing(composed(choice))


def nothing_missing(config: DictConfig) -> None:
    OmegaConf.to_container(OmegaConf.masked_copy(config, set(config) - {"hydra"}), resolve=True, throw_on_missing=True)


def test_build_every_choice_is_a_frozen_value_equal_to_its_yaml(choice: str) -> None:
    value = instantiate(node(choice), _convert_="object")
    assert dataclasses.is_dataclass(value) and type(value).__dataclass_params__.frozen  # type: ignore[attr-defined]
    assert plain(value) == OmegaConf.to_container(node(choice), resolve=True)


def test_yaml_names_every_field_and_no_other(choice: str) -> None:
    for fields in targets(OmegaConf.to_container(node(choice))):
        wanted = [field.name for field in dataclasses.fields(get_class(fields["_target_"])) if field.init]
        assert sorted(set(fields) - {"_target_"}) == sorted(wanted), fields["_target_"]


def test_yaml_repeats_the_defaults_of_the_code(choice: str) -> None:
    if choice not in SAID_TWICE:
        return
    written = OmegaConf.to_container(node(choice), resolve=True)
    for field in dataclasses.fields(get_class(written["_target_"])):
        factory = field.default_factory
        if field.default is not dataclasses.MISSING or factory is not dataclasses.MISSING:
            default = field.default if factory is dataclasses.MISSING else factory()
            assert written[field.name] == plain(default), f"{written['_target_']}.{field.name}"


@pytest.mark.parametrize("name", sorted(CHANGED))
def test_ablation_yaml_differs_in_the_keys_that_it_names_only(name: str) -> None:
    base, changed = CHANGED[name]
    whole, part = node(f"method/{base}"), node(f"method/{name}")
    assert set(whole) == set(part)
    assert {key for key in whole if whole[key] != part[key]} == changed
    written = OmegaConf.load(CONF / "method" / f"{name}.yaml")
    assert set(written) - {"defaults"} == changed


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_experiment_is_a_sweep_and_its_second_line_starts_it(name: str) -> None:
    assert (CONF / f"experiment/{name}.yaml").read_text().splitlines()[1] == (
        f"# python -m experiments.run experiment={name}"
    )
    hydra = composed(f"experiment/{name}").hydra
    assert hydra.mode.name == "MULTIRUN"
    assert hydra.job.name == name.removesuffix("_llama_cpp")  # whose records stand among those of real
    if hydra.sweeper._target_ == "hydra_plugins.search.Study":
        return  # its params are no lists: tests/experiment/test_launchers.py
    sweep = sweep_of(name)
    for key, values in sweep.items():
        if not (CONF / key).is_dir():  # a number of a key composes as any other of them; the slow test below has all
            sweep[key] = values[-1:]
    longest = max(map(len, sweep.values()))  # every choice once, in some row; the slow test below has all rows
    compose_rows(name, sweep, itertools.islice(zip(*map(itertools.cycle, sweep.values()), strict=True), longest))


@pytest.mark.slow
@pytest.mark.parametrize("name", EXPERIMENTS)
def test_experiment_every_row_of_its_sweep_composes(name: str) -> None:
    if composed(f"experiment/{name}").hydra.sweeper._target_ != "hydra_plugins.search.Study":
        sweep = sweep_of(name)
        compose_rows(name, sweep, itertools.product(*sweep.values()))


def sweep_of(name: str) -> dict[str, list[str]]:
    """Return the values of every axis of an experiment's sweep."""
    params = composed(f"experiment/{name}").hydra.sweeper.params
    return {key: [value.strip() for value in str(values).split(",")] for key, values in params.items()}


def compose_rows(name: str, axes: Iterable[str], rows: Iterable[tuple[str, ...]]) -> None:
    for row in rows:
        job = [f"experiment={name}", *(f"{key}={value}" for key, value in zip(axes, row, strict=True))]
        assert "method" in compose(*job)


def test_single_run_needs_no_job_number() -> None:
    hydra = compose(return_hydra_config=True).hydra
    assert hydra.run.dir.startswith("results/logs/single/")
    assert hydra.mode is None


@pytest.mark.parametrize(
    "override, message",
    [
        ("method=nash_swrm", "Could not find 'method/nash_swrm'"),
        ("experiment=ablatoin", "Could not find 'experiment/ablatoin'"),
        ("metod=nash_lattice", "Could not override 'metod'"),
        ("method.bitz=3", "Could not override 'method.bitz'"),
        ("sed=1", "Could not override 'sed'"),
    ],
)
def test_compose_misspelt_override_fails_with_the_message_of_hydra(override: str, message: str) -> None:
    with pytest.raises(ConfigCompositionException, match=message):
        compose(override)


@pytest.mark.parametrize("path", sorted(MANDATORY))
def test_missing_value_is_named(path: str) -> None:
    needed = MANDATORY[path][0].partition("=")[0].partition(".")[2]
    with pytest.raises(MissingMandatoryValue, match=needed):
        OmegaConf.to_container(compose(path.replace("/", "=")), throw_on_missing=True)


def test_labels_of_general_choices_name_what_they_were_given() -> None:
    words = ["model=hub", "model.path=facebook/opt-1.3b", "dataset=glue", "dataset.task=rte", "method.bits=2"]
    config = compose(*words, return_hydra_config=True)
    HydraConfig.instance().set_config(config)
    labels = {"model": "opt-1.3b", "dataset": "rte", "method": "nash_swarm[bits=2]", "measure": "quality"}
    assert labels_of(config) == labels | {"experiment": "single"}
