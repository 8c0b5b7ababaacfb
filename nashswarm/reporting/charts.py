"""Figures of what compression costs and wins: accuracy, sensitivities of layers, the codes' way to rest, what blocks
decided, speed, memory, the roofline of products, what clients of a server wait; and how evenly routers use their
experts, and at what loss.

As in ``figures``: records or a data frame in, a matplotlib figure out, with whatever style is in force.
"""

import textwrap
from collections.abc import Iterable
from typing import Any

import matplotlib
import matplotlib.ticker
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from numpy.typing import NDArray

from nashswarm.records.record import Record
from nashswarm.reporting import curves
from nashswarm.reporting.curves import by_method, colour, markers, name_families, refuse_crowd
from nashswarm.reporting.frame import family_of, rank
from nashswarm.reporting.typeset import FORMATS, REFERENCE

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


def accuracy(points: pd.DataFrame) -> Figure:
    """How often the compressed model's first choice is the full one's, in per cent, against how many times smaller than
    32-bit floats its file is; the sizes of one method are joined, and named once.

    ``points``: from ``report.points`` or ``report.average``, of one model, dataset and measure.
    Raises ValueError if no row has both numbers, or if rows of several models, datasets or measures are mixed.
    """
    mixed = [label for label in ("model", "dataset", "measure") if points[label].nunique() > 1]
    if mixed:
        raise ValueError(f"one figure shows one {', one '.join(mixed)}; select it first")
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
    looks = markers(families)
    for family in dict.fromkeys(families):
        own = np.flatnonzero(families == family)
        own = own[times[own].argsort()]
        axes.plot(times[own], agreement[own], looks[family] + "-", color=colour(family), linewidth=0.8)
        names[own[-1]] = family
    axes.xaxis.set_major_locator(matplotlib.ticker.LogLocator(subs=(1, 1.2, 1.5, 2, 3, 4, 5, 6, 8)))
    axes.xaxis.set_major_formatter(matplotlib.ticker.FuncFormatter(lambda tick, _: f"{tick:g}×"))
    axes.xaxis.set_minor_formatter(matplotlib.ticker.NullFormatter())
    axes.margins(0.14, 0.08)
    name_families(figure, times, agreement, families.tolist(), names)
    return figure


def settling(records: Iterable[Record]) -> Figure:
    """The share of all codes that moved in each sweep of best replies, one line a method (its first seed); a hollow
    mark at the end: nobody moved any more.

    Raises ValueError if no record has such sweeps, or too many methods have.
    """
    groups = by_method(records, "moves")
    if not groups:
        raise ValueError("no record has sweeps of codes; run a method whose codes settle, for example nash_swarm")
    refuse_crowd(groups)
    figure = Figure(figsize=(5.2, 2.6))
    axes = figure.add_subplot(yscale="log", xlabel="sweep of best replies", ylabel="codes that moved (%)")
    shares = {
        method: 100 * np.array(group[0].series["moves"]) / sum(layer["parameters"] for layer in group[0].layers)
        for method, group in groups.items()
    }
    floor = min(float(share[share > 0].min()) for share in shares.values()) / 2
    for place, (method, share) in enumerate(reversed(shares.items())):
        sweeps = 1 + np.arange(len(share))
        axes.plot(sweeps, np.maximum(share, floor), "-", color=f"C{place % 7}", label=method, linewidth=0.9)
        for moved, face in ((share > 0, f"C{place % 7}"), (share == 0, "white")):
            axes.plot(
                sweeps[moved], np.maximum(share[moved], floor), "o",
                color=f"C{place % 7}", markerfacecolor=face, markersize=3,
            )  # fmt: skip
    axes.xaxis.set_major_locator(matplotlib.ticker.MaxNLocator(integer=True))
    figure.legend(loc="outside right center")
    return figure


def offsets(allocation: str) -> dict[str, tuple[float, NDArray[np.int64]]]:
    """Of every layer on a lattice: bits per weight of its codes, and each block's offset to the step that the price
    gives it, in quarter octaves, coarser above zero; layers made of tiles or floats are left out.

    >>> offsets("wte 3.9 +0*2 -1*1\\nhead 2x3 4*6\\nnorm 16")["wte"][1].tolist()
    [0, 0, -1]
    """
    found = {}
    for line in allocation.splitlines():
        layer, *words = line.split()
        if words and "." in words[0]:
            runs = [tuple(map(int, word.split("*"))) for word in words[1:]]
            found[layer] = float(words[0]), np.repeat([shift for shift, _ in runs], [length for _, length in runs])
    return found


def decisions(runs: Iterable[Record]) -> Figure:
    """What the game decided for a whole model, a row a layer: bits per weight, and the offset of every block where it
    stands among the rows of its matrix.  Of several runs the last in the order of tables, where ``nash_swarm`` is.

    Raises ValueError if no layer is on a lattice.
    """
    ranked = sorted(runs, key=lambda one: (rank(one.labels["method"]), one.labels["model"], one.labels["seed"]))
    games = [one for one in ranked if offsets(one.allocation)]
    if not games:
        raise ValueError("no run has blocks with steps of their own; run nash_swarm")
    layers, whose = offsets(games[-1].allocation), games[-1].labels
    most = max(int(np.abs(shifts).max()) for _, shifts in layers.values()) or 1
    figure = Figure(figsize=(5.2, 0.9 + 0.13 * len(layers)))
    left, right = figure.subplots(1, 2, sharey=True, width_ratios=(1, 3))
    left.barh(range(len(layers)), [bits for bits, _ in layers.values()], color=curves.COLOURS[REFERENCE], height=0.8)
    left.set_yticks(range(len(layers)), layers, fontsize=6)
    left.tick_params(axis="y", length=0)
    left.set_xlabel("bits per weight")
    colours = matplotlib.colormaps["PuOr"].resampled(2 * most + 1)
    for row, (_, shifts) in enumerate(layers.values()):
        drawn = right.imshow(
            shifts[None], cmap=colours, vmin=-most - 0.5, vmax=most + 0.5, aspect="auto", interpolation="nearest",
            extent=(0, 1, row + 0.4, row - 0.4),
        )  # fmt: skip
    right.set(xlim=(0, 1), ylim=(len(layers) - 0.4, -0.6), title=wrapped(f"{whose['method']} of {whose['model']}"))
    right.set_xlabel("blocks, from the first rows to the last")
    right.set_xticks([])
    right.tick_params(axis="y", length=0)
    bar = figure.colorbar(drawn, ax=right, ticks=range(-most, most + 1), fraction=0.05, aspect=30, pad=0.02)
    bar.set_label("step, in quarter octaves: finer below 0")
    return figure


def wrapped(title: str) -> str:
    """
    >>> print(wrapped("nash_swarm[bits=2.5,code_game=pass,rate_in_codes=0.25] of default"))
    nash_swarm[bits=2.5, code_game=pass,
    rate_in_codes=0.25] of default
    """
    return textwrap.fill(title.replace(",", ", "), 44)


def sensitivity(layers: pd.DataFrame) -> Figure:
    """What each matrix was predicted to cost against what it costs when it alone is compressed, one panel a method.

    ``layers``: from ``tables.layers``.  Raises ValueError if no matrix has both numbers.
    """
    shown = layers if "layer_damage" not in layers else layers[(layers["layer_damage"] > 0) & (layers["layer_kl"] > 0)]
    if "layer_damage" not in layers or shown.empty:
        raise ValueError("no record tells predicted from measured damage of single matrices; run experiment=layers")
    methods = list(dict.fromkeys(shown["method"]))
    roles = shown["layer"].str.split(".").str[-2:].str.join(".").str.replace(r"^\d+\.", "", regex=True)
    figure = Figure(figsize=(2.2 + 2.0 * len(methods), 2.6))
    every = figure.subplots(1, len(methods), squeeze=False, sharex=True, sharey=True)[0]
    values = shown[["layer_damage", "layer_kl"]].to_numpy(float)
    ends = [values.min() / 1.5, values.max() * 1.5]
    for axes, method in zip(every, methods, strict=True):
        axes.set(xscale="log", yscale="log", title=method, xlabel="predicted damage (nats per token)")
        axes.plot(ends, ends, color="#BBBBBB", linewidth=0.8, zorder=0)
        for place, role in enumerate(dict.fromkeys(roles)):
            own = shown[(shown["method"] == method) & (roles == role)]
            marker = "osD^vP*X"[place % 8]
            axes.plot(own["layer_damage"], own["layer_kl"], marker, color=f"C{place % 7}", label=role, linestyle="none")
    every[0].set_ylabel("KL when alone (nats per token)")
    handles, names = every[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside right center")
    return figure


def rows_of(contestants: pd.DataFrame) -> tuple[pd.DataFrame, list[str]]:
    """The contestants of one figure and their names: full precision, then what others made, each once whatever method
    it was timed beside, then each method's packed forms; the threads are named where they differ.

    Raises ValueError if there are none, or if models differ.
    """
    if contestants.empty:
        raise ValueError("no record timed contestants; run experiment=speed")
    if contestants["model"].nunique() > 1:
        raise ValueError("one figure shows one model; select it first")
    own = contestants["contestant"].isin(OURS)
    foreign = contestants[~own].drop_duplicates("contestant")
    foreign = foreign.sort_values("contestant", key=lambda names: names != "full", kind="stable")
    ours = contestants[own].sort_values("method", key=lambda methods: methods.map(rank), kind="stable")
    shown = pd.concat([foreign, ours], ignore_index=True)
    names = shown["contestant"].map(lambda one: NAMES.get(one, one))
    if shown["method"].nunique() > 1:
        names += (": " + shown["method"]).where(shown["contestant"].isin(OURS), "")
    if "threads" in shown and shown["threads"].nunique() > 1:
        names += shown["threads"].map(lambda threads: f", {threads:g} thread{'s'[: threads != 1]}")
    return shown, names.tolist()


def _listed(axes: Axes, names: list[str]) -> None:
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.tick_params(axis="y", length=0)


def speed(contestants: pd.DataFrame) -> Figure:
    """How many times faster than the full model each contestant is, with 95 % intervals, for every phase.

    ``contestants``: from ``tables.speed``.  Raises ValueError if none was timed against the full model.
    """
    shown, names = rows_of(contestants)
    timed = (shown["contestant"] != "full").to_numpy()
    shown, names = shown[timed].reset_index(drop=True), [name for name, own in zip(names, timed, strict=True) if own]
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
    _listed(axes, names)
    axes.xaxis.set_major_locator(matplotlib.ticker.LogLocator(subs=(1, 2, 3, 5)))
    axes.xaxis.set_major_formatter(matplotlib.ticker.FuncFormatter(lambda tick, _: f"{tick:g}×"))
    axes.xaxis.set_minor_formatter(matplotlib.ticker.NullFormatter())
    figure.legend(loc="outside upper center", ncols=3)
    return figure


def memory(contestants: pd.DataFrame) -> Figure:
    """What the running model of each contestant holds in memory, in megabytes.

    ``contestants``: from ``tables.speed``.  Raises ValueError if none was measured.
    """
    shown, names = rows_of(contestants)
    figure = Figure(figsize=(5.2, 0.6 + 0.24 * len(names)))
    axes = figure.add_subplot(xlabel="held in memory (MB)")
    sizes = shown["bytes_resident"].to_numpy(float)
    ours = shown["contestant"].isin(OURS)
    inks = [curves.COLOURS[REFERENCE] if own else "#777777" for own in ours]
    axes.barh(range(len(names)), 1e-6 * sizes, height=0.6, color=inks)
    for row, size in enumerate(sizes):
        axes.annotate(FORMATS["bytes_resident"](size), (1e-6 * size, row), (4, 0), textcoords="offset points",
                      va="center", fontsize=7)  # fmt: skip
    _listed(axes, names)
    axes.margins(x=0.12)
    return figure


def latency(served: pd.DataFrame) -> Figure:
    """The percentiles of what clients wait, of the full model and of the compressed one, against their number; where
    each client asks once it is answered, and where requests come by themselves.

    ``served``: from ``tables.serving``, of one model and method.  Raises ValueError if there is none.
    """
    if served.empty:
        raise ValueError("no record tells what clients of a server wait; run experiment=load")
    if len(served[["model", "method"]].drop_duplicates()) > 1:
        raise ValueError("one figure shows one model and method; select them first")
    loops = list(served.groupby("rate", dropna=False, sort=False))
    figure = Figure(figsize=(2.2 + 1.8 * len(loops), 2.6))
    every = figure.subplots(1, len(loops), squeeze=False, sharey=True)[0]
    for axes, (_, rows) in zip(every, loops, strict=True):
        rate = rows["rate"].iloc[0]
        title = "each asks once it is answered" if pd.isna(rate) else f"requests by themselves, {rate:g} per second"
        axes.set(yscale="log", title=title, xlabel="clients", xticks=range(len(rows)))
        axes.set_xticklabels([f"{clients:g}" for clients in rows["clients"]])
        for suffix, ink, whose in (
            ("_full", "#777777", "32-bit floats"),
            ("", curves.COLOURS[REFERENCE], "compressed"),
        ):
            for level, line in ((50, "o-"), (95, "s--"), (99, "^:")):
                seconds = 1e-3 * rows[f"latency_p{level}_ms{suffix}"]
                axes.plot(range(len(rows)), seconds, line, color=ink, markersize=3.5, label=f"{whose}, P{level}")
        axes.yaxis.set_major_formatter(matplotlib.ticker.FuncFormatter(lambda tick, _: f"{tick:g}"))
    every[0].set_ylabel("wait for an answer (s)")
    handles, names = every[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside right center")
    return figure


def crowding(records: Iterable[Record]) -> Figure:
    """How much work each expert got of an even share, experts in the order of it, mean over layers and seeds; one panel
    a model, one line a router.

    Raises ValueError if no record has loads of experts.
    """
    found: dict[str, dict[str, list[np.ndarray]]] = {}
    for one in records:
        loads = [np.sort(values)[::-1] for name, values in one.series.items() if name.startswith("load_")]
        if loads:
            own = found.setdefault(one.labels["model"], {}).setdefault(one.labels["method"], [])
            own += [load / load.mean() for load in loads]
    if not found:
        raise ValueError("no record has loads of experts; run experiment=moe")
    figure = Figure(figsize=(1.6 + 2.1 * len(found), 2.6))
    every = figure.subplots(1, len(found), squeeze=False, sharey=True)[0]
    methods = sorted({method for routers in found.values() for method in routers}, key=rank)
    for axes, (model, routers) in zip(every, sorted(found.items(), key=lambda item: rank(item[0])), strict=True):
        axes.set(title=model, xlabel="experts, the busiest first")
        axes.axhline(1, color="#BBBBBB", linewidth=0.8, zorder=0)
        for method in (name for name in methods if name in routers):
            place = methods.index(method)
            mean = np.mean(routers[method], axis=0)
            axes.plot(1 + np.arange(len(mean)), mean, "osD^vP*X"[place % 8] + "-", color=f"C{place % 7}", label=method,
                      markersize=3, markevery=max(len(mean) // 8, 1), linewidth=0.9)  # fmt: skip
    every[0].set_ylabel("work ÷ even share")
    handles = {name: line for axes in every for line, name in zip(*axes.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles.keys(), loc="outside right center")
    return figure


def routing(records: Iterable[Record]) -> Figure:
    """The loss of every router against how far its busiest expert lies above an even share (MaxVio): a dot a seed, the
    mean large, and hollow at the end of a line where prices follow the text that is read; the dense network's loss
    across.  One panel a model.  Routers that look ahead in the text are left out, for their loss is another.

    Raises ValueError if no record has both.
    """
    gathered = list(records)
    routers = [one for one in gathered if one.metrics.get("max_violation") and not one.metrics.get("looks_ahead")]
    if not routers:
        raise ValueError("no record has a router's loss and MaxVio; run experiment=moe")
    models = sorted({one.labels["model"] for one in routers}, key=rank)
    methods = sorted({one.labels["method"] for one in gathered if "max_violation" in one.metrics}, key=rank)
    figure = Figure(figsize=(1.8 + 2.3 * len(models), 2.6))
    every = figure.subplots(1, len(models), squeeze=False, sharey=True)[0]
    for axes, model in zip(every, models, strict=True):
        axes.set(title=model, xscale="log", xlabel="MaxVio")
        others = [one.metrics for one in gathered if one.labels["model"] == model]
        dense = [metrics["nll"] for metrics in others if "nll" in metrics and "max_violation" not in metrics]
        if dense:
            axes.axhline(float(np.mean(dense)), color="#777777", linestyle=":", linewidth=0.8, label="dense", zorder=0)
        for place, method in enumerate(methods):
            runs = [one.metrics for one in routers if (one.labels["model"], one.labels["method"]) == (model, method)]
            look = {"color": f"C{place % 7}", "marker": curves.MARKERS[place], "linestyle": "none"}
            for metrics in runs:
                axes.plot(metrics["max_violation"], metrics["nll"], markersize=2, alpha=0.6, **look)
            ends = [
                np.mean([[metrics[f"max_violation{suffix}"], metrics[f"nll{suffix}"]] for metrics in runs], axis=0)
                for suffix in ("", "_following")
                if runs and all(f"nll{suffix}" in metrics for metrics in runs)
            ]
            axes.plot(*np.transpose(ends or np.empty((0, 2))), color=look["color"], linewidth=0.8)
            for end, face in zip(ends, (look["color"], "white"), strict=False):
                axes.plot(*end, markersize=5, markerfacecolor=face, label=method, **look)
    every[0].set_ylabel("loss (nats per token)")
    handles: dict[str, Any] = {}
    for axes in every:
        for line, name in zip(*axes.get_legend_handles_labels(), strict=True):
            handles.setdefault(name, line)
    figure.legend(handles.values(), handles.keys(), loc="outside right center", title="hollow: prices\nfollow the text")
    return figure


def roofline(products: pd.DataFrame) -> Figure:
    """Rate against arithmetic intensity of every product with packed matrices, one panel a number of threads.

    ``products``: the rows that ``experiments.benchmarks.kernels`` wrote.  Intensity: operations, two a weight and row
    of the batch, per byte of codes, scales apart.  No benchmark of the machine is at hand, so the roof is what the
    products themselves reached: the most bytes of codes per second at batch 1, and the highest rate.

    Raises ValueError if no product has a width that its name tells.
    """
    kinds = products["kernel"].str.extract(r"^(onnxruntime )?(?:([\d+]+) bits, .*, (int8|float32)|(torch fp32))$")
    known = (kinds[1].notna() | kinds[3].notna()).to_numpy()
    if not known.any():
        raise ValueError("no product is told in bits; run python -m experiments.benchmarks.kernels")
    shown, kinds = products[known], kinds[known]
    bits = kinds[1].fillna("32").map(lambda widths: float(np.mean([int(width) for width in widths.split("+")])))
    weights = shown["shape"].str.split("x").map(lambda sides: int(sides[0]) * int(sides[1]))
    seconds, codes = 1e-6 * shown["microseconds"], weights * bits / 8
    operations = 2 * weights * shown["batch"]
    activations = kinds[2].replace({"int8": "8-bit activations", "float32": "32-bit activations"})
    owners = kinds[0].map({"onnxruntime ": NAMES["onnxruntime"].split(",")[0]}).fillna("packed")
    whose = (owners + ", " + activations).where(kinds[3].isna(), NAMES["full"])
    panels, batches = sorted(set(shown["threads"])), sorted(set(shown["batch"]))
    figure = Figure(figsize=(1.8 + 2.4 * len(panels), 2.9))
    every = figure.subplots(1, len(panels), squeeze=False, sharey=True)[0]
    for axes, threads in zip(every, panels, strict=True):
        here = shown["threads"] == threads
        bandwidth = float((codes / seconds)[here & (shown["batch"] == 1)].max())
        peak = float((operations / seconds)[here].max())
        ends = np.array([(operations / codes)[here].min() / 1.5, (operations / codes)[here].max() * 1.5])
        roof = np.sort([*ends, peak / bandwidth])
        axes.plot(roof, 1e-9 * np.minimum(bandwidth * roof, peak), color="#BBBBBB", linewidth=1, zorder=0)
        told = f"{1e-9 * bandwidth:.0f} GB/s, {1e-9 * peak:.0f} GOP/s"
        axes.set(xscale="log", yscale="log", xlabel="operations per byte of codes")
        axes.set_title(f"{threads} thread{'s'[: threads != 1]}\nbest: {told}")
        for place, name in enumerate(sorted(set(whose))):
            for batch, marker in zip(batches, curves.MARKERS, strict=False):
                own = here & (whose == name) & (shown["batch"] == batch)
                axes.plot((operations / codes)[own], 1e-9 * (operations / seconds)[own], marker, color=f"C{place % 7}",
                          markersize=3, alpha=0.7, label=name if batch == batches[0] else "")  # fmt: skip
    every[0].set_ylabel("billion operations per second")
    handles, names = every[0].get_legend_handles_labels()
    handles += [Line2D([], [], color="#777777", marker=one, linestyle="none", markersize=3)
                for one, _ in zip(curves.MARKERS, batches, strict=False)]  # fmt: skip
    handles.append(Line2D([], [], color="#BBBBBB"))
    names += [*(f"batch {batch}" for batch in batches), "best of the products:\nbytes at batch 1, rate"]
    figure.legend(handles, names, loc="outside right center")
    return figure
