"""Figures of the flock: blocks in feature space, the neighbours of one of them, and their bits during best responses.

A recording (``dynamics``) is the report of ``experiments.benchmarks.flock_dynamics``.  It has ``places`` (blocks × 2),
``links`` (pairs of blocks), ``watched`` (one block), ``neighbours`` (of that block) and ``frames``, each with
``offsets`` and ``bits`` per block.
"""

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.animation import FuncAnimation, PillowWriter
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.collections import LineCollection
from matplotlib.colors import Normalize
from matplotlib.figure import Figure

NEIGHBOURHOOD = 120  # blocks around the watched one that the still shows
COLOURS = matplotlib.colormaps["viridis_r"]  # as in the other figures: the darker, the more bits


def still(dynamics: Mapping[str, Any]) -> Figure:
    """Draw the surroundings of the watched block in three panels: before the dynamics, half way, and after."""
    frames, places = dynamics["frames"], np.array(dynamics["places"])
    distances = np.linalg.norm(places - places[dynamics["watched"]], axis=1)
    shown = distances.argsort(kind="stable")[:NEIGHBOURHOOD]
    low, high = places[shown].min(0), places[shown].max(0)
    margin = 0.06 * (high - low)
    norm = bit_scale([{"bits": np.array(frame["bits"])[shown]} for frame in frames])
    figure = Figure(figsize=(6.3, 2.4))
    panels = figure.subplots(1, 3)
    half = len(frames) // 2
    for axes, number, name in zip(panels, (0, half, len(frames) - 1), ("before", "during", "after"), strict=True):
        scatter(axes, dynamics, frames[number], norm, size=16)
        axes.set_title(f"{name}: {moved_blocks(dynamics, frames[number])}")
        axes.set(xlim=(low[0] - margin[0], high[0] + margin[0]), ylim=(low[1] - margin[1], high[1] + margin[1]))
    figure.colorbar(ScalarMappable(norm, COLOURS), ax=list(panels), label="bits per weight", shrink=0.9)
    return figure


def animate(dynamics: Mapping[str, Any], path: pathlib.Path) -> None:
    """Write the dynamics as a GIF, one frame for each class of blocks that moved together; the last one stays."""
    frames = dynamics["frames"]
    figure = Figure(figsize=(4.2, 3.6), dpi=100)
    axes = figure.add_subplot()
    norm = bit_scale(frames)
    figure.colorbar(ScalarMappable(norm, COLOURS), ax=axes, label="bits per weight")

    def draw(number: int) -> Sequence[Any]:
        axes.clear()
        scatter(axes, dynamics, frames[min(number, len(frames) - 1)], norm, size=7)
        axes.set_title(moved_blocks(dynamics, frames[min(number, len(frames) - 1)]))
        return ()

    path.parent.mkdir(parents=True, exist_ok=True)
    FuncAnimation(figure, draw, frames=len(frames) + 4).save(path, PillowWriter(fps=2))


def bit_scale(frames: Sequence[Mapping[str, Any]]) -> Normalize:
    """Return the colour scale of all frames: from the 2 % to the 98 % quantile of their bits per weight."""
    bits = np.concatenate([frame["bits"] for frame in frames])
    return Normalize(*np.quantile(bits, (0.02, 0.98)))


def scatter(axes: Axes, dynamics: Mapping[str, Any], frame: Mapping[str, Any], norm: Normalize, size: float) -> None:
    """Draw all blocks coloured by their bits, and a line from the watched block to each of its neighbours."""
    places = np.array(dynamics["places"])
    watched, neighbours = dynamics["watched"], dynamics["neighbours"]
    links = [(places[one], places[other]) for one, other in dynamics["links"]]
    axes.add_collection(LineCollection(links, colors="#DDDDDD", linewidths=0.25, zorder=0))
    axes.scatter(places[:, 0], places[:, 1], c=np.array(frame["bits"]), cmap=COLOURS, norm=norm, s=size, linewidths=0)
    near = [(places[watched], places[other]) for other in neighbours]
    axes.add_collection(LineCollection(near, colors="black", linewidths=0.9))
    axes.scatter(places[watched, 0], places[watched, 1], s=26, marker="*", color="black", zorder=4)
    axes.set(xticks=[], yticks=[])
    axes.spines[:].set_visible(False)


def moved_blocks(dynamics: Mapping[str, Any], frame: Mapping[str, Any]) -> str:
    """Return, in words, how many blocks have another offset than at the start."""
    start = dynamics["frames"][0]["offsets"]
    moved = sum(now != then for now, then in zip(frame["offsets"], start, strict=True))
    return f"{moved} of {len(frame['offsets'])} moved"
