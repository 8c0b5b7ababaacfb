"""Figures of the games: paths of convergence, sweeps of codes and offsets of blocks."""

import dataclasses

import pytest

from nashswarm.records.record import Record
from nashswarm.reporting.figures import games
from tests.reporting.test_frame import synthetic


def test_settling_codes_at_rest_are_hollow() -> None:
    one = synthetic("nash_lattice")
    one.series["moves"] = [50.0, 5.0, 0.0]
    one.layers.append({"name": "wte", "parameters": 1000})
    axes = games.settling([one]).axes[0]
    line, *marks = axes.lines
    assert line.get_ydata().tolist() == [5.0, 0.5, 0.25]
    assert [mark.get_markerfacecolor() for mark in marks][-1] == "white"
    assert marks[-1].get_xdata().tolist() == [3]
    with pytest.raises(ValueError, match="no record has sweeps of codes"):
        games.settling([synthetic("baseline")])


def test_decisions_of_blocks_are_in_the_row_of_their_layer() -> None:
    one = synthetic("lattice_no_swarm")
    whole = dataclasses.replace(synthetic("nash_lattice"), allocation="wte 3.9 +0*2 -1*1\nhead 1.5 +2*4\nnorm 16\n")
    figure = games.decisions([whole, one])
    left, right, _ = figure.axes
    assert [bar.get_width() for bar in left.patches] == [3.9, 1.5]
    assert [label.get_text() for label in left.get_yticklabels()] == ["wte", "head"]
    assert right.get_title() == "nash_lattice of gpt2_small"
    rows = [image.get_array().tolist() for image in right.images]
    assert rows == [[[0, 0, -1]], [[2, 2, 2, 2]]]
    assert [sorted(image.get_extent()[2:]) for image in right.images] == [[-0.4, 0.4], [0.6, 1.4]]
    with pytest.raises(ValueError, match="run nash_lattice"):
        games.decisions([one])


def with_reference(method: str) -> Record:
    one = synthetic(method)
    of_reference = {"potential_of_reference": [5.0, 3.0], "regret_of_reference": [0.5, 0.0]}
    trials = {"price_of_trial": [4e-8, 1e-8, 2e-8], "bytes_of_trial": [9.0, 30.0, 20.0]}
    return dataclasses.replace(one, series=one.series | of_reference | trials)


def test_convergence_with_reference_starts_with_its_path() -> None:
    prices, above, below = games.convergence([with_reference("nash_lattice"), synthetic("fixed_no_nash")]).axes
    paths = {line.get_label(): list(line.get_ydata()) for line in above.lines}
    assert paths["nash_lattice"] == [0.0, -2.0]
    assert len(paths["fixed_no_nash"]) == len(synthetic("fixed_no_nash").series["potential"])
    assert [list(line.get_ydata()) for line in prices.lines if len(line.get_ydata())] == [pytest.approx([2, 0.5, 1])]
    assert prices.get_yscale() == "log"
    assert [0.5] in [list(line.get_ydata()) for line in below.lines]


def test_convergence_without_trials_has_no_panel_of_prices() -> None:
    above, _ = games.convergence([synthetic("fixed_no_nash"), synthetic("baseline")]).axes
    assert [line.get_label() for line in above.lines] == ["fixed_no_nash"]
