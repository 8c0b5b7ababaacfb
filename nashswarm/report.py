"""Reports: records in, one data frame, and the tables, macros and summaries made from it.

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
from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from nashswarm.record import Record

CELL = ["experiment", "model", "dataset", "measure", "method"]
LABELS = [*CELL, "seed"]
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
    "nll_delta": signed(4),
    "nll_delta_low": signed(4),
    "nll_delta_high": signed(4),
    "kl": fixed(4),
    "kl_low": fixed(4),
    "kl_high": fixed(4),
    "top1_agreement": fixed(1, 100.0),
    **{f"{name}{suffix}": fixed(1, 100.0) for name in OFFICIAL for suffix in ("", "_full")},
    "examples": fixed(0),
    "tokens": fixed(0),
    "windows": fixed(0),
    "damage": fixed(4),
    "regret_max": scientific,
    "regret_mean": scientific,
    "potential_start": fixed(4),
    "potential_end": fixed(4),
    "price": scientific,
    "sweeps": fixed(0),
    "flock_moves": fixed(0),
    "quantize_seconds": fixed(1),
    "seconds": fixed(1),
    "peak_bytes": fixed(0, 1e-6),
    "bytes_resident": fixed(2, 1e-6),
    "decode_ms": fixed(2),
    "decode_ratio": fixed(2),
    "prefill_tokens_per_second": fixed(0),
    "seeds": fixed(0),
}


@dataclasses.dataclass(frozen=True)
class Column:
    """One column of the main table: its heading, with the unit, and the metric under it."""

    heading: str
    metric: str


COLUMNS = (
    Column("bits/param", "bits_per_weight_model"),
    Column("MB", "bytes_file"),
    Column("saved %", "compression"),
    Column("perplexity", "perplexity"),
    Column("ΔNLL (nats)", "nll_delta"),
    Column("KL (nats)", "kl"),
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
    Column("MB in memory", "bytes_resident"),
    Column("× decode", "decode_ratio"),
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
    return kind, 0, method


def ordered(table: pd.DataFrame) -> pd.DataFrame:
    """Rows in the order of methods, columns in the order of ``FORMATS``, unknown metrics after them by name."""
    known = [*LABELS, *FORMATS, "fingerprint", "identity", "dirty"]
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
    missing in the mean as well.
    """
    labelled = {*LABELS, "fingerprint", "identity", "dirty"}
    groups = table.groupby([*CELL, "identity"], sort=False)
    means = groups[[name for name in table if name not in labelled]].agg(mean_of_all)
    means = means.assign(seeds=groups["seed"].nunique(), dirty=groups["dirty"].any())
    return ordered(with_perplexity(means.reset_index()))


def average(table: pd.DataFrame) -> pd.DataFrame:
    """Means over seeds, one row per (experiment, model, dataset, measure, method).

    Raises ValueError if the runs of one row differ in more than the seed, and says in what.
    """
    means = points(table)
    for cell, runs in means.groupby(CELL, sort=False):
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
    low, high = row.get(f"{metric}_low"), row.get(f"{metric}_high")
    if low is None or high is None or pd.isna(low) or pd.isna(high) or low == high or metric == "perplexity":
        return write(value)
    return f"{write(value)} [{write(low)}, {write(high)}]"


def cells(table: pd.DataFrame) -> pd.DataFrame:
    """The main table as text: the labels that vary, the method, and the columns that are not wholly empty."""
    varying = [label for label in CELL if label == "method" or table[label].nunique() > 1]
    shown = [column for column in COLUMNS if column.metric in table and table[column.metric].notna().any()]
    if "seeds" in table and (table["seeds"] > 1).any():
        shown.append(Column("seeds", "seeds"))
    content = {label: table[label].astype(str) for label in varying}
    for column in shown:
        content[column.heading] = pd.Series([text(row, column.metric) for _, row in table.iterrows()], dtype=str)
    return pd.DataFrame(content)


def terminal(table: pd.DataFrame, title: str | None = None) -> Table:
    """The main table for the terminal."""
    content = cells(table)
    view = Table(title=title, header_style="bold", pad_edge=False)
    for heading in content:
        view.add_column(str(heading), justify="left" if heading in LABELS else "right", overflow="fold")
    for row in content.itertuples(index=False):
        view.add_row(*map(Text, row), style="bold" if "nash_swarm" in row else None)
    return view


def console() -> Console:
    """Where tables are printed: the terminal as it is, a wide page where there is none."""
    return Console() if sys.stdout.isatty() else Console(width=PAGE_WIDTH)


def markdown(table: pd.DataFrame) -> str:
    """The main table in Markdown."""
    content = cells(table)
    rule = [":--" if heading in LABELS else "--:" for heading in content]
    rows = [list(content.columns), rule, *content.to_numpy().tolist()]
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def csv(table: pd.DataFrame) -> str:
    """Every column with every digit, one line per row."""
    return table.drop(columns=["identity", "dirty"], errors="ignore").to_csv(index=False, lineterminator="\n")


def latex(table: pd.DataFrame) -> str:
    """The main table as a LaTeX ``tabular`` with booktabs rules; the caption belongs to the paper."""
    content = cells(table)
    alignment = "".join("l" if heading in LABELS else "r" for heading in content)
    style = content.style.hide(axis="index").format(tex).format_index(tex_heading, axis=1)
    return str(style.to_latex(hrules=True, column_format=f"@{{}}{alignment}@{{}}"))


ESCAPES = str.maketrans(
    {
        **{character: f"\\{character}" for character in "_%&#${}"},
        "\\": r"\textbackslash{}",
        "~": r"\textasciitilde{}",
        "^": r"\textasciicircum{}",
        "Δ": r"$\Delta$",
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


def macro_name(*words: str) -> str:
    """A LaTeX command name: letters only, digits spelled.

    >>> macro_name("uniform4", "top1_agreement")
    'UniformFourTopOneAgreement'
    """
    digits = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
    spelled = re.sub(r"\d", lambda digit: f"_{digits[int(digit[0])]}_", "_".join(words))
    return "".join(part.capitalize() for part in re.split(r"[^A-Za-z]+", spelled))


def macros(table: pd.DataFrame) -> str:
    r"""``\newcommand`` lines: every metric of every method, and what they were measured on.

    Units are those of the table: megabytes for bytes, per cent for shares, nats per token.  Raises ValueError if a
    method has several rows (several models, say), or if methods were measured on different windows.
    """
    several = [label for label in CELL if label != "method" and table[label].nunique() > 1]
    if several:
        raise ValueError(f"numbers for prose need one value of {', '.join(several)}; select one before asking for them")
    uneven = [name for name in ("tokens", "windows") if name in table and table[name].nunique() > 1]
    if uneven:
        raise ValueError(f"the methods were measured on different {', '.join(uneven)}; measure them on the same text")
    first = table.iloc[0]
    values = {macro_name(label, "name"): tex(first[label]) for label in ("model", "dataset", "measure")}
    values |= {macro_name(name, "count"): text(first, name) for name in ("tokens", "windows") if name in table}
    values[macro_name("seeds", "count")] = FORMATS["seeds"](table["seeds"].max())
    for _, row in table.iterrows():
        for metric, write in FORMATS.items():
            if metric in table and pd.notna(row[metric]):
                values[macro_name(str(row["method"]), metric)] = tex(write(row[metric]))
    lines = [rf"\newcommand{{\{name}}}{{{value}}}" for name, value in values.items()]
    return "\n".join(["% Written by scripts/tables.py from the records; do not edit.", *lines, ""])


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
    """What a sweep did: counts, the table of its records, and for each failed job why and where its log is."""
    statuses = [outcome["status"] for outcome in outcomes]
    counts = [f"{statuses.count(status)} {status}" for status in ("finished", "skipped", "failed")]
    parts: list[Text | Table] = [Text(f"{len(outcomes)} jobs: {', '.join(counts)}")]
    gathered = list(records)
    if gathered:
        parts.append(terminal(points(frame(gathered))))
    for outcome in outcomes:
        if outcome["status"] == "failed":
            name = " ".join(outcome.get("overrides") or outcome["labels"].values()) or "unknown job"
            reason = next(iter(str(outcome["message"]).splitlines()), "no message")
            parts.append(Text(f"failed: {name}\n  {reason}\n  log: {outcome['log']}"))
    return Group(*parts)
