"""What the swarm does, role by role, against its controls.

    python -m experiments.benchmarks.flock

Every role is played alone, the rest of the method at its plainest (one price, one pass, no offsets), so that nothing
else can hide what it does; seeds draw the calibration windows.  ``shrink``: sensitivities denoised by the flock when
calibration is tiny, against no shrinkage, a shuffled flock, random and index neighbours, and other flock sizes.
``local_reply``: a column minds only its most correlated columns, against full replies.  ``align``: neighbouring tiles
want equal widths, against none and against index neighbours, in the fixed-width game.  A role is said to help only
where the 95 % interval of the paired difference in KL to its control, over seeds and windows, excludes 0.
"""

import argparse
import datetime
import itertools
import pathlib
from collections.abc import Sequence

import numpy as np

from experiments.config import compose
from nashswarm.experiment.run import run
from nashswarm.progress import show_progress
from nashswarm.records import files
from nashswarm.records.provenance import provenance
from nashswarm.records.record import Record
from nashswarm.records.statistics import interval

PLAIN = (
    "method=nash_lattice",
    "method.strength=[0.0]",
    "method.offsets=[0]",
    "method.code_game=pass",
    "method.swarm.align=[0.0]",
)
SHRINK = 0.5
HELD_OUT = 8  # windows of calibration text, which with 64 others are all there are
FIXED = ("method=fixed_width", "method.swarm.shrink=[0.0]")


def shrink(strength: float, graph: str = "features", neighbours: int = 7) -> tuple[str, ...]:
    return (
        *PLAIN,
        f"method.swarm.shrink=[{strength}]",
        f"method.swarm.graph={graph}",
        f"method.swarm.neighbours={neighbours}",
    )


def local(neighbours: int | None) -> tuple[str, ...]:
    return (
        *PLAIN,
        "method.swarm.shrink=[0.0]",
        f"method.swarm.local_reply={'null' if neighbours is None else neighbours}",
    )


def align(mass: float, graph: str = "features") -> tuple[str, ...]:
    return (*FIXED, f"method.swarm.align=[{mass}]", f"method.swarm.graph={graph}")


# role → (windows, control, its variants by name)
ROLES = {
    "shrink": (
        (1, 2, 4, 8, 64),
        {
            "no shrinkage": shrink(0.0),
            "flock of 7": shrink(SHRINK),
            "shuffled flock": shrink(SHRINK, "shuffled"),
        },
    ),
    "shrink, size and graph": (
        (2,),
        {"no shrinkage": shrink(0.0), "random graph": shrink(SHRINK, "random"), "index graph": shrink(SHRINK, "index")}
        | {f"flock of {size}": shrink(SHRINK, neighbours=size) for size in (2, 4, 6, 7, 12, 24)},
    ),
    "local_reply": (
        (8,),
        {"full reply": local(None)} | {f"{size} columns": local(size) for size in (7, 24)},
    ),
    "align": (
        (8,),
        {"no alignment": align(0.0), "flock of 7": align(4.0), "index neighbours": align(4.0, "index")},
    ),
}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", help="overrides of the configuration, as for experiments.run")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--test-windows", type=int, default=16)
    parser.add_argument("--records", default="results/cache/flock", help="where runs are found again")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("results/benchmarks/flock"))
    options = parser.parse_args(arguments)
    started = datetime.datetime.now(datetime.UTC)
    plan = [
        (role, windows, name, seed)
        for role, (sizes, variants) in ROLES.items()
        for windows, seed, name in itertools.product(sizes, range(options.seeds), variants)
    ]
    records = {key: measured(ROLES[key[0]][1][key[2]], key[1], key[3], options) for key in show_progress(plan, "roles")}
    rows = [
        row(
            role,
            windows,
            name,
            [records[role, windows, name, seed] for seed in range(options.seeds)],
            [records[role, windows, next(iter(variants)), seed] for seed in range(options.seeds)],
        )
        for role, (sizes, variants) in ROLES.items()
        for windows, name in itertools.product(sizes, variants)
    ]
    content = {"rows": rows, "seeds": options.seeds, "provenance": provenance(started)}
    files.write_report(options.out, content, table(rows))
    print(table(rows))


def measured(variant: Sequence[str], windows: int, seed: int, options: argparse.Namespace) -> Record:
    """Return the record of one run; a run that has one is not repeated."""
    config = compose(
        "wandb=disabled",
        f"records={options.records}",
        f"seed={seed}",
        f"dataset.calibration_windows={windows}",
        f"dataset.holdout_windows={HELD_OUT}",
        f"dataset.test_windows={options.test_windows}",
        *variant,
        *options.overrides,
    )
    labels = {"model": "default", "method": " ".join(variant), "dataset": "stdlib_docs", "measure": "quality"}
    return run(config, labels).record


def row(
    role: str, windows: int, name: str, records: Sequence[Record], control: Sequence[Record]
) -> dict[str, float | str | int]:
    """KL over all seeds, and the paired difference to the control in per cent of its KL."""
    kl, other = (np.concatenate([record.series["kl"] for record in group]) for group in (records, control))
    low, high = interval(list(kl - other))
    verdict = "helps" if high < 0 else "hurts" if low > 0 else "no difference shown"
    return {
        "role": role,
        "windows": windows,
        "variant": name,
        "kl": float(kl.mean()),
        "difference_percent": 100 * float((kl - other).mean() / other.mean()),
        "low_percent": 100 * low / float(other.mean()),
        "high_percent": 100 * high / float(other.mean()),
        "bits": float(np.mean([record.metrics["bits_per_weight_model"] for record in records])),
        "verdict": "control" if records == control else verdict,
    }


def table(rows: Sequence[dict[str, float | str | int]]) -> str:
    """Return the rows as a Markdown table."""
    lines = [
        "| role | calibration windows | variant | bits/param | KL (nats/token) | to the control, % | verdict |",
        "| :-- | --: | :-- | --: | --: | --: | :-- |",
    ]
    for row in rows:
        lines.append(
            f"| {row['role']} | {row['windows']} | {row['variant']} | {row['bits']:.4f} | {row['kl']:.4g} "
            f"| {row['difference_percent']:+.2f} [{row['low_percent']:+.2f}, {row['high_percent']:+.2f}] "
            f"| {row['verdict']} |"
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
