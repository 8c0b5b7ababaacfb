"""What compressing takes: minutes and memory where a record measured them, bytes and memory by shape for every model;
and what the experiments took.

    python scripts/resources.py

Measured are runs that read nothing of an earlier one from the cache; the rest is counted from shapes alone, weights
untouched.  Writes two files of Markdown.
"""

import argparse
import pathlib
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import transformers

from nashswarm.methods.nash_swarm.settings import NashSwarm
from nashswarm.methods.streaming import forecast, shards
from nashswarm.methods.streaming.compress import ByLayer
from nashswarm.models import shapes, sources
from nashswarm.records import record
from nashswarm.records.files import write_whole
from nashswarm.records.record import Record
from nashswarm.reporting import frame, typeset

EXPERIMENT = ("experiment", "records", "minutes of one process", "longest run, minutes", "threads", "commits")
WORK = {"moments", "damage", "probe", "game"}  # what the cache may have done before
TIMED = ("nash_swarm", "no_cache", "gptq")  # the main method, the same without a cache, and error feedback alone
WINDOWS, LENGTH = 4, 2048  # what `nashswarm compress --by-layer` calibrates with
MEASURED = ("model", "parameters", "method", "threads", "minutes", "GB at the peak", "machine")
SHAPE = (
    "model",
    "parameters",
    "GB, 32-bit floats",
    "GB of `nash_swarm`",
    "GB of memory, two copies in floats",
    "by layer: GB of the file",
    "by layer: GB of memory",
)
count = typeset.fixed(0)


def gigabytes(size: float) -> str:
    """Three significant digits.

    >>> gigabytes(1_602_624), gigabytes(698_417_037_312), gigabytes(1_396_834_074_624)
    ('0.0016', '698', '1,397')
    """
    found = size * 1e-9
    return f"{found:,.0f}" if found >= 100 else f"{found:.3g}"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--records", type=pathlib.Path, default=pathlib.Path("results/records"))
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("results/tables"))
    options = parser.parse_args(arguments)
    try:
        records = list(record.read_all(options.records))
        texts = {"resources": markdown(records), "experiments": experiments(records)}
    except ValueError as error:
        print(error, file=sys.stderr)
        return 1
    for name, text in texts.items():
        write_whole(options.out / f"{name}.md", text.encode())
        typeset.console().print(text, markup=False, highlight=False)
    return 0


def experiments(records: Iterable[Record]) -> str:
    """A row an experiment: how many records, how long they took one after the other, threads, and whose code."""
    groups: dict[str, list[Record]] = {}
    for one in records:
        groups.setdefault(one.labels["experiment"], []).append(one)
    minutes, rows = typeset.fixed(1), []
    for name, runs in sorted(groups.items()):
        seconds = [one.metrics["seconds"] for one in runs]
        threads = sorted({str(one.config["threads"]) for one in runs})
        commits = sorted({(one.provenance["commit"] or "unknown")[:7] for one in runs})
        times = minutes(sum(seconds) / 60), minutes(max(seconds) / 60)
        rows.append((f"`{name}`", str(len(runs)), *times, ", ".join(threads), ", ".join(commits)))
    return "\n".join(typeset.table_of(EXPERIMENT, rows, [":--", *["--:"] * 4, ":--"])) + "\n"


def markdown(records: Iterable[Record]) -> str:
    """Both tables, and what they mean."""
    numbers = ["--:"]
    lines = typeset.table_of(MEASURED, measured_rows(records), [":--", "--:", ":--", *numbers * 3, ":--"])
    lines += [
        "",
        f"By shape, `nash_swarm` at {NashSwarm().bits} stored bits per parameter, its budget. In memory it needs two "
        "copies of the model in 32-bit floats at least, and the second moments of inputs beside them; by layer "
        f"(`--by-layer`, {ByLayer().bits} bits, {WINDOWS} windows of {LENGTH} tokens) what stands in the last column, "
        "beside what the process has anyway:",
        "",
        *typeset.table_of(SHAPE, shape_rows(), [":--", *numbers * (len(SHAPE) - 1)]),
    ]
    return "\n".join(lines) + "\n"


def measured_rows(records: Iterable[Record]) -> list[tuple[str, ...]]:
    """The longest run of each model and method that did all the work itself, the smallest model first."""
    rows = {}
    for one in sorted(records, key=lambda one: one.metrics.get("quantize_seconds", 0)):
        metrics, origin = one.metrics, one.provenance
        family = frame.family_of(one.labels["method"])  # none of a search, which has other settings too
        own = family.startswith(TIMED) and "[" not in family and metrics.get("quantize_peak_bytes")
        if own and not WORK & set(origin.get("cache_hits", ())):
            about = f"`{one.labels['model']}`", count(origin["parameters"]), one.labels["method"]
            minutes = typeset.fixed(1)(metrics["quantize_seconds"] / 60)
            peak = gigabytes(metrics["quantize_peak_bytes"])
            machine = origin["machine"].partition(", ")[2]
            threads = str(one.config["threads"])
            rows[*about, threads] = origin["parameters"], (*about, threads, minutes, peak, machine)
    if not rows:
        raise ValueError("no record tells what compression took; run experiment=ablation or experiment=speed")
    return [row for _, row in sorted(rows.values())]


def shape_rows() -> list[tuple[str, ...]]:
    """One row a model of ``conf/`` that a config describes."""
    embedded = transformers.AutoConfig.from_pretrained(sources.EMBEDDED).to_dict()
    return [shape_row(name, config) for name, config in ({"default": embedded} | dict(shapes.SHAPES)).items()]


def shape_row(name: str, config: Mapping[str, Any]) -> tuple[str, ...]:
    sizes = shapes.count_from_config(config)
    by_layer: tuple[str, ...] = (typeset.MISSING,) * 2
    if config["model_type"] == "llama":
        model = shards.skeleton(transformers.AutoConfig.for_model(**config))
        files = forecast.file_bytes_of(model, ByLayer())
        by_layer = gigabytes(files), gigabytes(forecast.working_bytes(model, WINDOWS, LENGTH))
    floats = sizes.bytes_full
    packed = gigabytes(sizes.bytes_at(NashSwarm().bits))
    return f"`{name}`", count(sizes.parameters), gigabytes(floats), packed, gigabytes(2 * floats), *by_layer


if __name__ == "__main__":
    sys.exit(main())
