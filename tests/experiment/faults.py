"""A method that fails on command, and clusters of one machine: what the tests of the engines need."""

import contextlib
import dataclasses
import fcntl
import os
import pathlib
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from typing import IO, Any

import numpy as np

from nashswarm.methods.method import Compressed
from nashswarm.methods.uniform import Uniform
from nashswarm.records import record

PATIENCE = 1800.0  # seconds: machines are busy, and every job imports torch
PACKAGES = "slurm-wlm munge"


@dataclasses.dataclass(frozen=True)
class Faulty(Uniform):
    """Round to nearest, and whatever the file named by ``number`` in the folder ``faults`` says: ``raise``, or ``wait``
    until that file is gone.  Every execution leaves a line in the file ``<number>.begun``: ``again`` where its record
    stands there already, in ``records`` of that folder, or another execution of it goes on; ``first`` otherwise."""

    faults: str = ""
    number: int = 0

    def compress(self, context: Any, rng: np.random.Generator) -> Compressed:
        fault = pathlib.Path(self.faults, str(self.number))
        with fault.with_suffix(".begun").open("a") as begun:
            print("again" if self.recorded() or not alone(begun) else "first", file=begun, flush=True)
            if fault.exists():
                if fault.read_text() == "raise":
                    raise ArithmeticError("the flock flew into a window")
                fault.with_suffix(".pid").write_text(str(os.getpid()))
                while fault.exists():
                    time.sleep(0.1)
            return super().compress(context, rng)

    def recorded(self) -> bool:
        """Whether the record of this job exists."""
        records = map(record.read, pathlib.Path(self.faults, "records").rglob("[0-9a-f]*.json"))
        return any(one.config["method"]["number"] == self.number for one in records)


def alone(file: IO[str]) -> bool:
    """Whether no other process has the file locked; from then on until it is closed, this one has."""
    with contextlib.suppress(BlockingIOError):
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    return False


def until(true: Callable[[], Any], what: str) -> Any:
    """What ``true`` says once it is true; RuntimeError after ``PATIENCE``."""
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end:
        with contextlib.suppress(OSError):
            if value := true():
                return value
        time.sleep(0.2)
    raise RuntimeError(f"waited {PATIENCE:.0f} s for {what}")


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


def parents(process: int) -> Iterator[int]:
    """A process and all above it."""
    while process > 1:
        yield process
        process = int(pathlib.Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[1])


@dataclasses.dataclass
class RayCluster:
    """A head without work on 127.0.0.2 and a worker node of one core on each of 127.0.0.3 and 127.0.0.4."""

    environment: Mapping[str, str]
    address: str
    nodes: list[subprocess.Popen[bytes]]

    def add(self, *words: str) -> None:
        """Start a node, and wait until it says that it runs."""
        ray = str(pathlib.Path(sys.executable).with_name("ray"))
        command = [ray, "start", "--block", "--disable-usage-stats", f"--object-store-memory={80 * 2**20}", *words]
        with tempfile.NamedTemporaryFile(prefix="nashswarm-ray-") as log:
            environment = {**os.environ, **self.environment}
            self.nodes.append(subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT))
            until(lambda: b"Ray runtime started" in pathlib.Path(log.name).read_bytes(), "a node of Ray")

    def add_worker(self, host: str) -> None:
        self.add(f"--address={self.address}", f"--node-ip-address={host}", "--num-cpus=1")

    def remove_node_of(self, process: int) -> None:
        """Kill, at once and all of it, the node that ``process`` works on."""
        above = set(parents(process))
        node = next(node for node in self.nodes if node.pid in above)
        subprocess.run(["pkill", "-KILL", "--parent", str(node.pid)], check=True)
        node.kill()
        node.wait()
        self.nodes.remove(node)


@contextlib.contextmanager
def ray_cluster() -> Iterator[RayCluster]:
    environment = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    environment |= {"RAY_raylet_start_wait_time_s": "120"}  # on a busy machine
    port = free_port()
    cluster = RayCluster(environment, f"127.0.0.2:{port}", [])
    try:
        head = ("--head", "--node-ip-address=127.0.0.2", f"--port={port}", "--num-cpus=0", "--include-dashboard=false")
        cluster.add(*head)
        for host in ("127.0.0.3", "127.0.0.4"):
            cluster.add_worker(host)
        yield cluster
    finally:
        for node in reversed(cluster.nodes):
            node.terminate()
        for node in cluster.nodes:
            node.wait(60)


@contextlib.contextmanager
def slurm_cluster() -> Iterator[Mapping[str, str]]:
    """A Slurm of one node with two places, from Debian's packages; the variables with which its commands find it."""
    missing = [name for name in ("munged", "slurmctld", "slurmd", "sbatch") if shutil.which(name) is None]
    if missing:
        raise RuntimeError(f"there is no {', '.join(missing)}: apt-get install {PACKAGES}")
    folder = pathlib.Path(tempfile.mkdtemp(prefix="nashswarm-slurm-"))
    folder.chmod(0o755)
    host, munge = socket.gethostname().split(".")[0], folder / "munge"
    for part in ("munge", "state", "spool"):
        (folder / part).mkdir()
    key = munge / "key"
    key.write_bytes(secrets.token_bytes(128))
    key.chmod(0o400)
    for path in (munge, key):
        shutil.chown(path, "munge", "munge")
    (folder / "slurm.conf").write_text(f"""ClusterName=nashswarm
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={munge}/socket
SlurmctldPort={free_port()}
SlurmdPort={free_port()}
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
ReturnToService=2
KillWait=5
NodeName={host} NodeAddr=127.0.0.1 CPUs=2 State=UNKNOWN
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP
""")
    environment = {"SLURM_CONF": str(folder / "slurm.conf")}
    files = [f"--{name}={munge}/{name.split('-')[0]}" for name in ("pid-file", "log-file", "seed-file", "socket")]
    munged = ["setpriv", "--reuid=munge", "--regid=munge", "--clear-groups", "munged", "--foreground"]
    commands = [[*munged, f"--key-file={key}", *files], ["slurmctld", "-D"], ["slurmd", "-D", "-N", host]]
    running: list[subprocess.Popen[bytes]] = []
    try:
        for command in commands:
            log = (folder / f"{len(running)}.log").open("wb")
            running.append(subprocess.Popen(command, env={**os.environ, **environment}, stdout=log, stderr=log))
            time.sleep(1)
        state = ["sinfo", "--noheader", "--format", "%t"]
        until(
            lambda: (
                subprocess.run(state, env={**os.environ, **environment}, capture_output=True, text=True).stdout.strip()
                == "idle"
            ),
            f"Slurm, whose logs are in {folder}",
        )
        yield environment
        shutil.rmtree(folder, ignore_errors=True)
    finally:
        for process in reversed(running):
            process.terminate()
        for process in running:
            process.wait(60)


@contextlib.contextmanager
def small_disk(folder: pathlib.Path, size: str) -> Iterator[Callable[[str], None]]:
    """A disk of ``size`` mounted at ``folder``; what comes back gives it another size."""
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "none", str(folder)], check=True)
    try:
        yield lambda larger: subprocess.run(
            ["mount", "-o", f"remount,size={larger}", str(folder)], check=True
        ).check_returncode()
    finally:
        subprocess.run(["umount", str(folder)], check=True)
