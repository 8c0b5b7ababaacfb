"""The pictures of a page: figures inside it, points that tell their values, and maps of rates and of tiles."""

import base64
import html
import io
import re
from collections.abc import Callable
from typing import Any

import matplotlib
import matplotlib.image
import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from numpy.typing import NDArray

from nashswarm.records.record import Record
from nashswarm.reporting import typeset
from nashswarm.reporting.figures import games
from nashswarm.reporting.figures.style import NothingToDraw, shade
from nashswarm.reporting.formats import MISSING

SIZE = (9.0, 4.6)  # inches of a figure that does not choose its own
POINT = "point"  # what the name of a point begins with; the index of its row follows
BLOCK = re.compile(r"^(.*?\.)(\d+)\.(.+)$")  # what stands before the number of a block, the number, what is in it


def drawing(draw: Callable[[], Figure], caption: str, rows: pd.DataFrame | None = None) -> str:
    """Return a figure inside the page, or an empty string if no record has the values that it shows.

    ``rows``: of a table, by the index that the points of the figure are named by; a point then tells its values.
    """
    content = io.BytesIO()
    own: dict[Any, Any] = {"svg.hashsalt": "nashswarm", "figure.constrained_layout.use": True, "figure.figsize": SIZE}
    try:
        with matplotlib.rc_context(own):
            figure = draw()
            figure.savefig(content, format="svg", metadata={"Date": None})
    except NothingToDraw:
        return ""
    text = html.escape(caption)
    points = "" if rows is None else "".join(dots(figure, rows))
    return (
        f'<figure><div class="chart"><img alt="{text}" src="{inline(content, "image/svg+xml")}">{points}</div>'
        f"<figcaption>{text}</figcaption></figure>"
    )


def dots(figure: Figure, rows: pd.DataFrame) -> list[str]:
    """Return what lies over the named points of a drawn figure: each shows its row under the mouse or the keyboard."""
    axes, parts = figure.axes[0], []
    for line in axes.lines:
        name = str(line.get_gid() or "")
        if name.startswith(POINT):
            row = rows.loc[int(name.removeprefix(POINT))]
            place = axes.transData.transform(np.asarray(line.get_xydata(), float)[0])
            across, up = figure.transFigure.inverted().transform(place)
            side = " right" if across > 0.75 else " left" if across < 0.25 else ""
            parts.append(
                f'<div class="dot{side}" tabindex="0" style="left:{100 * across:.2f}%;top:{100 * (1 - up):.2f}%">'
                f"<span>{html.escape(told(row))}</span></div>"
            )
    return parts


def told(row: Any) -> str:
    """Return method and main values of a row, one a line."""
    main = [column for column in typeset.COLUMNS if column.metric in typeset.FIRST]
    values = [f"{column.heading}: {typeset.text(row, column.metric)}" for column in main]
    return "\n".join([str(row["method"]), *(value for value in values if not value.endswith(f": {MISSING}"))])


def bits(one: Record) -> list[str]:
    """Return a folded section with the bits of every layer of a run, and a map of every layer of several widths."""
    if not one.layers:
        return []
    method = html.escape(one.labels["method"])
    tiled = games.tiles(one.allocation)
    several = [layer for layer, grid in tiled.items() if len(set(grid.flat)) > 1]
    maps = [bit_map(layer, tiled[layer]) for layer in several]
    widths = sorted({int(width) for layer in several for width in tiled[layer].flat})
    legend = [f'<span class="width" style="background:{_colour(width)}"></span>{width} bits' for width in widths]
    return [
        f'<details class="bits"><summary>Bits of {method}, seed {one.labels["seed"]}</summary>',
        "<p>Stored bits per weight of every layer:</p>",
        rate_map(one),
        f"<p>Tiles: {' '.join(legend)}</p>" if legend else "",
        *maps,
        "</details>",
    ]


def rate_map(one: Record) -> str:
    """Return a table of the stored bits per weight: a row a block, a column a kind of matrix, coloured by bits.

    Matrices outside of blocks share the first row.
    """
    cells: dict[tuple[str, str], str] = {}
    for layer in one.layers:
        found = BLOCK.match(layer["name"])
        place = (found[1] + found[2], found[3]) if found else ("", layer["name"])
        rate = float(layer["bits_per_weight"])
        ink = "#fff" if rate > 5 else "#222"
        title = html.escape(f"{layer['name']}: {layer['parameters']:,} weights in {layer['bytes']:,} bytes")
        style = f"background:{_colour(max(rate, 1e-3))};color:{ink}"
        cells[place] = f'<td title="{title}" style="{style}">{rate:.2f}</td>'
    blocks = list(dict.fromkeys(block for block, _ in cells))
    parts = []
    for kinds in dict.fromkeys(tuple(kind for place, kind in cells if place == block) for block in blocks):
        shown = [block for block in blocks if tuple(kind for place, kind in cells if place == block) == kinds]
        heads = "".join(f"<th>{html.escape(kind)}</th>" for kind in kinds)
        lines = [f"<tr><td>{html.escape(b)}</td>{''.join(cells[b, kind] for kind in kinds)}</tr>" for b in shown]
        parts.append(f'<table class="rates"><tr><th></th>{heads}</tr>\n' + "\n".join(lines) + "\n</table>")
    return "\n".join(parts)


def bit_map(layer: str, grid: NDArray[np.int64]) -> str:
    """Return a picture with one pixel per tile of a layer, coloured by bits: row blocks down, column groups across."""
    content = io.BytesIO()
    picture = np.array([shade(int(width)) for width in grid.flat]).reshape(*grid.shape, 3)
    matplotlib.image.imsave(content, picture, format="png")
    caption = html.escape(f"{layer}: {grid.shape[0]} × {grid.shape[1]} tiles")
    size = f'width="{8 * grid.shape[1]}" height="{min(8 * grid.shape[0], 400)}"'
    return (
        f'<figure class="map"><img alt="{caption}" {size} src="{inline(content, "image/png")}">'
        f"<figcaption>{caption}</figcaption></figure>"
    )


def inline(content: io.BytesIO, kind: str) -> str:
    """Return the address of a picture that lies inside the page."""
    return f"data:{kind};base64,{base64.b64encode(content.getvalue()).decode()}"


def _colour(width: float) -> str:
    return "#" + "".join(f"{round(255 * part):02x}" for part in shade(width))
