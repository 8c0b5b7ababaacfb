"""What the framework adds to a run, and what a second process saves a sweep:

    python -m experiments.benchmarks.sweeps

A run that compresses nothing, with and without the mirror in Weights & Biases, beside the same work by hand; then the
quick start's ablation, one job after the other and in two processes.  Every process has one thread and every run that
compresses nothing a cache of its own, so that each computes what the full model says, as by hand; a sweep begins with
an empty cache, which its jobs share.  One run is discarded first, and from round to round the order turns.  Nothing
else should run meanwhile.  Writes a JSON file and a Markdown table.
"""

import argparse
import datetime
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from typing import Any

import torch

from nashswarm.data import corpus
from nashswarm.models import evaluation, sources
from nashswarm.progress import show_progress
from nashswarm.records import files, record
from nashswarm.records.provenance import provenance, told
from nashswarm.runtime.machine import read_machine

RUN = [sys.executable, "-m", "experiments.run", "-m"]
NOTHING = [
    "method=baseline",
    "dataset.test_windows=2",
    "dataset.calibration_windows=2",
    "cache={folder}/cache/${seed}",
]
MIRRORS = ("disabled", "offline")
BY_HAND = "from experiments.benchmarks.sweeps import run_by_hand; run_by_hand({times})"
SWEEP = "experiment=ablation dataset.test_windows=32"
SHARED = ["wandb=disabled", "cache={folder}/cache"]
WAYS = {"one after the other": [], "two processes": ["hydra/launcher=joblib", "hydra.launcher.n_jobs=2"]}
MOST_SECONDS, LEAST_RATIO = 2.0, 1.6  # the goals: what is added to a run, and how much faster two processes are


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("results/benchmarks/sweeps"))
    parser.add_argument("--runs", type=int, default=5, help="that do nothing, after the first")
    parser.add_argument("--times", type=int, default=3, help="that they are done")
    parser.add_argument("--rounds", type=int, default=2, help="of the ablation, either way")
    parser.add_argument("--sweep", default=SWEEP, help="what is swept, as one word")
    options = parser.parse_args(arguments)
    origin = provenance(datetime.datetime.now(datetime.UTC))
    content: dict[str, Any] = {"runs": options.runs, "sweep": options.sweep}
    try:
        seconds_of([*NOTHING, "wandb=offline", "seed=range(1)"])
        nothing = [idle(options.runs, (-1) ** number) for number in show_progress(range(options.times), "idling")]
        swept = [sweep(options.sweep, (-1) ** number) for number in show_progress(range(options.rounds), "sweeping")]
    except (subprocess.CalledProcessError, ValueError) as error:
        print(getattr(error, "stderr", "") or getattr(error, "stdout", "") or error, file=sys.stderr)
        return 1
    content["idle"] = {name: [one[name] for one in nothing] for name in nothing[0]}
    content["seconds"] = {way: [one[way] for one in swept] for way in WAYS}
    content |= {"machine": str(read_machine()), "provenance": origin}
    text = markdown(content)
    files.write_report(options.out, content, text)
    print(text)
    return 0


def idle(runs: int, order: int) -> dict[str, float]:
    """Seconds of the first run of a process that compresses nothing and of each of so many more, with every mirror,
    and of the same work by hand; ``order``: 1, or -1 for the other way round."""
    seconds: dict[str, float] = {}
    for mirror in (*MIRRORS, "")[::order]:
        if mirror:
            seeds = {count: f"seed=range({count})" for count in (1, 1 + runs)[::order]}
            spent = {count: seconds_of([*NOTHING, f"wandb={mirror}", words]) for count, words in seeds.items()}
            seconds |= {f"first, {mirror}": spent[1], f"each, {mirror}": (spent[1 + runs] - spent[1]) / runs}
        else:
            lines = ran([sys.executable, "-c", BY_HAND.format(times=1 + runs)]).split()
            seconds["by hand"] = statistics.mean(map(float, lines[1:]))
    return seconds


def run_by_hand(times: int) -> None:
    """Do the work of a run without the framework, ``times`` times, and print the seconds of each."""
    for _ in range(times):
        started = time.perf_counter()
        loaded = sources.load(sources.ModelSource(), "cpu", torch.float32)
        length = loaded.window_length(None)
        windows = corpus.cut_windows(corpus.StdlibDocs().text("test"), loaded.tokenizer, length, "test")[:2]
        evaluation.evaluate(loaded.model, windows, 8, evaluation.compute_reference(loaded.model, windows, 8))
        print(time.perf_counter() - started)


def sweep(words: str, order: int) -> dict[str, float]:
    """Seconds of the sweep ``words``, either way; ``order`` as that of ``idle``."""
    return {way: seconds_of([*words.split(), *SHARED, *WAYS[way]]) for way in [*WAYS][::order]}


def seconds_of(words: Sequence[str]) -> float:
    """How long a sweep takes from an empty folder, which ``{folder}`` in its words names.

    Raises ValueError if a job of it had another number of threads than one.
    """
    with tempfile.TemporaryDirectory() as folder:
        overrides = [word.replace("{folder}", folder) for word in words]
        started = time.perf_counter()
        ran([*RUN, *overrides, f"records={folder}/records", f"hydra.sweep.dir={folder}/logs"])
        spent = time.perf_counter() - started
        threads = {one.config["threads"] for one in record.read_all(pathlib.Path(folder, "records"))}
    if threads != {1}:
        raise ValueError(f"{' '.join(words)}: its jobs should have one thread each, and had {sorted(threads)}")
    return spent


def ran(command: Sequence[str]) -> str:
    """What a command prints, on one thread."""
    alone = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, check=True, env=alone).stdout


def markdown(content: dict[str, Any]) -> str:
    """A table of both: medians, with the least and the most of the rounds, and what was to be reached."""
    origin, spent, seconds = content["provenance"], content["idle"], content["seconds"]
    added = {
        mirror: [framework - hand for framework, hand in zip(spent[f"each, {mirror}"], spent["by hand"], strict=True)]
        for mirror in MIRRORS
    }
    ratios = [one / other for one, other in zip(*seconds.values(), strict=True)]
    alone, together = seconds.values()
    lines = [
        *(
            (
                f"the first run of a process, which compresses nothing, imports included, {name}",
                spent[f"first, {mirror}"],
            )
            for mirror, name in _mirrored()
        ),
        *((f"each of {content['runs']} more in it, {name}", spent[f"each, {mirror}"]) for mirror, name in _mirrored()),
        ("the same work by hand: load the model, make two windows, read them twice", spent["by hand"]),
    ]
    goal = f"at most {MOST_SECONDS:.1f}"
    rows = [f"| {name} | {_range(values)} |  |" for name, values in lines]
    rows += [
        f"| what the framework adds to a run, {name} | {_range(added[mirror])} | {goal} |"
        for mirror, name in _mirrored()
    ]
    rows += [
        f"| `{content['sweep']}`, one job after the other | {_range(alone, 1)} |  |",
        f"| the same, two processes | {_range(together, 1)} |  |",
        f"| times faster | {_range(ratios)} | at least {LEAST_RATIO:.1f} |",
    ]
    head = [
        "# What the framework adds, and what a second process saves",
        "",
        f"{told(origin)}; {content['machine']}; one thread a process; seconds, medians of "
        f"{len(spent['by hand'])} rounds ({len(ratios)} of the sweep) with the least and the most.",
        "",
        "|  | seconds | goal |",
        "| :-- | --: | --: |",
    ]
    return "\n".join([*head, *rows, ""])


def _mirrored() -> list[tuple[str, str]]:
    return [(mirror, f"`wandb={mirror}`") for mirror in MIRRORS]


def _range(values: Sequence[float], places: int = 2) -> str:
    """
    >>> _range([1.0, 3.0, 1.5])
    '1.50 (1.00 to 3.00)'
    """
    return f"{statistics.median(values):.{places}f} ({min(values):.{places}f} to {max(values):.{places}f})"


if __name__ == "__main__":
    sys.exit(main())
