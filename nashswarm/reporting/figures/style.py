"""What all figures share: colours, markers, values on logarithmic axes, labels that do not overlap, and ``save``.

A logarithmic axis cannot show zero.  A value too small to matter is drawn as a hollow mark at the bottom of the axis.
"""

import pathlib
from collections.abc import Collection, Iterable, Sequence

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.transforms import Bbox
from numpy.typing import NDArray

from nashswarm.records.record import Record
from nashswarm.reporting.labels import ABLATIONS, REFERENCE, rank

STYLE = pathlib.Path(__file__).with_name("style.mplstyle")  # of every figure: matplotlib.style.context(STYLE)
NEGLIGIBLE = {"kl": 1e-5, "regret": 1e-12, "perplexity": 0.0}  # nats per token; a smaller value counts as zero
SUFFIXES = (".pdf", ".png")
COLOURS = {  # by the beginning of a method's name
    "baseline": "#000000",
    "uniform": "#0072B2",
    "rtn": "#0072B2",
    "gptq": "#E69F00",
    "as_published": "#CC79A7",
    **dict.fromkeys(ABLATIONS, "#D55E00"),
    REFERENCE: "#009E73",
    "nash_swarm": "#117733",
    "fixed_width": "#56B4E9",
    "baq": "#882255",
    "radio": "#332288",
    "peer_llama_cpp": "#AA4499",
}
OTHER_COLOUR = "#777777"
MARKERS = "osD^vP*X<>"
CROWD = 8  # from this number of joined methods on, a legend replaces the names in the plot
LONGEST = 40  # characters of a name in the plot; longer ones need a legend as well
READABLE = 24  # a figure with more methods than this names none of them; a table does


class NothingToDraw(ValueError):
    """No record has the values that a figure shows."""


def colour(method: str) -> str:
    """Return the colour of a method's kind, grey for an unknown kind."""
    return next((shade for start, shade in COLOURS.items() if method.startswith(start)), OTHER_COLOUR)


def markers(methods: Iterable[str]) -> dict[str, str]:
    """Return a marker for each method, such that methods of one colour have different markers.

    >>> markers(["gptq", "nash_lattice", "gptq_tiles", "gptq"])
    {'gptq': 'o', 'nash_lattice': 'o', 'gptq_tiles': 's'}
    """
    marker_of: dict[str, str] = {}
    colours: list[str] = []
    for method in dict.fromkeys(methods):
        marker_of[method] = MARKERS[colours.count(colour(method)) % len(MARKERS)]
        colours.append(colour(method))
    return marker_of


def shade(bits: float) -> tuple[float, float, float]:
    """Return the colour of a bit-width as (red, green, blue): the wider the darker, white for pruned tiles."""
    if bits == 0:
        return 1.0, 1.0, 1.0
    position = (np.log2(bits) - np.log2(2)) / (np.log2(16) - np.log2(2))
    red, green, blue, _ = matplotlib.colormaps["viridis_r"](float(np.clip(position, 0, 1)))
    return red, green, blue


def floored(values: NDArray[np.float64], negligible: float) -> tuple[NDArray[np.float64], NDArray[np.bool_], float]:
    """Return ``values`` raised to a positive floor, a mask of those that were raised, and the floor.

    A value up to ``negligible`` is raised.  The floor is half of the smallest value that is not.

    >>> floored(np.array([0.0, 0.02, 0.2]), 1e-5)
    (array([0.01, 0.02, 0.2 ]), array([ True, False, False]), 0.01)
    """
    raised = values <= negligible
    floor = float(values[~raised].min()) / 2 if (~raised).any() else 1.0
    return np.where(raised, floor, values), raised, floor


def by_method(records: Iterable[Record], *series: str) -> dict[str, list[Record]]:
    """Group the records that have every one of ``series`` by method, in the order of methods and seeds."""
    complete = [record for record in records if all(record.series.get(name) for name in series)]
    complete.sort(key=lambda record: (rank(record.labels["method"]), record.labels["seed"]))
    groups: dict[str, list[Record]] = {}
    for record in complete:
        groups.setdefault(record.labels["method"], []).append(record)
    return groups


def refuse_crowd(methods: Collection[str]) -> None:
    """Raise NothingToDraw if there are more methods than a reader can tell apart by lines."""
    if len(methods) > READABLE:
        raise NothingToDraw(f"{len(methods)} methods are more than one figure of lines can tell apart")


def name_families(
    figure: Figure, x: NDArray[np.float64], y: NDArray[np.float64], families: Sequence[str], names: list[str]
) -> None:
    """Write each name beside its point, or draw a legend where the lines of many families would cross names or
    a name is too long.

    A figure with more than ``READABLE`` families gets neither.
    """
    if len(set(families)) > READABLE:
        return
    joined = [family for family in dict.fromkeys(families) if list(families).count(family) > 1]
    long = max(map(len, names)) > LONGEST
    if len(joined) < CROWD and not long:
        return place_labels(figure, x, y, names, [colour(family) for family in families])
    name_of = {family: name for family, name in zip(families, names, strict=True) if name}
    handles = [
        Line2D([], [], color=colour(family), marker=marker, label=name_of[family], linewidth=0.8)
        for family, marker in markers(families).items()
    ]
    figure.legend(
        handles=handles, loc="outside lower center" if long else "outside right center", ncols=2 if long else 1
    )


def place_labels(
    figure: Figure, x: NDArray[np.float64], y: NDArray[np.float64], names: list[str], colours: list[str]
) -> None:
    """Write each name beside its point, and draw a thin line to a name that had to move.

    A name moves until it covers no other name and no point.  All names move downwards or all move upwards, whichever
    takes less, so that they keep the order of their points.
    """
    figure.draw_without_rendering()
    axes = figure.axes[0]
    labels = [
        axes.annotate(name, (left, up), (7, 0), "data", "offset points", color=ink, fontsize=7, in_layout=False)
        for name, left, up, ink in zip(names, x, y, colours, strict=True)
    ]
    points = 72 / figure.dpi
    dots = axes.transData.transform(np.column_stack([x, y])) * points
    extents = [label.get_window_extent() for label in labels]
    sizes = np.array([(box.width, box.height) for box in extents]) * points
    frame = Bbox(axes.get_window_extent().get_points() * points)
    _, places = min((free_places(dots, sizes, frame, direction) for direction in (-1, 1)), key=lambda trial: trial[0])
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
    """Return how far the names move in total, and a box inside ``frame`` for each name.

    ``dots`` and ``sizes``: positions of the points and (width, height) of their names, in points.  ``direction``: 1 to
    move names up, -1 to move them down.  A name without a free place stays beside its point, at the cost of a long
    move.
    """
    taken = [Bbox.from_extents(*(dot - 3), *(dot + 3)) for dot in dots]
    places, moved = [Bbox.null()] * len(dots), 0.0
    for index in np.lexsort((dots[:, 0], direction * dots[:, 1])):
        width, height = sizes[index]
        candidates = [
            Bbox.from_bounds(dots[index, 0] + right, dots[index, 1] + direction * step - height / 2, width, height)
            for step in np.arange(0, 200, 2)
            for right in (7, -7 - width)
        ]
        free = [
            number
            for number, box in enumerate(candidates)
            if frame.contains(*box.p0) and frame.contains(*box.p1) and not any(map(box.overlaps, taken))
        ]
        places[index] = candidates[free[0] if free else 0]
        moved += free[0] // 2 if free else len(candidates)
        taken.append(places[index])
    return moved, places


def save(figure: Figure, stem: pathlib.Path) -> list[pathlib.Path]:
    """Write ``<stem>.pdf`` and ``<stem>.png`` and return both paths; the same figure gives the same bytes."""
    stem.parent.mkdir(parents=True, exist_ok=True)
    paths = [stem.with_name(stem.name + suffix) for suffix in SUFFIXES]
    figure.savefig(paths[0], metadata={"CreationDate": None})
    figure.savefig(paths[1], metadata={"Software": None})
    return paths
