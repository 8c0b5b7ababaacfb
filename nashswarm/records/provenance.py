"""Provenance of a record: code, versions, machine and start time."""

import contextlib
import datetime
import functools
import hashlib
import importlib.metadata
import os
import pathlib
import platform
import re
import subprocess
from collections.abc import Iterator, Mapping
from typing import Any

import torch

EXTRAS = ("peers", "torchao", "eval")  # of this package: numbers can depend on what they install
PROGRAM = ("nashswarm", "experiments", "hydra_plugins")  # folders of modules that a run imports, tracked or not
PACKAGES = ("nashswarm", "torch", "transformers", "datasets", "numpy", "scipy", "scikit-learn", "safetensors")


def provenance(started: datetime.datetime) -> dict[str, Any]:
    """Return commit, versions, machine and start time of a run that began at ``started``."""
    commit, dirty = code()
    cores = f"{os.cpu_count()} cores, {torch.backends.cpu.get_cpu_capability()}"
    return {
        "commit": commit,
        "dirty": dirty,
        "python": platform.python_version(),
        "versions": dict(_versions()),
        "machine": f"{platform.system()} {platform.machine()}, {cores}",
        "started": started.isoformat(timespec="seconds"),
    }


@functools.cache
def code() -> tuple[str | None, bool | None]:
    """Return the commit that this process imported its code from, and whether it had changes.

    Both are None outside a repository.  The answer is cached, because a process keeps its modules whatever is committed
    while it runs.  Call it before slow work.
    """
    here = pathlib.Path(__file__)
    root = here.parents[2]

    def git(*words: str) -> str | None:
        with contextlib.suppress(OSError, subprocess.CalledProcessError):
            return subprocess.run(
                ["git", "-C", str(root), *words], capture_output=True, text=True, check=True
            ).stdout.strip()
        return None

    ours = git("ls-files", "--error-unmatch", "--", str(here.relative_to(root))) is not None  # not one around it
    changes = untracked = None
    if ours:
        changes = git("status", "--porcelain", "--untracked-files=no", "--", ".", ":!results")
        untracked = git("ls-files", "--others", "--", *(f"{folder}/*.py" for folder in PROGRAM))
    return git("rev-parse", "HEAD") if ours else None, None if changes is None else bool(changes or untracked)


def told(origin: Mapping[str, Any]) -> str:
    """Return the commit of a provenance in words.

    >>> told({"commit": "00a838f", "dirty": True})
    'Commit 00a838f with changes'
    """
    return f"Commit {origin['commit']}{' with changes' if origin['dirty'] else ''}"


def _versions() -> Iterator[tuple[str, str]]:
    """Yield name and version of every installed package that numbers can depend on."""
    optional: set[str] = set()
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        for line in importlib.metadata.requires("nashswarm") or ():
            name, extra = re.match(r"[\w.-]+", line), re.search(r"extra == ['\"]([\w-]+)", line)
            if name and extra and extra[1] in EXTRAS:
                optional.add(name[0])
    for package in (*PACKAGES, *sorted(optional)):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            yield package, importlib.metadata.version(package)


@functools.cache
def code_digest() -> str:
    """Return the sha256 over the sources of this package, so that a cache of other code is not read as this code's."""
    digest = hashlib.sha256()
    folder = pathlib.Path(__file__).parents[1]
    for path in sorted(folder.rglob("*.py")):
        digest.update(path.relative_to(folder).as_posix().encode() + path.read_bytes())
    return digest.hexdigest()
