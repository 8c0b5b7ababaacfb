"""Figures of accuracy, rest, sensitivity, speed, memory and the flock: they show the values of their records."""

import dataclasses
import pathlib

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from nashswarm.records import record
from nashswarm.records.record import Record
from nashswarm.reporting import frame, tables
from nashswarm.reporting.figures import flock, games, moe, quality, speed
from scripts import figures as script
from tests.reporting.conftest import few_statistics
from tests.reporting.test_frame import synthetic


def test_accuracy_of_methods_is_per_cent_against_times_smaller() -> None:
    records = [synthetic(name) for name in ("baseline", "uniform4", "nash_swarm")]
    points = frame.average(frame.frame(records))
    axes = quality.accuracy(points).axes[0]
    drawn = {label.get_text() for label in axes.texts if label.get_text()}
    assert drawn == {"baseline", "uniform4", "nash_swarm"}
    (smaller,) = points.loc[points["method"] == "uniform4", "compression"]
    lines = [line.get_xydata()[0] for line in axes.lines]
    assert any(np.allclose(dot, (1 / (1 - smaller), 100 * points["top1_agreement"][1])) for dot in lines)
    with pytest.raises(ValueError, match="compression and top1_agreement"):
        quality.accuracy(points.drop(columns="compression"))
    with pytest.raises(ValueError, match="one model"):
        quality.accuracy(points.assign(model=["a", "b", "c"]))


def test_settling_codes_at_rest_are_hollow() -> None:
    one = synthetic("nash_swarm")
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
    one = synthetic("no_swarm")
    whole = dataclasses.replace(synthetic("nash_swarm"), allocation="wte 3.9 +0*2 -1*1\nhead 1.5 +2*4\nnorm 16\n")
    figure = games.decisions([whole, one])
    left, right, _ = figure.axes
    assert [bar.get_width() for bar in left.patches] == [3.9, 1.5]
    assert [label.get_text() for label in left.get_yticklabels()] == ["wte", "head"]
    assert right.get_title() == "nash_swarm of gpt2_small"
    rows = [image.get_array().tolist() for image in right.images]
    assert rows == [[[0, 0, -1]], [[2, 2, 2, 2]]]
    assert [sorted(image.get_extent()[2:]) for image in right.images] == [[-0.4, 0.4], [0.6, 1.4]]
    with pytest.raises(ValueError, match="run nash_swarm"):
        games.decisions([one])


def test_sensitivity_of_two_methods_has_two_panels() -> None:
    table = pd.DataFrame(
        {"method": ["gptq"] * 2 + ["nash_swarm"] * 2, "layer": ["h.0.attn.c_attn", "wte"] * 2,
         "layer_damage": [1e-3, 1e-2] * 2, "layer_kl": [2e-3, 1e-2] * 2}
    )  # fmt: skip
    figure = quality.sensitivity(table)
    assert [axes.get_title() for axes in figure.axes] == ["gptq", "nash_swarm"]
    assert {text.get_text() for text in figure.legends[0].get_texts()} == {"attn.c_attn", "wte"}
    with pytest.raises(ValueError, match="experiment=layers"):
        quality.sensitivity(table.drop(columns="layer_damage"))


def contestants() -> pd.DataFrame:
    rows = []
    for name, ratio in (("full", np.nan), ("int8", 5.0), ("compile", 1.1)):
        row = {"model": "gpt2", "method": "gptq_tiles", "contestant": name, "bytes_resident": 1e6 * len(name)}
        for phase in speed.PHASES:
            row |= {phase: ratio, f"{phase}_low": 0.9 * ratio, f"{phase}_high": 1.2 * ratio}
        rows.append(row)
    return pd.DataFrame(rows)


def test_speed_and_memory_show_intervals_and_the_full_model() -> None:
    axes = speed.speed(contestants()).axes[0]
    assert [label.get_text() for label in axes.get_yticklabels()] == [
        speed.NAMES["compile"],
        "packed, 8-bit activations",
    ]
    spans = [line.get_xdata() for line in axes.lines if len(line.get_xdata()) == 2]
    assert any(np.allclose(span, (4.5, 6.0)) for span in spans)
    axes = speed.memory(contestants()).axes[0]
    assert [bar.get_width() for bar in axes.patches] == [4.0, 7.0, 4.0]
    with pytest.raises(ValueError, match="no record timed contestants"):
        speed.memory(contestants()[:0])


def test_rows_of_shared_contestants_are_shown_once() -> None:
    both = pd.concat([contestants(), contestants().assign(method="nash_swarm")])
    shown, names = speed.rows_of(both)
    assert len(shown) == 4 and names.count(speed.NAMES["compile"]) == 1
    assert "packed, 8-bit activations: nash_swarm" in names


def test_rows_of_differing_thread_counts_name_them() -> None:
    alone = contestants()[:2].assign(method="gptq_one_step", threads=1)
    later = contestants().assign(method="nash_swarm", threads=2)
    shown, names = speed.rows_of(pd.concat([later, alone]))
    assert names == [
        "32-bit floats, 2 threads",
        "32-bit floats, compiled, 2 threads",
        "packed, 8-bit activations: gptq_one_step, 1 thread",
        "packed, 8-bit activations: nash_swarm, 2 threads",
    ]
    assert shown["contestant"].tolist() == ["full", "compile", "int8", "int8"]
    assert not any("thread" in name for name in speed.rows_of(later)[1])


DYNAMICS = {
    "places": [[0.0, 0.0], [1.0, 0.0], [0.0, 1.0]],
    "links": [[0, 1], [0, 2]],
    "watched": 0,
    "neighbours": [1, 2],
    "frames": [
        {"offsets": [0, 0, 0], "bits": [3.0, 3.0, 2.0]},
        {"offsets": [0, 1, 0], "bits": [3.0, 2.75, 2.0]},
        {"offsets": [-1, 1, 0], "bits": [3.25, 2.75, 2.0]},
    ],
}


def test_flock_frames_show_how_many_blocks_moved(tmp_path: pathlib.Path) -> None:
    titles = [axes.get_title() for axes in flock.still(DYNAMICS).axes if axes.get_title()]
    assert titles == ["before: 0 of 3 moved", "during: 1 of 3 moved", "after: 2 of 3 moved"]
    flock.animate(DYNAMICS, tmp_path / "flock.gif")
    with Image.open(tmp_path / "flock.gif") as film:
        assert film.n_frames >= len(DYNAMICS["frames"])


def serving_records() -> list[Record]:
    records = []
    for rate, clients in ((None, 16), (None, 1), (1.0, 4)):
        one = synthetic("gptq_tiles")
        one.config["measure"] = {"concurrency": clients, "requests": 10, "rate": rate}
        for level in (50, 95, 99):
            one.metrics[f"latency_p{level}_ms"] = 1.0 * level * clients
            one.metrics[f"latency_p{level}_ms_full"] = 9.0 * level
        one.metrics["latency_p95_ratio"] = 9 / clients
        records.append(one)
    return records


def test_latency_of_both_loops_has_a_panel_each() -> None:
    table = tables.serving([*serving_records(), synthetic("uniform4")])
    assert table["clients"].tolist() == [1, 16, 4] and table["rate"].isna().tolist() == [True, True, False]
    figure = speed.latency(table)
    closed, open_loop = figure.axes
    assert [tick.get_text() for tick in closed.get_xticklabels()] == ["1", "16"]
    assert open_loop.get_title() == "requests by themselves, 1 per second"
    lines = {line.get_label(): list(line.get_ydata()) for line in closed.lines}
    assert lines["compressed, P95"] == pytest.approx([0.095, 1.52])
    assert lines["32-bit floats, P50"] == pytest.approx([0.45, 0.45])
    with pytest.raises(ValueError, match="experiment=load"):
        speed.latency(tables.serving([synthetic("uniform4")]))
    with pytest.raises(ValueError, match="one model and method"):
        speed.latency(table.assign(method=["a", "b", "b"]))


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


def test_roofline_of_products_touches_the_best_of_them() -> None:
    rows = [
        ("torch fp32", 1, 4.0),  # 400 bytes of codes: 100 MB/s, 50 million operations a second
        ("2+4 bits, lattice, int8", 1, 0.75),  # 37.5 bytes: 50 MB/s
        ("2+4 bits, lattice, int8", 64, 16.0),  # 12 800 operations: 800 million a second
        ("2+4 bits, lattice, int8, operator", 64, 1.0),  # the same kernel once more
    ]
    table = pd.DataFrame(
        [{"threads": 1, "shape": "10x10", "kernel": kernel, "batch": batch, "microseconds": time}
         for kernel, batch, time in rows]
    )  # fmt: skip
    (axes,) = speed.roofline(table).axes
    roof, *dots = axes.lines
    assert np.allclose(roof.get_xydata()[1], (8.0, 0.8)) and roof.get_ydata()[-1] == pytest.approx(0.8)
    drawn = sorted(tuple(map(float, dot)) for line in dots for dot in line.get_xydata())
    assert np.allclose(drawn, [(0.5, 0.05), (16 / 3, 0.2 / 0.75), (64 * 16 / 3, 0.8)])
    with pytest.raises(ValueError, match="no product has its bits in its name"):
        speed.roofline(table[3:].assign(kernel="another"))


@pytest.fixture(scope="module")
def script_figures(tmp_path_factory: pytest.TempPathFactory) -> set[str]:
    """Return the names of figures of two experiments that have the same run of ``nash_swarm``, drawn by the script.

    The folder had a figure of times from earlier records.
    """
    folder = tmp_path_factory.mktemp("script")
    one, other = synthetic("nash_swarm"), synthetic("gptq")
    for experiment, method in (("presets", "nash_swarm"), ("bit_budget", "nash_swarm[bits=3.0]")):
        for run, label in ((one, method), (other, "gptq")):
            labels = {**run.labels, "experiment": experiment, "method": label}
            record.write(folder / "records" / experiment, dataclasses.replace(run, labels=labels))
    out = folder / "figures"
    out.mkdir()
    (out / "presets_speed.pdf").touch()
    none = ["--flock", str(folder / "none"), "--kernels", str(folder / "none")]
    with few_statistics():
        assert script.main(["--records", str(folder / "records"), "--out", str(out), *none]) == 0
    return {path.name for path in out.iterdir()}


def test_figures_script_without_their_records_removes_figures(script_figures: set[str]) -> None:
    assert {"presets_pareto.pdf", "presets_bits.png"} <= script_figures and "presets_speed.pdf" not in script_figures


def test_figures_script_run_of_two_experiments_is_drawn_in_its_own(script_figures: set[str]) -> None:
    """``nash_swarm`` of one experiment may be ``nash_swarm[bits=3.0]`` of another, which has no reference then."""
    assert "presets_ablation.pdf" in script_figures and "bit_budget_ablation.pdf" not in script_figures
