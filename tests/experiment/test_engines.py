"""Sweeps on real engines, and what happens there: nothing is lost, nothing is done twice, nothing half-written is read.

Run by ``make test-engines``.  Counts of records are written to ``results/engines``.
"""

import contextlib
import dataclasses
import datetime
import functools
import importlib.metadata
import json
import os
import pathlib
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import pytest

from nashswarm.records import files, record
from nashswarm.records.provenance import provenance
from nashswarm.records.provenance import told as told_of
from tests.experiment.faults import PATIENCE, RayCluster, ray_cluster, slurm_cluster, small_disk, until

pytestmark = pytest.mark.engines
ROOT = pathlib.Path(__file__).parents[2]
RESULTS = ROOT / "results" / "engines"
JOBS = 8
BAD = 3  # the job that something happens to
COLUMNS = ("jobs", "kept", "again", "begun", "lost", "repeated")


@dataclasses.dataclass
class Sweep:
    """One sweep of eight jobs, started as often as need be, in a separate folder."""

    folder: pathlib.Path
    words: list[str]
    environment: Mapping[str, str]
    records: pathlib.Path

    def start(self, *more: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-m", "experiments.run", "-m", *self.words, f"records={self.records}", *more],
            cwd=self.folder,
            env=dict(self.environment),
            stdout=(self.folder / "printed").open("a"),
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    def printed(self) -> str:
        return (self.folder / "printed").read_text()

    def ends(self, process: subprocess.Popen[str], status: int, said: str) -> None:
        """The sweep ends so, and says what it did."""
        assert process.wait(PATIENCE) == status and said in self.printed(), self.printed()

    def inject(self, fault: str) -> None:
        (self.folder / str(BAD)).write_text(fault)

    def mend(self) -> None:
        (self.folder / str(BAD)).unlink()

    def victim(self) -> int:
        """The process of the job that waits, once it does."""
        return int(until((self.folder / f"{BAD}.pid").read_text, "the job to wait"))

    def write_times(self) -> dict[str, int]:
        """Return when each whole record was written, in ns, by fingerprint."""
        return {one.fingerprint: path.stat().st_mtime_ns for path in self.paths() if (one := record.read(path))}

    def paths(self) -> list[pathlib.Path]:
        return sorted(self.records.rglob("[0-9a-f]*.json"))

    def some(self) -> None:
        until(lambda: len(self.paths()) >= 3, "three records")

    def counts(self, before: dict[str, int]) -> dict[str, int]:
        """What became of the records that were there when the fault had passed (``before``), and how often jobs began;
        ``repeated``: those whose record stood there then, or which another worker was at."""
        now = self.write_times()
        begun = [line for path in self.folder.glob("*.begun") for line in path.read_text().splitlines()]
        left = [path for path in self.records.rglob(".*") if path.suffix in (".partial", ".lock")]
        assert not left and len(list(self.records.rglob("[0-9a-f]*.txt"))) == len(now)
        unchanged = sum(now.get(name) == time for name, time in before.items())
        return {
            "jobs": JOBS,
            "kept": unchanged,
            "again": len(now) - unchanged,
            "begun": len(begun),
            "lost": JOBS - len(now),
            "repeated": begun.count("again"),
        }


@dataclasses.dataclass(frozen=True)
class Engine:
    """``serial`` is Hydra's own launcher: one job after the other, in the driver.  ``retries``: whether it begins
    again, by itself, what it lost."""

    name: str
    words: list[str]
    retries: bool
    environment: Mapping[str, str] = dataclasses.field(default_factory=dict)
    cluster: RayCluster | None = None


@pytest.fixture(scope="module", params=["serial", "joblib", "ray", "slurm"])
def engine(request: pytest.FixtureRequest) -> Iterator[Engine]:
    with contextlib.ExitStack() as stack:
        if request.param == "serial":
            yield Engine("serial", [], False)
        elif request.param == "joblib":
            yield Engine("joblib", ["hydra/launcher=joblib", "hydra.launcher.n_jobs=2"], True)
        elif request.param == "ray":
            cluster = stack.enter_context(ray_cluster())
            words = ["hydra/launcher=ray", f"hydra.launcher.address={cluster.address}"]
            yield Engine("ray", words, True, cluster.environment, cluster)
        else:
            environment = stack.enter_context(slurm_cluster())
            yield Engine("slurm", ["hydra/launcher=slurm", "hydra.launcher.timeout_min=20"], False, environment)


@pytest.fixture
def sweep(engine: Engine, small_run: list[str], tmp_path: pathlib.Path) -> Sweep:
    tmp_path.chmod(0o755)
    words = [
        *small_run,
        "wandb=disabled",
        "method=uniform4",
        "method._target_=tests.experiment.faults.Faulty",
        f"+method.faults={tmp_path}",
        f"+method.number={','.join(map(str, range(JOBS)))}",
        f"cache={tmp_path}/cache",
        *engine.words,
    ]
    variables = {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    return Sweep(tmp_path, words, {**os.environ, **variables, **engine.environment}, tmp_path / "records")


@functools.cache
def origin() -> dict[str, Any]:
    """Where these rows come from: the code, the time, and the versions of the engines."""
    versioned = provenance(datetime.datetime.now(datetime.UTC))
    slurm = subprocess.run(["slurmctld", "-V"], capture_output=True, text=True).stdout.split()
    names = ("hydra-core", "joblib", "ray", "submitit")
    versioned["versions"] |= {name: importlib.metadata.version(name) for name in names} | {"slurm": slurm[-1]}
    return versioned


Report = Callable[[str, dict[str, int]], None]


@pytest.fixture
def report(engine: Engine) -> Report:
    """Write the counts after a fault into the matrix, and let no record be lost or repeated.

    Rows of other code leave the matrix.
    """

    def write(fault: str, counts: dict[str, int]) -> None:
        path = RESULTS / "faults.json"
        with files.claim(path):
            matrix = json.loads(path.read_text()) if path.exists() else {}
            same = all(matrix.get("provenance", {}).get(key) == origin()[key] for key in ("commit", "dirty"))
            rows = (matrix.get("rows", {}) if same else {}) | {f"{engine.name}, {fault}": counts}
            files.write_report(path, {"provenance": origin(), "rows": dict(sorted(rows.items()))}, matrix_of(rows))
        assert counts["lost"] == counts["repeated"] == 0, counts

    return write


def matrix_of(rows: Mapping[str, Mapping[str, int]]) -> str:
    """The rows as a table, under what they come from."""
    versions = origin()["versions"]
    engines = ", ".join(f"{name} {versions[name]}" for name in ("hydra-core", "joblib", "ray", "submitit", "slurm"))
    lines = [["engine", "fault", *COLUMNS], [":--", ":--", *["--:"] * len(COLUMNS)]]
    lines += [[*name.split(", "), *(str(row[column]) for column in COLUMNS)] for name, row in sorted(rows.items())]
    table = "".join(f"| {' | '.join(line)} |\n" for line in lines)
    return f"{told_of(origin())}, {origin()['started'][:10]}; {engines}.\n\n{table}"


def test_sweep_with_raising_job_repeats_only_that_job(sweep: Sweep, report: Report) -> None:
    sweep.inject("raise")
    sweep.ends(sweep.start(), 1, "8 jobs: 7 finished, 0 skipped, 1 failed")
    before = sweep.write_times()
    message = sweep.printed().partition("1 failed")[2]
    assert "ArithmeticError: the flock flew into a window" in message
    log = pathlib.Path(message.rpartition("log: ")[2].strip().replace("\n", ""))
    assert "Traceback" in (sweep.folder / log).read_text()
    sweep.mend()
    sweep.ends(sweep.start(), 0, "8 jobs: 1 finished, 7 skipped, 0 failed")
    report("a job raises", sweep.counts(before))


def test_sweep_with_killed_worker_loses_no_record(engine: Engine, sweep: Sweep, report: Report) -> None:
    if engine.name == "serial":
        pytest.skip("the driver is the worker")
    sweep.inject("wait")
    process = sweep.start()
    victim = sweep.victim()
    sweep.some()
    before = sweep.write_times()
    os.kill(victim, signal.SIGKILL)
    sweep.mend()
    if not engine.retries:
        sweep.ends(process, 1, "8 jobs: 7 finished, 0 skipped, 1 failed")
        before = sweep.write_times()
        process = sweep.start()
    sweep.ends(process, 0, "0 failed")
    report("a worker is killed", sweep.counts(before))


def test_sweep_with_killed_driver_loses_no_record(engine: Engine, sweep: Sweep, report: Report) -> None:
    """Where its jobs live on, those of the second sweep wait for them."""
    sweep.inject("wait")
    process = sweep.start()
    sweep.victim()
    sweep.some()
    process.kill()
    process.wait()
    before = sweep.write_times()
    process = sweep.start()
    if engine.name != "serial":  # where the others wait for this one
        until(lambda: len(sweep.paths()) == JOBS - 1, "the other records")
    sweep.mend()
    sweep.ends(process, 0, "0 failed")
    report("the driver is killed", sweep.counts(before))


def test_sweep_on_full_disk_loses_no_record(sweep: Sweep, report: Report) -> None:
    with small_disk(sweep.records, "48k") as resize:
        process = sweep.start()
        assert process.wait(PATIENCE) == 1 and "No space left on device" in sweep.printed(), sweep.printed()
        before = sweep.write_times()
        assert 0 < len(before) < JOBS
        resize("8m")
        sweep.ends(sweep.start(), 0, f"{len(before)} skipped, 0 failed")
        report("a disk fills", sweep.counts(before))


def test_sweep_with_removed_node_loses_no_record(engine: Engine, sweep: Sweep, report: Report) -> None:
    if engine.cluster is None:
        pytest.skip("only Ray has a second node here")
    sweep.inject("wait")
    process = sweep.start()
    victim = sweep.victim()
    sweep.some()
    before = sweep.write_times()
    engine.cluster.remove_node_of(victim)
    sweep.mend()
    sweep.ends(process, 0, "8 jobs: 8 finished, 0 skipped, 0 failed")
    engine.cluster.add_worker("127.0.0.5")
    report("a node is removed", sweep.counts(before))


def test_sweep_past_its_time_limit_loses_no_record(engine: Engine, sweep: Sweep, report: Report) -> None:
    if engine.name != "slurm":
        pytest.skip("only Slurm has time limits")
    sweep.inject("wait")
    limit = ["hydra.launcher.timeout_min=3", "+hydra.launcher.slurm_signal_delay_s=10"]
    sweep.ends(sweep.start(*limit), 1, "8 jobs: 7 finished, 0 skipped, 1 failed")
    before = sweep.write_times()
    sweep.mend()
    sweep.ends(sweep.start(), 0, "8 jobs: 1 finished, 7 skipped, 0 failed")
    report("a time limit passes", sweep.counts(before))
