"""The page of an experiment: one HTML file that needs nothing beside it, made from records alone.

Tables that sort by any column, quality against size, the sweeps of the games, speed, what clients wait, how evenly
experts work, the bits of every layer, and where each record comes from.
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
from nashswarm.reporting import charts, curves, frame, tables, typeset

PLACE = ("model", "dataset", "measure")  # what one chart has one of
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
    """The page of the records of one experiment; runs of other models, texts or measures have sections of their own.

    Raises ValueError if there is no record, or if the records are of several experiments.
    """
    table = frame.frame(records)
    names = sorted(set(table["experiment"]))
    if len(names) > 1:
        raise ValueError(f"one page shows one experiment, not {', '.join(names)}; select one first")
    title = html.escape(names[0])
    parts = [f"<h1>{title}</h1>"]
    for place in table[list(PLACE)].drop_duplicates().itertuples(index=False, name=None):
        own = [one for one in records if tuple(one.labels[label] for label in PLACE) == place]
        parts += section(place, frame.select(table, **dict(zip(PLACE, place, strict=True))), own)
    parts += ["<h2>Runs</h2>", runs(records)]
    return (
        f'<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta name="viewport" content="width=device-width">\n<link rel="icon" href="data:,">\n'
        f"<title>{title}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n"
        + "\n".join(parts)
        + f"\n<script>{SCRIPT}</script>\n</body>\n</html>\n"
    )


def section(place: Sequence[str], rows: pd.DataFrame, records: Sequence[Record]) -> list[str]:
    """Tables and figures of one model, dataset and measure."""
    means = frame.tested(frame.points(rows.dropna(axis=1, how="all")), records)
    table, columns = tables.unlike(records) or (means, typeset.COLUMNS)
    seconds = [(tables.speed(records), tables.SPEED), (tables.layers(records), tables.LAYERS)]
    parts = [f"<h2>{html.escape(' · '.join(place))}</h2>"]
    for own, its in [(table, columns), *(second for second in seconds if len(second[0]))]:
        parts += [results(own, its, newest(records)), f"<p>{html.escape(typeset.note(own))}</p>"]
    drawn = {
        "Quality against size": lambda: curves.pareto(means),
        "Convergence of the games": lambda: curves.convergence(records),
    } | special(records)
    parts += [shown for caption, draw in drawn.items() if (shown := drawing(draw, caption))]
    for one in sorted({one.labels["method"]: one for one in records}.values(), key=lambda one: _rank(one)):
        parts += bits(one)
    return parts


def special(records: Sequence[Record]) -> dict[str, Callable[[], Figure]]:
    """The figures, by caption, of what only some experiments measure."""
    served, timed, layers = tables.serving(records), tables.speed(records), tables.layers(records)
    found: dict[str, Callable[[], Figure]] = {}
    for method, rows in list(served.groupby("method", sort=False)) if len(served) else []:
        found[f"What clients of a server wait, {method}"] = functools.partial(charts.latency, rows)
    if any(name.startswith("load_") for one in records for name in one.series):
        found["How evenly experts work"] = lambda: charts.crowding(records)
    if len(timed):
        found |= {"Speed": lambda: charts.speed(timed), "Memory": lambda: charts.memory(timed)}
    if "layer_damage" in layers and (layers[["layer_damage", "layer_kl"]] > 0).all(axis=1).any():
        found["Predicted and measured damage of single matrices"] = lambda: charts.sensitivity(layers)
    return found


def newest(records: Sequence[Record]) -> str:
    """The commit of the run that began last."""
    last = max(records, key=lambda one: str(one.provenance.get("started", "")))
    return str(last.provenance.get("commit") or "unknown")


def flag(commits: Iterable[str], dirty: bool, last: str) -> str:
    """A cell that tells runs of code that was not committed, or of other commits than the ``last`` one."""
    older = [commit[:7] for commit in dict.fromkeys(commits) if commit not in (last, "unknown")]
    told = [
        *(["uncommitted or unknown code"] if dirty else []),
        *([f"older code: {', '.join(older)}"] if older else []),
    ]
    inside = f'<span class="flag">{"; ".join(told)}</span>' if told else ""
    return f'<td data-value="{len(told)}">{inside}</td>'


def results(table: pd.DataFrame, columns: Sequence[typeset.Column], last: str) -> str:
    """A table, each cell with its number to sort by; ``last``: the commit that its rows should be of."""
    shown = [column for column in columns if column.metric in table and table[column.metric].notna().any()]
    words = ["method", *(name for name in ("layer", "contestant") if name in table)]
    lines = []
    for _, row in table.iterrows():
        mark = typeset.UNCLEAN if row["dirty"] else ""
        cells = [_cell(row[name] + (mark if name == "method" else ""), row[name], "word") for name in words]
        for column in shown:
            value = row[column.metric]
            cells.append(_cell(typeset.text(row, column.metric), "" if pd.isna(value) else repr(float(value))))
        cells.append(flag(row["commit"].split(), row["dirty"], last))
        ours = ' class="ours"' if row["method"] == typeset.REFERENCE else ""
        lines.append(f"<tr{ours}>{''.join(cells)}</tr>")
    return _table([*words, *(column.heading for column in shown), ""], lines)


def runs(records: Sequence[Record]) -> str:
    """Where each record comes from; one made by uncommitted or older code is flagged."""
    lines = []
    for one in sorted(records, key=lambda one: (_rank(one), one.labels["seed"])):
        found = one.provenance
        commit = str(found.get("commit") or "unknown")
        cells = [_cell(one.labels[name], one.labels[name], "word") for name in ("method", "model", "dataset", "seed")]
        cells += [_cell(one.fingerprint, one.fingerprint), _cell(commit[:10], commit)]
        beside = [other for other in records if all(other.labels[name] == one.labels[name] for name in PLACE)]
        cells.append(flag([commit], found.get("dirty") is not False, newest(beside)))
        cells += [_cell(str(found.get(name, "")), str(found.get(name, ""))) for name in ("started", "machine")]
        seconds = one.metrics.get("seconds", float("nan"))
        cells.append(_cell(typeset.FORMATS["seconds"](seconds), repr(seconds)))
        lines.append(f"<tr>{''.join(cells)}</tr>")
    heads = ["method", "model", "dataset", "seed", "record", "commit", "", "started", "machine", "seconds"]
    return _table(heads, lines)


def bits(one: Record) -> list[str]:
    """The bits of every layer of a run, and the map of every layer made of tiles of several widths, folded away."""
    if not one.layers:
        return []
    method = html.escape(one.labels["method"])
    tiled = curves.tiles(one.allocation)
    several = [layer for layer, grid in tiled.items() if len(set(grid.flat)) > 1]
    bars = drawing(lambda: curves.layer_bits(one), f"Stored bits per weight of every layer, {method}")
    maps = [bit_map(layer, tiled[layer]) for layer in several]
    widths = sorted({int(width) for layer in several for width in tiled[layer].flat})
    legend = [f'<span class="width" style="background:{_ink(width)}"></span>{width} bits' for width in widths]
    return [
        f'<details class="bits"><summary>Bits of {method}, seed {one.labels["seed"]}</summary>',
        bars,
        f"<p>{' '.join(legend)}</p>" if legend else "",
        *maps,
        "</details>",
    ]


def bit_map(layer: str, grid: NDArray[np.int64]) -> str:
    """One pixel for each tile of a layer, coloured by its bits: row blocks down, column groups across."""
    content = io.BytesIO()
    picture = np.array([curves.shade(int(width)) for width in grid.flat]).reshape(*grid.shape, 3)
    matplotlib.image.imsave(content, picture, format="png")
    said = html.escape(f"{layer}: {grid.shape[0]} × {grid.shape[1]} tiles")
    size = f'width="{8 * grid.shape[1]}" height="{min(8 * grid.shape[0], 400)}"'
    return (
        f'<figure class="map"><img alt="{said}" {size} src="{_inline(content, "image/png")}">'
        f"<figcaption>{said}</figcaption></figure>"
    )


def drawing(draw: Callable[[], Figure], caption: str) -> str:
    """A figure inside the page; nothing where the records do not carry what it shows."""
    content = io.BytesIO()
    try:
        with matplotlib.rc_context({"svg.hashsalt": "nashswarm", "figure.constrained_layout.use": True}):
            draw().savefig(content, format="svg", metadata={"Date": None})
    except curves.NothingToDraw:
        return ""
    said = html.escape(caption)
    return (
        f'<figure><img alt="{said}" src="{_inline(content, "image/svg+xml")}"><figcaption>{said}</figcaption></figure>'
    )


def _inline(content: io.BytesIO, kind: str) -> str:
    return f"data:{kind};base64,{base64.b64encode(content.getvalue()).decode()}"


def _ink(width: int) -> str:
    return "#" + "".join(f"{round(255 * part):02x}" for part in curves.shade(width))


def _rank(one: Record) -> tuple[int, int, str]:
    return frame.rank(one.labels["method"])


def _cell(text: str, value: str, kind: str = "") -> str:
    named = f' class="{kind}"' if kind else ""
    return f'<td{named} data-value="{html.escape(value)}">{html.escape(text)}</td>'


def _table(heads: Sequence[str], lines: Sequence[str]) -> str:
    head = "".join(f'<th scope="col"><button>{html.escape(name)}</button></th>' for name in heads)
    return f'<table class="sortable"><thead><tr>{head}</tr></thead><tbody>\n' + "\n".join(lines) + "\n</tbody></table>"
