"""Tables, and the numbers of the paper's prose, from records.

    python scripts/tables.py --paper paper/generated

Prints each experiment's table and writes it as Markdown, CSV and LaTeX; where matrices were measured one by one or
contestants timed, a second one, ``<experiment>_layers`` or ``_contestants``; of all experiments together,
``equal_bytes``; ``scripts/audit.py`` makes those of the audit.  With ``--paper`` tables that fit its columns and
``numbers.tex`` (one macro per number, of the chosen records and, where none were chosen, of the benchmarks) go there
too; runs from uncommitted or unknown code are refused then.  Of all records together, tables that these no longer
show are removed.
"""

import argparse
import pathlib
import sys
from collections.abc import Collection, Sequence

import pandas as pd

from nashswarm.records import files, record
from nashswarm.reporting import frame, paper, tables, typeset

FORMATS = {".md": typeset.markdown, ".csv": typeset.csv, ".tex": typeset.latex}
BUDGETS = ("2", "3", "4")  # bits of the paper's main table


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--records", type=pathlib.Path, default=pathlib.Path("results/records"))
    parser.add_argument("--experiment", help="default: every experiment that has records")
    parser.add_argument("--model", help="only this model")
    parser.add_argument("--dataset", help="only this dataset")
    parser.add_argument("--measure", help="only this measure")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("results/tables"))
    parser.add_argument("--paper", type=pathlib.Path, help="also write the paper's tables and numbers.tex here")
    parser.add_argument("--benchmarks", type=pathlib.Path, default=pathlib.Path("results/benchmarks"))
    options = parser.parse_args(arguments)
    try:
        write_tables(options)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


def write_tables(options: argparse.Namespace) -> None:
    """Write what the options ask for.  Raises ValueError where there is nothing to write."""
    names = ("experiment", "model", "dataset", "measure")
    chosen = {name: getattr(options, name) for name in names if getattr(options, name)}
    records = list(record.read_all(options.records))
    table = frame.select(frame.frame(records), **chosen)
    records = [one for one in records if all(one.labels[name] == value for name, value in chosen.items())]
    if options.paper:
        frame.refuse_dirty(table)
    written: set[str] = set()

    def write(name: str, table: pd.DataFrame, columns: Sequence[typeset.Column] = typeset.COLUMNS) -> None:
        """Print a table and write it in every format; one without rows is no table."""
        if len(table):
            written.add(name)
            typeset.console().print(typeset.terminal(table, name, columns))
            for suffix, render in FORMATS.items():
                files.write_whole(options.out / f"{name}{suffix}", render(table, columns).encode())

    for experiment in sorted(set(table["experiment"]) - {"audit"}):
        rows = frame.select(table, experiment=experiment)
        own = [one for one in records if one.labels["experiment"] == experiment]
        if another := tables.unlike(own):
            write(experiment, *another)
            own_columns = paper.ROUTERS if another[1] is tables.ROUTERS else another[1]
            for_paper(options.paper, experiment, typeset.latex(another[0], own_columns))
            continue
        means = frame.tested(frame.average(rows.dropna(axis=1, how="all")), own)  # without what others alone have
        write(experiment, means)
        for_paper(options.paper, experiment, typeset.latex(means, paper.COLUMNS))
        if means["method"].str.fullmatch(paper.BUDGET).all():
            for_paper(options.paper, f"{experiment}_budgets", paper.budgets(means, BUDGETS))
        seconds = {"contestants": (tables.speed(own), tables.SPEED), "layers": (tables.layers(own), tables.LAYERS)}
        for name, (second, columns) in seconds.items():
            write(f"{experiment}_{name}", second, columns)
            if len(second):
                for_paper(options.paper, f"{experiment}_{name}", typeset.latex(second, columns))
    if not options.experiment:
        write("equal_bytes", tables.equal_bytes(records), tables.EQUAL_BYTES)
    if not chosen:
        remove_stale(options.out, written)
    if options.paper:
        benchmarks = {} if chosen else paper.of_benchmarks(options.benchmarks)
        for_paper(options.paper, "numbers", paper.commands(paper.of_records(records) | benchmarks))


def for_paper(folder: pathlib.Path | None, name: str, content: str) -> None:
    """Write a file of the paper, if one is asked for."""
    if folder is not None:
        files.write_whole(folder / f"{name}.tex", content.encode())


def remove_stale(folder: pathlib.Path, written: Collection[str]) -> None:
    """Remove the tables that other records had: what stands there in every format and was not written now."""
    for stem in {path.stem for path in folder.glob("*.csv")} - set(written):
        paths = [folder / f"{stem}{suffix}" for suffix in FORMATS]
        if all(path.exists() for path in paths):
            for path in paths:
                path.unlink()


if __name__ == "__main__":
    sys.exit(main())
