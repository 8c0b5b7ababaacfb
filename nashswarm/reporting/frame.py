"""Reports: records in, one data frame, its means over seeds and tests, and the summary of a sweep.

Perplexity is derived here, perplexity = exp(nll), and stored nowhere.
"""

import json
import pathlib
import re
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
from nashswarm.reporting.typeset import CELL, FORMATS, LABELS, ORIGIN, REFERENCE, TESTED, WORDS, terminal


def frame(records: Iterable[Record]) -> pd.DataFrame:
    """One row per record: labels, metrics, perplexity, its ``origin`` and its ``identity`` (the config without seed).

    A record given twice counts once; the same configuration in two experiments has a row in each.  Raises ValueError
    if there is none, or if one lacks a label.
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
            **({"windows": len(record.series["nll"])} if "nll" in record.series else {}),
            **({"threads": record.config["threads"]} if "threads" in record.config else {}),
            **origin([record]),
            "identity": json.dumps(identity, sort_keys=True, ensure_ascii=False),
        }
    if not rows:
        raise ValueError("there are no records; run an experiment first: python -m experiments.run experiment=ablation")
    return ordered(with_perplexity(pd.DataFrame(rows.values())))


def family_of(method: str) -> str:
    """The method without its size, if that is all that it was told.

    >>> family_of("gptq[bits=3]"), family_of("nash_swarm[bits=3.0,code_game=pass]")
    ('gptq', 'nash_swarm[bits=3.0,code_game=pass]')
    """
    return re.sub(r"\[bits=[^],]*\]$", "", method)


def origin(records: Iterable[Record]) -> dict[str, Any]:
    """What a row of a table tells of its runs: the ``fingerprint`` and the ``commit`` of each, apart by spaces, and
    ``dirty``, whether the code of one was not committed or is unknown."""
    runs = {one.fingerprint: one.provenance for one in records}
    return {
        "fingerprint": " ".join(runs),
        "commit": " ".join(str(one.get("commit") or "unknown") for one in runs.values()),
        "dirty": any(one.get("dirty") is not False for one in runs.values()),
    }


def with_perplexity(table: pd.DataFrame) -> pd.DataFrame:
    """``table`` with perplexity = exp(nll) and its interval, that of ``nll_delta`` around the full-precision nll."""
    if "nll" not in table:
        return table
    derived = {"perplexity": table["nll"]}
    for end in ("low", "high"):
        if {"nll_delta", f"nll_delta_{end}"} <= set(table.columns):
            derived[f"perplexity_{end}"] = table["nll"] - table["nll_delta"] + table[f"nll_delta_{end}"]
    return table.assign(**{name: np.exp(nll) for name, nll in derived.items()})


def rank(method: str) -> tuple[int, int, str]:
    """The place of a method in every table and figure; unknown methods stand before ``nash_swarm``, which is last.

    >>> sorted(["nash_swarm", "no_nash", "uniform4", "hqq", "uniform8", "baseline"], key=rank)
    ['baseline', 'uniform8', 'uniform4', 'no_nash', 'hqq', 'nash_swarm']
    """
    if uniform := re.fullmatch(r"uniform(\d+)", method):
        return 1, -int(uniform[1]), method
    kinds = ("baseline", "uniform", "rtn", "gptq", "as_published", "no_", "", "nash_swarm")
    kind = next((place for place, start in enumerate(kinds) if start and method.startswith(start)), kinds.index(""))
    return kind, 0, _padded(method)


def ordered(table: pd.DataFrame) -> pd.DataFrame:
    """Rows in the order of methods, columns in the order of ``FORMATS``, unknown metrics after them by name."""
    known = [*WORDS, *FORMATS, *ORIGIN, "identity"]
    columns = [name for name in known if name in table] + sorted(set(table.columns) - set(known))
    keys = [tuple(row) for row in table[[name for name in LABELS if name in table]].to_numpy().tolist()]
    method = CELL.index("method")
    places = [[_padded(str(label)) for label in row] for row in keys]
    rows = sorted(range(len(table)), key=lambda row: (places[row][:method], rank(keys[row][method]), places[row]))
    return table.iloc[rows][columns].reset_index(drop=True)


def _padded(label: str) -> str:
    """A label as it is sorted, its numbers by their size.

    >>> sorted(["windows=16", "windows=4", "bits=2.3"], key=_padded)
    ['bits=2.3', 'windows=4', 'windows=16']
    """
    return re.sub(r"\d+(\.\d+)?", lambda number: f"{float(number[0]):09.3f}", label)


def select(table: pd.DataFrame, **labels: str) -> pd.DataFrame:
    """The rows with these labels, for example ``select(table, experiment="ablation", seed="0")``.

    Raises ValueError for an unknown label, and for a value that no row has.
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
    """The mean, missing if any value is."""
    return float(values.mean(skipna=False))


def points(table: pd.DataFrame) -> pd.DataFrame:
    """Means over seeds, one row per configuration; ``seeds`` says over how many.

    Intervals are over test windows; their ends are averaged like every metric.  A metric that one seed lacks is
    missing in the mean as well.  ``_spread``: the standard deviation over seeds, where there are several.
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
    """Means over seeds, one row per (experiment, model, dataset, measure, method) and number of threads.

    Raises ValueError if the runs of one row differ in more than the seed, and says in what.
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
    """Which dotted keys differ between ``configs``, each with its values.

    >>> differences([{"seed": 0, "method": {"bits": 3}}, {"seed": 0, "method": {"bits": 4}}])
    ['method.bits: 3, 4']
    """
    flat = [dict(flattened(config)) for config in configs]
    values = {key: [str(one.get(key, "absent")) for one in flat] for one in flat for key in one}
    return [f"{key}: {', '.join(dict.fromkeys(values[key]))}" for key in sorted(values) if len(set(values[key])) > 1]


def flattened(config: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, Any]]:
    """The leaves of a nested mapping, each under its dotted key."""
    for key, value in config.items():
        if isinstance(value, Mapping):
            yield from flattened(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def refuse_dirty(table: pd.DataFrame) -> None:
    """Raise ValueError if a run was made from uncommitted or unknown code: the paper quotes no such number."""
    dirty = sorted(set(table.loc[table["dirty"], "method"]))
    if dirty:
        raise ValueError(
            f"runs of {', '.join(dirty)} come from uncommitted or unknown code; commit and run them with rerun=true"
        )


def by_cell(records: Iterable[Record]) -> dict[tuple[str, ...], list[Record]]:
    """The records of each (experiment, model, dataset, measure, method)."""
    cells: dict[tuple[str, ...], list[Record]] = {}
    for record in records:
        cells.setdefault(tuple(record.labels[label] for label in CELL), []).append(record)
    return cells


def circumstances(record: Record) -> dict[str, Any]:
    """Of a run's identity, all that must be the same for its windows to be paired with another's."""
    aside = {"method", "measure", "seed", "threads"}
    kept = {key: value for key, value in record.config.items() if key not in aside}
    return kept | {"dataset": {key: value for key, value in kept["dataset"].items() if key != "test_windows"}}


def paired(
    records: Sequence[Record], reference: Sequence[Record], name: str
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Per-window ``name`` of two methods on the same windows, by their tokens, each averaged over its seeds first.

    Raises ValueError if the windows are not the same.
    """
    alike = [1.0] * len(records[0].series[name])  # examples of a task, each counted once
    tokens = records[0].series.get("tokens", alike)
    for one in (*records, *reference):
        if one.series.get("tokens", alike) != tokens or len(one.series[name]) != len(tokens):
            names = " and ".join(dict.fromkeys(group[0].labels["method"] for group in (records, reference)))
            raise ValueError(f"runs of {names} saw different windows; measure them on the same text")
    weights = np.array(tokens) / np.mean(tokens)
    own, other = (np.mean([one.series[name] for one in group], axis=0) for group in (records, reference))
    return own * weights, other * weights


def tested(means: pd.DataFrame, records: Iterable[Record]) -> pd.DataFrame:
    """``means`` with ``kl_p`` and ``nll_delta_p``: sign-flip tests of each method against the table's ``nash_swarm`` of
    the same overrides on paired windows, as they count among all tests of the table (Holm); no column where nothing can
    be paired."""
    groups = by_cell(records)
    found: dict[tuple[int, str], float] = {}
    for row, labels in enumerate(means[CELL].itertuples(index=False, name=None)):
        _, *overrides = labels[-1].partition("[")
        own, reference = groups[labels], groups.get((*labels[:-1], REFERENCE + "".join(overrides)), [])
        if not reference or circumstances(own[0]) != circumstances(reference[0]):
            continue
        for metric, series in TESTED.items():
            if own != reference and all(series in one.series for one in (*own, *reference)):
                ours, theirs = paired(own, reference, series)
                found[row, metric] = statistics.sign_flip((ours - theirs).tolist())
    adjusted = dict(zip(found, statistics.holm(list(found.values())), strict=True))
    columns = {
        f"{metric}_p": [adjusted.get((row, metric), np.nan) for row in range(len(means))]
        for metric in dict.fromkeys(metric for _, metric in found)
    }
    return ordered(means.assign(**columns))


def read_outcomes(folder: pathlib.Path) -> list[dict[str, Any]]:
    """The outcome of every job of a sweep; a job folder without one stands as failed, for its job was killed.

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


def summary(outcomes: Sequence[Mapping[str, Any]], records: Iterable[Record]) -> Group:
    """What a sweep did: counts, the table of its records, and for each job that failed or was left out, for its
    method has nothing to offer there, why and where its log is."""
    statuses = [outcome["status"] for outcome in outcomes]
    known = ("finished", "skipped", *(["left out"] if "left out" in statuses else []), "failed")
    counts = [f"{statuses.count(status)} {status}" for status in known]
    parts: list[Text | Table] = [Text(f"{len(outcomes)} jobs: {', '.join(counts)}")]
    gathered = list(records)
    if gathered:
        parts.append(terminal(points(frame(gathered))))
    for outcome in outcomes:
        if outcome["status"] in ("failed", "left out"):
            name = " ".join(outcome.get("overrides") or outcome["labels"].values()) or "unknown job"
            reason = next(iter(str(outcome["message"]).splitlines()), "no message")
            parts.append(Text(f"{outcome['status']}: {name}\n  {reason}\n  log: {outcome['log']}"))
    return Group(*parts)
