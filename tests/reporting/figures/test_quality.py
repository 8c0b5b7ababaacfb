"""Figures of quality: their values are those of the records, in order and with legible names."""

import dataclasses

import numpy as np
import pandas as pd
import pytest

from nashswarm.reporting import frame
from nashswarm.reporting.figures import games, quality, style
from tests.reporting.test_frame import synthetic


def test_accuracy_of_methods_is_per_cent_against_times_smaller() -> None:
    records = [synthetic(name) for name in ("baseline", "uniform4", "nash_lattice")]
    points = frame.average(frame.frame(records))
    axes = quality.accuracy(points).axes[0]
    drawn = {label.get_text() for label in axes.texts if label.get_text()}
    assert drawn == {"baseline", "uniform4", "nash_lattice"}
    (smaller,) = points.loc[points["method"] == "uniform4", "compression"]
    lines = [line.get_xydata()[0] for line in axes.lines]
    assert any(np.allclose(dot, (1 / (1 - smaller), 100 * points["top1_agreement"][1])) for dot in lines)
    with pytest.raises(ValueError, match="compression and top1_agreement"):
        quality.accuracy(points.drop(columns="compression"))
    with pytest.raises(ValueError, match="one model"):
        quality.accuracy(points.assign(model=["a", "b", "c"]))


def test_sensitivity_of_two_methods_has_two_panels() -> None:
    table = pd.DataFrame(
        {"method": ["gptq"] * 2 + ["nash_lattice"] * 2, "layer": ["h.0.attn.c_attn", "wte"] * 2,
         "layer_damage": [1e-3, 1e-2] * 2, "layer_kl": [2e-3, 1e-2] * 2}
    )  # fmt: skip
    figure = quality.sensitivity(table)
    assert [axes.get_title() for axes in figure.axes] == ["gptq", "nash_lattice"]
    assert {text.get_text() for text in figure.legends[0].get_texts()} == {"attn.c_attn", "wte"}
    with pytest.raises(ValueError, match="experiment=layers"):
        quality.sensitivity(table.drop(columns="layer_damage"))


def test_ablation_of_methods_is_sorted_by_cost() -> None:
    levels = {
        "nash_lattice": 0.1,
        "gptq": 0.15,
        "lattice_no_cache": 0.11,
        "lattice_no_sweeps": 0.4,
        "lattice_no_offsets": 0.2,
    }
    axes = quality.ablation([synthetic(method, kl=kl) for method, kl in levels.items()]).axes[0]
    named = [label.get_text() for label in axes.get_yticklabels()]
    assert named == ["gptq", "lattice_no_sweeps", "lattice_no_offsets", "lattice_no_cache"]


def test_pareto_of_many_methods_has_a_legend_of_distinct_lines() -> None:
    libraries = [f"peer_{letter}" for letter in "abcdef"]
    methods = [*libraries, "fixed_width", "baq", "radio", "nash_lattice"]
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
    methods = [f"nash_lattice[bits={2 + 0.1 * place},code_game=pass]" for place in range(style.READABLE + 1)]
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


def test_bytes_resident_of_records_is_measured_or_follows_from_the_matrices() -> None:
    """A file of 1,000 bytes, 300 of which are a matrix of 800 weights."""
    one = synthetic("nash_swarm")
    layers = [{"name": "wte", "parameters": 800, "bytes": 300}]
    told = one.metrics | {"bytes_file": 1000.0, "bits_per_weight_resident": 4.0}
    assert frame.bytes_resident(dataclasses.replace(one, metrics=told, layers=layers)) == 1000 - 300 + 400
    measured = {name: value for name, value in one.metrics.items() if name != "bits_per_weight_resident"}
    assert frame.bytes_resident(dataclasses.replace(one, metrics=measured | {"bytes_resident": 7.0})) == 7
    assert frame.bytes_resident(dataclasses.replace(one, metrics=measured)) is None


def test_pareto_against_memory_leaves_out_runs_that_do_not_tell_it() -> None:
    runs = [synthetic(method) for method in ("gptq", "nash_swarm", "peer_llama_cpp[type=Q2_K]")]
    layers = [{"name": "wte", "parameters": 8_000_000, "bytes": 0}]
    held = [
        dataclasses.replace(run, metrics=run.metrics | {"bits_per_weight_resident": bits}, layers=layers)
        for run, bits in zip(runs[1:], (3.0, 4.0), strict=True)
    ]
    points = frame.points(frame.frame([runs[0], *held]))
    axes = quality.pareto(points, size="bytes_resident").axes[0]
    assert axes.get_xlabel() == "weights in memory (MB)"
    assert {label.get_text() for label in axes.texts if label.get_text()} == {"nash_swarm", "peer_llama_cpp"}
    dots = [line.get_xdata()[0] for line in axes.lines if line.get_marker() not in ("None", "")]
    expected = [1e-6 * run.metrics["bytes_file"] + bits for run, bits in zip(held, (3.0, 4.0), strict=True)]
    assert np.allclose(sorted(dots), sorted(expected))
    with pytest.raises(style.NothingToDraw, match="no record has both bytes_resident and kl"):
        quality.pareto(points[points["method"] == "gptq"].dropna(axis=1), size="bytes_resident")
