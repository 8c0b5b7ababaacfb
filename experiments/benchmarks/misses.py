"""How many cache misses a product with a packed matrix has, beside the same product with floats:

    python -m experiments.benchmarks.misses

One column, lattices at 2, 3 and 4 bits: one matrix at a time, which this machine's caches hold, and the 24 of GPT-2's
MLPs in turn, as the layers of a model take theirs, with this machine's caches and with a laptop's.  Writes a JSON file
and a Markdown table.
"""

import argparse
import datetime
import pathlib
import shutil
import sys
from collections.abc import Sequence
from typing import Any

from nashswarm.kernels.__main__ import example
from nashswarm.progress import show_progress
from nashswarm.records.files import write_report
from nashswarm.records.provenance import provenance, told
from nashswarm.runtime import cache_misses
from nashswarm.runtime.machine import read_machine

SHAPES = ((3072, 768), (768, 3072))
LAYERS = 12
BITS = (2, 3, 4)
GROUP_SIZE = 64
ACTIVATIONS = "int8"
HERE, LAPTOP, LAPTOP_CACHES = "this machine", "Intel Core i7-8550U", (32 << 10, 8 << 20)
FLOATS = "float32"
NONE = 1e-3  # misses for each line of the floats: those of Python around the product


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("results/benchmarks/misses"))
    options = parser.parse_args(arguments)
    origin = provenance(datetime.datetime.now(datetime.UTC))
    try:
        counter, why = cache_misses.choose_counter()
        if not shutil.which("valgrind"):
            raise ValueError("a laptop's caches are simulated, and valgrind is not installed (apt install valgrind)")
        caches = read_machine().caches
        cache_sizes = caches[1], caches[max(caches)]
        sets = [(f"{rows}x{columns}", [(rows, columns)], HERE, cache_sizes, counter) for rows, columns in SHAPES]
        several = f"{LAYERS} of each in turn"
        sets += [(several, [*SHAPES] * LAYERS, HERE, cache_sizes, counter)]
        sets += [(several, [*SHAPES] * LAYERS, LAPTOP, LAPTOP_CACHES, cache_misses.CACHEGRIND)]
        runs = [(*one, bits) for one in sets for bits in (None, *BITS)]
        rows = with_falls([measured(*one) for one in show_progress(runs, "counting")])
    except ValueError as error:
        print(error, file=sys.stderr)
        return 1
    content = {"why": why, "rows": rows, "machine": str(read_machine()), "provenance": origin}
    text = markdown(content)
    write_report(options.out, content, text)
    print(text)
    return 0


def measured(
    name: str,
    shapes: Sequence[tuple[int, int]],
    whose: str,
    caches: tuple[int, int],
    counter: str,
    bits: int | None,
) -> dict[str, Any]:
    """A row: misses of one product, the mean over the matrices.  ``bits``: None for floats."""
    matrices = [example(*shape, (bits or 4,), GROUP_SIZE, True, seed) for seed, shape in enumerate(shapes)]
    counted = cache_misses.count_misses(matrices, ACTIVATIONS if bits else None, *caches, counter)
    size = sum(one.nbytes if bits else 4 * one.rows * one.columns for one in matrices)
    return {
        "matrices": name,
        "count": len(matrices),
        "bytes": size,
        "caches": whose,
        "first_bytes": caches[0],
        "last_bytes": caches[1],
        "counter": counter,
        "form": f"{bits} bits" if bits else FLOATS,
        "reads": counted.reads,
        "first_misses": counted.first,
        "last_misses": counted.last,
    }


def with_falls(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows, those of packed matrices with the part of the floats' misses that they are spared; None where the
    floats have none."""
    plain = {(row["matrices"], row["caches"]): row for row in rows if row["form"] == FLOATS}
    rows_with_falls = []
    for row in rows:
        beside = plain[row["matrices"], row["caches"]]
        least = NONE * beside["bytes"] / beside["count"] / cache_misses.LINE
        falls = {
            f"{level}_fall": 1 - row[f"{level}_misses"] / beside[f"{level}_misses"]
            if beside[f"{level}_misses"] > least
            else None
            for level in ("first", "last")
        }
        rows_with_falls.append(row | (falls if row["form"] != FLOATS else {}))
    return rows_with_falls


def markdown(content: dict[str, Any]) -> str:
    """A table."""
    origin = content["provenance"]
    lines = [
        "# Cache misses of a product with one column",
        "",
        f"{told(origin)}; {content['machine']}. "
        f"{content['why'][0].upper()}{content['why'][1:]}; {LAPTOP}'s are always simulated. Reads of data that miss "
        "the first and the last level, for each product. Nothing is prefetched where caches are simulated: misses tell "
        "how many lines come from beyond a level, not how long a product waits for them.",
        "",
        "| matrices | MB | caches of | first level | last level | counted by | form | first misses | fewer % | "
        "last misses | fewer % |",
        "| :-- | --: | :-- | --: | --: | :-- | :-- | --: | --: | --: | --: |",
        *(
            f"| {row['matrices']} | {row['bytes'] / 1e6:.2f} | {row['caches']} | {row['first_bytes'] >> 10} KiB | "
            f"{row['last_bytes'] / (1 << 20):g} MiB | {row['counter']} | {row['form']} | {row['first_misses']:,.0f} | "
            f"{percent(row, 'first')} | {max(row['last_misses'], 0):,.0f} | {percent(row, 'last')} |"
            for row in content["rows"]
        ),
        "",
    ]
    return "\n".join(lines)


def percent(row: dict[str, Any], level: str) -> str:
    fall = row.get(f"{level}_fall")
    return "" if fall is None else f"{100 * fall:.1f}"


if __name__ == "__main__":
    sys.exit(main())
