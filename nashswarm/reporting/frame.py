"""From records to one data frame: a row a run, means over seeds, tests against the reference, the summary of a sweep.

Perplexity is derived here as exp(nll); no record stores it.
"""

import json
import pathlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from rich.console import Group
from rich.table import Table
from rich.text import Text

from nashswarm.records import statistics
from nashswarm.records.record import Record
from nashswarm.reporting.formats import FORMATS
from nashswarm.reporting.labels import CELL, LABELS, ORIGIN, TESTED, TESTED_AGAINST, WORDS, padded, rank
from nashswarm.reporting.typeset import PAGE_WIDTH, terminal


def frame(records: Iterable[Record]) -> pd.DataFrame:
    """Return one row per record: labels, metrics, perplexity, ``origin`` and ``identity`` (the config without seed).

    ``bytes_resident`` are the bytes in memory of the loaded weights, as far as the record tells them.

    A record that is given twice counts once; a configuration of two experiments has a row in each.

    Raises ValueError if there is no record, or if one lacks a label.
    """
    rows: dict[tuple[str, ...], dict[str, Any]] = {}
    for record in records:
        missing = [label for label in LABELS if label not in record.labels]
        if missing:
            raise ValueError(f"record {record.fingerprint} lacks the labels {missing}; delete it and run again")
        identity = {key: value for key, value in record.config.items() if key != "seed"}
        labels = {label: record.labels[label] for label in LABELS}
        rows[record.fingerprint, *labels.values()] = {
            **labels,
            **record.metrics,
            **({} if (held := bytes_resident(record)) is None else {"bytes_resident": held}),
            **({"windows": len(record.series["nll"])} if "nll" in record.series else {}),
            **({"threads": record.config["threads"]} if "threads" in record.config else {}),
            **origin([record]),
            "identity": json.dumps(identity, sort_keys=True, ensure_ascii=False),
        }
    if not rows:
        raise ValueError("there are no records; run an experiment first: python -m experiments.run experiment=ablation")
    return ordered(with_perplexity(pd.DataFrame(rows.values())))


def origin(records: Iterable[Record]) -> dict[str, Any]:
    """Return where the runs of a row come from.

    ``fingerprint`` and ``commit`` hold one word a run; ``dirty`` is true if the code of a run was not committed or is
    unknown.  ``dequantized_from`` names the types that the full model was dequantized from; it is empty for most.
    """
    runs = {one.fingerprint: one.provenance for one in records}
    return {
        "fingerprint": " ".join(runs),
        "commit": " ".join(str(one.get("commit") or "unknown") for one in runs.values()),
        "dirty": any(one.get("dirty") is not False for one in runs.values()),
        "dequantized_from": max(" and ".join(one.get("dequantized_from", ())) for one in runs.values()),
    }


def with_perplexity(table: pd.DataFrame) -> pd.DataFrame:
    """Add perplexity = exp(nll) and its interval, that of ``nll_delta`` around the full-precision nll."""
    if "nll" not in table:
        return table
    derived = {"perplexity": table["nll"]}
    for end in ("low", "high"):
        if {"nll_delta", f"nll_delta_{end}"} <= set(table.columns):
            derived[f"perplexity_{end}"] = table["nll"] - table["nll_delta"] + table[f"nll_delta_{end}"]
    return table.assign(**{name: np.exp(nll) for name, nll in derived.items()})


def bytes_resident(record: Record) -> float | None:
    """Return the bytes in memory of a run's loaded weights, None if its record does not tell them.

    A run either measured them, or tells the bits in memory of its matrices; all other bytes of its file are held as
    they are stored.
    """
    if "bytes_resident" in record.metrics or "bits_per_weight_resident" not in record.metrics:
        return record.metrics.get("bytes_resident")
    held = record.metrics["bits_per_weight_resident"] * sum(layer["parameters"] for layer in record.layers) / 8
    return record.metrics["bytes_file"] - sum(layer["bytes"] for layer in record.layers) + held


def ordered(table: pd.DataFrame) -> pd.DataFrame:
    """Sort rows by ``rank`` of their method and columns as in ``FORMATS``, unknown metrics after them by name."""
    known = [*WORDS, *FORMATS, *ORIGIN, "identity"]
    columns = [name for name in known if name in table] + sorted(set(table.columns) - set(known))
    keys = [tuple(row) for row in table[[name for name in LABELS if name in table]].to_numpy().tolist()]
    method = CELL.index("method")
    places = [[padded(str(label)) for label in row] for row in keys]
    rows = sorted(range(len(table)), key=lambda row: (places[row][:method], rank(keys[row][method]), places[row]))
    return table.iloc[rows][columns].reset_index(drop=True)


def select(table: pd.DataFrame, **labels: str) -> pd.DataFrame:
    """Return the rows with these labels, for example ``select(table, experiment="ablation", seed="0")``.

    Raises ValueError for an unknown label and for a value that no row has.
    """
    for label, value in labels.items():
        if label not in LABELS:
            raise ValueError(f"{label!r} is not a label; choose among {', '.join(LABELS)}")
        present = sorted(set(table[label]))
        if value not in present:
            raise ValueError(f"no record has {label}={value}; there are records of {', '.join(present)}")
        table = table[table[label] == value]
    return table.reset_index(drop=True)


def mean_of_all(values: "pd.Series[float]") -> float:
    """Return the mean, NaN if any value is missing."""
    return float(values.mean(skipna=False))


def points(table: pd.DataFrame) -> pd.DataFrame:
    """Return means over seeds, one row per configuration; ``seeds`` is their number.

    Intervals are over test windows; their ends are averaged like every metric.  A metric that one seed lacks is
    missing in the mean as well.  ``_spread`` is the standard deviation over seeds, where there are several.
    """
    labelled = {*LABELS, *ORIGIN, "identity"}
    groups = table.groupby([*CELL, "identity"], sort=False)
    means = groups[[name for name in table if name not in labelled]].agg(mean_of_all)
    means = means.assign(
        seeds=groups["seed"].nunique(), **{name: groups[name].agg(join) for name, join in ORIGIN.items()}
    )
    if (means["seeds"] > 1).any():
        means = means.assign(**{f"{name}_spread": groups[name].std() for name in TESTED if name in table})
    return ordered(with_perplexity(means.reset_index()))


def average(table: pd.DataFrame) -> pd.DataFrame:
    """Return means over seeds, one row per (experiment, model, dataset, measure, method) and number of threads.

    Raises ValueError if the runs of one row differ in more than the seed, and names the differences.
    """
    means = points(table)
    for (*cell, _), runs in means.assign(threads=means.get("threads", 0)).groupby([*CELL, "threads"], sort=False):
        if len(runs) > 1:
            differing = "; ".join(differences([json.loads(text) for text in runs["identity"]]))
            raise ValueError(
                f"the runs of {'/'.join(map(str, cell))} differ in more than the seed ({differing}); "
                "delete the stale records or give them their own label"
            )
    return means.drop(columns="identity")


def differences(configs: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the dotted keys that differ between ``configs``, each with its values.

    >>> differences([{"seed": 0, "method": {"bits": 3}}, {"seed": 0, "method": {"bits": 4}}])
    ['method.bits: 3, 4']
    """
    flat = [dict(flattened(config)) for config in configs]
    values = {key: [str(one.get(key, "absent")) for one in flat] for one in flat for key in one}
    return [f"{key}: {', '.join(dict.fromkeys(values[key]))}" for key in sorted(values) if len(set(values[key])) > 1]


def flattened(config: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, Any]]:
    """Yield the leaves of a nested mapping, each with its dotted key."""
    for key, value in config.items():
        if isinstance(value, Mapping):
            yield from flattened(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def refuse_dirty(table: pd.DataFrame) -> None:
    """Raise ValueError if a run was made from uncommitted or unknown code, because the paper quotes no such number."""
    dirty = sorted(set(table.loc[table["dirty"], "method"]))
    if dirty:
        raise ValueError(
            f"runs of {', '.join(dirty)} come from uncommitted or unknown code; commit and run them with rerun=true"
        )


def by_cell(records: Iterable[Record]) -> dict[tuple[str, ...], list[Record]]:
    """Group records by (experiment, model, dataset, measure, method)."""
    cells: dict[tuple[str, ...], list[Record]] = {}
    for record in records:
        cells.setdefault(tuple(record.labels[label] for label in CELL), []).append(record)
    return cells


def circumstances(record: Record) -> dict[str, Any]:
    """Return the part of a run's config that two runs must share for their windows to be paired."""
    own_choices = {"method", "measure", "seed", "threads"}
    shared = {key: value for key, value in record.config.items() if key not in own_choices}
    return shared | {"dataset": {key: value for key, value in shared["dataset"].items() if key != "test_windows"}}


def paired(
    records: Sequence[Record], reference: Sequence[Record], name: str
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return the series ``name`` of two methods on the same windows, weighted by the tokens of each window.

    Each method is averaged over its seeds first.  Examples of a task, which have no tokens, count once each.

    Raises ValueError if the windows differ.
    """
    equal_weights = [1.0] * len(records[0].series[name])
    tokens = records[0].series.get("tokens", equal_weights)
    for one in (*records, *reference):
        if one.series.get("tokens", equal_weights) != tokens or len(one.series[name]) != len(tokens):
            names = " and ".join(dict.fromkeys(group[0].labels["method"] for group in (records, reference)))
            raise ValueError(f"runs of {names} saw different windows; measure them on the same text")
    weights = np.array(tokens) / np.mean(tokens)
    values, reference_values = (np.mean([one.series[name] for one in group], axis=0) for group in (records, reference))
    return values * weights, reference_values * weights


def tested(means: pd.DataFrame, records: Iterable[Record]) -> pd.DataFrame:
    """Add ``kl_p`` and ``nll_delta_p``: p-values of sign-flip tests against the main method on paired windows.

    Each method is tested against the ``nash_swarm`` of the same overrides, or ``nash_lattice`` if there is none.  The
    p-values are adjusted for all tests of the table (Holm).  A column is absent where nothing can be paired.
    """
    groups = by_cell(records)
    p_values: dict[tuple[int, str], float] = {}
    for row, labels in enumerate(means[CELL].itertuples(index=False, name=None)):
        _, *overrides = labels[-1].partition("[")
        main = [(*labels[:-1], method + "".join(overrides)) for method in TESTED_AGAINST]
        runs, reference = groups[labels], next((groups[name] for name in main if name in groups), [])
        if not reference or circumstances(runs[0]) != circumstances(reference[0]):
            continue
        for metric, series in TESTED.items():
            if runs != reference and all(series in one.series for one in (*runs, *reference)):
                values, reference_values = paired(runs, reference, series)
                p_values[row, metric] = statistics.sign_flip((values - reference_values).tolist())
    adjusted = dict(zip(p_values, statistics.holm(list(p_values.values())), strict=True))
    columns = {
        f"{metric}_p": [adjusted.get((row, metric), np.nan) for row in range(len(means))]
        for metric in dict.fromkeys(metric for _, metric in p_values)
    }
    return ordered(means.assign(**columns))


def read_outcomes(folder: pathlib.Path) -> list[dict[str, Any]]:
    """Load the outcome of every job of a sweep; a job folder without one counts as failed, because its job was killed.

    Raises ValueError if ``folder`` holds no job.
    """
    outcomes = []
    for job in sorted(folder.glob("*/"), key=lambda path: (len(path.name), path.name)):
        path = job / "outcome.json"
        if path.exists():
            outcomes.append(json.loads(path.read_text()))
        elif (job / ".hydra").exists():
            message = "left no outcome: the job was killed or still runs"
            outcomes.append({"status": "failed", "labels": {}, "record": None, "message": message, "log": str(job)})
    if not outcomes:
        raise ValueError(f"{folder} holds no job of a sweep; give the folder that Hydra printed when the sweep started")
    return outcomes


def summary(outcomes: Sequence[Mapping[str, Any]], records: Iterable[Record], width: int = PAGE_WIDTH) -> Group:
    """Return what a sweep did: counts, the table of its records, and the reason and log of each job without a record.

    Such a job failed, or was left out because its method does not apply there.  ``width``: characters of a line.
    """
    statuses = [outcome["status"] for outcome in outcomes]
    known = ("finished", "skipped", *(["left out"] if "left out" in statuses else []), "failed")
    counts = [f"{statuses.count(status)} {status}" for status in known]
    parts: list[Text | Table] = [Text(f"{len(outcomes)} jobs: {', '.join(counts)}")]
    runs = list(records)
    if runs:
        parts.append(terminal(points(frame(runs)), width=width))
    for outcome in outcomes:
        if outcome["status"] in ("failed", "left out"):
            name = " ".join(outcome.get("overrides") or outcome["labels"].values()) or "unknown job"
            reason = next(iter(str(outcome["message"]).splitlines()), "no message")
            parts.append(Text(f"{outcome['status']}: {name}\n  {reason}\n  log: {outcome['log']}"))
    return Group(*parts)
