"""What the framework adds to a run, and what a second process saves a sweep:

    python benchmarks/sweeps.py

A run that compresses nothing and reads two windows, beside the same work by hand; then the quick start's ablation, one
job after the other and in two processes, one thread each, every round with caches of its own.  Nothing else should run
meanwhile.  Writes a JSON file and a Markdown table.
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

from nashswarm.evidence import show_progress
from nashswarm.machine import machine
from nashswarm.provenance import provenance, told
from nashswarm.record import write_report

RUN = [sys.executable, "-m", "experiments.run", "-m", "wandb=disabled"]
NOTHING = ["method=baseline", "dataset.test_windows=2", "dataset.calibration_windows=2"]
BY_HAND = """
import time, torch, nashswarm.run
from nashswarm import data, metrics, models
for _ in range({times}):
    started = time.perf_counter()
    loaded = models.load(models.ModelSource(), "cpu", torch.float32)
    windows = data.windows(data.StdlibDocs().text("test"), loaded.tokenizer, loaded.window_length(None), "test")[:2]
    metrics.evaluate(loaded.model, windows, 8)
    print(time.perf_counter() - started)
"""
SWEEP = "experiment=ablation dataset.test_windows=32"
TOGETHER = ["hydra/launcher=joblib", "hydra.launcher.n_jobs=2"]
WAYS = {"one after the other": [], "two processes": TOGETHER}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("results/benchmarks/sweeps"))
    parser.add_argument("--runs", type=int, default=8, help="that do nothing, after the first")
    parser.add_argument("--rounds", type=int, default=2, help="of the ablation, either way")
    parser.add_argument("--sweep", default=SWEEP, help="what is swept, as one word")
    options = parser.parse_args(arguments)
    origin = provenance(datetime.datetime.now(datetime.UTC))
    found: dict[str, Any] = {"runs": options.runs, "sweep": options.sweep}
    try:
        first, every = (seconds_of(NOTHING, seeds) for seeds in (1, 1 + options.runs))
        by_hand = [float(line) for line in ran([sys.executable, "-c", BY_HAND.format(times=1 + options.runs)]).split()]
        found |= {"first": first, "each": (every - first) / options.runs, "by_hand": statistics.mean(by_hand[1:])}
        rounds = show_progress([*WAYS] * options.rounds, "sweeping")
        spent = [(way, seconds_of([*options.sweep.split(), *WAYS[way]])) for way in rounds]
    except subprocess.CalledProcessError as error:
        print(error.stderr or error.stdout or error, file=sys.stderr)
        return 1
    found["seconds"] = {way: [seconds for own, seconds in spent if own == way] for way in WAYS}
    found |= {"machine": str(machine()), "provenance": origin}
    text = markdown(found)
    write_report(options.out, found, text)
    print(text)
    return 0


def seconds_of(words: Sequence[str], seeds: int = 0) -> float:
    """How long a run takes from an empty folder, or a sweep over so many seeds."""
    with tempfile.TemporaryDirectory() as folder:
        seeded = [f"seed=range({seeds})"] if seeds else []
        started = time.perf_counter()
        ran([*RUN, *words, *seeded, f"records={folder}/records", f"cache={folder}/cache"])
        return time.perf_counter() - started


def ran(command: Sequence[str]) -> str:
    """What a command prints, on one thread."""
    alone = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, check=True, env=alone).stdout


def markdown(found: dict[str, Any]) -> str:
    """A table of both."""
    origin, seconds = found["provenance"], found["seconds"]
    alone, together = (statistics.mean(seconds[way]) for way in WAYS)
    ratios = [one / other for one, other in zip(*seconds.values(), strict=True)]
    return "\n".join(
        [
            "# What the framework adds, and what a second process saves",
            "",
            f"{told(origin)}; {found['machine']}; one thread a process.",
            "",
            "|  | seconds |",
            "| :-- | --: |",
            f"| the first run of a process, which compresses nothing, all imports included | {found['first']:.1f} |",
            f"| each of {found['runs']} more in it | {found['each']:.2f} |",
            f"| the same work by hand: load the model, make and read two windows | {found['by_hand']:.2f} |",
            f"| what the framework adds to a run | {found['each'] - found['by_hand']:.2f} |",
            f"| `{found['sweep']}`, one job after the other | {alone:.1f} |",
            f"| the same, two processes | {together:.1f} |",
            f"| times faster, over {len(ratios)} rounds in turn | {alone / together:.2f} "
            f"({min(ratios):.2f} to {max(ratios):.2f}) |",
            "",
        ]
    )


if __name__ == "__main__":
    sys.exit(main())
