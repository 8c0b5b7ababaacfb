"""Figures: records or a data frame in, a matplotlib figure out, with whatever style is in force.

Logarithmic axes cannot show zero; a value below what is worth telling apart is drawn hollow on the axis floor.
"""

import pathlib
from collections.abc import Collection, Iterable, Sequence
from typing import Any

import matplotlib
import matplotlib.ticker
import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.transforms import Bbox
from numpy.typing import NDArray

from nashswarm.records import statistics
from nashswarm.records.record import Record
from nashswarm.reporting.frame import family_of, paired, rank
from nashswarm.reporting.typeset import FORMATS, REFERENCE

NEGLIGIBLE = {"kl": 1e-5, "regret": 1e-12, "perplexity": 0.0}  # nats per token; below it a value counts as zero
SUFFIXES = (".pdf", ".png")
AXES = {"kl": "KL to full precision (nats per token)", "perplexity": "perplexity"}
COLOURS = {
    "baseline": "#000000",
    "uniform": "#0072B2",
    "rtn": "#0072B2",
    "gptq": "#E69F00",
    "as_published": "#CC79A7",
    "no_": "#D55E00",
    REFERENCE: "#009E73",
    "fixed_width": "#56B4E9",
    "baq": "#882255",
    "radio": "#332288",
}
MARKERS = "osD^vP*X<>"
CROWD = 8  # joined methods, from which on lines would cross names
READABLE = 24  # methods, beyond which nobody tells them apart in one figure; a table names them


class NothingToDraw(ValueError):
    """No record carries what a figure shows."""


def colour(method: str) -> str:
    """The colour of a method's kind, grey for an unknown kind."""
    return next((shade for start, shade in COLOURS.items() if method.startswith(start)), "#777777")


def markers(methods: Iterable[str]) -> dict[str, str]:
    """A marker for each method, so that those of one colour differ.

    >>> markers(["gptq", "nash_swarm", "gptq_tiles", "gptq"])
    {'gptq': 'o', 'nash_swarm': 'o', 'gptq_tiles': 's'}
    """
    found: dict[str, str] = {}
    inks: list[str] = []
    for method in dict.fromkeys(methods):
        found[method] = MARKERS[inks.count(colour(method)) % len(MARKERS)]
        inks.append(colour(method))
    return found


def shade(bits: int) -> tuple[float, float, float]:
    """The colour of a bit-width, red, green, blue: the wider the darker, white for pruned tiles."""
    if bits == 0:
        return 1.0, 1.0, 1.0
    position = (np.log2(bits) - np.log2(2)) / (np.log2(16) - np.log2(2))
    red, green, blue, _ = matplotlib.colormaps["viridis_r"](float(np.clip(position, 0, 1)))
    return red, green, blue


def floored(values: NDArray[np.float64], negligible: float) -> tuple[NDArray[np.float64], NDArray[np.bool_], float]:
    """``values`` fit for a log axis, which of them were raised, and the floor they were raised to.

    >>> floored(np.array([0.0, 0.02, 0.2]), 1e-5)
    (array([0.01, 0.02, 0.2 ]), array([ True, False, False]), 0.01)
    """
    raised = values <= negligible
    floor = float(values[~raised].min()) / 2 if (~raised).any() else 1.0
    return np.where(raised, floor, values), raised, floor


def frontier(sizes: NDArray[np.float64], values: NDArray[np.float64]) -> NDArray[np.int64]:
    """The indices of the points that no other point beats in both, by size."""
    order = np.lexsort((values, sizes))
    best = np.minimum.accumulate(values[order])
    kept: NDArray[np.int64] = order[np.concatenate([[True], best[1:] < best[:-1]])]
    return kept


def pareto(points: pd.DataFrame, metric: str = "kl") -> Figure:
    """``metric`` (``kl`` or ``perplexity``) against file size, both logarithmic, one point per configuration; the sizes
    of one method (``[bits=...]``) are joined, and named once.

    ``points``: from ``report.points`` or ``report.average``, of one model, dataset and measure.
    Raises NothingToDraw if no row has both numbers, ValueError if rows of several models, datasets or measures are
    mixed.
    """
    if metric not in AXES:
        raise ValueError(f"{metric!r} cannot be drawn against size; choose among {', '.join(AXES)}")
    mixed = [label for label in ("model", "dataset", "measure") if points[label].nunique() > 1]
    if mixed:
        raise ValueError(f"one figure shows one {', one '.join(mixed)}; select it first")
    shown = points.dropna(subset=[name for name in (metric, "bytes_file") if name in points])
    if shown.empty or not {metric, "bytes_file"} <= set(points):
        raise NothingToDraw(f"no record has both bytes_file and {metric}; measure quality and size first")
    sizes = shown["bytes_file"].to_numpy(float) * 1e-6
    values, raised, floor = floored(shown[metric].to_numpy(float), NEGLIGIBLE[metric])
    methods = list(map(str, shown["method"]))

    figure = Figure()
    axes = figure.add_subplot(xscale="log", yscale="log", xlabel="file size (MB)", ylabel=AXES[metric])
    best = frontier(sizes, values)
    axes.plot(sizes[best], values[best], drawstyle="steps-post", color="#BBBBBB", linewidth=0.8, zorder=0)
    families = np.array(list(map(family_of, methods)))
    smallest = {family: np.flatnonzero(families == family)[sizes[families == family].argmin()] for family in families}
    for family in smallest:
        own = np.flatnonzero(families == family)
        joined = own[sizes[own].argsort()]
        axes.plot(sizes[joined], values[joined], color=colour(family), linewidth=0.7, alpha=0.6, zorder=0)
    looks = markers(families)
    for row in range(len(shown)):
        ink = colour(methods[row])
        low, high = (shown.iloc[row].get(f"{metric}_{end}", np.nan) for end in ("low", "high"))
        if not raised[row] and np.isfinite([low, high]).all():
            axes.plot([sizes[row]] * 2, [max(low, floor), high], color=ink, linewidth=1)
        axes.plot(
            sizes[row], values[row], looks[families[row]], color=ink, markerfacecolor="white" if raised[row] else ink
        )
    for axis, subs in ((axes.xaxis, (1, 2, 3, 5)), (axes.yaxis, (1, 2, 5))):
        axis.set_major_locator(matplotlib.ticker.LogLocator(subs=subs))
        axis.set_major_formatter(matplotlib.ticker.FuncFormatter(lambda tick, _: f"{tick:g}"))
        axis.set_minor_formatter(matplotlib.ticker.NullFormatter())
    axes.margins(0.12, 0.1)
    names = [
        "" if smallest[family] != row else f"{family} (KL about 0)" if raised[row] else family
        for row, family in enumerate(families)
    ]
    name_families(figure, sizes, values, families.tolist(), names)
    return figure


def name_families(
    figure: Figure, x: NDArray[np.float64], y: NDArray[np.float64], families: Sequence[str], names: list[str]
) -> None:
    """Write each name beside its point; where lines of many families would cross names, a legend instead, and no name
    where nobody could read them."""
    if len(set(families)) > READABLE:
        return
    joined = [family for family in dict.fromkeys(families) if list(families).count(family) > 1]
    if len(joined) < CROWD:
        return place_labels(figure, x, y, names, [colour(family) for family in families])
    told = {family: name for family, name in zip(families, names, strict=True) if name}
    handles = [
        Line2D([], [], color=colour(family), marker=marker, label=told[family], linewidth=0.8)
        for family, marker in markers(families).items()
    ]
    figure.legend(handles=handles, loc="outside right center")


def place_labels(
    figure: Figure, x: NDArray[np.float64], y: NDArray[np.float64], names: list[str], inks: list[str]
) -> None:
    """Write each name beside its point, with a thin line if it had to move to cover no other name or point.

    Names move either all downwards or all upwards, whichever moves less, so that they keep the order of the points.
    """
    figure.draw_without_rendering()
    axes = figure.axes[0]
    labels = [
        axes.annotate(name, (left, up), (7, 0), "data", "offset points", color=ink, fontsize=7, in_layout=False)
        for name, left, up, ink in zip(names, x, y, inks, strict=True)
    ]
    points = 72 / figure.dpi
    dots = axes.transData.transform(np.column_stack([x, y])) * points
    extents = [label.get_window_extent() for label in labels]
    sizes = np.array([(box.width, box.height) for box in extents]) * points
    frame = Bbox(axes.get_window_extent().get_points() * points)
    trials = [free_places(dots, sizes, frame, direction) for direction in (-1, 1)]
    _, places = min(trials, key=lambda trial: trial[0])
    for label, dot, place in zip(labels, dots, places, strict=True):
        label.set(position=(place.x0 - dot[0], (place.y0 + place.y1) / 2 - dot[1]), verticalalignment="center")
        if label.get_text() and abs(label.get_position()[1]) > 5:
            near = (place.x0 - 1 if place.x0 > dot[0] else place.x1 + 1) - dot[0]
            leader = {"arrowstyle": "-", "color": "#999999", "linewidth": 0.5, "shrinkA": 0, "shrinkB": 2}
            line = axes.annotate("", label.xy, (near, label.get_position()[1]), "data", "offset points", leader)
            line.set_in_layout(False)


def free_places(
    dots: NDArray[np.float64], sizes: NDArray[np.float64], frame: Bbox, direction: int
) -> tuple[float, list[Bbox]]:
    """How far the names move in all, and a place inside ``frame`` for each; lengths in points, up is positive.

    A name that finds no free place stands beside its point all the same, at the cost of a long move.
    """
    taken = [Bbox.from_extents(*(dot - 3), *(dot + 3)) for dot in dots]
    places, moved = [Bbox.null()] * len(dots), 0.0
    for index in np.lexsort((dots[:, 0], direction * dots[:, 1])):
        width, height = sizes[index]
        tried = [
            Bbox.from_bounds(dots[index, 0] + right, dots[index, 1] + direction * step - height / 2, width, height)
            for step in np.arange(0, 200, 2)
            for right in (7, -7 - width)
        ]
        free = [
            place
            for place, box in enumerate(tried)
            if frame.contains(*box.p0) and frame.contains(*box.p1) and not any(map(box.overlaps, taken))
        ]
        places[index] = tried[free[0] if free else 0]
        moved += free[0] // 2 if free else len(tried)
        taken.append(places[index])
    return moved, places


def paired_ratio(records: Sequence[Record], reference: Sequence[Record]) -> tuple[float, float, float]:
    """KL of ``records`` over KL of ``reference`` on the same windows, with its 95 % paired bootstrap interval.

    Several seeds are averaged window by window first.  Raises ValueError if the windows are not the same.
    """
    return statistics.ratio(*(kl.tolist() for kl in paired(records, reference, "kl")))


def by_method(records: Iterable[Record], *series: str) -> dict[str, list[Record]]:
    """The records that have all of ``series``, by method, in the order of methods and seeds."""
    having = [record for record in records if all(record.series.get(name) for name in series)]
    having.sort(key=lambda record: (rank(record.labels["method"]), record.labels["seed"]))
    groups: dict[str, list[Record]] = {}
    for record in having:
        groups.setdefault(record.labels["method"], []).append(record)
    return groups


def refuse_crowd(methods: Collection[str]) -> None:
    """Raises NothingToDraw if there are more methods than anybody tells apart by lines."""
    if len(methods) > READABLE:
        raise NothingToDraw(f"{len(methods)} methods are more than one figure of lines can tell apart")


def ablation(records: Iterable[Record], reference: str = REFERENCE) -> Figure:
    """Bars: the KL of each method as a multiple of the reference's, paired over windows, with file sizes beside;
    ablations in the order of what they cost.

    Methods whose KL is negligible (the baseline) have no bar.  Raises ValueError if the reference is absent.
    """
    groups = by_method(records, "kl", "tokens")
    if reference not in groups:
        raise ValueError(f"no record of {reference} has per-window kl; run it, or name another reference")
    methods = [
        name for name in groups if name != reference and np.mean(groups[name][0].series["kl"]) > NEGLIGIBLE["kl"]
    ]
    if not methods:
        raise ValueError(f"there is nothing to compare {reference} with; run another method of the experiment")
    found = {method: paired_ratio(groups[method], groups[reference]) for method in methods}
    methods.sort(key=lambda method: (rank(method)[0], -found[method][0] * method.startswith("no_")))
    ratios = [found[method] for method in methods]
    figure = Figure(figsize=(5.2, 0.6 + 0.27 * len(methods)))
    axes = figure.add_subplot(xscale="log", xlabel=f"KL as a multiple of {reference}'s, 95 % paired interval")
    for row, (method, (ratio, low, high)) in enumerate(zip(methods, ratios, strict=True)):
        axes.barh(row, ratio - 1, left=1, height=0.62, color=colour(method), alpha=0.85)
        axes.plot([low, high], [row, row], color="black", linewidth=1)
        sizes = [record.metrics["bytes_file"] for record in groups[method] if "bytes_file" in record.metrics]
        note = (
            f"{ratio:#.3g}".rstrip(".")
            + "×"
            + (f"  {FORMATS['bytes_file'](float(np.mean(sizes)))} MB" if sizes else "")
        )
        axes.annotate(note, (max(high, 1), row), (5, 0), textcoords="offset points", va="center", fontsize=7)
    axes.axvline(1, color=colour(reference), linewidth=1)
    axes.set_yticks(range(len(methods)), methods)
    axes.invert_yaxis()
    axes.tick_params(axis="y", length=0)
    axes.xaxis.set_major_locator(matplotlib.ticker.LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(matplotlib.ticker.FuncFormatter(lambda tick, _: f"{tick:g}×"))
    axes.xaxis.set_minor_formatter(matplotlib.ticker.NullFormatter())
    axes.set_xlim(min(0.95, *(low for _, low, _ in ratios)) / 1.05, max(1.0, *(high for *_, high in ratios)) * 1.9)
    return figure


def path(record: Record, name: str) -> list[float]:
    """``potential`` or ``regret`` after every sweep, the start included: of the game that is solved once for all
    budgets, where the record has it, else of the one at its own budget; empty without either."""
    return record.series.get(f"{name}_of_reference") or record.series.get(name) or []


def convergence(records: Iterable[Record]) -> Figure:
    """Change of potential and largest regret after each sweep of best responses, one line per method (its first seed);
    lines that coincide lie on wider ones.  Beside them, where records have it, the price of every trial of the search
    for the budget over that of the last.

    Raises NothingToDraw if no record has potential and regret, or too many methods have.
    """
    groups = by_method(one for one in records if path(one, "potential") and path(one, "regret"))
    if not groups:
        raise NothingToDraw("no record has sweeps of best responses; run a method that plays, for example nash_swarm")
    refuse_crowd(groups)
    firsts = {method: group[0] for method, group in groups.items()}
    priced = any(one.series.get("price_of_trial") for one in firsts.values())
    figure = Figure(figsize=(7.6 if priced else 5.8, max(2.2, 0.2 + 0.15 * len(firsts))))
    *prices, above, below = figure.subplots(1, 2 + priced)
    everything = np.concatenate([path(one, "regret") for one in firsts.values()])
    floor = floored(everything, NEGLIGIBLE["regret"])[2]
    changes: list[float] = []
    for place, (method, one) in enumerate(reversed(firsts.items())):
        look: dict[str, Any] = {"color": f"C{place % 7}", "zorder": 3 - place / 100, "linewidth": 1 + 0.7 * (place % 3)}
        dots = look | {"marker": MARKERS[place // 7 % len(MARKERS)], "markersize": 3}
        change = np.array(path(one, "potential")) - path(one, "potential")[0]
        changes += np.abs(change[change != 0]).tolist()
        above.plot(change, label=method, **dots)
        regret = np.array(path(one, "regret"))
        zero = regret <= NEGLIGIBLE["regret"]
        lifted = np.where(zero, floor, regret)
        below.plot(lifted, **look)
        below.plot(np.flatnonzero(~zero), lifted[~zero], linestyle="none", **dots)
        hollow = dots | {"markersize": 4, "markerfacecolor": "white", "zorder": 4}
        below.plot(np.flatnonzero(zero), lifted[zero], linestyle="none", **hollow)
        for axes in prices:
            trials = np.array(one.series.get("price_of_trial", []))
            axes.plot(1 + np.arange(len(trials)), trials / trials[-1:], **dots)
    below.set_yscale("log")
    if (everything <= NEGLIGIBLE["regret"]).any():
        below.set_title("hollow: no regret left")
    if changes and max(changes) > 100 * min(changes):
        above.set_yscale("symlog", linthresh=min(changes))
    above.set_ylabel("change of potential\n(nats per token)")
    below.set_ylabel("largest regret\n(nats per token)")
    for axes in prices:
        axes.set(xlabel="trial of a price", ylabel="price ÷ the last price", yscale="log")
        for formatted in (axes.yaxis.set_major_formatter, axes.yaxis.set_minor_formatter):
            formatted(matplotlib.ticker.FuncFormatter(lambda tick, _: f"{tick:g}"))
    for axes in (above, below):
        axes.set_xlabel("sweep of best responses")
    for axes in (*prices, above, below):
        axes.xaxis.set_major_locator(matplotlib.ticker.MaxNLocator(integer=True))
    figure.legend(loc="outside right center")
    return figure


def tiles(allocation: str) -> dict[str, NDArray[np.int64]]:
    """The bits of each tile of each tiled layer, shape (row blocks, column groups); other layers are left out: floats,
    mixed ones, and those on a lattice, whose line begins with their bits per weight, a decimal number.

    Raises ValueError for a line that is no allocation.

    >>> tiles("head 2x3 4*2 8*4\\nnorm 16\\nmlp mixed\\nwte 3.9 +0*32")["head"].tolist()
    [[4, 4, 8], [8, 8, 8]]
    """
    grids = {}
    for line in allocation.splitlines():
        layer, *words = line.split()
        if len(words) == 1 or words[-1] == "mixed" or "." in words[0]:
            continue
        try:
            rows, columns = map(int, words[0].split("x"))
            runs = [tuple(map(int, word.split("*"))) for word in words[1:]]
            grids[layer] = np.repeat([bits for bits, _ in runs], [count for _, count in runs]).reshape(rows, columns)
        except (ValueError, IndexError) as error:
            raise ValueError(
                f"allocation of {layer!r} is not '<rows>x<columns> <bits>*<count> ...': {error}"
            ) from error
    return grids


def most_varied(grids: dict[str, NDArray[np.int64]]) -> str:
    """The layer whose tiles differ most in bits (largest entropy), the first of equals."""

    def entropy(layer: str) -> float:
        counts = np.unique(grids[layer], return_counts=True)[1] / grids[layer].size
        return float(-(counts * np.log(counts)).sum())

    return max(grids, key=entropy)


def bit_map(allocation: str, layer: str | None = None) -> Figure:
    """The tiles of one layer coloured by bits, its longer side across; by default the layer that varies most.

    Raises ValueError if there is no such tiled layer.
    """
    grids = tiles(allocation)
    if not grids:
        raise ValueError("no layer is made of tiles of several widths; choose a method that allocates bits to tiles")
    layer = layer or most_varied(grids)
    if layer not in grids:
        raise ValueError(f"{layer!r} is not a layer made of tiles; choose among {', '.join(grids)}")
    grid = grids[layer]
    widths = np.unique(grid).tolist()
    picture = np.array([shade(int(width)) for width in grid.flat]).reshape(*grid.shape, 3)
    names = ["row block (16 outputs)", "column group"]
    across = grid.shape[0] > grid.shape[1]
    figure = Figure(figsize=(5.2, 1.9))
    axes = figure.add_subplot(xlabel=names[not across], ylabel=names[across], title=layer)
    axes.imshow(picture.swapaxes(0, 1) if across else picture, aspect="auto", interpolation="nearest")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(matplotlib.ticker.MaxNLocator(integer=True, nbins=6))
    handles = [
        Patch(
            facecolor=shade(width), edgecolor="#777777", linewidth=0.5, label=f"{width} ({(grid == width).mean():.0%})"
        )
        for width in widths
    ]
    figure.legend(handles=handles, loc="outside right center", title="bits", handlelength=1, handleheight=1)
    return figure


def layer_bits(record: Record) -> Figure:
    """Stored bits per weight of every layer of one run, scales and tags included.

    Raises NothingToDraw if the record has no layers.
    """
    if not record.layers:
        raise NothingToDraw(f"the record of {record.labels['method']} has no layers")
    figure = Figure(figsize=(5.2, 0.6 + 0.16 * len(record.layers)))
    axes = figure.add_subplot(xlabel="stored bits per weight")
    rows = range(len(record.layers))
    axes.barh(rows, [row["bits_per_weight"] for row in record.layers], color=colour(record.labels["method"]))
    axes.set_yticks(rows, [row["name"] for row in record.layers], fontsize=6)
    axes.invert_yaxis()
    return figure


def save(figure: Figure, stem: pathlib.Path) -> list[pathlib.Path]:
    """Write ``<stem>.pdf`` and ``<stem>.png``, the same bytes every time."""
    stem.parent.mkdir(parents=True, exist_ok=True)
    paths = [stem.with_name(stem.name + suffix) for suffix in SUFFIXES]
    figure.savefig(paths[0], metadata={"CreationDate": None})
    figure.savefig(paths[1], metadata={"Software": None})
    return paths
