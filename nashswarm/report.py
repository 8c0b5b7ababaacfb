"""Reports: records in, one data frame, and the tables and summaries made from it.

A number is formatted in one place (``FORMATS``), so the terminal, the README, the paper's table and the paper's prose
cannot disagree.  Perplexity is derived here, perplexity = exp(nll), and stored nowhere.
"""

import dataclasses
import json
import pathlib
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from nashswarm import compare
from nashswarm.record import Record

CELL = ["experiment", "model", "dataset", "measure", "method"]
LABELS = [*CELL, "seed"]
REFERENCE = "nash_swarm"  # the method that the others are tested against
TESTED = {"kl": "kl", "nll_delta": "nll"}  # metric → the per-window series in which it is paired
LEVEL = 0.05  # of all tests of a table together
MARK = "†"
WORDS = [*LABELS, "layer", "contestant"]  # columns of text
PAGE_WIDTH = 150  # characters
MISSING = "-"
OFFICIAL = {"accuracy": "accuracy", "f1": "F1", "matthews": "Matthews", "pearson": "Pearson", "spearman": "Spearman"}


def fixed(digits: int, scale: float = 1.0) -> Callable[[float], str]:
    """A formatter: ``digits`` decimals after multiplication by ``scale``, thousands apart."""
    return lambda value: format(value * scale, f"z,.{digits}f")


def signed(digits: int) -> Callable[[float], str]:
    """A formatter for differences: the sign is always shown."""
    return lambda value: format(value, f"+z.{digits}f")


def scientific(value: float) -> str:
    """Two significant digits and a power of ten, for what spans many orders of magnitude; zero is ``0``."""
    return "0" if value == 0 else format(value, ".1e")


def signed_scientific(value: float) -> str:
    """Two significant digits and a power of ten, the sign always shown."""
    return "0" if value == 0 else format(value, "+.1e")


FORMATS: dict[str, Callable[[float], str]] = {
    "bits_per_weight_model": fixed(2),
    "bits_per_weight": fixed(2),
    "nominal_bits": fixed(2),
    "bytes_file": fixed(2, 1e-6),
    "compression": fixed(1, 100.0),
    "perplexity": fixed(2),
    "perplexity_low": fixed(2),
    "perplexity_high": fixed(2),
    "nll": fixed(4),
    "nll_spread": fixed(4),
    "nll_delta": signed(4),
    "nll_delta_low": signed(4),
    "nll_delta_high": signed(4),
    "kl": fixed(4),
    "kl_low": fixed(4),
    "kl_high": fixed(4),
    "kl_before": fixed(4),
    "kl_before_low": fixed(4),
    "kl_before_high": fixed(4),
    "nll_delta_before": signed(4),
    "nll_delta_before_low": signed(4),
    "nll_delta_before_high": signed(4),
    "kl_p": scientific,
    "nll_delta_p": scientific,
    "kl_spread": fixed(4),
    "nll_delta_spread": fixed(4),
    "kl_at_bytes": fixed(4),
    "kl_ratio": fixed(3),
    "kl_ratio_low": fixed(3),
    "kl_ratio_high": fixed(3),
    "layer_kl": scientific,
    "layer_kl_low": scientific,
    "layer_kl_high": scientific,
    "layer_nll_delta": signed_scientific,
    "top1_agreement": fixed(1, 100.0),
    **{f"{name}{suffix}": fixed(1, 100.0) for name in OFFICIAL for suffix in ("", "_full")},
    "examples": fixed(0),
    "tokens": fixed(0),
    "windows": fixed(0),
    "parameters": fixed(0),
    "damage": fixed(4),
    "layer_damage": scientific,
    "bleu": fixed(1),
    "bleu_low": fixed(1),
    "bleu_high": fixed(1),
    "bleu_text": fixed(1),
    "bleu_text_low": fixed(1),
    "bleu_text_high": fixed(1),
    "bleu_text_full": fixed(1),
    "regret_max": scientific,
    "regret_mean": scientific,
    "potential_start": fixed(4),
    "potential_end": fixed(4),
    "price": scientific,
    "sweeps": fixed(0),
    "flock_moves": fixed(0),
    "quantize_seconds": fixed(1),
    "bytes_file_before": fixed(2, 1e-6),
    "finetune_seconds": fixed(1),
    "finetune_steps": fixed(0),
    "finetune_chosen_step": fixed(0),
    "seconds": fixed(1),
    "peak_bytes": fixed(0, 1e-6),
    "quantize_peak_bytes": fixed(0, 1e-6),
    "bytes_resident": fixed(2, 1e-6),
    "decode_ms": fixed(2),
    "decode_ratio": fixed(2),
    "decode_long_ratio": fixed(2),
    "prefill_ratio": fixed(2),
    "prefill_tokens_per_second": fixed(0),
    "seeds": fixed(0),
    "threads": fixed(0),
    "nll_to_top_k": signed(4),
    "nll_to_top_k_low": signed(4),
    "nll_to_top_k_high": signed(4),
    "max_violation": fixed(3),
    "load_gini": fixed(3),
    "load_cv": fixed(3),
    "dead_experts": fixed(1),
    "dropped": fixed(1, 100.0),
    "resident_hits": fixed(1, 100.0),
    "resident_hits_without": fixed(1, 100.0),
    "token_microseconds": fixed(1),
    "router_microseconds": fixed(2),
    "looks_ahead": fixed(0),
}


@dataclasses.dataclass(frozen=True)
class Column:
    """One column of the main table: its heading, with the unit, and the metric under it."""

    heading: str
    metric: str


COLUMNS = (
    Column("bits/param", "bits_per_weight_model"),
    Column("MB before", "bytes_file_before"),
    Column("MB", "bytes_file"),
    Column("saved %", "compression"),
    Column("perplexity", "perplexity"),
    Column("ΔNLL before (nats)", "nll_delta_before"),
    Column("ΔNLL (nats)", "nll_delta"),
    Column("KL before (nats)", "kl_before"),
    Column("KL (nats)", "kl"),
    Column("KL ± over seeds", "kl_spread"),
    Column("top-1 %", "top1_agreement"),
    *(
        Column(f"{heading}{of} %", f"{name}{suffix}")
        for name, heading in OFFICIAL.items()
        for suffix, of in (("", ""), ("_full", " in full"))
    ),
    Column("examples", "examples"),
    Column("max regret", "regret_max"),
    Column("flock moves", "flock_moves"),
    Column("quantize s", "quantize_seconds"),
    Column("quantize MB", "quantize_peak_bytes"),
    Column("fine-tune s", "finetune_seconds"),
    Column("after step", "finetune_chosen_step"),
    Column("MB in memory", "bytes_resident"),
    Column("× decode", "decode_ratio"),
    Column("BLEU to full", "bleu"),
    Column("BLEU to text", "bleu_text"),
)
EQUAL_BYTES = (
    Column("MB", "bytes_file"),
    Column("KL (nats)", "kl"),
    Column("nash_swarm's KL at these bytes", "kl_at_bytes"),
    Column("nash_swarm's ÷ the method's", "kl_ratio"),
)
SPEED = (
    Column("MB in memory", "bytes_resident"),
    Column("decode ms", "decode_ms"),
    Column("× decode", "decode_ratio"),
    Column("× decode after the prompt", "decode_long_ratio"),
    Column("× prefill", "prefill_ratio"),
    Column("KL", "kl"),
)
LAYERS = (
    Column("weights", "parameters"),
    Column("bits/weight", "bits_per_weight"),
    Column("predicted damage (nats)", "layer_damage"),
    Column("KL alone (nats)", "layer_kl"),
    Column("ΔNLL alone (nats)", "layer_nll_delta"),
)
ROUTERS = (
    Column("validation NLL (nats)", "nll"),
    Column("± over seeds", "nll_spread"),
    Column("− top-k + Switch loss", "nll_to_top_k"),
    Column("from", "nll_to_top_k_low"),
    Column("to", "nll_to_top_k_high"),
    Column("MaxVio", "max_violation"),
    Column("Gini", "load_gini"),
    Column("CV", "load_cv"),
    Column("dead experts", "dead_experts"),
    Column("dropped %", "dropped"),
    Column("resident hits %", "resident_hits"),
    Column("without the term %", "resident_hits_without"),
    Column("µs/token", "token_microseconds"),
    Column("router µs/token", "router_microseconds"),
    Column("looks ahead", "looks_ahead"),
    Column("seeds", "seeds"),
)


def frame(records: Iterable[Record]) -> pd.DataFrame:
    """One row per record: labels, metrics, perplexity, its fingerprint and its ``identity`` (the config without seed).

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
            "fingerprint": record.fingerprint,
            "identity": json.dumps(identity, sort_keys=True, ensure_ascii=False),
            "dirty": bool(record.provenance.get("dirty", False)),
        }
    if not rows:
        raise ValueError("there are no records; run an experiment first: python -m experiments.run experiment=ablation")
    return ordered(with_perplexity(pd.DataFrame(rows.values())))


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
    return kind, 0, re.sub(r"\d+(\.\d+)?", lambda number: f"{float(number[0]):09.3f}", method)  # 2 before 2.3


def ordered(table: pd.DataFrame) -> pd.DataFrame:
    """Rows in the order of methods, columns in the order of ``FORMATS``, unknown metrics after them by name."""
    known = [*WORDS, *FORMATS, "fingerprint", "identity", "dirty"]
    columns = [name for name in known if name in table] + sorted(set(table.columns) - set(known))
    keys = [tuple(row) for row in table[[name for name in LABELS if name in table]].to_numpy().tolist()]
    method = CELL.index("method")
    rows = sorted(range(len(table)), key=lambda row: (keys[row][:method], rank(keys[row][method]), keys[row]))
    return table.iloc[rows][columns].reset_index(drop=True)


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
    labelled = {*LABELS, "fingerprint", "identity", "dirty"}
    groups = table.groupby([*CELL, "identity"], sort=False)
    means = groups[[name for name in table if name not in labelled]].agg(mean_of_all)
    means = means.assign(seeds=groups["seed"].nunique(), dirty=groups["dirty"].any())
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


def routers(records: Iterable[Record]) -> pd.DataFrame:
    """Mixtures of experts: means over seeds, the spread of NLL over seeds, and NLL against ``moe_top_k`` of the same
    seeds, with the 95 % interval over paired windows."""
    cells = by_cell(one for one in records if "train_loss" in one.series and "token_microseconds" in one.metrics)
    rows = []
    for labels, own in cells.items():
        names = dict.fromkeys(name for one in own for name in one.metrics)
        row: dict[str, Any] = dict(zip(CELL, labels, strict=True)) | {"seeds": len(own)}
        row |= {name: float(np.mean([one.metrics.get(name, np.nan) for one in own])) for name in names}
        if len(own) > 1:
            row["nll_spread"] = float(np.std([one.metrics["nll"] for one in own], ddof=1))
        others = cells.get((*labels[:-1], "moe_top_k"), [])
        seeds = {one.labels["seed"] for one in own} & {one.labels["seed"] for one in others}
        if seeds and labels[-1] != "moe_top_k":
            pairs = [[one for one in group if one.labels["seed"] in seeds] for group in (own, others)]
            mine, theirs = paired(pairs[0], pairs[1], "nll")
            row["nll_to_top_k"] = float((mine - theirs).mean())
            row["nll_to_top_k_low"], row["nll_to_top_k_high"] = compare.interval((mine - theirs).tolist())
        rows.append(row)
    return ordered(pd.DataFrame(rows)) if rows else pd.DataFrame()


def by_cell(records: Iterable[Record]) -> dict[tuple[str, ...], list[Record]]:
    """The records of each (experiment, model, dataset, measure, method)."""
    cells: dict[tuple[str, ...], list[Record]] = {}
    for record in records:
        cells.setdefault(tuple(record.labels[label] for label in CELL), []).append(record)
    return cells


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
                found[row, metric] = compare.sign_flip((ours - theirs).tolist())
    adjusted = dict(zip(found, compare.holm(list(found.values())), strict=True))
    columns = {
        f"{metric}_p": [adjusted.get((row, metric), np.nan) for row in range(len(means))]
        for metric in dict.fromkeys(metric for _, metric in found)
    }
    return ordered(means.assign(**columns))


def equal_bytes(records: Iterable[Record]) -> pd.DataFrame:
    """Each method beside ``nash_swarm`` at the method's own bytes: ``kl_at_bytes``, interpolated window by window on
    the line of log KL over log bytes, and ``kl_ratio``, that KL over the method's, with its paired 95 % interval.

    The sizes of ``nash_swarm`` come from all experiments with the same model, calibration and test text, whose runs saw
    at least the method's windows; seeds are averaged first.  A method whose bytes lie outside them has no ratio; one
    that meets fewer than two sizes has no row, and there may be none.
    """
    gathered = list(records)
    curve = [one for one in gathered if re.fullmatch(rf"{REFERENCE}(\[bits=[^,]*\])?", one.labels["method"])]
    rows = []
    for labels, own in by_cell(gathered).items():
        if labels[-1].startswith(REFERENCE) or any("kl" not in one.series for one in own):
            continue
        windows = len(own[0].series["kl"])
        steps: dict[str, list[Record]] = {}
        for one in curve:
            if circumstances(one) == circumstances(own[0]) and len(one.series.get("kl", [])) >= windows:
                steps.setdefault(json.dumps(one.config["method"], sort_keys=True), []).append(_first(one, windows))
        if len(steps) < 2:
            continue
        pairs = [paired(own, step, "kl") for step in steps.values()]
        kl, size = pairs[0][0], float(np.mean([one.metrics["bytes_file"] for one in own]))
        sizes = [float(np.mean([one.metrics["bytes_file"] for one in step])) for step in steps.values()]
        row = dict(zip(CELL, labels, strict=True)) | {"bytes_file": size, "kl": kl.mean()}
        row["kl_low"], row["kl_high"] = compare.interval(kl.tolist())
        if min(sizes) <= size <= max(sizes) and kl.mean() > 0:
            theirs = compare.at_bytes(sizes, np.array([other for _, other in pairs]), size)
            row["kl_at_bytes"] = theirs.mean()
            row["kl_ratio"], row["kl_ratio_low"], row["kl_ratio_high"] = compare.ratio(theirs.tolist(), kl.tolist())
        rows.append(row)
    return ordered(pd.DataFrame(rows)) if rows else pd.DataFrame(columns=CELL)


def circumstances(record: Record) -> dict[str, Any]:
    """Of a run's identity, all that must be the same for its windows to be paired with another's."""
    aside = {"method", "measure", "seed", "threads"}
    kept = {key: value for key, value in record.config.items() if key not in aside}
    return kept | {"dataset": {key: value for key, value in kept["dataset"].items() if key != "test_windows"}}


def _first(record: Record, windows: int) -> Record:
    """The record of the first windows alone."""
    kept = {name: values[:windows] for name, values in record.series.items() if name in ("kl", "tokens")}
    return dataclasses.replace(record, series=kept)


def speed(records: Iterable[Record]) -> pd.DataFrame:
    """One row per method and contestant of the records whose measure was ``speed``: the full model, the packed one with
    either kind of activations, and others timed beside them.  Ratios are the full model's time over theirs."""
    rows = []
    for record in records:
        names = [name.removeprefix("decode_ms_") for name in record.series if name.startswith("decode_ms_")]
        for name in names if record.labels["measure"] == "speed" else ():
            suffix = "" if name == "int8" else f"_{name}"
            keys = {metric: f"{metric}{suffix}" for metric in ("bytes_resident", "decode_ms")} | {"kl": f"kl_{name}"}
            for phase in ("decode", "decode_long", "prefill"):
                keys |= {f"{phase}_ratio{end}": f"{phase}_ratio{suffix}{end}" for end in ("", "_low", "_high")}
            found = {metric: record.metrics.get(key, np.nan) for metric, key in keys.items()}
            about = {label: record.labels[label] for label in CELL} | {"threads": record.config.get("threads")}
            rows.append(about | {"contestant": name} | found)
    return pd.DataFrame(rows)


def layers(records: Iterable[Record]) -> pd.DataFrame:
    """One row per method and weight matrix of the records whose measure was ``layers``, seeds averaged: what the matrix
    was predicted to cost (``layer_damage``) and what it costs when it alone is compressed, nats per token."""
    rows = [
        {label: record.labels[label] for label in CELL}
        | {"layer": layer["name"], "parameters": layer["parameters"], "bits_per_weight": layer["bits_per_weight"]}
        | {"layer_damage": layer.get("damage")}
        | {name: values[place] for name, values in record.series.items() if name.startswith("layer_")}
        for record in records
        if "layer_kl" in record.series
        for place, layer in enumerate(record.layers)
    ]
    if not rows:
        return pd.DataFrame(columns=[*CELL, "layer"])
    return ordered(pd.DataFrame(rows).groupby([*CELL, "layer"], sort=False).agg(mean_of_all).reset_index())


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
    """Raise ValueError if a run was made from uncommitted code: the paper quotes no such number."""
    dirty = sorted(set(table.loc[table["dirty"], "method"]))
    if dirty:
        raise ValueError(f"runs of {', '.join(dirty)} come from uncommitted code; commit and run them with rerun=true")


def text(row: pd.Series, metric: str) -> str:
    """The formatted value of ``metric``, with its 95 % interval where the row has one that is not a point."""
    value = row.get(metric)
    if value is None or pd.isna(value):
        return MISSING
    write = FORMATS.get(metric, fixed(4))
    written = write(value) + (MARK if row.get(f"{metric}_p", 1.0) <= LEVEL else "")
    low, high = row.get(f"{metric}_low"), row.get(f"{metric}_high")
    if low is None or high is None or pd.isna(low) or pd.isna(high) or low == high or metric == "perplexity":
        return written
    return f"{written} [{write(low)}, {write(high)}]"


def note(table: pd.DataFrame) -> str:
    """What the marks of a table mean; empty without tests."""
    tests = sum(int(table[name].notna().sum()) for name in (f"{metric}_p" for metric in TESTED) if name in table)
    if not tests:
        return ""
    return (
        f"{MARK} differs from {REFERENCE} on the same windows: sign-flip test, "
        f"{LEVEL} for the {tests} tests of this table together (Holm)."
    )


def cells(table: pd.DataFrame, columns: Sequence[Column] = COLUMNS) -> pd.DataFrame:
    """A table as text: the labels that vary, the method, and the columns that are not wholly empty."""
    varying = [label for label in CELL if label == "method" or table[label].nunique() > 1]
    varying += [label for label in ("layer", "contestant") if label in table]
    shown = [column for column in columns if column.metric in table and table[column.metric].notna().any()]
    if "threads" in table and table["threads"].nunique() > 1:
        shown.insert(0, Column("threads", "threads"))
    if "seeds" in table and (table["seeds"] > 1).any():
        shown.append(Column("seeds", "seeds"))
    content = {label: table[label].astype(str) for label in varying}
    for column in shown:
        content[column.heading] = pd.Series([text(row, column.metric) for _, row in table.iterrows()], dtype=str)
    return pd.DataFrame(content)


def terminal(table: pd.DataFrame, title: str | None = None, columns: Sequence[Column] = COLUMNS) -> Table:
    """A table for the terminal."""
    content = cells(table, columns)
    view = Table(title=title, caption=note(table) or None, header_style="bold", pad_edge=False)
    for heading in content:
        view.add_column(str(heading), justify="left" if heading in WORDS else "right", overflow="fold")
    for row in content.itertuples(index=False):
        view.add_row(*map(Text, row), style="bold" if "nash_swarm" in row else None)
    return view


def console() -> Console:
    """Where tables are printed: the terminal as it is, a wide page where there is none."""
    return Console() if sys.stdout.isatty() else Console(width=PAGE_WIDTH)


def markdown(table: pd.DataFrame, columns: Sequence[Column] = COLUMNS) -> str:
    """A table in Markdown, what its marks mean below it."""
    content = cells(table, columns)
    rule = [":--" if heading in WORDS else "--:" for heading in content]
    rows = [list(content.columns), rule, *content.to_numpy().tolist()]
    explained = f"\n{note(table)}\n" if note(table) else ""
    return "".join(f"| {' | '.join(row)} |\n" for row in rows) + explained


def csv(table: pd.DataFrame, columns: Sequence[Column] = COLUMNS) -> str:
    """Every column, shown or not, with every digit, one line per row."""
    return table.drop(columns=["identity", "dirty"], errors="ignore").to_csv(index=False, lineterminator="\n")


def latex(table: pd.DataFrame, columns: Sequence[Column] = COLUMNS) -> str:
    """A table as a LaTeX ``tabular`` with booktabs rules; the caption, and the note in it, belong to the paper."""
    content = cells(table, columns)
    alignment = "".join("l" if heading in WORDS else "r" for heading in content)
    style = content.style.hide(axis="index").format(tex).format_index(tex_heading, axis=1)
    return str(style.to_latex(hrules=True, column_format=f"@{{}}{alignment}@{{}}"))


ESCAPES = str.maketrans(
    {
        **{character: f"\\{character}" for character in "_%&#${}"},
        "\\": r"\textbackslash{}",
        "~": r"\textasciitilde{}",
        "^": r"\textasciicircum{}",
        "Δ": r"$\Delta$",
        "÷": r"$\div$",
        MARK: r"$^\dagger$",
    }
)


def tex(content: object) -> str:
    r"""``content`` in LaTeX: special characters escaped, minus signs and powers of ten set, intervals below.

    >>> print(tex("no_nash"), tex("2.1e-06"), tex("-0.5"))
    no\_nash $2.1{\cdot}10^{-6}$ $-$0.5
    """
    plain = str(content)
    if plain == MISSING:
        return "--"
    if power := re.fullmatch(r"(-?[\d.]+)e([+-]\d+)", plain):
        return rf"${power[1]}{{\cdot}}10^{{{int(power[2])}}}$"
    escaped = re.sub(r"(?<![\w-])-(?=\d)", "$-$", plain.translate(ESCAPES))
    below = r"\\begin{tabular}[t]{@{}r@{}}\1\\\\[-2pt]{\\tiny\2}\\end{tabular}"
    return re.sub(r"^(.*) (\[.*\])$", below, escaped)


def tex_heading(content: object) -> str:
    """``content`` in LaTeX, one word below the other."""
    words = tex(content).split()
    stacked = r"\\".join(words)
    return stacked if len(words) == 1 else rf"\begin{{tabular}}[b]{{@{{}}r@{{}}}}{stacked}\end{{tabular}}"


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
