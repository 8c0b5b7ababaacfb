"""Figures from records.

    python scripts/figures.py --experiment ablation --paper paper/generated

Writes ``<experiment>_pareto``, ``_perplexity``, ``_accuracy``, ``_ablation``, ``_convergence``, ``_settling``,
``_bits``, ``_decisions``, ``_sensitivity``, ``_speed``, ``_memory``, ``_latency``, ``_crowding`` and ``_routing`` as
PDF and PNG, each where the records carry what it shows, and says which it left out and why.  Of all experiments
together also ``flock``, a still and an animation of what ``experiments.benchmarks.flock_dynamics`` saw, and
``roofline``, of the products that ``experiments.benchmarks.kernels`` timed.
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
from nashswarm.reporting import charts, curves, flock_figure, frame, tables

STYLE = pathlib.Path(__file__).parents[1] / "paper" / "style.mplstyle"


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
    parser.add_argument("--dance", type=pathlib.Path, default=pathlib.Path("results/benchmarks/flock_dynamics.json"))
    parser.add_argument("--kernels", type=pathlib.Path, default=pathlib.Path("results/benchmarks/kernels.json"))
    options = parser.parse_args(arguments)
    try:
        with matplotlib.style.context(STYLE):
            write_figures(options)
            if not options.experiment and options.dance.exists():
                write_flock(options)
            if not options.experiment and options.kernels.exists():
                products = pd.DataFrame(json.loads(options.kernels.read_text())["rows"])
                for folder in filter(None, (options.out, options.paper)):
                    curves.save(charts.roofline(products), folder / "roofline")
    except ValueError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


def write_figures(options: argparse.Namespace) -> None:
    """Write what the options ask for.  Raises ValueError where there is nothing to draw."""
    chosen = {name: getattr(options, name) for name in ("experiment", "model", "dataset", "measure")}
    records = list(record.read_all(options.records))
    table = frame.select(frame.frame(records), **{name: value for name, value in chosen.items() if value})
    if options.paper:
        frame.refuse_dirty(table)
    whole = not any(chosen.values()) and options.layer is None
    console = Console()
    for experiment in sorted(set(table["experiment"])):
        rows = frame.select(table, experiment=experiment)
        own = [run for run in records if run.labels["experiment"] == experiment]
        runs = [run for run in own if run.fingerprint in set(rows["fingerprint"])]
        for name, draw in drawings(frame.points(rows), runs, options.layer).items():
            stems = [folder / f"{experiment}_{name}" for folder in filter(None, (options.out, options.paper))]
            try:
                figure = draw()
            except ValueError as reason:
                console.print(f"no {experiment}_{name}: {reason}", markup=False, highlight=False)
                for stem in stems if whole else ():  # one that other records had
                    for suffix in curves.SUFFIXES:
                        stem.with_name(stem.name + suffix).unlink(missing_ok=True)
                continue
            for stem in stems:
                for path in curves.save(figure, stem):
                    console.print(str(path), markup=False, highlight=False)


def write_flock(options: argparse.Namespace) -> None:
    """Write the still of the flock where figures go, and its animation beside the figures that are shown on a page."""
    dance = json.loads(options.dance.read_text())
    for folder in filter(None, (options.out, options.paper)):
        curves.save(flock_figure.still(dance), folder / "flock")
    flock_figure.animate(dance, options.out / "flock.gif")


def drawings(points: pd.DataFrame, runs: list[record.Record], layer: str | None) -> dict[str, Callable[[], Figure]]:
    """The figures of an experiment by name, each to be drawn when called."""
    tiled = [run for run in runs if any(np.ptp(grid) for grid in curves.tiles(run.allocation).values())]
    tiled.sort(key=lambda run: (frame.rank(run.labels["method"])[0], run.labels["seed"]))
    return {
        "pareto": lambda: curves.pareto(points),
        "perplexity": lambda: curves.pareto(points, "perplexity"),
        "accuracy": lambda: charts.accuracy(points),
        "ablation": lambda: curves.ablation(runs),
        "convergence": lambda: curves.convergence(runs),
        "settling": lambda: charts.settling(runs),
        "bits": lambda: curves.bit_map(tiled[-1].allocation if tiled else "", layer),
        "decisions": lambda: charts.decisions(runs),
        "sensitivity": lambda: charts.sensitivity(tables.layers(runs)),
        "speed": lambda: charts.speed(tables.speed(runs)),
        "memory": lambda: charts.memory(tables.speed(runs)),
        "latency": lambda: charts.latency(tables.serving(runs)),
        "crowding": lambda: charts.crowding(runs),
        "routing": lambda: charts.routing(runs),
    }


if __name__ == "__main__":
    sys.exit(main())
