"""Figures of mixtures of experts: loads of experts and losses."""

import dataclasses

import pytest

from nashswarm.records.record import Record
from nashswarm.reporting.figures import moe
from tests.reporting.test_frame import synthetic


def test_crowding_loads_are_sorted_and_relative_to_an_even_share() -> None:
    records = []
    for method, loads in (("moe_top_k", [1.0, 6.0, 2.0]), ("moe_nash_swarm", [3.0, 3.0, 3.0])):
        one = synthetic(method)
        one.series["load_0"], one.series["load_1"] = loads, loads[::-1]
        records.append(one)
    (axes,) = moe.crowding(records).axes
    lines = {line.get_label(): list(line.get_ydata()) for line in axes.lines}
    assert lines["moe_top_k"] == pytest.approx([2, 2 / 3, 1 / 3]) and lines["moe_nash_swarm"] == [1, 1, 1]
    with pytest.raises(ValueError, match="experiment=moe"):
        moe.crowding([synthetic("baseline")])


def router(method: str, seed: int, **metrics: float) -> Record:
    one = synthetic(method, seed)
    return dataclasses.replace(one, metrics=metrics)


def test_routing_methods_show_loss_against_the_busiest_expert() -> None:
    records = [
        router("moe_top_k", 0, nll=4.0, max_violation=1.0),
        router("moe_top_k", 1, nll=3.0, max_violation=3.0),
        router("moe_nash_swarm", 0, nll=3.2, max_violation=0.5, nll_following=3.3, max_violation_following=0.1),
        router("moe_expert_choice", 0, nll=9.0, max_violation=0.1, looks_ahead=1.0),
        router("moe_dense", 0, nll=3.6),
    ]
    (axes,) = moe.routing(records).axes
    large = [line for line in axes.lines if line.get_markersize() == 5 and len(line.get_xdata())]
    points_of_line = {(line.get_label(), line.get_markerfacecolor()): line.get_xydata().tolist() for line in large}
    assert [dot for (name, _), dot in points_of_line.items() if name == "moe_top_k"] == [[[2.0, 3.5]]]
    assert points_of_line["moe_nash_swarm", "white"] == [[0.1, 3.3]]
    assert not any(9.0 in line.get_ydata() for line in axes.lines)
    assert [list(line.get_ydata()) for line in axes.lines if line.get_label() == "dense"] == [[3.6, 3.6]]
    with pytest.raises(ValueError, match="experiment=moe"):
        moe.routing(records[3:])
