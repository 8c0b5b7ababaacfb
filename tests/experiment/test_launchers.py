"""What launchers and searches are made of; sweeps on real engines are in test_engines.py."""

import copy
import functools
import json
import logging
import os
import pathlib
import subprocess
import sys
import types
from collections.abc import Mapping, Sequence
from typing import Any

import cloudpickle
import pytest
import torch
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.plugins import Plugins
from hydra.plugins.launcher import Launcher
from hydra.plugins.sweeper import Sweeper
from omegaconf import OmegaConf

import nashswarm.experiment.plan  # it registers the types of the root config
from experiments.config import CONF, compose
from hydra_plugins import launchers, search
from nashswarm.records import record
from nashswarm.reporting import frame


@pytest.mark.parametrize("name", [path.stem for path in (CONF / "hydra/launcher").glob("*.yaml")])
def test_launcher_is_a_choice_of_the_config(name: str) -> None:
    config = compose(f"hydra/launcher={name}", return_hydra_config=True)
    HydraConfig.instance().set_config(config)
    made = Plugins.instance()._instantiate(config.hydra.launcher)
    assert isinstance(made, Launcher) and isinstance(made, launchers.Engine)
    assert made.settings == {key: value for key, value in config.hydra.launcher.items() if key != "_target_"}


class Careless(launchers.Engine):
    """An engine that loses its second job without a trace, and the third for a reason."""

    def execute(self, jobs: Mapping[int, bytes]) -> launchers.Ended:
        for number, job in jobs.items():
            assert isinstance(job, bytes)
            if number == 5:
                self.folders[number].mkdir(parents=True)
                done = {"status": "skipped", "labels": {}, "record": None, "message": "", "log": "", "overrides": []}
                (self.folders[number] / "outcome.json").write_text(json.dumps(done))
            yield number, "the node burnt" if number == 7 else None


@pytest.fixture
def careless(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> Careless:
    """It works in ``logs`` under ``tmp_path``."""
    words = [f"hydra.sweep.dir={tmp_path}/logs", "hydra.job.num=0"]
    config = compose(*words, return_hydra_config=True)
    loader = types.SimpleNamespace(load_sweep_config=lambda config, overrides: config.copy())
    engine = Careless()
    engine.setup(hydra_context=types.SimpleNamespace(config_loader=loader), task_function=print, config=config)
    monkeypatch.setattr(launchers, "configure_log", lambda *_: None)
    return engine


def test_launch_job_lost_by_its_engine_has_failed(careless: Careless, tmp_path: pathlib.Path) -> None:
    returned = careless.launch([["seed=1"], ["seed=2"], ["seed=3"]], 5)
    assert [one.return_value for one in returned] == [None] * 3
    outcomes = frame.read_outcomes(tmp_path / "logs")
    assert [one["status"] for one in outcomes] == ["skipped", "failed", "failed"]
    assert [one["message"] for one in outcomes[1:]] == ["the job left no outcome", "the node burnt"]
    assert outcomes[2]["overrides"] == ["seed=3"]


def test_lost_names_the_nearest_log(careless: Careless, tmp_path: pathlib.Path) -> None:
    careless.launch([["seed=3"]], 7)

    def told(number: int, *names: str) -> str:
        folder = careless.folders[number] = tmp_path / "logs" / str(number)
        for name in names:
            folder.mkdir(exist_ok=True)
            (folder / name).touch()
        careless.lost(number, ["seed=3"], "the node burnt")
        return str(json.loads((folder / "outcome.json").read_text())["log"])

    assert told(1) == str(tmp_path / "logs/1")
    (tmp_path / "2_log.err").touch()
    careless.logs = {number: tmp_path / "2_log.err" for number in range(2, 5)}
    assert told(2) == str(tmp_path / "2_log.err")
    assert told(3, "ablation.log") == str(tmp_path / "logs/3/ablation.log")
    assert told(4, "ablation.log", launchers.AROUND) == str(tmp_path / "logs/4" / launchers.AROUND)
    assert not list(tmp_path.rglob("*.partial"))


def test_launch_on_a_full_disk_leaves_no_partial_outcome(
    careless: Careless, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(OSError, match=r"cannot write .*outcome\.json: No space left on device"):
        careless.launch([["seed=3"]], 7)
    assert list((tmp_path / "logs/7").iterdir()) == []


def test_launch_ignores_the_outcome_of_an_earlier_sweep(careless: Careless, tmp_path: pathlib.Path) -> None:
    (tmp_path / "logs/6").mkdir(parents=True)
    (tmp_path / "logs/6/outcome.json").write_text(json.dumps({"status": "finished", "record": "of yesterday"}))
    careless.launch([["seed=2"]], 6)
    assert [one["status"] for one in frame.read_outcomes(tmp_path / "logs")] == ["failed"]


TOLD = """
import os, pathlib
folder = pathlib.Path({folder!r})
folder.mkdir(exist_ok=True)
with (folder / "told").open("a") as file:
    print(os.getpid(), os.environ["OMP_NUM_THREADS"], file=file)
{then}
"""


class Code(str):
    """A job that executes itself when it is unpickled."""

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return exec, (str(self),)


@pytest.mark.parametrize("count", [1, 2])
def test_processes_job_that_kills_its_worker_costs_no_other(
    count: int, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    joblib = pytest.importorskip("joblib")
    monkeypatch.setattr(joblib, "cpu_count", lambda: 6)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    engine = launchers.Processes(n_jobs=count)
    engine.folders = {number: tmp_path / str(number) for number in range(4)}
    jobs = {
        number: cloudpickle.dumps(Code(TOLD.format(folder=str(folder), then="os._exit(1)" if number == 1 else "")))
        for number, folder in engine.folders.items()
    }
    ended = dict(engine.execute(jobs))
    assert sorted(ended) == [0, 1, 2, 3] and ended[1] == "its worker died: killed, or out of memory"
    lines = [line.split() for folder in engine.folders.values() for line in (folder / "told").read_text().splitlines()]
    assert {threads for _, threads in lines} == {str(6 // count)}
    assert str(os.getpid()) not in {process for process, _ in lines}


def test_tried_job_that_raises_leaves_its_traceback(tmp_path: pathlib.Path) -> None:
    job = cloudpickle.dumps(Code("def inner():\n    raise ArithmeticError('no\\nsuch number')\ninner()"))
    folder = tmp_path / "logs" / "3"
    assert launchers._tried(3, job, folder) == (3, "ArithmeticError: no")
    kept = (folder / launchers.AROUND).read_text()
    assert kept.startswith("Traceback") and "in inner" in kept and "such number" in kept


class Executor:
    """What Slurm's launcher asks of submitit, whose jobs leave Slurm at once."""

    parameters: dict[str, Any]

    def __init__(self, folder: pathlib.Path, cluster: str) -> None:
        self.folder = folder

    def update_parameters(self, **parameters: Any) -> None:
        type(self).parameters = parameters

    def map_array(self, function: Any, folders: Sequence[str], jobs: Sequence[bytes]) -> list[Any]:
        paths = types.SimpleNamespace(stderr=self.folder / "1_0_0_log.err")
        return [types.SimpleNamespace(job_id="1_0", paths=paths)]


@pytest.mark.parametrize("late, trouble", [(3, None), (1000, "Slurm ended the job: JobState=COMPLETED")])
def test_slurm_waits_for_an_outcome_that_appears_late(
    late: int, trouble: str | None, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    polls = []

    def sleep(seconds: float) -> None:
        polls.append(seconds)
        if len(polls) == late:
            (tmp_path / "outcome.json").touch()

    monkeypatch.setitem(sys.modules, "submitit", types.SimpleNamespace(AutoExecutor=Executor))
    monkeypatch.setattr(launchers.time, "sleep", sleep)
    monkeypatch.setattr(launchers, "_queued", lambda: set[str]())
    monkeypatch.setattr(launchers, "_fate", lambda name: "JobState=COMPLETED")
    engine = launchers.Slurm(cpus_per_task=3, slurm_setup=["module load python"], mem_gb=None)
    engine.folder, engine.folders = tmp_path, {5: tmp_path}
    assert list(engine.execute({5: b""})) == [(5, trouble)]
    assert len(polls) == min(late, launchers.PATIENCE)
    assert engine.logs == {5: tmp_path / ".submitit/1_0_0_log.err"}
    assert Executor.parameters == {"cpus_per_task": 3, "slurm_setup": ["module load python", launchers.THREADS]}


@pytest.mark.parametrize(
    "variables, threads",
    [({"SLURM_CPUS_PER_TASK": "3"}, "3"), ({"SLURM_CPUS_PER_TASK": "3", "OMP_NUM_THREADS": "2"}, "2"), ({}, "1")],
)
def test_slurm_job_computes_with_the_threads_of_its_variables(variables: dict[str, str], threads: str) -> None:
    command = ["bash", "-uc", f"{launchers.THREADS}; printenv OMP_NUM_THREADS"]
    assert subprocess.run(command, env=variables, capture_output=True, text=True).stdout.strip() == threads


class Hills:
    """A launcher whose jobs know their results: two objectives that pull ``x`` apart, and a job that fails at times."""

    def __init__(self, folder: pathlib.Path, killed_after: int = 1000) -> None:
        self.folder, self.left = folder, killed_after
        self.asked: list[dict[str, str]] = []

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> list[Any]:
        for number, words in enumerate(job_overrides, initial_job_idx):
            if self.left == 0:
                raise KeyboardInterrupt
            self.left -= 1
            values = dict(word.split("=") for word in words)
            self.asked.append(values)
            x = float(values["x"])
            metrics = {"kl": x**2 + (values["kind"] == "bad"), "bytes_file": (x - 2) ** 2}
            path = record.write(self.folder / "records", record.Record({}, {**values}, metrics, {}, [], "", {}))
            job = self.folder / "logs" / str(number)
            job.mkdir(parents=True, exist_ok=True)
            failed = len(self.asked) == 3
            (job / "outcome.json").write_text(json.dumps({"record": None if failed else str(path)}))
        return []


class Loader:
    """Composes as Hydra's does, beside what the command line of a sweep has fixed for Hydra itself."""

    def load_sweep_config(self, config: Any, words: list[str]) -> Any:
        return OmegaConf.from_dotlist(words)


def test_study_continues_where_it_was_killed(tmp_path: pathlib.Path, caplog: pytest.LogCaptureFixture) -> None:
    optuna = pytest.importorskip("optuna", reason="the extra search is not installed")
    params = {"x": "interval(-4.0, 4.0)", "kind": "choice(good, bad)"}

    def start(killed_after: int) -> list[dict[str, str]]:
        study = search.Study(params, ["kl", "bytes_file"], 12, 2, 0, str(tmp_path / "studies/hills.db"))
        study.context = types.SimpleNamespace(config_loader=Loader())
        study.config = types.SimpleNamespace(
            hydra=types.SimpleNamespace(sweep=types.SimpleNamespace(dir=tmp_path / "logs"))
        )
        study.launcher = Hills(tmp_path, killed_after)
        try:
            study.sweep(["records=elsewhere", "seed=1"])
        except KeyboardInterrupt:
            assert killed_after < 1000
        return study.launcher.asked

    first = start(5)
    second = start(1000)
    third = start(1000)  # for the trial that failed in the second
    with caplog.at_level(logging.INFO):
        assert start(1000) == []
    assert "12 of 12 trials known" in caplog.text and "on the front: x=" in caplog.text
    assert (len(first), len(third)) == (5, 1) and all(values["seed"] == "1" for values in first + second + third)
    [name] = optuna.get_all_study_names(f"sqlite:///{tmp_path}/studies/hills.db")
    study = optuna.load_study(study_name=name, storage=f"sqlite:///{tmp_path}/studies/hills.db")
    states = [trial.state.name for trial in study.trials]
    assert states.count("COMPLETE") == 12 and "RUNNING" not in states and "WAITING" not in states
    assert {values["x"] for values in first[4:]} <= {values["x"] for values in second}  # asked again
    points = [tuple(trial.values) for trial in study.trials if trial.values]
    front = {one for one in points if not any(a <= one[0] and b <= one[1] and (a, b) != one for a, b in points)}
    assert {tuple(trial.values) for trial in study.best_trials} == front


@pytest.mark.parametrize(
    "words, expected",
    [
        ("x=interval(1, 4)", {"name": "FloatDistribution", "low": 1.0, "high": 4.0, "log": False}),
        ("x=tag(log, interval(0.1, 10))", {"name": "FloatDistribution", "low": 0.1, "high": 10.0, "log": True}),
        ("x=range(3, 12)", {"name": "IntDistribution", "low": 3, "high": 11, "step": 1}),
        ("x=range(1.5, 3.0, 0.5)", {"name": "FloatDistribution", "low": 1.5, "high": 2.5, "step": 0.5}),
        ("x=a,b", {"name": "CategoricalDistribution", "choices": ("a", "b")}),
    ],
)
def test_distribution_of_a_hydra_sweep_is_that_of_optuna(words: str, expected: dict[str, Any]) -> None:
    pytest.importorskip("optuna", reason="the extra search is not installed")
    found = search.distribution(OverridesParser.create().parse_override(words))
    attributes = {key: getattr(found, key) for key in expected if key != "name"}
    assert {"name": type(found).__name__} | attributes == expected


@pytest.mark.parametrize(
    "words, said",
    [
        ("x=range(12, 3, -1)", "a range to be searched goes upwards, for example range\\(3, 12\\)"),
        ("x=range(3.0, 1.5, -0.5)", "a range to be searched goes upwards"),
        ("x=range(3, 3)", "a range to be searched goes upwards"),
        ("x=range(1, 3, 0)", "a range to be searched goes upwards"),
        ("x=interval(4, 1)", "an interval begins with its smaller end, for example interval\\(0.1, 10\\)"),
        ("x=tag(log, interval(0, 10))", "an interval begins above 0"),
    ],
)
def test_distribution_of_a_descending_sweep_is_refused(words: str, said: str) -> None:
    pytest.importorskip("optuna", reason="the extra search is not installed")
    with pytest.raises(SystemExit, match=said) as refused:
        search.distribution(OverridesParser.create().parse_override(words))
    assert str(refused.value).startswith(f"{words}: ")


@pytest.mark.parametrize("words", ["x=tag(log, range(1, 100))", "x=tag(log, choice(1, 10))"])
def test_distribution_on_a_logarithmic_scale_needs_an_interval(words: str) -> None:
    pytest.importorskip("optuna", reason="the extra search is not installed")
    with pytest.raises(SystemExit, match="only an interval can be searched on a logarithmic scale"):
        search.distribution(OverridesParser.create().parse_override(words))


class Composer:
    """Hydra's composition of a job of experiment=search, some keys of the files changed; each is composed once."""

    compose = staticmethod(functools.cache(functools.partial(compose, "experiment=search")))

    def __init__(self, changed: Mapping[str, Any]) -> None:
        self.changed = changed

    def load_sweep_config(self, config: Any, words: list[str]) -> Any:
        composed = copy.deepcopy(self.compose(*sorted(words)))
        for key, value in self.changed.items():
            OmegaConf.update(composed, key, value)
        return composed


def test_study_identity_changes_with_whatever_changes_a_number(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("optuna", reason="the extra search is not installed")

    def name(fixed: dict[str, str], params: dict[str, str], minimize: list[str], changed: dict[str, Any]) -> str:
        study = search.Study(params, minimize, 3, 1, 0, "unused.db")
        study.context, study.config = types.SimpleNamespace(config_loader=Composer(changed)), None
        parsed = OverridesParser.create().parse_overrides([f"{key}={value}" for key, value in params.items()])
        space = {one.get_key_element(): search.distribution(one) for one in parsed}
        return record.fingerprint(study.identity(fixed, space))

    groups, goals = {"method": "choice(nash_lattice, gptq)", "method.bits": "interval(2, 4)"}, ["kl", "bytes_file"]
    first = name({}, groups, goals, {})
    assert name({}, groups, goals, {}) == first
    for aside in ({"records": "elsewhere"}, {"wandb": "disabled"}, {"rerun": "true"}, {"save": "models"}):
        assert name(aside, groups, goals, {}) == first
    others = [
        name({"seed": "1"}, groups, goals, {}),
        name({}, groups | {"method.bits": "interval(2, 5)"}, goals, {}),
        name({}, groups | {"method": "choice(nash_lattice, rtn)"}, goals, {}),  # the second choice counts too
        name({}, groups, ["kl", "seconds"], {}),
        name({}, groups, goals, {"dataset.test_windows": 32}),  # files of conf/ that were changed
        name({}, groups, goals, {"method.bits": 2.5, "measure.batch_size": 3}),
    ]
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    others.append(name({}, groups, goals, {}))
    monkeypatch.setattr("nashswarm.records.provenance.code_digest", lambda: "of other code")
    others.append(name({}, groups, goals, {}))
    assert len({first, *others}) == 1 + len(others)


def test_search_composes_and_its_ends_build() -> None:
    config = compose("experiment=search", return_hydra_config=True)
    HydraConfig.instance().set_config(config)
    made = Plugins.instance()._instantiate(config.hydra.sweeper)
    assert isinstance(made, Sweeper) and isinstance(made, search.Study)
    assert str(made.storage) == "results/studies/search.db"
    parser = OverridesParser.create()
    values = [f"{key}={value}" for key, value in made.params.items()]
    pytest.importorskip("optuna", reason="the extra search is not installed")
    first = [search.distribution(one) for one in parser.parse_overrides(values)]
    for end, choice in (("low", 0), ("high", -1)):  # the method takes what the search may ask
        asked = [one.choices[choice] if hasattr(one, "choices") else getattr(one, end) for one in first]
        words = [f"{key}={value}" for key, value in zip(made.params, asked, strict=True)]
        nashswarm.experiment.plan.build(compose("experiment=search", *words).method)
