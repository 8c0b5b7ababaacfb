"""Figures of running models: time, memory, the roofline of packed products, and the latency of a server."""

from collections.abc import Sequence

import matplotlib
import matplotlib.ticker
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from nashswarm.reporting.figures.style import COLOURS, MARKERS
from nashswarm.reporting.formats import FORMATS
from nashswarm.reporting.labels import REFERENCE, rank

NAMES = {
    "full": "32-bit floats",
    "int8": "packed, 8-bit activations",
    "float32": "packed, 32-bit activations",
    "compile": "32-bit floats, compiled",
    "bfloat16": "16-bit floats",
    "bitsandbytes": "bitsandbytes, NF4",
    "onnxruntime": "ONNX Runtime, 4 bits",
}
OURS = ("int8", "float32")
PHASES = {"decode_ratio": "one token", "decode_long_ratio": "one token after the prompt", "prefill_ratio": "the prompt"}


def rows_of(contestants: pd.DataFrame) -> tuple[pd.DataFrame, list[str]]:
    """Return the contestants of one figure as rows, and a name for each row.

    The full model comes first, then the forms of other libraries, each once whatever method it was timed beside, then
    the packed forms of each method.  A name includes the threads if they differ.

    Raises ValueError if there are no contestants, or if they are of several models.
    """
    if contestants.empty:
        raise ValueError("no record timed contestants; run experiment=speed")
    if contestants["model"].nunique() > 1:
        raise ValueError("one figure shows one model; select it first")
    packed = contestants["contestant"].isin(OURS)
    others = contestants[~packed].drop_duplicates("contestant")
    others = others.sort_values("contestant", key=lambda names: names != "full", kind="stable")
    ours = contestants[packed].sort_values("method", key=lambda methods: methods.map(rank), kind="stable")
    shown = pd.concat([others, ours], ignore_index=True)
    names = shown["contestant"].map(lambda one: NAMES.get(one, one))
    if shown["method"].nunique() > 1:
        names += (": " + shown["method"]).where(shown["contestant"].isin(OURS), "")
    if "threads" in shown and shown["threads"].nunique() > 1:
        names += shown["threads"].map(lambda threads: f", {threads:g} thread{'s'[: threads != 1]}")
    return shown, names.tolist()


def name_rows(axes: Axes, names: Sequence[str]) -> None:
    """Write a name beside every row, from top to bottom."""
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.tick_params(axis="y", length=0)


def speed(contestants: pd.DataFrame) -> Figure:
    """Draw the speed of each contestant over the full model's in every phase, with 95 % intervals.

    ``contestants``: from ``tables.speed``.  Raises ValueError if none was timed against the full model.
    """
    shown, names = rows_of(contestants)
    timed = (shown["contestant"] != "full").to_numpy()
    shown = shown[timed].reset_index(drop=True)
    names = [name for name, included in zip(names, timed, strict=True) if included]
    if shown.empty:
        raise ValueError("no contestant was timed against the full model; run experiment=speed")
    figure = Figure(figsize=(5.2, 0.9 + 0.34 * len(names)))
    axes = figure.add_subplot(xscale="log", xlabel="times faster than 32-bit floats, 95 % interval")
    axes.axvline(1, color="#BBBBBB", linewidth=0.8, zorder=0)
    for place, (metric, phase) in enumerate(PHASES.items()):
        if metric not in shown:
            continue
        rows = np.arange(len(shown)) + 0.22 * (place - 1)
        for row, low, high in zip(rows, shown[f"{metric}_low"], shown[f"{metric}_high"], strict=True):
            axes.plot([low, high], [row, row], color=f"C{place}", linewidth=1)
        axes.plot(shown[metric], rows, "osD"[place], color=f"C{place}", markersize=3.5, label=phase)
    name_rows(axes, names)
    axes.xaxis.set_major_locator(matplotlib.ticker.LogLocator(subs=(1, 2, 3, 5)))
    axes.xaxis.set_major_formatter(matplotlib.ticker.FuncFormatter(lambda tick, _: f"{tick:g}×"))
    axes.xaxis.set_minor_formatter(matplotlib.ticker.NullFormatter())
    figure.legend(loc="outside upper center", ncols=3)
    return figure


def memory(contestants: pd.DataFrame) -> Figure:
    """Draw the memory that the running model of each contestant holds, in megabytes.

    ``contestants``: from ``tables.speed``.  Raises ValueError if none was measured.
    """
    shown, names = rows_of(contestants)
    figure = Figure(figsize=(5.2, 0.6 + 0.24 * len(names)))
    axes = figure.add_subplot(xlabel="held in memory (MB)")
    sizes = shown["bytes_resident"].to_numpy(float)
    colours = [COLOURS[REFERENCE] if packed else "#777777" for packed in shown["contestant"].isin(OURS)]
    axes.barh(range(len(names)), 1e-6 * sizes, height=0.6, color=colours)
    for row, size in enumerate(sizes):
        axes.annotate(FORMATS["bytes_resident"](size), (1e-6 * size, row), (4, 0), textcoords="offset points",
                      va="center", fontsize=7)  # fmt: skip
    name_rows(axes, names)
    axes.margins(x=0.12)
    return figure


def latency(served: pd.DataFrame) -> Figure:
    """Draw the percentiles of clients' waiting time (s) against their number, of the full and the compressed model.

    One panel is for clients that each ask once they are answered, and one for each rate of requests that arrive by
    themselves.  ``served``: from ``tables.serving``, of one model and method.

    Raises ValueError if there are no rows, or if they are of several models or methods.
    """
    if served.empty:
        raise ValueError("no record tells what clients of a server wait; run experiment=load")
    if len(served[["model", "method"]].drop_duplicates()) > 1:
        raise ValueError("one figure shows one model and method; select them first")
    loops = list(served.groupby("rate", dropna=False, sort=False))
    figure = Figure(figsize=(2.2 + 1.8 * len(loops), 2.6))
    panels = figure.subplots(1, len(loops), squeeze=False, sharey=True)[0]
    models = (("_full", "#777777", "32-bit floats"), ("", COLOURS[REFERENCE], "compressed"))
    for axes, (_, rows) in zip(panels, loops, strict=True):
        rate = rows["rate"].iloc[0]
        title = "each asks once it is answered" if pd.isna(rate) else f"requests by themselves, {rate:g} per second"
        axes.set(yscale="log", title=title, xlabel="clients", xticks=range(len(rows)))
        axes.set_xticklabels([f"{clients:g}" for clients in rows["clients"]])
        for suffix, ink, model in models:
            for level, line in ((50, "o-"), (95, "s--"), (99, "^:")):
                seconds = 1e-3 * rows[f"latency_p{level}_ms{suffix}"]
                axes.plot(range(len(rows)), seconds, line, color=ink, markersize=3.5, label=f"{model}, P{level}")
        axes.yaxis.set_major_formatter(matplotlib.ticker.FuncFormatter(lambda tick, _: f"{tick:g}"))
    panels[0].set_ylabel("wait for an answer (s)")
    handles, names = panels[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside right center")
    return figure


def roofline(products: pd.DataFrame) -> Figure:
    """Draw the rate of every product with packed matrices against its arithmetic intensity, one panel a thread count.

    ``products``: the rows that ``experiments.benchmarks.kernels`` wrote.  Intensity is operations (two for each weight
    and row of the batch) per byte of codes, scales not counted.  The machine's own limits were not measured, so the
    roof is what the products reached: the most bytes of codes per second at batch 1, and the highest rate.

    Raises ValueError if no product has a name that contains its bit-width.
    """
    kinds = products["kernel"].str.extract(r"^(onnxruntime )?(?:([\d+]+) bits, .*, (int8|float32)|(torch fp32))$")
    known = (kinds[1].notna() | kinds[3].notna()).to_numpy()
    if not known.any():
        raise ValueError("no product has its bits in its name; run python -m experiments.benchmarks.kernels")
    shown, kinds = products[known], kinds[known]
    bits = kinds[1].fillna("32").map(lambda widths: float(np.mean([int(width) for width in widths.split("+")])))
    weights = shown["shape"].str.split("x").map(lambda sides: int(sides[0]) * int(sides[1]))
    seconds, codes = 1e-6 * shown["microseconds"], weights * bits / 8
    operations = 2 * weights * shown["batch"]
    activations = kinds[2].replace({"int8": "8-bit activations", "float32": "32-bit activations"})
    libraries = kinds[0].map({"onnxruntime ": NAMES["onnxruntime"].split(",")[0]}).fillna("packed")
    labels = (libraries + ", " + activations).where(kinds[3].isna(), NAMES["full"])
    thread_counts, batches = sorted(set(shown["threads"])), sorted(set(shown["batch"]))
    figure = Figure(figsize=(1.8 + 2.4 * len(thread_counts), 2.9))
    panels = figure.subplots(1, len(thread_counts), squeeze=False, sharey=True)[0]
    for axes, threads in zip(panels, thread_counts, strict=True):
        here = shown["threads"] == threads
        bandwidth = float((codes / seconds)[here & (shown["batch"] == 1)].max())
        peak = float((operations / seconds)[here].max())
        ends = np.array([(operations / codes)[here].min() / 1.5, (operations / codes)[here].max() * 1.5])
        roof = np.sort([*ends, peak / bandwidth])
        axes.plot(roof, 1e-9 * np.minimum(bandwidth * roof, peak), color="#BBBBBB", linewidth=1, zorder=0)
        limits = f"{1e-9 * bandwidth:.0f} GB/s, {1e-9 * peak:.0f} GOP/s"
        axes.set(xscale="log", yscale="log", xlabel="operations per byte of codes")
        axes.set_title(f"{threads} thread{'s'[: threads != 1]}\nbest: {limits}")
        for place, label in enumerate(sorted(set(labels))):
            for batch, marker in zip(batches, MARKERS, strict=False):
                rows = here & (labels == label) & (shown["batch"] == batch)
                axes.plot((operations / codes)[rows], 1e-9 * (operations / seconds)[rows], marker,
                          color=f"C{place % 7}", markersize=3, alpha=0.7,
                          label=label if batch == batches[0] else "")  # fmt: skip
    panels[0].set_ylabel("billion operations per second")
    handles, names = panels[0].get_legend_handles_labels()
    handles += [Line2D([], [], color="#777777", marker=marker, linestyle="none", markersize=3)
                for marker, _ in zip(MARKERS, batches, strict=False)]  # fmt: skip
    handles.append(Line2D([], [], color="#BBBBBB"))
    names += [*(f"batch {batch}" for batch in batches), "best of the products:\nbytes at batch 1, rate"]
    figure.legend(handles, names, loc="outside right center")
    return figure
