"""Write one self-contained HTML page per experiment, from records.

    python scripts/page.py --experiment ablation

``<experiment>.html`` has a table that sorts, quality against size, convergence, the bits of every layer, and the
provenance of each record.
"""

import argparse
import pathlib
import sys
from collections.abc import Sequence

import matplotlib.style

from nashswarm.records import files, record
from nashswarm.reporting.distinction import distinguish
from nashswarm.reporting.figures.style import STYLE
from nashswarm.reporting.page import page


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--records", type=pathlib.Path, default=pathlib.Path("results/records"))
    parser.add_argument("--experiment", help="default: every experiment that has records")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("results/pages"))
    options = parser.parse_args(arguments)
    try:
        records = distinguish(record.read_all(options.records))
        present = sorted({one.labels["experiment"] for one in records})
        if not present or options.experiment not in (None, *present):
            raise ValueError(f"{options.records} has no record of {options.experiment or 'any experiment'}")
        for experiment in [options.experiment] if options.experiment else present:
            with matplotlib.style.context(STYLE):
                content = page([one for one in records if one.labels["experiment"] == experiment])
            path = options.out / f"{experiment}.html"
            files.write_whole(path, content.encode())
            print(path)
    except (ValueError, OSError) as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
