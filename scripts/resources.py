"""Write what compression takes, and what the experiments took, as two Markdown tables.

    python scripts/resources.py

``resources.md`` has minutes and memory of records that measured them, and bytes and memory by shape for every model;
``experiments.md`` has the runs, minutes, threads and commits of every experiment.
"""

import argparse
import pathlib
import sys
from collections.abc import Sequence

from nashswarm.records import record
from nashswarm.records.files import write_whole
from nashswarm.reporting import resources, typeset


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--records", type=pathlib.Path, default=pathlib.Path("results/records"))
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("results/tables"))
    options = parser.parse_args(arguments)
    try:
        records = list(record.read_all(options.records))
        texts = {"resources": resources.markdown(records), "experiments": resources.experiments(records)}
    except ValueError as error:
        print(error, file=sys.stderr)
        return 1
    for name, text in texts.items():
        write_whole(options.out / f"{name}.md", text.encode())
        typeset.console().print(text, markup=False, highlight=False)
    return 0


if __name__ == "__main__":
    sys.exit(main())
