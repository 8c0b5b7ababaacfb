"""The cost of compression and of the experiments: time and memory from records, bytes and memory from shapes.

Measured are runs that read nothing from the cache of an earlier run.  The rest is exact from shapes alone.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import transformers

from nashswarm.methods.nash_lattice.settings import NashLattice
from nashswarm.methods.streaming import forecast, shards
from nashswarm.methods.streaming.settings import ByLayer
from nashswarm.models import shapes, sources
from nashswarm.records.record import Record
from nashswarm.reporting import typeset
from nashswarm.reporting.formats import MISSING, fixed
from nashswarm.reporting.labels import family_of

EXPERIMENT = ("experiment", "records", "minutes of one process", "longest run, minutes", "threads", "commits")
WORK = {"moments", "damage", "probe", "game"}  # the steps that a cache of an earlier run can replace
TIMED = ("nash_lattice", "lattice_no_cache", "gptq")  # the lattice, the same without a cache, error feedback alone
WINDOWS, LENGTH = 4, 2048  # of the calibration of `nashswarm compress --by-layer`
MEASURED = ("model", "parameters", "method", "threads", "minutes", "GB at the peak", "machine")
SHAPE = (
    "model",
    "parameters",
    "GB, 32-bit floats",
    "GB of `nash_lattice`",
    "GB of memory, two copies in floats",
    "by layer: GB of the file",
    "by layer: GB of memory",
)
count = fixed(0)


def gigabytes(size: float) -> str:
    """Write bytes as gigabytes with three significant digits.

    >>> gigabytes(1_602_624), gigabytes(698_417_037_312), gigabytes(1_396_834_074_624)
    ('0.0016', '698', '1,397')
    """
    number = size * 1e-9
    return f"{number:,.0f}" if number >= 100 else f"{number:.3g}"


def experiments(records: Iterable[Record]) -> str:
    """Return a Markdown table with a row an experiment: its records, their total time, threads and commits."""
    groups: dict[str, list[Record]] = {}
    for one in records:
        groups.setdefault(one.labels["experiment"], []).append(one)
    minutes, rows = fixed(1), []
    for name, runs in sorted(groups.items()):
        seconds = [one.metrics["seconds"] for one in runs]
        threads = sorted({str(one.config["threads"]) for one in runs})
        commits = sorted({(one.provenance["commit"] or "unknown")[:7] for one in runs})
        times = minutes(sum(seconds) / 60), minutes(max(seconds) / 60)
        rows.append((f"`{name}`", str(len(runs)), *times, ", ".join(threads), ", ".join(commits)))
    return "\n".join(typeset.markdown_lines(EXPERIMENT, rows, [":--", *["--:"] * 4, ":--"])) + "\n"


def markdown(records: Iterable[Record]) -> str:
    """Return both tables of what compression takes, measured and by shape, with a sentence between them."""
    number = ["--:"]
    lines = typeset.markdown_lines(MEASURED, measured_rows(records), [":--", "--:", ":--", *number * 3, ":--"])
    lines += [
        "",
        f"By shape, `nash_lattice` at {NashLattice().bits} stored bits per parameter, its budget. In memory it needs "
        "two copies of the model in 32-bit floats at least, and the second moments of inputs beside them; by layer "
        f"(`--by-layer`, {ByLayer().bits} bits, {WINDOWS} windows of {LENGTH} tokens) what stands in the last column, "
        "beside what the process has anyway:",
        "",
        *typeset.markdown_lines(SHAPE, shape_rows(), [":--", *number * (len(SHAPE) - 1)]),
    ]
    return "\n".join(lines) + "\n"


def measured_rows(records: Iterable[Record]) -> list[tuple[str, ...]]:
    """Return the longest run of each model and method that did all of its work itself, the smallest model first.

    Runs with overrides other than their size are left out.  Raises ValueError if no record qualifies.
    """
    rows = {}
    for one in sorted(records, key=lambda one: one.metrics.get("quantize_seconds", 0)):
        metrics, origin = one.metrics, one.provenance
        family = family_of(one.labels["method"])
        timed = family.startswith(TIMED) and "[" not in family and metrics.get("quantize_peak_bytes")
        if timed and not WORK & set(origin.get("cache_hits", ())):
            names = f"`{one.labels['model']}`", count(origin["parameters"]), one.labels["method"]
            minutes = fixed(1)(metrics["quantize_seconds"] / 60)
            peak = gigabytes(metrics["quantize_peak_bytes"])
            machine = origin["machine"].partition(", ")[2]
            threads = str(one.config["threads"])
            rows[*names, threads] = origin["parameters"], (*names, threads, minutes, peak, machine)
    if not rows:
        raise ValueError("no record tells what compression took; run experiment=ablation or experiment=speed")
    return [row for _, row in sorted(rows.values())]


def shape_rows() -> list[tuple[str, ...]]:
    """Return one row per model of ``conf/`` that a config describes."""
    embedded = transformers.AutoConfig.from_pretrained(sources.EMBEDDED).to_dict()
    return [shape_row(name, config) for name, config in ({"default": embedded} | dict(shapes.SHAPES)).items()]


def shape_row(name: str, config: Mapping[str, Any]) -> tuple[str, ...]:
    """Return parameters, and bytes and memory in gigabytes, of a model with this config; no weights are needed."""
    sizes = shapes.count_from_config(config)
    by_layer: tuple[str, ...] = (MISSING,) * 2
    if config["model_type"] == "llama":
        model = shards.skeleton(transformers.AutoConfig.for_model(**config))
        files = forecast.file_bytes_of(model, ByLayer())
        by_layer = gigabytes(files), gigabytes(forecast.working_bytes(model, WINDOWS, LENGTH))
    floats = sizes.bytes_full
    packed = gigabytes(sizes.bytes_at(NashLattice().bits))
    return f"`{name}`", count(sizes.parameters), gigabytes(floats), packed, gigabytes(2 * floats), *by_layer
