"""Write tables, and the numbers of the paper's prose, from records.

    python scripts/tables.py --paper paper/generated

Prints each experiment's table and writes it as Markdown, CSV and LaTeX.  An experiment that measured matrices one by
one or timed contestants has a second table, ``<experiment>_layers`` or ``_contestants``.  Without ``--experiment`` it
also writes ``equal_bytes``; without any choice it removes tables that the records no longer have.
``scripts/audit.py`` writes those of the audit.

With ``--paper``, tables that fit the paper's columns and ``numbers.tex`` go there: one macro for every number of the
chosen records and, if none were chosen, of the benchmarks.  Runs from uncommitted or unknown code are refused then.
"""

import argparse
import pathlib
import sys
from collections.abc import Collection, Sequence

import pandas as pd

from nashswarm.records import files, record
from nashswarm.reporting import frame, latex, tables, typeset
from nashswarm.reporting.distinction import distinguish
from nashswarm.reporting.paper import benchmarks, macros
from nashswarm.reporting.paper import tables as paper_tables

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
    """Write the tables that the options choose.  Raises ValueError if there is nothing to write."""
    names = ("experiment", "model", "dataset", "measure")
    chosen = {name: getattr(options, name) for name in names if getattr(options, name)}
    records = distinguish(record.read_all(options.records))
    table = frame.select(frame.frame(records), **chosen)
    records = [one for one in records if all(one.labels[name] == value for name, value in chosen.items())]
    if options.paper:
        frame.refuse_dirty(table)
    written: set[str] = set()

    def write(name: str, table: pd.DataFrame, columns: Sequence[typeset.Column] = typeset.COLUMNS) -> None:
        """Print a table and write it in every format, unless it has no rows."""
        if len(table):
            written.add(name)
            console = typeset.console()
            console.print(typeset.terminal(table, name, columns, console.width))
            for suffix, render in FORMATS.items():
                files.write_whole(options.out / f"{name}{suffix}", render(table, columns).encode())

    for experiment in sorted(set(table["experiment"]) - {"audit"}):
        rows = frame.select(table, experiment=experiment)
        runs = [one for one in records if one.labels["experiment"] == experiment]
        if special := tables.special_table(runs):
            write(experiment, *special)
            paper_columns = paper_tables.ROUTERS if special[1] is tables.ROUTERS else special[1]
            for_paper(options.paper, experiment, typeset.latex(special[0], paper_columns))
            continue
        means = frame.tested(
            frame.average(rows.dropna(axis=1, how="all")), runs
        )  # without columns of other experiments
        write(experiment, means)
        for_paper(options.paper, experiment, typeset.latex(means, paper_tables.COLUMNS))
        if means["method"].str.fullmatch(paper_tables.BUDGET).all():
            for_paper(options.paper, f"{experiment}_budgets", paper_tables.budgets(means, BUDGETS))
        second = {"contestants": (tables.speed(runs), tables.SPEED), "layers": (tables.layers(runs), tables.LAYERS)}
        for name, (rows, columns) in second.items():
            write(f"{experiment}_{name}", rows, columns)
            if len(rows):
                for_paper(options.paper, f"{experiment}_{name}", typeset.latex(rows, columns))
    if not options.experiment:
        write("equal_bytes", tables.equal_bytes(records), tables.EQUAL_BYTES)
    if not chosen:
        remove_stale(options.out, written)
    if options.paper:
        reports = {} if chosen else benchmarks.of_benchmarks(options.benchmarks)
        for_paper(options.paper, "numbers", latex.commands(macros.of_records(records) | reports))


def for_paper(folder: pathlib.Path | None, name: str, content: str) -> None:
    """Write a file of the paper, if ``--paper`` names its folder."""
    if folder is not None:
        files.write_whole(folder / f"{name}.tex", content.encode())


def remove_stale(folder: pathlib.Path, written: Collection[str]) -> None:
    """Remove the tables of records that are gone: those in every format that were not written now."""
    for stem in {path.stem for path in folder.glob("*.csv")} - set(written):
        paths = [folder / f"{stem}{suffix}" for suffix in FORMATS]
        if all(path.exists() for path in paths):
            for path in paths:
                path.unlink()


if __name__ == "__main__":
    sys.exit(main())
