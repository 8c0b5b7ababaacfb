"""Figures of quality: KL, perplexity and agreement against file size, the cost of ablations, and predicted damage."""

from collections.abc import Iterable, Sequence

import matplotlib
import matplotlib.ticker
import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from numpy.typing import NDArray

from nashswarm.records import statistics
from nashswarm.records.record import Record
from nashswarm.reporting.figures.style import (
    NEGLIGIBLE,
    NothingToDraw,
    by_method,
    colour,
    floored,
    markers,
    name_families,
)
from nashswarm.reporting.formats import FORMATS
from nashswarm.reporting.frame import paired
from nashswarm.reporting.labels import ABLATIONS, REFERENCE, family_of, rank

AXES = {"kl": "KL to full precision (nats per token)", "perplexity": "perplexity"}
SIZES = {"bytes_file": "file size (MB)", "bytes_resident": "weights in memory (MB)"}


def frontier(sizes: NDArray[np.float64], values: NDArray[np.float64]) -> NDArray[np.int64]:
    """Return the indices of the Pareto-optimal points (no other point is smaller in both), in the order of size."""
    order = np.lexsort((values, sizes))
    best = np.minimum.accumulate(values[order])
    indices: NDArray[np.int64] = order[np.concatenate([[True], best[1:] < best[:-1]])]
    return indices


def refuse_mixed(points: pd.DataFrame) -> None:
    """Raise ValueError if the rows are of several models, datasets or measures."""
    mixed = [label for label in ("model", "dataset", "measure") if points[label].nunique() > 1]
    if mixed:
        raise ValueError(f"one figure shows one {', one '.join(mixed)}; select it first")


def pareto(points: pd.DataFrame, metric: str = "kl", size: str = "bytes_file") -> Figure:
    """Draw ``metric`` (``kl`` or ``perplexity``) against a size, one point a configuration, both axes logarithmic.

    The sizes of one method (``[bits=...]``, ``[type=...]``) are joined by a line and named once; the grey steps are the
    Pareto front.  ``points``: rows from ``frame.points`` or ``frame.average``, of one model, dataset and measure.
    ``size``: ``bytes_file``, or ``bytes_resident``, bytes of the loaded weights, which not every record tells.

    Raises NothingToDraw if no row has both numbers, ValueError if rows of several models, datasets or measures are
    mixed.
    """
    if metric not in AXES:
        raise ValueError(f"{metric!r} cannot be drawn against size; choose among {', '.join(AXES)}")
    refuse_mixed(points)
    shown = points.dropna(subset=[name for name in (metric, size) if name in points])
    if shown.empty or not {metric, size} <= set(points):
        raise NothingToDraw(f"no record has both {size} and {metric}; measure quality and size first")
    sizes = shown[size].to_numpy(float) * 1e-6
    values, raised, floor = floored(shown[metric].to_numpy(float), NEGLIGIBLE[metric])
    methods = list(map(str, shown["method"]))

    figure = Figure()
    axes = figure.add_subplot(xscale="log", yscale="log", xlabel=SIZES[size], ylabel=AXES[metric])
    best = frontier(sizes, values)
    axes.plot(sizes[best], values[best], drawstyle="steps-post", color="#BBBBBB", linewidth=0.8, zorder=0)
    families = np.array(list(map(family_of, methods)))
    smallest = {family: np.flatnonzero(families == family)[sizes[families == family].argmin()] for family in families}
    for family in smallest:
        rows = np.flatnonzero(families == family)
        joined = rows[sizes[rows].argsort()]
        axes.plot(sizes[joined], values[joined], color=colour(family), linewidth=0.7, alpha=0.6, zorder=0)
    marker_of = markers(families)
    for row in range(len(shown)):
        ink = colour(methods[row])
        low, high = (shown.iloc[row].get(f"{metric}_{end}", np.nan) for end in ("low", "high"))
        if not raised[row] and np.isfinite([low, high]).all():
            axes.plot([sizes[row]] * 2, [max(low, floor), high], color=ink, linewidth=1)
        face = "white" if raised[row] else ink
        axes.plot(
            sizes[row], values[row], marker_of[families[row]], color=ink, markerfacecolor=face,
            gid=f"point{shown.index[row]}",  # by which a page tells the row
        )  # fmt: skip
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


def accuracy(points: pd.DataFrame) -> Figure:
    """Draw top-1 agreement with the full model (per cent) against the compression factor over 32-bit floats.

    The sizes of one method are joined by a line and named once.  ``points``: rows from ``frame.points`` or
    ``frame.average``, of one model, dataset and measure.

    Raises ValueError if no row has both numbers, or if rows of several models, datasets or measures are mixed.
    """
    refuse_mixed(points)
    if not {"top1_agreement", "compression"} <= set(points) or points["top1_agreement"].isna().all():
        raise ValueError("no record has both compression and top1_agreement; measure quality and size first")
    shown = points.dropna(subset=["top1_agreement", "compression"])
    times = 1 / (1 - shown["compression"].to_numpy(float))
    agreement = 100 * shown["top1_agreement"].to_numpy(float)
    families = np.array([family_of(str(method)) for method in shown["method"]])
    figure = Figure()
    axes = figure.add_subplot(xscale="log", xlabel="times smaller than 32-bit floats")
    axes.set_ylabel("same first choice as in full (%)")
    names = [""] * len(shown)
    marker_of = markers(families)
    for family in dict.fromkeys(families):
        rows = np.flatnonzero(families == family)
        rows = rows[times[rows].argsort()]
        axes.plot(times[rows], agreement[rows], marker_of[family] + "-", color=colour(family), linewidth=0.8)
        names[rows[-1]] = family
    axes.xaxis.set_major_locator(matplotlib.ticker.LogLocator(subs=(1, 1.2, 1.5, 2, 3, 4, 5, 6, 8)))
    axes.xaxis.set_major_formatter(matplotlib.ticker.FuncFormatter(lambda tick, _: f"{tick:g}×"))
    axes.xaxis.set_minor_formatter(matplotlib.ticker.NullFormatter())
    axes.margins(0.14, 0.08)
    name_families(figure, times, agreement, families.tolist(), names)
    return figure


def paired_ratio(records: Sequence[Record], reference: Sequence[Record]) -> tuple[float, float, float]:
    """Return the KL of ``records`` over that of ``reference`` on the same windows, with its 95 % bootstrap interval.

    Several seeds are averaged window by window first.  Raises ValueError if the windows differ.
    """
    return statistics.ratio(*(kl.tolist() for kl in paired(records, reference, "kl")))


def ablation(records: Iterable[Record], reference: str = REFERENCE) -> Figure:
    """Draw a bar for each method: its KL as a multiple of the reference's, paired over windows, with its file size.

    Ablations are in the order of their cost.  A method whose KL is negligible (the baseline) has no bar.
    Raises ValueError if the reference is absent.
    """
    groups = by_method(records, "kl", "tokens")
    if reference not in groups:
        raise ValueError(f"no record of {reference} has per-window kl; run it, or name another reference")
    methods = [
        name for name in groups if name != reference and np.mean(groups[name][0].series["kl"]) > NEGLIGIBLE["kl"]
    ]
    if not methods:
        raise ValueError(f"there is nothing to compare {reference} with; run another method of the experiment")
    ratio_of = {method: paired_ratio(groups[method], groups[reference]) for method in methods}
    methods.sort(key=lambda method: (rank(method)[0], -ratio_of[method][0] * method.startswith(ABLATIONS)))
    ratios = [ratio_of[method] for method in methods]
    figure = Figure(figsize=(5.2, 0.6 + 0.27 * len(methods)))
    axes = figure.add_subplot(xscale="log", xlabel=f"KL as a multiple of {reference}'s, 95 % paired interval")
    for row, (method, (ratio, low, high)) in enumerate(zip(methods, ratios, strict=True)):
        axes.barh(row, ratio - 1, left=1, height=0.62, color=colour(method), alpha=0.85)
        axes.plot([low, high], [row, row], color="black", linewidth=1)
        sizes = [record.metrics["bytes_file"] for record in groups[method] if "bytes_file" in record.metrics]
        megabytes = f"  {FORMATS['bytes_file'](float(np.mean(sizes)))} MB" if sizes else ""
        note = f"{ratio:#.3g}".rstrip(".") + "×" + megabytes
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


def sensitivity(layers: pd.DataFrame) -> Figure:
    """Draw the measured damage of each matrix, compressed alone, against its predicted damage; one panel a method.

    ``layers``: from ``tables.layers``, in nats per token.  Raises ValueError if no matrix has both numbers.
    """
    shown = layers if "layer_damage" not in layers else layers[(layers["layer_damage"] > 0) & (layers["layer_kl"] > 0)]
    if "layer_damage" not in layers or shown.empty:
        raise ValueError("no record tells predicted from measured damage of single matrices; run experiment=layers")
    methods = list(dict.fromkeys(shown["method"]))
    roles = shown["layer"].str.split(".").str[-2:].str.join(".").str.replace(r"^\d+\.", "", regex=True)
    figure = Figure(figsize=(2.2 + 2.0 * len(methods), 2.6))
    panels = figure.subplots(1, len(methods), squeeze=False, sharex=True, sharey=True)[0]
    values = shown[["layer_damage", "layer_kl"]].to_numpy(float)
    ends = [values.min() / 1.5, values.max() * 1.5]
    for axes, method in zip(panels, methods, strict=True):
        axes.set(xscale="log", yscale="log", title=method, xlabel="predicted damage (nats per token)")
        axes.plot(ends, ends, color="#BBBBBB", linewidth=0.8, zorder=0)
        for place, role in enumerate(dict.fromkeys(roles)):
            rows = shown[(shown["method"] == method) & (roles == role)]
            marker = "osD^vP*X"[place % 8]
            axes.plot(
                rows["layer_damage"], rows["layer_kl"], marker, color=f"C{place % 7}", label=role, linestyle="none"
            )
    panels[0].set_ylabel("KL when alone (nats per token)")
    handles, names = panels[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside right center")
    return figure
