"""Figures of speed, memory, latency and the roofline: their values are those of the records."""

import numpy as np
import pandas as pd
import pytest

from nashswarm.records.record import Record
from nashswarm.reporting import tables
from nashswarm.reporting.figures import speed
from tests.reporting.test_frame import synthetic


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
    both = pd.concat([contestants(), contestants().assign(method="nash_lattice")])
    shown, names = speed.rows_of(both)
    assert len(shown) == 4 and names.count(speed.NAMES["compile"]) == 1
    assert "packed, 8-bit activations: nash_lattice" in names


def test_rows_of_differing_thread_counts_name_them() -> None:
    alone = contestants()[:2].assign(method="gptq_one_step", threads=1)
    later = contestants().assign(method="nash_lattice", threads=2)
    shown, names = speed.rows_of(pd.concat([later, alone]))
    assert names == [
        "32-bit floats, 2 threads",
        "32-bit floats, compiled, 2 threads",
        "packed, 8-bit activations: gptq_one_step, 1 thread",
        "packed, 8-bit activations: nash_lattice, 2 threads",
    ]
    assert shown["contestant"].tolist() == ["full", "compile", "int8", "int8"]
    assert not any("thread" in name for name in speed.rows_of(later)[1])


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
