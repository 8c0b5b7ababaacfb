"""Compare experiments that were run again with their committed records.

    python -m experiments.run experiment=bit_budget records=results/reproduced/records
    python scripts/reproduced.py

Two records are of one run if their configs agree in everything but the number of threads, which changes sums in their
last bits.  Writes a JSON file and a Markdown table.  The exit status is 1 if a metric other than a time lies outside
its committed interval, or if a run without intervals is not the same to the last bit.
"""

import argparse
import dataclasses
import datetime
import pathlib
import sys
from collections.abc import Sequence

from nashswarm.records import files
from nashswarm.records.provenance import provenance
from nashswarm.reporting import typeset
from nashswarm.reporting.reproduction import compared, markdown, pairs
from nashswarm.runtime.machine import read_machine


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--records", type=pathlib.Path, default=pathlib.Path("results/records"))
    parser.add_argument("--reproduced", type=pathlib.Path, default=pathlib.Path("results/reproduced/records"))
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("results/benchmarks/reproduced"))
    options = parser.parse_args(arguments)
    origin = provenance(datetime.datetime.now(datetime.UTC))
    try:
        comparisons = [compared(*pair) for pair in pairs(options.records, options.reproduced)]
    except ValueError as error:
        print(error, file=sys.stderr)
        return 1
    text = markdown(comparisons)
    runs = [dataclasses.asdict(one) for one in comparisons]
    files.write_report(options.out, {"runs": runs, "machine": str(read_machine()), "provenance": origin}, text)
    typeset.console().print(text, markup=False, highlight=False)
    return int(any(one.failing for one in comparisons))


if __name__ == "__main__":
    sys.exit(main())
