"""Figures of records: whose path they draw, the order of methods, and how they differ on the page."""

import dataclasses

import numpy as np
import pandas as pd
import pytest

from nashswarm.records.record import Record
from nashswarm.reporting import frame
from nashswarm.reporting.figures import games, quality, style
from tests.reporting.test_frame import synthetic


def with_reference(method: str) -> Record:
    one = synthetic(method)
    of_reference = {"potential_of_reference": [5.0, 3.0], "regret_of_reference": [0.5, 0.0]}
    trials = {"price_of_trial": [4e-8, 1e-8, 2e-8], "bytes_of_trial": [9.0, 30.0, 20.0]}
    return dataclasses.replace(one, series=one.series | of_reference | trials)


def test_convergence_with_reference_starts_with_its_path() -> None:
    prices, above, below = games.convergence([with_reference("nash_swarm"), synthetic("no_nash")]).axes
    paths = {line.get_label(): list(line.get_ydata()) for line in above.lines}
    assert paths["nash_swarm"] == [0.0, -2.0]
    assert len(paths["no_nash"]) == len(synthetic("no_nash").series["potential"])
    assert [list(line.get_ydata()) for line in prices.lines if len(line.get_ydata())] == [pytest.approx([2, 0.5, 1])]
    assert prices.get_yscale() == "log"
    assert [0.5] in [list(line.get_ydata()) for line in below.lines]


def test_convergence_without_trials_has_no_panel_of_prices() -> None:
    above, _ = games.convergence([synthetic("no_nash"), synthetic("baseline")]).axes
    assert [line.get_label() for line in above.lines] == ["no_nash"]


def test_ablation_of_methods_is_sorted_by_cost() -> None:
    levels = {"nash_swarm": 0.1, "gptq": 0.15, "no_cache": 0.11, "no_sweeps": 0.4, "no_offsets": 0.2}
    axes = quality.ablation([synthetic(method, kl=kl) for method, kl in levels.items()]).axes[0]
    named = [label.get_text() for label in axes.get_yticklabels()]
    assert named == ["gptq", "no_sweeps", "no_offsets", "no_cache"]


def test_pareto_of_many_methods_has_a_legend_of_distinct_lines() -> None:
    libraries = [f"peer_{letter}" for letter in "abcdef"]
    methods = [*libraries, "fixed_width", "baq", "radio", "nash_swarm"]
    points = frame.points(frame.frame([synthetic(method, kl=0.1 + place) for place, method in enumerate(methods)]))
    sizes = [points.assign(bytes_file=points["bytes_file"] * times, method=points["method"] + f"[bits={times}]")
             for times in (1, 2)]  # fmt: skip
    figure = quality.pareto(pd.concat(sizes))
    (legend,) = figure.legends
    assert sorted(text.get_text() for text in legend.get_texts()) == sorted(methods)
    looks = {(str(handle.get_color()), str(handle.get_marker())) for handle in legend.get_lines()}
    assert len(looks) == len(methods)
    assert len({style.colour(method) for method in methods}) == 5
    assert not any(text.get_text() for text in figure.axes[0].texts)
    few = quality.pareto(pd.concat(sizes).loc[lambda table: table["method"].str.startswith("peer")])
    assert not few.legends and np.sum([bool(text.get_text()) for text in few.axes[0].texts]) == len(libraries)


def test_pareto_of_a_search_draws_points_without_names() -> None:
    methods = [f"nash_swarm[bits={2 + 0.1 * place},code_game=pass]" for place in range(style.READABLE + 1)]
    settled = {"potential": [2.0, 1.0], "regret": [1.0, 0.0], "moves": [3.0, 0.0]}
    records = [synthetic(method, kl=0.1 + place) for place, method in enumerate(methods)]
    records = [dataclasses.replace(one, series=one.series | settled) for one in records]
    figure = quality.pareto(frame.points(frame.frame(records)))
    assert not figure.legends and not any(text.get_text() for text in figure.axes[0].texts)
    with pytest.raises(style.NothingToDraw, match="25 methods are more than one figure of lines can tell apart"):
        games.convergence(records)
    assert len(games.convergence(records[1:]).legends) == 1
    with pytest.raises(style.NothingToDraw, match="25 methods"):
        games.settling(records)
