"""What the audit decides on: runs of the published protocol, honest runs, and sizes from shapes."""

import dataclasses
import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

from nashswarm.models.shapes import SHAPES, ParameterCounts, count_from_config
from nashswarm.records import record
from nashswarm.records.record import Record
from nashswarm.reporting import frame, typeset
from nashswarm.reporting.labels import CELL, REFERENCE
from nashswarm.reporting.tables import equal_bytes

EXPERIMENTS = ("ablation", "audit", "speed")  # the first one that has a model and text describes them
REMOVED = ("fixed_no_nash", "no_quantization", "lattice_no_swarm")  # methods without one component each
MIXTURES = ("quick_validation", "performance_analysis")
MISSES = pathlib.Path("results/benchmarks/misses.json")

Place = tuple[str, str]  # a model and a text
Rows = Mapping[str, pd.Series]  # method → metrics


@dataclasses.dataclass(frozen=True)
class Evidence:
    """All that the audit reads.

    ``published``: the record of the published protocol for each model and text.  ``honest``: metrics of honest runs for
    each model and text, by method.  ``sizes``: by shape.  ``mixtures``: the records of ``MIXTURES``.  ``peers``: other
    libraries beside ``nash_lattice`` at equal bytes.  ``misses``: rows of ``experiments.benchmarks.misses``.
    ``family``: honest runs of models of one family.  ``removed``: the result of ``removals``.
    """

    published: Mapping[Place, Record]
    honest: Mapping[Place, Rows]
    sizes: Mapping[str, ParameterCounts]
    mixtures: Mapping[str, Sequence[Record]] = dataclasses.field(default_factory=dict)
    peers: pd.DataFrame = dataclasses.field(default_factory=pd.DataFrame)
    misses: Sequence[Mapping[str, Any]] = ()
    family: Mapping[Place, Rows] = dataclasses.field(default_factory=dict)
    removed: pd.DataFrame = dataclasses.field(default_factory=pd.DataFrame)

    @property
    def trained(self) -> dict[Place, Record]:
        """The published protocol without models of random weights, whose losses say nothing."""
        return {place: run for place, run in self.published.items() if not place[0].endswith("_random")}

    def having(self, *methods: str, metric: str = "kl") -> dict[Place, Rows]:
        """Return the honest runs that have these methods and this metric."""
        return having(self.honest, *methods, metric=metric)


def gather(folder: pathlib.Path, misses: pathlib.Path = MISSES) -> Evidence:
    """Load the evidence from the records under ``folder``, and from ``misses`` if that file exists.

    Raises ValueError if the audit has no records, or if two of them are of one model and text.
    """
    runs = list(record.read_all(folder / "audit"))
    measured = [run for run in runs if run.labels["measure"] != "published"]
    others = [run for name in EXPERIMENTS if name != "audit" for run in record.read_all(folder / name)]
    published = published_runs(runs)
    peers = equal_bytes(record.read_all(folder / "main"))
    if len(peers):
        peers = peers[peers["method"].str.startswith("peer_") & peers["kl_ratio"].notna()]
    return Evidence(
        published=published,
        honest=by_place([*others, *measured]),
        sizes={name: count_from_config(config) for name, config in SHAPES.items()},
        mixtures={name: list(record.read_all(folder / name)) for name in MIXTURES},
        peers=peers,
        misses=json.loads(misses.read_text())["rows"] if misses.exists() else (),
        family=by_place(list(record.read_all(folder / "scaling"))),
        removed=removals(folder),
    )


def published_runs(runs: Sequence[Record]) -> dict[Place, Record]:
    """Return the runs of the published protocol by model and text.

    Raises ValueError if there is none, or if two of them are of one model and text.
    """
    published: dict[Place, Record] = {}
    for run in runs:
        if run.labels["measure"] == "published":
            place = run.labels["model"], run.labels["dataset"]
            if place in published:
                raise ValueError(f"two records audit {place[0]} on {place[1]}; delete the stale one")
            published[place] = run
    if not published:
        raise ValueError("the audit has no records; run python -m experiments.run experiment=audit")
    return published


def removals(folder: pathlib.Path) -> pd.DataFrame:
    """Return one row for every run of ``REMOVED`` that is paired with ``nash_lattice``, in any experiment.

    Both runs have the same overrides.  Columns are ``method``, ``experiment``, ``model`` and ``costs``: whether the run
    has a higher KL and its test survives among all tests of its table.
    """
    rows = []
    for path in sorted(path for path in folder.iterdir() if path.is_dir() and path.name != "audit"):
        runs = list(record.read_all(path))
        if not any(run.labels["method"].partition("[")[0] in REMOVED for run in runs):
            continue
        table = frame.tested(frame.average(frame.frame(runs)), runs)
        keys = [*CELL[:-1], "overrides"]
        table[["method", "overrides"]] = [list(label.partition("[")[::2]) for label in table["method"]]
        whole = table[table["method"] == REFERENCE].groupby(keys)["kl"].mean()
        removed = table[table["method"].isin(REMOVED)]
        for _, row in removed.dropna(subset="kl_p").iterrows() if "kl_p" in removed else ():
            costs = row["kl_p"] <= typeset.LEVEL and row["kl"] > whole[tuple(row[keys])]
            rows.append({name: row[name] for name in ("method", "experiment", "model")} | {"costs": bool(costs)})
    return pd.DataFrame(rows)


def having(runs: Mapping[Place, Rows], *methods: str, metric: str = "kl") -> dict[Place, Rows]:
    """Return the runs that have these methods and this metric."""
    return {
        place: rows
        for place, rows in runs.items()
        if all(method in rows and pd.notna(rows[method].get(metric)) for method in methods)
    }


def by_place(runs: Sequence[Record]) -> dict[Place, Rows]:
    """Return means over seeds by model and text, then by method; the first of several experiments counts."""
    rows_of: dict[Place, Rows] = {}
    if runs:
        table = frame.tested(frame.average(frame.frame(runs)), runs)
        for (_, model, dataset, _), rows in table.groupby(["experiment", "model", "dataset", "measure"]):
            rows_of.setdefault((str(model), str(dataset)), {row["method"]: row for _, row in rows.iterrows()})
    return rows_of
