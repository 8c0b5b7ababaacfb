"""Figures of mixtures of experts: how evenly routers load their experts, and at what loss."""

from collections.abc import Iterable
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from nashswarm.records.record import Record
from nashswarm.reporting.figures.style import MARKERS
from nashswarm.reporting.labels import rank


def crowding(records: Iterable[Record]) -> Figure:
    """Draw the load of each expert over an even share, the busiest expert first; one panel a model, one line a router.

    Loads are sorted in every layer and seed, then averaged.  Raises ValueError if no record has loads of experts.
    """
    loads_of: dict[str, dict[str, list[np.ndarray]]] = {}
    for one in records:
        loads = [np.sort(values)[::-1] for name, values in one.series.items() if name.startswith("load_")]
        if loads:
            runs = loads_of.setdefault(one.labels["model"], {}).setdefault(one.labels["method"], [])
            runs += [load / load.mean() for load in loads]
    if not loads_of:
        raise ValueError("no record has loads of experts; run experiment=moe")
    figure = Figure(figsize=(1.6 + 2.1 * len(loads_of), 2.6))
    panels = figure.subplots(1, len(loads_of), squeeze=False, sharey=True)[0]
    methods = sorted({method for routers in loads_of.values() for method in routers}, key=rank)
    for axes, (model, routers) in zip(panels, sorted(loads_of.items(), key=lambda item: rank(item[0])), strict=True):
        axes.set(title=model, xlabel="experts, the busiest first")
        axes.axhline(1, color="#BBBBBB", linewidth=0.8, zorder=0)
        for method in (name for name in methods if name in routers):
            place = methods.index(method)
            mean = np.mean(routers[method], axis=0)
            axes.plot(1 + np.arange(len(mean)), mean, "osD^vP*X"[place % 8] + "-", color=f"C{place % 7}", label=method,
                      markersize=3, markevery=max(len(mean) // 8, 1), linewidth=0.9)  # fmt: skip
    panels[0].set_ylabel("work ÷ even share")
    handles = {name: line for axes in panels for line, name in zip(*axes.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles.keys(), loc="outside right center")
    return figure


def routing(records: Iterable[Record]) -> Figure:
    """Draw the loss of every router against MaxVio, how far its busiest expert lies above an even share.

    One panel a model: a small dot is a seed, a large one the mean.  A line leads to a hollow mark, the mean where
    prices follow the text that is read.  The dotted line is the loss of the dense network.  Routers that look ahead in
    the text are left out, because their loss cannot be compared.

    Raises ValueError if no record has both numbers.
    """
    runs = list(records)
    routers = [one for one in runs if one.metrics.get("max_violation") and not one.metrics.get("looks_ahead")]
    if not routers:
        raise ValueError("no record has a router's loss and MaxVio; run experiment=moe")
    models = sorted({one.labels["model"] for one in routers}, key=rank)
    methods = sorted({one.labels["method"] for one in runs if "max_violation" in one.metrics}, key=rank)
    figure = Figure(figsize=(1.8 + 2.3 * len(models), 2.6))
    panels = figure.subplots(1, len(models), squeeze=False, sharey=True)[0]
    for axes, model in zip(panels, models, strict=True):
        axes.set(title=model, xscale="log", xlabel="MaxVio")
        of_model = [one.metrics for one in runs if one.labels["model"] == model]
        dense = [metrics["nll"] for metrics in of_model if "nll" in metrics and "max_violation" not in metrics]
        if dense:
            axes.axhline(float(np.mean(dense)), color="#777777", linestyle=":", linewidth=0.8, label="dense", zorder=0)
        for place, method in enumerate(methods):
            seeds = [one.metrics for one in routers if (one.labels["model"], one.labels["method"]) == (model, method)]
            mark = {"color": f"C{place % 7}", "marker": MARKERS[place], "linestyle": "none"}
            for metrics in seeds:
                axes.plot(metrics["max_violation"], metrics["nll"], markersize=2, alpha=0.6, **mark)
            means = [
                np.mean([[metrics[f"max_violation{suffix}"], metrics[f"nll{suffix}"]] for metrics in seeds], axis=0)
                for suffix in ("", "_following")
                if seeds and all(f"nll{suffix}" in metrics for metrics in seeds)
            ]
            axes.plot(*np.transpose(means or np.empty((0, 2))), color=mark["color"], linewidth=0.8)
            for mean, face in zip(means, (mark["color"], "white"), strict=False):
                axes.plot(*mean, markersize=5, markerfacecolor=face, label=method, **mark)
    panels[0].set_ylabel("loss (nats per token)")
    handles: dict[str, Any] = {}
    for axes in panels:
        for line, name in zip(*axes.get_legend_handles_labels(), strict=True):
            handles.setdefault(name, line)
    figure.legend(handles.values(), handles.keys(), loc="outside right center", title="hollow: prices\nfollow the text")
    return figure
