"""Print what a sweep did, from its folder.

    python scripts/summary.py results/logs/ablation/2026-01-31_12-00-00

Prints counts, the table of the sweep's records and, for each failed job, the reason and the path of its log.  The exit
status is 1 if a job failed.
"""

import argparse
import pathlib
import sys
from collections.abc import Sequence

from nashswarm.records import record
from nashswarm.reporting import frame, typeset


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=pathlib.Path, help="the folder of a sweep, one subfolder per job")
    folder = parser.parse_args(arguments).folder
    try:
        outcomes = frame.read_outcomes(folder)
        records = [record.read(pathlib.Path(outcome["record"])) for outcome in outcomes if outcome["record"]]
    except (ValueError, OSError) as error:
        print(error, file=sys.stderr)
        return 1
    console = typeset.console()
    console.print(frame.summary(outcomes, records, console.width))
    return int(any(outcome["status"] == "failed" for outcome in outcomes))


if __name__ == "__main__":
    sys.exit(main())
