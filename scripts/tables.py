"""Tables, and the numbers of the paper's prose, from records.

    python scripts/tables.py --experiment ablation --paper paper/generated

Prints each experiment's table and writes it as Markdown, CSV and LaTeX; ``scripts/audit.py`` does so for the audit.
With ``--paper`` the LaTeX table and ``numbers.tex`` (one macro per number) go there too; runs from uncommitted code are
refused then.
"""

import argparse
import pathlib
import sys
from collections.abc import Sequence

from nashswarm import record, report


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--records", type=pathlib.Path, default=pathlib.Path("results/records"))
    parser.add_argument("--experiment", help="default: every experiment that has records")
    parser.add_argument("--model", help="only this model")
    parser.add_argument("--dataset", help="only this dataset")
    parser.add_argument("--measure", help="only this measure")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("results/tables"))
    parser.add_argument("--paper", type=pathlib.Path, help="also write the paper's table and numbers.tex here")
    options = parser.parse_args(arguments)
    if options.paper and not options.experiment:
        parser.error("--paper needs --experiment: numbers.tex holds the numbers of one experiment")
    try:
        write_tables(options)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


def write_tables(options: argparse.Namespace) -> None:
    """Write what the options ask for.  Raises ValueError where there is nothing to write."""
    chosen = {name: getattr(options, name) for name in ("experiment", "model", "dataset", "measure")}
    table = report.select(
        report.frame(record.read_all(options.records)), **{name: value for name, value in chosen.items() if value}
    )
    if options.paper:
        report.refuse_dirty(table)
    for experiment in sorted(set(table["experiment"]) - {"audit"}):
        rows = report.select(table, experiment=experiment)
        means = report.average(rows.dropna(axis=1, how="all"))  # columns that only other experiments have
        report.console().print(report.terminal(means, title=experiment))
        for suffix, render in ((".md", report.markdown), (".csv", report.csv), (".tex", report.latex)):
            record.write_whole(options.out / f"{experiment}{suffix}", render(means).encode())
        if options.paper:
            record.write_whole(options.paper / f"{experiment}.tex", report.latex(means).encode())
            record.write_whole(options.paper / "numbers.tex", report.macros(means).encode())


if __name__ == "__main__":
    sys.exit(main())
