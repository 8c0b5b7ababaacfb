"""The page of an experiment: one HTML file without external resources, made from records alone.

It has tables that sort by any column, figures of quality, convergence, speed, latency and expert load, the bits of
every layer, and the provenance of each record.
"""

import base64
import functools
import html
import io
from collections.abc import Callable, Iterable, Sequence

import matplotlib
import matplotlib.image
import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from numpy.typing import NDArray

from nashswarm.records.record import Record
from nashswarm.reporting import frame, labels, tables, typeset
from nashswarm.reporting.figures import games, moe, quality, speed
from nashswarm.reporting.figures.style import NothingToDraw, shade
from nashswarm.reporting.formats import FORMATS, UNCLEAN

PLACE = ("model", "dataset", "measure")  # one figure shows one of each
STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; margin: 2rem auto; max-width: 75rem; padding: 0 1rem; color: #222 }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; display: block; overflow-x: auto }
th, td { padding: .25rem .6rem; text-align: right; border-bottom: 1px solid #ddd; white-space: nowrap }
th:first-child, td:first-child, td.word { text-align: left }
th button { all: unset; cursor: pointer; font-weight: 600 }
th button:focus-visible { outline: 2px solid #0072B2 }
th[aria-sort=ascending] button::after { content: " ▲" }
th[aria-sort=descending] button::after { content: " ▼" }
tr.ours { font-weight: 600 }
.flag { color: #A33 }
figure { margin: 1rem 0 } figure img { max-width: 100% }
figcaption { color: #555 }
figure.map { display: inline-block; vertical-align: bottom; margin: .5rem }
figure.map img { image-rendering: pixelated; border: 1px solid #999 }
figure.map figcaption { font-size: .75rem }
.width { display: inline-block; width: 1em; height: 1em; margin: 0 .3em 0 1em; border: 1px solid #999 }
"""
SCRIPT = """
for (const table of document.querySelectorAll("table.sortable"))
  table.querySelectorAll("th button").forEach((button, column) => button.addEventListener("click", () => {
    const head = button.parentElement, up = head.getAttribute("aria-sort") !== "ascending";
    table.querySelectorAll("th").forEach(other => other.removeAttribute("aria-sort"));
    head.setAttribute("aria-sort", up ? "ascending" : "descending");
    const key = row => row.cells[column].dataset.value;
    const number = value => value === "" ? NaN : Number(value);
    const compare = (a, b) => {
      const [x, y] = [number(key(a)), number(key(b))];
      if (isNaN(x) && isNaN(y)) return key(a).localeCompare(key(b)) * (up ? 1 : -1);
      if (isNaN(x) || isNaN(y)) return isNaN(x) - isNaN(y);
      return (x - y) * (up ? 1 : -1);
    };
    const body = table.tBodies[0];
    body.append(...[...body.rows].sort(compare));
  }));
"""


def page(records: Sequence[Record]) -> str:
    """Return the page of the records of one experiment; each model, text and measure has a section of its own.

    Raises ValueError if there is no record, or if the records are of several experiments.
    """
    table = frame.frame(records)
    names = sorted(set(table["experiment"]))
    if len(names) > 1:
        raise ValueError(f"one page shows one experiment, not {', '.join(names)}; select one first")
    title = html.escape(names[0])
    parts = [f"<h1>{title}</h1>"]
    for place in table[list(PLACE)].drop_duplicates().itertuples(index=False, name=None):
        here = [one for one in records if tuple(one.labels[label] for label in PLACE) == place]
        parts += section(place, frame.select(table, **dict(zip(PLACE, place, strict=True))), here)
    parts += ["<h2>Runs</h2>", runs(records)]
    return (
        f'<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta name="viewport" content="width=device-width">\n<link rel="icon" href="data:,">\n'
        f"<title>{title}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n"
        + "\n".join(parts)
        + f"\n<script>{SCRIPT}</script>\n</body>\n</html>\n"
    )


def section(place: Sequence[str], rows: pd.DataFrame, records: Sequence[Record]) -> list[str]:
    """Return tables and figures of one model, dataset and measure."""
    means = frame.tested(frame.points(rows.dropna(axis=1, how="all")), records)
    main_table = tables.special_table(records) or (means, typeset.COLUMNS)
    more_tables = [(tables.speed(records), tables.SPEED), (tables.layers(records), tables.LAYERS)]
    parts = [f"<h2>{html.escape(' · '.join(place))}</h2>"]
    for table, columns in [main_table, *(pair for pair in more_tables if len(pair[0]))]:
        parts += [results(table, columns, newest(records)), f"<p>{html.escape(typeset.note(table))}</p>"]
    drawings = {
        "Quality against size": lambda: quality.pareto(means),
        "Convergence of the games": lambda: games.convergence(records),
    } | special_figures(records)
    parts += [figure for caption, draw in drawings.items() if (figure := drawing(draw, caption))]
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
    shown = [column for column in columns if column.metric in table and table[column.metric].notna().any()]
    words = ["method", *(name for name in ("layer", "contestant") if name in table)]
    lines = []
    for _, row in table.iterrows():
        mark = UNCLEAN if row["dirty"] else ""
        cells = [_cell(row[name] + (mark if name == "method" else ""), row[name], "word") for name in words]
        for column in shown:
            value = row[column.metric]
            cells.append(_cell(typeset.text(row, column.metric), "" if pd.isna(value) else repr(float(value))))
        cells.append(flag(row["commit"].split(), row["dirty"], last))
        ours = ' class="ours"' if row["method"] == labels.REFERENCE else ""
        lines.append(f"<tr{ours}>{''.join(cells)}</tr>")
    return _table([*words, *(column.heading for column in shown), ""], lines)


def runs(records: Sequence[Record]) -> str:
    """Return the table of where each record comes from; one made by uncommitted or older code is flagged."""
    lines = []
    for one in sorted(records, key=lambda one: (_rank(one), one.labels["seed"])):
        origin = one.provenance
        commit = str(origin.get("commit") or "unknown")
        cells = [_cell(one.labels[name], one.labels[name], "word") for name in ("method", "model", "dataset", "seed")]
        cells += [_cell(one.fingerprint, one.fingerprint), _cell(commit[:10], commit)]
        beside = [other for other in records if all(other.labels[name] == one.labels[name] for name in PLACE)]
        cells.append(flag([commit], origin.get("dirty") is not False, newest(beside)))
        cells += [_cell(str(origin.get(name, "")), str(origin.get(name, ""))) for name in ("started", "machine")]
        seconds = one.metrics.get("seconds", float("nan"))
        cells.append(_cell(FORMATS["seconds"](seconds), repr(seconds)))
        lines.append(f"<tr>{''.join(cells)}</tr>")
    heads = ["method", "model", "dataset", "seed", "record", "commit", "", "started", "machine", "seconds"]
    return _table(heads, lines)


def bits(one: Record) -> list[str]:
    """Return a folded section with the bits of every layer of a run, and a map of every layer of several widths."""
    if not one.layers:
        return []
    method = html.escape(one.labels["method"])
    tiled = games.tiles(one.allocation)
    several = [layer for layer, grid in tiled.items() if len(set(grid.flat)) > 1]
    bars = drawing(lambda: games.layer_bits(one), f"Stored bits per weight of every layer, {method}")
    maps = [bit_map(layer, tiled[layer]) for layer in several]
    widths = sorted({int(width) for layer in several for width in tiled[layer].flat})
    legend = [f'<span class="width" style="background:{_colour(width)}"></span>{width} bits' for width in widths]
    return [
        f'<details class="bits"><summary>Bits of {method}, seed {one.labels["seed"]}</summary>',
        bars,
        f"<p>{' '.join(legend)}</p>" if legend else "",
        *maps,
        "</details>",
    ]


def bit_map(layer: str, grid: NDArray[np.int64]) -> str:
    """Return a picture with one pixel per tile of a layer, coloured by bits: row blocks down, column groups across."""
    content = io.BytesIO()
    picture = np.array([shade(int(width)) for width in grid.flat]).reshape(*grid.shape, 3)
    matplotlib.image.imsave(content, picture, format="png")
    caption = html.escape(f"{layer}: {grid.shape[0]} × {grid.shape[1]} tiles")
    size = f'width="{8 * grid.shape[1]}" height="{min(8 * grid.shape[0], 400)}"'
    return (
        f'<figure class="map"><img alt="{caption}" {size} src="{_inline(content, "image/png")}">'
        f"<figcaption>{caption}</figcaption></figure>"
    )


def drawing(draw: Callable[[], Figure], caption: str) -> str:
    """Return a figure inside the page, or an empty string if no record has the values that it shows."""
    content = io.BytesIO()
    try:
        with matplotlib.rc_context({"svg.hashsalt": "nashswarm", "figure.constrained_layout.use": True}):
            draw().savefig(content, format="svg", metadata={"Date": None})
    except NothingToDraw:
        return ""
    text = html.escape(caption)
    return (
        f'<figure><img alt="{text}" src="{_inline(content, "image/svg+xml")}"><figcaption>{text}</figcaption></figure>'
    )


def _inline(content: io.BytesIO, kind: str) -> str:
    return f"data:{kind};base64,{base64.b64encode(content.getvalue()).decode()}"


def _colour(width: int) -> str:
    return "#" + "".join(f"{round(255 * part):02x}" for part in shade(width))


def _rank(one: Record) -> tuple[int, int, str]:
    return labels.rank(one.labels["method"])


def _cell(text: str, value: str, kind: str = "") -> str:
    kind_attribute = f' class="{kind}"' if kind else ""
    return f'<td{kind_attribute} data-value="{html.escape(value)}">{html.escape(text)}</td>'


def _table(heads: Sequence[str], lines: Sequence[str]) -> str:
    head = "".join(f'<th scope="col"><button>{html.escape(name)}</button></th>' for name in heads)
    return f'<table class="sortable"><thead><tr>{head}</tr></thead><tbody>\n' + "\n".join(lines) + "\n</tbody></table>"
