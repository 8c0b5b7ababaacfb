"""The flock, drawn: blocks in feature space, the neighbours of one of them, and their bits while best replies run."""

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


def still(dance: Mapping[str, Any]) -> Figure:
    """Three panels: the surroundings of the watched block before the dynamics, half way, and after.

    ``dance``: what ``experiments/benchmarks/flock_dynamics.py`` wrote.
    """
    frames, places = dance["frames"], np.array(dance["places"])
    away = np.linalg.norm(places - places[dance["watched"]], axis=1)
    shown = away.argsort(kind="stable")[:NEIGHBOURHOOD]
    low, high = places[shown].min(0), places[shown].max(0)
    margin = 0.06 * (high - low)
    norm = scale([{"bits": np.array(frame["bits"])[shown]} for frame in frames])
    figure = Figure(figsize=(6.3, 2.4))
    panels = figure.subplots(1, 3)
    half = len(frames) // 2
    for axes, place, name in zip(panels, (0, half, len(frames) - 1), ("before", "during", "after"), strict=True):
        scatter(axes, dance, frames[place], norm, size=16)
        axes.set_title(f"{name}: {told(dance, frames[place])}")
        axes.set(xlim=(low[0] - margin[0], high[0] + margin[0]), ylim=(low[1] - margin[1], high[1] + margin[1]))
    figure.colorbar(ScalarMappable(norm, COLOURS), ax=list(panels), label="bits per weight", shrink=0.9)
    return figure


def animate(dance: Mapping[str, Any], path: pathlib.Path) -> None:
    """Write the dynamics as a GIF, one frame for each class of blocks that moved together; the last one stays."""
    frames = dance["frames"]
    figure = Figure(figsize=(4.2, 3.6), dpi=100)
    axes = figure.add_subplot()
    norm = scale(frames)
    figure.colorbar(ScalarMappable(norm, COLOURS), ax=axes, label="bits per weight")

    def draw(place: int) -> Sequence[Any]:
        axes.clear()
        scatter(axes, dance, frames[min(place, len(frames) - 1)], norm, size=7)
        axes.set_title(told(dance, frames[min(place, len(frames) - 1)]))
        return ()

    path.parent.mkdir(parents=True, exist_ok=True)
    FuncAnimation(figure, draw, frames=len(frames) + 4).save(path, PillowWriter(fps=2))


def scale(frames: Sequence[Mapping[str, Any]]) -> Normalize:
    """Bits per weight that all frames have in common, but for the most extreme blocks."""
    every = np.concatenate([frame["bits"] for frame in frames])
    return Normalize(*np.quantile(every, (0.02, 0.98)))


def scatter(axes: Axes, dance: Mapping[str, Any], frame: Mapping[str, Any], norm: Normalize, size: float) -> None:
    """All blocks, coloured by their bits; the one that is watched with a line to each of its neighbours."""
    places = np.array(dance["places"])
    watched, near = dance["watched"], dance["neighbours"]
    links = [(places[one], places[other]) for one, other in dance["links"]]
    axes.add_collection(LineCollection(links, colors="#DDDDDD", linewidths=0.25, zorder=0))
    axes.scatter(places[:, 0], places[:, 1], c=np.array(frame["bits"]), cmap=COLOURS, norm=norm, s=size, linewidths=0)
    axes.add_collection(
        LineCollection([(places[watched], places[other]) for other in near], colors="black", linewidths=0.9)
    )
    axes.scatter(places[watched, 0], places[watched, 1], s=26, marker="*", color="black", zorder=4)
    axes.set(xticks=[], yticks=[])
    axes.spines[:].set_visible(False)


def told(dance: Mapping[str, Any], frame: Mapping[str, Any]) -> str:
    """How many blocks stand elsewhere than at the start."""
    moved = sum(now != then for now, then in zip(frame["offsets"], dance["frames"][0]["offsets"], strict=True))
    return f"{moved} of {len(frame['offsets'])} moved"
