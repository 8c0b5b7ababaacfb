"""Comparison of repeated runs with committed records.

Two records are of one run if their configs agree in everything but the number of threads, which changes sums in their
last bits.  Series and metrics are compared to the last bit, and every metric with an interval is held to that of the
committed record.  Times, memory and what follows from them are told apart.
"""

import dataclasses
import logging
import math
import pathlib
import re
from collections.abc import Iterable, Iterator

from nashswarm.records import record
from nashswarm.records.record import Record
from nashswarm.reporting.typeset import markdown_lines

log = logging.getLogger(__name__)
TIMED = re.compile(r"seconds|_ms|per_second|_ratio|growth|resident|peak_bytes|latency|route_|share_")
HEADINGS = (
    "experiment",
    "threads",
    "runs",
    "the same to the last bit",
    "intervals",
    "inside",
    "intervals of times",
    "inside",
    "outside",
)


@dataclasses.dataclass(frozen=True)
class Comparison:
    """One run and its repetition.

    ``threads``: of the repetition, and of the committed run if it had others.  ``moved``: series and metrics that are
    not the same to the last bit, times left out.  ``inside``: for every metric with an interval, whether the repetition
    lies in it.
    """

    experiment: str
    method: str
    threads: str
    moved: list[str]
    inside: dict[str, bool]

    @property
    def failing(self) -> list[str]:
        """The metrics that contradict the committed record, times left out.

        These are the metrics outside their interval, or all that moved if the run has no interval.
        """
        judged = {name: inside for name, inside in self.inside.items() if not TIMED.search(name)}
        return [name for name, inside in judged.items() if not inside] if judged else self.moved


def pairs(committed: pathlib.Path, reproduced: pathlib.Path) -> Iterator[tuple[Record, Record]]:
    """Yield each committed record with its repetition; a repetition without one is logged and left out.

    Raises ValueError if there are no repetitions, or if none repeats a committed record.
    """
    paths = sorted(reproduced.rglob("[0-9a-f]*.json"))
    if not paths:
        raise ValueError(f"no record in {reproduced}; run an experiment with records={reproduced}")
    known = {identity(one): one for one in map(record.read, sorted(committed.rglob("[0-9a-f]*.json")))}
    records = {path: record.read(path) for path in paths}
    new = [path for path, again in records.items() if identity(again) not in known]
    for path in new:
        log.warning("%s repeats no record of %s: its configuration is another", path, committed)
    if len(new) == len(paths):
        raise ValueError(f"nothing in {reproduced} repeats a record of {committed}")
    for path, again in records.items():
        if path not in new:
            yield known[identity(again)], again


def identity(of: Record) -> tuple[str, str]:
    """Return the experiment, and a fingerprint of everything that can move a number except the threads."""
    return of.labels["experiment"], record.fingerprint({**of.config, "threads": None})


def compared(first: Record, again: Record) -> Comparison:
    """Compare the repetition ``again`` with the committed run ``first``."""
    kinds = ((first.series, again.series), (first.metrics, again.metrics))
    moved = {name for old, new in kinds for name in old if not TIMED.search(name) and old[name] != new.get(name)}
    bounded = [name for name in first.metrics if f"{name}_low" in first.metrics and f"{name}_high" in first.metrics]
    now, then = (one.config.get("threads", "") for one in (again, first))
    return Comparison(
        first.labels["experiment"],
        first.labels["method"],
        str(now) if now == then else f"{now} (committed: {then})",
        sorted(moved),
        {
            name: first.metrics[f"{name}_low"] <= again.metrics.get(name, math.nan) <= first.metrics[f"{name}_high"]
            for name in bounded
        },
    )


def markdown(comparisons: Iterable[Comparison]) -> str:
    """Return a Markdown table with a row for each experiment and number of threads."""
    groups: dict[tuple[str, str], list[Comparison]] = {}
    for one in comparisons:
        groups.setdefault((one.experiment, one.threads), []).append(one)
    rows = []
    for names, runs in groups.items():
        cells = [*names, str(len(runs)), str(sum(not one.moved for one in runs))]
        intervals = [(one.method, name, inside) for one in runs for name, inside in one.inside.items()]
        for timed in (False, True):
            inside_of_kind = [inside for _, name, inside in intervals if bool(TIMED.search(name)) == timed]
            cells += [str(len(inside_of_kind)), str(sum(inside_of_kind))]
        late = [(method, name) for method, name, inside in intervals if not inside and TIMED.search(name)]
        outside = [*((one.method, name) for one in runs for name in one.failing), *late]
        rows.append([*cells, ", ".join(map(" ".join, outside)) or "none"])
    lines = markdown_lines(HEADINGS, rows, [":--", *["--:"] * (len(HEADINGS) - 2), ":--"])
    return "\n".join([*lines, ""])
