"""Do experiments that were run again say what their committed records say?

    python -m experiments.run experiment=bit_budget records=results/reproduced/records
    python scripts/reproduced.py

Records are those of one run if their configurations agree in everything but the number of threads, which moves sums in
their last bits.  Compared are series and metrics, to the last bit, and every metric that has an interval with that of
the committed record; times, memory and what follows from them apart.  Writes a JSON file and a Markdown table; the exit
status is 1 where anything but a time lies outside, and where a run without intervals is not the same.
"""

import argparse
import dataclasses
import datetime
import logging
import math
import pathlib
import re
import sys
from collections.abc import Iterable, Iterator, Sequence

from nashswarm.records import files, record
from nashswarm.records.provenance import provenance
from nashswarm.records.record import Record
from nashswarm.reporting import typeset
from nashswarm.runtime.machine import read_machine

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
    """One run and its repetition.  ``threads``: of the repetition, and of the committed run where it had others.
    ``moved``: what is not the same to the last bit, times apart.  ``inside``: of every metric with an interval, whether
    it lies there now."""

    experiment: str
    method: str
    threads: str
    moved: list[str]
    inside: dict[str, bool]

    @property
    def failing(self) -> list[str]:
        """What speaks against the committed record, times aside: what left its interval, or moved where none tells by
        how much it may."""
        judged = {name: inside for name, inside in self.inside.items() if not TIMED.search(name)}
        return [name for name, inside in judged.items() if not inside] if judged else self.moved


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--records", type=pathlib.Path, default=pathlib.Path("results/records"))
    parser.add_argument("--reproduced", type=pathlib.Path, default=pathlib.Path("results/reproduced/records"))
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("results/benchmarks/reproduced"))
    options = parser.parse_args(arguments)
    origin = provenance(datetime.datetime.now(datetime.UTC))
    try:
        found = [compared(*pair) for pair in pairs(options.records, options.reproduced)]
    except ValueError as error:
        print(error, file=sys.stderr)
        return 1
    text = markdown(found)
    content = {"runs": [dataclasses.asdict(one) for one in found], "machine": str(read_machine()), "provenance": origin}
    files.write_report(options.out, content, text)
    typeset.console().print(text, markup=False, highlight=False)
    return int(any(one.failing for one in found))


def pairs(committed: pathlib.Path, reproduced: pathlib.Path) -> Iterator[tuple[Record, Record]]:
    """Each reproduced record behind the committed one of the same run; those without one are named and left out.

    Raises ValueError if none has one.
    """
    found = sorted(reproduced.rglob("[0-9a-f]*.json"))
    if not found:
        raise ValueError(f"no record in {reproduced}; run an experiment with records={reproduced}")
    known = {identity(one): one for one in map(record.read, sorted(committed.rglob("[0-9a-f]*.json")))}
    records = {path: record.read(path) for path in found}
    new = [path for path, again in records.items() if identity(again) not in known]
    for path in new:
        log.warning("%s repeats no record of %s: its configuration is another", path, committed)
    if len(new) == len(found):
        raise ValueError(f"nothing in {reproduced} repeats a record of {committed}")
    for path, again in records.items():
        if path not in new:
            yield known[identity(again)], again


def identity(of: Record) -> tuple[str, str]:
    """The experiment, and what can move a number, threads apart."""
    return of.labels["experiment"], record.fingerprint({**of.config, "threads": None})


def threads_told(first: Record, again: Record) -> str:
    now, then = (one.config.get("threads", "") for one in (again, first))
    return str(now) if now == then else f"{now} (committed: {then})"


def compared(first: Record, again: Record) -> Comparison:
    """What ``again`` says of the run of ``first``."""
    kinds = ((first.series, again.series), (first.metrics, again.metrics))
    moved = {name for old, new in kinds for name in old if not TIMED.search(name) and old[name] != new.get(name)}
    bounded = [name for name in first.metrics if f"{name}_low" in first.metrics and f"{name}_high" in first.metrics]
    return Comparison(
        first.labels["experiment"],
        first.labels["method"],
        threads_told(first, again),
        sorted(moved),
        {
            name: first.metrics[f"{name}_low"] <= again.metrics.get(name, math.nan) <= first.metrics[f"{name}_high"]
            for name in bounded
        },
    )


def markdown(found: Iterable[Comparison]) -> str:
    """A row an experiment and number of threads."""
    rows: dict[tuple[str, str], list[Comparison]] = {}
    for one in found:
        rows.setdefault((one.experiment, one.threads), []).append(one)
    lines = [f"| {' | '.join(HEADINGS)} |", f"| :-- |{' --: |' * (len(HEADINGS) - 2)} :-- |"]
    for named, runs in rows.items():
        cells = [*named, str(len(runs)), str(sum(not one.moved for one in runs))]
        every = [(one.method, name, inside) for one in runs for name, inside in one.inside.items()]
        for timed in (False, True):
            own = [inside for _, name, inside in every if bool(TIMED.search(name)) == timed]
            cells += [str(len(own)), str(sum(own))]
        late = [(method, name) for method, name, inside in every if not inside and TIMED.search(name)]
        outside = [*((one.method, name) for one in runs for name in one.failing), *late]
        lines.append(f"| {' | '.join(cells)} | {', '.join(map(' '.join, outside)) or 'none'} |")
    return "\n".join([*lines, ""])


if __name__ == "__main__":
    sys.exit(main())
