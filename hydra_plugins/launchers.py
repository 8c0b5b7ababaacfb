"""Launchers of sweeps on engines that others operate: processes of one machine, a Ray cluster, a Slurm cluster.

A job belongs to one worker, which writes its record and its ``outcome.json``; the engine only says that it ended.  One
that its engine lost is a failed job and the others go on.  All workers see the folder that the sweep was started in.
"""

import abc
import getpass
import json
import logging
import os
import pathlib
import pickle
import subprocess
import sys
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import cloudpickle
from hydra.core.singleton import Singleton
from hydra.core.utils import JobReturn, JobStatus, configure_log, filter_overrides, run_job, setup_globals
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, open_dict

log = logging.getLogger(__name__)
POLL_SECONDS = 2.0
PATIENCE = 15  # polls, until the outcome of a job that Slurm calls completed is seen from here
AROUND = "around.log"  # in a job's folder: the traceback of what went wrong around the job
THREADS = "export OMP_NUM_THREADS=${OMP_NUM_THREADS:-${SLURM_CPUS_PER_TASK:-1}}"
FORWARDED = ("NASHSWARM_", "HF_", "WANDB_", "OMP_", "MKL_", "TOKENIZERS_")  # variables that a Ray worker inherits
SECRET = ("KEY", "TOKEN")  # not those that end so: Ray shows them in its dashboard
Ended = Iterator[tuple[int, str | None]]  # number of a job, and what its engine says went wrong


def work(folder: str, job: bytes) -> None:
    """Run one job, in a worker: ``job`` is pickled so that nothing of it is imported before the folder is right."""
    os.chdir(folder)
    if folder not in sys.path:
        sys.path.insert(0, folder)
    context, task, config, singletons = pickle.loads(job)
    setup_globals()
    Singleton.set_state(singletons)
    ended = run_job(
        hydra_context=context,
        task_function=task,
        config=config,
        job_dir_key="hydra.sweep.dir",
        job_subdir_key="hydra.sweep.subdir",
    )
    if ended.status != JobStatus.COMPLETED:
        raise ended._return_value


class Engine(Launcher):
    """What the engines share.  ``settings``: the keys of the launcher's config, for the engine."""

    def __init__(self, **settings: Any) -> None:
        self.settings = settings

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        self.context, self.task, self.config = hydra_context, task_function, config

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        """Run the jobs to their ends; each has an ``outcome.json`` then."""
        setup_globals()
        configure_log(self.config.hydra.hydra_logging, self.config.hydra.verbose)
        self.folder = pathlib.Path(self.config.hydra.sweep.dir).resolve()
        self.folder.mkdir(parents=True, exist_ok=True)
        self.folders: dict[int, pathlib.Path] = {}
        self.logs: dict[int, pathlib.Path] = {}
        jobs: dict[int, bytes] = {}
        for number, overrides in enumerate(job_overrides, initial_job_idx):
            config = self.context.config_loader.load_sweep_config(self.config, list(overrides))
            with open_dict(config):
                config.hydra.job.id = config.hydra.job.num = number
                config.hydra.sweep.dir = str(self.folder)
            self.folders[number] = self.folder / str(config.hydra.sweep.subdir)
            for name in ("outcome.json", AROUND):  # of an earlier sweep in this folder
                (self.folders[number] / name).unlink(missing_ok=True)
            jobs[number] = cloudpickle.dumps((self.context, self.task, config, Singleton.get_state()))
            log.info("#%d: %s", number, " ".join(filter_overrides(overrides)))
        log.info("%d jobs, logs in %s", len(jobs), self.folder)
        for count, (number, trouble) in enumerate(self.execute(jobs), 1):
            if not self.ended(number):
                self.lost(number, job_overrides[number - initial_job_idx], trouble or "the job left no outcome")
            log.info("#%d ended, %d of %d", number, count, len(jobs))
        return [_returned(overrides) for overrides in job_overrides]

    def ended(self, number: int) -> bool:
        return (self.folders[number] / "outcome.json").exists()

    def lost(self, number: int, overrides: Sequence[str], trouble: str) -> None:
        """Write the outcome of a job that could not write its own.  Its log is the traceback of what went wrong around
        it, or its own, or its engine's.  Raises OSError if the driver cannot write either."""
        from nashswarm.records import files

        folder = self.folders[number]
        logs = [folder / AROUND, *sorted(folder.glob("*.log")), self.logs.get(number, folder)]
        outcome: dict[str, Any] = {
            "status": "failed",
            "labels": {},
            "record": None,
            "message": trouble,
            "log": str(next((path for path in logs if path.exists()), folder)),
            "overrides": list(overrides),
        }
        files.write_whole(folder / "outcome.json", (json.dumps(outcome, indent=1) + "\n").encode())

    @abc.abstractmethod
    def execute(self, jobs: Mapping[int, bytes]) -> Ended:
        """Run pickled jobs; each comes back once, when it has ended."""


class Processes(Engine):
    """Processes of this machine, by joblib; ``n_jobs`` as joblib knows it."""

    def execute(self, jobs: Mapping[int, bytes]) -> Ended:
        """A worker that dies takes the others with it: what had begun then is done again alone, the rest goes on, so
        that a job that kills its worker costs no other job.  Alone or not, a job computes with the same threads."""
        import joblib
        from joblib.externals.loky.process_executor import TerminatedWorkerError

        count = joblib.effective_n_jobs(self.settings["n_jobs"])
        share = None if "OMP_NUM_THREADS" in os.environ else max(joblib.cpu_count() // count, 1)

        def workers(count: int, **more: Any) -> Any:
            with joblib.parallel_config(backend="loky", inner_max_num_threads=share):
                return joblib.Parallel(count, **more)

        waiting, begun = dict(jobs), dict[int, bytes]()
        if count == 1:  # joblib would compute in this process, and a job that dies take it along
            waiting, begun = begun, waiting
        while waiting:
            parallel = workers(count, return_as="generator_unordered")
            try:
                for number, trouble in parallel(
                    joblib.delayed(_tried)(number, job, self.folders[number]) for number, job in list(waiting.items())
                ):
                    del waiting[number]
                    yield number, trouble
            except TerminatedWorkerError:
                for number in [number for number in waiting if self.ended(number)]:
                    del waiting[number]
                    yield number, None
                here = {number: job for number, job in waiting.items() if self.folders[number].exists()} or waiting
                log.warning("a worker died; done again alone: %s", ", ".join(f"#{number}" for number in here))
                begun |= here
                waiting = {number: job for number, job in waiting.items() if number not in begun}
        for number, job in begun.items():
            try:
                [(_, trouble)] = workers(2)([joblib.delayed(_tried)(number, job, self.folders[number])])
            except TerminatedWorkerError:
                trouble = "its worker died: killed, or out of memory"
            yield number, trouble


class Ray(Engine):
    """Tasks of a Ray cluster.  ``address``: of the cluster, ``local`` for one of this machine alone; ``num_cpus``,
    ``num_gpus``: what a job takes; ``max_retries``: how often it begins again after its worker or node was lost."""

    def execute(self, jobs: Mapping[int, bytes]) -> Ended:
        try:
            import ray
        except ImportError:
            sys.exit("hydra/launcher=ray needs Ray: pip install -e '.[ray]'")
        variables = {
            name: value
            for name, value in os.environ.items()
            if name.startswith(FORWARDED) and not name.endswith(SECRET)
        }
        variables["PYTHONPATH"] = os.pathsep.join(path or os.getcwd() for path in sys.path)
        options = {key: value for key, value in self.settings.items() if key != "address"}
        ray.init(address=self.settings["address"], runtime_env={"env_vars": variables})
        try:
            task = ray.remote(work).options(**options)
            running = {task.remote(os.getcwd(), job): number for number, job in jobs.items()}
            while running:
                [first], _ = ray.wait(list(running), num_returns=1)
                number, trouble = running.pop(first), None
                try:
                    ray.get(first)
                except Exception as error:
                    trouble = _kept(self.folders[number], getattr(error, "cause", None) or error)
                yield number, trouble
        finally:
            ray.shutdown()


class Slurm(Engine):
    """One array job of a Slurm cluster, by submitit; ``settings``: parameters of submitit's executor.  A job computes
    with ``OMP_NUM_THREADS`` threads where that is set, otherwise with ``cpus_per_task``."""

    def execute(self, jobs: Mapping[int, bytes]) -> Ended:
        """``squeue`` says what has ended: ``sacct`` needs a data base that small clusters lack."""
        try:
            import submitit
        except ImportError:
            sys.exit("hydra/launcher=slurm needs submitit: pip install -e '.[slurm]'")
        executor = submitit.AutoExecutor(folder=self.folder / ".submitit", cluster="slurm")
        settings = {key: value for key, value in self.settings.items() if value is not None}
        executor.update_parameters(**settings | {"slurm_setup": [*settings.get("slurm_setup", []), THREADS]})
        submitted = executor.map_array(work, [os.getcwd()] * len(jobs), list(jobs.values()))
        running = {job.job_id: number for job, number in zip(submitted, jobs, strict=True)}
        self.logs = {number: job.paths.stderr for job, number in zip(submitted, jobs, strict=True)}
        polls = dict.fromkeys(running, 0)
        array = submitted[0].job_id.split("_")[0]
        log.info("array job %s of Slurm", array)
        try:
            while running:
                time.sleep(POLL_SECONDS)
                queued = _queued()
                for name in [name for name in running if queued is not None and name not in queued]:
                    fate = None if self.ended(running[name]) else _fate(name)
                    polls[name] += 1
                    if fate and "JobState=COMPLETED" in fate and polls[name] < PATIENCE:
                        continue  # a file system may show later here what the node has written
                    yield running.pop(name), fate and f"Slurm ended the job: {fate}"
        except KeyboardInterrupt:
            log.warning("the jobs stay with Slurm: scancel %s ends them; the same command again waits for them", array)
            raise


def _queued() -> set[str] | None:
    """The jobs of this user that wait or run, as Slurm names them; None if Slurm does not answer now."""
    found = subprocess.run(
        ["squeue", "--noheader", "--array", "--user", getpass.getuser(), "--format", "%i"],
        capture_output=True,
        text=True,
    )
    return set(found.stdout.split()) if found.returncode == 0 else None


def _fate(name: str) -> str:
    """In Slurm's words, how a job ended."""
    found = subprocess.run(["scontrol", "show", "job", "--oneliner", name], capture_output=True, text=True)
    words = dict(word.partition("=")[::2] for word in found.stdout.split())
    return ", ".join(f"{key}={words[key]}" for key in ("JobState", "Reason", "ExitCode") if key in words) or "unknown"


def _tried(number: int, job: bytes, folder: pathlib.Path) -> tuple[int, str | None]:
    """A job in a process: its number, and what went wrong around it."""
    try:
        work(os.getcwd(), job)
    except Exception as error:
        return number, _kept(folder, error)
    return number, None


def _kept(folder: pathlib.Path, error: BaseException) -> str:
    """An exception in one sentence; its traceback, while it is handled, stays in the job's folder."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / AROUND).write_text(traceback.format_exc())
    except OSError as full:
        log.warning("%s", full)
    return f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"


def _returned(overrides: Sequence[str]) -> JobReturn:
    """What Hydra wants to hear of a job; how it ended stands in its ``outcome.json``."""
    returned = JobReturn(overrides=overrides, status=JobStatus.COMPLETED)
    returned.return_value = None
    return returned
