"""The page of an experiment: one HTML file without external resources, made from records alone.

It has the command that made the runs, tables that sort by any column, figures of quality, convergence, speed, latency
and expert load, the bits of every layer, and the provenance of each record.  ``page.css`` and ``page.js`` go into it.
"""

import functools
import html
import pathlib
import re
import shlex
from collections.abc import Callable, Iterable, Sequence

import pandas as pd
from matplotlib.figure import Figure

from nashswarm.records.record import Record
from nashswarm.reporting import frame, labels, tables, typeset
from nashswarm.reporting.figures import games, moe, quality, speed
from nashswarm.reporting.formats import FORMATS, UNCLEAN
from nashswarm.reporting.page_figures import bits, drawing

PLACE = ("model", "dataset", "measure")  # one figure shows one of each
STYLE, SCRIPT = (pathlib.Path(__file__).with_name(name).read_text() for name in ("page.css", "page.js"))
MOST = 8  # columns of a special table that are shown at once; the others on demand
FOLDS = "\n".join(
    f".all:not(:checked) ~ .keep{count} tr > :nth-child(n+{count + 1}) {{ display: none }}" for count in range(1, 20)
)


def page(records: Sequence[Record], made_by: Sequence[str] = ()) -> str:
    """Return the page of the records of one experiment; each model, text and measure has a section of its own.

    ``made_by``: the commands that made the runs; default: those that follow from their labels.

    Raises ValueError if there is no record, or if the records are of several experiments.
    """
    table = frame.frame(records)
    names = sorted(set(table["experiment"]))
    if len(names) > 1:
        raise ValueError(f"one page shows one experiment, not {', '.join(names)}; select one first")
    title = html.escape(names[0])
    parts = [f"<h1>{title}</h1>", head(records, made_by or commands(records))]
    for place in table[list(PLACE)].drop_duplicates().itertuples(index=False, name=None):
        here = [one for one in records if tuple(one.labels[label] for label in PLACE) == place]
        parts += section(place, frame.select(table, **dict(zip(PLACE, place, strict=True))), here)
    parts += ["<h2>Runs</h2>", runs(records)]
    return (
        f'<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta name="viewport" content="width=device-width">\n<link rel="icon" href="data:,">\n'
        f"<title>{title}</title>\n<style>{STYLE}{FOLDS}</style>\n</head>\n<body>\n"
        + "\n".join(parts)
        + f"\n<script>{SCRIPT}</script>\n</body>\n</html>\n"
    )


def head(records: Sequence[Record], made_by: Sequence[str]) -> str:
    """Return what the page opens with: how many runs of what code, and the commands that made them."""
    made = f"{len(records)} run{'s' * (len(records) > 1)}, the last of commit {newest(records)[:7]}, made by"
    return f"<p>{made}</p>\n" + "\n".join(f"<p><code>{html.escape(line)}</code></p>" for line in made_by)


def commands(records: Sequence[Record]) -> list[str]:
    """Return the command that makes an experiment, or those that make single runs.

    A model or a text in a folder stands there by its name alone: no record keeps paths.

    >>> labels = {"experiment": "single", "method": "gptq[bits=4]", "model": "default", "dataset": "stdlib_docs"}
    >>> commands([Record(labels | {"measure": "quality", "seed": "1"}, {}, {}, {}, [], "", {})])
    ['python -m experiments.run method=gptq method.bits=4 model=default dataset=stdlib_docs measure=quality seed=1']
    """
    experiment = records[0].labels["experiment"]
    if experiment != "single":
        return [f"python -m experiments.run experiment={shlex.quote(experiment)}"]
    lines = []
    for one in records:
        words = []
        for name in ("method", "model", "dataset", "measure", "seed"):
            choice, _, inside = one.labels[name].removesuffix("]").partition("[")
            words.append(f"{name}={choice}")
            words += [f"{name}.{override}" for override in re.split(r",(?![^\[]*\])", inside) if override]
        lines.append(shlex.join(["python", "-m", "experiments.run", *words]))
    return sorted(set(lines))


def section(place: Sequence[str], rows: pd.DataFrame, records: Sequence[Record]) -> list[str]:
    """Return tables and figures of one model, dataset and measure."""
    means = frame.tested(frame.points(rows.dropna(axis=1, how="all")), records)
    main_table = tables.special_table(records) or (means, typeset.COLUMNS)
    more_tables = [(tables.speed(records), tables.SPEED), (tables.layers(records), tables.LAYERS)]
    parts = [f"<h2>{html.escape(' · '.join(place))}</h2>"]
    for table, columns in [main_table, *(pair for pair in more_tables if len(pair[0]))]:
        parts += [results(table, columns, newest(records)), f"<p>{html.escape(typeset.note(table))}</p>"]
    parts.append(drawing(lambda: quality.pareto(means), "Quality against size", means))
    parts.append(drawing(lambda: quality.pareto(means, size="bytes_resident"), "Quality against memory", means))
    drawings = {"Convergence of the games": lambda: games.convergence(records)} | special_figures(records)
    parts += [drawing(draw, caption) for caption, draw in drawings.items()]
    for one in sorted({one.labels["method"]: one for one in records}.values(), key=_rank):
        parts += bits(one)
    return parts


def special_figures(records: Sequence[Record]) -> dict[str, Callable[[], Figure]]:
    """Return the figures, by caption, that only some experiments have the measurements for."""
    served, timed, layers = tables.serving(records), tables.speed(records), tables.layers(records)
    figures: dict[str, Callable[[], Figure]] = {}
    for method, rows in list(served.groupby("method", sort=False)) if len(served) else []:
        figures[f"What clients of a server wait, {method}"] = functools.partial(speed.latency, rows)
    if any(name.startswith("load_") for one in records for name in one.series):
        figures["How evenly experts work"] = lambda: moe.crowding(records)
    if len(timed):
        figures |= {"Speed": lambda: speed.speed(timed), "Memory": lambda: speed.memory(timed)}
    if "layer_damage" in layers and (layers[["layer_damage", "layer_kl"]] > 0).all(axis=1).any():
        figures["Predicted and measured damage of single matrices"] = lambda: quality.sensitivity(layers)
    return figures


def newest(records: Sequence[Record]) -> str:
    """Return the commit of the run that began last."""
    last = max(records, key=lambda one: str(one.provenance.get("started", "")))
    return str(last.provenance.get("commit") or "unknown")


def flag(commits: Iterable[str], dirty: bool, last: str) -> str:
    """Return a cell that names uncommitted code, and commits other than ``last``, that runs were made from."""
    older = [commit[:7] for commit in dict.fromkeys(commits) if commit not in (last, "unknown")]
    warnings = [
        *(["uncommitted or unknown code"] if dirty else []),
        *([f"older code: {', '.join(older)}"] if older else []),
    ]
    inside = f'<span class="flag">{"; ".join(warnings)}</span>' if warnings else ""
    return f'<td data-value="{len(warnings)}">{inside}</td>'


def results(table: pd.DataFrame, columns: Sequence[typeset.Column], last: str) -> str:
    """Return a table, each cell with its number to sort by; ``last`` is the newest commit among the records."""
    known = [column for column in columns if column.metric in table and table[column.metric].notna().any()]
    few = [column for column in known if column.metric in typeset.FIRST] if columns is typeset.COLUMNS else known[:MOST]
    shown = few or known
    rest = [column for column in known if column not in shown]
    main = labels.tested_against(table["method"])
    words = ["method", *(name for name in ("layer", "contestant") if name in table)]
    lines = []
    for _, row in table.iterrows():
        mark = UNCLEAN if row["dirty"] else ""
        cells = [_cell(row[name] + (mark if name == "method" else ""), row[name], "word") for name in words]
        cells += [_number(row, column) for column in shown]
        cells.append(flag(row["commit"].split(), row["dirty"], last))
        cells += [_number(row, column) for column in rest]
        ours = ' class="ours"' if row["method"].partition("[")[0] == main else ""
        lines.append(f"<tr{ours}>{''.join(cells)}</tr>")
    heads = [*words, *(column.heading for column in shown), ""]
    return _table([*heads, *(column.heading for column in rest)], lines, len(heads))


def runs(records: Sequence[Record]) -> str:
    """Return the table of where each record comes from; one made by uncommitted or older code is flagged."""
    lines = []
    for one in sorted(records, key=lambda one: (_rank(one), one.labels["seed"])):
        origin = one.provenance
        commit = str(origin.get("commit") or "unknown")
        cells = [_cell(one.labels[name], one.labels[name], "word") for name in ("method", "model", "dataset", "seed")]
        seconds = one.metrics.get("seconds", float("nan"))
        cells += [_cell(FORMATS["seconds"](seconds), repr(seconds)), _cell(one.fingerprint, one.fingerprint)]
        cells.append(_cell(commit[:10], commit))
        beside = [other for other in records if all(other.labels[name] == one.labels[name] for name in PLACE)]
        cells.append(flag([commit], origin.get("dirty") is not False, newest(beside)))
        cells += [_cell(str(origin.get(name, "")), str(origin.get(name, ""))) for name in ("started", "machine")]
        lines.append(f"<tr>{''.join(cells)}</tr>")
    heads = ["method", "model", "dataset", "seed", "seconds", "record", "commit", ""]
    return _table([*heads, "started", "machine"], lines, len(heads))


def _rank(one: Record) -> tuple[int, int, str]:
    return labels.rank(one.labels["method"])


def _cell(text: str, value: str, kind: str = "") -> str:
    kind_attribute = f' class="{kind}"' if kind else ""
    return f'<td{kind_attribute} data-value="{html.escape(value)}">{html.escape(text)}</td>'


def _number(row: pd.Series, column: typeset.Column) -> str:
    value = row[column.metric]
    return _cell(typeset.text(row, column.metric), "" if pd.isna(value) else repr(float(value)))


def _table(heads: Sequence[str], lines: Sequence[str], kept: int) -> str:
    """Return a table that shows the first ``kept`` columns; a box above it shows the others."""
    names = "".join(f'<th scope="col"><button>{html.escape(name)}</button></th>' for name in heads)
    rest, folded, box = len(heads) - kept, "", ""
    if rest:
        folded, more = f" keep{kept}", f"{rest} more column{'s' * (rest > 1)}"
        box = f'<input type="checkbox" class="all" title="{more}"> <span class="rest">{more}</span>'
    table, body = f'<table class="sortable{folded}">', "\n".join(lines)
    return f"<div>{box}{table}<thead><tr>{names}</tr></thead><tbody>\n{body}\n</tbody></table></div>"
