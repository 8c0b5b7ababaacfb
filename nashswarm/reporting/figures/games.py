"""Figures of the games: how potential, regret and codes converge, and which bits and steps the game chose."""

import textwrap
from collections.abc import Iterable
from typing import Any

import matplotlib
import matplotlib.ticker
import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from numpy.typing import NDArray

from nashswarm.records.record import Record
from nashswarm.reporting.figures.style import (
    COLOURS,
    MARKERS,
    NEGLIGIBLE,
    NothingToDraw,
    by_method,
    colour,
    floored,
    refuse_crowd,
    shade,
)
from nashswarm.reporting.labels import REFERENCE, rank


def sweep_values(record: Record, name: str) -> list[float]:
    """Return ``potential`` or ``regret`` before the first and after every sweep, in nats per token.

    The values are of the game at the reference rate, which is solved once for all budgets, where the record has them,
    else of the game at the record's own budget; the list is empty if the record has neither.
    """
    return record.series.get(f"{name}_of_reference") or record.series.get(name) or []


def convergence(records: Iterable[Record]) -> Figure:
    """Draw the change of potential and the largest regret after each sweep of best responses, one line a method.

    Each method shows its first seed; a line drawn over another one is narrower.  Where records have them, a first panel
    shows the price at each trial of the search for the budget, over the last price.

    Raises NothingToDraw if no record has potential and regret, or if too many methods have.
    """
    groups = by_method(one for one in records if sweep_values(one, "potential") and sweep_values(one, "regret"))
    if not groups:
        raise NothingToDraw("no record has sweeps of best responses; run a method that plays, for example nash_lattice")
    refuse_crowd(groups)
    first_seeds = {method: group[0] for method, group in groups.items()}
    priced = any(one.series.get("price_of_trial") for one in first_seeds.values())
    figure = Figure(figsize=(7.6 if priced else 5.8, max(2.2, 0.2 + 0.15 * len(first_seeds))))
    *prices, above, below = figure.subplots(1, 2 + priced)
    regrets = np.concatenate([sweep_values(one, "regret") for one in first_seeds.values()])
    floor = floored(regrets, NEGLIGIBLE["regret"])[2]
    changes: list[float] = []
    for place, (method, one) in enumerate(reversed(first_seeds.items())):
        line: dict[str, Any] = {"color": f"C{place % 7}", "zorder": 3 - place / 100, "linewidth": 1 + 0.7 * (place % 3)}
        dots = line | {"marker": MARKERS[place // 7 % len(MARKERS)], "markersize": 3}
        change = np.array(sweep_values(one, "potential")) - sweep_values(one, "potential")[0]
        changes += np.abs(change[change != 0]).tolist()
        above.plot(change, label=method, **dots)
        regret = np.array(sweep_values(one, "regret"))
        zero = regret <= NEGLIGIBLE["regret"]
        lifted = np.where(zero, floor, regret)
        below.plot(lifted, **line)
        below.plot(np.flatnonzero(~zero), lifted[~zero], linestyle="none", **dots)
        hollow = dots | {"markersize": 4, "markerfacecolor": "white", "zorder": 4}
        below.plot(np.flatnonzero(zero), lifted[zero], linestyle="none", **hollow)
        for axes in prices:
            trials = np.array(one.series.get("price_of_trial", []))
            axes.plot(1 + np.arange(len(trials)), trials / trials[-1:], **dots)
    below.set_yscale("log")
    if (regrets <= NEGLIGIBLE["regret"]).any():
        below.set_title("hollow: no regret left")
    if changes and max(changes) > 100 * min(changes):
        above.set_yscale("symlog", linthresh=min(changes))
    above.set_ylabel("change of potential\n(nats per token)")
    below.set_ylabel("largest regret\n(nats per token)")
    for axes in prices:
        axes.set(xlabel="trial of a price", ylabel="price ÷ the last price", yscale="log")
        for set_formatter in (axes.yaxis.set_major_formatter, axes.yaxis.set_minor_formatter):
            set_formatter(matplotlib.ticker.FuncFormatter(lambda tick, _: f"{tick:g}"))
    for axes in (above, below):
        axes.set_xlabel("sweep of best responses")
    for axes in (*prices, above, below):
        axes.xaxis.set_major_locator(matplotlib.ticker.MaxNLocator(integer=True))
    figure.legend(loc="outside right center")
    return figure


def settling(records: Iterable[Record]) -> Figure:
    """Draw the share of all codes that changed in each sweep of coordinate descent, one line a method.

    Each method shows its first seed.  A hollow mark at the end means that no code changed any more.

    Raises ValueError if no record has such sweeps, or if too many methods have.
    """
    groups = by_method(records, "moves")
    if not groups:
        raise ValueError("no record has sweeps of codes; run a method whose codes settle, for example nash_lattice")
    refuse_crowd(groups)
    figure = Figure(figsize=(5.2, 2.6))
    axes = figure.add_subplot(yscale="log", xlabel="sweep of best replies", ylabel="codes that moved (%)")
    percent_of = {
        method: 100 * np.array(group[0].series["moves"]) / sum(layer["parameters"] for layer in group[0].layers)
        for method, group in groups.items()
    }
    floor = min(float(percent[percent > 0].min()) for percent in percent_of.values()) / 2
    for place, (method, percent) in enumerate(reversed(percent_of.items())):
        sweeps = 1 + np.arange(len(percent))
        axes.plot(sweeps, np.maximum(percent, floor), "-", color=f"C{place % 7}", label=method, linewidth=0.9)
        for moved, face in ((percent > 0, f"C{place % 7}"), (percent == 0, "white")):
            axes.plot(
                sweeps[moved], np.maximum(percent[moved], floor), "o",
                color=f"C{place % 7}", markerfacecolor=face, markersize=3,
            )  # fmt: skip
    axes.xaxis.set_major_locator(matplotlib.ticker.MaxNLocator(integer=True))
    figure.legend(loc="outside right center")
    return figure


def tiles(allocation: str) -> dict[str, NDArray[np.int64]]:
    """Return the bits of each tile of every tiled layer, shape (row blocks, column groups).

    A line of trellis tiles has their mean rate, a decimal number, before the runs, and no count in runs of one tile.
    Layers stored as floats, layers of mixed formats and layers on a lattice are left out; the line of the latter begins
    with their bits per weight, a decimal number.  Raises ValueError for a line that is no allocation.

    >>> tiles("head 2x3 4*2 8*4\\nnorm 16\\nmlp mixed\\nwte 3.9 +0*32")["head"].tolist()
    [[4, 4, 8], [8, 8, 8]]
    >>> tiles("head 2x2 2.750 3*2 2 3")["head"].tolist()
    [[3, 3], [2, 3]]
    """
    grids = {}
    for line in allocation.splitlines():
        layer, *words = line.split()
        if len(words) == 1 or words[-1] == "mixed" or "." in words[0]:
            continue
        try:
            rows, columns = map(int, words[0].split("x"))
            runs = [word.partition("*") for word in words[1:] if "." not in word]
            bits, counts = [int(width) for width, _, _ in runs], [int(count or 1) for _, _, count in runs]
            grids[layer] = np.repeat(bits, counts).reshape(rows, columns)
        except (ValueError, IndexError) as error:
            raise ValueError(
                f"allocation of {layer!r} is not '<rows>x<columns> <bits>*<count> ...': {error}"
            ) from error
    return grids


def most_varied(grids: dict[str, NDArray[np.int64]]) -> str:
    """Return the layer whose tile bits have the largest entropy, the first of equals."""

    def entropy(layer: str) -> float:
        counts = np.unique(grids[layer], return_counts=True)[1] / grids[layer].size
        return float(-(counts * np.log(counts)).sum())

    return max(grids, key=entropy)


def bit_map(allocation: str, layer: str | None = None) -> Figure:
    """Draw the tiles of one layer coloured by their bits, the longer side across.

    By default it is the layer that varies most.  Raises ValueError if there is no such tiled layer.
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
    shares = {width: f"{width} ({(grid == width).mean():.0%})" for width in widths}
    handles = [
        Patch(facecolor=shade(width), edgecolor="#777777", linewidth=0.5, label=share)
        for width, share in shares.items()
    ]
    figure.legend(handles=handles, loc="outside right center", title="bits", handlelength=1, handleheight=1)
    return figure


def layer_bits(record: Record) -> Figure:
    """Draw the stored bits per weight of every layer of one run, scales and tags included.

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


def offsets(allocation: str) -> dict[str, tuple[float, NDArray[np.int64]]]:
    """Return, for every layer on a lattice, the bits per weight of its codes and the step offset of each block.

    An offset is relative to the step that the price gives, in quarter octaves; a positive one is coarser.  Layers made
    of tiles or floats are left out.

    >>> offsets("wte 3.9 +0*2 -1*1\\nhead 2x3 4*6\\nnorm 16")["wte"][1].tolist()
    [0, 0, -1]
    """
    offsets_of = {}
    for line in allocation.splitlines():
        layer, *words = line.split()
        if words and "." in words[0]:
            runs = [tuple(map(int, word.split("*"))) for word in words[1:]]
            blocks = np.repeat([offset for offset, _ in runs], [length for _, length in runs])
            offsets_of[layer] = float(words[0]), blocks
    return offsets_of


def decisions(runs: Iterable[Record]) -> Figure:
    """Draw what the game decided for a whole model, a row a layer: bits per weight, and the offset of every block.

    Blocks are in the order of the rows of their matrix.  Of several runs the last one in the order of tables is drawn,
    where ``nash_lattice`` stands.  Raises ValueError if no layer is on a lattice.
    """
    ranked = sorted(runs, key=lambda one: (rank(one.labels["method"]), one.labels["model"], one.labels["seed"]))
    games = [one for one in ranked if offsets(one.allocation)]
    if not games:
        raise ValueError("no run has blocks with steps of their own; run nash_lattice")
    layers, labels = offsets(games[-1].allocation), games[-1].labels
    largest = max(int(np.abs(blocks).max()) for _, blocks in layers.values()) or 1
    figure = Figure(figsize=(5.2, 0.9 + 0.13 * len(layers)))
    left, right = figure.subplots(1, 2, sharey=True, width_ratios=(1, 3))
    left.barh(range(len(layers)), [bits for bits, _ in layers.values()], color=COLOURS[REFERENCE], height=0.8)
    left.set_yticks(range(len(layers)), layers, fontsize=6)
    left.tick_params(axis="y", length=0)
    left.set_xlabel("bits per weight")
    colours = matplotlib.colormaps["PuOr"].resampled(2 * largest + 1)
    for row, (_, blocks) in enumerate(layers.values()):
        image = right.imshow(
            blocks[None], cmap=colours, vmin=-largest - 0.5, vmax=largest + 0.5, aspect="auto", interpolation="nearest",
            extent=(0, 1, row + 0.4, row - 0.4),
        )  # fmt: skip
    right.set(xlim=(0, 1), ylim=(len(layers) - 0.4, -0.6), title=wrapped(f"{labels['method']} of {labels['model']}"))
    right.set_xlabel("blocks, from the first rows to the last")
    right.set_xticks([])
    right.tick_params(axis="y", length=0)
    bar = figure.colorbar(image, ax=right, ticks=range(-largest, largest + 1), fraction=0.05, aspect=30, pad=0.02)
    bar.set_label("step, in quarter octaves: finer below 0")
    return figure


def wrapped(title: str) -> str:
    """Break a long title into lines.

    >>> print(wrapped("nash_lattice[bits=2.5,code_game=pass,rate_in_codes=0.25] of default"))
    nash_lattice[bits=2.5, code_game=pass,
    rate_in_codes=0.25] of default
    """
    return textwrap.fill(title.replace(",", ", "), 44)
