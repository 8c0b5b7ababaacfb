"""Hydra launchers that run the jobs of a sweep in processes of this machine, on a Ray cluster or on a Slurm cluster.

One worker runs one job and writes its record and its ``outcome.json``; the engine only reports that the job ended.  A
job whose worker was lost counts as failed, and the other jobs go on.  All workers must see the folder in which the
sweep was started.
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
PATIENCE = 15  # polls that a job completed by Slurm gets until its outcome is visible on this file system
AROUND = "around.log"  # in a job's folder: the traceback of an error outside of the job, such as in unpickling it
THREADS = "export OMP_NUM_THREADS=${OMP_NUM_THREADS:-${SLURM_CPUS_PER_TASK:-1}}"
FORWARDED = ("NASHSWARM_", "HF_", "WANDB_", "OMP_", "MKL_", "TOKENIZERS_")  # variables that a Ray worker inherits
SECRET = ("KEY", "TOKEN")  # variables with these endings are not forwarded: Ray shows them in its dashboard
Ended = Iterator[tuple[int, str | None]]  # the number of a job, and the error that its engine reports


def work(folder: str, job: bytes) -> None:
    """Run one pickled job in a worker.

    The job comes as bytes, so that none of its modules is imported before the working folder is set.  Raises what the
    job raised.
    """
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
    """A launcher whose jobs run elsewhere.  ``settings``: the keys of the launcher's config, passed to the engine."""

    def __init__(self, **settings: Any) -> None:
        self.settings = settings

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        self.context, self.task, self.config = hydra_context, task_function, config

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        """Run all jobs to their ends.  Each then has an ``outcome.json``, written by the job or, if lost, here."""
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
        """Return whether a job has written its outcome."""
        return (self.folders[number] / "outcome.json").exists()

    def lost(self, number: int, overrides: Sequence[str], trouble: str) -> None:
        """Write the outcome of a job that did not write its own.

        The outcome names the first of these logs that exists: the traceback in ``around.log``, the job's own log, its
        engine's log.  Raises OSError if the outcome cannot be written.
        """
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
        """Run pickled jobs and yield each number once, when that job has ended."""


class Processes(Engine):
    """Processes of this machine, by joblib.  ``n_jobs``: as in ``joblib.Parallel``."""

    def execute(self, jobs: Mapping[int, bytes]) -> Ended:
        """Run the jobs in a pool of processes, each with an equal share of the threads.

        If one worker dies, joblib ends the whole pool.  Jobs that had begun are then run again, one at a time, and the
        others in a new pool, so that a job that kills its worker costs no other job.
        """
        import joblib
        from joblib.externals.loky.process_executor import TerminatedWorkerError

        count = joblib.effective_n_jobs(self.settings["n_jobs"])
        share = None if "OMP_NUM_THREADS" in os.environ else max(joblib.cpu_count() // count, 1)

        def workers(count: int, **more: Any) -> Any:
            with joblib.parallel_config(backend="loky", inner_max_num_threads=share):
                return joblib.Parallel(count, **more)

        waiting, begun = dict(jobs), dict[int, bytes]()
        if count == 1:  # joblib would run the jobs in this process, which a killed job would end
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
                log.warning(
                    "a worker died; these jobs run again, one at a time: %s", ", ".join(f"#{number}" for number in here)
                )
                begun |= here
                waiting = {number: job for number, job in waiting.items() if number not in begun}
        for number, job in begun.items():
            try:
                [(_, trouble)] = workers(2)([joblib.delayed(_tried)(number, job, self.folders[number])])
            except TerminatedWorkerError:
                trouble = "its worker died: killed, or out of memory"
            yield number, trouble


class Ray(Engine):
    """Tasks of a Ray cluster.

    ``address``: of the cluster, or ``local`` for this machine alone; ``num_cpus``, ``num_gpus``: what one job occupies;
    ``max_retries``: how often a job starts again after its worker or node was lost.
    """

    def execute(self, jobs: Mapping[int, bytes]) -> Ended:
        """Run the jobs as Ray tasks, with the environment variables that they need."""
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
    """One array job of a Slurm cluster, by submitit.

    ``settings``: parameters of submitit's executor.  A job computes with ``OMP_NUM_THREADS`` threads where that is set,
    otherwise with ``cpus_per_task``.
    """

    def execute(self, jobs: Mapping[int, bytes]) -> Ended:
        """Submit the jobs as one array and poll ``squeue``; ``sacct`` needs a database that small clusters lack."""
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
                        continue  # a shared file system can show files of a node seconds later
                    yield running.pop(name), fate and f"Slurm ended the job: {fate}"
        except KeyboardInterrupt:
            log.warning("the jobs stay with Slurm: scancel %s ends them; the same command again waits for them", array)
            raise


def _queued() -> set[str] | None:
    """Return the names of this user's jobs that wait or run, or None if Slurm does not answer."""
    queue = subprocess.run(
        ["squeue", "--noheader", "--array", "--user", getpass.getuser(), "--format", "%i"],
        capture_output=True,
        text=True,
    )
    return set(queue.stdout.split()) if queue.returncode == 0 else None


def _fate(name: str) -> str:
    """Return state, reason and exit code of an ended job, as Slurm reports them."""
    report = subprocess.run(["scontrol", "show", "job", "--oneliner", name], capture_output=True, text=True)
    words = dict(word.partition("=")[::2] for word in report.stdout.split())
    return ", ".join(f"{key}={words[key]}" for key in ("JobState", "Reason", "ExitCode") if key in words) or "unknown"


def _tried(number: int, job: bytes, folder: pathlib.Path) -> tuple[int, str | None]:
    """Run a job in this process; return its number and the error outside of it, if any."""
    try:
        work(os.getcwd(), job)
    except Exception as error:
        return number, _kept(folder, error)
    return number, None


def _kept(folder: pathlib.Path, error: BaseException) -> str:
    """Return the exception being handled as one sentence, and write its traceback into the job's folder."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / AROUND).write_text(traceback.format_exc())
    except OSError as disk_error:
        log.warning("%s", disk_error)
    return f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"


def _returned(overrides: Sequence[str]) -> JobReturn:
    """Return the completed job that Hydra expects; how the job really ended is in its ``outcome.json``."""
    returned = JobReturn(overrides=overrides, status=JobStatus.COMPLETED)
    returned.return_value = None
    return returned
