"""Draw figures from records.

    python scripts/figures.py --experiment ablation --paper paper/generated

Writes ``<experiment>_pareto``, ``_resident``, ``_perplexity``, ``_accuracy``, ``_ablation``, ``_convergence``,
``_settling``, ``_bits``, ``_decisions``, ``_sensitivity``, ``_speed``, ``_memory``, ``_latency``, ``_crowding`` and
``_routing`` as PDF and PNG where the records have the values that a figure shows, and prints the reason for each one
left out.  Without ``--experiment`` it also writes ``flock``, a still and an animation from
``experiments.benchmarks.flock_dynamics``, and ``roofline`` from ``experiments.benchmarks.kernels``.  Git keeps the
figures that a document or the paper shows.
"""

import argparse
import json
import pathlib
import sys
from collections.abc import Callable, Sequence

import matplotlib.style
import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from rich.console import Console

from nashswarm.records import record
from nashswarm.reporting import frame, tables
from nashswarm.reporting.distinction import distinguish
from nashswarm.reporting.figures import flock, games, moe, quality, speed, style
from nashswarm.reporting.labels import rank


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--records", type=pathlib.Path, default=pathlib.Path("results/records"))
    parser.add_argument("--experiment", help="default: every experiment that has records")
    parser.add_argument("--model", help="only this model")
    parser.add_argument("--dataset", help="only this dataset")
    parser.add_argument("--measure", help="only this measure")
    parser.add_argument("--layer", help="layer of the bit map; default: the one that varies most")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("results/figures"))
    parser.add_argument("--paper", type=pathlib.Path, help="also write the PDFs here")
    parser.add_argument("--flock", type=pathlib.Path, default=pathlib.Path("results/benchmarks/flock_dynamics.json"))
    parser.add_argument("--kernels", type=pathlib.Path, default=pathlib.Path("results/benchmarks/kernels.json"))
    options = parser.parse_args(arguments)
    folders = [options.out, *([options.paper] if options.paper else [])]
    try:
        with matplotlib.style.context(style.STYLE):
            write_experiments(options, folders)
            if not options.experiment:
                write_benchmarks(options, folders)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


def write_experiments(options: argparse.Namespace, folders: Sequence[pathlib.Path]) -> None:
    """Write the figures of the chosen experiments.  Raises ValueError if there is nothing to draw."""
    chosen = {name: getattr(options, name) for name in ("experiment", "model", "dataset", "measure")}
    records = distinguish(record.read_all(options.records))
    table = frame.select(frame.frame(records), **{name: value for name, value in chosen.items() if value})
    if options.paper:
        frame.refuse_dirty(table)
    whole = not any(chosen.values()) and options.layer is None
    console = Console()
    for experiment in sorted(set(table["experiment"])):
        rows = frame.select(table, experiment=experiment)
        shown = set(rows["fingerprint"])
        runs = [one for one in records if one.labels["experiment"] == experiment and one.fingerprint in shown]
        for name, draw in drawings(frame.points(rows), runs, options.layer).items():
            stems = [folder / f"{experiment}_{name}" for folder in folders]
            try:
                figure = draw()
            except ValueError as reason:
                console.print(f"no {experiment}_{name}: {reason}", markup=False, highlight=False)
                for stem in stems if whole else ():  # a figure of records that are gone
                    for suffix in style.SUFFIXES:
                        stem.with_name(stem.name + suffix).unlink(missing_ok=True)
                continue
            for stem in stems:
                for path in style.save(figure, stem):
                    console.print(str(path), markup=False, highlight=False)


def write_benchmarks(options: argparse.Namespace, folders: Sequence[pathlib.Path]) -> None:
    """Write the flock and the roofline where their benchmarks have a report."""
    if options.flock.exists():
        dynamics = json.loads(options.flock.read_text())
        for folder in folders:
            style.save(flock.still(dynamics), folder / "flock")
        flock.animate(dynamics, options.out / "flock.gif")
    if options.kernels.exists():
        products = pd.DataFrame(json.loads(options.kernels.read_text())["rows"])
        for folder in folders:
            style.save(speed.roofline(products), folder / "roofline")


def drawings(points: pd.DataFrame, runs: list[record.Record], layer: str | None) -> dict[str, Callable[[], Figure]]:
    """Return the figures of an experiment by name, as functions that draw them."""
    tiled = [run for run in runs if any(np.ptp(grid) for grid in games.tiles(run.allocation).values())]
    tiled.sort(key=lambda run: (rank(run.labels["method"])[0], run.labels["seed"]))
    return {
        "pareto": lambda: quality.pareto(points),
        "resident": lambda: quality.pareto(points, size="bytes_resident"),
        "perplexity": lambda: quality.pareto(points, "perplexity"),
        "accuracy": lambda: quality.accuracy(points),
        "ablation": lambda: quality.ablation(runs),
        "convergence": lambda: games.convergence(runs),
        "settling": lambda: games.settling(runs),
        "bits": lambda: games.bit_map(tiled[-1].allocation if tiled else "", layer),
        "decisions": lambda: games.decisions(runs),
        "sensitivity": lambda: quality.sensitivity(tables.layers(runs)),
        "speed": lambda: speed.speed(tables.speed(runs)),
        "memory": lambda: speed.memory(tables.speed(runs)),
        "latency": lambda: speed.latency(tables.serving(runs)),
        "crowding": lambda: moe.crowding(runs),
        "routing": lambda: moe.routing(runs),
    }


if __name__ == "__main__":
    sys.exit(main())
